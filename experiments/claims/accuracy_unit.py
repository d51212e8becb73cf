"""One unit of claim (i): a method learns a class, draws, and is measured."""

import json
import time
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from statistics import fmean

from discriminative import VERSION
from experiments.claims.accuracy_methods import METHODS, TUNING_SEED, Unit
from miniature.scenes import CLASSES

FILES = Path("results/claims/accuracy")


@cache
def loaded() -> tuple:
    """The miniature's models, and guide, judge and third classifier; once a process."""
    import torch

    from classifiers import load_classifier
    from discriminative.diffusion.kept import KeptLatents, weights_fingerprint
    from discriminative.diffusion.models import load_models
    from discriminative.hub import quiet_libraries

    torch.set_num_threads(1)
    quiet_libraries()
    to = torch.device("cpu"), torch.float32
    models = load_models("miniature", *to)
    names = {"guide": "miniature", "judge": "miniature-judge", "judge2": "miniature-judge2"}
    classifiers = {who: load_classifier(name, *to) for who, name in names.items()}
    return models, classifiers, KeptLatents(FILES / "latents", weights_fingerprint(models.unet))


def task_of(unit: Unit):
    """A class, and what a method may use for it: a UNet of its own, as some methods change it."""
    from copy import deepcopy

    from discriminative.guides.classifier import Guide
    from discriminative.settings import SamplerSettings
    from discriminative.tokens.class_token import ClassToken
    from experiments.claims.calls import Calls
    from experiments.claims.rivals import Budget, Task

    models, classifiers, kept = loaded()
    models = replace(models, unet=deepcopy(models.unet), tokenizer=models.fresh_tokenizer())
    target = unit.class_index - 1
    return Task(
        ClassToken(models, "newclas", "a"),
        Calls(models.unet),
        Guide(classifiers["guide"], target),
        CLASSES[target],
        unit.seed,
        SamplerSettings(12, 7.0, scheduler="dpmsolver++"),
        Budget(**unit.budget) if unit.budget else None,
        kept,
        FILES,
    )


def one_unit(unit: Unit) -> dict:
    """Learn, draw and measure; all figures as one row. Seconds are those of the one thread alone."""
    from experiments.claims import rivals

    began = time.process_time()
    method = METHODS[unit.method]
    task = task_of(unit)
    spent = time.process_time()
    learned = getattr(rivals, method.learn)(task, **unit.settings)
    once = learned.once or {"calls": task.calls.total, "seconds": time.process_time() - spent}
    row = asdict(unit) | {"settings": unit.settings, "once": once}
    c = task.scene_class
    row |= {"name": c.name, "word": c.word, "kind": c.kind, "said": learned.said}
    row |= {"version": VERSION, "bytes": write_kept(unit, learned, once)}
    row |= measured(unit, task, learned)
    return row | {"took": time.process_time() - began}


def write_kept(unit: Unit, learned, once: dict) -> int:
    """Write what has to be kept, and what it cost once; the bytes of what has to be kept."""
    from safetensors.torch import save

    from discriminative.records.files import write_tensors
    from experiments.claims.rivals import artefact

    if not learned.tensors:
        return len(learned.text.encode())
    folder = FILES / ("checked" if unit.check else "tuned" if unit.seed == TUNING_SEED else "")
    path = folder / artefact(unit.method, unit.class_index, unit.seed)
    write_tensors(path, learned.tensors, {"once": json.dumps(once)})
    return len(save(learned.tensors))


def measured(unit: Unit, task, learned) -> dict:
    """What the images are worth, and what one costs."""
    from contextlib import nullcontext

    from discriminative.precision import training_precision
    from discriminative.records.files import grid, write_image
    from experiments.measure import COLOURS, SHOWN

    method = METHODS[unit.method]
    precision = nullcontext() if learned.as_evaluated else training_precision(task.token.models, "auto")
    with precision:
        before = task.calls.total
        began = time.process_time()
        images = learned.draw("", list(range(method.images)))  # (N, 3, 64, 64)
        seconds = time.process_time() - began
        calls = task.calls.total - before
        on = {colour: f" on a {colour} background" for colour in COLOURS}
        placed = {colour: learned.draw(text, list(range(method.on_each))) for colour, text in on.items()}
    found = counted(images, unit.class_index - 1) | {"images": len(images)}
    found["each"] = {"calls": calls / len(images), "seconds": seconds / len(images)}
    if learned.candidates > 1:  # most come from the folder of kept ones
        found["each"]["calls"] = task.budget.each * learned.candidates
        found["each"]["seconds"] = None
    if not unit.check and unit.seed != TUNING_SEED:
        strip = strip_of(unit.method, unit.class_index, unit.seed)
        write_image(strip, grid(images[:SHOWN], columns=SHOWN))
    return found | followed(placed, unit.class_index - 1)


def followed(placed: dict, target: int) -> dict[str, float]:
    """Share of images that stand on the background that was asked for, and, of them all, of the class by the
    judge.

    Args:
        placed: images (N, 3, 64, 64) by the colour.
    """
    import torch

    from experiments.measure import background

    pixels = {c: (of.permute(0, 2, 3, 1) * 255).round().byte().numpy() for c, of in placed.items()}
    on = fmean(background(p) == c for c, of in pixels.items() for p in of)
    everywhere = torch.cat(list(placed.values()))
    right = counted(everywhere, target)["judge"] / len(everywhere)
    return {"on_background": on, "right_on_background": right}


def counted(images, target: int) -> dict:
    """How many of images (N, 3, 64, 64) each classifier gives to the class, and how varied those are that
    the guide gives to it, in the judge's features."""
    import torch

    from discriminative.guides.classifier import gives
    from discriminative.records.scores import spread

    _, classifiers, _ = loaded()
    found = {}
    with torch.no_grad():
        for who, classifier in classifiers.items():
            logits, features = classifier.look(images)  # (N, K), (N, D)
            right = gives(logits, target)  # (N,)
            found[who] = int(right.sum())
            if who == "guide":
                of_guide = right
            if who == "judge":
                found["diversity"] = spread(features[of_guide])
    return found


def strip_of(method: str, class_index: int, seed: int) -> Path:
    """Where the first images of a unit lie."""
    name = method.replace(" ", "_").replace(",", "")
    return FILES / "images" / name / f"{class_index:04d}_{seed}.png"
