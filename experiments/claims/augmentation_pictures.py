"""What the arms of claim (ii) are made of: shots, guides, tokens, inverted words, and the pictures they draw.

Everything is made once and kept below a folder, in the layout that ``python -m apps.augment`` reads:

    real/train_s0/<class>/00.png      the shots of a seed, in order: n shots are the first n; val/ and test/
    guides/n4_s0.safetensors          a classifier that was trained on n shots
    tokens/token_n4_s0/<class>.safetensors      vectors; the clean guide's ("token"), "full", "inversion"
    drawn/token_n4_s0_g2/<class>/00.png         what they draw, at a guidance
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from statistics import fmean

import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from apps.augment.folders import Pictures
from apps.augment.network import Network, data_of
from classifiers import load_classifier
from config import with_preset
from discriminative.diffusion.models import DiffusionModels, load_models
from discriminative.errors import WorkError
from discriminative.guides.classifier import Classifier, Guide
from discriminative.guides.preprocess import timm_recipe
from discriminative.precision import training_precision
from discriminative.records.files import read_image, replace_folder, to_pil, write_image, write_tensors
from discriminative.records.layout import RunFolder
from discriminative.seeds import DATASET_BASE
from discriminative.settings import SamplerSettings
from discriminative.tokens.class_token import ClassToken
from discriminative.tokens.drawing import in_batches
from discriminative.tokens.prompts import TEMPLATES, fill
from experiments.claims.rivals import denoising_loss, encoded
from miniature.scenes import CLASSES, SIZE, SceneClass, render, with_article
from trainer import train as learn

CPU = torch.device("cpu")
WORD = "newclas"  # the new word, of a class token or an inverted one
# No default of the method was chosen on these words (experiments.method.TUNING_CLASSES).
WORDS = ("mouse", "keyboard", "drum", "chicken")
TAKEN = [c for c in CLASSES if c.word in WORDS]
SHOTS = (1, 2, 4, 8, 16)
SEEDS = tuple(range(8))
VAL_PICTURES = 25  # of each class
TEST_PICTURES = 50
WITHOUT_SHOTS = ("full", "phrase")  # what draws the same whatever the real pictures are
FIRST_SCENE = 3_000_000  # beyond all that guides and judges of the miniature have seen
DRAWN = 24  # pictures of each class
POOL = 264  # of a word's plain prompt, for each seed
STEPS = 12  # of the sampler
BATCH = 12
ARCHITECTURE = "test_efficientnet"
# Of a class token: bounded, as a guide of few shots may never call it right.
LEARNING = {"max_epochs": 20}
VALIDATION = {"confirm_size": 12}
INVERSION_STEPS = 150
INVERSION_BATCH = 4
INVERSION_RATE = 0.1  # step size over the root mean square of a word's embedding


@dataclass(frozen=True)
class Place:
    """Where everything is kept."""

    root: Path

    def shots(self, seed: int) -> Path:
        return self.root / "real" / f"train_s{seed}"

    def split(self, name: str) -> Path:
        return self.root / "real" / name

    def guide(self, shots: int, seed: int) -> Path:
        return self.root / "guides" / f"n{shots}_s{seed}.safetensors"

    def token(self, source: str, shots: int, seed: int, c: SceneClass) -> Path:
        return self.root / "tokens" / f"{source}_n{shots}_s{seed}" / f"{folder_of(c)}.safetensors"

    def drawn(self, source: str, shots: int, seed: int, guidance: float, name: str) -> Path:
        return self.root / "drawn" / f"{source}_n{shots}_s{seed}_g{guidance:g}" / name


def folder_of(c: SceneClass) -> str:
    """The class's folder."""
    return c.name.replace(" ", "_")


def network() -> Network:
    """The classifier under test, from scratch: 0.1 million weights, 64 pixels."""

    def make(classes: int) -> torch.nn.Module:
        return timm.create_model(ARCHITECTURE, num_classes=classes)

    return Network(make, data_of(make(2), SIZE))


@cache
def models() -> DiffusionModels:
    """The miniature."""
    return load_models("miniature", CPU, torch.float32)


def new_token() -> ClassToken:
    """A token with a tokenizer of its own."""
    return ClassToken(replace(models(), tokenizer=models().fresh_tokenizer()), WORD, "a")


# Real pictures.


def render_folder(folder: Path, split: str, first: int, number: int) -> None:
    """Pictures of one thing for each class, written at once."""
    with whole_folder(folder) as part:
        for k, c in enumerate(TAKEN):
            for i in range(number):
                scene = render(split, first + i * len(TAKEN) + k, count=1, class_index=c.index)
                write_image(part / folder_of(c) / f"{i:02d}.png", scene.image)


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill, which takes its place once it is full."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as part:
        inside = Path(part) / folder.name
        inside.mkdir()
        yield inside
        replace_folder(inside, folder)


