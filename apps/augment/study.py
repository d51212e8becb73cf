"""The trainings of a comparison: those that choose the share, and the pairs; each is kept once it is done."""

import json
import os
import time
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from apps.augment.folders import Data, Pictures
from apps.augment.network import Network
from apps.augment.options import Options
from apps.augment.result import Result
from apps.augment.training import TrainingSettings, logits_of, train
from discriminative.errors import UsageError, WorkError
from discriminative.records.files import read_json, write_json, write_lines

TUNING_SEEDS = (1000, 1001)  # beyond those of the pairs, which --seeds bounds
MADE_ANEW = ("seeds", "output_path", "device")  # options that change no training
RECORD = "options.json"
ROWS = "rows.jsonl"


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
        tunes = kind == "tuning"
        real = self.data.fit if tunes else self.data.real
        measured = self.data.val if tunes else self.data.test
        row = key | self.measure(real, measured, seed, share)
        self.rows.append(row)
        write_lines(self.folder / ROWS, self.rows)
        what = f"{share:g} of each batch generated" if share else "real pictures alone"
        on = "validation" if tunes else "test"
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
