"""Whether generated pictures show what their prompts say, decided by what a detector sees in them.

The detector's things are a symbolic scene, and a prompt's fact is held against it. A thing without a tint
has its sprite's own colour: an untinted guitar is red. What cannot be told, such as a diagonal, counts as not
shown. Prompts name no background, and a detected scene has none.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import permutations
from typing import Protocol

import numpy as np
import torch

from dpt.data.facts import Fact, Scene, is_true, matches, relates
from dpt.data.scenes import Prompt, own_hue
from dpt.evaluate import mean_share
from miniature.scenes import CLASSES, Thing


class Detector(Protocol):
    """What tells the things of images (N, 3, 64, 64) in [0, 1]."""

    def things(self, images: torch.Tensor) -> list[tuple[Thing, ...]]: ...


@dataclass(frozen=True)
class Alignment:
    """How far one picture shows a fact; None where the fact makes no such claim.

    Args:
        presence: share of the phrases whose class is there at all.
        count: share of the named classes that are there in exactly the named number, whatever the colours.
        binding: share of the phrases with a colour whose class is there in this colour.
        relation: 1 where the named things stand as the fact says, else 0.
        full: 1 where all of the caption is true, else 0.
    """

    presence: float
    count: float
    binding: float | None
    relation: float | None
    full: float


MEASURES = tuple(field.name for field in fields(Alignment))
Judged = tuple[Prompt, Alignment]


def as_seen(scene: Scene) -> Scene:
    """The scene with each untinted thing in its sprite's own colour, where it has one."""
    things = [replace(t, colour=t.colour or own_hue(CLASSES[t.class_index].name)) for t in scene.things]
    return replace(scene, things=tuple(things))


def align(fact: Fact, scene: Scene) -> Alignment:
    """How far a scene shows a fact."""
    scene = as_seen(scene)
    there = [CLASSES[thing.class_index].name for thing in scene.things]
    wanted = {}
    for phrase in fact.phrases:
        wanted[phrase.name] = wanted.get(phrase.name, 0) + phrase.number
    coloured = [phrase for phrase in fact.phrases if phrase.colour]
    bound = [any(matches(phrase, thing) for thing in scene.things) for phrase in coloured]
    return Alignment(
        presence=_mean(phrase.name in there for phrase in fact.phrases),
        count=_mean(there.count(name) == number for name, number in wanted.items()),
        binding=_mean(bound),
        relation=float(_stand_so(fact, scene)) if fact.relation else None,
        full=float(is_true(fact, scene)),
    )


def _mean(values: Iterable[float]) -> float | None:
    """The mean, or None of nothing."""
    values = list(values)
    return sum(values) / len(values) if values else None


def _stand_so(fact: Fact, scene: Scene) -> bool:
    first, second = fact.phrases
    return any(
        matches(first, a) and matches(second, b) and relates(a, fact.relation, b)
        for a, b in permutations(scene.things, 2)
    )


def alignments(detector: Detector, prompts: Sequence[Prompt], images: torch.Tensor) -> list[Judged]:
    """Each picture's alignment with its prompt.

    Args:
        prompts: of each image; one with several pictures comes several times.
        images: (N, 3, 64, 64) in [0, 1].
    """
    seen = detector.things(images)
    return [(prompt, align(prompt.fact, Scene(things))) for prompt, things in zip(prompts, seen, strict=True)]


# Figures.


def alignment_figures(found: Sequence[Judged]) -> dict:
    """All figures as JSON takes them: of all prompts, by kind, and by whether training has shown what they
    name.

    Each measure has its mean with a bootstrap interval of 95 % over prompts, of which each is the mean of its
    pictures; or None where no prompt makes such a claim.
    """
    kinds = dict.fromkeys(prompt.kind for prompt, _ in found)
    sides = {"seen": [], "held out": []}
    for prompt, alignment in found:
        sides["held out" if prompt.held_out else "seen"].append((prompt, alignment))
    return {
        "all": _figures(found),
        "by_kind": {kind: _figures([one for one in found if one[0].kind == kind]) for kind in kinds},
        "by_held_out": {side: _figures(some) for side, some in sides.items() if some},
    }


def _figures(found: Sequence[Judged]) -> dict:
    pictures = {}
    for prompt, alignment in found:
        pictures.setdefault(prompt, []).append(alignment)
    told = {"prompts": len(pictures), "pictures": len(found)}
    for measure in MEASURES:
        claimed = [[getattr(alignment, measure) for alignment in some] for some in pictures.values()]
        means = [np.mean(values).item() for values in claimed if None not in values]
        told[measure] = mean_share(means) if means else None
    return told
