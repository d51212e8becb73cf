"""``--data miniature``: scenes of one to three sprites, rendered on the fly, with negatives that are provably
false.

A hard negative is a second plan of the same picture in which one fact differs: background, places, sizes,
rotations and mirroring stay. Both plans are drawn, both are described in the same way, and a pair counts
only if the symbolic scenes prove each caption true of its own picture and false of the other. The two sides
of a kind are drawn alike, so that no caption betrays itself by its words.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import torch
from PIL import Image

from discriminative.errors import UsageError, WorkError
from dpt.data.facts import (
    JOINTS,
    RELATIONS,
    WORDINGS,
    Fact,
    Phrase,
    Scene,
    Wording,
    caption,
    held_out,
    is_false,
    is_true,
    references,
    relates,
)
from dpt.data.samples import Grounding, Picture, Sample, check_least, to_cxcywh
from miniature.scenes import (
    BACKGROUNDS,
    CAPTION_FORMS,
    CLASSES,
    GROUPS,
    HUES,
    PLACES,
    PLAIN,
    SIDES,
    SIZE,
    SPLITS,
    TINTABLE,
    Plan,
    draw,
    plan_backdrop,
    plan_thing,
    sprite,
)

KINDS = ("recolour", "swap colours", "swap things", "invert relation", "count", "object")
PROMPT_KINDS = ("presence", "count", "attribute", "relation")
CLAIMS = (*PROMPT_KINDS, "conjunction")  # all that a prompt may claim
STREAM = 2403  # apart from the streams of miniature.scenes.render
PROMPT_STREAM = 4321

NUMBER_SHARES = {1: 0.3, 2: 0.4, 3: 0.3}  # how many things, where the kind leaves it open
TINTED_SHARE = 0.7  # of the things that take a tint
TWIN_SHARE = 0.35  # of three things, that two are of one class in two colours
RELATION_SHARE = 0.4  # of captions of two things that may say how they stand
BACKGROUND_SHARE = 0.3  # of captions
JITTER = 3  # pixels, of a place
MOST_OVERLAP = 0.12  # of the smaller box
LEAST_COLOURED = 0.4  # of a sprite's pixels, for it to have a hue
TRIES = 3000

INDEX = {c.name: c.index for c in CLASSES}
# Two kinds of one thing, too alike at 20 pixels to replace each other.
SIBLING = {a: b for g in GROUPS if g.fine for a, b in ((g.common, g.rare), (g.rare, g.common))}


@dataclass(frozen=True)
class Told:
    """A picture (RGB, 64x64), what it shows, and what its caption says."""

    image: Image.Image
    scene: Scene
    fact: Fact
    caption: str


@dataclass(frozen=True)
class Pair:
    """A picture and its counterfactual: each caption is true of its own and false of the other.

    Args:
        kind: one of ``KINDS``.
        true: the picture.
        hard: the same with one fact changed.
    """

    kind: str
    true: Told
    hard: Told


# Plots: a plan and the plan of its counterfactual.


@dataclass(frozen=True)
class Plot:
    """A plan and its counterfactual.

    Args:
        plan: of the picture.
        hard_plan: the same with one fact changed.
        relation: the captions say how their two things stand.
        counted: the captions count.
        turned: the hard caption names the things in the other order.
    """

    plan: Plan
    hard_plan: Plan
    relation: bool = False
    counted: bool = False
    turned: bool = False


def _cast(
    number: int, tinted: int, background: str, rng: np.random.Generator
) -> list[tuple[str, str | None]]:
    """Names and tints of things, ``tinted`` of them at least with a tint. No tint comes twice, none is the
    background's, and a class comes twice only in two tints."""
    hues = [str(hue) for hue in rng.permutation([hue for hue in HUES if hue != background])]
    names = [str(name) for name in rng.permutation(TINTABLE)[:tinted]]
    others = [c.name for c in CLASSES if c.name not in names]
    names += [str(name) for name in rng.permutation(others)[: number - tinted]]
    if number == 3 and names[0] in TINTABLE and rng.random() < TWIN_SHARE:
        names[2] = names[0]
        tinted = max(tinted, 1)
    tints = [
        hue
        if name in TINTABLE and (i < tinted or names.count(name) == 2 or rng.random() < TINTED_SHARE)
        else None
        for i, (name, hue) in enumerate(zip(names, hues, strict=False))
    ]
    cast = list(zip(names, tints, strict=True))
    return [cast[i] for i in rng.permutation(number)]


