"""Measured steps: the gradients of many images say where to, and others which way is the best.

A guide that is unsure of what the model draws says little with the gradient of a few images: AdamW then steps
as far as ever, and mostly astray. A line search over pooled gradients steps only where images of new noises
bear it out. Which stage's gradient says most is measured with it.
"""

import math

import torch

from discriminative.seeds import measuring_seeds
from discriminative.tokens.curriculum import is_a_gain
from discriminative.tokens.objective import Objective

LENGTHS = (0.3, 0.8, 1.6)  # of a step, in words' norms
SHORTER = 0.5  # times as long after each look in vain: the directions are better known, and near the top
# Successive halving (Karnin et al. 2013): noises that candidates are drawn on, and how many of them go on.
HALVINGS = ((4, 16), (6, 6), (12, 2), (24, 1))
NOISES = sum(noises for noises, _ in HALVINGS)
LEAST_ERROR = 1e-3  # of the mean standard error, that a coordinate is divided by


class Pool:
    """Gradients of updates that the same token was sampled with, by stage.

    Args:
        gradients: (N, width) each.
    """

    def __init__(self, gradients: dict[int, list[torch.Tensor]] | None = None):
        self.gradients = gradients or {}

    def add(self, stage: int, gradient: torch.Tensor) -> None:
        """Take in an update's gradient (N, width), unless it is not finite."""
        if gradient.isfinite().all():
            self.gradients.setdefault(stage, []).append(gradient.detach().clone())

    def state(self) -> dict[str, torch.Tensor]:
        """The gradients of each stage, (U, N, width), by their names in a checkpoint."""
        return {f"pool.{stage}": torch.stack(found) for stage, found in self.gradients.items()}

    @classmethod
    def of(cls, tensors: dict[str, torch.Tensor]) -> "Pool":
        """What :meth:`state` gave, among other tensors."""
        prefix = "pool."
        found = {name: t for name, t in tensors.items() if name.startswith(prefix)}
        return cls({int(name.removeprefix(prefix)): list(t) for name, t in found.items()})

    def directions(self) -> list[torch.Tensor]:
        """Ways down (N, width), of norm 1: of each stage minus the mean gradient, and the same with each
        coordinate over its standard error, so that those count that the images agree on. Gradients that are
        all the same, as of a pool of noises, have no error."""
        found = []
        for of_stage in self.gradients.values():
            gradients = torch.stack(of_stage)  # (U, N, width)
            mean = gradients.mean(0)  # (N, width)
            found.append(-mean)
            spread = gradients.std(0, correction=min(1, len(gradients) - 1))  # (N, width); of one gradient 0
            error = spread / math.sqrt(len(gradients))  # (N, width)
            if error.mean() > 0:
                found.append(-mean / (error + LEAST_ERROR * error.mean()))
        return [way / way.norm() for way in found if way.norm() > 0]


def candidates(objective: Objective, vector: torch.Tensor, pool: Pool, in_vain: int) -> list[torch.Tensor]:
    """Where a step from ``vector`` (N, width) may lead: along each direction, as far as each length, after
    ``in_vain`` looks in vain."""
    token = objective.token
    step = token.word_norm * math.sqrt(len(vector)) * SHORTER**in_vain  # for each of N vectors alike
    found = []
    for way in pool.directions():
        for length in LENGTHS:
            token.load(vector + length * step * way)
            token.bound(objective.settings.optimizer.max_token_norm)
            found.append(token.vector.detach().clone())
    return found


def measured_step(
    objective: Objective, vector: torch.Tensor, pool: Pool, look: int, in_vain: int
) -> list[float]:
    """Look for a step from ``vector`` (N, width) that gives the class more probability. The token holds the
    best candidate then, and ``vector`` where none is better.

    All are drawn on the same new noises, a few first; the better ones on more.

    Args:
        look: number of this look, from 0; each has noises of its own.
        in_vain: looks with this pool so far.

    Returns:
        gain in log-probability on each noise of the last halving, on which nothing was chosen; empty where no
        step was made.
    """
    seeds = measuring_seeds(look, NOISES)
    left = candidates(objective, vector, pool, in_vain)
    known = [0.0] * len(left)
    gains = []
    for noises, number in HALVINGS:
        if len(left) <= number > 1:
            continue  # all of them would go on
        drawn = seeds[:noises]
        seeds = seeds[noises:]
        before = objective.log_probabilities(vector, drawn)
        found = [objective.log_probabilities(candidate, drawn) for candidate in left]
        known = [so_far + sum(logs) for so_far, logs in zip(known, found, strict=True)]
        order = sorted(range(len(left)), key=lambda i: -known[i])[:number]
        gains = [after - first for after, first in zip(found[order[0]], before, strict=True)] if order else []
        left = [left[i] for i in order]
        known = [known[i] for i in order]
    is_better = bool(gains) and is_a_gain(gains)
    objective.token.load(left[0] if is_better else vector)
    return gains if is_better else []
