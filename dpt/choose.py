"""The best of several pictures of a prompt, by the adapter's score of the finished ones."""

from dataclasses import dataclass

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


NONE = Choice()


@dataclass(frozen=True)
class Candidate:
    """One picture of each prompt.

    Args:
        seeds: of B pictures.
        latents: finished ones (B, 4, h, w).
        scores: of each picture before every corrected step, by step.
        fits: how well it fits its text by the adapter, (B,).
    """

    seeds: list[int]
    latents: torch.Tensor
    scores: dict[int, list[float]]
    fits: torch.Tensor


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


def best_of(candidates: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """Of each picture's candidates (k, B, ...) the one of the highest score (k, B), the first of equals."""
    best = scores.argmax(dim=0)  # (B,)
    return candidates[best, torch.arange(len(best))]  # (B, ...)


@torch.no_grad()
def candidates_of(
    reader: Reader,
    told: Told,
    seeds: list[int],
    settings: SamplerSettings,
    correction: Correction,
    choice: Choice,
) -> list[Candidate]:
    """All pictures of which one is chosen; all of one prompt are scored under the same noises."""
    shape = reader.models.latent_shape(settings.height, settings.width)
    found = []
    for number in range(choice.number):
        some = [seed + number * choice.stride for seed in seeds]
        noise = draw_noise(some, shape)  # (B, 4, h, w)
        latents, scores = corrected_latents(reader, told, noise, settings, correction)
        fits = torch.zeros(len(latents))  # (B,)
        if choice.number > 1:
            fits = adapter_score(reader, latents, told, seeds, choice.timestep, CHOICE_NOISES)
        found.append(Candidate(some, latents, scores, fits.float().cpu()))
    return found
