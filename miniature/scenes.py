"""The picture world of the miniature: sprites composed into 64x64 scenes, with captions and exact content.

A scene holds one to three things on a plain or graded background. Its *content* is exact (class, colour
and box of each thing); its *caption* is as imprecise as captions are: a word such as "bat" stands for two
classes, and only some captions use the precise phrase ("cricket bat"). That gap is what a class token has
to bridge.

Everything follows from ``(seed, split, index)``, so scenes need not be stored, and the three splits draw from
separate random streams.
"""

from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

SPRITES = Path(__file__).parent / "sprites"
SIZE = 64  # pixels, height and width of a scene
SPLITS = {"train": 0, "validation": 1, "test": 2}
WORLD_SEED = 2023

# Share of a group's scenes that show the common sense, and of its captions that use the word both senses
# share.
COMMON_SHARE = 0.75
IMPRECISE_SHARE = 0.4


@dataclass(frozen=True)
class Group:
    """Two classes that share one word; ``fine`` marks two kinds of one thing rather than two meanings."""

    word: str
    common: str
    rare: str
    fine: bool = False


GROUPS = (
    Group("bat", "fruit bat", "cricket bat"),
    Group("mouse", "field mouse", "computer mouse"),
    Group("bow", "ribbon bow", "archery bow"),
    Group("nut", "peanut", "metal nut"),
    Group("keyboard", "computer keyboard", "piano keyboard"),
    Group("drum", "snare drum", "oil drum"),
    Group("palm", "palm tree", "hand palm"),
    Group("chicken", "farm chicken", "fried chicken"),
    Group("phone", "mobile phone", "dial phone"),
    Group("cup", "coffee cup", "trophy cup"),
    Group("ball", "soccer ball", "crystal ball"),
    Group("tiger cat", "wild tiger", "house cat", fine=True),
    Group("dog", "pet dog", "guide dog", fine=True),
    Group("camel", "bactrian", "dromedary", fine=True),
    Group("sheep", "ewe", "ram", fine=True),
    Group("apple", "red apple", "green apple", fine=True),
)
PLAIN = (
    "frog",
    "rocket",
    "mushroom",
    "pizza",
    "sunflower",
    "butterfly",
    "penguin",
    "guitar",
    "cactus",
    "umbrella",
    "octopus",
    "car",
)
PLURALS = {"cactus": "cacti", "butterfly": "butterflies", "octopus": "octopuses"}  # the rest take an s
TINTABLE = ("butterfly", "umbrella", "guitar", "mushroom", "octopus", "car", "rocket")
# Hue in degrees, for tinted things and for backgrounds; the last two are backgrounds only.
HUES = {"red": 0.0, "yellow": 52.0, "green": 120.0, "blue": 220.0, "purple": 285.0}
BACKGROUNDS = (*HUES, "white", "gray")

CAPTION_FORMS = (
    "a photo of {}",
    "a photo of {}",
    "{}",
    "a high resolution realistic image of {}",
    "a close-up photo of {}",
    "a picture of {}",
    "a painting of {}",
)


@dataclass(frozen=True)
class SceneClass:
    """One class of the world. ``index`` counts from 0; ``name`` is precise, ``word`` is what captions
    often say."""

    index: int
    name: str
    word: str
    kind: str  # "common", "rare" or "plain"
    fine: bool

    @property
    def label(self) -> str:
        """The label as ImageNet writes them: synonyms, the captions' usual word first."""
        return self.name if self.kind == "plain" else f"{self.word}, {self.name}"


def _classes() -> tuple[SceneClass, ...]:
    rows = [(s, g.word, k, g.fine) for g in GROUPS for s, k in ((g.common, "common"), (g.rare, "rare"))]
    rows += [(name, name, "plain", False) for name in PLAIN]
    return tuple(SceneClass(i, *row) for i, row in enumerate(rows))


CLASSES = _classes()


@dataclass(frozen=True)
class Thing:
    """One drawn thing: class index from 0, tint (or None for the sprite's own colours), box (x0, y0, x1,
    y1) in pixels."""

    class_index: int
    colour: str | None
    box: tuple[int, int, int, int]


@dataclass(frozen=True)
class Backdrop:
    """A background: its colour word, RGB shades (0 to 255) of its two ends, the ramp's angle in radians."""

    colour: str
    first: tuple[int, int, int]
    second: tuple[int, int, int]
    angle: float


@dataclass(frozen=True)
class Placement:
    """How one thing is to be drawn: class index from 0, tint or None, centre (x, y) and longer side in
    pixels, whether mirrored, rotation in degrees."""

    class_index: int
    colour: str | None
    centre: tuple[float, float]
    side: float
    mirrored: bool
    angle: float


@dataclass(frozen=True)
class Plan:
    """All that a picture follows from; later placements lie over earlier ones."""

    backdrop: Backdrop
    placements: tuple[Placement, ...]


