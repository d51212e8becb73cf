"""How the classifier's verdict on an image reaches the token: which denoising steps are differentiated, one graph at a time.

Gradient skipping (Discriminative Class Tokens, section 3): the trajectory runs without gradient, but with the current
token; only the steps that a mode names are differentiated. An early step decides what is drawn, a late one how it looks.
Each mode is one function of the table ``MODES``; memory does not grow with the number of steps.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from discriminative.diffusion.sampler import SamplerSettings, Walk, alpha_bar_at, chunks, decode, draw_noise
from discriminative.diffusion.schedulers import fresh_scheduler
from discriminative.tokens.class_token import ClassToken

# Images (b, 3, H, W) in [0, 1] and which of the batch they are, to the loss of each (b,) and whether it is right (b,).
Score = Callable[[torch.Tensor, slice], tuple[torch.Tensor, torch.Tensor]]


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


def judge(walk: Walk, latents: torch.Tensor, score: Score, weight: float) -> tuple[torch.Tensor, Verdict]:
    """Decode and score latents (B, C, h, w), a few at a time: their graph, the largest of all, is freed before the next ones'.

    Returns:
        the gradient of the weighted sum of the losses with respect to the latents (B, C, h, w), and the verdict, as yet without gradients.
    """
    parts = []
    for chunk in chunks(len(latents), walk.settings.decode_batch_size):
        part = latents[chunk].detach().requires_grad_()  # (b, C, h, w)
        images = decode(walk.models, part, walk.settings)  # (b, 3, H, W)
        losses, right = score(images, chunk)
        parts.append((gradient_of(losses, part, weight), images.detach(), losses.detach(), right))
    gradient, images, losses, right = (torch.cat(p) for p in zip(*parts, strict=True))
    return gradient, Verdict(images, losses, right, [])


def last(walk: Walk, path: GradientPath, score: Score, weight: float) -> Verdict:
    """Through the last K steps, the VAE's decoder and the classifier, with the chain through the latents in between."""
    first = len(walk.timesteps) - path.steps
    if first < 0:
        raise ValueError(
            f"{path.steps} steps with gradient, but the scheduler's list has {len(walk.timesteps)}"
        )
    latents, walk.recompute = walk.reach(first), path.steps > 1
    latents = walk.run(latents, first, len(walk.timesteps))  # (B, C, h, w)
    from_images, verdict = judge(walk, latents, score, weight)
    verdict.gradients = [gradient_of(latents, walk.cond, from_images)]
    return verdict


def last_with_noises(walk: Walk, path: GradientPath, score: Score, weight: float) -> Verdict:
    """DRaFT-LV (Clark et al. 2024, section 3.3): the finished image is noised ``steps`` times to the last step's level, and each of
    these is denoised with gradient; their gradients are averaged, which evens out the luck of one noise."""
    i, total, verdicts = len(walk.timesteps) - 1, 0.0, []
    latents = walk.reach(len(walk.timesteps))  # (B, C, h, w)
    a = alpha_bar_at(walk.scheduler, i, torch.promote_types(latents.dtype, torch.float32)).to(latents.device)
    for j in range(path.steps):
        noise = draw_noise(walk.seeds, latents.shape[1:], j + 1).to(latents)  # (B, C, h, w)
        model_input = (a.sqrt() * latents + (1 - a).sqrt() * noise).to(latents.dtype)
        clean = walk.clean(i, model_input, walk.guided(i, model_input))  # (B, C, h, w)
        from_images, verdict = judge(walk, clean, score, weight / path.steps)
        total = total + gradient_of(clean, walk.cond, from_images)
        verdicts.append(verdict)
    losses, right = (
        torch.stack([getattr(v, name) for v in verdicts]) for name in ("losses", "right")
    )  # (noises, B) each
    return Verdict(verdicts[-1].images, losses.mean(0), right.all(0), [total])


