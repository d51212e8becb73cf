"""Pictures for people: pairs framed by verdict, and how a token came about. At least 1200 pixels wide, so
that labels can be read."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from discriminative.records.files import GAP, to_pil, write_image

WIDTH = 1200  # pixels, at least
RIGHT = "#2a9d4a"
WRONG = "#c8372d"
INK = "#222222"
COLUMNS = 10  # of an evolution at most


@dataclass(frozen=True)
class Shown:
    """One image (3, H, W) in [0, 1], whether it is right, and what the guide takes it for."""

    image: torch.Tensor
    right: bool
    label: str


def fitting(draw: ImageDraw.ImageDraw, text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """The text in one line, shortened to ``width`` pixels."""
    text = " ".join(text.split())
    if draw.textlength(text, font) <= width:
        return text
    while text and draw.textlength(text + "…", font) > width:
        text = text[:-1]
    return text + "…"


def framed(rows: dict[str, list[Shown]]) -> Image.Image:
    """Rows of images, each under its title, framed green where right and red where wrong, with the
    predicted label below."""
    columns = max(len(row) for row in rows.values())
    height, width = next(iter(rows.values()))[0].image.shape[-2:]
    cell = max(width, -(-WIDTH // columns) - 12)
    gap = 12
    frame = 5
    text = 18
    tall = round(cell * height / width)
    font = ImageFont.load_default(text)
    line = text + 10
    sheet = Image.new(
        "RGB", (columns * (cell + gap) + gap, len(rows) * (tall + 2 * line + gap) + gap), "white"
    )
    draw = ImageDraw.Draw(sheet)
    for r, (title, row) in enumerate(rows.items()):
        top = gap + r * (tall + 2 * line + gap)
        draw.text((gap, top), fitting(draw, title, font, sheet.width - 2 * gap), INK, font)
        for c, shown in enumerate(row):
            left = gap + c * (cell + gap)
            colour = RIGHT if shown.right else WRONG
            draw.rectangle((left, top + line, left + cell - 1, top + line + tall - 1), fill=colour)
            inner = (cell - 2 * frame, tall - 2 * frame)
            sheet.paste(
                to_pil(shown.image).resize(inner, Image.Resampling.LANCZOS),
                (left + frame, top + line + frame),
            )
            draw.text((left, top + line + tall + 4), fitting(draw, shown.label, font, cell), colour, font)
    return sheet


def write_evolution(path: Path, strips: dict[int, Path], rows: list[dict], columns: int, number: int) -> None:
    """What the same noises became after so many updates, and below it loss and accuracy over the updates.

    Args:
        strips: after how many updates, and the file with the images of the same noises side by side.
        rows: of the training's log; there may be none.
        columns: images in a strip. number: those that are shown.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    epochs = sorted(strips)
    if len(epochs) > COLUMNS:  # the first, the last, and some between
        epochs = [epochs[round(i * (len(epochs) - 1) / (COLUMNS - 1))] for i in range(COLUMNS)]
    figure = Figure(figsize=(WIDTH / 100, 7), dpi=100, layout="constrained")
    grid = figure.add_gridspec(2, max(1, len(epochs)), height_ratios=(3, 2))
    for column, epoch in enumerate(epochs):
        axes = figure.add_subplot(grid[0, column])
        with Image.open(strips[epoch]) as strip:
            axes.imshow(upright(strip.convert("RGB"), columns, number))
        axes.set_title(f"{epoch} updates" if column == 0 else str(epoch), fontsize=11)
        axes.axis("off")
    axes = figure.add_subplot(grid[1, :])
    updates = [row["epoch"] for row in rows]
    axes.plot(updates, [row["loss"] for row in rows], color="#3465a4", label="loss of the update's images")
    axes.set_xlabel("updates")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_ylabel("cross-entropy")
    validated = [row for row in rows if "validation_accuracy" in row]
    shares = axes.twinx()
    if validated:
        accuracy = [row["validation_accuracy"] for row in validated]
        shares.plot(
            [row["epoch"] for row in validated],
            accuracy,
            "o-",
            color=RIGHT,
            label="accuracy on the validation seeds",
        )
    else:
        shares.plot(
            updates, [row["accuracy"] for row in rows], color=RIGHT, label="accuracy of the update's images"
        )
    shares.set_ylim(-0.03, 1.03)
    shares.set_ylabel("accuracy")
    figure.legend(loc="outside lower center", ncols=2)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    write_image(path, Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3]))


def upright(strip: Image.Image, columns: int, number: int) -> Image.Image:
    """The first ``number`` of the images of a strip, one above the other."""
    step = (strip.width + GAP) // columns
    number = min(number, columns)
    width = step - GAP
    height = strip.height
    out = Image.new("RGB", (width, height * number + GAP * (number - 1)), "white")
    for i in range(number):
        out.paste(strip.crop((i * step, 0, i * step + width, height)), (0, i * (height + GAP)))
    return out
