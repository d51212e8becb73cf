"""Embeddings and noise in, images out. Knows nothing of the run's options, nor of gradients
(``gradients.py``)."""

from functools import partial

import torch
from torch.utils.checkpoint import checkpoint

from discriminative.diffusion.models import DiffusionModels
from discriminative.diffusion.schedulers import TRAINING_SPACING, fresh_scheduler
from discriminative.precision import autocast
from discriminative.settings import SamplerSettings


def draw_noise(seeds: list[int], shape: tuple[int, int, int], number: int = 0) -> torch.Tensor:
    """Standard normal noise (B, *shape), float32 on the CPU; each image's follows from its own seed only.

    Args:
        seeds: below 2**32: of larger ones torch's generator on the CPU takes the last 32 bits, and two
            would give one noise.
        number: which of the noises that a seed's stream holds; the first, 0, is what an image begins from.
    """
    noises = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        noises.append([torch.randn(shape, generator=generator) for _ in range(number + 1)][-1])
    return torch.stack(noises)  # (B, C, h, w)


def guided_noise_pred(
    unet, latents, timestep, cond, uncond, guidance_weight: float, recompute: bool = False
) -> torch.Tensor:
    """Classifier-free guidance (Ho and Salimans 2022, eq. 6, with w + 1 = guidance_weight).

    Gradient flows through the conditional half; through the unconditional one, which does not see the
    token, only where the latents depend on it, as they do from the second step with gradient on.

    Args:
        latents: (B, C, h, w), already scaled for the UNet. cond: (B, L, D). uncond: (1, L, D).
        recompute: keep no graph of the UNet, but compute it again in the backward pass.

    Returns:
        the guided prediction (B, C, h, w).
    """

    def half(latents: torch.Tensor, encoder_hidden_states: torch.Tensor) -> torch.Tensor:
        return unet(latents, timestep, encoder_hidden_states=encoder_hidden_states).sample.to(latents.dtype)

    if recompute:
        half = partial(checkpoint, half, use_reentrant=False)
    if guidance_weight == 1:
        return half(latents, cond)
    uncond = uncond.expand(len(cond), -1, -1)  # (B, L, D)
    if not torch.is_grad_enabled():
        both = unet(
            torch.cat([latents, latents]), timestep, encoder_hidden_states=torch.cat([uncond, cond])
        ).sample
        noise_pred_uncond, noise_pred_cond = both.to(latents.dtype).chunk(2)  # (B, C, h, w) each
    else:
        with torch.set_grad_enabled(latents.requires_grad):
            noise_pred_uncond = half(latents, uncond)  # (B, C, h, w)
        noise_pred_cond = half(latents, cond)  # (B, C, h, w)
    return noise_pred_uncond + guidance_weight * (noise_pred_cond - noise_pred_uncond)


def alpha_bar_at(scheduler, i: int, dtype: torch.dtype) -> torch.Tensor:
    """The share of signal alpha_bar, a scalar, at step ``i`` of the scheduler's list.

    Schedulers with a list of noise levels (Euler, DPM-Solver) may stand between the training schedule's
    timesteps; the others count on them.
    """
    if hasattr(scheduler, "sigmas"):
        return 1 / (1 + scheduler.sigmas[i].to(dtype) ** 2)  # sigma^2 = (1 - alpha_bar) / alpha_bar
    return scheduler.alphas_cumprod.to(dtype)[scheduler.timesteps[i].cpu()]


def predict_clean(
    model_input: torch.Tensor, noise_pred: torch.Tensor, alpha_bar: torch.Tensor, prediction_type: str
) -> torch.Tensor:
    """The clean latents that a prediction implies (DDIM, Song et al. 2021, eq. 9), (B, C, h, w).

    Args:
        model_input: latents as the UNet sees them, (B, C, h, w), of variance 1 under the schedule.
        alpha_bar: scalar, float32 or better (near t = 0 half precision rounds 1 - alpha_bar away).

    Raises:
        ValueError: the UNet predicts neither noise ("epsilon") nor velocity ("v_prediction").
    """
    alpha_bar = alpha_bar.to(model_input.device)
    if prediction_type == "epsilon":
        return (model_input - (1 - alpha_bar).sqrt() * noise_pred) / alpha_bar.sqrt()
    if prediction_type == "v_prediction":
        return alpha_bar.sqrt() * model_input - (1 - alpha_bar).sqrt() * noise_pred
    raise ValueError(f"prediction type {prediction_type!r}; epsilon and v_prediction are known")


def chunks(number: int, size: int | None) -> list[slice]:
    """Slices of at most ``size`` of ``number`` things; of all where it is None."""
    size = size or number
    return [slice(i, min(i + size, number)) for i in range(0, number, size)]


