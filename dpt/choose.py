"""The best of several pictures of a prompt, by the adapter's score of the finished ones."""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from discriminative.diffusion.sampler import draw_noise
from discriminative.settings import SamplerSettings
from dpt.correct import Correction, Told, corrected_latents
from dpt.forward import Reader, add_noise
from dpt.settings import CHOICE_NOISES


@dataclass(frozen=True)
class Choice:
    """Of how many pictures one is kept.

    Args:
        number: of candidates for each picture; 1: none is chosen, and nothing scored.
        stride: between the seeds of a picture's candidates.
        timestep: at which finished latents are scored.
    """

    number: int = 1
    stride: int = 1
    timestep: int = 0


NO_CHOICE = Choice()


class Kept(NamedTuple):
    """What is known of a picture that was kept.

    Args:
        seed: of its noise.
        scores: the matching score before every corrected step.
        candidates: how well it and the others fit their text by the adapter, by seed; empty where none was
            chosen.
    """

    seed: int
    scores: list[float]
    candidates: dict[int, float]


def adapter_score(
    reader: Reader, latents: torch.Tensor, told: Told, seeds: list[int], timestep: int, noises: int
) -> torch.Tensor:
    """How well finished latents (B, 4, h, w) match their texts by the adapter, (B,): at one timestep, the
    mean over noises that follow from the seeds."""
    timesteps = torch.full((len(latents),), timestep, device=latents.device)  # (B,)
    scores = []
    for number in range(1, noises + 1):
        noise = draw_noise(seeds, latents.shape[1:], number).to(latents)  # (B, 4, h, w)
        noisy, _ = add_noise(reader.models.scheduler, latents, noise, timesteps)
        scores.append(reader.score(noisy, timesteps, told.cond, told.pooled))
    return torch.stack(scores).mean(dim=0)  # (B,)


def pick(candidates: torch.Tensor, best: torch.Tensor) -> torch.Tensor:
    """Of each picture's candidates (k, B, ...) the one of number ``best`` (B,)."""
    return candidates[best, torch.arange(len(best))]  # (B, ...)


@torch.no_grad()
def best_latents(
    reader: Reader,
    told: Told,
    seeds: list[int],
    settings: SamplerSettings,
    correction: Correction,
    choice: Choice,
) -> tuple[torch.Tensor, list[Kept]]:
    """The finished latents (B, 4, h, w) that are kept, one for each prompt, and what is known of them.

    All candidates of a prompt are scored under the same noises.
    """
    shape = reader.models.latent_shape(settings.height, settings.width)
    rounds = [[seed + number * choice.stride for seed in seeds] for number in range(choice.number)]
    drawn = [
        corrected_latents(reader, told, draw_noise(some, shape), settings, correction) for some in rounds
    ]
    candidates = torch.stack([latents for latents, _ in drawn])  # (k, B, 4, h, w)
    fits = torch.zeros(candidates.shape[:2])  # (k, B)
    if choice.number > 1:
        scored = (told, seeds, choice.timestep, CHOICE_NOISES)
        fits = torch.stack([adapter_score(reader, latents, *scored) for latents in candidates]).float().cpu()
    best = fits.argmax(dim=0)  # (B,)
    kept = []
    for i, number in enumerate(best.tolist()):
        scores = [row[i] for row in drawn[number][1].values()]
        by_seed = {some[i]: fit[i].item() for some, fit in zip(rounds, fits, strict=True)}
        kept.append(Kept(rounds[number][i], scores, by_seed if choice.number > 1 else {}))
    return pick(candidates, best), kept
