"""Self-correction: at each step the latents move along the gradient of the matching score (DPT, section 3.4).

    g = d/dz_t sum of s(z_t, y, t),   z'_t = z_t + eta g,
    e = e(z_t, none) + w (e(z'_t, y) - e(z_t, none)),   then the scheduler's step.

"official" takes the step from z_t; "state" puts z'_t in both predictions and in the step, too.
"""

import re
from dataclasses import dataclass
from typing import NamedTuple

import torch

from discriminative.diffusion.sampler import Walk, decode_in_parts, draw_noise
from discriminative.precision import FIRST_SCALE, autocast
from discriminative.settings import SamplerSettings
from discriminative.tokens.class_token import ClassToken
from discriminative.tokens.prompts import tokenize
from dpt.forward import Reader


@dataclass(frozen=True)
class Correction:
    """How latents are corrected.

    Args:
        factor: eta; 0 is plain generation, bit for bit.
        mode: "official" or "state".
        first: step of the scheduler's list, from 0, that is corrected first.
        stop: the step before which correction ends; None: the last is corrected, too.
    """

    factor: float
    mode: str = "official"
    first: int = 0
    stop: int | None = None

    def is_at(self, step: int) -> bool:
        """Whether a step is corrected."""
        return self.factor > 0 and self.first <= step and (self.stop is None or step < self.stop)


class Told(NamedTuple):
    """Prompts as UNet and adapter take them.

    Args:
        cond: ``encoder_hidden_states`` (B, L, D), in the models' precision.
        pooled: (B, D), float32.
        uncond: of the empty prompt (1, L, D).
    """

    cond: torch.Tensor
    pooled: torch.Tensor
    uncond: torch.Tensor


def encode_prompts(reader: Reader, prompts: list[str], token: ClassToken | None = None) -> Told:
    """Prompts encoded, with a class token in them where there is one.

    Raises:
        UsageError: a prompt is longer than the text encoder takes.
    """
    models = reader.models
    names = token.names if token else []
    tokenize(models.tokenizer, prompts, *([names] if token else []))
    if token is None:
        encoded = reader.condition.encode(prompts)
    else:
        # One word stands for all of the token's vectors.
        written = [re.sub(rf"\b{names[0]}\b", " ".join(names), prompt) for prompt in prompts]
        with token.spliced():
            encoded = reader.condition.encode(written)
    uncond = reader.condition.encode([""]).states
    return Told(encoded.states.to(models.dtype), encoded.pooled, uncond.to(models.dtype))


def score_gradient(
    reader: Reader, latents: torch.Tensor, timestep, told: Told
) -> tuple[torch.Tensor, torch.Tensor]:
    """The matching score of noisy latents (B, 4, h, w), (B,), and its gradient by them, in float32.

    The blocks behind the probe point do not run.
    """
    timesteps = torch.as_tensor(timestep, device=latents.device).expand(len(latents))  # (B,)
    # Small gradients vanish in half precision.
    scale = 1.0 if latents.dtype == torch.float32 else FIRST_SCALE
    with torch.enable_grad():
        z = latents.detach().requires_grad_()  # (B, 4, h, w)
        score = reader.score(z, timesteps, told.cond, told.pooled)  # (B,)
        gradient = torch.autograd.grad(score.sum() * scale, z)[0]  # (B, 4, h, w)
    return score.detach(), gradient.float() / scale


def corrected_step(
    reader: Reader, walk: Walk, i: int, latents: torch.Tensor, told: Told, correction: Correction
) -> tuple[torch.Tensor, torch.Tensor]:
    """One corrected step: latents (B, 4, h, w) after it, and the score before it (B,)."""
    timestep = walk.timesteps[i]
    seen = walk.scheduler.scale_model_input(latents, timestep)  # (B, 4, h, w)
    score, gradient = score_gradient(reader, seen, timestep, told)
    corrected = (seen + correction.factor * gradient).to(seen.dtype)  # (B, 4, h, w)
    if correction.mode == "state":
        # Some schedulers shrink what the UNet sees.
        shrunk = walk.scheduler.scale_model_input(torch.ones_like(latents), timestep)  # (B, 4, h, w)
        latents = (latents + correction.factor * gradient / shrunk).to(seen.dtype)
        return walk.step(i, walk.guided(i, corrected), latents), score
    weight = walk.settings.guidance_weight
    uncond = told.uncond.expand(len(latents), -1, -1)  # (B, L, D)
    with autocast(reader.models):
        both = reader.models.unet(
            torch.cat([seen, corrected]), timestep, encoder_hidden_states=torch.cat([uncond, told.cond])
        ).sample  # (2 * B, 4, h, w)
    noise_uncond, noise_cond = both.to(seen.dtype).chunk(2)
    noise_pred = noise_uncond + weight * (noise_cond - noise_uncond)  # (B, 4, h, w)
    return walk.step(i, noise_pred, latents), score


@torch.no_grad()
def sample_corrected(
    reader: Reader, told: Told, seeds: list[int], settings: SamplerSettings, correction: Correction
) -> tuple[torch.Tensor, dict[int, list[float]]]:
    """Images of prompts, each from its own seed.

    Returns:
        images (B, 3, H, W) in [0, 1], in the models' precision; by step, the score of each image before it
        was corrected.
    """
    models = reader.models
    noise = draw_noise(seeds, models.latent_shape(settings.height, settings.width))  # (B, 4, h, w)
    latents, scores = corrected_latents(reader, told, noise, settings, correction)
    return decode_in_parts(models, latents, settings), scores


@torch.no_grad()
def corrected_latents(
    reader: Reader, told: Told, noise: torch.Tensor, settings: SamplerSettings, correction: Correction
) -> tuple[torch.Tensor, dict[int, list[float]]]:
    """The finished latents (B, 4, h, w) of prompts, from noise of this shape; scores as
    :func:`sample_corrected` has them."""
    walk = Walk(reader.models, told.cond, told.uncond, noise, settings)
    latents = walk.start  # (B, 4, h, w)
    scores = {}
    for i in range(len(walk.timesteps)):
        if correction.is_at(i):
            latents, score = corrected_step(reader, walk, i, latents, told, correction)
            scores[i] = score.tolist()
        else:
            latents = walk.run(latents, i, i + 1)
    return latents, scores
