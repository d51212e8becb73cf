"""Stage ``detector``: a small FCOS that tells which things a picture of the world holds, each with its class,
tint and box.

    python -m miniature.detector     # how often it sees a held-out scene exactly, and nothing in a smear

It decides what a generated picture shows. So half of what it learns from went through the VAE, as with the
classifiers. A label is a noun: a class, or a class with a tint.
"""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from torchvision.models.detection import FCOS
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.fcos import FCOSHead
from torchvision.ops import FeaturePyramidNetwork, nms

from discriminative.hub import MINIATURE
from discriminative.records.files import write_tensors
from miniature.classifiers import (
    MEAN,
    STD,
    kept_reconstructions,
    load_vae,
    reconstructions,
    retouch,
    uniform,
)
from miniature.scenes import (
    BACKGROUNDS,
    CLASSES,
    HUES,
    PLACES,
    SIZE,
    SPLITS,
    TINTABLE,
    Placement,
    Plan,
    Thing,
    draw,
    plan_backdrop,
    plan_thing,
)
from miniature.training import Trainee, to_tensor

NAME = "detector"
WEIGHTS = "model.safetensors"
CONFIG = "config.json"
# What FCOS numbers: class index and tint, None for the sprite's own colours.
LABELS = [(c.index, tint) for c in CLASSES for tint in (None, *(HUES if c.name in TINTABLE else ()))]
NUMBER_OF = {label: number for number, label in enumerate(LABELS)}
ARCHITECTURE = {
    "backbone": "resnet18d",
    "channels": [48, 96, 128, 192],
    "width": 64,  # of the pyramid and the head
    "convolutions": 2,  # of each of the head's two towers
}
LEVELS = (1, 2, 3)  # of the backbone, at strides 4, 8 and 16; the pyramid joins them at stride 4
ANCHOR = 8  # pixels; points up to 1.5 of it from a thing's centre learn to find the thing
AT_ONCE = 200  # images
LEAST_SCORE = 0.05  # below it nothing is looked at
OVERLAP = 0.25  # intersection over union; of things that share more, the less certain one goes
TOLERANCE = 0.002  # of the share of exact scenes, given for a higher threshold: a smear is no thing

# Scenes to learn from.
STREAM = 1105  # apart from the streams of miniature.scenes.render
SCENES = 16_000  # the second half of them through the VAE
HELD_OUT_SCENES = 400
NUMBERS = {0: 0.03, 1: 0.27, 2: 0.35, 3: 0.35}
SIDES = {1: (32, 60), 2: (22, 34), 3: (16, 24)}  # pixels; a little wider than the world's
JITTER = 4  # pixels, of a place
TINTABLE_SHARE = 0.45  # of the things: 42 of the 79 labels are theirs
TINTED_SHARE = 0.83  # of these, so that all six colours come equally often
ALIKE_SHARE = 0.25  # of several things, that all are of one class

# Updates at the end of each round, learning rate, share of pictures smeared until nothing is in them.
ROUNDS = ((2600, 2e-3, 0.0), (3200, 1e-3, 0.12))
SMEAR = (4, 8)  # cells a side that are left of a picture, least and below
SEED = 6
BATCH = 32
NOISE = 0.08  # greatest standard deviation of an image's noise; images are in [-1, 1]
LOG_EVERY = 400


# The model.


class Pyramid(nn.Module):
    """Features (B, width, 16, 16) at stride 4, with the context of strides 8 and 16."""

    def __init__(self, backbone: str, channels: Sequence[int], width: int):
        super().__init__()
        self.out_channels = width
        self.body = timm.create_model(
            backbone, features_only=True, out_indices=LEVELS, channels=tuple(channels)
        )
        self.pyramid = FeaturePyramidNetwork(self.body.feature_info.channels(), width)
        # Only the finest level is read.
        for level in range(1, len(LEVELS)):
            self.pyramid.layer_blocks[level] = nn.Identity()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        levels = {str(i): level for i, level in enumerate(self.body(images))}
        return self.pyramid(levels)["0"]  # (B, width, 16, 16)


def new_model(backbone: str, channels: Sequence[int], width: int, convolutions: int) -> FCOS:
    """An untrained detector of images (3, 64, 64) in [0, 1]."""
    return FCOS(
        Pyramid(backbone, channels, width),
        num_classes=len(LABELS),
        min_size=SIZE,
        max_size=SIZE,
        fixed_size=(SIZE, SIZE),
        image_mean=list(MEAN),
        image_std=list(STD),
        anchor_generator=AnchorGenerator(((ANCHOR,),), ((1.0,),)),
        head=FCOSHead(width, 1, len(LABELS), convolutions),
        score_thresh=LEAST_SCORE,
        nms_thresh=OVERLAP,
    )


