"""Mining of hard negatives: for each caption the captions and pictures of other images that are most like it.

Likeness is the cosine of embeddings: of the pipeline's own text encoder, or of a CLIP model, which sees
pictures too. Without pictures the hard ones are those that belong to the hard captions.
"""

import json
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from discriminative.errors import UsageError
from discriminative.hub import at_revision, check_keys, hub_errors, hub_or_cache, one_line, why
from discriminative.records.files import read_image, to_pil, write_json
from dpt.data.samples import check_least

CHUNK = 128  # captions that are compared with all others at once
BATCH = 64  # texts or pictures that are embedded at once

EmbedText = Callable[[list[str]], torch.Tensor]  # B texts -> (B, D)
EmbedImage = Callable[[list[Image.Image]], torch.Tensor]  # B pictures -> (B, D)


@dataclass(frozen=True)
class Caption:
    """One caption of one image, both by their ids."""

    id: int
    image: int
    text: str


@dataclass(frozen=True)
class Negatives:
    """The hard negatives of a caption, the most alike first: ids of captions, and of images."""

    texts: tuple[int, ...]
    pictures: tuple[int, ...]


def normalised(text: str) -> str:
    """The words alone, in lower case: what near duplicates share."""
    return " ".join(re.findall(r"\w+", text.lower()))


class Likeness:
    """Which captions and which images may not be negatives of an image, as they would be true of it.

    Args:
        captions: of all images.
    """

    def __init__(self, captions: Sequence[Caption]):
        self.rows_of_image = defaultdict(list)
        self.rows_of_text = defaultdict(list)
        self.texts = [normalised(caption.text) for caption in captions]
        self.images = [caption.image for caption in captions]
        for row, (image, text) in enumerate(zip(self.images, self.texts, strict=True)):
            self.rows_of_image[image].append(row)
            self.rows_of_text[text].append(row)

    def rows(self, image: int) -> list[int]:
        """Captions of the image, and those that say the same as one of them."""
        texts = {self.texts[row] for row in self.rows_of_image[image]}
        return sorted({row for text in texts for row in self.rows_of_text[text]})

    def alike(self, image: int) -> set[int]:
        """The image itself, and those that share a caption with it."""
        return {self.images[row] for row in self.rows(image)}


def embedded(embed: Callable, items: Sequence, open_item: Callable = lambda item: item) -> torch.Tensor:
    """Embeddings (N, D) of unit length in float32 on the CPU, batch after batch."""
    batches = [
        embed([open_item(item) for item in items[start : start + BATCH]]).detach().float().cpu()
        for start in range(0, len(items), BATCH)
    ]
    return torch.nn.functional.normalize(torch.cat(batches), dim=1)


def nearest(
    queries: torch.Tensor, keys: torch.Tensor, barred: Callable[[int], list[int]], number: int
) -> list[list[int]]:
    """For each query the keys of greatest cosine, best first.

    Args:
        queries: (Q, D), of unit length.
        keys: (K, D), of unit length.
        barred: for the index of a query, the keys that do not count.
        number: at most so many for each; fewer where there are no more.
    """
    found = []
    for start in range(0, len(queries), CHUNK):
        cosines = queries[start : start + CHUNK] @ keys.T  # (C, K)
        for i, row in enumerate(cosines):
            row[barred(start + i)] = -torch.inf
        best = cosines.topk(min(number, len(keys)), dim=1)
        found += [
            [key for key, cosine in zip(keys_, values, strict=True) if cosine > -torch.inf]
            for keys_, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]
    return found


def mine(
    captions: Sequence[Caption],
    images: Mapping[int, Path] | None,
    embed_text: EmbedText,
    embed_image: EmbedImage | None = None,
    texts: int = 20,
    pictures: int = 4,
) -> dict[int, Negatives]:
    """Hard negatives of each caption.

    Captions of the same image, and those with the same words as one of them, are left out.

    Args:
        captions: of two images at least.
        images: the file of each image; None takes the images of the hard captions.
        embed_text: texts -> (B, D).
        embed_image: pictures -> (B, D), in the same space; None as ``images``.
        texts: hard captions for each, at most.
        pictures: hard images for each, at most.

    Returns:
        ids of captions and images, by the caption's id.

    Raises:
        UsageError: fewer than two images, or no negatives asked for.
        WorkError: a picture cannot be read.
    """
    check_least("texts", texts, 1)
    check_least("pictures", pictures, 1)
    if len({caption.image for caption in captions}) < 2:
        raise UsageError(f"captions: {len(captions)} of one image or none were given; needed are two images")
    likeness = Likeness(captions)
    features = embedded(embed_text, [caption.text for caption in captions])  # (N, D)
    rows = nearest(features, features, lambda row: likeness.rows(captions[row].image), texts)
    if images is None or embed_image is None:
        hard_images = [list(dict.fromkeys(captions[i].image for i in found))[:pictures] for found in rows]
    else:
        hard_images = _nearest_images(captions, features, likeness, images, embed_image, pictures)
    return {
        caption.id: Negatives(tuple(captions[i].id for i in found), tuple(shown))
        for caption, found, shown in zip(captions, rows, hard_images, strict=True)
    }


