"""The tables and the figure of ``accuracy.py``, from its rows."""

import math
from collections.abc import Callable
from pathlib import Path
from statistics import fmean

from experiments.claims.accuracy_methods import IMAGES
from experiments.paired import interval_of_few, told
from experiments.sheets import sheet_of

WHO = ("guide", "judge", "judge2")
KINDS = ("rare", "common")
ENOUGH = 5  # right images of which diversity is told
HEAD = (
    "method",
    "classes × seeds",
    "guide",
    "judge",
    "third classifier",
    "diversity",
    "background followed",
    "... and right",
    "calls once",
    "seconds once",
    "calls an image",
    "seconds an image",
    f"calls for {IMAGES} images",
    "bytes kept",
)


def share(row: dict, who: str) -> float:
    """Share of a row's images that a classifier gives to the class."""
    return row[who] / row["images"]


def of_complete_classes(rows: list[dict]) -> list[dict]:
    """The rows of classes that every method has that has any."""
    of: dict[str, set[int]] = {}
    for row in rows:
        of.setdefault(row["method"], set()).add(row["class_index"])
    complete = set.intersection(*of.values()) if of else set()
    return [row for row in rows if row["class_index"] in complete]


def by_class(rows: list[dict], value: Callable[[dict], float | None]) -> dict[int, float]:
    """A figure of each class, the mean over its training seeds; classes without one are left out."""
    found: dict[int, list[float]] = {}
    for row in rows:
        figure = value(row)
        if figure is not None:
            found.setdefault(row["class_index"], []).append(figure)
    return {c: fmean(values) for c, values in sorted(found.items())}


def average(rows: list[dict], value: Callable[[dict], float | None], form: str) -> str:
    """Mean of a figure over the classes."""
    values = by_class(rows, value).values()
    return f"{fmean(values):{form}}" if values else "–"


def ratio_of(rows: list[dict]) -> Callable[[dict], float | None]:
    """Diversity of a row over that of its class's precise phrase; None where either has too few right images
    to tell."""
    phrases = {r["class_index"]: r for r in rows if r["method"] == "precise phrase"}

    def ratio(row: dict) -> float | None:
        phrase = phrases.get(row["class_index"])
        enough = phrase and min(row["guide"], phrase["guide"]) >= ENOUGH
        return row["diversity"] / phrase["diversity"] if enough and phrase["diversity"] else None

    return ratio


def seconds_of(rows: list[dict]) -> Callable[[dict], float | None]:
    """Seconds of an image of a row. Of the best of several: so many times a plain one's, as most come from
    the folder of kept ones."""
    plain = {r["class_index"]: r["each"]["seconds"] for r in rows if r["method"] == "plain prompt"}

    def seconds(row: dict) -> float | None:
        own = row["each"]["seconds"]
        one = plain.get(row["class_index"])
        return own if own is not None or one is None else row["said"]["k"] * one

    return seconds


def number_of(rows: list[dict]) -> str:
    """Of how many classes rows are, and of how many training seeds."""
    classes = len({r["class_index"] for r in rows})
    return f"{classes} × {len(rows) / classes:.2g}"


def cells(name: str, rows: list[dict], all_rows: list[dict]) -> list[str]:
    """A line of the table: a method's rows, of the classes that count."""
    return [
        name,
        number_of(rows),
        *(average(rows, lambda r, who=who: share(r, who), ".2f") for who in WHO),
        average(rows, ratio_of(all_rows), ".2f"),
        average(rows, lambda r: r["on_background"], ".2f"),
        average(rows, lambda r: r["right_on_background"], ".2f"),
        average(rows, lambda r: r["once"]["calls"], ",.0f"),
        average(rows, lambda r: r["once"]["seconds"], ".0f"),
        average(rows, lambda r: r["each"]["calls"], ",.0f"),
        average(rows, seconds_of(all_rows), ".2f"),
        average(rows, lambda r: r["once"]["calls"] + IMAGES * r["each"]["calls"], ",.0f"),
        average(rows, lambda r: r["bytes"], ",.0f"),
    ]


