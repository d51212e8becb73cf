"""How a loss on an image reaches the prompt's embedding: which denoising steps are differentiated.

Gradient skipping (Discriminative Class Tokens, section 3): the trajectory runs without gradient, but with the
current token; only the steps that a mode names are differentiated. An early step decides what is drawn, a
late one how it looks. Each mode is one function of the table ``MODES``; memory does not grow with the
number of steps.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from discriminative.diffusion.models import DiffusionModels
from discriminative.diffusion.sampler import Walk, alpha_bar_at, chunks, decode, draw_noise
from discriminative.diffusion.schedulers import fresh_scheduler
from discriminative.settings import GradientPath, SamplerSettings

# Images (b, 3, H, W) and their place in the batch -> losses (b,), right (b,).
ClassLoss = Callable[[torch.Tensor, slice], tuple[torch.Tensor, torch.Tensor]]
Weight = float | torch.Tensor  # of every image's loss, or of each (B,)


@dataclass
class ScoredBatch:
    """A batch of images, their losses, and the gradient.

    Args:
        images: (B, 3, H, W) that were scored; of several noises the last ones.
        losses: (B,), of several noises their mean.
        right: (B,), whether the guides give the image to the class.
        gradient: of the weighted sum of the losses with respect to ``cond``, (B, L, D); None where none was
            asked for.
    """

    images: torch.Tensor
    losses: torch.Tensor
    right: torch.Tensor
    gradient: torch.Tensor | None = None


def drawn(path: GradientPath, rng: random.Random) -> GradientPath:
    """The path of one update: "random" draws its number of steps, the others stay as they are."""
    if path.mode == "random":
        return replace(path, mode="last", steps=rng.randint(1, path.steps))
    return path


def decode_and_score(walk: Walk, latents: torch.Tensor, class_loss: ClassLoss, weight: Weight) -> ScoredBatch:
    """Decode and score latents (B, C, h, w), a few at a time: their graph, the largest of all, is freed
    first.

    Returns:
        the scored images; the gradient is with respect to the latents, (B, C, h, w).
    """
    parts = []
    for chunk in chunks(len(latents), walk.settings.decode_batch_size):
        part = latents[chunk].detach().requires_grad_()  # (b, C, h, w)
        images = decode(walk.models, part, walk.settings)  # (b, 3, H, W)
        losses, right = class_loss(images, chunk)
        of_part = weight[chunk] if isinstance(weight, torch.Tensor) else weight
        parts.append((images.detach(), losses.detach(), right, gradient_of(losses, part, of_part)))
    return ScoredBatch(*(torch.cat(part) for part in zip(*parts, strict=True)))


def last(walk: Walk, path: GradientPath, class_loss: ClassLoss, weight: Weight) -> ScoredBatch:
    """Through the last K steps, the VAE's decoder and the classifier, along the latents in between."""
    number = len(walk.timesteps)
    first = number - path.steps
    if first < 0:
        raise ValueError(f"{path.steps} steps with gradient, but the scheduler's list has {number}")
    latents = walk.reach(first)  # (B, C, h, w)
    walk.recompute = path.steps > 1
    latents = walk.run(latents, first, number)  # (B, C, h, w)
    scored = decode_and_score(walk, latents, class_loss, weight)
    return replace(scored, gradient=gradient_of(latents, walk.cond, scored.gradient))


def last_with_noises(walk: Walk, path: GradientPath, class_loss: ClassLoss, weight: Weight) -> ScoredBatch:
    """DRaFT-LV (Clark et al. 2024, section 3.3): the last step from several noises, their gradients averaged.

    The finished image is noised ``steps`` times to the last step's level, and each of these is denoised with
    gradient, which evens out the luck of one noise.
    """
    i = len(walk.timesteps) - 1
    total = 0.0
    batches = []
    latents = walk.reach(len(walk.timesteps))  # (B, C, h, w)
    a = alpha_bar_at(walk.scheduler, i, torch.promote_types(latents.dtype, torch.float32)).to(latents.device)
    for j in range(path.steps):
        noise = draw_noise(walk.seeds, latents.shape[1:], j + 1).to(latents)  # (B, C, h, w)
        model_input = (a.sqrt() * latents + (1 - a).sqrt() * noise).to(latents.dtype)
        clean = walk.clean(i, model_input, walk.guided(i, model_input))  # (B, C, h, w)
        scored = decode_and_score(walk, clean, class_loss, weight / path.steps)
        total = total + gradient_of(clean, walk.cond, scored.gradient)
        batches.append(scored)
    losses = torch.stack([b.losses for b in batches]).mean(0)  # (B,)
    right = torch.stack([b.right for b in batches]).all(0)  # (B,)
    return ScoredBatch(batches[-1].images, losses, right, total)