class Seen(NamedTuple):
    """A thing with its score in [0, 1]."""

    thing: Thing
    score: float


class Detector:
    """Tells the things of pictures.

    Args:
        model: in evaluation.
        threshold: score that a thing has at least.
    """

    def __init__(self, model: FCOS, threshold: float):
        self.model = model
        self.threshold = threshold

    def things(self, images: torch.Tensor) -> list[tuple[Thing, ...]]:
        """The things of each image, the most certain first; arguments and errors of :meth:`seen`."""
        return [above(found, self.threshold) for found in self.seen(images)]

    @torch.no_grad()
    def seen(self, images: torch.Tensor) -> list[list[Seen]]:
        """All that might be a thing, whatever the threshold, the most certain first.

        Args:
            images: (N, 3, 64, 64) in [0, 1].

        Raises:
            ValueError: images of another shape.
        """
        if images.shape[1:] != (3, SIZE, SIZE):
            raise ValueError(f"images of shape {tuple(images.shape)} were given; needed is (N, 3, 64, 64)")
        device = next(self.model.parameters()).device
        return [
            one_each(**found)
            for part in images.split(AT_ONCE)
            if len(part)
            for found in self.model(list(part.to(device, torch.float32)))
        ]

    @torch.no_grad()
    def features(self, images: torch.Tensor) -> torch.Tensor:
        """The coarsest features of images (N, 3, 64, 64) in [0, 1]: means over places (N, D), on the CPU."""
        device = next(self.model.parameters()).device
        mean = torch.tensor(MEAN).view(3, 1, 1)  # (3, 1, 1)
        std = torch.tensor(STD).view(3, 1, 1)  # (3, 1, 1)
        parts = [((part - mean) / std).to(device) for part in images.float().cpu().split(AT_ONCE)]
        return torch.cat([self.model.backbone.body(part)[-1].mean(dim=(2, 3)).cpu() for part in parts])


def one_each(boxes: torch.Tensor, scores: torch.Tensor, labels: torch.Tensor) -> list[Seen]:
    """One label for each place: boxes (M, 4) that overlap keep the most certain of their labels (M,)."""
    found = []
    for i in nms(boxes, scores, OVERLAP).tolist():
        x0, y0, x1, y1 = boxes[i].round().int().tolist()
        if x0 < x1 and y0 < y1:
            found.append(Seen(Thing(*LABELS[labels[i]], (x0, y0, x1, y1)), scores[i].item()))
    return found


def above(found: list[Seen], threshold: float) -> tuple[Thing, ...]:
    """The things with this score at least."""
    return tuple(thing for thing, score in found if score >= threshold)


def load_detector(folder: Path = MINIATURE / NAME, device: torch.device | str = "cpu") -> Detector:
    """The trained detector; by default the one that ships."""
    config = json.loads((folder / CONFIG).read_text())
    model = new_model(**config["architecture"])
    model.load_state_dict(load_file(folder / WEIGHTS))
    return Detector(model.eval().to(device), config["threshold"])


# Scenes.


def plan_scene(split: str, index: int) -> Plan:
    """A scene of none to three things: any classes, tints and backdrop, twins among them."""
    rng = np.random.default_rng([STREAM, SPLITS[split], index])
    backdrop = plan_backdrop(BACKGROUNDS[rng.integers(len(BACKGROUNDS))], rng)
    number = int(rng.choice(list(NUMBERS), p=list(NUMBERS.values())))
    alike = number > 1 and rng.random() < ALIKE_SHARE
    class_index = _class_index(rng) if alike else None
    cast = [_noun(rng, class_index) for _ in range(number)]
    if alike and rng.random() < 0.5:
        cast = cast[:1] * number  # in one colour
    return Plan(backdrop, tuple(_place(cast, rng)))


def _class_index(rng: np.random.Generator) -> int:
    tintable = rng.random() < TINTABLE_SHARE
    pool = [c.index for c in CLASSES if (c.name in TINTABLE) == tintable]
    return pool[rng.integers(len(pool))]


def _noun(rng: np.random.Generator, class_index: int | None) -> tuple[int, str | None]:
    """A class, any where none is given, and a tint or None."""
    index = _class_index(rng) if class_index is None else class_index
    tinted = CLASSES[index].name in TINTABLE and rng.random() < TINTED_SHARE
    return index, list(HUES)[rng.integers(len(HUES))] if tinted else None


