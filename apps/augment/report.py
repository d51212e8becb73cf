"""One self-contained page of a comparison: the difference, seed by seed, class by class, with pictures."""

import base64
import io
from pathlib import Path
from statistics import fmean
from typing import Any

from PIL import Image, ImageOps

from apps.augment.result import Difference, Result
from discriminative import VERSION
from discriminative.records.environment import timestamp
from discriminative.records.files import write_text
from discriminative.records.report import SCRIPT, STYLE, embedded, number_cell, text

PLOT_CLASSES = 60  # in the figure at most; the table has all
SHOWN_CLASSES = 12  # with pictures: those that lose most
SHOWN_PICTURES = 6  # of each kind
SIDE = 96  # pixels
CONFUSIONS = 15


def heading(*names: str) -> str:
    """The head of a table that sorts."""
    cells = "".join(f'<th scope="col"><button type="button">{name}</button></th>' for name in names)
    return f"<thead><tr>{cells}</tr></thead>"


def sortable(head: str, rows: list[str]) -> str:
    """A table that sorts by a click."""
    return f'<table class="sortable">{head}<tbody>{"".join(rows)}</tbody></table>'


def difference_cell(difference: Difference) -> str:
    """A cell with a difference and its interval, which sorts by the mean."""
    return f'<td data-value="{difference.mean}">{text(difference)}</td>'


def seeds(result: Result) -> str:
    """Each pair of trainings."""
    rows = []
    for without, with_ in result.pairs:
        cells = f'<td data-value="{without["seed"]}">{without["seed"]}</td>'
        cells += number_cell(without["accuracy"], ".3f") + number_cell(with_["accuracy"], ".3f")
        cells += number_cell(with_["accuracy"] - without["accuracy"], "+.3f")
        rows.append(f"<tr>{cells}</tr>")
    return sortable(heading("seed", "real alone", "with generated", "difference"), rows)


def classes(result: Result) -> str:
    """Each class; those that lose most come first."""
    rows = []
    for name, without, with_, difference in result.by_class:
        cells = f"<td>{text(name)}</td>" + number_cell(without, ".3f") + number_cell(with_, ".3f")
        rows.append(f"<tr>{cells}{difference_cell(difference)}<td>{difference.verdict}</td></tr>")
    return sortable(heading("class", "real alone", "with generated", "difference", "by its interval"), rows)


def confusions(result: Result) -> str:
    """What is taken for something else more often than without generated pictures."""
    rows = [
        f"<tr><td>{text(a)}</td><td>{text(b)}</td>{number_cell(x, '.3f')}{number_cell(y, '.3f')}</tr>"
        for a, b, x, y in result.grown()[:CONFUSIONS]
    ]
    if not rows:
        return "<p>None.</p>"
    return sortable(heading("class", "taken for", "real alone", "with generated"), rows)


def tuning(result: Result) -> str:
    """What each share came to on the validation pictures."""
    if not result.tuning:
        return f"<p>One share was given: {result.share:g}.</p>"
    rows = []
    for share in sorted({row["share"] for row in result.tuning}):
        scores = [row["accuracy"] for row in result.tuning if row["share"] == share]
        chosen = "chosen" if share == result.share else ""
        rows.append(f"<tr>{number_cell(share, 'g')}{number_cell(fmean(scores), '.3f')}<td>{chosen}</td></tr>")
    return sortable(heading("share of a batch", "validation accuracy", ""), rows)


