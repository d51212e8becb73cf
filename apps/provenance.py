"""What a token was learned with, and whether that is what is asked for now."""

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from config import NO_HYPERPARAMETERS, RunConfig
from discriminative import VERSION
from discriminative.errors import UsageError

# What options that are younger than a token did then, where that is not their default.
OFF = {"enough_validation_accuracy": 0.0, "confirm_best": False, "validation_certainty": 0.0}
# What an evaluation depends on, beside the token.
EVALUATION_OPTIONS = (
    *(
        "model",
        "revision",
        "classifier",
        "judge",
        "mixed_precision",
        "scheduler",
        "num_inference_steps",
        "guidance_scale",
    ),
    *(
        "guidance_interval",
        "height",
        "width",
        "placeholder_token",
        "initializer_token",
        "prompt_name",
        "test_size",
    ),
    *("eval_prompts", "reference_images", "clip_model", "token_path"),
)


def is_learned(config: RunConfig, folder) -> bool:
    """Whether the token on disk was learned for this class with these options; one that is younger than the token was off then.

    Where results are, how much memory is taken, and how an evaluation is drawn changes no token; where training has its own sampler,
    the evaluation's steps and scheduler do not either.
    """
    if not (folder.token.exists() and folder.config.exists()):
        return False
    from discriminative.records.files import read_json

    now, then = asdict(config), asdict(RunConfig()) | OFF | read_json(folder.config)["config"]
    free = NO_HYPERPARAMETERS - {
        "class_index",
        "model",
        "revision",
        "classifier",
        "placeholder_token",
        "prompt_name",
    }
    free |= {"num_inference_steps"} if config.training_steps else set()
    free |= {"scheduler"} if config.training_scheduler != "same" else set()
    return all(now[k] == then[k] for k in now if k not in free)


def is_evaluated(plan) -> bool:
    """Whether the evaluation on disk is of this token, and of these options, and its pictures are there."""
    from discriminative.records.files import read_json
    from discriminative.tokens.files import fingerprint
    from evaluate import templates_of

    folder = plan.folder
    if not all(path.exists() for path in (folder.result, folder.grid, folder.eval_images)):
        return False
    result = read_json(folder.result)
    templates = [prompt["template"] for prompt in result.get("prompts", [])]
    is_of_token = result.get("token") == fingerprint(plan.saved)
    return (
        is_of_token
        and result.get("options") == evaluation_options(plan.config)
        and templates == templates_of(plan.config)
    )


def evaluation_options(config: RunConfig) -> dict[str, Any]:
    """What an evaluation depends on, as its file has it."""
    return {name: getattr(config, name) for name in EVALUATION_OPTIONS}


def other_origin(config: RunConfig, path: Path) -> list[str]:
    """What a token file says that it was learned with, where that is not what is given now: "--model: 'sd1.5'"."""
    from discriminative.diffusion.sources import model_id
    from discriminative.tokens.files import read_origin

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
    """Check that a token which is there belongs to this model and classifier: else it would be lost, or judged by the wrong ones.

    Raises:
        UsageError: it was learned with another model or classifier.
    """
    for difference in other_origin(config, path):
        raise UsageError(f"{difference}; give that, or another --exp_id")


def changed_settings(plan) -> list[str]:
    """What a token on disk was learned with and is now drawn with otherwise: "guidance_scale 5.0 -> 7.0"."""
    if plan.config.token_path:
        return other_origin(plan.config, Path(plan.config.token_path))
    if plan.config.train or not plan.folder.config.exists():
        return []
    from discriminative.records.files import read_json

    then, now = read_json(plan.folder.config)["config"], asdict(plan.config)
    names = (
        "revision",
        "scheduler",
        "prompt_name",
        "initializer_token",
        "num_inference_steps",
        "guidance_scale",
    )
    names += ("guidance_interval", "height", "width")
    return [f"{n} {then[n]} -> {now[n]}" for n in names if n in then and then[n] != now[n]]


def origin(plan) -> dict[str, str]:
    """What a token file says of itself."""
    from discriminative.diffusion.sources import model_id

    config = plan.config
    steps = {f.name: getattr(config, f.name) for f in fields(config) if f.name not in NO_HYPERPARAMETERS}
    said = {"class_index": config.class_index, "class_name": plan.label, "prompt_name": plan.class_name}
    said |= {
        "placeholder": config.placeholder_token,
        "model": model_id(config.model),
        "revision": config.revision or "",
    }
    said |= {"classifier": plan.config.classifier, "hyperparameters": json.dumps(steps), "version": VERSION}
    return {k: str(v) for k, v in said.items()}
