"""What an evaluation looks like: boxes on pictures, pairs with captions, a page; and blocks compared."""

import html
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from discriminative.records.files import to_pil, write_image, write_json, write_text
from discriminative.records.pictures import INK, RIGHT, WRONG, fitting
from discriminative.records.report import STYLE, embedded
from dpt.data.samples import Sample, Samples
from dpt.evaluate import Outcome
from dpt.pictures import Arm

CELL = 230  # pixels of a picture, at least
COLUMNS = 5
SHOWN = 10  # right ones and wrong ones, each
TRUTH = "#1d6fd1"
GAP = 12
LINE = 22


def write_evaluation(
    folder: Path, record: dict, found: Sequence[Outcome], data: Samples, arms: dict[str, Arm]
) -> Path:
    """Write ``evaluation.json``, pictures and ``report.html``; returns the page's path.

    Args:
        record: settings and ``figures``, and ``pictures`` where there are arms.
        found: an outcome for each of the data's first samples.
        arms: pictures of prompts, by how they were drawn; may be none.
    """
    write_json(folder / "evaluation.json", record)
    sheets = {}
    hit = [o.hits["iou"][1] >= 0.5 for o in found]
    matched = [o.text_is_right and o.picture_is_right for o in found]
    for name, right, draw in (("boxes", hit, box_cell), ("pairs", matched, pair_cell)):
        for verdict, wanted in (("right", True), ("wrong", False)):
            chosen = [i for i, value in enumerate(right) if value is wanted][:SHOWN]
            if chosen:
                sheet = sheet_of([draw(data[i], found[i], right[i]) for i in chosen])
                write_image(folder / f"{name}_{verdict}.png", sheet)
                sheets[f"{name}_{verdict}"] = sheet
            else:
                (folder / f"{name}_{verdict}.png").unlink(missing_ok=True)
    (folder / "pictures.png").unlink(missing_ok=True)
    if arms:
        sheets["pictures"] = sheet_of(picture_cells(arms))
        write_image(folder / "pictures.png", sheets["pictures"])
    path = folder / "report.html"
    write_text(path, page(record, sheets))
    return path


# Pictures.


