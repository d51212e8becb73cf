"""Where everything of a class and experiment lies below ``--output_path``. Paths alone: nothing is opened
here."""

import re
import shutil
from pathlib import Path

# Of the default experiment; others lie beside them.
PICTURE_FOLDERS = ("train", "eval", "prompt")
RECORDS = "pipeline_token"  # the folder of tokens and records, named as the official code does


def class_folder(class_index: int, label: str) -> str:
    """A safe, unique folder name: "0283_tiger_cat" (label lists hold the same name twice: ImageNet has
    two cranes)."""
    return f"{class_index:04d}_{re.sub(r'[^a-z0-9]+', '_', label.lower()).strip('_')[:60]}"


class RunFolder:
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
        self.token = self.records / "learned_embeds.safetensors"
        self.config = self.records / "config.json"
        # The best so far, while training runs.
        self.partial_token = self.records / "learned_embeds.partial.safetensors"
        self.pipeline = self.records / "pipeline"
        self.web_ui = self.records / "a1111"
        self.log = self.records / "log.jsonl"
        self.result = self.records / "evaluation.json"
        self.image_rows = self.records / "images.csv"  # of the evaluation
        # The default experiment has no folder of its own.
        images = root / "img" / class_name / ("" if exp_id == "default" else exp_id)
        self.train_images, self.eval_images, self.prompt_images = (images / name for name in PICTURE_FOLDERS)
        self.unfinished_eval_images = images / "eval.partial"  # until all are sampled
        # Readers of data sets take every folder for a class.
        self.dataset = root / ("dataset" if exp_id == "default" else f"dataset_{exp_id}") / class_name
        self.grid = images / "grid.png"
        self.evolution = images / "evolution.png"

    def forget_token(self) -> None:
        """Remove what was made of a token that another one replaces: its record, evaluation, pictures,
        exports."""
        for path in (self.result, self.image_rows, self.config, self.grid):
            path.unlink(missing_ok=True)
        for folder in (self.eval_images, self.web_ui, self.pipeline):
            shutil.rmtree(folder, ignore_errors=True)


def evaluated_folders(output_path: Path) -> list[RunFolder]:
    """The classes and experiments below a folder that have an evaluation."""
    paths = sorted((output_path / RECORDS).glob("*/*/evaluation.json"))
    return [RunFolder(output_path, *path.parts[-3:-1]) for path in paths]


# Names that no experiment may have.
NO_EXP_IDS = (*PICTURE_FOLDERS, "eval.partial", "grid.png", "evolution.png")
