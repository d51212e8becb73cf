"""How much of each attribute a picture shows: phrases scored by a CLIP model, or by one's own function."""

from collections.abc import Callable

import torch

from discriminative.errors import UsageError, WorkError
from discriminative.guides.loaders import own_function
from discriminative.guides.similarity import TextSimilarity
from discriminative.hub import one_line, why

OWN = "python:"  # begins the name of one's own function
AT_ONCE = 32  # images

Score = Callable[[torch.Tensor], torch.Tensor]  # images (B, 3, H, W) in [0, 1] to scores (B, K)


class Attributes:
    """K phrases, and what scores them.

    Args:
        name: of the CLIP model, or ``python:<module>:<function>``.
        score: takes images (B, 3, H, W) in [0, 1] to scores (B, K), the larger the more of it.
    """

    def __init__(self, name: str, phrases: list[str], score: Score):
        self.name = name
        self.phrases = phrases
        self.score = score

    def scores(self, images: torch.Tensor) -> torch.Tensor:
        """Scores (N, K), float64 on the CPU, of images (N, 3, H, W) in [0, 1].

        Raises:
            WorkError: they are of another shape, or not finite; or one's own function failed.
        """
        return torch.cat([self.of_part(part) for part in images.split(AT_ONCE)])

    @torch.no_grad()
    def of_part(self, images: torch.Tensor) -> torch.Tensor:
        """What :meth:`scores` gives, of images (B, 3, H, W) that are looked at together."""
        try:
            found = torch.as_tensor(self.score(images)).double().cpu()  # (B, K)
        # One's own function may raise anything.
        except Exception as error:
            if not self.name.startswith(OWN):
                raise
            raise WorkError(f"--clip_model: {self.name!r} cannot score images: {one_line(error)}") from error
        wanted = (len(images), len(self.phrases))
        if found.shape != wanted:
            raise WorkError(
                f"--clip_model: {self.name!r} gives scores of shape {tuple(found.shape)}; "
                f"needed is {wanted}, a row an image and a column a phrase"
            )
        if not found.isfinite().all():
            raise WorkError(f"--clip_model: {self.name!r} gives scores that are not finite")
        return found


def by_clip(clip: TextSimilarity, name: str, phrases: list[str]) -> Attributes:
    """Phrases that a CLIP model scores, by the cosine with the image.

    Raises:
        UsageError: a phrase is too long for it.
    """
    for phrase in phrases:
        clip.check_text(phrase, "insight")
    return Attributes(name, phrases, lambda images: clip.scores(images, phrases))


def by_own(name: str, phrases: list[str]) -> Attributes:
    """Phrases that one's own function scores: it is given them, and returns a :data:`Score`.

    Raises:
        UsageError: it cannot be had.
    """
    try:
        score = own_function(name.removeprefix(OWN))(list(phrases))
        if not callable(score):
            raise TypeError(f"it returned a {type(score).__name__}; needed is a function of images")
    # One's own module may raise anything.
    except Exception as error:
        raise UsageError(f"--clip_model: {name!r} could not be loaded: {why(error)}") from error
    return Attributes(name, phrases, score)
