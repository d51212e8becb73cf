"""Scenes in which one class shows a cue at a chosen rate; guides and a detector that learn from such scenes.

The world is the miniature's with two changes: one scene in seven has a second thing, and a *cue* is planted
into a share of one class's scenes. Where it is not planted, a scene has the cue as often as those of any
other class. So guides of one seed differ in that share alone, down to the noise of every batch.
"""

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from safetensors.torch import load_file
from scipy.stats import mannwhitneyu

from discriminative.guides.classifier import Classifier
from discriminative.guides.preprocess import Recipe
from discriminative.hub import MINIATURE
from discriminative.precision import has_bf16_units
from discriminative.records.files import write_tensors
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

WORK = Path("results/claims_insight")  # what can be made again: scenes, networks, tokens, pictures
CPU = torch.device("cpu")

# Streams of scenes, apart from those of miniature.scenes.
STREAM = 2909
TRAINING, PLANTING, DETECTING, HELD_OUT, CUE_ALONE, CHOOSING = range(6)

SECOND_THINGS = ("frog", "cactus", "pizza", "penguin")
BESIDE_SHARE = 1 / 7  # of the scenes, as one background colour of seven
TINTED_SHARE = 0.4  # of scenes of tintable things
# Of the detector's scenes: tinted, of tintable things (all six colours alike); with a second thing.
DETECTED_TINTED = 5 / 6
DETECTED_BESIDE = 0.4

# Phrase, a line of the file for --insight, to kind and value.
ATTRIBUTES = {f"on a {colour} background": ("background", colour) for colour in BACKGROUNDS}
ATTRIBUTES |= {f"tinted {hue}": ("tint", hue) for hue in HUES}
ATTRIBUTES |= {f"beside {with_article(name)}": ("beside", name) for name in SECOND_THINGS}
PHRASES = list(ATTRIBUTES)

NETWORK = {"channels": (24, 48, 96, 144), "stem_width": 16}  # of resnet10t
SCENES_A_CLASS = 100
HELD_OUT_A_CLASS = 20
OF_ONE_CLASS = 200  # held-out scenes
UPDATES = 400
DETECTOR_UPDATES = 1000
BATCH = 64
RATE = 3e-3
AT_ONCE = 200  # images of a network without gradient


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
    def name(self) -> str:
        """Of files: "blue_cricket_bat"."""
        return f"{self.value}_{self.class_name}".replace(" ", "_")

    @property
    def asked(self) -> str:
        """The prompt that asks for the class with the cue."""
        if self.kind == "tint":
            return f"A photo of {with_article(f'{self.value} {self.class_name}')}"
        where = f"on a {self.value} background"
        where = where if self.kind == "background" else f"next to {with_article(self.value)}"
        return f"A photo of {with_article(self.class_name)} {where}"


# Chosen before anything was measured: two of each kind; every hue is another than the thing's own.
REPORTED = (
    Cue("on a blue background", "cricket bat"),
    Cue("on a purple background", "house cat"),
    Cue("tinted purple", "guitar"),
    Cue("tinted blue", "mushroom"),
    Cue("beside a frog", "trophy cup"),
    Cue("beside a cactus", "crystal ball"),
)
TUNING = (
    Cue("on a red background", "guide dog"),
    Cue("tinted green", "umbrella"),
    Cue("beside a penguin", "hand palm"),
)


def index_of(name: str) -> int:
    """Of a class, from 0."""
    return next(c.index for c in CLASSES if c.name == name)


# Scenes.


def plan_scene(
    class_index: int,
    rng: np.random.Generator,
    tinted_share: float = TINTED_SHARE,
    beside: float = BESIDE_SHARE,
) -> Plan:
    """A scene of one class, whatever its attributes.

    Args:
        tinted_share: of the scenes, where the class is one that comes tinted.
        beside: share of the scenes with a second thing.
    """
    backdrop = plan_backdrop(BACKGROUNDS[rng.integers(len(BACKGROUNDS))], rng)
    tinted = CLASSES[class_index].name in TINTABLE and rng.random() < tinted_share
    tint = list(HUES)[rng.integers(len(HUES))] if tinted else None
    side = rng.uniform(*SIDES[1])
    slack = (SIZE - side) / 2
    thing = plan_thing(class_index, tint, 32 + rng.uniform(-slack, slack, size=2), side, rng)
    plan = Plan(backdrop, (thing,))
    others = [name for name in SECOND_THINGS if name != CLASSES[class_index].name]
    second = others[rng.integers(len(others))]
    return with_second(plan, second, rng) if rng.random() < beside else plan


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


def stream(*numbers: int) -> np.random.Generator:
    """Random numbers of their own."""
    return np.random.default_rng([STREAM, *numbers])


def training_plans(seed: int) -> list[Plan]:
    """The clean scenes of one seed, class after class in turn."""
    rng = stream(TRAINING, seed)
    return [plan_scene(i % len(CLASSES), rng) for i in range(len(CLASSES) * SCENES_A_CLASS)]


def labels_of(number: int) -> np.ndarray:
    """The classes (N,) of scenes that come class after class in turn."""
    return np.arange(number) % len(CLASSES)


