"""Draw with finished tokens: any prompts, and data sets with the verdicts beside each image."""

import json
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from config import RunConfig
from discriminative.errors import UsageError, WorkError
from discriminative.guides.classifier import Guide
from discriminative.records.files import read_json, to_pil, write_image, write_json, write_lines
from discriminative.records.layout import RunFolder
from discriminative.seeds import DATASET_BASE
from discriminative.tokens.class_token import ClassToken
from discriminative.tokens.drawing import batches
from discriminative.tokens.files import fingerprint
from discriminative.tokens.objective import sampler_settings
from discriminative.tokens.prompts import TEMPLATES, fill

RECORD = "dataset.json"  # what a data set was made with
FORMAT = 2  # of a data set's rows
OTHER = "--export_dataset: {} was made with another token or other options; move it, or give another --exp_id"
VERDICTS = {True: "right", False: "wrong"}
TRIES = 20  # images drawn for each that is wanted before a token is given up


def made_with(config: RunConfig, token: ClassToken) -> dict[str, Any]:
    """What the images of a data set depend on."""
    return {"format": FORMAT, "token": fingerprint(token.vector)} | options_of(config)


def options_of(config: RunConfig) -> dict[str, Any]:
    """The options that they depend on."""
    names = (
        "model",
        "revision",
        "mixed_precision",
        "scheduler",
        "guidance_interval",
        "classifier",
        "judge",
        "placeholder_token",
        "prompt_name",
        "num_templates",
        "keep",
    )
    drawn = {
        k: v
        for k, v in asdict(sampler_settings(config)).items()
        if k not in ("decode_batch_size", "guidance_interval")
    }
    return drawn | {name: getattr(config, name) for name in names}


def check_dataset(config: RunConfig, folder: RunFolder, vectors: torch.Tensor | None) -> None:
    """Check that a data set which is there may be added to.

    Args:
        vectors: the token's (N, width); None where it is yet to be learned.

    Raises:
        UsageError: it was made with another token or other options.
    """
    record = folder.dataset / RECORD
    if config.export_dataset and record.exists():
        now = {"format": FORMAT, "token": None if vectors is None else fingerprint(vectors)} | options_of(
            config
        )
        if read_json(record) != json.loads(json.dumps(now)):
            raise UsageError(OTHER.format(folder.dataset))


class Dataset:
    """One class's folder of labelled images, as ``torchvision.datasets.ImageFolder`` and ``datasets`` read it.

    ``metadata.jsonl`` has a row an image: file_name, label, prompt, seed, and what guide and judge say: "right", "wrong", or of a judge
    that does not know the class "unknown"; ``thrown_away.jsonl`` the same of those that were not kept. A seed is used once, however
    often the folder is added to.

    Args:
        judge: None where there is none for this class.
        made_with: token and options; a folder that was made with others is not added to.

    Raises:
        UsageError: it was.
    """

    def __init__(self, folder: Path, guides: list[Guide], judge: Guide | None, made_with: dict[str, Any]):
        record = folder / RECORD
        if record.exists() and read_json(record) != made_with:
            raise UsageError(OTHER.format(folder))
        write_json(record, made_with)
        self.folder, self.guides, self.judge = folder, guides, judge
        self.label = guides[0].classifier.labels[guides[0].target]
        self.metadata, self.discard = folder / "metadata.jsonl", folder / "thrown_away.jsonl"
        self.rows, self.thrown = (
            [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
            for path in (self.metadata, self.discard)
        )

    def next_seeds(self, number: int) -> list[int]:
        """Seeds that were never used here."""
        first = 1 + max((row["seed"] for row in (*self.rows, *self.thrown)), default=DATASET_BASE - 1)
        return list(range(first, first + number))

    @torch.no_grad()
    def add(
        self, prompts: dict[int, str], only_correct: bool, images: torch.Tensor, seeds: list[int]
    ) -> None:
        """Write a batch of images (B, 3, H, W) that are kept, and the rows of all; ``prompts`` by seed."""
        by_guide = torch.stack(
            [g.classifier.look(images)[0].argmax(1).cpu() == g.target for g in self.guides]
        ).all(0)  # (B,)
        by_judge = (
            self.judge.classifier.look(images)[0].argmax(1).cpu() == self.judge.target if self.judge else None
        )  # (B,)
        for i, seed in enumerate(seeds):
            row = {
                "label": self.label,
                "prompt": prompts[seed],
                "seed": seed,
                "guide": VERDICTS[bool(by_guide[i])],
            }
            row["judge"] = VERDICTS[bool(by_judge[i])] if self.judge else "unknown"
            if only_correct and not by_guide[i]:
                self.thrown.append(row)
                continue
            name = f"{seed - DATASET_BASE:06d}.png"
            write_image(self.folder / name, to_pil(images[i]))
            self.rows.append({"file_name": name} | row)
        if self.rows:
            write_lines(self.metadata, self.rows)
        if self.thrown:
            write_lines(self.discard, self.thrown)

    def fill(self, config: RunConfig, token: ClassToken, class_name: str) -> int:
        """Draw training's prompts in turn until the folder holds ``config.export_dataset`` images; returns how many were thrown away now.

        Raises:
            WorkError: far too few are right.
        """
        templates = [fill(t, token.placeholder, class_name) for t in TEMPLATES[: config.num_templates]]
        before, drawn, wanted = len(self.thrown), 0, config.export_dataset - len(self.rows)
        while len(self.rows) < config.export_dataset:
            if drawn >= TRIES * wanted:
                kept = wanted - (config.export_dataset - len(self.rows))
                raise WorkError(f"{self.folder}: only {kept} of {drawn} images were right; gave up")
            seeds = self.next_seeds(min(config.eval_batch_size, config.export_dataset - len(self.rows)))
            of_seed = {seed: templates[(seed - DATASET_BASE) % len(templates)] for seed in seeds}
            batches(
                config,
                token,
                list(of_seed.values()),
                seeds,
                partial(self.add, of_seed, config.keep == "correct"),
            )
            drawn += len(seeds)
        return len(self.thrown) - before
