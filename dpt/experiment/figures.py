"""The experiment's figures: by strength, over updates, by block, and pictures side by side."""

from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from discriminative.diffusion.sampler import decode
from discriminative.precision import bf16_without_gradient, trains_in_bf16
from discriminative.records.files import write_image
from discriminative.records.pictures import INK, RIGHT, WRONG
from dpt.evaluate import mean_share
from dpt.experiment.drawing import kept, path_of
from dpt.experiment.gains import by_prompt, read_level
from dpt.experiment.judging import from_digits
from dpt.experiment.prompts import part_of
from dpt.experiment.settings import (
    ALL_ARMS,
    BLOCKS,
    CHEAP,
    CHOOSING_SEED,
    COURSE,
    LONGER,
    NOISES,
    PART,
    SHORT,
)
from dpt.experiment.trainings import load_miniature
from dpt.experiment.units import COURSE_OF, Progress, Unit, tuning_units
from dpt.report import enlarged, labelled, sheet_of

SIDE_BY_SIDE = ("A", "B", "C", "D")
SHOWN_PROMPTS = 12


def draw_figures(progress: Progress, root: Path, folder: Path) -> list[Path]:
    """Draw what the rows allow; the files' paths."""
    return [
        path for make in (strength, over_updates, blocks, pictures) if (path := make(progress, root, folder))
    ]


def share_of_units(progress: Progress, units: list[Unit]) -> dict | None:
    """Whole captions of units, with an interval over prompts; None where one is missing."""
    rows = [progress.row(unit) for unit in units]
    return None if None in rows else mean_share(by_prompt(rows, "full"))


def strength(progress: Progress, root: Path, folder: Path) -> Path | None:
    """Whole captions by strength of self-correction, on the tuning prompts (DPT, figure 4)."""
    lines = {}
    for name, plain in (("D", "C"), ("E", "A")):
        for mode in ("official", "state"):
            points = {0.0: share_of_units(progress, tuning_units(plain))}
            for i, choice in enumerate(ALL_ARMS[name].choices):
                if choice["mode"] == mode:
                    units = [unit for unit in tuning_units(name) if unit.choice == i]
                    points[choice["factor"]] = share_of_units(progress, units)
            lines[f"{name}, {mode}"] = points
    label = "strength of self-correction (0: none)"
    return plot(lines, folder / "dpt_strength.png", label, "whole captions", log=True)


def over_updates(progress: Progress, root: Path, folder: Path) -> Path | None:
    """Whole captions over the updates of the longer stage 2, on the tuning prompts."""
    lines = {}
    for name in COURSE_OF:
        points = {0: share_of_units(progress, tuning_units("A"))}
        for after in COURSE:
            units = [
                Unit("draw", name, CHOOSING_SEED, "tuning", unit.part, 0, updates=after)
                for unit in tuning_units(name)
            ]
            points[after] = share_of_units(progress, units)
        points[LONGER.steps] = share_of_units(progress, tuning_units(f"{name} longer"))
        lines[ALL_ARMS[name].told] = points
    return plot(lines, folder / "dpt_updates.png", "updates of stage 2", "whole captions")


def blocks(progress: Progress, root: Path, folder: Path) -> Path | None:
    """Matching by block, after short probes (DPT, figure 3)."""
    rows = {name: progress.row(Unit("read", f"block {name}", CHOOSING_SEED)) for name in BLOCKS}
    places = [name for name, row in rows.items() if row]
    told = {"right text": "text", "right picture": "picture"}
    lines = {
        label: {name: read_level({0: rows[name]}, column) for name in places}
        for label, column in told.items()
    }
    label = f"block that is probed, {SHORT.steps} updates"
    return plot(lines, folder / "dpt_blocks.png", label, "told right")


def plot(lines: dict[str, dict], path: Path, label: str, share: str, log: bool = False) -> Path | None:
    """Shares with intervals over what they depend on, a line each; None where nothing is there but zeros.

    Args:
        label: of what they depend on.
        share: of what they are.
        log: from the first value above 0 on, the axis is logarithmic.
    """
    known = {name: {x: f for x, f in points.items() if f} for name, points in lines.items()}
    known = {name: points for name, points in known.items() if len(points) > 1}
    if not known:
        return None
    figure = Figure(figsize=(8, 4.5), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    for name, points in known.items():
        low, middle, high = ([f[key] for f in points.values()] for key in ("low", "share", "high"))
        (line,) = axes.plot(list(points), middle, marker="o", label=name)
        axes.fill_between(list(points), low, high, color=line.get_color(), alpha=0.12, linewidth=0)
    if log:
        axes.set_xscale("symlog", linthresh=0.5)
    axes.set_xlabel(label, color=INK)
    axes.set_ylabel(f"{share}, share with interval of 95 %", color=INK)
    axes.legend()
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    write_image(path, Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3]))
    return path


def pictures(progress: Progress, root: Path, folder: Path) -> Path | None:
    """The first picture of some prompts by A, B, C and D, side by side, framed by verdict; None where the
    drawn pictures are not at hand."""
    units = {name: Unit("draw", name, 0, "table", 0) for name in SIDE_BY_SIDE}
    rows = {name: progress.row(unit) for name, unit in units.items()}
    if None in rows.values():
        return None
    drawn = {name: kept(path_of(root, name, 0, "table", 0), row["settings"]) for name, row in rows.items()}
    if None in drawn.values():
        return None
    shown = range(0, PART, PART // SHOWN_PROMPTS)[:SHOWN_PROMPTS]  # some of every kind
    places = [NOISES * i for i in shown]
    images = {name: decoded(one.latents[places]) for name, one in drawn.items()}
    right = {name: from_digits(row["full"])[places] == 1 for name, row in rows.items()}
    prompts = part_of("table", 0).prompts
    texts = [prompts[i].text for i in shown]
    cells = [row_of(text, i, images, right) for i, text in enumerate(texts)]
    write_image(folder / "dpt_arms.png", sheet_of(cells))
    return folder / "dpt_arms.png"


def row_of(text: str, i: int, images: dict[str, torch.Tensor], right: dict) -> Image.Image:
    """One prompt's pictures side by side."""
    parts = [
        labelled(enlarged(some[i]), [(name, RIGHT if right[name][i] else WRONG)])
        for name, some in images.items()
    ]
    row = Image.new("RGB", (sum(part.width + 4 for part in parts), parts[0].height), "white")
    for place, part in enumerate(parts):
        row.paste(part, (place * (part.width + 4), 0))
    return labelled(row, [(text, INK)])


@torch.no_grad()
def decoded(latents: torch.Tensor) -> torch.Tensor:
    """Images (N, 3, H, W) in [0, 1] of finished latents."""
    models = load_miniature()
    with bf16_without_gradient(models, trains_in_bf16("auto", models.device)):
        return decode(models, latents, CHEAP).float()
