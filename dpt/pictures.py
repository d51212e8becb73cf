"""Pictures of prompts: drawn with LoRA and self-correction and without, and judged by what they show (DPT,
section 4.3)."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch

from discriminative.diffusion.sampler import decode_in_parts
from discriminative.progress import progress
from discriminative.settings import SamplerSettings
from discriminative.tokens.class_token import ClassToken
from dpt.alignment import Detector, Judged, alignment_figures, alignments
from dpt.choose import NO_CHOICE, Choice, Kept, best_latents
from dpt.correct import Correction, encode_prompts
from dpt.data.scenes import PROMPT_KINDS, Prompt, prompts
from dpt.evaluate import mean_share
from dpt.files import without_lora
from dpt.forward import Reader

DRAWN_AT_ONCE = 4  # images through the UNet, with gradient
NOISES = 2  # pictures of each prompt that is judged
PLAIN = "plain"
TUNED = "LoRA"
CORRECTED = "corrected"


@dataclass(frozen=True)
class Drawn:
    """Images (N, 3, H, W) in [0, 1], and what is known of each."""

    images: torch.Tensor
    kept: list[Kept]


def draw_all(
    reader: Reader,
    texts: Sequence[str],
    seeds: Sequence[int],
    settings: SamplerSettings,
    correction: Correction,
    told: str,
    token: ClassToken | None = None,
    choice: Choice = NO_CHOICE,
) -> Drawn:
    """One image of each text, from its seed, batch by batch.

    Args:
        told: what the progress bar says.
        token: a class token that texts hold.
        choice: of how many pictures each is the best.

    Raises:
        UsageError: a text is longer than the text encoder takes.
    """
    with torch.no_grad():
        encoded = encode_prompts(reader, list(texts), token)
    images = []
    kept = []
    with progress(total=len(seeds), desc=told, unit="image", leave=False) as bar:
        for first in range(0, len(seeds), DRAWN_AT_ONCE):
            part = slice(first, first + DRAWN_AT_ONCE)
            some = encoded._replace(cond=encoded.cond[part], pooled=encoded.pooled[part])
            latents, found = best_latents(reader, some, list(seeds[part]), settings, correction, choice)
            images.append(decode_in_parts(reader.models, latents, settings).float().cpu())
            kept += found
            bar.update(len(found))
    return Drawn(torch.cat(images), kept)


@dataclass(frozen=True)
class Arm:
    """Pictures that were drawn one way, and what the detector makes of each."""

    images: torch.Tensor
    judged: list[Judged]

    @property
    def right(self) -> list[bool]:
        """Whether each picture shows all that its prompt says."""
        return [alignment.full == 1 for _, alignment in self.judged]


def judge_pictures(
    reader: Reader,
    detector: Detector,
    number: int,
    seed: int,
    settings: SamplerSettings,
    correction: Correction,
    has_lora: bool,
) -> dict[str, Arm]:
    """Pictures of the miniature's prompts, plain, with the LoRA where there is one, and corrected, judged.

    All arms have the same prompts and noises.

    Args:
        number: of prompts of each kind, 1 or more.
        seed: of prompts and noises.
    """
    asked = [p for kind in PROMPT_KINDS for p in prompts(kind, number, seed) for _ in range(NOISES)]
    texts = [prompt.text for prompt in asked]
    seeds = range(seed, seed + len(asked))
    arms = {PLAIN: Correction(0.0)} | ({TUNED: Correction(0.0)} if has_lora else {})
    arms |= {CORRECTED: correction} if correction.factor else {}
    found = {}
    for name, chosen in arms.items():
        with without_lora(reader.models) if name == PLAIN else nullcontext():
            images = draw_all(reader, texts, seeds, settings, chosen, f"pictures, {name}").images
        found[name] = Arm(images, alignments(detector, asked, images))
    return found


def picture_figures(arms: dict[str, Arm]) -> dict:
    """Alignment of each arm, and what it gains over plain pictures in whole captions, prompt by prompt, with
    a bootstrap interval of 95 % over prompts."""
    told = {name: alignment_figures(arm.judged) for name, arm in arms.items()}
    plain = _by_prompt(arms[PLAIN])
    gains = {
        name: mean_share(_by_prompt(arm) - plain) | {"pictures": len(arm.judged)}
        for name, arm in arms.items()
        if name != PLAIN
    }
    return {"arms": told, "gain": gains}


def _by_prompt(arm: Arm) -> np.ndarray:
    """Share of whole captions of each prompt's pictures (P,)."""
    pictures: dict[Prompt, list[bool]] = {}
    for (prompt, _), right in zip(arm.judged, arm.right, strict=True):
        pictures.setdefault(prompt, []).append(right)
    return np.array([np.mean(some) for some in pictures.values()])
