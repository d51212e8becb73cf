"""How the classifier's verdict on an image reaches the token: which denoising steps are differentiated, one graph at a time.

Gradient skipping (Discriminative Class Tokens, section 3): the trajectory runs without gradient, but with the current
token; only the steps that a mode names are differentiated. An early step decides what is drawn, a late one how it looks.
Each mode is one function of the table ``MODES``; memory does not grow with the number of steps, but for "last".
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from class_token import ClassToken
from models import fresh_scheduler
from sampler import SamplerSettings, Walk, alpha_bar_at, decode, draw_noise

# Images (B, 3, H, W) in [0, 1] to the loss of each (B,) and whether it is right (B,).
Score = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class GradientPath:
    """Which denoising steps the gradient goes through.

    Args:
        mode: a key of ``MODES``.
        steps: "last": number of steps, from the end; "random": the most of them, how many is drawn anew every update; "lv":
            number of noises for the last step.
        at: "jump" and "skip": places on the trajectory, 0 is the first step of the scheduler's list, 1 the last.
        anywhere: ``at`` holds the two ends of a range, in which one place is drawn anew every update.
        normalize: divide each step's gradient by its norm before they are added.
    """

    mode: str = "last"
    steps: int = 1
    at: tuple[float, ...] = (0.13,)
    anywhere: bool = False
    normalize: bool = False

    def drawn(self, rng: random.Random) -> "GradientPath":
        """The path of one update: the same where nothing is left to chance."""
        if self.mode == "random":
            return replace(self, mode="last", steps=rng.randint(1, self.steps))
        if self.anywhere and self.mode in ("jump", "skip"):
            return replace(self, at=(rng.uniform(*self.at),), anywhere=False)
        return self

    def places(self, number: int) -> list[int]:
        """Indices of ``at`` in a list of ``number`` timesteps, in order."""
        return sorted({round(place * (number - 1)) for place in self.at})


@dataclass
class Verdict:
    """What a batch of images came to.

    Args:
        images: (B, 3, H, W) that were scored; of several steps the last ones.
        losses: (B,), of several steps their mean. right: (B,), of the images.
        gradients: of the weighted sum of the losses with respect to ``cond`` (B, L, D), one for each differentiated step.
    """

    images: torch.Tensor
    losses: torch.Tensor
    right: torch.Tensor
    gradients: list[torch.Tensor]


def last(walk: Walk, path: GradientPath, score: Score, weight: float) -> Verdict:
    """Through the last K steps, the VAE's decoder and the classifier, with the chain through the latents in between."""
    first = len(walk.timesteps) - path.steps
    if first < 0:
        raise ValueError(f"{path.steps} steps with gradient, but the scheduler's list has {len(walk.timesteps)}")
    with torch.no_grad():
        latents = walk.run(walk.start, 0, first)
    images = decode(walk.models.vae, walk.run(latents, first, len(walk.timesteps)))  # (B, 3, H, W)
    losses, right = score(images)
    return Verdict(images.detach(), losses.detach(), right, [gradient_of(losses, walk.cond, weight)])


def last_with_noises(walk: Walk, path: GradientPath, score: Score, weight: float) -> Verdict:
    """DRaFT-LV (Clark et al. 2024, section 3.3): the finished image is noised ``steps`` times to the last step's level, and each of
    these is denoised with gradient; their gradients are averaged, which evens out the luck of one noise."""
    i, total, losses, rights = len(walk.timesteps) - 1, 0.0, [], []
    with torch.no_grad():
        latents = walk.run(walk.start, 0, len(walk.timesteps))
    a = alpha_bar_at(walk.scheduler, i, torch.promote_types(latents.dtype, torch.float32)).to(latents.device)
    for j in range(path.steps):
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(j), dtype=torch.float32).to(latents)
        model_input = (a.sqrt() * latents + (1 - a).sqrt() * noise).to(latents.dtype)
        images = decode(walk.models.vae, walk.clean(i, model_input, walk.guided(i, model_input)))  # (B, 3, H, W)
        loss, right = score(images)
        total = total + gradient_of(loss, walk.cond, weight / path.steps)
        losses.append(loss.detach())
        rights.append(right)
    return Verdict(images.detach(), torch.stack(losses).mean(0), torch.stack(rights).all(0), [total])


def jump(walk: Walk, path: GradientPath, score: Score, weight: float) -> Verdict:
    """At each place the clean image is predicted, decoded and scored, with gradient through that one step; later steps are left out."""
    places, latents, gradients, losses = path.places(len(walk.timesteps)), walk.start, [], []
    for i in range(places[-1] + 1):
        if i not in places:
            with torch.no_grad():
                latents = walk.run(latents, i, i + 1)
            continue
        model_input, noise_pred = walk.predict(i, latents)
        images = decode(walk.models.vae, walk.clean(i, model_input, noise_pred))  # (B, 3, H, W)
        loss, right = score(images)
        gradients.append(gradient_of(loss, walk.cond, weight / len(places)))
        losses.append(loss.detach())
        latents = walk.step(i, noise_pred.detach(), latents)  # (B, C, h, w)
    return Verdict(images.detach(), torch.stack(losses).mean(0), right, gradients)


