"""What a token, an evaluation or a data set was made with, and whether that is what is asked for now."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from apps.earlier import read_record, upgraded
from config import RunConfig, deciding
from discriminative import VERSION
from discriminative.diffusion.sources import model_id
from discriminative.errors import UsageError
from discriminative.records.files import read_json
from discriminative.records.layout import RunFolder
from discriminative.settings import LearningSettings, parse_sampler
from discriminative.tokens.checkpoint import made_with
from discriminative.tokens.files import fingerprint, read_origin

# Which token it is, rather than how it was learned.
IDENTITY = ("class_index", "model", "classifier", "placeholder_token", "prompt_name")

# Options that earlier evaluations do not say, and what they did then.
YOUNGER = {"eval_precision": None}


def token_options(config: RunConfig) -> set[str]:
    """The options that decide a token: where training has its own sampler, the evaluation's does not."""
    free = set()
    scheduler, steps = parse_sampler(config.training_sampler)
    if steps:
        free.add("num_inference_steps")
    if scheduler:
        free.add("scheduler")
    return set(deciding("token")) - free


def is_learned(config: RunConfig, folder: RunFolder, learning: LearningSettings | None = None) -> bool:
    """Whether the token on disk was learned for this class with these options and constants.

    Where results are, how much memory is taken, and how an evaluation is sampled changes no token.

    Args:
        learning: of the training that is asked for; None is that of the options alone.
    """
    if not (folder.token.exists() and folder.config.exists()):
        return False
    then, constants = read_record(read_json(folder.config))
    now = asdict(config)
    if set(then) - set(now):  # an option that is gone, and did something
        return False
    if constants != (learning or config.learning()).constants:
        return False
    then = asdict(RunConfig()) | then
    return all(now[name] == then[name] for name in token_options(config))


def training_options(config: RunConfig, learning: LearningSettings) -> dict[str, Any]:
    """All that decides a token, as a training's checkpoint has it."""
    options = {name: getattr(config, name) for name in sorted(token_options(config))}
    return {"version": VERSION} | options | learning.constants


def check_interrupted(config: RunConfig, folder: RunFolder, learning: LearningSettings) -> None:
    """Check that a training which was interrupted there is the one that is asked for: it goes on.

    Raises:
        UsageError: it is another one.
    """
    path = folder.unfinished.checkpoint
    then = made_with(path)
    if then is None or folder.is_to_be_taken:
        return
    now = json.loads(json.dumps(training_options(config, learning)))
    for name in now | then:
        if now.get(name) != then.get(name):
            raise UsageError(
                f"--{name}: {now.get(name)!r} was given, but a training that was interrupted there has "
                f"{then.get(name)!r}; give that to go on, another --exp_id, or remove {path.parent}"
            )


def is_evaluated(config: RunConfig, folder: RunFolder, vectors: torch.Tensor, templates: list[str]) -> bool:
    """Whether the evaluation on disk is of this token and of these options, and its pictures are there.

    Args:
        vectors: of the token, (N, width).
        templates: of the prompts to evaluate.
    """
    if not all(path.exists() for path in (folder.result, folder.grid, folder.eval_images)):
        return False
    result = read_json(folder.result)
    is_of_token = result.get("token") == fingerprint(vectors)
    then = YOUNGER | upgraded_options(result.get("options"))
    is_of_options = then == evaluation_options(config)
    return is_of_token and is_of_options and [p["template"] for p in result.get("prompts", [])] == templates


def evaluation_options(config: RunConfig) -> dict[str, Any]:
    """What an evaluation depends on, as its file has it."""
    return {name: getattr(config, name) for name in deciding("evaluation")} | {"clip_model": config.clip_name}


def upgraded_options(options: dict[str, Any] | None) -> dict[str, Any]:
    """A record's options in today's terms; those of learning that an upgrade adds are left out."""
    options = options or {}
    return {name: value for name, value in upgraded(options).items() if name in options or name == "model"}


def dataset_options(config: RunConfig, vectors: torch.Tensor | None) -> dict[str, Any]:
    """What the images of a data set depend on; ``vectors`` are None where the token is yet to be learned."""
    token = None if vectors is None else fingerprint(vectors)
    return {"token": token} | {name: getattr(config, name) for name in deciding("dataset")}


def read_dataset_record(path: Path) -> dict[str, Any]:
    """A data set's record, of this version or an earlier one."""
    record = upgraded_options(read_json(path))
    record.pop("tiny_vae", None)  # earlier ones say it, always False
    return record


def other_origin(config: RunConfig, path: Path) -> list[str]:
    """What a token file says that it was learned with, where that is not what is given now: "--model:
    'sd1.5'"."""
    origin = read_origin(path) if path.exists() else {}
    now = {"model": model_id(config.model), "classifier": config.classifier}
    then = {
        flag: model_id(origin[flag]) if flag == "model" else origin[flag] for flag in now if flag in origin
    }
    return [
        f"--{flag}: {now[flag]!r} was given, but {path} was learned with {then[flag]!r}"
        for flag in then
        if then[flag] != now[flag]
    ]


def check_origin(config: RunConfig, path: Path) -> None:
    """Check that a token which is there belongs to this model and classifier: else it would be lost, or
    misjudged.

    Raises:
        UsageError: it was learned with another model or classifier.
    """
    for difference in other_origin(config, path):
        raise UsageError(f"{difference}; give that, or another --exp_id")


def changed_settings(config: RunConfig, folder: RunFolder) -> list[str]:
    """What a token on disk was learned with and is now sampled with otherwise: "guidance_scale 5.0 ->
    7.0"."""
    if config.token_path:
        return other_origin(config, Path(config.token_path))
    if config.train or not folder.config.exists():
        return []
    then, _ = read_record(read_json(folder.config))
    changes = [
        f"{name} {then[name]} -> {getattr(config, name)}"
        for name in deciding("drawing")
        if name in then and then[name] != getattr(config, name)
    ]
    if "guidance_interval" in then:  # an option that is gone, and did something
        changes.append(f"guidance_interval {then['guidance_interval']} -> none")
    if then.get("model", config.model) != config.model and not other_origin(config, folder.token):
        changes.append(f"model {then['model']} -> {config.model}")  # another revision
    return changes


def origin(config: RunConfig, label: str, class_name: str) -> dict[str, str]:
    """What a token file says of itself."""
    steps = {name: getattr(config, name) for name in deciding("token") if name not in IDENTITY}
    said = {
        "class_index": config.class_index,
        "class_name": label,
        "prompt_name": class_name,
        "placeholder": config.placeholder_token,
        "model": config.model if "@" in config.model else model_id(config.model),
        "classifier": config.classifier,
        "hyperparameters": json.dumps(steps),
        "version": VERSION,
    }
    return {name: str(value) for name, value in said.items()}
