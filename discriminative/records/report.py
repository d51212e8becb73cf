"""One self-contained page of all classes that were evaluated below a folder: ``results/report.html``. It needs no network.

The table sorts, the figures have intervals, and every picture is in the file.
"""

import base64
import html
import io
from collections import defaultdict
from pathlib import Path
from typing import Any

from PIL import Image

from discriminative.errors import WorkError
from discriminative.records.files import read_json, write_text

PLOT_ROWS = 120  # classes in the plot at most; the table has all
PICTURE_WIDTH = 1200  # pixels
CONFUSED = 3  # labels of the plain prompt that are told


def evaluations(output_path: Path) -> list[dict[str, Any]]:
    """What every ``evaluation.json`` holds, with where its pictures are, by class and experiment.

    Raises:
        WorkError: there is none, or one of another version.
    """
    found = []
    for path in sorted((output_path / "pipeline_token").glob("*/*/evaluation.json")):
        result = read_json(path)
        if "prompts" not in result or "verdict" not in result:
            raise WorkError(
                f"{path}: was written by another version; evaluate that class again, or move it away"
            )
        name, exp_id = path.parts[-3:-1]
        images = output_path / "img" / name / ("" if exp_id == "default" else exp_id)
        training = path.with_name("config.json")
        result |= {
            "folder": name,
            "exp_id": exp_id,
            "grid": images / "grid.png",
            "evolution": images / "evolution.png",
        }
        result["training"] = read_json(training) if training.exists() and not result["token_path"] else {}
        found.append(result)
    if not found:
        raise WorkError(f"there is no evaluation below {output_path}; make one with --evaluate True")
    return sorted(found, key=lambda r: (r["class_index"], r["exp_id"]))


def embedded(picture: Image.Image) -> str:
    """A picture as a data address, no wider than the page."""
    picture.thumbnail((PICTURE_WIDTH, PICTURE_WIDTH * 4))
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, format="JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def image_tag(path: Path, alt: str) -> str:
    """The picture of a file in the page, or nothing where there is no such file."""
    if not path.exists():
        return ""
    with Image.open(path) as picture:
        return f'<img alt="{html.escape(alt)}" src="{embedded(picture)}">'