def render_all(place: Place) -> None:
    """Validation, test, and twice the most shots of each seed."""
    number = 2 * max(SHOTS)
    for seed in SEEDS:
        if not place.shots(seed).exists():
            first = FIRST_SCENE + seed * number * len(TAKEN)
            render_folder(place.shots(seed), "train", first, number)
    for name, split, size in (("val", "validation", VAL_PICTURES), ("test", "test", TEST_PICTURES)):
        if not place.split(name).exists():
            render_folder(place.split(name), split, FIRST_SCENE, size)


def pictures_in(folder: Path, number: int | None = None) -> Pictures:
    """The first pictures of each class folder."""
    pictures = Pictures()
    for k, c in enumerate(TAKEN):
        pictures.add(sorted((folder / folder_of(c)).glob("*.png"))[:number], k)
    return pictures


# Guides.


def clean_guide(place: Place, shots: int, seed: int) -> Classifier:
    """The classifier that saw the n shots alone."""
    made = network()
    model = made.make(len(TAKEN))
    model.load_state_dict(load_file(place.guide(shots, seed)))
    labels = [c.label for c in TAKEN]
    return Classifier("clean", model.requires_grad_(False).eval(), labels, timm_recipe(made.data))


@cache
def full_guide() -> Classifier:
    """The miniature's own, which saw hundreds of pictures of all 44 classes."""
    return load_classifier("miniature", CPU, torch.float32)


@cache
def judge() -> Classifier:
    """The miniature's judge, by which no token is learned."""
    return load_classifier("miniature-judge", CPU, torch.float32)


def guide_of(place: Place, source: str, shots: int, seed: int, c: SceneClass) -> Guide:
    """The guide of a source, asked for a class."""
    if source == "full":
        return Guide(full_guide(), c.index)
    return Guide(clean_guide(place, shots, seed), TAKEN.index(c))


# Words.


def learn_token(place: Place, source: str, shots: int, seed: int, c: SceneClass) -> dict:
    """A class token by the guide of a source; what it cost. One that is lost stays at its start."""
    token = new_token()
    config = with_preset("default", {"model": "miniature", "seed": seed} | LEARNING)
    guide = guide_of(place, source, shots, seed, c)
    with tempfile.TemporaryDirectory() as folder:
        try:
            settings = config.learning(**VALIDATION)
            training = learn(settings, token, [guide], c.word, RunFolder(folder, "c", "e"))
            cost = {"images": training.images, "updates": len(training.rows), "ended": training.stopped_by}
        except WorkError as error:
            cost = {"images": 5 * config.max_epochs, "updates": config.max_epochs, "ended": str(error)}
    save_vector(place.token(source, shots, seed, c), token, cost["images"])
    return cost


def invert_word(place: Place, shots: int, seed: int, c: SceneClass) -> dict:
    """Textual inversion on the shots, from the class's word; what it cost, in pictures of the sampler."""
    token = new_token()
    token.load(token.start_vector("class", c.word))
    paths = pictures_in(place.shots(seed), shots).of_class(TAKEN.index(c))
    rng = torch.Generator().manual_seed(seed)
    real = torch.stack([read_image(path) for path in paths])  # (n, 3, 64, 64)
    latents, _ = encoded(token.models, real)  # (2n, 4, 16, 16)
    optimizer = torch.optim.AdamW([token.vector], lr=INVERSION_RATE * token.word_rms, weight_decay=0.01)
    for _ in range(INVERSION_STEPS):
        optimizer.zero_grad()
        inversion_loss(token, latents, rng).backward()
        optimizer.step()
    # A step with gradient costs three calls a picture: forward, and twice that back.
    images = round(INVERSION_STEPS * INVERSION_BATCH * 3 / (2 * STEPS))
    save_vector(place.token("inversion", shots, seed, c), token, images)
    return {"images": images, "updates": INVERSION_STEPS}