def _place(cast: list[tuple[int, str | None]], rng: np.random.Generator) -> list[Placement]:
    if not cast:
        return []
    sides = [rng.uniform(*SIDES[len(cast)]) for _ in cast]
    if len(cast) == 1:
        slack = (SIZE - sides[0]) / 2
        centres = [SIZE / 2 + rng.uniform(-slack, slack, size=2)]
    else:
        layouts = PLACES[len(cast)]
        layout = layouts[rng.integers(len(layouts))]
        centres = [p + rng.uniform(-JITTER, JITTER, size=2) for p in rng.permutation(layout)]
    return [
        plan_thing(class_index, tint, centre, side, rng)
        for (class_index, tint), centre, side in zip(cast, centres, sides, strict=True)
    ]


class Scenes(NamedTuple):
    """Images (N, 64, 64, 3) uint8 and the things of each."""

    images: np.ndarray
    things: list[tuple[Thing, ...]]


def draw_scenes(split: str, number: int) -> Scenes:
    """The first scenes of a split."""
    drawn = [draw(plan_scene(split, i)) for i in range(number)]
    return Scenes(np.stack([np.asarray(image) for image, _ in drawn]), [things for _, things in drawn])


def kept_scenes(work: Path, number: int) -> Scenes:
    """Training scenes, drawn once and kept in ``work``."""
    folder = work / f"scenes-train-{number}"
    if not (folder / "things.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        images, things = draw_scenes("train", number)
        np.save(folder / "images.npy", images)
        (folder / "things.json").write_text(json.dumps(things, default=vars))
    rows = json.loads((folder / "things.json").read_text())
    things = [tuple(Thing(t["class_index"], t["colour"], tuple(t["box"])) for t in row) for row in rows]
    return Scenes(np.load(folder / "images.npy", mmap_mode="r"), things)


# Training.


def target_of(things: tuple[Thing, ...], mirrored: bool) -> dict[str, torch.Tensor]:
    """What FCOS learns from: boxes (M, 4) in pixels and labels (M,)."""
    boxes = torch.tensor([t.box for t in things], dtype=torch.float32).view(-1, 4)  # (M, 4)
    if mirrored:
        boxes = torch.stack([SIZE - boxes[:, 2], boxes[:, 1], SIZE - boxes[:, 0], boxes[:, 3]], dim=1)
    labels = torch.tensor([NUMBER_OF[t.class_index, t.colour] for t in things], dtype=torch.int64)  # (M,)
    return {"boxes": boxes, "labels": labels}


def vary(pixels: torch.Tensor, mirrored: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """Images (B, 3, 64, 64), from [-1, 1] to [0, 1]: some mirrored (B,), all retouched, with a little
    noise."""
    pixels = torch.where(mirrored.to(pixels.device)[:, None, None, None], pixels.flip(-1), pixels)
    out = retouch(pixels, rng)
    noise = torch.randn(out.shape, generator=rng).to(out.device)
    out = out + noise * uniform(-NOISE, NOISE, out, rng).clamp(min=0)
    return out.clamp(-1, 1) / 2 + 0.5  # (B, 3, 64, 64)


def smear(images: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """Images (B, 3, 64, 64) of which a few soft patches are left: too blurred to show a thing."""
    cells = int(torch.randint(*SMEAR, (), generator=rng))
    coarse = F.interpolate(images, (cells, cells), mode="area")  # (B, 3, cells, cells)
    return F.interpolate(coarse, (SIZE, SIZE), mode="bicubic").clamp(0, 1)  # (B, 3, 64, 64)


def nouns(things: Sequence[Thing]) -> Counter:
    """How often each class with its tint is there."""
    return Counter((t.class_index, t.colour) for t in things)


def exact_share(found: list[list[Seen]], things: list[tuple[Thing, ...]], threshold: float) -> float:
    """Share of the scenes of which exactly the right classes and tints are seen."""
    pairs = zip(found, things, strict=True)
    right = [nouns(above(some, threshold)) == nouns(wanted) for some, wanted in pairs]
    return sum(right) / len(right)


def choose_threshold(found: list[list[Seen]], things: list[tuple[Thing, ...]]) -> float:
    """The highest threshold with nearly the greatest share of exact scenes."""
    shares = {t / 100: exact_share(found, things, t / 100) for t in range(10, 90)}
    return max(t for t, share in shares.items() if share >= max(shares.values()) - TOLERANCE)


class HeldOut(NamedTuple):
    """Validation scenes: their things, and images (N, 3, 64, 64) in [0, 1] by how they came about."""

    things: list[tuple[Thing, ...]]
    images: dict[str, torch.Tensor]


def held_out_scenes(split: str, number: int, vae: nn.Module, device: torch.device) -> HeldOut:
    """Scenes of a split, as rendered and through the VAE."""
    images, things = draw_scenes(split, number)
    decoded = reconstructions(vae, images, 0.0, device)
    kinds = {"renders": images, "reconstructions": decoded}
    return HeldOut(things, {kind: to_tensor(some, device) / 2 + 0.5 for kind, some in kinds.items()})


def try_out(model: FCOS, held_out: HeldOut) -> tuple[float, dict[str, float]]:
    """The threshold that suits the held-out scenes, and by kind of image the share of them that is exact."""
    detector = Detector(model.eval(), LEAST_SCORE)
    found = {kind: detector.seen(images) for kind, images in held_out.images.items()}
    threshold = choose_threshold(sum(found.values(), []), held_out.things * len(found))
    return threshold, {kind: exact_share(some, held_out.things, threshold) for kind, some in found.items()}


def train(work: Path, device: torch.device, steps: int | None) -> None:
    """Train the detector; writes weights in fp16 and ``config.json`` to ``<work>/detector/``.

    Where ``work`` has no VAE it takes the one that ships.
    """
    torch.manual_seed(SEED)
    images, things = kept_scenes(work, SCENES)
    vae, beside = load_vae(work, device)
    half = SCENES // 2
    decoded = kept_reconstructions(vae, images[half:], beside / f"reconstructed-scenes-{SCENES}.npy", device)
    held_out = held_out_scenes("validation", HELD_OUT_SCENES, vae, device)
    rounds = [(end, lr) for end, lr, _ in ROUNDS] if steps is None else [(steps, ROUNDS[0][1])]
    trainee = Trainee({NAME: new_model(**ARCHITECTURE).to(device)}, work, NAME, rounds)
    trainee.resume()
    while trainee.step < trainee.steps:
        rng = torch.Generator().manual_seed(1000 * SEED + trainee.step)
        pick = torch.randint(SCENES, (BATCH,), generator=rng).tolist()
        batch = np.stack([images[i] if i < half else decoded[i - half] for i in pick])
        mirrored = torch.rand(BATCH, generator=rng) < 0.5  # (B,)
        inputs = vary(to_tensor(batch, device), mirrored, rng)
        smeared = torch.rand(BATCH, generator=rng) < ROUNDS[trainee.round][2]  # (B,)
        inputs = torch.where(smeared.to(device)[:, None, None, None], smear(inputs, rng), inputs)
        shown = [() if smeared[n] else things[i] for n, i in enumerate(pick)]
        targets = [target_of(some, bool(m)) for some, m in zip(shown, mirrored, strict=True)]
        targets = [{name: value.to(device) for name, value in target.items()} for target in targets]
        losses = trainee.modules[NAME].train()(list(inputs), targets)
        trainee.update(sum(losses.values()))
        if trainee.step % LOG_EVERY == 0 or trainee.step == trainee.steps:
            threshold, shares = try_out(trainee.average[NAME], held_out)
            told = " ".join(f"{name} {value.item():.3f}" for name, value in losses.items())
            exact = " ".join(f"{kind} {share:.4f}" for kind, share in shares.items())
            trainee.log(f"step {trainee.step}/{trainee.steps} {told}; exact at {threshold}: {exact}")
            trainee.save()
    write(trainee.average[NAME], held_out, work / NAME)


def write(model: FCOS, held_out: HeldOut, folder: Path) -> None:
    """Write the detector in fp16, with the threshold that suits the rounded weights."""
    rounded = model.half().float()
    threshold, shares = try_out(rounded, held_out)
    temporary = folder.with_suffix(".tmp")
    temporary.mkdir(parents=True, exist_ok=True)
    weights = {name: value.contiguous() for name, value in rounded.half().state_dict().items()}
    write_tensors(temporary / WEIGHTS, weights, {})
    config = {
        "architecture": ARCHITECTURE,
        "threshold": threshold,
        "validation": shares,
        "labels": [
            f"{tint} {CLASSES[index].name}" if tint else CLASSES[index].name for index, tint in LABELS
        ],
    }
    (temporary / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    temporary.rename(folder)


def main() -> None:
    device = torch.device("cpu")
    detector = load_detector()
    held_out = held_out_scenes("test", HELD_OUT_SCENES, load_vae(MINIATURE, device)[0], device)
    print(f"threshold {detector.threshold}, {HELD_OUT_SCENES} held-out scenes")
    for kind, images in held_out.images.items():
        share = exact_share(detector.seen(images), held_out.things, detector.threshold)
        smeared = detector.things(smear(images, torch.Generator().manual_seed(0)))
        nothing = smeared.count(()) / len(smeared)
        print(f"{kind:<16} {share:.4f} exact; smeared, {nothing:.4f} hold nothing")


if __name__ == "__main__":
    main()
