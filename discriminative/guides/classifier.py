"""A classifier of images in [0, 1]: logits, labels, features; and a guide, which is one with the class
that it is asked for."""

from dataclasses import dataclass

import torch

from discriminative.errors import WorkError
from discriminative.guides.preprocess import Recipe
from discriminative.precision import advice_on_overflow, at_least_float32


@dataclass
class Classifier:
    """A frozen classifier of images in [0, 1].

    Args:
        model: logits (B, K) of preprocessed images.
        labels: K names, in the logits' order.
        recipe: its preprocessing.
    """

    name: str
    model: torch.nn.Module
    labels: list[str]
    recipe: Recipe

    def __post_init__(self):
        self.labels = [str(label) for label in self.labels]  # some have numbers

    @property
    def dtype(self) -> torch.dtype:
        """What the model computes in."""
        return next((p.dtype for p in self.model.parameters()), torch.float32)

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return next((p.device for p in self.model.parameters()), torch.device("cpu"))

    def check(self, height: int, width: int, guides: bool) -> None:
        """Have the classifier see a batch of noise, so that what it cannot do shows before any work.

        Args:
            height: of the images, in pixels, as is ``width``.
            guides: whether the gradient of its scores is to reach the images.

        Raises:
            ValueError: it gives no logits, or passes no gradient.
            Exception: whatever the model raises.
        """
        rng = torch.Generator().manual_seed(0)
        images = torch.rand(2, 3, height, width, generator=rng).to(self.device)  # (B, 3, H, W)
        images.requires_grad_(guides)
        with torch.set_grad_enabled(guides):
            logits = self.logits(images)  # (B, K)
        if not logits.isfinite().all():
            half = "; try --mixed_precision no or bf16" if self.dtype == torch.float16 else ""
            raise ValueError(f"its logits are not finite{half}")
        if (logits >= 0).all() and torch.allclose(logits.sum(1), torch.ones(2).to(logits), atol=1e-3):
            raise ValueError("it gives probabilities; allowed are logits, before any softmax")
        if guides and not reaches(images, logits):
            raise ValueError(
                "no gradient of its logits reaches the image (no_grad, detach, NumPy or rounding on the way?)"
            )

    def logits(self, images: torch.Tensor) -> torch.Tensor:
        """Logits (B, K), float32, of images (B, 3, H, W) in [0, 1] on any device; differentiable.

        Raises:
            WorkError: the model gives another number of logits than it has labels.
        """
        like = next(self.model.parameters(), images)
        logits = at_least_float32(self.model(self.recipe(images.to(like.device)).to(like.dtype)))
        if logits.shape != (len(images), len(self.labels)):
            raise WorkError(
                f"{self.name} gives logits of shape {tuple(logits.shape)} for {len(images)} images and "
                f"{len(self.labels)} labels"
            )
        return logits

    def look(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits (B, K), and features (B, D): what the last linear layer is given, the logits themselves
        where there is none; not finite where the image or half precision is not.
        """
        heads = [
            m
            for m in self.model.modules()
            if isinstance(m, torch.nn.Linear) and m.out_features == len(self.labels)
        ]
        given = []
        handles = [
            head.register_forward_pre_hook(lambda module, args: given.append(args[0])) for head in heads[-1:]
        ]
        try:
            logits = self.logits(images)
        finally:
            for handle in handles:
                handle.remove()
        features = at_least_float32(given[-1]) if given else logits  # (B, D) or (B, places, D)
        return logits, features.reshape(len(features), -1, features.shape[-1]).mean(1)


@dataclass
class Guide:
    """A classifier, and its index, from 0, of the class that the token is to draw."""

    classifier: Classifier
    target: int

    def is_right(self, images: torch.Tensor) -> torch.Tensor:
        """Whether the classifier gives images (B, 3, H, W) in [0, 1] to the class, (B,) on the CPU."""
        return gives(self.classifier.look(images)[0], self.target).cpu()


def are_finite(values: torch.Tensor) -> torch.Tensor:
    """Which of images or logits (B, ...) are finite throughout, (B,)."""
    return values.isfinite().flatten(1).all(1)


def gives(logits: torch.Tensor, target: int) -> torch.Tensor:
    """Whether logits (B, K) give their images to a class, (B,); one that is not finite gives it to none."""
    return (logits.argmax(1) == target) & are_finite(logits)


def check_most(number: int, finite: int, dtype: torch.dtype) -> None:
    """Check that most images had finite logits: half precision overflows now and then.

    Args:
        dtype: that images or logits were computed in.

    Raises:
        WorkError: most had not.
    """
    if 2 * finite < number:
        raise WorkError(
            f"{number - finite} of {number} images' logits are not finite; {advice_on_overflow(dtype)}"
        )


def reaches(images: torch.Tensor, logits: torch.Tensor) -> bool:
    """Whether the gradient of logits (B, K) reaches the images that they are of, (B, 3, H, W)."""
    if not logits.requires_grad:
        return False
    # The least probable class: the most probable one may be beyond doubt.
    least = logits.log_softmax(1).min(1).values  # (B,)
    gradient = torch.autograd.grad(least.sum(), images, allow_unused=True)[0]
    return gradient is not None and bool((gradient != 0).any())


def finite(logits: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The same logits, once it is sure that they can be compared.

    Args:
        dtype: that they were computed in.

    Raises:
        WorkError: some are not finite (the most probable of NaNs would be the first class).
    """
    if not logits.isfinite().all():
        raise WorkError(f"an image's logits are not finite; {advice_on_overflow(dtype)}")
    return logits


@torch.no_grad()
def verdicts(classifier: Classifier, images: torch.Tensor, batch_size: int) -> torch.Tensor:
    """The most probable class (N,), counted from 0, of images (N, 3, H, W) in [0, 1].

    Raises:
        WorkError: a logit is not finite.
    """
    logits = (classifier.logits(part) for part in images.split(batch_size))
    return torch.cat([finite(part, classifier.dtype).argmax(1).cpu() for part in logits])
