"""The tables and the figure of ``insight.py``, from its rows."""

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import mean, median

import numpy as np

from experiments.claims.insight_world import PHRASES, Cue, auc
from experiments.paired import interval_of_few, told

CLEAR = 0.75  # rate from which on the cue is to be ranked first
TARGET_FIRST = 0.8
TARGET_SPEARMAN = 0.8
TARGET_ALARMS = 0.05


class Rows:
    """The rows of one group of cues, by their keys.

    Args:
        rows: of all groups, of one setting. cues: of this group.
    """

    def __init__(self, rows: list[dict], cues: tuple[Cue, ...]):
        self.of = {tuple(row["key"][:5]): row for row in rows}
        self.cues = cues
        self.rates = self.of[("detector",)]["rates"]

    def every(self, kind: str, cue: Cue | None = None) -> list[dict]:
        """All rows of a kind, of one cue or of all, each with its cue, rate and seed."""
        wanted = {(c.phrase, c.class_name): c for c in self.cues if cue in (None, c)}
        return [
            row | {"cue": wanted[key[1:3]]} | dict(zip(("rate", "seed"), key[3:5], strict=False))
            for key, row in self.of.items()
            if key[0] == kind and key[1:3] in wanted
        ]

    def share(self, row: dict, arm: str) -> float:
        """An arm's share of pictures with the cue, corrected by the detector's error rates."""
        true, false = self.rates[row["cue"].phrase]
        return (mean(map(int, row[arm])) - false) / (true - false)

    def change(self, row: dict) -> float:
        """What the token adds to the share."""
        return self.share(row, "token") - self.share(row, "plain")

    def clean(self, row: dict) -> dict | None:
        """The run of the clean guide of the same cue and seed."""
        cue = row["cue"]
        found = self.of.get(("run", cue.phrase, cue.class_name, 0.0, row["seed"]))
        return found and found | {"cue": cue}


def rank(row: dict) -> int:
    """The true cue's place among the attributes that the token adds, 1 the first."""
    return 1 + [phrase for phrase, *_ in row["attributes"]].index(row["cue"].phrase)


def rank_over_clean(rows: Rows, row: dict) -> int | None:
    """The true cue's place by how much more of it this token adds than those of clean guides, in the mean of
    the other seeds. So an attribute that any guide's token adds counts for nothing. None without such."""
    clean = [r for r in rows.every("run", row["cue"]) if not r["rate"] and r["seed"] != row["seed"]]
    if not clean:
        return None
    others = [{phrase: change for phrase, change, _ in other["attributes"]} for other in clean]
    more = {phrase: change - mean(o[phrase] for o in others) for phrase, change, _ in row["attributes"]}
    return 1 + sorted(more, key=more.get, reverse=True).index(row["cue"].phrase)


def is_clear(row: dict) -> bool:
    """Whether what stands first has an interval above 0: what a user takes for a finding."""
    _, _, interval = row["attributes"][0]
    return interval is not None and interval[0] > 0


def is_alarm(row: dict) -> bool:
    """Whether the cue stands first, with an interval above 0."""
    return rank(row) == 1 and is_clear(row)


def spearman(pairs: list[tuple[float, float]]) -> float:
    """Spearman's correlation; 0 where all of one side are the same."""
    from scipy.stats import spearmanr

    first, second = zip(*pairs, strict=True)
    return float(spearmanr(first, second).statistic) if len(set(first)) > 1 < len(set(second)) else 0.0


def signed(values: list[float]) -> str:
    """A mean difference with its interval."""
    return told(values, "{:+.2f}".format, interval_of_few) if values else ""


def over_cues(rows: list[dict], values: list[float]) -> str:
    """A mean difference with its interval over the cues, each the mean of its rows: guides of one cue are
    alike."""
    of = defaultdict(list)
    for row, value in zip(rows, values, strict=True):
        of[row["cue"]].append(value)
    return signed([mean(of_cue) for of_cue in of.values()])


def plain(values: list[float]) -> str:
    """A mean share."""
    return f"{mean(values):.2f}" if values else ""


