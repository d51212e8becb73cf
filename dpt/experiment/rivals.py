"""What else the adapter's score is good for, at the cost of self-correction: choosing, and a better noise."""

import math

import torch

from discriminative.diffusion.sampler import Walk
from discriminative.guides.classifier import Classifier
from discriminative.guides.loaders import Source, find_timm
from discriminative.hub import MINIATURE
from discriminative.settings import SamplerSettings
from dpt.choose import adapter_score
from dpt.correct import Told
from dpt.data.scenes import INDEX, Prompt
from dpt.experiment.settings import CHEAP
from dpt.forward import Reader
from dpt.settings import MINIATURE_EVALUATION_TIMESTEP

# Noise, in the manner of ReNO (Eyring et al. 2024).
MOST_GRADIENT = 0.1  # norm to which a picture's gradient is cut
MOMENTUM = 0.9
REGULARISER = 0.01  # weight of the log-likelihood of the noise's norm


# Best of k.


def load_guide(device: torch.device) -> Classifier:
    """The miniature's guide: a classifier of things, of another family than the judge."""
    parts = find_timm(Source("timm", str(MINIATURE / "guide")))
    model, recipe = parts.load()
    return Classifier("miniature", model.to(device).eval().requires_grad_(False), parts.labels, recipe)


@torch.no_grad()
def guide_score(guide: Classifier, images: torch.Tensor, asked: list[Prompt]) -> torch.Tensor:
    """The sum of the log-probabilities of all classes that a prompt names, (B,), of images (B, 3, H, W)."""
    log_p = guide.logits(images).log_softmax(dim=1)  # (B, K)
    named = [[INDEX[phrase.name] for phrase in prompt.fact.phrases] for prompt in asked]
    return torch.stack([log_p[i, classes].sum() for i, classes in enumerate(named)])


# A better noise.


def log_likelihood_of_norm(noise: torch.Tensor) -> torch.Tensor:
    """Of standard normal noise (B, ...), by its norm alone, up to a constant, (B,)."""
    norm = noise.flatten(1).norm(dim=1)  # (B,)
    return (noise[0].numel() - 1) * norm.log() - norm.square() / 2


def optimised_noise(
    reader: Reader, told: Told, seeds: list[int], noise: torch.Tensor, settings: dict
) -> torch.Tensor:
    """Noise (B, 4, h, w) moved along the gradient of the adapter's score of what it becomes in a few steps;
    the best of all iterates.

    Args:
        seeds: of the pictures.
        settings: "steps" of the prediction, "rate" of the gradient, "iterations".
    """
    few = SamplerSettings(settings["steps"], 1.0, scheduler=CHEAP.scheduler)
    noise = noise.to(reader.device)
    best = noise.clone()
    best_score = torch.full((len(noise),), -math.inf, device=noise.device)  # (B,)
    momentum = torch.zeros_like(noise)
    for _ in range(settings["iterations"]):
        with torch.enable_grad():
            z = noise.detach().requires_grad_()  # (B, 4, h, w)
            walk = Walk(reader.models, told.cond, told.uncond, z, few)
            latents = walk.run(walk.start, 0, len(walk.timesteps))
            score = adapter_score(reader, latents, told, seeds, MINIATURE_EVALUATION_TIMESTEP, 1)  # (B,)
            wanted = score + REGULARISER * log_likelihood_of_norm(z)  # (B,)
            gradient = torch.autograd.grad(wanted.sum(), z)[0]  # (B, 4, h, w)
        better = score.detach() > best_score  # (B,)
        best = torch.where(better[:, None, None, None], noise, best)
        best_score = torch.maximum(score.detach(), best_score)
        norm = gradient.flatten(1).norm(dim=1).clamp(min=MOST_GRADIENT)  # (B,)
        gradient = gradient * (MOST_GRADIENT / norm)[:, None, None, None]
        # Nesterov's momentum.
        momentum = MOMENTUM * momentum + gradient
        noise = noise + settings["rate"] * (gradient + MOMENTUM * momentum)
    return best
