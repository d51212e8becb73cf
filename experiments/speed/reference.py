"""A plain loop after what is known of the official code, to compare with: one image at a time, as its
hyperparameters say.

    python -m experiments.speed.reference --class_index 2 --max_epochs 2      # one class of the
    miniature, as the official program goes about it

It differs from ours where the official code does: images go through the models one by one, with gradient
through both halves of the guidance and the last two UNet calls of PNDM's list; the optimiser holds the
whole vocabulary, whose other gradients are set to zero; each class loads the models anew, and each
improvement saves a whole pipeline. What would only make it wrong is left out (gradients are clipped after
the backward pass).
"""

import argparse
import copy
import shutil
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from classifiers import load_classifier
from config import RunConfig, with_preset
from discriminative.diffusion.models import DiffusionModels, load_models
from discriminative.diffusion.schedulers import fresh_scheduler
from discriminative.guides.classifier import Guide
from discriminative.guides.labels import prompt_class_name
from discriminative.hub import quiet_libraries
from discriminative.precision import resolve_device, resolve_dtype
from discriminative.tokens.prompts import TEMPLATES, fill
from experiments.speed import common

GRADIENT_CALLS = 2  # "the last step", by a count of 30 of a list of 31


class Reference:
    """The models with the token as a row of their vocabulary.

    Args:
        models: UNet and VAE are shared, tokenizer and text encoder copied. config: with the paper's preset.
        class_name: in the prompts.
    """

    def __init__(self, models: DiffusionModels, guide: Guide, class_name: str, config: RunConfig):
        self.models = models
        self.guide = guide
        self.config = config
        self.tokenizer = copy.deepcopy(models.tokenizer)
        self.text_encoder = copy.deepcopy(models.text_encoder)
        self.tokenizer.add_tokens([config.placeholder_token])
        self.row = self.tokenizer.convert_tokens_to_ids(config.placeholder_token)
        self.text_encoder.resize_token_embeddings(
            max(len(self.tokenizer), self.text_encoder.get_input_embeddings().num_embeddings),
            mean_resizing=False,
        )
        self.table = self.text_encoder.get_input_embeddings().weight.requires_grad_(True)  # (V + 1, width)
        with torch.no_grad():
            self.table[self.row] = self.table[
                self.tokenizer.convert_tokens_to_ids(self.tokenizer.tokenize(config.initializer_token)[0])
            ]
        chosen = config.learning().optimizer
        rate = chosen.step_size(config.images_per_update, 0)
        self.optimizer = torch.optim.AdamW(
            [self.table],
            lr=rate,
            betas=(chosen.adam_beta1, chosen.adam_beta2),
            eps=chosen.adam_epsilon,
            weight_decay=chosen.weight_decay,
        )
        self.scaler = torch.amp.GradScaler(models.device.type, enabled=models.dtype == torch.float16)
        self.prompts = [fill(t, config.placeholder_token, class_name) for t in TEMPLATES]

    def encode(self, prompt: str) -> torch.Tensor:
        """``encoder_hidden_states`` (1, L, D)."""
        ids = self.tokenizer(
            prompt, padding="max_length", max_length=self.tokenizer.model_max_length, return_tensors="pt"
        ).input_ids
        return self.text_encoder(ids.to(self.models.device)).last_hidden_state.to(self.models.dtype)

    def image(self, prompt: str, generator: torch.Generator) -> torch.Tensor:
        """One image (1, 3, H, W) in [0, 1], with gradient through the last UNet calls and the decoder."""
        models = self.models
        config = self.config
        both = torch.cat([self.encode(""), self.encode(prompt)])  # (2, L, D)
        scheduler = fresh_scheduler(models.scheduler)
        scheduler.set_timesteps(config.num_inference_steps, device=models.device)
        noise = torch.randn(1, *models.latent_shape(config.height, config.width), generator=generator)
        latents = noise.to(models.device, models.dtype) * scheduler.init_noise_sigma  # (1, C, h, w)
        for i, t in enumerate(scheduler.timesteps):
            with torch.set_grad_enabled(i >= len(scheduler.timesteps) - GRADIENT_CALLS):
                model_input = scheduler.scale_model_input(torch.cat([latents] * 2), t)  # (2, C, h, w)
                uncond, cond = models.unet(model_input, t, encoder_hidden_states=both).sample.chunk(2)
                latents = scheduler.step(
                    uncond + config.guidance_scale * (cond - uncond), t, latents
                ).prev_sample
        decoded = models.vae.decode(latents / models.vae.config.scaling_factor).sample
        return (decoded / 2 + 0.5).clamp(0, 1)

    def update(self) -> tuple[float, float]:
        """One update of five images, one after the other; returns mean loss and accuracy."""
        config = self.config
        losses = []
        right = 0
        generator = torch.Generator().manual_seed(config.seed)  # the same noises in every update
        target = torch.tensor([self.guide.target], device=self.models.device)
        self.optimizer.zero_grad()
        for i in range(config.images_per_update):
            logits = self.guide.classifier.logits(
                self.image(self.prompts[i % len(self.prompts)], generator)
            )  # (1, K)
            loss = F.cross_entropy(logits.float(), target)
            self.scaler.scale(loss / config.images_per_update).backward()
            losses.append(loss.item())
            right += (logits.argmax(1) == target).item()
        others = torch.arange(len(self.table), device=self.table.device) != self.row
        self.table.grad[others] = 0
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_([self.table], config.max_grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return sum(losses) / len(losses), right / len(losses)

    @property
    def vector(self) -> torch.Tensor:
        """The token's vector (1, width)."""
        return self.table.detach()[self.row : self.row + 1].clone()

    def save(self, folder: Path) -> None:
        """Write the whole pipeline."""
        from diffusers import StableDiffusionPipeline

        models = self.models
        parts = {
            "vae": models.vae,
            "unet": models.unet,
            "tokenizer": self.tokenizer,
            "text_encoder": self.text_encoder,
        }
        pipeline = StableDiffusionPipeline(
            **parts,
            scheduler=models.scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipeline.save_pretrained(folder)


def learn_class(config: RunConfig, folder: Path) -> tuple["Reference", list[dict]]:
    """The official program for one class of the miniature: models loaded, updates, a pipeline at each
    improvement.

    Returns:
        the reference, and a row an update: loss, accuracy, seconds since the beginning, the vector after it.
    """
    begin = time.perf_counter()
    to = resolve_device(config.device), resolve_dtype(config.mixed_precision, resolve_device(config.device))
    classifier = load_classifier(config.classifier or "miniature", *to)
    target = config.class_index - 1
    models = load_models(config.model, *to)
    reference = Reference(
        models, Guide(classifier, target), prompt_class_name(classifier.labels[target]), config
    )
    rows = []
    best = float("inf")
    since = 0
    for _ in range(config.max_epochs):
        loss, accuracy = reference.update()
        since += 1
        if loss < best:
            best = loss
            since = 0
            reference.save(folder)
        rows.append(
            {
                "loss": loss,
                "accuracy": accuracy,
                "seconds": time.perf_counter() - begin,
                "vector": reference.vector,
            }
        )
        if accuracy > config.stop_train_accuracy or since >= config.patience:
            break
    return reference, rows


def bytes_of(folder: Path) -> int:
    """What a folder's files take."""
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--class_index", type=int, default=2, help="of the miniature, from 1")
    parser.add_argument("--max_epochs", type=int, default=50)
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    args = parser.parse_args()
    quiet_libraries()
    given = {
        "model": "miniature",
        "class_index": args.class_index,
        "max_epochs": args.max_epochs,
        "device": "cpu",
    }
    folder = Path(tempfile.mkdtemp())
    try:
        _, rows = learn_class(with_preset("paper", given), folder)
        size = bytes_of(folder)
    finally:
        shutil.rmtree(folder)
    told = [{k: v for k, v in row.items() if k != "vector"} for row in rows]
    common.finish(
        common.environment(torch.device("cpu")) | {"updates": told, "bytes_on_disk": size}, args.out
    )


if __name__ == "__main__":
    main()
