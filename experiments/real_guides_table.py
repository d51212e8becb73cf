"""The tables of ``real_guides.py``: pair by pair, and target by target."""

from collections.abc import Callable
from statistics import fmean, median

import torch

from discriminative.records.scores import paired_log_probabilities
from discriminative.tokens.prompts import TEMPLATES, fill
from experiments.paired import told
from trainer import Gain

JUDGES = {"lite0": "lite1", "lite1": "lite0", "lite2": "lite1"}  # which judges where which guides
SURE = 0.01  # p-value
HALF = 0.5
NEARLY_ALL = 0.9
ENOUGH_CEILING = 0.5  # of the best prompt, from where a pair that is hardly drawn counts
HEAD = (
    "| word | class | best prompt | guide: plain → token (best) | judge: plain → token (best) | "
    "log-probability, guide / judge | updates |"
)


def share(seen: dict[str, list]) -> float:
    """Share of images whose most probable label is the class."""
    return fmean(rank == 1 for rank in seen["rank"])


def difference(row: dict, plain: dict, who: str) -> dict[str, float]:
    """The token's log-probabilities against the plain prompt's, on the same seeds."""
    both = (torch.tensor(r["seen"][who]["log_probability"]) for r in (row, plain))
    return paired_log_probabilities(*both)


class Compared:
    """A token beside the plain prompt and the best prompt of the world.

    Args:
        prompts: the rows without a token, by prompt and class.
    """

    def __init__(self, pair, row: dict, prompts: dict[tuple[str, int], dict]):
        self.pair = pair
        self.row = row
        self.guide = row["guide"]
        self.judge = JUDGES[self.guide]
        self.plain = prompts[(fill(TEMPLATES[0], "a", pair.word), pair.class_index)]
        self.ceiling = prompts[(pair.ceiling_prompt, pair.class_index)]
        self.changes = {who: difference(row, self.plain, who) for who in (self.guide, self.judge)}

    def shares(self, who: str) -> tuple[float, float, float]:
        """Plain, with the token, and of the best prompt."""
        return tuple(share(r["seen"][who]) for r in (self.plain, self.row, self.ceiling))

    def is_better(self, certain: bool = False) -> bool:
        """Whether guide and judge both give the class more probability than without the token."""
        found = self.changes.values()
        better = all(c["log_probability_difference"] > 0 for c in found)
        return better and not (certain and any(c["log_probability_p_value"] >= SURE for c in found))

    @property
    def of_ceiling(self) -> float | None:
        """The token's share over the best prompt's, by the guide; None where that draws none."""
        _, token, ceiling = self.shares(self.guide)
        return token / ceiling if ceiling else None


def line(row: dict) -> str:
    """A finished run in one line."""
    figures = ", ".join(f"{who} {share(seen):.2f}" for who, seen in row["seen"].items())
    ended = f"{row['kept']} of {row['updates']} updates, {row['seconds']} s, {row['stopped_by']}"
    return f"{row['word']} {row['class_index']} seed {row['seed']} {row['setting']}: {figures}; {ended}"


def mean_of(all_of: list[Compared], value: Callable[[Compared], float]) -> float:
    """Over the seeds of a pair."""
    return fmean(value(c) for c in all_of)


def pair_line(of: list[Compared]) -> str:
    """A pair, the means over its seeds."""
    pair = of[0].pair
    cells = [
        pair.word,
        f"{pair.class_index} {pair.label.split(',')[0]}",
        pair.ceiling_prompt.removeprefix("A photo of "),
    ]
    for who in (of[0].guide, of[0].judge):
        plain, _, ceiling = of[0].shares(who)
        token = mean_of(of, lambda c, who=who: c.shares(who)[1])
        cells.append(f"{plain:.2f} → {token:.2f} ({ceiling:.2f})")
    moved = [mean_of(of, lambda c, w=w: c.changes[w]["log_probability_difference"]) for w in of[0].changes]
    cells.append(" / ".join(f"{v:+.2f}" for v in moved))
    cells.append(f"{mean_of(of, lambda c: c.row['updates']):.0f}")
    return f"| {' | '.join(cells)} |"


def gain(of: list[Compared], who: str) -> float:
    """How much larger a share is with the token, the mean over the seeds."""
    return mean_of(of, lambda c: c.shares(who)[1] - c.shares(who)[0])