def jump(walk: Walk, path: GradientPath, score: Score, weight: float) -> Verdict:
    """At each place the clean image is predicted, decoded and scored, with gradient through that one step; later steps are left out."""
    places, gradients, losses = path.places(len(walk.timesteps)), [], []
    latents = walk.reach(places[0])  # (B, C, h, w)
    for i in range(places[0], places[-1] + 1):
        if i not in places:
            with torch.no_grad():
                latents = walk.run(latents, i, i + 1)
            continue
        model_input, noise_pred = walk.predict(i, latents)
        clean = walk.clean(i, model_input, noise_pred)  # (B, C, h, w)
        from_images, verdict = judge(walk, clean, score, weight / len(places))
        gradients.append(gradient_of(clean, walk.cond, from_images))
        losses.append(verdict.losses)
        latents = walk.step(i, noise_pred.detach(), latents)  # (B, C, h, w)
    return Verdict(verdict.images, torch.stack(losses).mean(0), verdict.right, gradients)


def skip(walk: Walk, path: GradientPath, score: Score, weight: float) -> Verdict:
    """The finished image is scored; each place gets the gradient that flows from the image straight through the scheduler to its own
    prediction, past the UNet of the later steps. With the last step alone it is the paper's gradient.

    z~ = z + sum over the places of c_i (eps_i(v) - stopgrad eps_i), where c_i is what the scheduler, linear in its predictions,
    makes of prediction i in the final latents: the value is that of z, the gradient that of the chosen predictions.
    """
    places, seen = path.places(len(walk.timesteps)), {}
    latents = walk.reach(places[0])  # (B, C, h, w)
    with torch.no_grad():
        for i in range(places[0], len(walk.timesteps)):
            model_input, noise_pred = walk.predict(i, latents)
            if i in places:
                seen[i] = model_input
            latents = walk.step(i, noise_pred, latents)  # (B, C, h, w)
    from_images, verdict = judge(walk, latents, score, weight)
    shares = prediction_shares(walk.scheduler, walk.settings.num_inference_steps)
    for i in places:
        # Of the guided prediction only the conditional half sees the token.
        cond_pred = walk.models.unet(
            seen[i], walk.timesteps[i], encoder_hidden_states=walk.cond
        ).sample  # (B, C, h, w)
        verdict.gradients.append(
            gradient_of(cond_pred, walk.cond, from_images * (shares[i].item() * walk.guidance_scale(i)))
        )
    return verdict


# "random" is "last" with a number of steps that is drawn anew; see GradientPath.drawn.
MODES = {"jump": jump, "skip": skip, "last": last, "random": last, "lv": last_with_noises}


def gradient_of(
    value: torch.Tensor, with_respect_to: torch.Tensor, weight: float | torch.Tensor
) -> torch.Tensor:
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
    token: ClassToken,
    prompts: list[str],
    seeds: list[int],
    settings: SamplerSettings,
    path: GradientPath,
    score: Score,
    weight: float,
    kept: dict | None = None,
) -> Verdict:
    """Draw images with the current token, score them, and bring the gradient of the weighted sum of losses to the token.

    Args:
        path: nothing of it left to chance (:meth:`GradientPath.drawn`).
        weight: of each image's loss.
        kept: what earlier calls with these prompts, seeds, settings and path left for this one; see ``sampler.Walk``.

    Returns:
        the verdict, its gradients with respect to ``token.vector`` (N, width), one for each differentiated step.
    """
    noise = draw_noise(seeds, token.models.latent_shape(settings.height, settings.width))  # (B, C, h, w)
    cond = token.encode(prompts)  # (B, L, D)
    walk = Walk(
        token.models, cond.detach().requires_grad_(), token.unconditional, noise, settings, kept, seeds
    )
    verdict = MODES[path.mode](walk, path, score, weight)
    # Through the text encoder once for each step; it is small, and normalizing needs the steps apart.
    verdict.gradients = [
        torch.autograd.grad(cond, token.vector, g, retain_graph=True)[0] for g in verdict.gradients
    ]
    return verdict


def combined(gradients: list[torch.Tensor], normalize: bool, scale: float = 1.0) -> torch.Tensor:
    """The steps' gradients (N, width) as one; normalised, each counts with length ``scale``."""
    if normalize:
        gradients = [g * (scale / g.norm().clamp_min(torch.finfo(g.dtype).tiny)) for g in gradients]
    return torch.stack(gradients).sum(0)