@dataclass(frozen=True)
class Scene:
    """A picture's exact content with its caption; ``things`` are ordered as the caption names them."""

    image: Image.Image  # RGB, 64x64
    caption: str
    precise_caption: str  # the same, with the precise phrase for each thing
    things: tuple[Thing, ...]
    background: str


@cache
def sprite(name: str, tint: str | None = None) -> Image.Image:
    """The committed sprite of a class as RGBA, recoloured where ``tint`` names a hue (alpha and shading
    stay)."""
    image = Image.open(SPRITES / f"{name.replace(' ', '_')}.png").convert("RGBA")
    if tint is None:
        return image
    alpha = image.getchannel("A")
    hue, saturation, value = (
        np.asarray(c, dtype=np.float32) for c in image.convert("RGB").convert("HSV").split()
    )
    # Only coloured parts take the tint: dark outlines, eyes and white spots stay, or the thing loses its
    # shape.
    coloured = saturation > 60
    hue = np.where(coloured, HUES[tint] / 360 * 255, hue)
    saturation = np.where(coloured, np.maximum(saturation, 190), saturation)
    hsv = [Image.fromarray(np.uint8(np.clip(c, 0, 255)), "L") for c in (hue, saturation, value)]
    rgb = Image.merge("HSV", hsv).convert("RGB")
    rgb.putalpha(alpha)
    return rgb


def plan_backdrop(colour: str, rng: np.random.Generator) -> Backdrop:
    """A background of a colour of ``BACKGROUNDS``, plain or linearly graded, its shade drawn at random."""

    def shade() -> tuple[int, int, int]:
        if colour in HUES:
            hue = (HUES[colour] + rng.uniform(-9, 9)) % 360
            hsv = (hue / 360 * 255, rng.uniform(70, 170), rng.uniform(170, 250))
        else:
            hsv = (0, 0, rng.uniform(240, 255) if colour == "white" else rng.uniform(95, 185))
        return Image.new("HSV", (1, 1), tuple(int(v) for v in hsv)).convert("RGB").getpixel((0, 0))

    first = shade()
    second = shade() if rng.random() < 0.5 else first
    return Backdrop(colour, first, second, rng.uniform(0, 2 * np.pi))


def plan_thing(
    class_index: int, colour: str | None, centre, side: float, rng: np.random.Generator
) -> Placement:
    """One sprite with its longer side ``side`` pixels at ``centre`` (x, y), slightly rotated, perhaps
    mirrored."""
    mirrored = bool(rng.random() < 0.5)
    return Placement(class_index, colour, tuple(map(float, centre)), side, mirrored, rng.uniform(-12, 12))


def draw(plan: Plan) -> tuple[Image.Image, tuple[Thing, ...]]:
    """The picture of a plan, RGB 64x64, and its things in the plan's order. Nothing is drawn at random."""
    canvas = _background(plan.backdrop)
    things = tuple(_paste(canvas, placement) for placement in plan.placements)
    return canvas, things


def _background(backdrop: Backdrop) -> Image.Image:
    first = np.asarray(backdrop.first, dtype=np.float32)
    second = np.asarray(backdrop.second, dtype=np.float32)
    y, x = np.mgrid[0:SIZE, 0:SIZE] / (SIZE - 1) - 0.5
    ramp = np.clip(0.5 + (x * np.cos(backdrop.angle) + y * np.sin(backdrop.angle)) / 1.42, 0, 1)[..., None]
    return Image.fromarray(np.uint8(first * (1 - ramp) + second * ramp))


def _paste(canvas: Image.Image, placement: Placement) -> Thing:
    """Paste one sprite, moved into the picture where it would stick out."""
    picture = sprite(CLASSES[placement.class_index].name, placement.colour)
    if placement.mirrored:
        picture = ImageOps.mirror(picture)
    picture = picture.rotate(placement.angle, Image.Resampling.BICUBIC, expand=True)
    picture = picture.crop(picture.getchannel("A").getbbox())
    scale = placement.side / max(picture.size)
    picture = picture.resize([max(1, round(n * scale)) for n in picture.size], Image.Resampling.LANCZOS)
    x = int(np.clip(round(placement.centre[0] - picture.width / 2), 0, SIZE - picture.width))
    y = int(np.clip(round(placement.centre[1] - picture.height / 2), 0, SIZE - picture.height))
    canvas.paste(picture, (x, y), picture)
    box = (x, y, x + picture.width, y + picture.height)
    return Thing(placement.class_index, placement.colour, box)


def _class_weights() -> np.ndarray:
    # A group has more to tell apart than a plain noun, so it is shown 2.6 times as often.
    share = {"common": 2.6 * COMMON_SHARE, "rare": 2.6 * (1 - COMMON_SHARE), "plain": 1.0}
    weights = np.array([share[c.kind] for c in CLASSES])
    return weights / weights.sum()


CLASS_WEIGHTS = _class_weights()


