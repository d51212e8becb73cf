"""The tables and the figure of ``classes.py``, from its rows; ``classes.py`` adds the sheets of pictures.

    python -m experiments.tables experiments/results/classes_seeds35_36_37.jsonl --figure results/classes.png
    python -m experiments.tables experiments/results/classes_8steps_part.jsonl \\
        --against experiments/results/classes_12steps_seeds35_36.jsonl
    python -m experiments.tables --summary experiments/results/sweep_seed37 --classes 1 32

The last is of a run over many classes, by its summary.csv.
"""

import argparse
import math
from itertools import chain
from pathlib import Path
from statistics import mean, median

from PIL import Image
from scipy.stats import binomtest, fisher_exact

from discriminative.command_line import existing_file
from discriminative.errors import UsageError, WorkError
from discriminative.records.files import write_image, write_lines
from discriminative.records.summary import read as read_summary
from experiments.paired import difference, pairs, ratio
from experiments.rows import read
from experiments.sheets import sheet_of

WHO = ("guide", "judge")
CHANCE = 0.025  # p-value, to either side
GOOD = {"guide": 0.90, "judge": 0.85}  # the least share of right images of a token that passes


def rows_of(text: str) -> list[dict]:
    """The rows of a file that the command line names.

    Raises:
        argparse.ArgumentTypeError: there is none, or it holds anything else.
    """
    try:
        rows = read(existing_file(text))
    except (WorkError, ValueError):  # ValueError: bytes that are no text
        rows = []
    if not rows or not all(isinstance(row, dict) and "token" in row for row in rows):
        raise argparse.ArgumentTypeError(f"{text!r} was given; allowed are rows that classes.py wrote")
    return rows


def interval(right: int, of: int) -> str:
    """Wilson's interval of 95 % for a share."""
    low, high = binomtest(right, of).proportion_ci(method="wilson")
    return f"{low:.2f}–{high:.2f}"


def share(row: dict, who: str) -> float:
    """Share of right images with the token."""
    return row["token"][who] / row["token"]["images"]


def passes(row: dict) -> bool:
    """Whether guide and judge call enough of a token's images right."""
    return all(share(row, who) >= GOOD[who] for who in WHO)


def accuracy(rows: list[dict], who: str) -> str:
    """Share of right images of a class's tokens, its interval, and the worst token's share where there
    are several.

    The interval is of drawing other images with these tokens; what another training brings shows in the
    worst of them.
    """
    right = sum(r["token"][who] for r in rows)
    of = sum(r["token"]["images"] for r in rows)
    worst = f", worst {min(share(r, who) for r in rows):.2f}" if len(rows) > 1 else ""
    return f"{right / of:.2f} ({interval(right, of)}{worst})"


def diversity(row: dict) -> float | None:
    """Spread of the right images over that of the precise phrase's; None where either has too few to tell."""
    enough = min(row["token"]["guide"], row["without"]["phrase"]["guide"]) >= 10
    return row["token"]["diversity"] / row["without"]["phrase"]["diversity"] if enough else None


def varied(rows: list[dict]) -> float:
    """Mean diversity of a class's tokens; infinite where none has enough images to tell."""
    return mean([d for d in map(diversity, rows) if d is not None] or [math.inf])


def background_lost(rows: list[dict]) -> float:
    """How much seldomer the images of a class's tokens stand on the background asked for than those
    without."""
    return rows[0]["without"]["on_background"] - mean(r["token"]["on_background"] for r in rows)


def average(values: list[float | None], places: int = 2) -> str:
    """Mean of what is known."""
    known = [v for v in values if v is not None]
    return f"{mean(known):.{places}f}" if known else "–"


HEAD = (
    *(
        "class",
        "to draw",
        "word",
        "plain, guide",
        "phrase, guide",
        "guide",
        "judge",
        "updates",
        "images",
        "seconds",
        "norm",
    ),
    *("on background, without", "with", "other templates", "diversity"),
)


def cells(rows: list[dict]) -> list[str]:
    """One line of the table: a class, over its training seeds."""
    first = rows[0]
    trained = [r["training"] for r in rows]
    found = [r["token"] for r in rows]
    plain, phrase = (x["guide"] / x["images"] for x in (first["without"], first["without"]["phrase"]))
    return [
        *(str(first["class_index"]), first["name"], first["word"], f"{plain:.2f}", f"{phrase:.2f}"),
        *(accuracy(rows, who) for who in WHO),
        *(average([t[key] for t in trained], 0) for key in ("updates", "images", "seconds")),
        *(average([f["token_norm"] for f in found], 1), f"{first['without']['on_background']:.2f}"),
        *(average([f[key] for f in found]) for key in ("on_background", "other_templates")),
        average([diversity(r) for r in rows]),
    ]


