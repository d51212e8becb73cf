"""What a caption says of a scene, as a structure, so that its truth is exact.

A :class:`Fact` is a caption's claim: how many of what, of which colour, in which relation, on which
background. :func:`verdict` holds it against a symbolic scene and answers yes, no, or cannot tell: a diagonal
is neither clearly "above" nor clearly "left of", and a sprite's own colour may be any.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache

from miniature.scenes import CAPTION_FORMS, CLASSES, HUES, TINTABLE, Thing, plural, with_article

NUMBERS = {2: "two", 3: "three"}
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
# Axis (0 is x), and the sign of second - first along it.
DIRECTIONS = {"left of": (0, 1), "right of": (0, -1), "above": (1, 1), "below": (1, -1)}
RELATIONS = tuple(DIRECTIONS)
JOINTS = ("and", "next to")
CLEARLY = 1.5  # a relation holds where its axis is this much longer than the other
FAINTLY = 1 / 3  # and fails where it is no longer than this share of the other
HELD_OUT_RELATIONS = 10  # one in so many (class, relation, class) is held out


@dataclass(frozen=True)
class Scene:
    """A symbolic scene: its things, boxes in pixels, and the background's colour word (None: unknown)."""

    things: tuple[Thing, ...]
    background: str | None = None


@dataclass(frozen=True)
class Phrase:
    """A noun phrase: exactly ``number`` (1 to 3) things of a class, of a colour where one is named."""

    name: str
    colour: str | None = None
    number: int = 1

    @property
    def noun(self) -> str:
        """The words without article or number, in the singular."""
        return f"{self.colour} {self.name}" if self.colour else self.name

    @property
    def text(self) -> str:
        """The words as captions have them: "a red car", "two frogs"."""
        if self.number == 1:
            return with_article(self.noun)
        return f"{NUMBERS[self.number]} {plural(self.noun)}"


@dataclass(frozen=True)
class Fact:
    """A caption's claim.

    Args:
        phrases: one to three; each counts its own things.
        relation: of the first phrase to the second, one of ``RELATIONS``; None claims none.
        background: its colour word; None claims none.
    """

    phrases: tuple[Phrase, ...]
    relation: str | None = None
    background: str | None = None


@dataclass(frozen=True)
class Wording:
    """The words of a caption that claim nothing: its form, with one {}, and what joins two things."""

    form: str = CAPTION_FORMS[0]
    joint: str = "and"


def caption(fact: Fact, wording: Wording) -> str:
    """The fact in words."""
    nouns = [phrase.text for phrase in fact.phrases]
    if len(nouns) == 2:
        said = f"{nouns[0]} {fact.relation or wording.joint} {nouns[1]}"
    else:
        said = " and ".join([*filter(None, [", ".join(nouns[:-1])]), nouns[-1]])
    text = wording.form.format(said)
    return f"{text} on a {fact.background} background" if fact.background else text


# Truth: True, False, or None where it cannot be told.


def all_of(verdicts: Iterable[bool | None]) -> bool | None:
    """Whether all are true; None where that hangs on those that cannot be told."""
    seen = set(verdicts)
    if False in seen:
        return False
    return None if None in seen else True


def any_of(verdicts: Iterable[bool | None]) -> bool | None:
    """Whether one at least is true; None where that hangs on those that cannot be told."""
    answer = all_of(None if v is None else not v for v in verdicts)
    return None if answer is None else not answer


def matches(phrase: Phrase, thing: Thing) -> bool | None:
    """Whether one thing is what the phrase names; its number plays no part."""
    if CLASSES[thing.class_index].name != phrase.name:
        return False
    if phrase.colour is None:
        return True
    # The sprite's own colour may look like any.
    return None if thing.colour is None else thing.colour == phrase.colour