def _plan(
    cast: list[tuple[str, str | None]], background: str, straight: bool, rng: np.random.Generator
) -> Plan:
    """A plan of one to three things; ``straight`` leaves the diagonals out, where relations are unclear."""
    number = len(cast)
    sides = [rng.uniform(*SIDES[number]) for _ in cast]
    if number == 1:
        slack = (SIZE - sides[0]) / 2
        centres = [SIZE / 2 + rng.uniform(-slack, slack, size=2)]
    else:
        layouts = PLACES[number][:2] if straight else PLACES[number]
        layout = layouts[rng.integers(len(layouts))]
        centres = [p + rng.uniform(-JITTER, JITTER, size=2) for p in rng.permutation(layout)]
    things = [
        plan_thing(INDEX[name], tint, centre, side, rng)
        for (name, tint), centre, side in zip(cast, centres, sides, strict=True)
    ]
    return Plan(plan_backdrop(background, rng), tuple(things))


def _changed(plan: Plan, index: int, **changes) -> Plan:
    placements = list(plan.placements)
    placements[index] = replace(placements[index], **changes)
    return replace(plan, placements=tuple(placements))


def _background(rng: np.random.Generator) -> str:
    return BACKGROUNDS[rng.integers(len(BACKGROUNDS))]


def _some(rng: np.random.Generator, tinted: int, least: int = 1) -> tuple[Plan, bool]:
    """A plan of ``least`` to three things, and whether its captions say how its two things stand."""
    shares = {number: share for number, share in NUMBER_SHARES.items() if number >= least}
    number = int(rng.choice(list(shares), p=np.array(list(shares.values())) / sum(shares.values())))
    relation = number == 2 and rng.random() < RELATION_SHARE
    background = _background(rng)
    return _plan(_cast(number, tinted, background, rng), background, relation, rng), relation


def _recolour(rng: np.random.Generator) -> Plot:
    """One thing takes a tint that the picture does not have yet."""
    plan, relation = _some(rng, tinted=1)
    taken = {placement.colour for placement in plan.placements} | {plan.backdrop.colour}
    free = [hue for hue in HUES if hue not in taken]
    index = rng.choice([i for i, placement in enumerate(plan.placements) if placement.colour])
    return Plot(plan, _changed(plan, index, colour=free[rng.integers(len(free))]), relation)


def _swap_colours(rng: np.random.Generator) -> Plot:
    """Two things of different classes exchange their tints."""
    plan, relation = _some(rng, tinted=2, least=2)
    tinted = [i for i, placement in enumerate(plan.placements) if placement.colour]
    pairs = [
        (i, j)
        for i in tinted
        for j in tinted
        if i < j and plan.placements[i].class_index != plan.placements[j].class_index
    ]
    i, j = pairs[rng.integers(len(pairs))]
    hard = _changed(plan, i, colour=plan.placements[j].colour)
    return Plot(plan, _changed(hard, j, colour=plan.placements[i].colour), relation)


def _exchange(rng: np.random.Generator) -> Plot:
    """Two things exchange their places."""
    background = _background(rng)
    plan = _plan(_cast(2, 0, background, rng), background, True, rng)
    first, second = plan.placements
    hard = _changed(_changed(plan, 0, centre=second.centre), 1, centre=first.centre)
    return Plot(plan, hard, relation=True)


def _swap_things(rng: np.random.Generator) -> Plot:
    """They exchange their places, and the caption their nouns."""
    return replace(_exchange(rng), turned=True)


def _count(rng: np.random.Generator) -> Plot:
    """One thing more or less of one class; the others stay where they are."""
    background = _background(rng)
    more = int(rng.integers(2, 4))
    name = PLAIN[rng.integers(len(PLAIN))]
    hues = rng.permutation([hue for hue in HUES if hue != background])
    tinted = name in TINTABLE and rng.random() < TINTED_SHARE
    cast = [(name, str(hue) if tinted else None) for hue in hues[:more]]
    plan = _plan(cast, background, False, rng)
    fewer = replace(plan, placements=plan.placements[:-1])
    # Either way round equally often, or "two" would betray a negative.
    return Plot(plan, fewer, counted=True) if rng.random() < 0.5 else Plot(fewer, plan, counted=True)


def _object(rng: np.random.Generator) -> Plot:
    """Another class takes the place, size and tint of one thing."""
    plan, relation = _some(rng, tinted=0)
    names = [CLASSES[placement.class_index].name for placement in plan.placements]
    # Twins stay, or two of one class would betray a true caption.
    index = rng.choice([i for i, name in enumerate(names) if names.count(name) == 1])
    pool = TINTABLE if plan.placements[index].colour else INDEX
    free = [name for name in pool if name not in names and SIBLING.get(name) != names[index]]
    return Plot(plan, _changed(plan, index, class_index=INDEX[free[rng.integers(len(free))]]), relation)