def inversion_loss(token: ClassToken, latents: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """The loss of diffusers' textual_inversion.py on a batch of latents (N, 4, 16, 16), a scalar."""
    picked = torch.randint(len(latents), (INVERSION_BATCH,), generator=rng)  # (B,)
    which = torch.randint(len(TEMPLATES), (INVERSION_BATCH,), generator=rng).tolist()
    prompts = [fill(TEMPLATES[i], WORD, "").strip() for i in which]
    return denoising_loss(token, prompts, latents[picked], rng)


def save_vector(path: Path, token: ClassToken, images: int) -> None:
    """Write a vector, and how many pictures its learning was worth."""
    write_tensors(path, {WORD: token.vector.detach().clone()}, {"images": str(images)})


def images_of_learning(path: Path) -> int:
    """How many pictures a vector's learning was worth."""
    with safe_open(path, "pt") as file:
        return int(file.metadata()["images"])


# Drawing.


def sampler(guidance: float) -> SamplerSettings:
    """How all pictures are drawn."""
    return SamplerSettings(STEPS, guidance, scheduler="dpmsolver++")


def draw(folder: Path, token: ClassToken, prompts: list[str], first: int, guidance: float) -> None:
    """A picture of each prompt, on seeds from ``first`` on."""
    seeds = list(range(first, first + len(prompts)))
    with whole_folder(folder) as part:

        def write(images: torch.Tensor, chunk: list[int]) -> None:
            for seed, image in zip(chunk, images, strict=True):
                write_image(part / f"{seed - first:03d}.png", to_pil(image))

        with training_precision(token.models, "auto"):
            in_batches(token, prompts, seeds, sampler(guidance), BATCH, write)


def in_turn(word: str, class_name: str, number: int) -> list[str]:
    """The method's prompts in turn, as ``--export_dataset`` draws them."""
    return [fill(TEMPLATES[i % len(TEMPLATES)], word, class_name).strip() for i in range(number)]


def draw_class(place: Place, source: str, shots: int, seed: int, guidance: float, c: SceneClass) -> None:
    """Pictures of one class with the word of a source, or with its precise phrase."""
    token = new_token()
    if source == "phrase":
        prompts = in_turn(*with_article(c.name).split(" ", 1), DRAWN)
    else:
        token.load(load_file(place.token(source, shots, seed, c))[WORD])
        prompts = in_turn(WORD, "" if source == "inversion" else c.word, DRAWN)
    first = DATASET_BASE + (seed * 100 + TAKEN.index(c)) * 1000
    draw(place.drawn(source, shots, seed, guidance, folder_of(c)), token, prompts, first, guidance)


def draw_pool(place: Place, seed: int, guidance: float, word: str) -> None:
    """Pictures of a word's plain prompt, which its two classes share."""
    first = DATASET_BASE + (seed * 100 + 50 + WORDS.index(word)) * 1000
    folder = place.drawn("plain", 0, seed, guidance, word)
    draw(folder, new_token(), in_turn("a", word, POOL), first, guidance)


# The pictures of an arm.


def from_pool(place: Place, seed: int, guidance: float, c: SceneClass, number: int) -> list[Path]:
    """So many of the plain prompt's pictures; the two classes of a word begin at different ones."""
    paths = sorted(place.drawn("plain", 0, seed, guidance, c.word).glob("*.png"))
    start = 0 if c.kind == "common" else POOL // 2
    return [paths[(start + i) % POOL] for i in range(min(number, POOL))]


def at_equal_cost(
    place: Place, source: str, shots: int, seed: int, guidance: float, c: SceneClass
) -> list[Path]:
    """As many of the plain prompt's pictures as the token's learning took, and those that it draws."""
    number = DRAWN + images_of_learning(place.token(source, shots, seed, c))
    return from_pool(place, seed, guidance, c, number)


@torch.no_grad()
def probabilities(classifier: Classifier, paths: list[Path]) -> torch.Tensor:
    """Of the classes taken, (N, K)."""
    images = torch.stack([read_image(path) for path in paths])
    logits = torch.cat([classifier.logits(part) for part in images.split(64)])  # (N, labels)
    if len(classifier.labels) > len(TAKEN):
        logits = logits[:, [c.index for c in TAKEN]]
    return logits.softmax(1)


def share_right(pictures: Pictures) -> float:
    """The share, in [0, 1], of pictures that the judge gives to their label, among the classes taken."""
    found = probabilities(judge(), pictures.paths).argmax(1).tolist()
    return fmean(a == b for a, b in zip(found, pictures.labels, strict=True))


def plain(place: Place, shots: int, seed: int, guidance: float, number: int) -> Pictures:
    """The plain prompt's pictures as they come."""
    pictures = Pictures()
    for k, c in enumerate(TAKEN):
        pictures.add(from_pool(place, seed, guidance, c, number), k)
    return pictures


def filtered(place: Place, shots: int, seed: int, guidance: float, number: int) -> Pictures:
    """Those of the plain prompt's pictures that the clean guide finds the best, at equal cost."""
    guide = clean_guide(place, shots, seed)
    pictures = Pictures()
    for k, c in enumerate(TAKEN):
        paths = at_equal_cost(place, "token", shots, seed, guidance, c)
        best = probabilities(guide, paths)[:, k].topk(number).indices.tolist()
        pictures.add([paths[i] for i in best], k)
    return pictures


def distilled(place: Place, shots: int, seed: int, guidance: float, number: int) -> Pictures:
    """The plain prompt's pictures with the labels that the full guide gives them, at equal cost."""
    pictures = Pictures()
    found: dict[int, list[Path]] = {k: [] for k in range(len(TAKEN))}
    for c in TAKEN:
        paths = at_equal_cost(place, "full", 0, seed, guidance, c)
        for path, k in zip(paths, probabilities(full_guide(), paths).argmax(1).tolist(), strict=True):
            if path not in found[k]:
                found[k].append(path)
    for k, paths in found.items():
        pictures.add(paths[:number], k)
    return pictures


def by_word(source: str):
    """The pictures that the words of a source draw."""

    def arm(place: Place, shots: int, seed: int, guidance: float, number: int) -> Pictures:
        folder = place.drawn(source, 0 if source in WITHOUT_SHOTS else shots, seed, guidance, "x").parent
        return pictures_in(folder, number)

    return arm


GENERATED = {"plain": plain, "filtered": filtered, "distilled": distilled}
GENERATED |= {source: by_word(source) for source in ("inversion", "token", *WITHOUT_SHOTS)}