def differences(rows: list[dict], others: list[dict], value: Callable[[dict], float | None]) -> list[float]:
    """By how much a method's figure is above another's, class by class, over the training seeds that both
    have; a method without seeds counts for all. Pairs of which one has no figure are left out."""
    gains: dict[int, list[float]] = {}
    for row in rows:
        same = [o for o in others if o["class_index"] == row["class_index"] and o["seed"] in (row["seed"], 0)]
        both = [value(row), value(same[0])] if same else [None]
        if None not in both:
            gains.setdefault(row["class_index"], []).append(both[0] - both[1])
    return [fmean(of_class) for of_class in gains.values()]


def print_table(head: tuple[str, ...], lines: list[list[str]]) -> None:
    """A table in Markdown."""
    print("| " + " | ".join(head) + " |\n|" + "-|" * len(head))
    for line in lines:
        print("| " + " | ".join(line) + " |")


def of_trainings(rows: list[dict], ours: str, least: float, below: float) -> list[dict]:
    """The rows of classes and training seeds whose token took from ``least`` to fewer than ``below`` calls to
    learn; of methods without seeds those of these classes."""
    tokens = [r for r in rows if r["method"] == ours and least <= r["once"]["calls"] < below]
    seeded = {(r["class_index"], r["seed"]) for r in tokens}
    unseeded = {(r["class_index"], 0) for r in tokens}
    return [r for r in rows if (r["class_index"], r["seed"]) in seeded | unseeded]


def show(rows: list[dict], names: list[str], ours: str, chosen_on: set[int], long_from: int) -> None:
    """Print, for groups of the classes, the means of each method, and how far one method is above the others.

    Args:
        chosen_on: rare senses, from 1, of which a result made somebody choose something.
        long_from: calls from which learning is long.
    """
    rare = [r for r in rows if r["kind"] == "rare"]
    groups = {"rare senses": rare}
    groups["rare senses that nothing was chosen on"] = [r for r in rare if r["class_index"] not in chosen_on]
    long = of_trainings(rare, ours, long_from, math.inf)
    short = of_trainings(rare, ours, 0, long_from)
    groups[f"rare senses, learning took {long_from:,} calls or more"] = long
    groups[f"rare senses, learning took fewer than {long_from:,} calls"] = short
    groups["common senses"] = [r for r in rows if r["kind"] == "common"]
    groups["all senses"] = rows
    for group, of_group in groups.items():
        of = {name: [r for r in of_group if r["method"] == name] for name in names}
        if not of[ours]:
            continue
        print(f"\nMean over {group} ({len({r['class_index'] for r in of[ours]})} classes):\n")
        print_table(HEAD, [cells(name, of[name], of_group) for name in names if of[name]])
        print(f"\nThe {ours} minus each method over {group}, 95 % intervals over the classes:\n")
        show_differences(of, ours, ratio_of(of_group))


def told_of_classes(gains: list[float]) -> str:
    """The mean of the classes' differences with its interval, and their number; a dash of none."""
    return f"{told(gains, '{:+.2f}'.format, interval_of_few)} ({len(gains)})" if gains else "–"


def show_differences(of: dict[str, list[dict]], ours: str, ratio: Callable[[dict], float | None]) -> None:
    """Print how far one method is above the others.

    Args:
        of: rows by the method.
        ratio: a row's diversity.
    """
    figures = {
        "judge": lambda r: share(r, "judge"),
        "third classifier": lambda r: share(r, "judge2"),
        "diversity": ratio,
        "background followed": lambda r: r["on_background"],
        "... and right": lambda r: r["right_on_background"],
    }
    lines = []
    for name, theirs in of.items():
        gains = [differences(of[ours], theirs, value) for value in figures.values()]
        if name != ours and any(gains):
            lines.append([name, *(told_of_classes(g) for g in gains)])
    print_table(("method", *(f"{name} (classes)" for name in figures)), lines)