PLOTS = dict(zip(KINDS, (_recolour, _swap_colours, _swap_things, _exchange, _count, _object), strict=True))


# From plots to pairs.


def describe(
    scene: Scene, relation: bool, counted: bool, background: bool, turned: bool = False
) -> Fact | None:
    """What a caption says of a scene; None where it was to say a relation and none is clear."""
    things = scene.things[::-1] if turned else scene.things
    ground = scene.background if background else None
    names = [CLASSES[thing.class_index].name for thing in things]
    if counted:
        return Fact((Phrase(names[0], number=len(things)),), None, ground)
    phrases = tuple(Phrase(name, thing.colour) for name, thing in zip(names, things, strict=True))
    if not relation:
        return Fact(phrases, None, ground)
    clear = [r for r in RELATIONS if relates(things[0], r, things[1])]
    return Fact(phrases, clear[0], ground) if clear else None


@cache
def own_hue(name: str) -> str | None:
    """The colour word nearest to most coloured pixels of an untinted sprite; None where few are coloured."""
    pixels = np.asarray(sprite(name).convert("RGB").convert("HSV"), dtype=float)  # (H, W, 3)
    opaque = np.asarray(sprite(name))[..., 3] > 127  # (H, W)
    coloured = opaque & (pixels[..., 1] > 60)  # (H, W)
    if coloured.sum() < LEAST_COLOURED * opaque.sum():
        return None
    degrees = pixels[..., 0][coloured, None] * 360 / 255  # (N, 1)
    away = np.abs((degrees - np.array(list(HUES.values())) + 180) % 360 - 180)  # (N, hues)
    shares = np.bincount(away.argmin(1), minlength=len(HUES)) / len(away)  # (hues,)
    return list(HUES)[shares.argmax()] if shares.max() > 0.5 else None


def hidden(scene: Scene) -> bool:
    """Whether an untinted thing stands before a background of its own colour."""
    names = [CLASSES[thing.class_index].name for thing in scene.things if thing.colour is None]
    return scene.background in map(own_hue, names)


def crowded(scene: Scene) -> bool:
    """Whether two boxes share more than ``MOST_OVERLAP`` of the smaller one."""
    for i, a in enumerate(scene.things):
        for b in scene.things[:i]:
            width = min(a.box[2], b.box[2]) - max(a.box[0], b.box[0])
            height = min(a.box[3], b.box[3]) - max(a.box[1], b.box[1])
            areas = [(t.box[2] - t.box[0]) * (t.box[3] - t.box[1]) for t in (a, b)]
            if min(width, height) > 0 and width * height > MOST_OVERLAP * min(areas):
                return True
    return False


def sound(true: Told, hard: Told) -> bool:
    """Whether the scenes prove each fact true of its own picture and false of the other."""
    return (
        is_true(true.fact, true.scene)
        and is_true(hard.fact, hard.scene)
        and is_false(hard.fact, true.scene)
        and is_false(true.fact, hard.scene)
    )


def apart(first: Told, second: Told) -> bool:
    """Whether two pictures serve as each other's random negative: false both ways, even where "a frog"
    stands for several."""
    return is_false(first.fact, second.scene, at_least=True) and is_false(
        second.fact, first.scene, at_least=True
    )


@dataclass(frozen=True)
class Choice:
    """Which pictures will do.

    Args:
        true: whether a picture with its caption serves as one that is true.
        hard: whether one serves as its counterfactual.
    """

    true: Callable[[Told], bool]
    hard: Callable[[Told], bool]


def _any(told: Told) -> bool:
    return True


def _seen(told: Told) -> bool:
    return not held_out(told.scene)


def _held_out(told: Told) -> bool:
    return held_out(told.scene)


CHOICES = {"any": Choice(_any, _any), "seen": Choice(_seen, _seen), "held out": Choice(_held_out, _any)}


@dataclass(frozen=True)
class Draft:
    """A plot with the choice of words that its two captions share."""

    plot: Plot
    wording: Wording
    background: bool

    def tell(self, hard: bool = False) -> Told | None:
        """One side, drawn and described; None where it cannot be told, or is not seen well."""
        plan = self.plot.hard_plan if hard else self.plot.plan
        image, things = draw(plan)
        scene = Scene(things, plan.backdrop.colour)
        turned = hard and self.plot.turned
        fact = describe(scene, self.plot.relation, self.plot.counted, self.background, turned)
        if fact is None or hidden(scene) or crowded(scene) or not references(scene):
            return None
        return Told(image, scene, fact, caption(fact, self.wording))