def plot(results: list[dict[str, Any]]) -> str:
    """Accuracy with its interval for each class, by guide and judge, and the baseline's, as a picture in the page."""
    from matplotlib.figure import Figure

    shown = results[:PLOT_ROWS]
    figure = Figure(figsize=(12, 1.6 + 0.3 * len(shown)), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    for who, offset, colour in (("guide", -0.12, "#3465a4"), ("judge", 0.12, "#2a9d4a")):
        points = [
            (i, r["prompts"][0]["arms"]["token"][who])
            for i, r in enumerate(shown)
            if r["prompts"][0]["arms"]["token"][who]
        ]
        if points:
            at, share = [i + offset for i, _ in points], [p["accuracy"] for _, p in points]
            low = [max(0.0, p["accuracy"] - p["accuracy_interval"][0]) for _, p in points]
            high = [max(0.0, p["accuracy_interval"][1] - p["accuracy"]) for _, p in points]
            axes.errorbar(
                share, at, xerr=[low, high], fmt="o", color=colour, capsize=3, label=f"with the token, {who}"
            )
    before = [r["prompts"][0]["arms"]["baseline"]["guide"]["accuracy"] for r in shown]
    axes.plot(before, range(len(shown)), "x", color="#c8372d", label="without, guide")
    axes.set_yticks(range(len(shown)), [title_of(r)[:40] for r in shown], parse_math=False)
    axes.set_ylim(len(shown) - 0.5, -0.5)
    axes.set_xlim(-0.02, 1.02)
    axes.set_xlabel("share of images that are right, with intervals of 95 %")
    axes.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside upper center", ncols=3)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return f'<img alt="accuracy class by class" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def title_of(result: dict[str, Any]) -> str:
    """ "283 tiger cat (default)"."""
    return f"{result['class_index']} {result['class_name']}" + (
        "" if result["exp_id"] == "default" else f" ({result['exp_id']})"
    )


def share(value: float | None, interval: list[float] | None = None) -> str:
    """A cell with a share, which sorts by its number."""
    if value is None:
        return "<td></td>"
    told = f" <small>{interval[0]:.2f}–{interval[1]:.2f}</small>" if interval else ""
    return f'<td data-value="{value}">{value:.2f}{told}</td>'


HEADINGS = (
    "class",
    "experiment",
    "guide, without",
    "guide, with",
    "judge, without",
    "judge, with",
    "p",
    "diversity",
    "updates",
    "seconds",
)


def table_row(result: dict[str, Any]) -> str:
    """One class in the table."""
    first = result["prompts"][0]
    link = f'<a href="#{anchor(result)}">{result["class_index"]} {text(result["class_name"])}</a>'
    cells = [f'<td data-value="{result["class_index"]}">{link}</td>']
    cells.append(f"<td>{text(result['exp_id'])}</td>")
    for who in ("guide", "judge"):
        for arm in ("baseline", "token"):
            found = first["arms"][arm][who]
            cells.append(share(found["accuracy"], found["accuracy_interval"]) if found else share(None))
    p_value, training = first["paired"]["guide"]["p_value"], result["training"].get("training", {})
    cells.append(f'<td data-value="{p_value}">{p_value:.1g}</td>')
    cells.append(share(first["diversity_ratio"]))
    numbers = [training.get(key) for key in ("updates", "seconds")]
    cells += [
        "<td></td>" if number is None else f'<td data-value="{number}">{number:.0f}</td>'
        for number in numbers
    ]
    return f"<tr>{''.join(cells)}</tr>"


def anchor(result: dict[str, Any]) -> str:
    """The class's place in the page."""
    return text(f"{result['folder']}-{result['exp_id']}")


def text(value: object) -> str:
    """Escaped for the page."""
    return html.escape(str(value), quote=True)


def confusion(results: list[dict[str, Any]]) -> str:
    """What the prompt without the token drew instead."""
    rows = []
    for r in results:
        seen = r["prompts"][0]["arms"]["baseline"]
        drawn = ", ".join(
            f"{text(label)} {part:.2f}" for label, part in seen["guide"]["predicted"][:CONFUSED]
        )
        rows.append(f"<tr><td>{text(title_of(r))}</td><td>{text(seen['prompt'])}</td><td>{drawn}</td></tr>")
    head = (
        "<tr><th>class</th><th>prompt without the token</th><th>what the guide saw, share of images</th></tr>"
    )
    return f"<table><thead>{head}</thead><tbody>{''.join(rows)}</tbody></table>"


def gallery(results: list[dict[str, Any]]) -> str:
    """Each class's verdict, pictures, and the other prompts."""
    parts = []
    for r in results:
        others = ""
        for prompt in r["prompts"][1:]:
            before, after = (prompt["arms"][arm]["guide"]["accuracy"] for arm in ("baseline", "token"))
            others += f"<li>{text(prompt['template'])}: guide {before:.2f} → {after:.2f}</li>"
        others = f"<ul>{others}</ul>" if others else ""
        pictures = image_tag(r["grid"], f"{r['class_name']} without and with the token")
        evolution = image_tag(r["evolution"], f"{r['class_name']} over the updates")
        more = f"<details><summary>how it was learned</summary>{evolution}</details>" if evolution else ""
        head = f"<h3>{text(title_of(r))}</h3><p>{text(r['verdict'])}</p>"
        parts.append(f'<section id="{anchor(r)}">{head}{others}{pictures}{more}</section>')
    return "".join(parts)


def settings(results: list[dict[str, Any]]) -> str:
    """The options of every experiment, those that all its classes share."""
    by_experiment = defaultdict(list)
    for r in results:
        chosen = (
            r["training"].get("config", {})
            | {k: r[k] for k in ("model", "classifier", "judge", "test_size")}
            | r["settings"]
        )
        by_experiment[r["exp_id"]].append(chosen)
    parts = []
    for exp_id, all_chosen in by_experiment.items():
        shared = {k: v for k, v in all_chosen[0].items() if all(other.get(k) == v for other in all_chosen)}
        rows = "".join(f"<tr><td>{text(k)}</td><td>{text(v)}</td></tr>" for k, v in shared.items())
        parts.append(f"<details><summary>{text(exp_id)}</summary><table>{rows}</table></details>")
    return "".join(parts)


STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1240px; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; width: 100%; margin: 1rem 0 }
td, th { padding: .3rem .6rem; border-bottom: 1px solid #ddd; text-align: left }
th button { font: inherit; font-weight: bold; background: none; border: 0; padding: 0; cursor: pointer; text-align: left }
th button::after { content: " ↕"; color: #bbb } th[aria-sort=ascending] button::after { content: " ↑"; color: #222 }
th[aria-sort=descending] button::after { content: " ↓"; color: #222 }
tbody tr:nth-child(even) { background: #f7f7f7 } small { color: #777; white-space: nowrap }
img { max-width: 100%; display: block; margin: .5rem 0 }
section { border-top: 1px solid #ddd; margin-top: 1.5rem } summary { cursor: pointer }
"""

# Sorts by a column's numbers where its cells have them, by their text else; again the other way round.
SCRIPT = """
for (const table of document.querySelectorAll("table.sortable"))
  table.querySelectorAll("th").forEach((th, column) => th.querySelector("button").addEventListener("click", () => {
    const down = th.getAttribute("aria-sort") === "ascending", body = table.tBodies[0];
    const value = ({ cells: { [column]: cell } }) => "value" in cell.dataset ? Number(cell.dataset.value) : cell.textContent;
    const compare = (a, b) => typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b));
    const rows = [...body.rows].sort((a, b) => compare(value(a), value(b)) * (down ? -1 : 1));
    table.querySelectorAll("th").forEach(other => other.removeAttribute("aria-sort"));
    th.setAttribute("aria-sort", down ? "descending" : "ascending");
    body.append(...rows);
  }));
"""


def write_report(output_path: str | Path) -> Path:
    """Write ``report.html`` below ``output_path``; returns its path.

    Raises:
        WorkError: there is nothing to report.
    """
    output_path = Path(output_path)
    results = evaluations(output_path)
    head = "".join(f'<th scope="col"><button type="button">{name}</button></th>' for name in HEADINGS)
    rows = "".join(table_row(r) for r in results)
    left_out = f"<p>The first {PLOT_ROWS} of {len(results)} classes.</p>" if len(results) > PLOT_ROWS else ""
    fooled = [r for r in results if "fools the guide" in r["verdict"]]
    warning = (
        f"<p><strong>Tokens that fool the guide:</strong> {', '.join(text(title_of(r)) for r in fooled)}</p>"
        if fooled
        else ""
    )
    page = f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>Discriminative class tokens</title><link rel="icon" href="data:,">
<style>{STYLE}</style></head><body>
<h1>Discriminative class tokens</h1>
<p>{len(results)} evaluations; each on seeds that neither training nor validation used, the same with and without the token.</p>{warning}
<table class="sortable"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>
<h2>Accuracy</h2>{left_out}{plot(results)}
<h2>What the prompt drew without the token</h2>{confusion(results)}
<h2>Pictures</h2>
<p>The same seeds above without and below with the token; green frames are right by the guides, and the label is what the first one saw.</p>
{gallery(results)}
<h2>Settings</h2>{settings(results)}
<script>{SCRIPT}</script></body></html>
"""
    path = output_path / "report.html"
    write_text(path, page)
    return path
