"""One unit of the experiment, carried out; what its row says."""

import hashlib
import time
from functools import cache
from pathlib import Path

import torch

from discriminative.diffusion.sampler import decode
from discriminative.records.environment import commit
from dpt.choose import pick
from dpt.experiment import reading, scenes, trainings
from dpt.experiment.drawing import (
    Cost,
    Drawn,
    bf16,
    draw,
    keep,
    kept,
    path_of,
    scores_by_adapter,
    slices,
)
from dpt.experiment.judging import judged
from dpt.experiment.prompts import Part, part_of
from dpt.experiment.rivals import guide_score, load_guide
from dpt.experiment.settings import ALL_ARMS, ARMS, TRAININGS, Arm
from dpt.experiment.units import COURSE_OF, Unit
from dpt.forward import Reader


def carry_out(root: Path, unit: Unit, settings: dict) -> dict:
    """Do a unit; its row.

    Args:
        root: folder of weights, scenes and pictures.
        settings: with which it is drawn; of candidates "k".

    Raises:
        UsageError, WorkError: a training cannot go on, or a loss is not finite.
    """
    start = time.perf_counter()
    told = KINDS[unit.kind](root, unit, settings)
    row = {name: value for name, value in vars(unit).items() if name != "choice"}
    took = round(time.perf_counter() - start, 1)
    return row | {"settings": settings} | told | {"took": took, "commit": commit()}


def has_files(root: Path, unit: Unit, settings: dict) -> bool:
    """Whether a unit that leaves files has left them."""
    if unit.kind == "scenes":
        return scenes.are_kept(root)
    if unit.kind == "train":
        return trainings.is_done(root, unit.name, unit.seed)
    numbers = range(1, settings["k"])
    return all(kept(path_of(root, "A", 0, unit.prompts, unit.part, n), {}) for n in numbers)


@cache
def texts_of(prompts: str, part: int) -> str:
    """A hash of a part's prompts and noises: rows of other prompts do not count."""
    found = part_of(prompts, part)
    told = repr(([prompt.text for prompt in found.prompts], found.seeds))
    return hashlib.sha256(told.encode()).hexdigest()[:12]


def is_of_today(row: dict) -> bool:
    """Whether a row is of today's trainings, arms and prompts."""
    if row["name"] not in ("", *TRAININGS, *ALL_ARMS):
        return False
    return "texts" not in row or row["texts"] == texts_of(row["prompts"], row["part"])


# The kinds.


def keep_scenes(root: Path, unit: Unit, settings: dict) -> dict:
    """Scenes of all trainings and readings."""
    scenes.keep_scenes(root, trainings.load_miniature().vae)
    return {}


def train(root: Path, unit: Unit, settings: dict) -> dict:
    """One training."""
    return trainings.carry_out(root, unit.name, unit.seed)


def read(root: Path, unit: Unit, settings: dict) -> dict:
    """One adapter on test scenes."""
    return reading.read(root, unit.name, unit.seed)


def why(root: Path, unit: Unit, settings: dict) -> dict:
    """Texts and gradients looked at."""
    return reading.why(root, unit.seed)


def draw_candidates(root: Path, unit: Unit, settings: dict) -> dict:
    """The base's other pictures of a part, of which some arms choose."""
    reader = trainings.reader_of(root, "", "", 0)
    part = part_of(unit.prompts, unit.part)
    for number in range(1, settings["k"]):
        plain(root, reader, unit, part, number)
    return {}


def draw_and_judge(root: Path, unit: Unit, settings: dict) -> dict:
    """An arm's pictures of a part, judged."""
    arm = ALL_ARMS[unit.name]
    part = part_of(unit.prompts, unit.part)
    training = COURSE_OF[unit.name] if unit.updates else settings.get("training", arm.training)
    reader = trainings.reader_of(root, training, arm.adapter, unit.seed, unit.updates)
    drawn = pictures(root, reader, unit, arm, settings, part)
    row = judged(load_judge(), part, images_of(reader, arm, drawn))
    number = len(drawn.latents)
    cost = {name: round(value / number, 4) for name, value in vars(drawn.cost).items()}
    return row | cost | {"texts": texts_of(unit.prompts, unit.part)}


KINDS = {
    "scenes": keep_scenes,
    "train": train,
    "candidates": draw_candidates,
    "draw": draw_and_judge,
    "read": read,
    "why": why,
}


# Pictures.


@cache
def load_judge():
    """The scenes' own judge."""
    from miniature.detector import load_detector

    return load_detector()


def pictures(root: Path, reader: Reader, unit: Unit, arm: Arm, settings: dict, part: Part) -> Drawn:
    """The pictures of a part, from disk where they are there; those of the tuning prompts are not kept."""
    if arm.way == "best":
        return chosen(root, reader, unit, arm, settings, part)
    if unit.prompts != "table":
        return draw(reader, arm, settings, part)
    path = path_of(root, unit.name, unit.seed, unit.prompts, unit.part)
    return kept(path, settings) or drawn_and_kept(path, reader, arm, settings, part)


def drawn_and_kept(
    path: Path, reader: Reader, arm: Arm, settings: dict, part: Part, candidate: int = 0
) -> Drawn:
    """Pictures, drawn and written."""
    drawn = draw(reader, arm, settings, part, candidate)
    keep(path, drawn, settings)
    return drawn


def plain(root: Path, reader: Reader, unit: Unit, part: Part, number: int) -> Drawn:
    """The base's candidates of one number; 0 are A's own pictures."""
    path = path_of(root, "A", 0, unit.prompts, unit.part, number)
    return kept(path, {}) or drawn_and_kept(path, reader, ARMS["A"], {}, part, number)


def chosen(root: Path, reader: Reader, unit: Unit, arm: Arm, settings: dict, part: Part) -> Drawn:
    """The best of k of the base's pictures, by the adapter or by a classifier."""
    candidates = [plain(root, reader, unit, part, number) for number in range(settings["k"])]
    if arm.adapter:
        scores, cost = scores_by_adapter(reader, candidates, part)
    else:
        scores, cost = scores_by_guide(reader, arm, candidates, part)
    latents = pick(torch.stack([drawn.latents for drawn in candidates]), scores.argmax(dim=0))
    return Drawn(latents, sum((drawn.cost for drawn in candidates), cost))


def scores_by_guide(
    reader: Reader, arm: Arm, candidates: list[Drawn], part: Part
) -> tuple[torch.Tensor, Cost]:
    """The classifier's score of each picture's candidates (k, N), and what it cost."""
    start = time.process_time()
    guide = load_guide(reader.device)
    scores = [guide_score(guide, images_of(reader, arm, drawn), part.asked) for drawn in candidates]
    return torch.stack(scores), Cost(time.process_time() - start)


@torch.no_grad()
def images_of(reader: Reader, arm: Arm, drawn: Drawn) -> torch.Tensor:
    """The images (N, 3, H, W) in [0, 1] of finished latents."""
    latents = drawn.latents.to(reader.device)
    with bf16(reader, arm):
        parts = [decode(reader.models, latents[some], arm.sampler) for some in slices(len(latents))]
    return torch.cat(parts).float()
