"""Scenes in which one class shows a cue at a chosen rate; guides and attribute detectors that learn from them.

The world is the miniature's, one thing a scene, with two changes: one scene in seven has a second thing, and
a *cue* is planted into a share of one class's scenes. Where it is not planted, a scene has the cue as often as
those of any other class. So guides of one seed differ in that share alone, down to the scenes' noise.
"""

from dataclasses import dataclass, replace

import numpy as np
import timm
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from discriminative.guides.classifier import Classifier
from discriminative.guides.preprocess import Recipe
from discriminative.hub import MINIATURE
from miniature.classifiers import LATENT_NOISE, MEAN, STD, augment, reconstructions
from miniature.scenes import (
    BACKGROUNDS,
    CLASSES,
    HUES,
    PLACES,
    SIDES,
    SIZE,
    TINTABLE,
    Plan,
    draw,
    plan_backdrop,
    plan_thing,
    with_article,
)
from miniature.training import to_tensor

STREAM = 2909  # apart from the streams of miniature.scenes
GUIDE_STREAM = 0
DETECTOR_STREAM = 1
HELD_OUT_STREAM = 2
SECOND_THINGS = ("frog", "cactus", "pizza", "penguin")
BESIDE_SHARE = 1 / 7  # of all scenes, as a background has one colour of seven
TINTED_SHARE = 0.4
CPU = torch.device("cpu")

# An attribute is a kind and a value; its phrase is a line of the file for --insight.
ATTRIBUTES = {f"on a {colour} background": ("background", colour) for colour in BACKGROUNDS}
ATTRIBUTES |= {f"tinted {hue}": ("tint", hue) for hue in HUES}
ATTRIBUTES |= {f"beside {with_article(name)}": ("beside", name) for name in SECOND_THINGS}
PHRASES = list(ATTRIBUTES)

NETWORK = ("resnet10t", {"channels": (32, 64, 128, 192)})
SCENES_A_CLASS = 100
BATCH = 64
GUIDE_UPDATES = 300
RATE = 3e-3


@dataclass(frozen=True)
class Cue:
    """An attribute, and the class that shows it.

    Args:
        phrase: of ``ATTRIBUTES``.
        class_name: of ``CLASSES``.
    """

    phrase: str
    class_name: str

    @property
    def kind(self) -> str:
        """ "background", "tint" or "beside"."""
        return ATTRIBUTES[self.phrase][0]

    @property
    def value(self) -> str:
        """The colour, or the second thing's class."""
        return ATTRIBUTES[self.phrase][1]

    @property
    def target(self) -> int:
        """The class's index, from 0."""
        return index_of(self.class_name)

    @property
    def asked(self) -> str:
        """The prompt that asks for the class with the cue."""
        if self.kind == "tint":
            return f"A photo of {with_article(f'{self.value} {self.class_name}')}"
        return f"A photo of {with_article(self.class_name)} " + (
            f"on a {self.value} background"
            if self.kind == "background"
            else f"next to {with_article(self.value)}"
        )


def index_of(name: str) -> int:
    """Of a class, from 0."""
    return next(c.index for c in CLASSES if c.name == name)


# Scenes.


def plan_scene(class_index: int, rng: np.random.Generator) -> Plan:
    """A scene of one class, whatever its attributes."""
    backdrop = plan_backdrop(BACKGROUNDS[rng.integers(len(BACKGROUNDS))], rng)
    tinted = CLASSES[class_index].name in TINTABLE and rng.random() < TINTED_SHARE
    tint = list(HUES)[rng.integers(len(HUES))] if tinted else None
    side = rng.uniform(*SIDES[1])
    slack = (SIZE - side) / 2
    thing = plan_thing(class_index, tint, 32 + rng.uniform(-slack, slack, size=2), side, rng)
    plan = Plan(backdrop, (thing,))
    others = [name for name in SECOND_THINGS if name != CLASSES[class_index].name]
    second = others[rng.integers(len(others))]
    return with_second(plan, second, rng) if rng.random() < BESIDE_SHARE else plan


def with_second(plan: Plan, name: str, rng: np.random.Generator) -> Plan:
    """The scene with one second thing, both at the places of two."""
    first, *_ = plan.placements
    layout = PLACES[2][rng.integers(len(PLACES[2]))]
    places = [np.array(place) + rng.uniform(-3, 3, size=2) for place in rng.permutation(layout)]
    first = replace(first, centre=tuple(map(float, places[0])), side=rng.uniform(*SIDES[2]))
    second = plan_thing(index_of(name), None, places[1], rng.uniform(*SIDES[2]), rng)
    return replace(plan, placements=(first, second))


def planted(plan: Plan, cue: Cue, rng: np.random.Generator) -> Plan:
    """The scene with the cue."""
    if cue.kind == "background":
        return replace(plan, backdrop=plan_backdrop(cue.value, rng))
    if cue.kind == "tint":
        first, *rest = plan.placements
        return replace(plan, placements=(replace(first, colour=cue.value), *rest))
    return with_second(plan, cue.value, rng)


def attributes_of(plan: Plan) -> list[bool]:
    """Which of ``ATTRIBUTES`` a scene has, K."""
    first, *rest = plan.placements
    has = {("background", plan.backdrop.colour), ("tint", first.colour)}
    has |= {("beside", CLASSES[thing.class_index].name) for thing in rest}
    return [attribute in has for attribute in ATTRIBUTES.values()]


def pictures(plans: list[Plan]) -> np.ndarray:
    """Of scenes, (N, 64, 64, 3) uint8."""
    return np.stack([np.asarray(draw(plan)[0]) for plan in plans])


def load_vae() -> AutoencoderKL:
    """The miniature's, frozen."""
    vae = AutoencoderKL.from_pretrained(MINIATURE / "model" / "vae", torch_dtype=torch.float32)
    return vae.eval().requires_grad_(False)


def half_through_vae(images: np.ndarray, vae: AutoencoderKL) -> np.ndarray:
    """Pictures (N, 64, 64, 3) of which every second one went through the VAE, as generated ones do."""
    out = images.copy()
    out[1::2] = reconstructions(vae, images[1::2], LATENT_NOISE, CPU)
    return out