def figure(result: Result) -> str:
    """The classes' differences with their intervals, as a picture in the page."""
    from matplotlib.figure import Figure

    shown = result.by_class[:PLOT_CLASSES]
    drawing = Figure(figsize=(10, 1.4 + 0.3 * len(shown)), dpi=100, layout="constrained")
    axes = drawing.add_subplot()
    for i, (_, _, _, difference) in enumerate(shown):
        colour = {"gains": "#2a9d4a", "loses": "#c8372d", "open": "#777777"}[difference.verdict]
        if difference.low is not None:
            axes.plot([difference.low, difference.high], [i, i], color=colour)
        axes.plot(difference.mean, i, "o", color=colour)
    axes.axvline(0, color="#222222", linewidth=0.8)
    axes.set_yticks(range(len(shown)), [row[0][:40] for row in shown], parse_math=False)
    axes.set_ylim(len(shown) - 0.5, -0.5)
    axes.set_xlabel("test accuracy with generated pictures minus without, intervals of 95 %")
    buffer = io.BytesIO()
    drawing.savefig(buffer, format="png")
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="difference class by class" src="data:image/png;base64,{data}">'


def strip(paths: list[Path]) -> Image.Image:
    """The first few pictures beside each other."""
    sheet = Image.new("RGB", (SHOWN_PICTURES * (SIDE + 2), SIDE), "white")
    for i, path in enumerate(paths[:SHOWN_PICTURES]):
        with Image.open(path) as picture:
            sheet.paste(ImageOps.fit(picture.convert("RGB"), (SIDE, SIDE)), (i * (SIDE + 2), 0))
    return sheet


def pictures(result: Result) -> str:
    """Real and generated pictures of the classes that lose most, to look at."""
    rows = []
    for name, *_ in result.by_class[:SHOWN_CLASSES]:
        label = result.data.classes.index(name)
        cells = f"<td>{text(name)}</td>"
        for kind in ("real", "generated"):
            paths = getattr(result.data, kind).of_class(label)
            picture = embedded(strip(paths)) if paths else ""
            cells += (
                f'<td><img alt="{kind}, {text(name)}" src="{picture}"></td>' if paths else "<td>none</td>"
            )
        rows.append(f"<tr>{cells}</tr>")
    head = "<thead><tr><th>class</th><th>real</th><th>generated</th></tr></thead>"
    return f"<table>{head}<tbody>{''.join(rows)}</tbody></table>"


def settings(record: dict[str, Any]) -> str:
    """The options, the numbers of pictures, and where it ran."""
    told = record["options"] | {f"{k} pictures": v for k, v in record["pictures"].items()}
    told |= record["environment"]
    rows = "".join(f"<tr><td>{text(k)}</td><td>{text(v)}</td></tr>" for k, v in told.items())
    return f"<table>{rows}</table>"


def write_page(path: Path, result: Result, record: dict[str, Any]) -> Path:
    """Write the page; returns its path."""
    without = fmean(result.accuracies(0))
    with_ = fmean(result.accuracies(1))
    notes = "".join(f"<li>{text(note)}</li>" for note in result.data.notes)
    losers = ", ".join(text(name) for name in result.losers) or "none"
    steps = record["options"]["steps"]
    page = f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>Generated pictures in training</title>
<link rel="icon" href="data:,">
<style>{STYLE}</style></head><body>
<h1>Generated pictures in training</h1>
<p><strong>Test accuracy {without:.3f} with real pictures alone, {with_:.3f} with generated ones:
{text(result.difference)}.</strong> The interval of 95 % is Student's t over {len(result.pairs)} pairs
of trainings. A pair shares its seed; all have {steps} steps. The interval says what other seeds
would do on these pictures, not what other pictures would. Classes that lose beyond chance: {losers}.
Written {timestamp()} by version {VERSION}.</p>
<ul>{notes}</ul>
<h2>Where it helps and where it hurts</h2>{figure(result)}{classes(result)}
<h2>Confusions that grow</h2>{confusions(result)}
<h2>Pictures of the classes that lose most</h2>{pictures(result)}
<h2>Seed by seed</h2>{seeds(result)}
<h2>How the share was chosen</h2>{tuning(result)}
<h2>Settings</h2>{settings(record)}
<script>{SCRIPT}</script></body></html>
"""
    write_text(path, page)
    return path