def drawable(rows: Rows) -> list[str]:
    """Whether each cue can be drawn and seen."""
    lines = ["| cue | class | detector, TPR | FPR | asked for | plain prompt |", "|-|-|-|-|-|-|"]
    for cue in rows.cues:
        true, false = rows.rates[cue.phrase]
        cells = [cue.phrase, cue.class_name, f"{true:.3f}", f"{false:.3f}"]
        cells += [plain([rows.share(r, arm) for r in rows.every(arm, cue)]) for arm in ("asked", "plain")]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def by_rate(rows: Rows) -> list[str]:
    """The corrected shares of every arm; differences with intervals over the cues."""
    lines = [
        "| rate | guides | plain | clean guide's token | biased guide's | best of 4 | other class's token "
        "| biased - plain | biased - clean | other - its plain | cue first | over clean tokens |",
        "|-" * 12 + "|",
    ]
    for rate, some in grouped(rows.every("run"), "rate"):
        both = [(row, clean) for row in some if (clean := rows.clean(row))]
        others = [row for row in rows.every("other") if row["rate"] == rate]
        arms = [plain([rows.share(row, arm) for row in some]) for arm in ("plain", "token", "best_of")]
        arms.insert(1, plain([rows.share(clean, "token") for _, clean in both]))
        arms.append(plain([rows.share(row, "token") for row in others]))
        changes = [over_cues(some, [rows.change(row) for row in some])]
        differences = [rows.share(row, "token") - rows.share(clean, "token") for row, clean in both]
        changes.append(over_cues([row for row, _ in both], differences) if rate else "")
        changes.append(over_cues(others, [rows.change(row) for row in others]))
        over = [place for row in some if (place := rank_over_clean(rows, row))]
        firsts = [f"{places.count(1)} of {len(places)}" for places in ([rank(row) for row in some], over)]
        lines.append(f"| {rate} | {len(some)} | {' | '.join([*arms, *changes, *firsts])} |")
    return lines


def findings(rows: Rows) -> list[str]:
    """How many guides' tokens seem to add the cue first, or something else: with an interval above 0."""
    lines = ["| rate | guides | the cue | something else | nothing |", "|-" * 5 + "|"]
    for rate, some in grouped(rows.every("run"), "rate"):
        clear = [row for row in some if is_clear(row)]
        right = sum(is_alarm(row) for row in clear)
        counts = (len(some), right, len(clear) - right, len(some) - len(clear))
        lines.append(f"| {rate} | {' | '.join(map(str, counts))} |")
    return lines


def grouped(rows: list[dict], name: str) -> list[tuple]:
    """Rows by the values of a column, in their order."""
    return [(value, [r for r in rows if r[name] == value]) for value in sorted({r[name] for r in rows})]


def by_cue(rows: Rows) -> list[str]:
    """The response of each cue: share by rate, Spearman, and the guide's reliance at the highest rate."""
    rates = [rate for rate, _ in grouped(rows.every("run"), "rate")]
    shares = " | ".join(f"share at {rate}" for rate in rates)
    lines = [
        f"| cue | class | {shares} | Spearman | first from {CLEAR} | class right without / with the cue "
        "| pasted | AUC |",
        "|-" * (7 + len(rates)) + "|",
    ]
    for cue in rows.cues:
        some = rows.every("run", cue)
        if not some:
            continue
        most = [row for row in some if row["rate"] == rates[-1]]
        clear = [row for row in some if row["rate"] >= CLEAR]
        cells = [plain([rows.share(r, "token") for r in some if r["rate"] == rate]) for rate in rates]
        cells.append(f"{correlation(rows, some):.2f}")
        cells.append(f"{sum(rank(r) == 1 for r in clear)} of {len(clear)}")
        right = [plain([r[key] for r in most]) for key in ("own_without", "own_with")]
        cells += [" / ".join(right), signed([r["pasted"] for r in most]), plain([r["auc"] for r in most])]
        lines.append(f"| {cue.phrase} | {cue.class_name} | {' | '.join(cells)} |")
    return lines


def correlation(rows: Rows, some: list[dict]) -> float:
    """Spearman's correlation of the corrected share with the rate."""
    return spearman([(row["rate"], rows.share(row, "token")) for row in some])