def by_class(rows: list[dict]) -> list[list[dict]]:
    """The rows of each class, in order."""
    return [[r for r in rows if r["class_index"] == c] for c in sorted({r["class_index"] for r in rows})]


def summary(rows: list[dict]) -> str:
    """The figures that have targets, over all classes and by sense."""
    lines = ["| what | all | rare sense | common sense |", "|-|-|-|-|"]
    groups = [rows, *([r for r in rows if r["kind"] == kind] for kind in ("rare", "common"))]

    def line(what: str, figure) -> None:
        cells = [figure(group) if group else "–" for group in groups]
        lines.append(f"| {what} | {' | '.join(cells)} |")

    def of_images(found: list[dict]) -> str:
        return " / ".join(average([r[who] / r["images"] for r in found]) for who in WHO)

    def passing(group: list[dict], every) -> str:
        classes = by_class(group)
        return f"{sum(every(passes(r) for r in c) for c in classes)} of {len(classes)}"

    line(
        "classes with guide at least .90 and judge at least .85, every training seed",
        lambda g: passing(g, all),
    )
    line("... at least one training seed", lambda g: passing(g, any))
    line("mean guide / judge", lambda g: " / ".join(f"{mean(share(r, who) for r in g):.2f}" for who in WHO))
    line(
        "median guide / judge", lambda g: " / ".join(f"{median(share(r, who) for r in g):.2f}" for who in WHO)
    )
    line("plain prompt, mean guide / judge", lambda g: of_images([r["without"] for r in g]))
    line("precise phrase, mean guide / judge", lambda g: of_images([r["without"]["phrase"] for r in g]))
    line(
        "largest gap guide minus judge",
        lambda g: f"{max(share(r, 'guide') - share(r, 'judge') for r in g):.2f}",
    )
    line(
        "on the background asked for, without / with",
        lambda g: " / ".join(average([r[k]["on_background"] for r in g]) for k in ("without", "token")),
    )
    line("... largest loss of a class", lambda g: f"{max(background_lost(c) for c in by_class(g)):.2f}")
    line("other templates, mean guide", lambda g: average([r["token"]["other_templates"] for r in g]))
    line("diversity over the precise phrase's, mean", lambda g: average([diversity(r) for r in g]))
    line("... least of a class", lambda g: f"{min(varied(c) for c in by_class(g)):.2f}")
    line(
        "seconds of training, median of tokens / of the classes' means",
        lambda g: " / ".join(
            f"{median(mean(r['training']['seconds'] for r in part) for part in parts):.0f}"
            for parts in ([[r] for r in g], by_class(g))
        ),
    )
    line(
        "updates / images, median",
        lambda g: " / ".join(f"{median(r['training'][k] for r in g):.0f}" for k in ("updates", "images")),
    )
    return "\n".join(lines)


def comparison(rows: list[dict], others: list[dict]) -> str:
    """The tokens of two sets of rows that have class and training seed in common, and their paired
    differences."""
    both = pairs(rows, others)
    if not both:
        return "no class and seed in common"
    sides = list(zip(*both, strict=True))
    lines = ["| what | first | second | difference or ratio, paired |", "|-|-|-|-|"]

    def line(what: str, figure, told: str = "") -> None:
        lines.append(f"| {what} | " + " | ".join(figure(side) for side in sides) + f" | {told} |")

    line(f"tokens that pass, of {len(both)}", lambda g: str(sum(map(passes, g))))
    for who in WHO:
        line(
            f"mean accuracy, {who}",
            lambda g, who=who: average([share(r, who) for r in g]),
            difference(both, lambda r, who=who: share(r, who)),
        )
    line(
        "on the background asked for",
        lambda g: average([r["token"]["on_background"] for r in g]),
        difference(both, lambda r: r["token"]["on_background"]),
    )
    line(
        "diversity over the precise phrase's, mean",
        lambda g: average([diversity(r) for r in g]),
        ratio(both, diversity),
    )
    for key in ("updates", "images", "seconds"):
        line(
            f"{key}, median / mean",
            lambda g, key=key: " / ".join(
                f"{of(r['training'][key] for r in g):.0f}" for of in (median, mean)
            ),
            ratio(both, lambda r, key=key: r["training"][key]),
        )
    same = [pair for pair in both if pair[0]["training"]["updates"] == pair[1]["training"]["updates"]]
    seconds = ratio(same, lambda r: r["training"]["seconds"])
    lines.append(f"| seconds, where both took as many updates ({len(same)} tokens) | | | {seconds} |")
    differing = [pair for pair in both if outcome(pair[0]) != outcome(pair[1])]
    listed = [f"{a['name']} {a['seed']} ({told(a)}; {told(b)})" for a, b in differing]
    lines.append(f"\nother updates or verdicts ({len(differing)} tokens): {', '.join(listed) or 'none'}")
    groups = list(zip(*map(by_class, sides), strict=True))
    better = [group for group in groups if is_beyond_chance(*group)]
    worse = [group for group in groups if is_beyond_chance(*reversed(group))]
    for what, found in (("better", better), ("worse", worse)):
        named = [f"{a[0]['name']} ({accuracy(a, 'guide')}; {accuracy(b, 'guide')})" for a, b in found]
        lines.append(f"\n{what} by the guide (Fisher's test, p < {CHANCE}): {', '.join(named) or 'none'}")
    return "\n".join(lines)