def _nearest_images(
    captions: Sequence[Caption],
    features: torch.Tensor,
    likeness: Likeness,
    images: Mapping[int, Path],
    embed_image: EmbedImage,
    number: int,
) -> list[list[int]]:
    ids = sorted({caption.image for caption in captions})
    column = {image: i for i, image in enumerate(ids)}
    seen = embedded(embed_image, ids, lambda image: to_pil(read_image(images[image])))  # (I, D)

    def barred(row: int) -> list[int]:
        return [column[image] for image in likeness.alike(captions[row].image)]

    return [[ids[i] for i in found] for found in nearest(features, seen, barred, number)]


# The file.


def write_negatives(path: Path, negatives: Mapping[int, Negatives], embedding: str) -> None:
    """Write what :func:`mine` found, with the name of what embedded it."""
    rows = {str(k): {"texts": list(n.texts), "pictures": list(n.pictures)} for k, n in negatives.items()}
    write_json(path, {"embedding": embedding, "captions": rows})


def read_negatives(path: Path) -> dict[int, Negatives]:
    """What :func:`write_negatives` wrote.

    Raises:
        UsageError: there is no such file, it holds something else, or nothing.
    """
    advice = "write it with `python -m dpt mine`"
    if not path.is_file():
        raise UsageError(f"--negatives: {path} is missing; {advice}")
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["captions"]
        found = {
            int(k): Negatives(tuple(map(int, n["texts"])), tuple(map(int, n["pictures"])))
            for k, n in rows.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = one_line(error)
        raise UsageError(f"--negatives: {path} holds no mined negatives ({reason}); {advice}") from error
    if not found:
        raise UsageError(f"--negatives: {path} holds none; {advice}")
    return found


# What embeds.


class PipelineText:
    """The pooled state of a pipeline's own text encoder.

    Args:
        tokenizer: of the pipeline.
        text_encoder: of the pipeline, on any device.
    """

    def __init__(self, tokenizer, text_encoder: torch.nn.Module):
        self.tokenizer = tokenizer
        self.text_encoder = text_encoder

    @torch.no_grad()
    def __call__(self, texts: list[str]) -> torch.Tensor:
        """B texts -> (B, D)."""
        ids = self.tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        device = next(self.text_encoder.parameters()).device
        return self.text_encoder(ids.to(device)).pooler_output  # (B, D)


class Clip:
    """A CLIP model of transformers, from the hub or a folder; of weights only safetensors are read.

    Args:
        name: ``<id>``, ``<id>@<revision>`` or a folder.
        device: where it runs.

    Raises:
        UsageError: it cannot be loaded.
    """

    def __init__(self, name: str, device: torch.device):
        from safetensors import SafetensorError
        from transformers import CLIPModel, CLIPProcessor

        place, revision = at_revision(name)
        kinds = (OSError, ValueError, RuntimeError, KeyError, TypeError, ImportError, SafetensorError)
        try:
            with hub_or_cache(place):
                model, info = CLIPModel.from_pretrained(
                    place, revision=revision, use_safetensors=True, output_loading_info=True
                )
                self.processor = CLIPProcessor.from_pretrained(place, revision=revision)
            check_keys(info["missing_keys"])
        except (*kinds, *hub_errors()) as error:
            raise UsageError(f"--clip_model: {name!r} could not be loaded: {why(error)}") from error
        self.model = model.requires_grad_(False).eval().to(device)
        self.device = device

    @torch.no_grad()
    def text(self, texts: list[str]) -> torch.Tensor:
        """B texts -> (B, D)."""
        inputs = self.processor(text=texts, return_tensors="pt", padding=True, truncation=True)
        return _features(self.model.get_text_features(**inputs.to(self.device)))

    @torch.no_grad()
    def image(self, pictures: list[Image.Image]) -> torch.Tensor:
        """B pictures -> (B, D)."""
        inputs = self.processor(images=pictures, return_tensors="pt")
        return _features(self.model.get_image_features(**inputs.to(self.device)))


def _features(answer) -> torch.Tensor:
    # transformers 5 wraps the projected features, 4 gives them bare.
    return answer if isinstance(answer, torch.Tensor) else answer.pooler_output
