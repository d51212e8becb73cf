"""What a comparison came to: differences of pairs with their intervals, class by class, and confusions."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from statistics import fmean
from typing import Any

import torch
from scipy.stats import ttest_1samp

from apps.augment.folders import LISTED, Data
from apps.augment.options import Options
from discriminative.records.environment import environment

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Difference:
    """A mean of paired differences, with its interval of 95 % by Student's t; None of fewer than two."""

    mean: float
    low: float | None
    high: float | None
    number: int

    def __str__(self) -> str:
        interval = "" if self.low is None else f" [{self.low:+.3f}, {self.high:+.3f}]"
        return f"{self.mean:+.3f}{interval}"

    @property
    def verdict(self) -> str:
        """ "gains", "loses" or "open", by the interval."""
        if self.low is None or self.low <= 0 <= self.high:
            return "open"
        return "gains" if self.low > 0 else "loses"


def paired_difference(values: Sequence[float]) -> Difference:
    """The mean of differences of pairs, and its interval."""
    mean = fmean(values)
    if len(values) < 2:
        return Difference(mean, None, None, len(values))
    if len(set(values)) == 1:
        return Difference(mean, mean, mean, len(values))
    found = ttest_1samp(values, 0.0).confidence_interval(CONFIDENCE)
    return Difference(mean, float(found.low), float(found.high), len(values))


@dataclass
class Result:
    """What the pairs came to.

    Args:
        tuning: rows of the trainings that chose the share; ``pairs`` (without, with) of each seed.
        truth: classes of the test's pictures, from 0.
    """

    data: Data
    share: float
    tuning: list[dict]
    pairs: list[tuple[dict, dict]]
    truth: list[int]

    def accuracies(self, arm: int) -> list[float]:
        """Of each seed; ``arm`` is 0 without generated pictures, 1 with them."""
        return [pair[arm]["accuracy"] for pair in self.pairs]

    @property
    def difference(self) -> Difference:
        """With generated pictures over without."""
        return paired_difference([with_["accuracy"] - without["accuracy"] for without, with_ in self.pairs])

    def of_class(self, label: int, arm: int) -> list[float]:
        """Accuracy on one class of each seed."""
        return [fmean(pair[arm]["predicted"][i] == label for i in self.places[label]) for pair in self.pairs]

    @cached_property
    def places(self) -> dict[int, list[int]]:
        """Where the test's pictures of each class stand."""
        found = defaultdict(list)
        for i, label in enumerate(self.truth):
            found[label].append(i)
        return found

    @cached_property
    def by_class(self) -> list[tuple[str, float, float, Difference]]:
        """Name, accuracy without and with, and difference; those that lose most come first."""
        found = []
        for label, name in enumerate(self.data.classes):
            without = self.of_class(label, 0)
            with_ = self.of_class(label, 1)
            difference = paired_difference([b - a for a, b in zip(without, with_, strict=True)])
            found.append((name, fmean(without), fmean(with_), difference))
        return sorted(found, key=lambda row: row[3].mean)

    def confusions(self, arm: int) -> Counter:
        """How often a class is taken for another, (true, predicted) -> share of the class's pictures."""
        number = Counter(self.truth)
        found = Counter()
        for pair in self.pairs:
            for true, predicted in zip(self.truth, pair[arm]["predicted"], strict=True):
                if true != predicted:
                    found[true, predicted] += 1 / number[true] / len(self.pairs)
        return found

    def grown(self) -> list[tuple[str, str, float, float]]:
        """Confusions that generated pictures make more frequent: true, taken for, share without and with;
        the largest growth first."""
        before = self.confusions(0)
        after = self.confusions(1)
        keys = sorted(after, key=lambda key: before[key] - after[key])
        names = self.data.classes
        return [
            (names[a], names[b], before[a, b], after[a, b]) for a, b in keys if after[a, b] > before[a, b]
        ]

    @property
    def losers(self) -> list[str]:
        """Classes whose interval lies below 0."""
        return [name for name, *_, difference in self.by_class if difference.verdict == "loses"]


def told(result: Result, options: Options) -> list[str]:
    """The comparison in a few lines."""
    without = fmean(result.accuracies(0))
    with_ = fmean(result.accuracies(1))
    number = len(result.pairs)
    seeds = f"{number} seeds" if number > 1 else "1 seed, which says nothing of chance"
    lines = [
        f"test accuracy {without:.3f} with real pictures alone, {with_:.3f} with {result.share:g} of each "
        f"batch generated: {result.difference} (95 %, paired, {seeds}; {options.steps} steps each)"
    ]
    losing = [row for row in result.by_class if row[3].mean < 0]
    if losing:
        worst = ", ".join(f"{name} {difference}" for name, _, _, difference in losing[:LISTED])
        beyond = f"{len(result.losers)} beyond chance"
        lines.append(f"{len(losing)} of {len(result.data.classes)} classes lose, {beyond}: {worst}")
    grown = result.grown()[:LISTED]
    if grown:
        taken = ", ".join(f"{a} as {b} {x:.2f} -> {y:.2f}" for a, b, x, y in grown)
        lines.append(f"mistaken more often: {taken}")
    return lines


def record_of(result: Result, options: Options, device: torch.device) -> dict[str, Any]:
    """What ``report.json`` holds."""
    return {
        "classes": result.data.classes,
        "pictures": {name: len(getattr(result.data, name)) for name in ("real", "generated", "test", "val")},
        "notes": result.data.notes,
        "share": result.share,
        "without": result.accuracies(0),
        "with": result.accuracies(1),
        "difference": asdict(result.difference),
        "by_class": [
            {"class": name, "without": a, "with": b, "difference": asdict(difference)}
            for name, a, b, difference in result.by_class
        ],
        "confusions_grown": [
            {"class": a, "taken_for": b, "without": x, "with": y} for a, b, x, y in result.grown()
        ],
        "options": asdict(options),
        "environment": environment(device),
    }