def relates(first: Thing, relation: str, second: Thing) -> bool | None:
    """Whether the centres of two boxes stand in a relation."""
    offsets = [second.box[i] + second.box[i + 2] - first.box[i] - first.box[i + 2] for i in (0, 1)]
    axis, sign = DIRECTIONS[relation]
    along = sign * offsets[axis]
    across = abs(offsets[1 - axis])
    if along > 0 and along >= CLEARLY * across:
        return True
    return False if along <= FAINTLY * across else None


def counted(phrase: Phrase, scene: Scene, at_least: bool = False) -> bool | None:
    """Whether the scene holds exactly the phrase's number of its things, or no fewer with ``at_least``."""
    found = [matches(phrase, thing) for thing in scene.things]
    sure = found.count(True)
    most = sure + found.count(None)
    if most < phrase.number or (sure > phrase.number and not at_least):
        return False
    if at_least:
        return True if sure >= phrase.number else None
    return True if sure == most else None


def verdict(fact: Fact, scene: Scene, at_least: bool = False) -> bool | None:
    """Whether a fact is true of a scene.

    Numbers are exact and "a frog" is one frog, for the world's captions name all there is. With ``at_least``
    they are lower bounds, which makes more facts true.
    """
    claims = [counted(phrase, scene, at_least) for phrase in fact.phrases]
    if fact.relation:
        first, second = fact.phrases
        claims.append(
            any_of(
                all_of((matches(first, a), matches(second, b), relates(a, fact.relation, b)))
                for a in scene.things
                for b in scene.things
                if a is not b
            )
        )
    if fact.background:
        claims.append(None if scene.background is None else scene.background == fact.background)
    return all_of(claims)


def is_true(fact: Fact, scene: Scene) -> bool:
    """Whether the scene proves the fact true."""
    return verdict(fact, scene) is True


def is_false(fact: Fact, scene: Scene, at_least: bool = False) -> bool:
    """Whether the scene proves the fact false; with ``at_least`` even where numbers are lower bounds."""
    return verdict(fact, scene, at_least) is False


# Combinations held out of training.

Combination = tuple[str, ...]  # (class, colour), or (class, "left of" or "above", class)


def _hashed(combination: Combination) -> int:
    return int.from_bytes(hashlib.sha256("|".join(combination).encode()).digest()[:8])


@cache
def is_held_out(combination: Combination) -> bool:
    """Whether training never shows a combination: one colour of each class that takes a tint, and one in
    ``HELD_OUT_RELATIONS`` of the relations. It follows from a hash of the words alone."""
    if len(combination) == 2:
        name, colour = combination
        return name in TINTABLE and colour == min(HUES, key=lambda hue: _hashed((name, hue)))
    return _hashed(combination) % HELD_OUT_RELATIONS == 0


def in_one_direction(first: str, relation: str, second: str) -> Combination:
    """The same relation of two classes, told by "left of" or "above"."""
    if relation in ("left of", "above"):
        return first, relation, second
    return second, OPPOSITE[relation], first


def shown(things: tuple[Thing, ...]) -> set[Combination]:
    """The combinations that a picture shows, those of an unclear relation included."""
    names = [CLASSES[thing.class_index].name for thing in things]
    found = {(name, thing.colour) for name, thing in zip(names, things, strict=True) if thing.colour}
    for name, first in zip(names, things, strict=True):
        for other, second in zip(names, things, strict=True):
            if name != other:
                held = (r for r in ("left of", "above") if relates(first, r, second) is not False)
                found |= {(name, relation, other) for relation in held}
    return found


def named(fact: Fact) -> set[Combination]:
    """The combinations that a fact names."""
    found = {(phrase.name, phrase.colour) for phrase in fact.phrases if phrase.colour}
    if fact.relation:
        first, second = fact.phrases
        found.add(in_one_direction(first.name, fact.relation, second.name))
    return found


def held_out(what: Scene | Fact) -> bool:
    """Whether a scene shows, or a fact names, a combination that training never shows."""
    return any(map(is_held_out, named(what) if isinstance(what, Fact) else shown(what.things)))


