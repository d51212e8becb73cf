"""The experiment as units of work: what a part of it needs, in which order, and what is done already."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from dpt.experiment.costs import at_this_cost, price
from dpt.experiment.settings import (
    ALL_ARMS,
    BLOCKS,
    CHEAP,
    CHOOSING_SEED,
    COURSE,
    NOISES,
    PART,
    PROBED_REMEDIES,
    QUOTAS,
    REMEDIES,
    SCENES,
    SEEDS,
    TRAININGS,
    seed_of_model,
)

TUNING_PARTS = sum(map(sum, QUOTAS["tuning"].values())) // PART
DISCRETE = 2  # digits stand for halves
COURSE_OF = {"C": "longer", "B": "longer, denoising"}


@dataclass(frozen=True)
class Unit:
    """One piece of work.

    Args:
        kind: "scenes", "train", "candidates", "draw", "read" or "why".
        name: of a training or an arm.
        seed: of its training.
        prompts: "table" or "tuning".
        part: of the prompts.
        choice: which of the arm's choices; None: the one that is best on the tuning prompts.
        updates: of a LoRA on its way; None: at the end.
    """

    kind: str
    name: str = ""
    seed: int = 0
    prompts: str = ""
    part: int = 0
    choice: int | None = None
    updates: int | None = None

    def __str__(self) -> str:
        where = f", {self.prompts} prompts, part {self.part + 1}" if self.prompts else ""
        course = f" after {self.updates} updates" if self.updates else ""
        choice = "" if self.choice is None else f", choice {self.choice + 1}"
        return " ".join(filter(None, [self.kind, self.name])) + f"{course}, seed {self.seed}{choice}{where}"


def tuning_units(name: str) -> list[Unit]:
    """The pictures by which an arm's settings are chosen."""
    every = range(len(ALL_ARMS[name].choices))
    seed = CHOOSING_SEED
    return [Unit("draw", name, seed, "tuning", part, i) for i in every for part in range(TUNING_PARTS)]


PRICED = (Unit("draw", "A", 0, "tuning", 0, 0), Unit("draw", "D", CHOOSING_SEED, "tuning", 0, 0))


class Progress:
    """The rows that are there, and what follows from them.

    Args:
        rows: of finished units.
        has_files: whether a unit that leaves files ("scenes", "train", "candidates") has left them.
    """

    def __init__(self, rows: Iterable[dict], has_files: Callable[[Unit, dict | None], bool]):
        self.rows: dict[str, dict] = {}
        self.has_files = has_files
        for row in rows:
            self.add(row)

    def add(self, row: dict) -> None:
        """One more row; a later one of the same unit replaces the earlier."""
        self.rows[key_of(row)] = row

    def row(self, unit: Unit) -> dict | None:
        """The unit's row, of the settings that hold for it now; None where it is not there."""
        settings = self.settings(unit)
        return None if settings is None else self.rows.get(key_of(vars(unit) | {"settings": settings}))

    def is_done(self, unit: Unit) -> bool:
        """Whether nothing is left to do."""
        if unit.kind in ("scenes", "train", "candidates"):
            settings = self.settings(unit)
            return settings is not None and self.has_files(unit, settings)
        return self.row(unit) is not None

    # Settings that follow from rows.

    def settings(self, unit: Unit) -> dict | None:
        """What a unit is drawn with; None where rows that decide it are missing."""
        if unit.kind == "candidates":
            return self.extra("H", {})
        if unit.kind != "draw":
            return {}
        choices = ALL_ARMS[unit.name].choices
        if unit.choice is not None or len(choices) == 1:
            return self.extra(unit.name, choices[unit.choice or 0])
        return self.best(unit.name)

    def best(self, name: str) -> dict | None:
        """The choice with most whole captions on the tuning prompts, the first of equals."""
        shares = []
        for i, choice in enumerate(ALL_ARMS[name].choices):
            found = [self.row(unit) for unit in tuning_units(name) if unit.choice == i]
            if None in found:
                return None
            shares.append((share_of(found), -i, choice))
        return self.extra(name, max(shares, key=lambda one: one[:2])[2])

    def extra(self, name: str, choice: dict) -> dict | None:
        """A choice with what the measured cost of self-correction adds to it."""
        way = ALL_ARMS[name].way
        if way not in ("best", "noise"):
            return choice
        plain, corrected = map(self.row, PRICED)
        if plain is None or corrected is None:
            return None
        return choice | at_this_cost(way, choice, price(corrected), price(plain))


def key_of(row: dict) -> str:
    """What tells a unit's row from all others."""
    names = ("kind", "name", "seed", "prompts", "part", "updates", "settings")
    return json.dumps([row[name] for name in names], sort_keys=True)


def share_of(rows: Sequence[dict]) -> float:
    """The share of whole captions."""
    full = "".join(row["full"] for row in rows)
    return sum(map(int, full)) / DISCRETE / len(full)


# What needs what.


def needs(unit: Unit, progress: Progress) -> list[Unit]:
    """The units that have to be done before one, as far as the rows tell: what a choice needs is known only
    once it is made."""
    if unit.kind == "train":
        training = TRAININGS[unit.name]
        found = [Unit("scenes")]
        if training.begins_from:
            found.append(Unit("train", training.begins_from, unit.seed))
        if training.on:
            found.append(Unit("train", training.on, seed_of_model(unit.seed)))
        return found
    if unit.kind == "read":
        return [Unit("scenes"), Unit("train", unit.name, unit.seed)]
    if unit.kind == "why":
        return [Unit("scenes"), Unit("train", "probe", unit.seed)]
    if unit.kind == "candidates":
        return list(PRICED)
    return needs_of_pictures(unit, progress) if unit.kind == "draw" else []


