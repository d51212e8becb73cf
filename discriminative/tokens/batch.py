"""Images that trainings ask for, drawn and scored in batches: one token's alone, or several tokens'."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import accumulate

import torch

from discriminative.diffusion.gradients import ClassLoss, ScoredBatch, Weight, cond_gradient
from discriminative.diffusion.memory import Batches
from discriminative.diffusion.sampler import sample
from discriminative.guides.preprocess import augmented
from discriminative.settings import GradientPath, SamplerSettings
from discriminative.tokens.class_token import ClassToken


@dataclass(frozen=True)
class Asked:
    """Images that one token's training asks for: with the gradient of their loss, or only their scores.

    Args:
        loss: of images (B, 3, H, W), by the token's own guides.
        prompts: of the images, as many as ``seeds``.
        batches: how many fit at once.
        path: where the gradient is taken; None asks for none.
        weight: of each image's loss.
        varied: whether the guides see the images varied a little.
    """

    token: ClassToken
    loss: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
    prompts: list[str]
    seeds: list[int]
    sampler: SamplerSettings
    batches: Batches
    path: GradientPath | None = None
    weight: float = 1.0
    varied: bool = False

    @property
    def kind(self) -> tuple[SamplerSettings, GradientPath | None]:
        """What has to be the same of those that share a batch."""
        return self.sampler, self.path

    def part(self, chunk: slice) -> "Asked":
        """Some of its images."""
        return replace(self, prompts=self.prompts[chunk], seeds=self.seeds[chunk])

    def class_loss(self, images: torch.Tensor, chunk: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss and verdict (B,) of the images (B, 3, H, W) that are its ``chunk``."""
        return self.loss(augmented(images, self.seeds[chunk]) if self.varied else images)


Work = Callable[[Asked], list[ScoredBatch]]  # what comes of the images, batch after batch


def alone(asked: Asked) -> list[ScoredBatch]:
    """What one training asks for, by itself."""
    return together([asked])[0]


def together(asked: list[Asked]) -> list[list[ScoredBatch]]:
    """What several trainings ask for, of one ``kind``, in batches that they share.

    Each token's gradient comes from its own prompts, so they never mix. A batch of another make-up differs in
    rounding.

    Returns:
        what each asked for, batch after batch: the gradient is the token's, (N, width), or None where
        none was asked for.
    """
    first = asked[0]
    owners = [(i, j) for i, one in enumerate(asked) for j in range(len(one.seeds))]
    found = [[] for _ in asked]

    def work(chunk: slice) -> list[tuple[int, ScoredBatch]]:
        of_owner = {}
        for i, j in owners[chunk]:
            of_owner.setdefault(i, []).append(j)
        parts = [asked[i].part(slice(js[0], js[-1] + 1)) for i, js in of_owner.items()]
        done = gradient_batch(parts) if first.path else score_batch(parts)
        return list(zip(of_owner, done, strict=True))

    for batch in first.batches.over(len(owners), work):
        for i, part in batch:
            found[i].append(part)
    return found


def gradient_batch(asked: list[Asked]) -> list[ScoredBatch]:
    """One batch's images with the gradient of their loss."""
    first = asked[0]
    seeds = [seed for one in asked for seed in one.seeds]
    weight = first.weight
    if len(asked) > 1:
        weights = [torch.full((len(one.seeds),), one.weight) for one in asked]
        weight = torch.cat(weights).to(first.token.models.device)  # (B,)
    tokens = [one.token for one in asked]
    prompts = [one.prompts for one in asked]
    return token_gradients(tokens, prompts, seeds, first.sampler, first.path, joint_loss(asked), weight)


@torch.no_grad()
def score_batch(asked: list[Asked]) -> list[ScoredBatch]:
    """One batch's finished images, scored."""
    seeds = [seed for one in asked for seed in one.seeds]
    tokens = [one.token for one in asked]
    images = draw(tokens, [one.prompts for one in asked], seeds, asked[0].sampler)  # (B, 3, H, W)
    scored = []
    for one, place in zip(asked, places([one.seeds for one in asked]), strict=True):
        losses, right = one.loss(images[place])  # (b,) each
        scored.append(ScoredBatch(images[place], losses, right))
    return scored


def draw(
    tokens: list[ClassToken], prompts: list[list[str]], seeds: list[int], settings: SamplerSettings
) -> torch.Tensor:
    """Finished images (B, 3, H, W) of each token's prompts."""
    first = tokens[0]
    conds = [token.encode(of_token) for token, of_token in zip(tokens, prompts, strict=True)]
    return sample(first.models, torch.cat(conds), first.unconditional, seeds, settings)


def places(parts: list[list]) -> list[slice]:
    """Where each part's images are in the batch that they make up."""
    ends = accumulate(len(part) for part in parts)
    return [slice(end - len(part), end) for end, part in zip(ends, parts, strict=True)]


def joint_loss(asked: list[Asked]) -> ClassLoss:
    """The loss of a batch, each image by its own training's guides."""
    if len(asked) == 1:
        return asked[0].class_loss

    def class_loss(images: torch.Tensor, chunk: slice) -> tuple[torch.Tensor, torch.Tensor]:
        found = []
        for one, place in zip(asked, places([one.seeds for one in asked]), strict=True):
            first = max(place.start, chunk.start)
            stop = min(place.stop, chunk.stop)
            if first < stop:
                of_one = slice(first - place.start, stop - place.start)
                found.append(one.class_loss(images[first - chunk.start : stop - chunk.start], of_one))
        losses, right = zip(*found, strict=True)
        return torch.cat(losses), torch.cat(right)  # (B,) each

    return class_loss


def token_gradients(
    tokens: list[ClassToken],
    prompts: list[list[str]],
    seeds: list[int],
    settings: SamplerSettings,
    path: GradientPath,
    class_loss: ClassLoss,
    weight: Weight,
) -> list[ScoredBatch]:
    """Images of each token's prompts, scored; each gradient is to its ``token.vector`` (N, width)."""
    first = tokens[0]
    conds = [
        token.encode(of_token) for token, of_token in zip(tokens, prompts, strict=True)
    ]  # (b, L, D) each
    cond = torch.cat(conds)  # (B, L, D)
    scored = cond_gradient(first.models, cond, first.unconditional, seeds, settings, path, class_loss, weight)
    found = []
    for token, own, place in zip(tokens, conds, places(prompts), strict=True):
        gradient = torch.autograd.grad(own, token.vector, scored.gradient[place])[0]  # (N, width)
        of_token = (scored.images[place], scored.losses[place], scored.right[place])
        found.append(ScoredBatch(*of_token, gradient))
    return found


def token_gradient(
    token: ClassToken,
    prompts: list[str],
    seeds: list[int],
    settings: SamplerSettings,
    path: GradientPath,
    class_loss: ClassLoss,
    weight: float,
) -> ScoredBatch:
    """One token's :func:`token_gradients`."""
    return token_gradients([token], [prompts], seeds, settings, path, class_loss, weight)[0]