def outcome(row: dict) -> tuple[int, float, float]:
    """What a token took and came to: updates, and shares of right images by guide and judge."""
    return row["training"]["updates"], share(row, "guide"), share(row, "judge")


def told(row: dict) -> str:
    """The same in words."""
    updates, guide, judge = outcome(row)
    return f"{updates} updates, {guide:.2f} / {judge:.2f}"


def is_beyond_chance(rows: list[dict], others: list[dict]) -> bool:
    """Whether other images of the same tokens would hardly show so many more right ones in the first rows."""
    right = [sum(row["token"]["guide"] for row in side) for side in (rows, others)]
    of = [sum(row["token"]["images"] for row in side) for side in (rows, others)]
    wrong = [n - r for n, r in zip(of, right, strict=True)]
    return bool(fisher_exact([right, wrong], alternative="greater").pvalue < CHANCE)


def summary_table(rows: list[dict[str, str]]) -> str:
    """What ``summary.csv`` tells of a run over many classes, each figure or "–", and in the last lines
    what all of them come to."""

    def cell(row: dict[str, str], key: str, form: str = ".2f") -> str:
        return f"{float(row[key]):{form}}" if row[key] else "–"

    def change(row: dict[str, str], who: str) -> str:
        without, reached, low, high = (
            cell(row, f"{who}_{what}") for what in ("without", "with", "low", "high")
        )
        return f"{without} → {reached} ({low}–{high})" if row[f"{who}_with"] else "–"

    def known(key: str) -> list[float]:
        return [float(r[key]) for r in rows if r[key]]

    lines = [
        "| class | label | " + " | ".join(WHO) + " | p | diversity | updates | seconds |",
        "|-|-|" + "-|" * 6,
    ]
    for r in rows:
        rest = [
            ("p_value", ".0e"),
            ("diversity_ratio", ".2f"),
            ("updates", ".0f"),
            ("training_seconds", ".0f"),
        ]
        told = [
            r["class_index"],
            r["class_name"],
            *(change(r, who) for who in WHO),
            *(cell(r, *one) for one in rest),
        ]
        lines.append("| " + " | ".join(told) + " |")
    good = sum(all(float(r[f"{who}_with"] or 0) >= GOOD[who] for who in WHO) for r in rows)
    gaps = [float(r["guide_with"]) - float(r["judge_with"]) for r in rows if r["judge_with"]]
    for what, of in ((f"{good} of {len(rows)} pass; means", mean), ("medians", median)):
        told = [
            " → ".join(f"{of(known(f'{who}_{arm}') or [math.nan]):.2f}" for arm in ("without", "with"))
            for who in WHO
        ]
        told += ["", "", *(f"{of(known(key) or [math.nan]):.0f}" for key in ("updates", "training_seconds"))]
        lines.append(f"| | {what} | " + " | ".join(told) + " |")
    return "\n".join(lines) + f"\n\nlargest gap guide minus judge: {max(gaps, default=math.nan):.2f}"