def needs_of_pictures(unit: Unit, progress: Progress) -> list[Unit]:
    """Prices, choices, trainings and candidates before an arm's pictures."""
    arm = ALL_ARMS[unit.name]
    found = [*PRICED] if arm.way in ("best", "noise") else []
    if unit.choice is None and len(arm.choices) > 1:
        found += tuning_units(unit.name)
    settings = progress.settings(unit)
    if settings is None:
        return found
    training = COURSE_OF[unit.name] if unit.updates else settings.get("training", arm.training)
    names = dict.fromkeys(filter(None, (arm.adapter, training)))
    found += [Unit("train", name, unit.seed) for name in names]
    if arm.way == "best":
        found.append(Unit("candidates", "A", 0, unit.prompts, unit.part))
    return found


def units_of(part: str, seeds: Sequence[int]) -> list[Unit]:
    """What a part of the experiment is to bring, the trainings and choices on the way left out."""
    if part in ALL_ARMS:
        return units_of_arm(part, seeds)
    if part == "remedies":
        return [unit for name in REMEDIES for unit in (*tuning_units(name), *units_of_arm(name, seeds))]
    if part == "probes":
        every = [
            Unit("read", name, seed) for name in ("probe", "fresh probe of tuned", "tuned") for seed in seeds
        ]
        of_remedies = next(seed for seed in SEEDS if seed_of_model(seed) == CHOOSING_SEED)
        return [
            *every,
            Unit("read", "fresh probe of denoising", CHOOSING_SEED),
            *(Unit("read", f"fresh probe of {name}", of_remedies) for name in PROBED_REMEDIES),
            Unit("read", "longest", CHOOSING_SEED),
        ]
    if part == "course":
        before = [Unit("draw", "A", 0, "tuning", i, 0) for i in range(TUNING_PARTS)]
        return before + [unit for name in COURSE_OF for unit in units_of_course(name)]
    if part == "blocks":
        return [Unit("read", f"block {name}", CHOOSING_SEED) for name in BLOCKS]
    return [Unit("why", seed=CHOOSING_SEED)]


def units_of_arm(name: str, seeds: Sequence[int]) -> list[Unit]:
    """The table's pictures of an arm; where nothing is to be chosen those of the tuning prompts, too, with
    which choices are compared."""
    arm = ALL_ARMS[name]
    trained = [seed for seed in seeds if seed in SEEDS[: arm.seeds]] if arm.seeds else [0]
    found = [Unit("draw", name, seed, "table", part) for seed in trained for part in range(arm.parts)]
    if name in ("A", "C"):
        found += tuning_units(name)
    return found


def units_of_course(name: str) -> list[Unit]:
    """Pictures of the tuning prompts by the LoRA on its way."""
    every = range(TUNING_PARTS)
    return [
        Unit("draw", name, CHOOSING_SEED, "tuning", i, 0, updates=after) for after in COURSE for i in every
    ] + tuning_units(f"{name} longer")


def missing(wanted: Iterable[Unit], progress: Progress) -> list[Unit]:
    """What is left to do for these units, each behind what it needs."""
    found: dict[Unit, None] = {}

    def visit(unit: Unit) -> None:
        if unit in found or progress.is_done(unit):
            return
        for other in needs(unit, progress):
            visit(other)
        found[unit] = None

    for unit in wanted:
        visit(unit)
    return list(found)


# How long it takes.

# One thread of an EPYC: seconds a picture, by way; an update, by stage and losses; a scene.
A_PICTURE = {"plain": 0.16, "corrected": 0.37, "noise": 0.36, "best": 0.11}
A_COSTLY_PICTURE = 0.5
AN_UPDATE = {
    ("probe", "itm", "rec"): 0.85,
    ("probe", "itm"): 0.8,
    ("probe", "rec"): 0.2,
    ("soft", "itm"): 1.1,
}
AN_UPDATE |= {("tune", "itm", "rec", "mse"): 1.5, ("tune", "mse"): 0.25, ("tune", "itm", "mse"): 1.2}
AN_UPDATE |= {("tune", "rec", "mse"): 0.6, ("errors", "itm", "mse"): 1.1}
A_LARGE_MAP = 1.7  # times as long, at blocks of 16x16
LARGE = ("up1", "up2")
A_READING = 0.1
A_SCENE = 0.04
AN_EXPLANATION = 40.0


def expected_seconds(unit: Unit, settings: dict | None) -> float:
    """About how long a unit takes, on one thread."""
    if unit.kind == "train":
        training = TRAININGS[unit.name]
        times = A_LARGE_MAP if training.point in LARGE else 1
        return training.settings.steps * AN_UPDATE[training.stage, *training.losses] * times
    if unit.kind == "draw":
        arm = ALL_ARMS[unit.name]
        return PART * NOISES * (A_PICTURE[arm.way] if arm.sampler == CHEAP else A_COSTLY_PICTURE)
    if unit.kind == "candidates":
        return PART * NOISES * A_PICTURE["plain"] * ((settings or {"k": 3})["k"] - 1)
    if unit.kind == "read":
        return SCENES["test"] * A_READING
    return sum(SCENES.values()) * A_SCENE if unit.kind == "scenes" else AN_EXPLANATION
