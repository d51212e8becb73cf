"""What can be told of the options without reading a file of a model: each in one line that names the flag."""

import importlib.util
import math
import os
import re
from dataclasses import fields
from pathlib import Path

from config import (
    MAX_DATASET,
    MAX_SEED,
    NO_EXP_IDS,
    SEED_RANGE,
    VALIDATION_BASE,
    RunConfig,
    UsageError,
    parse_interval,
    parse_stages,
)
from hub import one_line


def _need(holds: bool, flag: str, given, allowed: str) -> None:
    if not holds:
        raise UsageError(f"--{flag}: {given!r} was given; allowed is {allowed}")


POSITIVE = (
    "images_per_update",
    "batch_size",
    "decode_batch_size",
    "eval_batch_size",
    "reuse_trajectory",
    "max_epochs",
    "validate_every",
    "test_size",
    "num_images",
    "num_inference_steps",
    "gradient_steps",
    "num_vectors",
    "attempt_patience",
)
NOT_NEGATIVE = (
    *("training_steps", "patience", "noise_pool", "confirm_size", "export_dataset", "train_images_every"),
    *("weight_decay", "max_grad_norm", "max_token_norm", "guidance_scale"),
)
SHARES = (
    *("stop_train_accuracy", "stop_validation_accuracy", "enough_validation_accuracy"),
    *("validation_certainty", "validation_guidance_end"),
)


def validate(config: RunConfig) -> None:
    """Check everything that can be told without loading a weight.

    Raises:
        UsageError: names the flag, what was given and what is allowed.
    """
    for f in fields(config):
        value, choices = getattr(config, f.name), f.metadata["choices"]
        _need(choices is None or value is None or value in choices, f.name, value, " or ".join(choices or ()))
        _need(not isinstance(value, float) or math.isfinite(value), f.name, value, "a finite number")
    exports = config.export or config.save_as_full_pipeline
    draws = config.prompt or config.prompts_file or config.export_dataset
    is_of_a_class = config.train or config.evaluate or draws or exports
    if not (is_of_a_class or config.list_classes or config.report):
        raise UsageError('nothing to do: add --train True, --evaluate True, both, or --prompt "a photo of {token} {class}"')
    if is_of_a_class and config.class_index is None:
        raise UsageError("--class_index is required: a class's number or name, several, or all; --list_classes True lists them")
    _check_together(config)
    for name in POSITIVE:
        value = getattr(config, name)
        _need(value is None or value >= 1, name, value, "1 or more")
    for name in NOT_NEGATIVE:
        _need(getattr(config, name) >= 0, name, getattr(config, name), "0 or more")
    for name in SHARES:
        _need(0 <= getattr(config, name) <= 1, name, getattr(config, name), "0 to 1")
    _check_places(config)
    for name in ("height", "width"):
        value = getattr(config, name)
        _need(value is None or value >= 8, name, value, "8 or more")
    for name in ("adam_beta1", "adam_beta2", "token_ema"):
        _need(0 <= getattr(config, name) < 1, name, getattr(config, name), "0 or more, below 1")
    for name in ("adam_epsilon", "learning_rate", "relative_rate", "fine_rate"):
        value = getattr(config, name)
        _need(value is None or value > 0, name, value, "above 0")
    for start in config.starts:
        allowed = "class, vocabulary, initializer, a word, or several as in cat+pet"
        _need(re.fullmatch(r"\w+(\+\w+)*", start) is not None, "start", config.start, allowed)
    _need(config.num_vectors <= 32, "num_vectors", config.num_vectors, "1 to 32")
    _need(1 <= config.num_templates <= 3, "num_templates", config.num_templates, "1 to 3")
    _need(0 <= config.seed <= MAX_SEED, "seed", config.seed, f"0 to {MAX_SEED}")
    _need(config.export_dataset <= MAX_DATASET, "export_dataset", config.export_dataset, f"at most {MAX_DATASET}")
    for name in ("test_size", "validation_size", "confirm_size"):
        _need(getattr(config, name) <= VALIDATION_BASE, name, getattr(config, name), f"at most {VALIDATION_BASE}")
    _need(
        config.max_epochs * config.images_per_update <= SEED_RANGE, "max_epochs", config.max_epochs, f"at most {SEED_RANGE} images in all"
    )
    _need(
        config.choose_by != "validation" or config.validation_size >= 1,
        "validation_size",
        config.validation_size,
        "1 or more with --choose_by validation",
    )
    _need(
        re.fullmatch(r"[a-z0-9_]+", config.placeholder_token) is not None,
        "placeholder_token",
        config.placeholder_token,
        "lower-case letters, digits and _",
    )
    _need(
        re.fullmatch(r"\w[\w.-]{0,99}", config.exp_id) is not None,
        "exp_id",
        config.exp_id,
        "a short folder name of letters, digits, . _ and -",
    )
    _need(config.exp_id not in NO_EXP_IDS, "exp_id", config.exp_id, f"another name than {', '.join(NO_EXP_IDS)}")
    _need(re.fullmatch(r"auto|cpu|cuda(:\d+)?", config.device) is not None, "device", config.device, "auto, cpu, cuda or cuda:N")
    _check_writable(config.output_path)


def _check_together(config: RunConfig) -> None:
    """Options that do nothing without another one, or are at odds with it."""
    for name in ("eval_prompts", "reference_images", "clip_model"):
        value = getattr(config, name)
        _need(config.evaluate or not value, name, value, "a value only with --evaluate True")
    _need(config.train or config.report_to == "none", "report_to", config.report_to, "none without --train True")
    _need(
        config.report_to == "none" or importlib.util.find_spec(config.report_to) is not None,
        "report_to",
        config.report_to,
        f"an installed package: pip install {config.report_to}",
    )
    _need(config.choose_by == "validation" or not config.token_ema, "token_ema", config.token_ema, "0 with --choose_by loss")
    _need(not (config.train and config.token_path), "token_path", config.token_path, "a file only without --train True")


def _check_places(config: RunConfig) -> None:
    """Options that name places on a trajectory."""
    try:
        parse_stages(config.jump_at)
    except ValueError:
        allowed = "a number from 0 to 1, several with commas, a range such as 0.05-0.3, each with @8 for 8 steps, stages with semicolons"
        raise UsageError(f"--jump_at: {config.jump_at!r} was given; allowed is {allowed}") from None
    try:
        parse_interval(config.guidance_interval)
    except ValueError:
        raise UsageError(
            f"--guidance_interval: {config.guidance_interval!r} was given; allowed are two numbers from 0 to 1, as in 0.1,0.8"
        ) from None


def read_prompts(path: str, flag: str) -> list[str]:
    """The prompts of a text file, one a line; empty lines and those that begin with # are left out.

    Raises:
        UsageError: it cannot be read, or holds none.
    """
    try:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--{flag}: {path!r} was given, which cannot be read ({one_line(error)})") from error
    prompts = [line for line in lines if line and not line.startswith("#")]
    if not prompts:
        raise UsageError(f"--{flag}: {path!r} was given, which holds no prompt; allowed is a text file with one a line")
    return prompts


def _check_writable(output_path: str) -> None:
    try:
        path = Path(output_path).absolute()
        existing = next(p for p in (path, *path.parents) if p.exists())
    except OSError as error:
        raise UsageError(f"--output_path: {output_path!r} was given, which cannot be reached ({error.strerror})") from error
    if not existing.is_dir():
        raise UsageError(f"--output_path: {output_path!r} was given, but {existing} is a file; allowed is a folder that can be written")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UsageError(f"--output_path: {output_path!r} was given, but {existing} cannot be written; allowed is a folder that can be")
