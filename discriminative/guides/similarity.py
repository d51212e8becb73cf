"""How alike images and a text are, by a CLIP model (Radford et al. 2021)."""

import torch

from discriminative.errors import UsageError
from discriminative.hub import check_keys, hub_errors, hub_or_cache, why
from discriminative.records.files import to_pil


class TextSimilarity:
    """A CLIP model from the hub or a folder.

    Raises:
        UsageError: it cannot be loaded.
    """

    def __init__(self, name: str, device: torch.device):
        from safetensors import SafetensorError
        from transformers import CLIPModel, CLIPProcessor

        try:
            with hub_or_cache(name):
                model, info = CLIPModel.from_pretrained(name, use_safetensors=True, output_loading_info=True)
                self.processor = CLIPProcessor.from_pretrained(name)
            check_keys(info["missing_keys"])
        except (
            OSError,
            ValueError,
            RuntimeError,
            KeyError,
            TypeError,
            ImportError,
            SafetensorError,
            *hub_errors(),
        ) as error:
            raise UsageError(f"--clip_model: {name!r} could not be loaded: {why(error)}") from error
        self.model = model.requires_grad_(False).eval().to(device)
        self.device = device

    def check_text(self, text: str, flag: str) -> None:
        """Check that the model reads all of a text: what is beyond its length it would not see.

        Raises:
            UsageError: it is too long.
        """
        number = len(self.processor.tokenizer(text).input_ids)
        most = self.model.config.text_config.max_position_embeddings
        if number > most:
            raise UsageError(
                f"--{flag}: {text!r} takes {number} of the CLIP model's tokens, with begin and end; "
                f"allowed are {most}"
            )

    @torch.no_grad()
    def scores(self, images: torch.Tensor, texts: list[str]) -> torch.Tensor:
        """Cosine of each image (B, 3, H, W) in [0, 1] and each of K texts, (B, K) in [-1, 1]."""
        pictures = [to_pil(image) for image in images]
        inputs = self.processor(
            text=texts, images=pictures, return_tensors="pt", padding=True, truncation=True
        )
        seen = self.model(**inputs.to(self.device))
        pairs = seen.image_embeds[:, None], seen.text_embeds[None]  # (B, 1, D), (1, K, D)
        return torch.nn.functional.cosine_similarity(*pairs, dim=-1).cpu()

    @torch.no_grad()
    def of(self, images: torch.Tensor, text: str) -> torch.Tensor:
        """Cosine of each image (B, 3, H, W) in [0, 1] and the text, (B,) in [-1, 1]."""
        inputs = self.processor(
            text=[text],
            images=[to_pil(image) for image in images],
            return_tensors="pt",
            padding=True,
            truncation=True,
        )
        seen = self.model(**inputs.to(self.device))
        return torch.nn.functional.cosine_similarity(seen.image_embeds, seen.text_embeds).cpu()