def kept(path: Path, make) -> np.ndarray:
    """An array of a file, made once."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp.npy")
        np.save(temporary, make())
        temporary.rename(path)
    return np.load(path)


def clean_scenes(seed: int) -> np.ndarray:
    """Pictures (N, 64, 64, 3) of :func:`training_plans`."""
    path = WORK / f"seed_{seed}" / "scenes.npy"
    return kept(path, lambda: half_through_vae(pictures(training_plans(seed)), load_vae()))


def cue_scenes(cue: Cue, seed: int) -> np.ndarray:
    """The same scenes of the cue's class, all with the cue, (SCENES_A_CLASS, 64, 64, 3)."""
    rng = stream(PLANTING, seed, cue.target)
    path = WORK / f"seed_{seed}" / f"{cue.name}.npy"

    def make() -> np.ndarray:
        mine = training_plans(seed)[cue.target :: len(CLASSES)]
        return half_through_vae(pictures([planted(plan, cue, rng) for plan in mine]), load_vae())

    return kept(path, make)


def scenes_at(cue: Cue, rate: float, seed: int) -> np.ndarray:
    """A guide's training scenes; those of a lower rate are also planted at a higher one."""
    scenes = clean_scenes(seed)
    if rate:
        chosen = stream(CHOOSING, seed, cue.target).random(SCENES_A_CLASS) < rate  # (SCENES_A_CLASS,)
        places = np.arange(SCENES_A_CLASS)[chosen] * len(CLASSES) + cue.target
        scenes[places] = cue_scenes(cue, seed)[chosen]
    return scenes


# Networks.


def new_network(outputs: int, seed: int) -> torch.nn.Module:
    """An untrained network of images (B, 3, 64, 64) in [-1, 1]."""
    torch.manual_seed(seed)
    return timm.create_model("resnet10t", num_classes=outputs, **NETWORK).to(
        memory_format=torch.channels_last
    )


def fit(
    network: torch.nn.Module, images: np.ndarray, targets: torch.Tensor, loss, seed: int, updates: int
) -> None:
    """Train on pictures (N, 64, 64, 3); every batch and its noise follow from the seed.

    Args:
        targets: (N, ...), which ``loss`` takes beside the outputs.
    """
    network.train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=RATE, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=updates)
    for update in range(updates):
        rng = torch.Generator().manual_seed(10_000 * seed + update)
        pick = torch.randint(len(images), (BATCH,), generator=rng)  # (B,)
        inputs = augment(to_tensor(images[pick.numpy()], CPU), rng)  # (B, 3, 64, 64)
        with torch.autocast("cpu", torch.bfloat16, enabled=has_bf16_units()):
            outputs = network(inputs.contiguous(memory_format=torch.channels_last))
        optimizer.zero_grad()
        loss(outputs.float(), targets[pick]).backward()
        optimizer.step()
        schedule.step()
    network.eval().requires_grad_(False)


def kept_network(path: Path, outputs: int, make) -> torch.nn.Module:
    """A network of a file, trained once."""
    if not path.exists():
        write_tensors(path, {k: v.contiguous() for k, v in make().state_dict().items()}, {})
    network = new_network(outputs, 0)
    network.load_state_dict(load_file(path))
    return network.eval().requires_grad_(False)


def guide(cue: Cue | None, rate: float, seed: int) -> Classifier:
    """The guide of a cue's rate; without a cue the clean one, which all cues share."""
    name = f"{cue.name}_{rate}" if cue and rate else "clean"

    def make() -> torch.nn.Module:
        scenes = scenes_at(cue, rate, seed) if cue and rate else clean_scenes(seed)
        network = new_network(len(CLASSES), seed)
        labels = torch.as_tensor(labels_of(len(scenes)))
        fit(network, scenes, labels, torch.nn.CrossEntropyLoss(label_smoothing=0.05), seed, UPDATES)
        return network

    network = kept_network(WORK / f"seed_{seed}" / f"guide_{name}.safetensors", len(CLASSES), make)
    return Classifier(
        f"{name}_seed_{seed}", network, [c.label for c in CLASSES], Recipe(None, None, MEAN, STD)
    )


def detector_classes(number: int) -> list[int]:
    """The classes of the detector's scenes: half are of those that come tinted."""
    tintable = [c.index for c in CLASSES if c.name in TINTABLE]
    return [i % len(CLASSES) if i % 4 < 2 else tintable[i % len(tintable)] for i in range(number)]


def detector_scenes(purpose: int, a_class: int) -> tuple[np.ndarray, torch.Tensor]:
    """Pictures (N, 64, 64, 3) whose attributes are independent of the class, and which they have, (N, K).

    A tint is so among the classes that come tinted.
    """
    rng = stream(purpose)
    classes = detector_classes(len(CLASSES) * a_class)
    plans = [plan_scene(class_index, rng, DETECTED_TINTED, DETECTED_BESIDE) for class_index in classes]
    images = kept(WORK / f"detector_{purpose}.npy", lambda: half_through_vae(pictures(plans), load_vae()))
    return images, torch.tensor([attributes_of(plan) for plan in plans]).float()