def skip(walk: Walk, path: GradientPath, score: Score, weight: float) -> Verdict:
    """The finished image is scored; each place gets the gradient that flows from the image straight through the scheduler to its own
    prediction, past the UNet of the later steps. With the last step alone it is the paper's gradient.

    z~ = z + sum over the places of c_i (eps_i(v) - stopgrad eps_i), where c_i is what the scheduler, linear in its predictions,
    makes of prediction i in the final latents: the value is that of z, the gradient that of the chosen predictions.
    """
    places, latents, seen = path.places(len(walk.timesteps)), walk.start, {}
    with torch.no_grad():
        for i in range(len(walk.timesteps)):
            model_input, noise_pred = walk.predict(i, latents)
            if i in places:
                seen[i] = model_input
            latents = walk.step(i, noise_pred, latents)  # (B, C, h, w)
    images = decode(walk.models.vae, latents.requires_grad_())  # (B, 3, H, W)
    losses, right = score(images)
    from_image = gradient_of(losses, latents, weight)  # (B, C, h, w)
    shares = prediction_shares(walk.scheduler, walk.settings.num_inference_steps)
    gradients = []
    for i in places:
        # Of the guided prediction only the conditional half sees the token.
        cond_pred = walk.models.unet(seen[i], walk.timesteps[i], encoder_hidden_states=walk.cond).sample  # (B, C, h, w)
        gradients.append(gradient_of(cond_pred, walk.cond, from_image * (shares[i].item() * walk.settings.guidance_scale)))
    return Verdict(images.detach(), losses.detach(), right, gradients)


# "random" is "last" with a number of steps that is drawn anew; see GradientPath.drawn.
MODES = {"jump": jump, "skip": skip, "last": last, "random": last, "lv": last_with_noises}


def gradient_of(value: torch.Tensor, with_respect_to: torch.Tensor, weight: float | torch.Tensor) -> torch.Tensor:
    """Gradient of ``sum(weight * value)``; its graph is freed."""
    weight = weight if isinstance(weight, torch.Tensor) else torch.full_like(value, weight)
    return torch.autograd.grad(value, with_respect_to, weight)[0]


def prediction_shares(scheduler, num_inference_steps: int) -> torch.Tensor:
    """What the scheduler makes of each step's prediction in the final latents, (N,) for its N steps.

    Every scheduler of ``models.SCHEDULERS`` is linear in latents and predictions, so it is run once on the N unit vectors.
    """
    scheduler = fresh_scheduler(scheduler)
    scheduler.set_timesteps(num_inference_steps)
    latents = torch.zeros(len(scheduler.timesteps))  # (N,): how much of each prediction is in them
    for i, t in enumerate(scheduler.timesteps):
        scheduler.scale_model_input(latents, t)  # Euler counts its calls
        latents = scheduler.step(torch.eye(len(latents))[i], t, latents, return_dict=False)[0]
    return latents


def token_gradients(
    token: ClassToken, prompts: list[str], seeds: list[int], settings: SamplerSettings, path: GradientPath, score: Score, weight: float
) -> Verdict:
    """Draw images with the current token, score them, and bring the gradient of the weighted sum of losses to the token.

    Args:
        path: nothing of it left to chance (:meth:`GradientPath.drawn`).
        weight: of each image's loss.

    Returns:
        the verdict, its gradients with respect to ``token.vector`` (N, width), one for each differentiated step.
    """
    noise = draw_noise(seeds, token.models.latent_shape(settings.height, settings.width))  # (B, C, h, w)
    cond = token.encode(prompts)  # (B, L, D)
    walk = Walk(token.models, cond.detach().requires_grad_(), token.unconditional, noise, settings)
    verdict = MODES[path.mode](walk, path, score, weight)
    # Through the text encoder once for each step; it is small, and normalizing needs the steps apart.
    verdict.gradients = [torch.autograd.grad(cond, token.vector, g, retain_graph=True)[0] for g in verdict.gradients]
    return verdict


def combined(gradients: list[torch.Tensor], normalize: bool, scale: float = 1.0) -> torch.Tensor:
    """The steps' gradients (N, width) as one; normalised, each counts with length ``scale``."""
    if normalize:
        gradients = [g * (scale / g.norm().clamp_min(torch.finfo(g.dtype).tiny)) for g in gradients]
    return torch.stack(gradients).sum(0)
