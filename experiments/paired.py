"""Two sets of tokens side by side, class by class and seed by seed: differences with their intervals."""

import math
from collections.abc import Callable
from statistics import mean


def pairs(rows: list[dict], others: list[dict]) -> list[tuple[dict, dict]]:
    """The tokens of the same class and training seed."""
    there = {(r["class_index"], r["seed"]): r for r in others}
    return [(r, there[key]) for r in rows if (key := (r["class_index"], r["seed"])) in there]


def interval(values: list[float]) -> tuple[float, float] | None:
    """95 % interval of the mean of values, by bootstrap over them; None of fewer than two, or where all
    are the same."""
    from scipy.stats import bootstrap

    if len(set(values)) < 2:
        return None
    found = bootstrap(
        (values,), mean, vectorized=False, n_resamples=2000, method="percentile", rng=0
    ).confidence_interval
    return float(found.low), float(found.high)


def interval_of_few(values: list[float]) -> tuple[float, float] | None:
    """95 % interval of the mean of values, by Student's t: of ten and fewer a bootstrap's is too narrow. None
    of fewer than two, or where all are the same."""
    from apps.augment.result import paired_difference

    if len(set(values)) < 2:
        return None
    found = paired_difference(values)
    return found.low, found.high


def told(values: list[float], form: Callable[[float], str], interval_of: Callable = interval) -> str:
    """The mean of values and its interval."""
    found = interval_of(values)
    return form(mean(values)) + (f" [{form(found[0])}, {form(found[1])}]" if found else "")


def difference(both: list[tuple[dict, dict]], value: Callable[[dict], float]) -> str:
    """How much larger a figure is in the first of each pair: the mean, and its interval."""
    return told([value(a) - value(b) for a, b in both], "{:+.3f}".format)


def ratio(both: list[tuple[dict, dict]], value: Callable[[dict], float | None]) -> str:
    """How many times as large a figure is in the first of each pair: the geometric mean, and its interval.

    Pairs where one has none, or 0, are left out.
    """
    logs = [math.log(a / b) for a, b in ((value(x), value(y)) for x, y in both) if a and b]
    return told(logs, lambda log: f"{math.exp(log):.2f}") if logs else "–"
