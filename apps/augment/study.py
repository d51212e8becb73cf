"""The comparison: validation pictures choose the share, then pairs of trainings are compared on the test."""

import json
import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from apps.augment.folders import LISTED, Data, Pictures, read_data
from apps.augment.network import Network, load_network
from apps.augment.options import Options
from apps.augment.training import TrainingSettings, logits_of, train
from discriminative.command_line import is_one_of_several
from discriminative.errors import UsageError, WorkError
from discriminative.hub import quiet_libraries
from discriminative.precision import resolve_device
from discriminative.records.environment import environment
from discriminative.records.files import read_json, write_json, write_lines
from discriminative.records.locks import alone_in

CONFIDENCE = 0.95
TUNING_SEEDS = (1000, 1001)  # beyond those of the pairs, which --seeds bounds
MADE_ANEW = ("seeds", "output_path", "device")  # options that change no training
RECORD = "options.json"
ROWS = "rows.jsonl"


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
    from scipy.stats import ttest_1samp

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
        places = [i for i, true in enumerate(self.truth) if true == label]
        return [fmean(pair[arm]["predicted"][i] == label for i in places) for pair in self.pairs]

    @cached_property
    def by_class(self) -> list[tuple[str, float, float, Difference]]:
        """Name, accuracy without and with, and difference; those that lose most come first."""
        found = []
        for label, name in enumerate(self.data.classes):
            without = self.of_class(label, 0)
            with_ = self.of_class(label, 1)
            found.append(
                (
                    name,
                    fmean(without),
                    fmean(with_),
                    paired_difference([b - a for a, b in zip(without, with_, strict=True)]),
                )
            )
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


class Study:
    """The trainings of a folder; those that are done are read from its rows.

    Args:
        content: a hash of the folders' pictures.

    Raises:
        UsageError: the folder holds trainings of other options or pictures.
    """

    def __init__(self, options: Options, data: Data, network: Network, device: torch.device, content: str):
        self.options = options
        self.data = data
        self.network = network
        self.device = device
        self.folder = Path(options.output_path)
        on_card = device.type == "cuda"
        self.settings = TrainingSettings(
            options.steps,
            options.batch_size,
            options.rate,
            options.layers,
            options.augmentation,
            readers=min(8, os.cpu_count() or 1) if on_card else 0,
        )
        decides = {k: v for k, v in asdict(options).items() if k not in MADE_ANEW} | {"pictures": content}
        check_record(self.folder / RECORD, decides)
        self.rows = read_rows(self.folder / ROWS)

    def row(self, kind: str, seed: int, share: float) -> dict[str, Any]:
        """One training's row, made now where it is not there."""
        key = {"kind": kind, "seed": seed, "share": share}
        there = [row for row in self.rows if key.items() <= row.items()]
        if there:
            return there[0]
        real, measured = (
            (self.data.fit, self.data.val) if kind == "tuning" else (self.data.real, self.data.test)
        )
        row = key | self.measure(real, measured, seed, share)
        self.rows.append(row)
        write_lines(self.folder / ROWS, self.rows)
        what = f"{share:g} of each batch generated" if share else "real pictures alone"
        on = "validation" if kind == "tuning" else "test"
        print(f"{kind} seed {seed}, {what}: {on} {row['accuracy']:.3f} in {row['seconds']} s", flush=True)
        return row

    def measure(self, real: Pictures, measured: Pictures, seed: int, share: float) -> dict[str, Any]:
        """Train once, and see how many pictures of another set are right."""
        began = time.monotonic()
        generated = self.data.generated if share else None
        classes = len(self.data.classes)
        model = train(self.network, classes, real, self.settings, seed, self.device, generated, share)
        readers = self.settings.readers
        logits = logits_of(self.network, model, measured.paths, self.device, readers)
        predicted = logits.argmax(1).tolist()
        accuracy = fmean(a == b for a, b in zip(predicted, measured.labels, strict=True))
        seconds = round(time.monotonic() - began, 1)
        return {"accuracy": accuracy, "predicted": predicted, "seconds": seconds}

    def choose_share(self) -> tuple[float, list[dict]]:
        """The share that is best on the validation pictures, and the trainings that say so; the smaller of
        equals."""
        shares = sorted(self.options.shares)
        if len(shares) == 1:
            return shares[0], []
        rows = [self.row("tuning", seed, share) for seed in TUNING_SEEDS for share in shares]
        scores = {share: fmean(r["accuracy"] for r in rows if r["share"] == share) for share in shares}
        return max(shares, key=scores.get), rows

    def run(self) -> Result:
        """All trainings that are missing; what they came to."""
        share, tuning = self.choose_share()
        seeds = range(self.options.seeds)
        pairs = [(self.row("pair", seed, 0.0), self.row("pair", seed, share)) for seed in seeds]
        return Result(self.data, share, tuning, pairs, self.data.test.labels)


def check_record(path: Path, decides: dict[str, Any]) -> None:
    """Write down what the trainings of a folder depend on, or check that it is the same.

    Raises:
        UsageError: it is not.
    """
    decides = json.loads(json.dumps(decides))
    if not path.exists():
        write_json(path, decides)
        return
    there = read_json(path)
    other = [name for name in decides if there.get(name) != decides[name]]
    if other:
        was = ", ".join(f"{name} {there.get(name)!r}" for name in other if name != "pictures")
        raise UsageError(
            f"--output_path: {path.parent} holds trainings of other {'options' if was else 'pictures'}"
            f"{f' ({was})' if was else ''}; give another, or remove it"
        )


def read_rows(path: Path) -> list[dict]:
    """The finished trainings.

    Raises:
        WorkError: the file is damaged.
    """
    try:
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    except ValueError as error:
        raise WorkError(f"{path}: cannot be read ({error}); remove or mend it") from error


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
        taken = ", ".join(f"{a} for {b} {x:.2f} -> {y:.2f}" for a, b, x, y in grown)
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


def work(options: Options) -> int:
    """Do all that the options say; the exit code.

    Raises:
        UsageError, WorkError: in one line what was wrong.
    """
    from apps.augment.report import write_page

    if is_one_of_several():
        raise UsageError("accelerate launch: several processes were started; allowed is one")
    quiet_libraries()
    device = resolve_device(options.device)
    network = load_network(options)
    data, content = read_data(options)
    sizes = f"{len(data.real)} real pictures, {len(data.generated)} generated, {len(data.test)} of the test"
    print(f"{len(data.classes)} classes; {sizes}, {len(data.val)} to choose the share on")
    for note in data.notes:
        print(f"note: {note}")
    folder = Path(options.output_path)
    with alone_in(folder):
        result = Study(options, data, network, device, content).run()
        record = record_of(result, options, device)
        write_json(folder / "report.json", record)
        page = write_page(folder / "report.html", result, record)
    print("\n".join(told(result, options)))
    print(f"report: {page}")
    return 0