def _draft(kind: str, rng: np.random.Generator) -> Draft:
    wording = Wording(CAPTION_FORMS[rng.integers(len(CAPTION_FORMS))], JOINTS[rng.integers(len(JOINTS))])
    return Draft(PLOTS[kind](rng), wording, bool(rng.random() < BACKGROUND_SHARE))


def draw_pair(kind: str, rng: np.random.Generator, choice: Choice = CHOICES["any"]) -> Pair:
    """A picture with its counterfactual.

    Args:
        kind: one of ``KINDS``.
        rng: all that is drawn at random comes from it.
        choice: which pictures will do.

    Raises:
        WorkError: none was found in ``TRIES``.
    """
    for _ in range(TRIES):
        draft = _draft(kind, rng)
        true = draft.tell()
        if true is None or not choice.true(true):
            continue
        hard = draft.tell(hard=True)
        if hard is not None and choice.hard(hard) and sound(true, hard):
            return Pair(kind, true, hard)
    raise WorkError(f"no scene for {kind!r} was found in {TRIES} tries")


def draw_other(than: Told, rng: np.random.Generator, choice: Choice = CHOICES["any"]) -> Told:
    """A picture of any kind that serves as a random negative; arguments and errors of :func:`draw_pair`."""
    for _ in range(TRIES):
        told = _draft(KINDS[rng.integers(len(KINDS))], rng).tell()
        if told is not None and choice.hard(told) and is_true(told.fact, told.scene) and apart(than, told):
            return told
    raise WorkError(f"no scene apart from {than.caption!r} was found in {TRIES} tries")


def _picture(told: Told, key: str) -> Picture:
    pixels = torch.from_numpy(np.array(told.image))  # (H, W, 3)
    return Picture(key, pixels.permute(2, 0, 1).float() / 255)  # (3, H, W)


def _ground(scene: Scene, wording: str, rng: np.random.Generator) -> Grounding:
    """One of the scene's expressions, each sort of them equally often where there are several."""
    found = references(scene)
    sorts = sorted({reference.kind for reference, _ in found})
    sort = sorts[rng.integers(len(sorts))]
    found = [(reference, index) for reference, index in found if reference.kind == sort]
    reference, index = found[rng.integers(len(found))]
    expression, span = reference.text(wording)
    box = torch.tensor([to_cxcywh(scene.things[index].box, SIZE, SIZE)])  # (1, 4)
    return Grounding(expression, box, ((span,),))


class Miniature:
    """The miniature's scenes, images (3, 64, 64).

    Args:
        split: "train", "validation" or "test"; each draws from its own stream.
        samples: how many, at least 1. The kind of hard negative goes round with the index.
        seed: of the whole data set, 0 or more.
        combinations: what the pictures show: "seen" nothing held out, "held out" something held out, "any"
            both. Training is always "seen".
        wording: of the expressions: "the" gives "the leftmost red car", "bare" gives "left red car".

    Raises:
        UsageError: an argument outside these.
    """

    def __init__(
        self,
        split: str = "train",
        samples: int = 12_000,
        seed: int = 0,
        combinations: str = "any",
        wording: str = "the",
    ):
        for flag, given, allowed in (
            ("split", split, SPLITS),
            ("combinations", combinations, CHOICES),
            ("wording", wording, WORDINGS),
        ):
            if given not in allowed:
                raise UsageError(f"--{flag}: {given!r} was given; allowed is {', '.join(allowed)}")
        check_least("samples", samples, 1)
        check_least("seed", seed, 0)
        if split == "train" and combinations == "held out":
            raise UsageError("--combinations: 'held out' was given for train; allowed there is seen or any")
        self.split = split
        self.samples = samples
        self.seed = seed
        self.wording = wording
        self.choice_name = "seen" if split == "train" else combinations
        self.epoch = 0

    def __len__(self) -> int:
        return self.samples

    def set_epoch(self, epoch: int) -> None:
        """Other scenes in training, of the same kinds; validation and test stay."""
        self.epoch = epoch if self.split == "train" else 0

    def story(self, index: int) -> tuple[Pair, Told]:
        """The scenes and facts behind a sample: its pair, and its random negative.

        Raises:
            IndexError: no such sample.
        """
        return self._story(index, self._generator(index))

    def __getitem__(self, index: int) -> Sample:
        rng = self._generator(index)
        pair, other = self._story(index, rng)
        which = self.choice_name.replace(" ", "_")
        key = f"miniature-{self.seed}-{self.split}-{which}-{self.epoch}-{index}"
        return Sample(
            picture=_picture(pair.true, f"{key}-true"),
            hard_picture=_picture(pair.hard, f"{key}-hard"),
            random_picture=_picture(other, f"{key}-random"),
            caption=pair.true.caption,
            hard_caption=pair.hard.caption,
            random_caption=other.caption,
            kind=pair.kind,
            grounding=_ground(pair.true.scene, self.wording, rng),
        )

    def _generator(self, index: int) -> np.random.Generator:
        if not 0 <= index < self.samples:
            raise IndexError(f"sample {index} of {self.samples}")
        return np.random.default_rng([STREAM, self.seed, SPLITS[self.split], self.epoch, index])

    def _story(self, index: int, rng: np.random.Generator) -> tuple[Pair, Told]:
        pair = draw_pair(KINDS[index % len(KINDS)], rng, CHOICES[self.choice_name])
        return pair, draw_other(pair.true, rng, CHOICES[self.choice_name])