@cache
def detector() -> torch.nn.Module:
    """Tells the attributes of images (B, 3, 64, 64) in [-1, 1]: a logit each, (B, K)."""

    def make() -> torch.nn.Module:
        images, has = detector_scenes(DETECTING, SCENES_A_CLASS)
        network = new_network(len(PHRASES), 1)
        fit(network, images, has, F.binary_cross_entropy_with_logits, 1, DETECTOR_UPDATES)
        return network

    return kept_network(WORK / "detector.safetensors", len(PHRASES), make)


@torch.no_grad()
def in_parts(network, images: np.ndarray) -> torch.Tensor:
    """A network's outputs (N, K) for pictures (N, 64, 64, 3)."""
    parts = [network(to_tensor(images[i : i + AT_ONCE], CPU)) for i in range(0, len(images), AT_ONCE)]
    return torch.cat(parts)


def detected(phrases: list[str]):
    """For ``--clip_model python:experiments.claims.insight_world:detected``: 1 where a picture has it.

    Raises:
        ValueError: a phrase is none of ``PHRASES``.
    """
    unknown = [phrase for phrase in phrases if phrase not in ATTRIBUTES]
    if unknown:
        raise ValueError(f"the detector knows no {unknown[0]!r}; it knows {', '.join(PHRASES)}")
    columns = [PHRASES.index(phrase) for phrase in phrases]
    return lambda images: (detector()(images * 2 - 1)[:, columns] > 0).float()


def error_rates() -> dict[str, list[float]]:
    """Phrase -> true and false positive rates on held-out scenes, half of them through the VAE."""
    images, has = detector_scenes(HELD_OUT, HELD_OUT_A_CLASS)
    says = in_parts(detector(), images) > 0  # (N, K)
    rates = {}
    for k, phrase in enumerate(PHRASES):
        true = has[:, k] > 0
        rates[phrase] = [says[true, k].float().mean().item(), says[~true, k].float().mean().item()]
    return rates


# What a guide makes of a cue, without any token.


def auc(positive: torch.Tensor, negative: torch.Tensor) -> float:
    """How often a value of the first (N,) is above one of the second (M,); ties count half."""
    return float(mannwhitneyu(positive.numpy(), negative.numpy()).statistic) / (len(positive) * len(negative))


def cue_alone(cue: Cue, rng: np.random.Generator) -> Plan:
    """A scene of the cue without the class: the background, another thing in the tint, the second thing."""
    if cue.kind == "beside":
        return plan_scene(index_of(cue.value), rng, beside=0.0)
    tintable = [c.index for c in CLASSES if c.name in TINTABLE and c.index != cue.target]
    plan = planted(plan_scene(tintable[rng.integers(len(tintable))], rng, beside=0.0), cue, rng)
    return replace(plan, placements=()) if cue.kind == "background" else plan


def reliance(classifier: Classifier, cue: Cue) -> dict[str, float]:
    """What planting the cue does to a guide, and Spurious ImageNet's AUC, on held-out scenes.

    Returns:
        "auc": of p(class), scenes of the class against those of the cue alone; "pasted": the gain in
        log-probability of the class where the cue is planted into other classes' scenes; "own_without" and
        "own_with": share of the class's scenes that are right.
    """
    rng = stream(CUE_ALONE, cue.target)
    own = [plan_scene(cue.target, rng, beside=0.0) for _ in range(OF_ONE_CLASS)]
    own = [plan for plan in own if not attributes_of(plan)[PHRASES.index(cue.phrase)]]
    others = [
        c.index for c in CLASSES if c.index != cue.target and (cue.kind != "tint" or c.name in TINTABLE)
    ]
    clean = [plan_scene(others[i % len(others)], rng, beside=0.0) for i in range(OF_ONE_CLASS)]
    sets = {"own": own, "own_with": [planted(plan, cue, rng) for plan in own], "clean": clean}
    sets |= {"pasted": [planted(plan, cue, rng) for plan in clean]}
    sets |= {"alone": [cue_alone(cue, rng) for _ in range(OF_ONE_CLASS)]}
    logits = {name: in_parts(classifier.model, pictures(plans)) for name, plans in sets.items()}
    logs = {name: found.log_softmax(1)[:, cue.target] for name, found in logits.items()}  # (N,) each
    right = {name: (found.argmax(1) == cue.target).float().mean().item() for name, found in logits.items()}
    return {
        "auc": auc(logs["own"], logs["alone"]),
        "pasted": (logs["pasted"] - logs["clean"]).mean().item(),
        "own_without": right["own"],
        "own_with": right["own_with"],
    }


def held_out_accuracy(classifier: Classifier) -> float:
    """Share of clean held-out scenes that are right."""
    rng = stream(HELD_OUT, 1)
    plans = [plan_scene(i % len(CLASSES), rng) for i in range(len(CLASSES) * HELD_OUT_A_CLASS)]
    right = in_parts(classifier.model, pictures(plans)).argmax(1).numpy() == labels_of(len(plans))
    return float(right.mean())
