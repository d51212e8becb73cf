"""Figures from the rows: shares of prompts, and paired gains with intervals over prompts."""

from collections.abc import Callable, Sequence

import numpy as np

from dpt.data.scenes import Prompt
from dpt.evaluate import mean_share
from dpt.experiment.judging import from_digits
from dpt.experiment.prompts import part_of
from dpt.experiment.settings import ALL_ARMS, NOISES, SEEDS
from dpt.experiment.units import Progress, Unit

Where = Callable[[Prompt], bool] | None  # which prompts count; None: all


def rows_of(progress: Progress, name: str, seed: int) -> dict[int, dict]:
    """The table's rows of an arm by part, drawn with the settings that are chosen now; an arm in which no
    training plays a part has the same for each seed."""
    arm = ALL_ARMS[name]
    units = [Unit("draw", name, seed if arm.seeds else 0, "table", part) for part in range(arm.parts)]
    return {unit.part: row for unit in units if (row := progress.row(unit))}


def seeds_of(progress: Progress, name: str) -> list[int]:
    """The trainings of which there are rows; of an arm without training the first."""
    seeds = SEEDS if ALL_ARMS[name].seeds else SEEDS[:1]
    return [seed for seed in seeds if rows_of(progress, name, seed)]


def prompts_of(parts: Sequence[int]) -> list[Prompt]:
    """The prompts of some parts of the table."""
    return [prompt for part in parts for prompt in part_of("table", part).prompts]


def by_prompt(rows: Sequence[dict], measure: str) -> np.ndarray:
    """The mean of each prompt's pictures (P,); not a number where it makes no such claim."""
    if measure == "diversity":
        return np.concatenate([row[measure] for row in rows])
    return from_digits("".join(row[measure] for row in rows)).reshape(-1, NOISES).mean(axis=1)


def level(progress: Progress, name: str, measure: str, where: Where = None) -> dict | None:
    """An arm's mean over trainings and prompts, with an interval of 95 % over prompts; None without rows.

    Args:
        where: which prompts count; None: all.
    """
    found = [rows_of(progress, name, seed) for seed in seeds_of(progress, name)]
    if not found:
        return None
    parts = sorted(set.intersection(*map(set, found)))
    values = [by_prompt([rows[part] for part in parts], measure) for rows in found]
    return over_prompts(np.mean(values, axis=0), parts, where)


def gain(progress: Progress, name: str, over: str, measure: str = "full", where: Where = None) -> dict | None:
    """What an arm gains over another, on the same prompts, noises and trainings; :func:`level` with
    ``by_seed``, the gain of each training. None where they share no rows."""
    seeds = [seed for seed in SEEDS if rows_of(progress, name, seed) and rows_of(progress, over, seed)]
    if not ALL_ARMS[name].seeds and not ALL_ARMS[over].seeds:
        seeds = seeds[:1]
    both = [(rows_of(progress, name, seed), rows_of(progress, over, seed)) for seed in seeds]
    parts = sorted(set.intersection(*(set(a) & set(b) for a, b in both))) if both else []
    if not parts:
        return None
    differences = []
    for a, b in both:
        first = by_prompt([a[part] for part in parts], measure)
        differences.append(first - by_prompt([b[part] for part in parts], measure))
    told = over_prompts(np.mean(differences, axis=0), parts, where)
    return told and told | {"by_seed": [float(np.nanmean(values)) for values in differences]}


def over_prompts(values: np.ndarray, parts: Sequence[int], where: Where) -> dict | None:
    """A mean with its interval over the prompts that count and make the claim (P,)."""
    counts = ~np.isnan(values)
    if where is not None:
        counts &= np.array([where(prompt) for prompt in prompts_of(parts)])
    return mean_share(values[counts]) if counts.any() else None


def mean_of(progress: Progress, name: str, column: str) -> float | None:
    """The mean of a column over an arm's rows."""
    found = [row for seed in seeds_of(progress, name) for row in rows_of(progress, name, seed).values()]
    values = [row[column] for row in found if row[column] is not None]
    return float(np.mean(values)) if values else None


# Readings of adapters.


def read_rows_of(progress: Progress, name: str) -> dict[int, dict]:
    """The readings of a training's adapters by seed."""
    return {seed: row for seed in SEEDS if (row := progress.row(Unit("read", name, seed)))}


def by_scene(row: dict, column: str) -> np.ndarray:
    """Of each scene 1 where it is right, or the share of noises that hit (N,)."""
    digits = np.array([int(digit) for digit in row[column]])
    return digits / row["noises"] if column.startswith("hit") else digits.astype(float)


def read_level(rows: dict[int, dict], column: str) -> dict:
    """A mean over seeds and scenes, with an interval over scenes."""
    return mean_share(np.mean([by_scene(row, column) for row in rows.values()], axis=0))


def read_gain(rows: dict[int, dict], over: dict[int, dict], column: str) -> dict | None:
    """A paired gain over the seeds that both have; None where they share none."""
    seeds = sorted(set(rows) & set(over))
    if not seeds:
        return None
    differences = [by_scene(rows[seed], column) - by_scene(over[seed], column) for seed in seeds]
    by_seed = [float(values.mean()) for values in differences]
    return mean_share(np.mean(differences, axis=0)) | {"by_seed": by_seed}
