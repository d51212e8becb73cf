"""Figures and images of a training for tensorboard or wandb, through accelerate's trackers."""

from pathlib import Path
from typing import Any

import torch

PROJECT = "discriminative-class-tokens"


class Tracker:
    """One training's tracker.

    Args:
        name: "tensorboard" or "wandb". folder: where its files go. run_name: of the class and experiment.
        options: of the run, for the record.
    """

    def __init__(self, name: str, folder: Path, run_name: str, options: dict[str, Any]):
        from accelerate import Accelerator

        folder.mkdir(parents=True, exist_ok=True)
        self.accelerator = Accelerator(log_with=name, project_dir=folder, cpu=True)
        told = {k: v if isinstance(v, bool | int | float | str) else str(v) for k, v in options.items()}
        # tensorboard: a folder; wandb: a project with named runs.
        project = run_name if name == "tensorboard" else PROJECT
        self.accelerator.init_trackers(
            project, told, {"wandb": {"name": run_name, "dir": folder}} if name == "wandb" else {}
        )
        self.tracker = self.accelerator.trackers[0]

    def log(self, row: dict[str, Any], images: torch.Tensor) -> None:
        """One update: its log row, and the images (N, 3, H, W) that it learned from."""
        numbers = {
            k: v
            for k, v in row.items()
            if isinstance(v, int | float) and not isinstance(v, bool) and k != "epoch"
        }
        self.accelerator.log(numbers, step=row["epoch"])
        pixels = (images.permute(0, 2, 3, 1).float() * 255).round().byte().cpu().numpy()  # (N, H, W, 3)
        layout = {"dataformats": "NHWC"} if self.tracker.name == "tensorboard" else {}
        self.tracker.log_images({"images": pixels}, step=row["epoch"], **layout)

    def close(self) -> None:
        """Write what is still to be written."""
        self.accelerator.end_training()
