"""Images of prompts with a token in them, in batches that fit in memory."""

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from discriminative.diffusion.kept import KeptLatents
from discriminative.diffusion.memory import Batches
from discriminative.diffusion.models import DiffusionModels
from discriminative.guides.classifier import are_finite
from discriminative.precision import precision_name
from discriminative.progress import progress
from discriminative.records.environment import environment
from discriminative.records.files import to_pil, write_image, write_json
from discriminative.records.pictures import captioned
from discriminative.settings import SamplerSettings
from discriminative.tokens.class_token import ClassToken


def in_batches(
    token: ClassToken,
    prompts: list[str],
    seeds: list[int],
    settings: SamplerSettings,
    batch_size: int | None,
    use: Callable[[torch.Tensor, list[int]], None],
    kept: KeptLatents | None = None,
) -> None:
    """Sample an image of each prompt from its seed, and give one batch after the other to ``use``.

    Args:
        batch_size: images at once; None is all. Halved where memory runs out.
        use: takes images (B, 3, H, W) in [0, 1], float32 on the CPU, and their seeds.
        kept: where latents of prompts without a token are kept; None samples all.
    """
    with progress(total=len(seeds), desc=prompts[0], unit="image", leave=False) as bar:

        def work(chunk: slice) -> None:
            images = images_of(token, prompts[chunk], seeds[chunk], settings, kept).float().cpu()
            broken = len(images) - int(are_finite(images).sum())
            if broken:
                advice = advice_for_images(token.models)
                tqdm.write(f"note: {broken} of {len(images)} images are not finite: wrong, black{advice}")
            use(images, seeds[chunk])
            bar.update(len(images))

        Batches(batch_size, token.models.fits, "sample").over(len(seeds), work)


def advice_for_images(models: DiffusionModels) -> str:
    """What helps against images that are not finite: half precision overflows long before the others."""
    if models.coarse_dtype == torch.float16:
        return "; --eval_precision bf16 helps, or none"
    return "; --mixed_precision no or bf16 helps" if models.dtype == torch.float16 else ""


@torch.no_grad()
def images_of(
    token: ClassToken,
    prompts: list[str],
    seeds: list[int],
    settings: SamplerSettings,
    kept: KeptLatents | None,
) -> torch.Tensor:
    """Images (B, 3, H, W) in [0, 1] of prompts, sampled at once, or kept where no token is in them."""
    if kept is None or token.stands_in(prompts):
        return token.sample(prompts, seeds, settings)
    return kept.sample(token.models, token.encode(prompts), token.unconditional, seeds, settings)


def draw_all(
    token: ClassToken, prompt: str, seeds: list[int], settings: SamplerSettings, batch_size: int | None = None
) -> torch.Tensor:
    """Images (N, 3, H, W) in [0, 1], float32 on the CPU, of one prompt, a seed each.

    A changed batch size changes no noise.
    """
    images = []
    in_batches(token, [prompt] * len(seeds), seeds, settings, batch_size, lambda part, _: images.append(part))
    return torch.cat(images)


def sampling_record(models: DiffusionModels, settings: SamplerSettings) -> dict[str, Any]:
    """How images are sampled, resolved: size, scheduler and precision are those of the models."""
    height, width = models.image_size(settings.height, settings.width)
    record = asdict(settings) | {"height": height, "width": width}
    record["scheduler"] = type(models.scheduler).__name__
    record["precision"] = f"torch.{precision_name(models)}"
    return record


def draw_to_folder(
    root: Path,
    token: ClassToken,
    prompt: str,
    seeds: list[int],
    settings: SamplerSettings,
    batch_size: int | None,
    said: dict[str, Any],
    resume: bool = False,
) -> Path:
    """Draw one prompt into a folder of its own: an image a seed, ``grid.png``, ``prompt.json``.

    Another prompt, seed, setting or token has another folder, so nothing that was drawn goes.

    Args:
        root: where the folder is made.
        said: what the record says of model and token.
        resume: leave a folder as it is that is complete.

    Returns:
        the folder.
    """
    record = {"prompt": prompt, "seeds": seeds} | said
    record["settings"] = sampling_record(token.models, settings)
    folder = root / folder_name(prompt, record)
    if resume and (folder / "prompt.json").exists():
        return folder
    drawn = {}

    def use(images: torch.Tensor, chunk: list[int]) -> None:
        for seed, image in zip(chunk, images, strict=True):
            write_image(folder / f"{seed:04d}.png", to_pil(image))
            drawn[seed] = image

    in_batches(token, [prompt] * len(seeds), seeds, settings, batch_size, use)
    write_image(folder / "grid.png", captioned(prompt, drawn))
    write_json(folder / "prompt.json", record | {"environment": environment(token.models.device)})
    return folder


def folder_name(prompt: str, record: dict[str, Any]) -> str:
    """The prompt's words, and a hash of all that decides its images: "a_newclas_bat_in_snow_1f3a5c7e"."""
    words = re.sub(r"[^a-z0-9]+", "_", prompt.lower()).strip("_")[:60]
    return f"{words}_{hashlib.sha256(json.dumps(record).encode()).hexdigest()[:8]}".lstrip("_")
