"""One self-contained page of all classes that were evaluated below a folder: ``results/report.html``. It
needs no network.

The table sorts, the figures have intervals, and every picture is in the file.
"""

import base64
import html
import io
from collections import defaultdict
from pathlib import Path

from PIL import Image

from discriminative import VERSION
from discriminative.records.environment import timestamp
from discriminative.records.evaluation import EvaluationRecord, Share, read_all
from discriminative.records.files import write_text
from discriminative.records.insight import Attribute

PLOT_ROWS = 120  # classes in the plot at most; the table has all
PICTURE_WIDTH = 1200  # pixels
CONFUSED = 3  # labels of the plain prompt that are told


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


def plot(results: list[EvaluationRecord]) -> str:
    """Accuracy with its interval for each class, by guide and judge, and the baseline's, as a picture in
    the page."""
    from matplotlib.figure import Figure

    shown = results[:PLOT_ROWS]
    figure = Figure(figsize=(12, 1.6 + 0.3 * len(shown)), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    for who, offset, colour in (("guide", -0.12, "#3465a4"), ("judge", 0.12, "#2a9d4a")):
        found = {i: r.first.share("token", who) for i, r in enumerate(shown)}
        points = {i + offset: share for i, share in found.items() if share}
        if points:
            centres = [share.accuracy for share in points.values()]
            low = [max(0.0, share.accuracy - share.low) for share in points.values()]
            high = [max(0.0, share.high - share.accuracy) for share in points.values()]
            label = f"with the token, {who}"
            axes.errorbar(
                centres, list(points), xerr=[low, high], fmt="o", color=colour, capsize=3, label=label
            )
    before = [r.first.share("baseline", "guide").accuracy for r in shown]
    axes.plot(before, range(len(shown)), "x", color="#c8372d", label="without, guide")
    axes.set_yticks(range(len(shown)), [title_of(r)[:40] for r in shown], parse_math=False)
    axes.set_ylim(len(shown) - 0.5, -0.5)
    axes.set_xlim(-0.02, 1.02)
    axes.set_xlabel("share of images that are right, with intervals of 95 %")
    axes.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside upper center", ncols=3)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="accuracy class by class" src="data:image/png;base64,{data}">'


def title_of(result: EvaluationRecord) -> str:
    """ "283 tiger cat (default)"."""
    exp_id = result.folder.exp_id
    return f"{result.class_index} {result.class_name}" + ("" if exp_id == "default" else f" ({exp_id})")


def share_cell(share: Share | None) -> str:
    """A cell with a share and its interval, which sorts by its number."""
    if share is None:
        return "<td></td>"
    interval = f" <small>{share.low:.2f}–{share.high:.2f}</small>"
    return f'<td data-value="{share.accuracy}">{share.accuracy:.2f}{interval}</td>'


def number_cell(value: float | None, form: str) -> str:
    """A cell with a number, which it sorts by."""
    return "<td></td>" if value is None else f'<td data-value="{value}">{value:{form}}</td>'


HEADINGS = ("class", "experiment", "guide, without", "guide, with", "judge, without", "judge, with")
HEADINGS += ("p", "diversity", "updates", "seconds")


def table_row(result: EvaluationRecord) -> str:
    """One class in the table."""
    first = result.first
    link = f'<a href="#{anchor(result)}">{result.class_index} {text(result.class_name)}</a>'
    cells = [f'<td data-value="{result.class_index}">{link}</td>', f"<td>{text(result.folder.exp_id)}</td>"]
    cells += [
        share_cell(first.share(arm, who)) for who in ("guide", "judge") for arm in ("baseline", "token")
    ]
    cells += [number_cell(first.p_value, ".1g"), number_cell(first.diversity_ratio, ".2f")]
    training = result.training.get("training", {})
    cells += [number_cell(training.get(key), ".0f") for key in ("updates", "seconds")]
    return f"<tr>{''.join(cells)}</tr>"


def anchor(result: EvaluationRecord) -> str:
    """The class's place in the page."""
    return text(f"{result.folder.name}-{result.folder.exp_id}")


def text(value: object) -> str:
    """Escaped for the page."""
    return html.escape(str(value), quote=True)


def confusion(results: list[EvaluationRecord]) -> str:
    """What the prompt without the token drew instead."""
    rows = []
    for r in results:
        seen = r.first.predicted("baseline")[:CONFUSED]
        drawn = ", ".join(f"{text(label)} {part:.2f}" for label, part in seen)
        prompt = text(r.first.prompt("baseline"))
        rows.append(f"<tr><td>{text(title_of(r))}</td><td>{prompt}</td><td>{drawn}</td></tr>")
    head = (
        "<tr><th>class</th><th>prompt without the token</th><th>what the guide saw, share of images</th></tr>"
    )
    return f"<table><thead>{head}</thead><tbody>{''.join(rows)}</tbody></table>"


def origin(result: EvaluationRecord) -> str:
    """When an evaluation was made, on which seeds, where, and with what."""
    where = result.environment
    trained = result.training.get("config", {}).get("seed")
    told = [f"evaluated {where['date']}"] if where else []
    told += [f"seeds {result.seeds[0]} to {result.seeds[-1]}"] if result.seeds else []
    told += [f"training seed {trained}"] if trained is not None else []
    told += [f"{name} {number}" for name, number in where.get("versions", {}).items() if number]
    told += [f"commit {where['commit']}"] if where.get("commit") else []
    told += [where["device"]] if where else []
    return f'<p class="origin">{text(", ".join(told))}</p>' if told else ""


def gallery(results: list[EvaluationRecord]) -> str:
    """Each class's verdict, origin, pictures, the other prompts, and the attributes that the token adds."""
    parts = []
    for r in results:
        others = ""
        for prompt in r.prompts[1:]:
            before = prompt.share("baseline", "guide").accuracy
            after = prompt.share("token", "guide").accuracy
            others += f"<li>{text(prompt.template)}: guide {before:.2f} → {after:.2f}</li>"
        others = f"<ul>{others}</ul>" if others else ""
        pictures = image_tag(r.folder.grid, f"{r.class_name} without and with the token")
        evolution = image_tag(r.folder.evolution, f"{r.class_name} over the updates")
        more = f"<details><summary>how it was learned</summary>{evolution}</details>" if evolution else ""
        head = f"<h3>{text(title_of(r))}</h3><p>{text(r.verdict)}</p>{origin(r)}"
        parts.append(f'<section id="{anchor(r)}">{head}{others}{pictures}{insight(r)}{more}</section>')
    return "".join(parts)


def insight(result: EvaluationRecord) -> str:
    """Which attributes the token adds, the most added first, with pictures; nothing where nobody asked."""
    record = result.insight
    if not record:
        return ""
    rows = "".join(attribute_row(attribute) for attribute in record.attributes)
    head = "".join(f"<th>{name}</th>" for name in ("attribute", "without", "with", "difference", ""))
    pictures = "".join(
        image_tag(result.folder.eval_images / a.picture, f"{a.phrase}: the pairs that change most")
        for a in record.attributes
        if a.picture
    )
    note = f"{text(record.note)}; intervals: {text(record.content['intervals'])}."
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
    return f"<h4>What the token adds</h4><p>{note}</p>{table}{pictures}"


def attribute_row(attribute: Attribute) -> str:
    """One attribute: mean scores, their paired difference with its interval, and what that says."""
    interval = attribute.interval
    told = " <small>{:+.3g} to {:+.3g}</small>".format(*interval) if interval else ""
    verdict = "added" if attribute.is_added else "taken away" if attribute.is_removed else ""
    cells = [text(attribute.phrase), f"{attribute.without:.3g}", f"{attribute.with_token:.3g}"]
    cells += [f"{attribute.difference:+.3g}{told}", verdict]
    return f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def settings(results: list[EvaluationRecord]) -> str:
    """The options of every experiment, those that all its classes share."""
    by_experiment = defaultdict(list)
    for r in results:
        evaluated = {k: r.content[k] for k in ("model", "classifier", "judge", "test_size")}
        chosen = r.training.get("config", {}) | evaluated | r.content["settings"]
        by_experiment[r.folder.exp_id].append(chosen)
    parts = []
    for exp_id, all_chosen in by_experiment.items():
        shared = {k: v for k, v in all_chosen[0].items() if all(other.get(k) == v for other in all_chosen)}
        rows = "".join(f"<tr><td>{text(k)}</td><td>{text(v)}</td></tr>" for k, v in shared.items())
        parts.append(f"<details><summary>{text(exp_id)}</summary><table>{rows}</table></details>")
    return "".join(parts)


TERMS = """
<ul>
<li>Guide: the classifier that trained the token; its figure is the share of images that it gives to the
class.</li>
<li>Judge: a classifier that never trained the token, so no image was made to please it.</li>
<li>p: how likely so large a difference of the guide's verdicts would be by chance (McNemar's exact test on
pairs of images of the same seed).</li>
<li>Diversity: how much the images vary with the token, over how much they do without it, by the mean cosine
distance of the judge's features (the guide's where nothing judged).</li>
</ul>
"""

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222 }
body { max-width: 1240px; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; width: 100%; margin: 1rem 0 }
td, th { padding: .3rem .6rem; border-bottom: 1px solid #ddd; text-align: left }
th button { font: inherit; font-weight: bold; background: none; border: 0 }
th button { padding: 0; cursor: pointer; text-align: left }
th button::after { content: " ↕"; color: #bbb }
th[aria-sort=ascending] button::after { content: " ↑"; color: #222 }
th[aria-sort=descending] button::after { content: " ↓"; color: #222 }
tbody tr:nth-child(even) { background: #f7f7f7 } small { color: #777; white-space: nowrap }
.origin { color: #777; font-size: 13px }
img { max-width: 100%; display: block; margin: .5rem 0 }
section { border-top: 1px solid #ddd; margin-top: 1.5rem } summary { cursor: pointer }
"""

# Sorts by numbers, else by text; again reversed.
SCRIPT = """
for (const table of document.querySelectorAll("table.sortable"))
  table.querySelectorAll("th").forEach((th, column) =>
   th.querySelector("button").addEventListener("click", () => {
    const down = th.getAttribute("aria-sort") === "ascending", body = table.tBodies[0];
    const value = ({ cells: { [column]: cell } }) =>
      "value" in cell.dataset ? Number(cell.dataset.value) : cell.textContent;
    const areNumbers = (a, b) => typeof a === "number" && typeof b === "number";
    const compare = (a, b) => areNumbers(a, b) ? a - b : String(a).localeCompare(String(b));
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
    results = read_all(output_path)
    head = "".join(f'<th scope="col"><button type="button">{name}</button></th>' for name in HEADINGS)
    rows = "".join(table_row(r) for r in results)
    left_out = f"<p>The first {PLOT_ROWS} of {len(results)} classes.</p>" if len(results) > PLOT_ROWS else ""
    fooled = [r for r in results if r.first.fools_the_guide]
    warning = (
        f"<p><strong>Tokens that fool the guide:</strong> {', '.join(text(title_of(r)) for r in fooled)}</p>"
        if fooled
        else ""
    )
    page = f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>Discriminative class tokens</title>
<link rel="icon" href="data:,">
<style>{STYLE}</style></head><body>
<h1>Discriminative class tokens</h1>
<p>{len(results)} evaluations; each on seeds that neither training nor validation used,
the same with and without the token. Written {timestamp()} by version {VERSION}.</p>{warning}
{TERMS}
<table class="sortable"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>
<h2>Accuracy</h2>{left_out}{plot(results)}
<h2>What the prompt drew without the token</h2>{confusion(results)}
<h2>Pictures</h2>
<p>The same seeds above without and below with the token; green frames are right by the guides,
and the label is what the first one saw.</p>
{gallery(results)}
<h2>Settings</h2>{settings(results)}
<script>{SCRIPT}</script></body></html>
"""
    path = output_path / "report.html"
    write_text(path, page)
    return path