def enlarged(image: torch.Tensor) -> Image.Image:
    """An image (3, H, W) in [0, 1], ``CELL`` pixels wide at least."""
    picture = to_pil(image)
    times = max(1, -(-CELL // picture.width))
    return picture.resize((picture.width * times, picture.height * times), Image.Resampling.NEAREST)


def draw_box(picture: Image.Image, box: torch.Tensor, colour: str, width: int) -> None:
    """A box (4,) of centre and size, in shares of the picture."""
    x, y, w, h = (box * torch.tensor([picture.width, picture.height] * 2)).tolist()
    corners = [x - w / 2, y - h / 2, x + w / 2, y + h / 2]
    edge = [picture.width - 1, picture.height - 1] * 2
    kept = [min(max(0, c), e) for c, e in zip(corners, edge, strict=True)]
    ImageDraw.Draw(picture).rectangle(kept, outline=colour, width=width)


def labelled(picture: Image.Image, lines: list[tuple[str, str]]) -> Image.Image:
    """A picture with lines below it, each a text and its colour."""
    sheet = Image.new("RGB", (picture.width, picture.height + LINE * len(lines)), "white")
    sheet.paste(picture)
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(15)
    for i, (text, colour) in enumerate(lines):
        draw.text((0, picture.height + LINE * i + 2), fitting(draw, text, font, sheet.width), colour, font)
    return sheet


def box_cell(sample: Sample, outcome: Outcome, right: bool) -> Image.Image:
    """What is meant (blue) and the most certain box (green or red), with the expression."""
    picture = enlarged(sample.picture.image)
    for box in sample.grounding.boxes:
        draw_box(picture, box, TRUTH, 4)
    draw_box(picture, outcome.boxes[0], RIGHT if right else WRONG, 2)
    return labelled(picture, [(sample.grounding.expression, INK)])


def pair_cell(sample: Sample, outcome: Outcome, right: bool) -> Image.Image:
    """Picture and hard picture side by side, with captions and scores."""
    pictures = [enlarged(p.image) for p in (sample.picture, sample.hard_picture)]
    width = sum(p.width for p in pictures) + 4
    both = Image.new("RGB", (width, pictures[0].height), "white")
    both.paste(pictures[0])
    both.paste(pictures[1], (pictures[0].width + 4, 0))
    colours = [RIGHT if ok else WRONG for ok in (outcome.text_is_right, outcome.picture_is_right)]
    lines = [
        (f"{outcome.right:+.3f}  {sample.caption}", INK),
        (f"{outcome.hard_text:+.3f}  {sample.hard_caption}", colours[0]),
        (f"{outcome.hard_picture:+.3f}  right picture under the first caption", colours[1]),
    ]
    return labelled(both, lines)


def picture_cells(arms: dict[str, Arm]) -> list[Image.Image]:
    """Of each prompt its first picture of every arm, side by side, named in the verdict's colour."""
    shown = {}
    for i, (prompt, _) in enumerate(next(iter(arms.values())).judged):
        shown.setdefault(prompt.text, i)
    cells = []
    for text, i in shown.items():
        parts = []
        for name, arm in arms.items():
            verdict = RIGHT if arm.right[i] else WRONG
            parts.append(labelled(enlarged(arm.images[i]), [(name, verdict)]))
        width = sum(part.width + 4 for part in parts)
        row = Image.new("RGB", (width, parts[0].height), "white")
        for place, part in enumerate(parts):
            row.paste(part, (place * (part.width + 4), 0))
        cells.append(labelled(row, [(text, INK)]))
    return cells


def sheet_of(cells: list[Image.Image]) -> Image.Image:
    """Cells of one size as one picture, row by row."""
    width = max(cell.width for cell in cells)
    height = max(cell.height for cell in cells)
    columns = min(COLUMNS if width <= 2 * CELL else 2, len(cells))
    rows = -(-len(cells) // columns)
    sheet = Image.new("RGB", (columns * (width + GAP) + GAP, rows * (height + GAP) + GAP), "white")
    for i, cell in enumerate(cells):
        sheet.paste(cell, (GAP + i % columns * (width + GAP), GAP + i // columns * (height + GAP)))
    return sheet


# The page.


def told(figure: dict) -> str:
    """A share with its interval."""
    return f"{figure['share']:.3f} <small>{figure['low']:.3f} to {figure['high']:.3f}</small>"


def table(head: list[str], rows: list[list[str]]) -> str:
    """A table; cells are written as they are."""
    top = "".join(f"<th>{cell}</th>" for cell in head)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"


CAPTIONS = {
    "boxes_right": "Found: blue is meant, green the most certain box",
    "boxes_wrong": "Not found: blue is meant, red the most certain box",
    "pairs_right": "Matched: left the picture, right the hard one; scores of the caption, of the hard "
    "caption, and of the hard picture",
    "pairs_wrong": "Not matched: red is what went wrong",
    "pictures": "Pictures of prompts: green shows all that the prompt says, by the detector",
}


def page(record: dict, sheets: dict[str, Image.Image]) -> str:
    """The whole page, which needs no network."""
    figures = record["figures"]
    by_kind = {"all": figures["itm"], **figures["itm_by_kind"]}
    itm = [
        [
            html.escape(kind),
            told(f["text"]),
            told(f["picture"]),
            str(f["text"]["number"]),
            f"{f['text_cosine']:.3f}",
        ]
        for kind, f in by_kind.items()
    ]
    head = ["negatives", "right text", "right picture", "samples", "cosine of the captions"]
    rec = [[name.replace("_", ", "), told(f)] for name, f in figures["rec"].items()]
    settings = [
        [html.escape(k), html.escape(str(v))] for k, v in record.items() if k not in ("figures", "pictures")
    ]
    pictures = "".join(
        f'<h3>{CAPTIONS[name]}</h3><img alt="{name}" src="{embedded(sheet)}">'
        for name, sheet in sheets.items()
    )
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>Matching and boxes</title><style>{STYLE}</style></head>
<body>
<h1>Matching and boxes</h1>
<p>Shares with intervals of 95 %; chance is 0.5 for matching.</p>
<h2>Image-text matching</h2>{table(head, itm)}
<h2>Referring expressions</h2>{table(["hit", "share"], rec)}
{picture_table(record["pictures"]) if "pictures" in record else ""}
<h2>Pictures</h2>{pictures}
<h2>Settings</h2>{table(["option", "value"], settings)}
</body></html>
"""


def picture_table(pictures: dict) -> str:
    """Alignment of generated pictures by arm and kind of prompt."""
    measures = ("full", "presence", "count", "binding", "relation")
    rows = []
    for name, figure in pictures["arms"].items():
        for kind, part in {"all": figure["all"], **figure["by_kind"]}.items():
            cells = [told(part[m]) if part[m] else "" for m in measures]
            rows.append([html.escape(name), kind, *cells, str(part["pictures"])])
    head = ["arm", "prompts", "whole caption", *measures[1:], "pictures"]
    return f"<h2>Generated pictures</h2>{table(head, rows)}"


# Blocks compared.


def block_table(blocks: dict[str, dict]) -> str:
    """Accuracy of matching and boxes by block, as text."""
    lines = [f"{'block':>10}  ITM text  ITM picture  REC hit@1"]
    for name, f in blocks.items():
        values = (f["itm"]["text"]["share"], f["itm"]["picture"]["share"], f["rec"]["hit@1_iou"]["share"])
        lines.append(f"{name:>10}  {values[0]:8.3f}  {values[1]:11.3f}  {values[2]:9.3f}")
    return "\n".join(lines)


def write_blocks(folder: Path, record: dict, blocks: dict[str, dict]) -> Path:
    """Write ``blocks.json`` and the figure ``blocks.png``; returns the figure's path (DPT, figure 3)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    write_json(folder / "blocks.json", record | {"blocks": blocks})
    figure = Figure(figsize=(12, 5), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    places = np.arange(len(blocks))
    series = {
        "matching, text": [f["itm"]["text"] for f in blocks.values()],
        "matching, picture": [f["itm"]["picture"] for f in blocks.values()],
        "boxes, hit@1 at IoU 0.5": [f["rec"]["hit@1_iou"] for f in blocks.values()],
    }
    for i, (label, found) in enumerate(series.items()):
        shares = np.array([f["share"] for f in found])
        error = np.abs([[f["low"] for f in found], [f["high"] for f in found]] - shares)
        axes.bar(places + (i - 1) * 0.27, shares, 0.25, yerr=error, capsize=3, label=label)
    axes.axhline(0.5, color=INK, linewidth=0.8, linestyle=":")
    axes.set_xticks(places, list(blocks))
    axes.set_ylim(0, 1)
    axes.set_xlabel("block of the UNet, in the order in which they run (dotted: chance of matching)")
    axes.set_ylabel("share that is right, with intervals of 95 %")
    figure.legend(loc="outside upper center", ncols=3)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    path = folder / "blocks.png"
    write_image(path, Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3]))
    return path