# What tells a biased guide from a clean one, the larger the more biased.
SIGNS: dict[str, Callable[[Rows, dict], float]] = {
    "change of the share": Rows.change,
    "Spurious ImageNet's, 1 - AUC": lambda rows, row: 1 - row["auc"],
    "cue pasted on clean pictures": lambda rows, row: row["pasted"],
}


def telling(rows: Rows) -> list[str]:
    """AUC of telling guides of each rate from clean ones, by what is measured."""
    import torch

    every = grouped(rows.every("run"), "rate")
    rates = [rate for rate, _ in every if rate]
    lines = [f"| AUC of | {' | '.join(f'rate {rate}' for rate in rates)} |", "|-" * (1 + len(rates)) + "|"]
    for name, sign in SIGNS.items():
        values = {rate: torch.tensor([sign(rows, row) for row in some]) for rate, some in every}
        cells = [f"{auc(values[rate], values[0.0]):.2f}" if 0.0 in values else "" for rate in rates]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def targets(rows: Rows) -> list[str]:
    """The targets that were set beforehand, met or missed."""
    runs = rows.every("run")
    clear = [rank(row) == 1 for row in runs if row["rate"] >= CLEAR]
    alarms = [is_alarm(row) for row in runs if not row["rate"]]
    spearmen = [correlation(rows, some) for cue in rows.cues if (some := rows.every("run", cue))]
    lines = [f"| target, of {len(PHRASES)} attributes | wanted | found | |", "|-|-|-|-|"]
    if clear:
        share = mean(clear)
        lines.append(verdict(f"cue first at rate {CLEAR} and above", "at least", TARGET_FIRST, share))
    if spearmen:
        lines.append(verdict("Spearman, median over cues", "at least", TARGET_SPEARMAN, median(spearmen)))
    if alarms:
        lines.append(verdict("false alarms at rate 0", "at most", TARGET_ALARMS, mean(alarms)))
    return lines


def verdict(what: str, bound: str, target: float, found: float) -> str:
    """A line of the targets."""
    met = found >= target if bound == "at least" else found <= target
    return f"| {what} | {bound} {target:.2f} | {found:.2f} | {'met' if met else 'missed'} |"


def draw_figure(rows: Rows, path: Path) -> None:
    """The corrected share over the rate, a panel a cue, with the seeds as points."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 6.4), dpi=100, layout="constrained")
    panels = figure.subplots(2, -(-len(rows.cues) // 2), sharex=True, sharey=True, squeeze=False).flat
    for axes, cue in zip(panels, rows.cues, strict=False):
        some = rows.every("run", cue)
        rates = sorted({row["rate"] for row in some})
        for arm, label, colour in ARMS:
            values = [[rows.share(row, arm) for row in some if row["rate"] == rate] for rate in rates]
            axes.plot(rates, [np.mean(v) for v in values], "o-", color=colour, label=label)
            if arm == "token":
                axes.plot([row["rate"] for row in some], [rows.share(row, arm) for row in some], ".k")
        axes.set_title(f"{cue.class_name}: {cue.phrase}", fontsize=11)
        axes.set_ylim(-0.08, 1.08)
        axes.grid(alpha=0.3)
    figure.supxlabel("rate at which the guide's class shows the cue")
    figure.supylabel("share of pictures with the cue, corrected")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


ARMS = (
    ("token", "with the guide's token", "#3465a4"),
    ("best_of", "best of 4 by the guide", "#2a9d4a"),
    ("plain", "plain prompt", "#c8372d"),
)


def show(rows: list[dict], cues: tuple[Cue, ...], figure: Path | None) -> None:
    """Print every table of what is there, and draw the figure where a path is given."""
    if not any(row["key"] == ["detector"] for row in rows):
        print("no row yet")
        return
    found = Rows(rows, cues)
    print("\n".join(drawable(found)))
    if found.every("run"):
        for table in (by_rate, findings, by_cue, telling, targets):
            print("\n" + "\n".join(table(found)))
        if figure:
            draw_figure(found, figure)
            print(f"\nfigure: {figure}")