def targets(by_pair: dict, tokens: list[Compared]) -> list[str]:
    """What the tokens came to, one target a line."""
    drawn = [of for of in by_pair.values() if of[0].pair.group == "drawn"]
    hardly = [of for of in by_pair.values() if of[0].pair.group == "hardly drawn"]
    lines = []
    ratios = [mean_of(of, lambda c: c.of_ceiling) for of in drawn if of[0].of_ceiling is not None]
    if ratios:
        reach = fmean(r >= NEARLY_ALL for r in ratios)
        lines.append(
            f"pairs that can be drawn ({len(ratios)}): the token's share over the best prompt's, by the "
            f"guide, {median(ratios):.2f} in the median; at least {NEARLY_ALL} in {reach:.2f}"
        )
        lost = [of for of in drawn if gain(of, of[0].judge) < 0]
        relative = [
            gain(of, of[0].judge) / gain(of, of[0].guide) for of in drawn if gain(of, of[0].guide) > 0
        ]
        told_lost = ", ".join(f"{of[0].pair.word} {of[0].pair.class_index}" for of in lost) or "none"
        lines.append(
            f"... by the judge: pairs that lose: {told_lost}; the judge's gain over the guide's "
            + (f"{median(relative):.2f} in the median" if relative else "none, as no pair gains by the guide")
        )
    high = [of for of in hardly if of[0].shares(of[0].guide)[2] >= ENOUGH_CEILING]
    if high:
        half = fmean(mean_of(of, lambda c: c.of_ceiling) >= HALF for of in high)
        lines.append(
            f"pairs hardly drawn, best prompt at least {ENOUGH_CEILING} ({len(high)}): half of it reached "
            f"in {half:.2f}"
        )
    better = fmean(c.is_better() for c in tokens)
    sure = fmean(c.is_better(certain=True) for c in tokens)
    lines.append(
        f"log-probability by guide and judge: better in {better:.2f} of {len(tokens)}, p < .01 in {sure:.2f}"
    )
    vain = [c.row["updates"] for c in tokens if c.row["gain"] and not Gain(**c.row["gain"]).is_there]
    lines.append(f"trainings without a gain: {len(vain)}, with {max(vain, default=0)} updates at most")
    lines.append(f"seconds of a thread, in the median: {median(c.row['seconds'] for c in tokens):.0f}")
    return lines


def against(rows: list[Compared], others: list[Compared]) -> str:
    """One setting against another on the same pairs and seeds."""
    there = {(c.pair, c.row["seed"]): c for c in others}
    both = [(c, there[key]) for c in rows if (key := (c.pair, c.row["seed"])) in there]

    def over(value: Callable[[Compared], float]) -> str:
        return told([value(a) - value(b) for a, b in both], "{:+.3f}".format)

    cells = [over(lambda c: c.shares(c.guide)[1]), over(lambda c: c.shares(c.judge)[1])]
    cells += [over(lambda c, i=i: list(c.changes.values())[i]["log_probability_difference"]) for i in (0, 1)]
    cells += [over(lambda c: c.row["seconds"])]
    return f"{len(both)} | {' | '.join(cells)}"


def show(pairs: list, rows: list[dict]) -> None:
    """Print, for every use, guide and setting, the pairs and the targets; then the settings side by side."""
    prompts = {(r["prompt"], r["class_index"]): r for r in rows if "prompt" in r}
    known = {(p.word, p.class_index): p for p in pairs}
    runs = [r for r in rows if "prompt" not in r and (r["word"], r["class_index"]) in known]
    of_setting: dict[tuple, list[Compared]] = {}
    for row in runs:
        pair = known[(row["word"], row["class_index"])]
        of_setting.setdefault((pair.use, row["guide"], row["setting"]), []).append(
            Compared(pair, row, prompts)
        )
    for (use, guide, setting), tokens in of_setting.items():
        by_pair: dict[tuple, list[Compared]] = {}
        for c in tokens:
            by_pair.setdefault((c.pair.group, c.pair.word, c.pair.class_index), []).append(c)
        print(f"\n{use}, guide {guide}, judge {JUDGES[guide]}, setting {setting!r}\n\n{HEAD}\n{'|-' * 7}|")
        for key in sorted(by_pair):
            print(pair_line(by_pair[key]))
        print("\n" + "\n".join(f"- {text}" for text in targets(by_pair, tokens)))
    for (use, guide, setting), tokens in of_setting.items():
        if setting != "default" and (use, guide, "default") in of_setting:
            compared = against(tokens, of_setting[(use, guide, "default")])
            print(f"{use} {guide} | {setting} - default | {compared}")
