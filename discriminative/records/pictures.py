"""Pictures for people: images with captions, pairs framed by verdict, and how a token came about. At least
1200 pixels wide, so that labels can be read."""

import re
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
CAPTIONED = 8  # images of a prompt in a row
LINES = 3  # of a title or caption at most
FRAME = 5  # pixels
TEXT = 18  # pixels


@dataclass(frozen=True)
class Shown:
    """One image (3, H, W) in [0, 1], whether it is right (None: nobody says), and its caption."""

    image: torch.Tensor
    right: bool | None
    label: str

    @property
    def colour(self) -> str:
        """Of frame and caption."""
        return INK if self.right is None else RIGHT if self.right else WRONG


def fitting(draw: ImageDraw.ImageDraw, text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """The text in one line, shortened to ``width`` pixels."""
    text = " ".join(text.split())
    if draw.textlength(text, font) <= width:
        return text
    while text and draw.textlength(text + "…", font) > width:
        text = text[:-1]
    return text + "…"


def lines_of(draw: ImageDraw.ImageDraw, text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """The text in lines of at most ``width`` pixels, broken between words, or within one that is longer."""
    lines = [""]
    for word in re.findall(r"\S+\s*", text):
        for part in [word] if draw.textlength(word.rstrip(), font) <= width else word:
            if draw.textlength((lines[-1] + part).rstrip(), font) <= width or not lines[-1]:
                lines[-1] += part
            else:
                lines.append(part)
    return [line.rstrip() for line in lines]


def wrapped(draw: ImageDraw.ImageDraw, text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """The text in at most ``LINES`` lines of ``width`` pixels.

    Where it has to be shortened, its middle goes: names are told apart by their beginning or their end.
    """
    text = " ".join(text.split())
    lines = lines_of(draw, text, font, width)
    kept = len(text)
    while len(lines) > LINES:
        kept -= 1
        lines = lines_of(draw, f"{text[: (kept + 1) // 2]}…{text[len(text) - kept // 2 :]}", font, width)
    return lines


def framed(rows: dict[str, list[Shown]]) -> Image.Image:
    """Rows of images, each under its title, framed green where right and red where wrong, with the caption
    below."""
    columns = max(len(row) for row in rows.values())
    height, width = next(iter(rows.values()))[0].image.shape[-2:]
    cell = max(width, -(-WIDTH // columns) - 12)
    gap = 12
    tall = round(cell * height / width)
    font = ImageFont.load_default(TEXT)
    line = TEXT + 10
    across = columns * (cell + gap) + gap
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    titles = [wrapped(measure, title, font, across - 2 * gap) for title in rows]
    captions = [[wrapped(measure, shown.label, font, cell) for shown in row] for row in rows.values()]
    head = line * max(map(len, titles))
    foot = line * max(len(caption) for row in captions for caption in row)
    sheet = Image.new("RGB", (across, len(rows) * (head + tall + foot + gap) + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for r, row in enumerate(rows.values()):
        top = gap + r * (head + tall + foot + gap)
        write(draw, (gap, top), titles[r], INK, font)
        for c, shown in enumerate(row):
            left = gap + c * (cell + gap)
            paste(sheet, shown, (left, top + head), (cell, tall))
            write(draw, (left, top + head + tall + 4), captions[r][c], shown.colour, font)
    return sheet


def write(
    draw: ImageDraw.ImageDraw,
    place: tuple[int, int],
    lines: list[str],
    colour: str,
    font: ImageFont.FreeTypeFont,
) -> None:
    """Lines of text, the first at a place."""
    for i, line in enumerate(lines):
        draw.text((place[0], place[1] + i * (TEXT + 10)), line, colour, font)


def paste(sheet: Image.Image, shown: Shown, place: tuple[int, int], size: tuple[int, int]) -> None:
    """An image at a place, in its frame where it has a verdict."""
    left, top = place
    frame = 0 if shown.right is None else FRAME
    ImageDraw.Draw(sheet).rectangle((left, top, left + size[0] - 1, top + size[1] - 1), fill=shown.colour)
    inner = (size[0] - 2 * frame, size[1] - 2 * frame)
    picture = to_pil(shown.image).resize(inner, Image.Resampling.LANCZOS)
    sheet.paste(picture, (left + frame, top + frame))


def captioned(prompt: str, images: dict[int, torch.Tensor]) -> Image.Image:
    """Images (3, H, W) of one prompt by their seeds, ``CAPTIONED`` in a row, the seed below each."""
    seeds = list(images)
    rows = {}
    for first in range(0, len(seeds), CAPTIONED):
        part = seeds[first : first + CAPTIONED]
        title = prompt if first == 0 else f"seeds from {part[0]}"
        rows[title] = [Shown(images[seed], None, f"seed {seed}") for seed in part]
    return framed(rows)


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