def jump(walk: Walk, path: GradientPath, class_loss: ClassLoss, weight: Weight) -> ScoredBatch:
    """At one place the clean image is predicted and scored, with gradient through that step; later ones
    stay out."""
    i = place_of(path, walk)
    latents = walk.reach(i)  # (B, C, h, w)
    model_input, noise_pred = walk.predict(i, latents)
    clean = walk.clean(i, model_input, noise_pred)  # (B, C, h, w)
    scored = decode_and_score(walk, clean, class_loss, weight)
    return replace(scored, gradient=gradient_of(clean, walk.cond, scored.gradient))


def skip(walk: Walk, path: GradientPath, class_loss: ClassLoss, weight: Weight) -> ScoredBatch:
    """The finished image is scored; its gradient goes straight to one place, past the UNet of the later
    steps.

    z~ = z + c_i (eps_i(v) - stopgrad eps_i), where c_i is what the scheduler, linear in its predictions,
    makes of prediction i in the final latents z. With the last step it is the paper's gradient.
    """
    i = place_of(path, walk)
    latents = walk.reach(i)  # (B, C, h, w)
    with torch.no_grad():
        model_input, noise_pred = walk.predict(i, latents)
        latents = walk.step(i, noise_pred, latents)  # (B, C, h, w)
        latents = walk.run(latents, i + 1, len(walk.timesteps))  # (B, C, h, w)
    scored = decode_and_score(walk, latents, class_loss, weight)
    share = prediction_shares(walk.scheduler, walk.settings.num_inference_steps)[i].item()
    # Only the conditional half sees the token.
    unet = walk.models.unet
    cond_pred = unet(model_input, walk.timesteps[i], encoder_hidden_states=walk.cond).sample  # (B, C, h, w)
    from_images = scored.gradient * (share * walk.settings.guidance_weight)
    return replace(scored, gradient=gradient_of(cond_pred, walk.cond, from_images))


# "random" is "last" with steps from drawn().
MODES = {"jump": jump, "skip": skip, "last": last, "random": last, "lv": last_with_noises}


def place_of(path: GradientPath, walk: Walk) -> int:
    """Index of the path's place in the walk's list of timesteps."""
    return round(path.place * (len(walk.timesteps) - 1))


def gradient_of(value: torch.Tensor, of: torch.Tensor, weight: float | torch.Tensor) -> torch.Tensor:
    """Gradient of ``sum(weight * value)`` with respect to ``of``; its graph is freed."""
    weight = weight if isinstance(weight, torch.Tensor) else torch.full_like(value, weight)
    return torch.autograd.grad(value, of, weight)[0]


def prediction_shares(scheduler, num_inference_steps: int) -> torch.Tensor:
    """What the scheduler makes of each step's prediction in the final latents, (N,) for its N steps.

    Every scheduler of ``SCHEDULERS`` is linear in latents and predictions, so it is run once on N unit
    vectors.
    """
    scheduler = fresh_scheduler(scheduler)
    scheduler.set_timesteps(num_inference_steps)
    latents = torch.zeros(len(scheduler.timesteps))  # (N,): how much of each prediction is in them
    for i, t in enumerate(scheduler.timesteps):
        scheduler.scale_model_input(latents, t)  # Euler counts its calls
        latents = scheduler.step(torch.eye(len(latents))[i], t, latents, return_dict=False)[0]
    return latents


def cond_gradient(
    models: DiffusionModels,
    cond: torch.Tensor,
    uncond: torch.Tensor,
    seeds: list[int],
    settings: SamplerSettings,
    path: GradientPath,
    class_loss: ClassLoss,
    weight: Weight,
) -> ScoredBatch:
    """Sample images, score them, and take the gradient of the weighted sum of losses to ``cond``.

    Args:
        cond: ``encoder_hidden_states`` of the prompts (B, L, D).
        uncond: that of the empty prompt (1, L, D).
        path: nothing of it left to chance (:func:`drawn`).
        weight: of each image's loss, one for all or (B,).
    """
    noise = draw_noise(seeds, models.latent_shape(settings.height, settings.width))  # (B, C, h, w)
    walk = Walk(models, cond.detach().requires_grad_(), uncond, noise, settings, seeds)
    return MODES[path.mode](walk, path, class_loss, weight)
