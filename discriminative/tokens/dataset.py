"""One class's folder of labelled images, with the verdicts beside each."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from discriminative.errors import UsageError, WorkError
from discriminative.guides.classifier import Guide, are_finite
from discriminative.records.files import read_json, to_pil, write_image, write_json, write_lines
from discriminative.seeds import DATASET_BASE
from discriminative.settings import SamplerSettings
from discriminative.tokens.class_token import ClassToken
from discriminative.tokens.drawing import in_batches
from discriminative.tokens.prompts import TEMPLATES, fill

METADATA = "metadata.jsonl"
RECORD = "dataset.json"  # what a data set was made with
FORMAT = 2  # of a data set's rows
VERDICTS = {True: "right", False: "wrong"}
TRIES = 20  # images sampled for each that is wanted before a token is given up


def check_dataset(folder: Path, made_with: dict[str, Any], read: Callable[[Path], dict] = read_json) -> None:
    """Check that a data set which is there may be added to.

    Args:
        made_with: the token's fingerprint, and the options that images depend on.
        read: reads the record of the folder.

    Raises:
        UsageError: it was made with another token or other options.
    """
    record = folder / RECORD
    now = {"format": FORMAT} | made_with
    if record.exists() and read(record) != json.loads(json.dumps(now)):
        raise UsageError(
            f"--export_dataset: {folder} was made with another token or other options; "
            "move it, or give another --exp_id"
        )


class Dataset:
    """A folder as ``torchvision.datasets.ImageFolder`` and ``datasets`` read it.

    ``metadata.jsonl`` has a row an image: file_name, label, prompt, seed, and what guide and judge say:
    "right", "wrong", or of a judge that does not know the class "unknown"; ``thrown_away.jsonl`` the same
    of those that were not kept. A seed is used once, however often the folder is added to.

    Args:
        judge: None where there is none for this class.
        made_with: token and options; a folder that was made with others is not added to.
        read: reads the record of a folder that is there.

    Raises:
        UsageError: it was.
    """

    def __init__(
        self,
        folder: Path,
        guides: list[Guide],
        judge: Guide | None,
        made_with: dict[str, Any],
        read: Callable[[Path], dict] = read_json,
    ):
        check_dataset(folder, made_with, read)
        write_json(folder / RECORD, {"format": FORMAT} | made_with)
        self.folder = folder
        self.guides = guides
        self.judge = judge
        self.label = guides[0].classifier.labels[guides[0].target]
        self.metadata = folder / METADATA
        self.discard = folder / "thrown_away.jsonl"
        self.rows = read_rows(self.metadata)
        self.thrown = read_rows(self.discard)

    def next_seeds(self, number: int) -> list[int]:
        """Seeds that were never used here."""
        first = 1 + max((row["seed"] for row in (*self.rows, *self.thrown)), default=DATASET_BASE - 1)
        return list(range(first, first + number))

    @torch.no_grad()
    def add(
        self, prompts: dict[int, str], only_correct: bool, images: torch.Tensor, seeds: list[int]
    ) -> None:
        """Write a batch of images (B, 3, H, W) that are kept, and the rows of all; ``prompts`` by seed."""
        by_guide = torch.stack([guide.is_right(images) for guide in self.guides]).all(0)  # (B,)
        finite = are_finite(images)  # (B,)
        by_judge = self.judge.is_right(images) if self.judge else None  # (B,)
        for i, seed in enumerate(seeds):
            row = {"label": self.label, "prompt": prompts[seed], "seed": seed}
            row["guide"] = VERDICTS[bool(by_guide[i])]
            row["judge"] = VERDICTS[bool(by_judge[i])] if self.judge else "unknown"
            if only_correct and not by_guide[i] or not finite[i]:
                self.thrown.append(row)
                continue
            name = f"{seed - DATASET_BASE:06d}.png"
            write_image(self.folder / name, to_pil(images[i]))
            self.rows.append({"file_name": name} | row)
        if self.rows:
            write_lines(self.metadata, self.rows)
        if self.thrown:
            write_lines(self.discard, self.thrown)

    def fill(
        self,
        token: ClassToken,
        class_name: str,
        number: int,
        settings: SamplerSettings,
        batch_size: int,
        only_correct: bool = False,
    ) -> int:
        """Sample training's prompts in turn until the folder holds ``number`` images.

        Args:
            batch_size: images at once.
            only_correct: throw away what some guide does not give to the class.

        Returns:
            how many were thrown away now.

        Raises:
            WorkError: far too few are right.
        """
        templates = [fill(template, token.placeholder, class_name) for template in TEMPLATES]
        before = len(self.thrown)
        wanted = number - len(self.rows)
        drawn = 0
        while len(self.rows) < number:
            if drawn >= TRIES * wanted:
                kept = wanted - (number - len(self.rows))
                raise WorkError(f"{self.folder}: only {kept} of {drawn} images were right; gave up")
            seeds = self.next_seeds(min(batch_size, number - len(self.rows)))
            of_seed = {seed: templates[(seed - DATASET_BASE) % len(templates)] for seed in seeds}
            use = partial(self.add, of_seed, only_correct)
            in_batches(token, list(of_seed.values()), seeds, settings, batch_size, use)
            drawn += len(seeds)
        return len(self.thrown) - before


def number_of_images(folder: Path) -> int:
    """How many images a data set holds; 0 where there is none."""
    return len(read_rows(folder / METADATA))


def read_rows(path: Path) -> list[dict]:
    """The rows of JSON lines; none where there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