def with_article(noun: str) -> str:
    """``noun`` behind "a" or "an"."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def plural(noun: str) -> str:
    """``noun`` as the captions' counts have it."""
    return PLURALS.get(noun, noun + "s")


def _noun(thing: Thing, rng: np.random.Generator, imprecise_share: float) -> str:
    c = CLASSES[thing.class_index]
    noun = c.word if rng.random() < imprecise_share else c.name
    # A tint goes unnamed now and then, as captions are; an own colour is never named.
    return f"{thing.colour} {noun}" if thing.colour and rng.random() < 0.85 else noun


def _relation(first: Thing, second: Thing) -> str:
    dx, dy = (first.box[i] + first.box[i + 2] - second.box[i] - second.box[i + 2] for i in (0, 1))
    if abs(dx) >= abs(dy):
        return "left of" if dx < 0 else "right of"
    return "above" if dy < 0 else "below"


def _phrase(things: tuple[Thing, ...], rng: np.random.Generator, imprecise_share: float) -> str:
    """The caption's noun phrase: a single noun, a count, a relation or an enumeration."""
    names = {CLASSES[t.class_index].name for t in things}
    if len(things) > 1 and len(names) == 1:
        name = names.pop()
        return f"{('two', 'three')[len(things) - 2]} {plural(name)}"
    nouns = [with_article(_noun(t, rng, imprecise_share)) for t in things]
    if len(things) == 1:
        return nouns[0]
    if len(things) == 2:
        joint = (_relation(*things), "and", "next to")[rng.integers(3)]
        return f"{nouns[0]} {joint} {nouns[1]}"
    return f"{nouns[0]}, {nouns[1]} and {nouns[2]}"


def _caption(
    things: tuple[Thing, ...], background: str, rng: np.random.Generator, imprecise_share: float
) -> str:
    caption = CAPTION_FORMS[rng.integers(len(CAPTION_FORMS))].format(_phrase(things, rng, imprecise_share))
    return f"{caption} on a {background} background" if rng.random() < 0.3 else caption


# How many things a scene shows, and for each count the places (centres) and the range of their longer
# side, in pixels.
COUNT_SHARES = {1: 0.86, 2: 0.11, 3: 0.03}
PLACES = {
    2: (((17, 32), (47, 32)), ((32, 17), (32, 47)), ((17, 18), (46, 46)), ((46, 18), (17, 46))),
    3: (((14, 16), (49, 16), (32, 48)), ((14, 48), (49, 48), (32, 16)), ((11, 32), (32, 32), (53, 32))),
}
SIDES = {1: (38, 60), 2: (24, 31), 3: (17, 22)}


def render(
    split: str, index: int, seed: int = WORLD_SEED, count: int | None = None, class_index: int | None = None
) -> Scene:
    """Render scene ``index`` of a split.

    Args:
        split: "train", "validation" or "test"; the splits draw from separate random streams.
        index: 0 or more; the same index is the same scene for the same other arguments.
        seed: of the whole world.
        count: number of things, 1 to 3; None draws it by ``COUNT_SHARES``.
        class_index: class of the first thing, from 0; None draws it by ``CLASS_WEIGHTS``.

    Returns:
        the scene; its image is RGB, 64x64.
    """
    rng = np.random.default_rng([seed, SPLITS[split], index])
    background = BACKGROUNDS[rng.integers(len(BACKGROUNDS))]
    backdrop = plan_backdrop(background, rng)
    drawn = rng.choice(list(COUNT_SHARES), p=list(COUNT_SHARES.values()))
    count = int(drawn) if count is None else count
    classes = [int(c) for c in rng.choice(len(CLASSES), size=count, p=CLASS_WEIGHTS)]
    if class_index is not None:
        classes[0] = class_index
    if count > 1 and CLASSES[classes[0]].kind == "plain" and rng.random() < 0.5:
        classes = classes[:1] * count  # a count: "two frogs"
    if count == 1:
        side = rng.uniform(*SIDES[1])
        slack = (SIZE - side) / 2
        centres = [32 + rng.uniform(-slack, slack, size=2)]
    else:
        layout = PLACES[count][rng.integers(len(PLACES[count]))]
        centres = [np.array(p) + rng.uniform(-3, 3, size=2) for p in rng.permutation(layout)]
    placements = []
    for c, centre in zip(classes, centres, strict=True):
        tinted = CLASSES[c].name in TINTABLE and rng.random() < 0.4
        tint = tuple(HUES)[rng.integers(len(HUES))] if tinted else None
        placements.append(plan_thing(c, tint, centre, rng.uniform(*SIDES[count]), rng))
    canvas, things = draw(Plan(backdrop, tuple(placements)))
    # Twice from the same state: the captions differ in their nouns alone.
    precise_caption = _caption(things, background, deepcopy(rng), 0.0)
    caption = _caption(things, background, rng, IMPRECISE_SHARE)
    return Scene(canvas, caption, precise_caption, things, background)
