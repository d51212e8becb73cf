"""What pictures show of their prompts, as rows: verdicts a digit each, variety, distance to renders."""

from collections.abc import Sequence

import numpy as np
import torch

from discriminative.records.scores import distances, spread
from dpt.alignment import MEASURES, alignments
from dpt.data.scenes import Prompt, draw_fact
from dpt.experiment.prompts import Part
from dpt.experiment.settings import NOISES, PROMPT_SEED

UNSAID = "-"  # the prompt makes no such claim
HALVES = 2  # a measure is 0, 1/2 or 1: prompts name two things at most


def as_digits(values: Sequence[float | None]) -> str:
    """Measures as digits, in halves."""
    return "".join(UNSAID if value is None else str(round(HALVES * value)) for value in values)


def from_digits(text: str) -> np.ndarray:
    """The measures again (N,); not a number where nothing was claimed."""
    return np.array([np.nan if digit == UNSAID else int(digit) / HALVES for digit in text])


def renders_of(asked: Sequence[Prompt]) -> torch.Tensor:
    """A render that shows each prompt's fact (N, 3, 64, 64) in [0, 1]; the same for the same prompts."""
    rng = np.random.default_rng([PROMPT_SEED, len(asked)])
    pixels = np.stack([np.asarray(draw_fact(prompt.fact, rng)) for prompt in asked])  # (N, 64, 64, 3)
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255


def judged(detector, part: Part, images: torch.Tensor) -> dict:
    """What a row says of a part's images (N, 3, 64, 64) in [0, 1].

    Args:
        detector: with ``things`` and ``features``.
    """
    found = [alignment for _, alignment in alignments(detector, part.asked, images)]
    row = {name: as_digits([getattr(one, name) for one in found]) for name in MEASURES}
    features = detector.features(images)  # (N, D)
    by_prompt = features.view(-1, NOISES, features.shape[1])  # (P, NOISES, D)
    row["diversity"] = [round(spread(some), 4) for some in by_prompt]
    reference = detector.features(renders_of(part.asked))  # (N, D)
    row["kernel_distance"] = distances(features, reference)["kernel_distance"]
    return row
