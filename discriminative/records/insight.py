"""Which attributes a token adds to a class's pictures: scores with and without it, compared in pairs."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from discriminative.records.files import read_image, write_image
from discriminative.records.pictures import Shown, framed
from discriminative.records.scores import CONFIDENCE, simultaneous_intervals

WITH_PICTURES = 3  # attributes, the most added
SHOWN = 8  # pairs in a picture
NAMED = 3  # attributes in the printed line, each way
ARMS = ("baseline", "token")


class Pair(NamedTuple):
    """The files of one seed's pictures."""

    seed: int
    baseline: Path
    token: Path


class Attribute(NamedTuple):
    """A phrase: the mean scores without and with the token, and their difference with its interval.

    The interval is None of too few pairs. ``picture`` is below the evaluation's folder of images.
    """

    phrase: str
    without: float
    with_token: float
    difference: float
    interval: list[float] | None
    picture: str | None = None

    @property
    def is_added(self) -> bool:
        """Whether all of the interval is above 0."""
        return self.interval is not None and self.interval[0] > 0

    @property
    def is_removed(self) -> bool:
        """Whether all of the interval is below 0."""
        return self.interval is not None and self.interval[1] < 0

    @property
    def told(self) -> str:
        """ "'tinted red' +0.31 [+0.22, +0.40]"."""
        interval = " [{:+.3g}, {:+.3g}]".format(*self.interval) if self.interval else ""
        return f"{self.phrase!r} {self.difference:+.3g}{interval}"


@dataclass(frozen=True)
class InsightRecord:
    """What ``evaluation.json`` holds of the attributes."""

    content: dict[str, Any]

    @property
    def attributes(self) -> list[Attribute]:
        """All phrases, the most added first."""
        return [Attribute(**row) for row in self.content["attributes"]]

    @property
    def note(self) -> str:
        """What the figures are of, in one line."""
        told = self.content
        return f"{len(told['phrases'])} phrases scored by {told['scorer']} on {told['pairs']} pairs"

    @property
    def line(self) -> str:
        """What the token adds and takes away, in one line."""
        every = self.attributes
        parts = []
        for verb, some in (
            ("adds", [a for a in every if a.is_added]),
            ("takes away", [a for a in reversed(every) if a.is_removed]),
        ):
            more = f" and {len(some) - NAMED} more" if len(some) > NAMED else ""
            if some:
                parts.append(f"{verb} {', '.join(a.told for a in some[:NAMED])}{more}")
        if all(a.interval is None for a in every):
            parts.append(f"most {every[0].told}, without intervals: too few pairs, see --test_size")
        return f"the token {'; '.join(parts) or 'changes no attribute beyond chance'}   ({self.note})"


def find_pairs(folder: Path, seeds: list[int]) -> list[Pair]:
    """The pictures of an evaluation's first prompt, by seed.

    Args:
        folder: of the evaluation's images.

    Returns:
        the pairs; fewer than there are seeds where pictures are missing.
    """
    found: dict[tuple[str, int], Path] = {}
    for path in folder.glob("*.png"):
        match = re.fullmatch(r"(baseline|token)_(\d+)_\w+", path.stem)
        if match:
            found[match[1], int(match[2])] = path
    both = [seed for seed in seeds if all((arm, seed) in found for arm in ARMS)]
    return [Pair(seed, *(found[arm, seed] for arm in ARMS)) for seed in both]


def read_pictures(paths: list[Path]) -> torch.Tensor:
    """Images (B, 3, H, W) in [0, 1]."""
    return torch.stack([read_image(path) for path in paths])


def compare_attributes(
    phrases: list[str], without: torch.Tensor, with_token: torch.Tensor
) -> list[Attribute]:
    """Every phrase's figures, the most added first.

    Args:
        without, with_token: scores (N, K) of the same seeds.
    """
    differences = with_token - without  # (N, K)
    means = zip(
        without.mean(0).tolist(), with_token.mean(0).tolist(), differences.mean(0).tolist(), strict=True
    )
    intervals = simultaneous_intervals(differences)
    found = [
        Attribute(phrase, *mean, list(interval) if interval else None)
        for phrase, mean, interval in zip(phrases, means, intervals, strict=True)
    ]
    return sorted(found, key=lambda a: -a.difference)


def correction(number: int) -> str:
    """How the intervals allow for the number of phrases."""
    return f"Student's t on pairs, {CONFIDENCE:.0%} for all {number} phrases at once (Bonferroni)"


def draw_change(path: Path, phrase: str, pairs: list[Pair], scores: torch.Tensor) -> None:
    """Write a picture of the pairs that an attribute changes most, the largest change first.

    Args:
        scores: (N, 2) of the pairs, without and with the token.
    """
    order = (scores[:, 1] - scores[:, 0]).argsort(descending=True, stable=True)[:SHOWN].tolist()
    rows = {}
    for column, arm in enumerate(ARMS):
        title = f"{'with the token' if column else 'without'}: {phrase}"
        images = read_pictures([getattr(pairs[i], arm) for i in order])
        captions = [f"seed {pairs[i].seed}: {scores[i, column].item():.3g}" for i in order]
        rows[title] = [Shown(image, None, text) for image, text in zip(images, captions, strict=True)]
    write_image(path, framed(rows))
