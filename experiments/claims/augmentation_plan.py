"""The arms of claim (ii), what is tried for each, and which unit of work can be done next."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from statistics import fmean

from experiments.claims import augmentation_pictures as made
from experiments.claims.augmentation_pictures import SEEDS, SHOTS, TAKEN, WORDS, Place

TUNING_SEEDS = (0, 1)

# What is tried for each arm on the validation pictures, five settings each: one thing after the other, the
# first value is where it starts.
RECIPE = {"learning_rate": (3e-3, 1e-3), "cutmix": (0.5, 0.0), "magnitude": (9, 5, 3)}
PLAIN_RECIPE = {"learning_rate": (3e-3, 1e-3), "weight_decay": (0.05, 0.2), "smoothing": (0.1, 0.0, 0.2)}
DRAWING = {"share": (0.5, 0.25, 0.75), "number": (24, 8), "guidance": (2.0, 5.0)}
SEARCH = {"real": PLAIN_RECIPE, "strong": RECIPE, "twice": RECIPE}
ARMS = {
    "real": "real",
    "strong": "real + strong augmentation",
    "twice": "+ twice the real pictures",
    "plain": "+ plain prompt",
    "filtered": "+ plain prompt, filtered by the clean guide",
    "inversion": "+ textual inversion on the shots",
    "token": "+ class token, clean guide",
    "distilled": "+ plain prompt, labelled by the full guide",
    "full": "+ class token, full guide",
    "phrase": "+ precise phrase",
}
SEARCH |= dict.fromkeys(list(ARMS)[3:], DRAWING)
# The words that an arm's pictures need.
WORDS_OF = {"filtered": ("token",), "inversion": ("inversion",), "token": ("token",)}
WORDS_OF |= {"distilled": ("full",), "full": ("full",), "plain": (), "phrase": ()}
FROM_POOL = ("plain", "filtered", "distilled")
MEASURING = ("training", "right")  # kinds of work that leave a row, and no file

Setting = tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Job:
    """One unit of work.

    Args:
        kind: a key of ``SECONDS`` in ``augmentation.py``.
        name: an arm of a training, a source of words and drawings ("plain" draws a word's pool).
        shots: 0 where it does not depend on them.
        what: index of a class taken; of a word for a pool; of a training -1.
        setting: of a training or a guide; of a drawing its guidance.
    """

    kind: str
    name: str = ""
    shots: int = 0
    seed: int = 0
    what: int = -1
    setting: Setting = ()

    @property
    def key(self) -> list:
        """What tells it from others in the rows."""
        return json.loads(json.dumps(list(asdict(self).values())))


class Plan:
    """Which units are missing, and which of them can be done now.

    Args:
        rows: of all finished units.
    """

    def __init__(self, rows: list[dict], output_path: Path):
        self.place = Place(output_path)
        self.rows = {json.dumps(r["key"]): r for r in rows if r["key"][0] in MEASURING}

    def row(self, job: Job) -> dict | None:
        """The row of a unit that leaves nothing else, if it is done."""
        return self.rows.get(json.dumps(job.key))

    def start(self, arm: str, shots: int) -> dict[str, float] | None:
        """The settings that an arm's search begins with; None while they are not known."""
        first = {name: values[0] for name, values in SEARCH[arm].items()}
        if arm in ("real", "strong"):
            return first
        below, missing = self.chosen("strong", shots)
        return None if missing else below | ({} if arm == "twice" else first)

    @cache  # noqa: B019 (a plan is made anew after each round)
    def chosen(self, arm: str, shots: int) -> tuple[dict[str, float] | None, tuple[Job, ...]]:
        """The setting that is best on the validation pictures; or the trainings that have to say so."""
        setting = self.start(arm, shots)
        if setting is None:
            return None, self.chosen("strong", shots)[1]
        for name, values in SEARCH[arm].items():
            tried = [setting | {name: value} for value in sorted(values, key=lambda v: v != setting[name])]
            jobs = [[training(arm, shots, seed, one) for seed in TUNING_SEEDS] for one in tried]
            missing = tuple(job for these in jobs for job in these if not self.row(job))
            if missing:
                return None, missing
            scores = [fmean(self.row(job)["validation"] for job in these) for these in jobs]
            setting = tried[scores.index(max(scores))]
        return setting, ()

    def final(self, arm: str, shots: int) -> list[Job]:
        """The trainings of all seeds with the chosen setting; none while it is not known."""
        setting, missing = self.chosen(arm, shots)
        return [] if missing else [training(arm, shots, seed, setting) for seed in SEEDS]

    def right(self, arm: str, shots: int) -> list[Job]:
        """The judging of what an arm adds in its final trainings; none where it adds real pictures alone."""
        return [replace(job, kind="right") for job in self.final(arm, shots) if arm in made.GENERATED]

    def wanted(self) -> list[Job]:
        """The rows that are known to be missing: fewest shots first, which are whole before the next."""
        for shots in SHOTS:
            jobs = []
            for arm in ARMS:
                jobs += [*self.chosen(arm, shots)[1], *self.final(arm, shots), *self.right(arm, shots)]
            missing = [job for job in dict.fromkeys(jobs) if not self.row(job)]
            if missing:
                return missing
        return []

    def ready(self) -> list[Job]:
        """What can be done now, so that the missing rows become possible."""
        found: dict[Job, None] = {}
        for job in self.wanted():
            self.collect(job, found)
        return list(found)

    def collect(self, job: Job, found: dict[Job, None]) -> None:
        """Add the job, or what it needs and is not there."""
        needed = [need for need in self.needs(job) if not self.is_there(need)]
        if not needed:
            found[job] = None
        for need in needed:
            self.collect(need, found)

    def needs(self, job: Job) -> Iterator[Job]:
        """What a unit is made from."""
        if job.kind != "renders":
            yield Job("renders")
        every = range(len(TAKEN))
        if job.kind in MEASURING and job.name in WORDS_OF:
            setting = (("guidance", dict(job.setting)["guidance"]),)
            if job.name in FROM_POOL:
                yield from (Job("drawing", "plain", 0, job.seed, w, setting) for w in range(len(WORDS)))
                yield from (
                    words(source, job.shots, job.seed, k) for source in WORDS_OF[job.name] for k in every
                )
            else:
                shots = 0 if job.name in made.WITHOUT_SHOTS else job.shots
                yield from (Job("drawing", job.name, shots, job.seed, k, setting) for k in every)
            if job.name == "filtered":
                yield self.guide(job.shots, job.seed)
        if job.kind == "drawing" and job.name not in ("plain", "phrase"):
            yield words(job.name, job.shots, job.seed, job.what)
        if job.kind == "words" and job.name == "token":
            yield self.guide(job.shots, job.seed)

    def guide(self, shots: int, seed: int) -> Job:
        """The clean guide: real + strong augmentation, with the setting that was chosen for it."""
        return Job("guide", "strong", shots, seed, -1, tuple(self.chosen("strong", shots)[0].items()))

    def is_there(self, job: Job) -> bool:
        """Whether a unit that leaves files is done."""
        place = self.place
        if job.kind == "renders":
            return all(p.exists() for p in (place.split("test"), *map(place.shots, SEEDS)))
        if job.kind == "guide":
            return place.guide(job.shots, job.seed).exists()
        if job.kind == "words":
            return place.token(job.name, job.shots, job.seed, TAKEN[job.what]).exists()
        name = WORDS[job.what] if job.name == "plain" else made.folder_of(TAKEN[job.what])
        return place.drawn(job.name, job.shots, job.seed, dict(job.setting)["guidance"], name).exists()


def training(arm: str, shots: int, seed: int, setting: dict[str, float]) -> Job:
    """A training of an arm."""
    return Job("training", arm, shots, seed, -1, tuple(setting.items()))


def words(source: str, shots: int, seed: int, k: int) -> Job:
    """A word of a source; the full guide's does not depend on the shots."""
    return Job("words", source, 0 if source == "full" else shots, seed, k)