def figure(rows: list[dict], path: Path) -> None:
    """Accuracy without and with the token, class by class, by guide and judge; several seeds as several
    marks."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    # The classes that a plain prompt draws least come first.
    groups = sorted(
        by_class(rows), key=lambda group: group[0]["without"]["guide"] / group[0]["without"]["images"]
    )
    plot, axes = plt.subplots(1, 2, figsize=(9, 0.24 * len(groups) + 1.2), sharey=True)
    for axis, who in zip(axes, WHO, strict=True):
        for y, group in enumerate(groups):
            without = group[0]["without"]
            axis.plot(
                [without[who] / without["images"], mean(share(r, who) for r in group)],
                [y, y],
                color="#cccccc",
                zorder=1,
            )
            axis.scatter(
                without[who] / without["images"],
                y,
                color="#8a8a8a",
                s=22,
                zorder=2,
                label="" if y else "plain prompt",
            )
            phrase = without["phrase"]
            axis.scatter(
                phrase[who] / phrase["images"],
                y,
                color="#c77d00",
                marker="|",
                s=50,
                zorder=2,
                label="" if y else "precise phrase",
            )
            shares = [share(r, who) for r in group]
            axis.scatter(
                shares,
                [y] * len(shares),
                color="#1f5fa8",
                s=22,
                alpha=0.7,
                zorder=3,
                label="" if y else "with the token",
            )
        axis.axvline(GOOD[who], color="#bbbbbb", linestyle=":", zorder=0)
        axis.set(title=f"by the {who}", xlabel="share of 100 images", xlim=(-0.03, 1.03))
    axes[0].set_yticks(range(len(groups)), [f"{g[0]['name']} ({g[0]['word']})" for g in groups], fontsize=8)
    plot.legend(*axes[0].get_legend_handles_labels(), fontsize=8, loc="upper center", ncols=3, frameon=False)
    plot.tight_layout(rect=(0, 0, 1, 0.96))
    plot.savefig(path, dpi=110)
    plt.close(plot)


def sheet(rows: list[dict], strips: list[tuple[Path, Path]]) -> Image.Image:
    """For each class the same seeds without (left) and with the token (right)."""
    names = [f"{row['class_index']} {row['name']}\n({row['word']})" for row in rows]
    return sheet_of([(name, list(pair)) for name, pair in zip(names, strips, strict=True)])


def show(rows: list[dict]) -> None:
    """Print summary and table."""
    print(summary(rows) + "\n\n| " + " | ".join(HEAD) + " |\n|" + "-|" * len(HEAD))
    for group in by_class(rows):
        print("| " + " | ".join(cells(group)) + " |")


def write_all(rows: list[dict], strips: list[tuple[Path, Path]], output_path: Path, exp_id: str) -> None:
    """Print the tables; write rows, figure and a sheet for each sense (of the first seed) to ``output_path``.

    Args:
        strips: for each row the first images without and with the token.
    """
    show(rows)
    write_lines(output_path / f"{exp_id}.jsonl", rows)
    figure(rows, output_path / f"{exp_id}.png")
    for kind in ("rare", "common"):
        shown = [i for i, r in enumerate(rows) if r["kind"] == kind and r["seed"] == rows[0]["seed"]]
        if shown:
            write_image(
                output_path / f"{exp_id}_{kind}.png",
                sheet([rows[i] for i in shown], [strips[i] for i in shown]),
            )
    print(f"\nrows, figure and sheets: {output_path}/{exp_id}*")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", type=rows_of, nargs="*", help="files that classes.py wrote")
    parser.add_argument(
        "--summary", metavar="FOLDER", help="instead, print the table of this folder's summary.csv"
    )
    parser.add_argument(
        "--classes", nargs=2, type=int, metavar=("FIRST", "LAST"), help="of that, these alone"
    )
    parser.add_argument("--figure", type=Path, help="also draw the figure, to this file")
    parser.add_argument(
        "--against",
        type=rows_of,
        nargs="+",
        help="compare the tokens with those of the same classes and seeds in other such files",
    )
    args = parser.parse_args()
    if args.summary:
        first, last = args.classes or (1, math.inf)
        try:
            found = [r for r in read_summary(args.summary) if first <= int(r["class_index"]) <= last]
        except UsageError as error:
            parser.error(str(error))
        if not found:
            parser.error(
                f"--summary: {args.summary!r} was given, which holds no summary.csv with such classes"
            )
        print(summary_table(found))
        return
    if not args.rows:
        parser.error("no file of rows given, and no --summary")
    rows = list(chain(*args.rows))
    if args.against:
        print(comparison(rows, list(chain(*args.against))))
        return
    show(rows)
    if args.figure:
        args.figure.parent.mkdir(parents=True, exist_ok=True)
        figure(rows, args.figure)


if __name__ == "__main__":
    main()