def decode(models: DiffusionModels, latents: torch.Tensor, settings: SamplerSettings) -> torch.Tensor:
    """Scaled latents (B, C, h, w) to images (B, 3, H, W) in [0, 1]."""
    vae = models.tiny_vae if settings.tiny_vae else models.vae
    with autocast(models):
        images = vae.decode(latents / vae.config.scaling_factor).sample.to(
            latents.dtype
        )  # (B, 3, H, W) in [-1, 1]
    return (images / 2 + 0.5).clamp(0, 1)


class Walk:
    """One trajectory of a batch of images, step by step.

    Args:
        cond: ``encoder_hidden_states`` of the prompts (B, L, D).
        uncond: that of the empty prompt (1, L, D).
        noise: standard normal (B, C, h, w).
        seeds: of the images, for further noises of theirs.
    """

    def __init__(
        self,
        models: DiffusionModels,
        cond: torch.Tensor,
        uncond: torch.Tensor,
        noise: torch.Tensor,
        settings: SamplerSettings,
        seeds: list[int] | None = None,
    ):
        self.models = models
        self.cond = cond
        self.uncond = uncond
        self.settings = settings
        self.seeds = seeds or []
        # Keep no graph of several steps: memory would grow.
        self.recompute = False
        self.scheduler = fresh_scheduler(models.scheduler, settings.scheduler, spacing=TRAINING_SPACING)
        self.scheduler.set_timesteps(settings.num_inference_steps, device=models.device)
        # The scheduler's own list.
        self.timesteps = self.scheduler.timesteps
        self.start = noise.to(models.device, models.dtype) * self.scheduler.init_noise_sigma  # (B, C, h, w)

    def guided(self, i: int, model_input: torch.Tensor) -> torch.Tensor:
        """The guided prediction at step ``i`` for latents that are scaled for the UNet (B, C, h, w)."""
        with autocast(self.models):
            return guided_noise_pred(
                self.models.unet,
                model_input,
                self.timesteps[i],
                self.cond,
                self.uncond,
                self.settings.guidance_weight,
                self.recompute,
            )

    def predict(self, i: int, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What the UNet sees at step ``i``, and its guided prediction, (B, C, h, w) each."""
        model_input = self.scheduler.scale_model_input(latents, self.timesteps[i])
        return model_input, self.guided(i, model_input)

    def step(self, i: int, noise_pred: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        """The latents after step ``i`` (B, C, h, w)."""
        return self.scheduler.step(noise_pred, self.timesteps[i], latents, return_dict=False)[0]

    def run(self, latents: torch.Tensor, first: int, stop: int) -> torch.Tensor:
        """Steps ``first`` to ``stop - 1``; the latents after them (B, C, h, w)."""
        for i in range(first, stop):
            latents = self.step(i, self.predict(i, latents)[1], latents)
        return latents

    @torch.no_grad()
    def reach(self, stop: int) -> torch.Tensor:
        """The latents before step ``stop`` (B, C, h, w), walked without gradient."""
        return self.run(self.start, 0, stop)

    def clean(self, i: int, model_input: torch.Tensor, noise_pred: torch.Tensor) -> torch.Tensor:
        """The clean latents that the prediction at step ``i`` implies (B, C, h, w)."""
        alpha_bar = alpha_bar_at(self.scheduler, i, torch.promote_types(model_input.dtype, torch.float32))
        return predict_clean(model_input, noise_pred, alpha_bar, self.scheduler.config.prediction_type)


@torch.no_grad()
def sample(
    models: DiffusionModels,
    cond: torch.Tensor,
    uncond: torch.Tensor,
    seeds: list[int],
    settings: SamplerSettings,
) -> torch.Tensor:
    """Images (B, 3, H, W) in [0, 1], in the models' precision, each from its own seed.

    Args:
        cond: ``encoder_hidden_states`` of the prompts (B, L, D).
        uncond: that of the empty prompt (1, L, D).
    """
    return decode_in_parts(models, finished_latents(models, cond, uncond, seeds, settings), settings)


@torch.no_grad()
def finished_latents(
    models: DiffusionModels,
    cond: torch.Tensor,
    uncond: torch.Tensor,
    seeds: list[int],
    settings: SamplerSettings,
) -> torch.Tensor:
    """The latents (B, C, h, w) after all steps, for arguments as :func:`sample` takes them."""
    noise = draw_noise(seeds, models.latent_shape(settings.height, settings.width))  # (B, C, h, w)
    walk = Walk(models, cond, uncond, noise, settings)
    return walk.run(walk.start, 0, len(walk.timesteps))


@torch.no_grad()
def decode_in_parts(
    models: DiffusionModels, latents: torch.Tensor, settings: SamplerSettings
) -> torch.Tensor:
    """Finished latents (B, C, h, w) to images (B, 3, H, W), so many at once as the settings say."""
    parts = chunks(len(latents), settings.decode_batch_size)
    return torch.cat([decode(models, latents[part], settings) for part in parts])
