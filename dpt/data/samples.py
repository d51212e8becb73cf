"""What a data set gives: pictures with captions, their negatives, and a referring expression with its boxes.

A data set has ``len``, ``data[index]`` and ``set_epoch(n)``. The same index gives the same sample, which
follows from its seed, its split, the epoch and the index.
"""

from dataclasses import dataclass
from typing import Protocol

import torch

from discriminative.errors import UsageError

Span = tuple[int, int]  # first character and the one behind the last


@dataclass(frozen=True)
class Grounding:
    """A referring expression and what it refers to.

    Args:
        expression: the text.
        boxes: (M, 4) as centre x, centre y, width, height, shares of the image in [0, 1].
        spans: for each box the pieces of the expression that name it, as characters (start, end).
    """

    expression: str
    boxes: torch.Tensor
    spans: tuple[tuple[Span, ...], ...]


@dataclass(frozen=True)
class Picture:
    """An image (3, H, W) in [0, 1]; equal keys are equal images, for a cache of latents."""

    key: str
    image: torch.Tensor


@dataclass(frozen=True)
class Sample:
    """A picture with its caption, and two more of each that do not match.

    Args:
        picture: the caption and the grounding are true of it.
        hard_picture: nearly like it, but the caption is false of it.
        random_picture: any other that the caption is false of.
        caption: true of the picture.
        hard_caption: nearly like it, but false of the picture.
        random_caption: any other that is false of the picture.
        kind: how the hard negative differs.
        grounding: a referring expression for the picture.
    """

    picture: Picture
    hard_picture: Picture
    random_picture: Picture
    caption: str
    hard_caption: str
    random_caption: str
    kind: str
    grounding: Grounding


class Samples(Protocol):
    """A data set."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...

    def set_epoch(self, epoch: int) -> None: ...


def to_cxcywh(box: tuple[float, float, float, float], width: float, height: float) -> list[float]:
    """A box of corners (x0, y0, x1, y1) in pixels as centre, width and height in shares of its image."""
    x0, y0, x1, y1 = box
    return [(x0 + x1) / 2 / width, (y0 + y1) / 2 / height, (x1 - x0) / width, (y1 - y0) / height]


def check_least(flag: str, given: int, least: int) -> None:
    """Raises UsageError where a flag's number is smaller than the least that is allowed."""
    if given < least:
        raise UsageError(f"--{flag}: {given} was given; allowed is {least} or more")
