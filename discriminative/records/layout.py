"""Where everything of a class and experiment lies below ``--output_path``. Paths alone: nothing is opened
here."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

RECORDS = "pipeline_token"  # the folder of tokens and records, named as the official code does


def class_folder(class_index: int, label: str) -> str:
    """A safe, unique folder name: "0283_tiger_cat" (label lists hold the same name twice: ImageNet has
    two cranes)."""
    return f"{class_index:04d}_{re.sub(r'[^a-z0-9]+', '_', label.lower()).strip('_')[:60]}"


def unclaimed() -> None:
    """The check of a claim where there is none to lose."""


class TrainingFiles:
    """The paths of what a training writes.

    Args:
        records: folder of the token, its record and the log.
        images: folder of the pictures.
    """

    def __init__(self, records: Path, images: Path):
        # Called before files are written or replaced; raises where another run has taken the folder over.
        self.check_claim: Callable[[], None] = unclaimed
        self.token = records / "learned_embeds.safetensors"
        # The best so far, while training runs.
        self.partial_token = records / "learned_embeds.partial.safetensors"
        # Its last state, too: from there it goes on.
        self.checkpoint = records / "checkpoint.safetensors"
        self.config = records / "config.json"
        self.log = records / "log.jsonl"
        self.train_images = images / "train"
        self.evolution = images / "evolution.png"


class RunFolder(TrainingFiles):
    """The paths of one class and experiment below ``--output_path``.

    Args:
        output_path: the run's root.
        class_name: from :func:`class_folder`.
        exp_id: name of the experiment.
    """

    def __init__(self, output_path: str | Path, class_name: str, exp_id: str):
        root = Path(output_path)
        self.name = class_name
        self.exp_id = exp_id
        self.records = root / RECORDS / class_name / exp_id
        # The default experiment has no folder of its own.
        images = root / "img" / class_name / ("" if exp_id == "default" else exp_id)
        super().__init__(self.records, images)
        self.pipeline = self.records / "pipeline"
        self.web_ui = self.records / "a1111"
        self.result = self.records / "evaluation.json"
        self.failed = self.records / "failed.json"  # why the last try failed; goes when one does not
        self.image_rows = self.records / "images.csv"  # of the evaluation
        self.eval_images = images / "eval"
        self.prompt_images = images / "prompt"
        # Until all is there.
        self.unfinished_eval_images = images / "eval.partial"
        self.unfinished_result = self.unfinished_eval_images / "evaluation.json"
        self.unfinished_image_rows = self.unfinished_eval_images / "images.csv"
        self.unfinished_records = self.records / "training.partial"
        self.unfinished = TrainingFiles(self.unfinished_records, self.unfinished_records)
        # Readers of data sets take every folder for a class.
        self.dataset = root / ("dataset" if exp_id == "default" else f"dataset_{exp_id}") / class_name
        self.grid = images / "grid.png"
        # Of all classes and experiments.
        self.kept_latents = root / "cache" / "latents"

    def claimed_by(self, check: Callable[[], None]) -> None:
        """Have ``check`` called before files are written or replaced."""
        self.check_claim = check
        self.unfinished.check_claim = check

    def take_training(self) -> None:
        """Put the training that is done in the place of the last one, all of which goes: its token, log
        and pictures, and the evaluation and exports that were made of it."""
        self.check_claim()
        if self.unfinished.log.exists():  # nothing was moved yet
            gone = ("result", "image_rows", "config", "token", "partial_token", "grid", "evolution", "log")
            for name in gone:
                getattr(self, name).unlink(missing_ok=True)
            for folder in (self.eval_images, self.train_images, self.web_ui, self.pipeline):
                shutil.rmtree(folder, ignore_errors=True)
        # The log first, and the record last: with it the training counts as done.
        for name in ("log", "train_images", "evolution", "token", "config"):
            new = getattr(self.unfinished, name)
            path = getattr(self, name)
            if new.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                if path.is_dir():
                    shutil.rmtree(path)  # a part of it, where moving was interrupted
                shutil.move(new, path)  # pictures may be on another disk
        shutil.rmtree(self.unfinished_records)

    @property
    def is_to_be_taken(self) -> bool:
        """Whether a training is done that was interrupted before it took its place."""
        return self.unfinished.config.exists()

    def take_evaluation(self) -> None:
        """Put the evaluation that is done in the place of the last one; figures go first, and come last."""
        self.check_claim()
        self.result.unlink(missing_ok=True)
        shutil.rmtree(self.eval_images, ignore_errors=True)
        shutil.move(self.unfinished_eval_images / "grid.png", self.grid)
        self.result.parent.mkdir(parents=True, exist_ok=True)
        self.unfinished_eval_images.rename(self.eval_images)
        shutil.move(self.eval_images / self.unfinished_image_rows.name, self.image_rows)
        shutil.move(self.eval_images / self.unfinished_result.name, self.result)


def evaluated_folders(output_path: Path) -> list[RunFolder]:
    """The classes and experiments below a folder that have an evaluation."""
    paths = sorted((output_path / RECORDS).glob("*/*/evaluation.json"))
    return [RunFolder(output_path, *path.parts[-3:-1]) for path in paths]


# Names that no experiment may have: the default one's pictures lie beside the others' folders.
NO_EXP_IDS = ("train", "eval", "prompt", "eval.partial", "grid.png", "evolution.png")