def show_tuning(title: str, rows: dict[str, list[dict]]) -> None:
    """Print what each candidate came to on the tuning classes.

    Args:
        title: of the table.
        rows: by method.
    """
    lines = []
    for name, of_method in rows.items():
        for changes in dict.fromkeys(str(r["changes"]) for r in of_method):
            of_candidate = [r for r in of_method if str(r["changes"]) == changes]
            shares = [average(of_candidate, lambda r, who=who: share(r, who), ".2f") for who in WHO[:2]]
            lines.append([name, changes.strip("{}"), *shares, str(len(of_candidate))])
    if lines:
        print(f"\n{title}:\n")
        print_table(("method", "settings", "guide", "judge", "units"), lines)


def show_checks(rows: list[dict], least: float) -> bool:
    """Print whether each method learned the class that it must be able to learn; whether all did."""
    passed = [share(row, "judge") >= least for row in rows]
    lines = [
        [r["method"], r["name"], *(f"{share(r, who):.2f}" for who in WHO), "yes" if ok else "no"]
        for r, ok in zip(rows, passed, strict=True)
    ]
    print()
    print_table(("method", "class", "guide", "judge", "third classifier", f"judge at least {least}"), lines)
    return all(passed)


def figure(rows: list[dict], names: list[str], ours: str, path: Path) -> None:
    """Draw each method's share by the judge on the rare senses, class by class with the mean and its
    interval, and what it costs once and for an image."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rare = [r for r in rows if r["kind"] == "rare"]
    there = [name for name in names if any(r["method"] == name for r in rare)][::-1]
    plot, axes = plt.subplots(1, 2, figsize=(9, 0.36 * len(there) + 1.3), sharey=True)
    for y, name in enumerate(there):
        mine = [r for r in rare if r["method"] == name]
        draw_shares(axes[0], y, list(by_class(mine, lambda r: share(r, "judge")).values()), name == ours)
        calls = [fmean(r[part]["calls"] for r in mine) for part in ("once", "each")]
        for x, mark, label in zip(calls, "s|", ("once", "an image"), strict=True):
            axes[1].scatter(x or None, y, marker=mark, s=40, color="#c77d00", label=label if not y else "")
    axes[0].set(title="rare senses, by the judge", xlabel="share of images", xlim=(-0.03, 1.03))
    axes[1].set(title="cost", xlabel="calls of the UNet", xscale="log")
    axes[0].set_yticks(range(len(there)), there, fontsize=8)
    axes[1].legend(fontsize=8, frameon=False)
    plot.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    plot.savefig(path, dpi=110)
    plt.close(plot)


def draw_shares(axis, y: int, shares: list[float], is_ours: bool) -> None:
    """One line of the figure: classes, their mean and its interval."""
    colour = "#1f5fa8" if is_ours else "#8a8a8a"
    axis.scatter(shares, [y] * len(shares), s=14, alpha=0.35, color=colour, linewidths=0)
    low, high = interval_of_few(shares) or (fmean(shares),) * 2
    axis.plot([low, high], [y, y], color=colour, linewidth=2)
    axis.scatter(fmean(shares), y, s=36, color=colour, zorder=3)


SHEET_CLASSES = 4
LEFT = 180  # pixels for the method's name


def sheet(strips: list[tuple[dict, Path]], names: list[str], path: Path) -> None:
    """Write a sheet of each method's first images, of a few rare senses; none where some are not here.

    Args:
        strips: rows, and the picture of each one's first images.
    """
    rare = [(row, strip) for row, strip in strips if row["kind"] == "rare"]
    classes = sorted({row["class_index"] for row, _ in rare})[::4][:SHEET_CLASSES]
    first = {}
    for row, strip in rare:
        first.setdefault((row["method"], row["class_index"]), strip)
    there = [name for name in names if any((name, c) in first for c in classes)]
    if not there:
        return
    shown = [(name, [first.get((name, c)) for c in classes]) for name in there]
    lost = [strip for _, strips in shown for strip in strips if strip and not strip.exists()]
    if lost:
        print(f"\nno pictures: {lost[0]} and {len(lost) - 1} more are missing, which their units made")
        return
    of_class = {row["class_index"]: row["name"] for row, _ in rare}
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet_of(shown, tuple(of_class[c] for c in classes), LEFT).save(path, quality=88)