# Prompts to generate pictures by.


@dataclass(frozen=True)
class Prompt:
    """A prompt for the model, with what its picture has to show."""

    text: str
    fact: Fact
    kind: str  # one of CLAIMS

    @property
    def held_out(self) -> bool:
        """Whether training never shows what it names."""
        return held_out(self.fact)


def _claim(kind: str, rng: np.random.Generator) -> Fact:
    if kind == "presence":
        return Fact((Phrase(CLASSES[rng.integers(len(CLASSES))].name),))
    if kind == "count":
        return Fact((Phrase(PLAIN[rng.integers(len(PLAIN))], number=int(rng.integers(2, 4))),))
    if kind == "attribute":
        names = rng.permutation(TINTABLE)[:2]
        hues = rng.permutation(list(HUES))
        return Fact(tuple(Phrase(str(n), str(h)) for n, h in zip(names, hues, strict=False)))
    names = rng.permutation([c.name for c in CLASSES])[:2]
    relation = RELATIONS[rng.integers(len(RELATIONS))] if kind == "relation" else None
    return Fact(tuple(Phrase(str(name)) for name in names), relation)


def prompts(kind: str, number: int, seed: int) -> list[Prompt]:
    """Prompts with their facts, in the captions' forms.

    Args:
        kind: "presence" (one thing), "count" (two or three of one class), "attribute" (two things in two
            tints), "relation" (two things) or "conjunction" (two things, and no more said).
        number: of prompts, 1 or more. None comes twice while there are others.
        seed: 0 or more; the same is the same list, and a longer list begins with the shorter one.

    Raises:
        UsageError: an argument outside these.
    """
    if kind not in CLAIMS:
        raise UsageError(f"--prompts: {kind!r} was given; allowed is {', '.join(CLAIMS)}")
    check_least("prompts", number, 1)
    check_least("seed", seed, 0)
    rng = np.random.default_rng([PROMPT_STREAM, seed, CLAIMS.index(kind)])
    found = []
    texts = set()
    again = 0
    while len(found) < number:
        wording = Wording(CAPTION_FORMS[rng.integers(len(CAPTION_FORMS))], JOINTS[rng.integers(len(JOINTS))])
        fact = _claim(kind, rng)
        prompt = Prompt(caption(fact, wording), fact, kind)
        again = again + 1 if prompt.text in texts else 0
        if again == 0 or again > TRIES:
            found.append(prompt)
            texts.add(prompt.text)
    return found


def draw_fact(fact: Fact, rng: np.random.Generator) -> Image.Image:
    """A render (RGB, 64x64) that shows a prompt's fact, on any background.

    Raises:
        WorkError: none was found in ``TRIES``.
    """
    cast = [(phrase.name, phrase.colour) for phrase in fact.phrases for _ in range(phrase.number)]
    for _ in range(TRIES):
        plan = _plan(cast, _background(rng), fact.relation is not None, rng)
        image, things = draw(plan)
        scene = Scene(things, plan.backdrop.colour)
        tints = [colour for _, colour in cast]
        if (
            scene.background not in tints
            and not hidden(scene)
            and not crowded(scene)
            and is_true(fact, scene)
        ):
            return image
    raise WorkError(f"no scene of {fact} was found in {TRIES} tries")