# Referring expressions.

# How the ends of a direction and the article are said.
WORDINGS = {
    "the": (
        "the ",
        {"left of": "leftmost", "right of": "rightmost", "above": "topmost", "below": "bottommost"},
    ),
    "bare": ("", {"left of": "left", "right of": "right", "above": "top", "below": "bottom"}),
}
EXTREME_MARGIN = 6  # pixels between the centres of the outermost thing and the next


@dataclass(frozen=True)
class Reference:
    """What a referring expression says of its thing.

    Args:
        phrase: the thing's own class and colour.
        relation: to the landmark; without one, the thing is the outermost of its like in this direction.
        landmark: another thing, which must be the only one of its phrase.
    """

    phrase: Phrase
    relation: str | None = None
    landmark: Phrase | None = None

    @property
    def kind(self) -> str:
        """ "name", "colour", "outermost" or "relation"."""
        if self.landmark:
            return "relation"
        if self.relation:
            return "outermost"
        return "colour" if self.phrase.colour else "name"

    def text(self, wording: str) -> tuple[str, tuple[int, int]]:
        """The expression, and the characters (start, end) of it that name the thing, article left out."""
        article, outermost = WORDINGS[wording]
        noun = self.phrase.noun
        if self.kind == "outermost":
            noun = f"{outermost[self.relation]} {noun}"
        rest = f" {self.relation} {article}{self.landmark.noun}" if self.landmark else ""
        return f"{article}{noun}{rest}", (len(article), len(article) + len(noun))


def referents(reference: Reference, scene: Scene) -> list[bool | None]:
    """For each thing of the scene, whether the reference means it."""
    alike = [matches(reference.phrase, thing) for thing in scene.things]
    if reference.kind in ("name", "colour"):
        return alike
    if reference.kind == "outermost":
        return _outermost(reference.relation, alike, scene.things)
    landmarks = [matches(reference.landmark, thing) for thing in scene.things]
    if landmarks.count(True) != 1 or None in landmarks:
        return [None] * len(alike)
    landmark = scene.things[landmarks.index(True)]
    return [
        False if thing is landmark else all_of((fits, relates(thing, reference.relation, landmark)))
        for fits, thing in zip(alike, scene.things, strict=True)
    ]


def _outermost(relation: str, alike: list[bool | None], things: tuple[Thing, ...]) -> list[bool | None]:
    axis, sign = DIRECTIONS[relation]
    # Twice the centre, the outermost the smallest.
    places = [sign * (thing.box[axis] + thing.box[axis + 2]) for thing in things]
    ranked = sorted(place for place, fits in zip(places, alike, strict=True) if fits is not False)
    if None in alike or len(ranked) < 2 or ranked[1] - ranked[0] < 2 * EXTREME_MARGIN:
        return [None] * len(things)
    return [bool(fits) and place == ranked[0] for place, fits in zip(places, alike, strict=True)]


def references(scene: Scene) -> list[tuple[Reference, int]]:
    """All references that mean exactly one thing of the scene, each with that thing's index."""
    phrases = [Phrase(CLASSES[thing.class_index].name) for thing in scene.things]
    tinted = [replace(p, colour=t.colour) for p, t in zip(phrases, scene.things, strict=True) if t.colour]
    every = list(dict.fromkeys([*phrases, *tinted]))
    candidates = [Reference(phrase) for phrase in every]
    candidates += [Reference(phrase, relation) for phrase in every for relation in RELATIONS]
    candidates += [
        Reference(first, relation, second)
        for first in every
        for second in every
        for relation in RELATIONS
        if first.name != second.name
    ]
    found = []
    for candidate in candidates:
        meant = referents(candidate, scene)
        if meant.count(True) == 1 and None not in meant:
            found.append((candidate, meant.index(True)))
    return found
