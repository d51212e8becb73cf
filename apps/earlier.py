"""Options of earlier versions: what serves instead, and what a record of then says in today's terms."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple, get_args

from config import RunConfig
from discriminative.errors import UsageError, WorkError
from discriminative.settings import CurriculumSettings, OptimizerSettings, ValidationSettings


class Gone(NamedTuple):
    """An option that went.

    Args:
        off: the value at which it did nothing.
        instead: what serves instead.
    """

    off: Any
    instead: str


WORSE = "it went, as it did harm or nothing (docs/experiments.md)"
CONSTANT = "it is a setting in Python now: config.learning({}=...) in discriminative/settings.py"
MERGED = object()  # there is no value at which it did nothing: today's option has it

GONE = {
    "guidance_interval": Gone("0,1", WORSE),
    "reuse_trajectory": Gone(1, WORSE),
    "token_ema": Gone(0.0, WORSE),
    "validation_guidance_end": Gone(1.0, WORSE),
    "normalize_steps": Gone(False, WORSE),
    "num_templates": Gone(3, "all three templates are trained on"),
    "train_images_every": Gone(MERGED, "the images of every update are kept"),
    "cache_dir": Gone(MERGED, "set the environment variable HF_HOME"),
    "local_files_only": Gone(MERGED, "set the environment variable HF_HUB_OFFLINE=1"),
    "batch_size": Gone(MERGED, "--memory and the memory itself decide: a batch that does not fit is halved"),
    "prompts_file": Gone(MERGED, "give --prompt @FILE"),
    "revision": Gone(MERGED, "give --model ID@REVISION"),
    "training_scheduler": Gone(MERGED, "give --training_sampler SCHEDULER@STEPS"),
    "training_steps": Gone(MERGED, "give --training_sampler SCHEDULER@STEPS"),
    "save_as_full_pipeline": Gone(MERGED, "give --export pipeline"),
    "gradient_steps": Gone(MERGED, "give --gradient_mode last:K, random:K or lv:K"),
    "confirm_best": Gone(True, "the best token's whole validation is always sampled"),
    **{
        f.name: Gone(MERGED, CONSTANT.format(f.name))
        for kind in (ValidationSettings, OptimizerSettings, CurriculumSettings)
        for f in fields(kind)
        if f.name not in {own.name for own in fields(RunConfig)}
    },
}
# What a younger option did before it was there.
BEFORE_IT_WAS_THERE = {
    "enough_validation_accuracy": 0.0,
    "confirm_best": False,
    "validation_certainty": 0.0,
}


def constants_of(config: dict[str, Any]) -> dict[str, Any]:
    """The constants that an earlier version had as options, of a record's ``config``."""
    today = RunConfig().learning().constants
    then = today | BEFORE_IT_WAS_THERE | config
    return {name: then[name] for name in today}


def upgraded(config: dict[str, Any]) -> dict[str, Any]:
    """The options of an earlier version in today's terms.

    Options that went are left out where they did nothing; where they did something they stay, under their
    old names.
    """
    config = dict(config)
    config |= {name: value for name, value in BEFORE_IT_WAS_THERE.items() if name not in config}
    if "training_scheduler" in config:
        scheduler = config.pop("training_scheduler")
        steps = config.pop("training_steps", 0)
        config["training_sampler"] = f"{scheduler}@{steps}" if steps else scheduler
    steps = config.pop("gradient_steps", 1)
    if steps != 1 and config.get("gradient_mode") in ("last", "random", "lv"):
        config["gradient_mode"] += f":{steps}"
    revision = config.pop("revision", None)
    if revision:
        config["model"] = f"{config.get('model') or RunConfig().model}@{revision}"
    prompts_file = config.pop("prompts_file", None)
    if prompts_file:
        config["prompt"] = f"@{prompts_file}"
    if config.pop("save_as_full_pipeline", False):
        config["export"] = "pipeline" if not config.get("export") else f"{config['export']},pipeline"
    return {k: v for k, v in config.items() if k not in GONE or GONE[k].off not in (MERGED, v)}


def read_record(record: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options and constants of a token's ``config.json``, of this version or an earlier one.

    Raises:
        WorkError: it holds no options.
    """
    config = record.get("config")
    constants = record.get("constants", {})
    if not (isinstance(config, dict) and isinstance(constants, dict)):
        raise WorkError("a token's config.json holds no options; remove or mend it")
    if "version" in record:
        return config, constants
    return upgraded(config), constants_of(config)


def read_options(path: str) -> dict[str, Any]:
    """The options of a run's ``config.json``, or of a JSON or YAML file of options.

    Raises:
        UsageError: it cannot be read, or holds something else.
    """
    given = f"--config: {path!r} was given"
    content = read_content(path)
    if not isinstance(content, dict):
        raise UsageError(f"{given}; allowed is a run's config.json, or a file of options and values")
    options = content
    if isinstance(content.get("config"), dict):
        options, constants = read_record(content)
        today = RunConfig().learning().constants
        for name, value in constants.items():
            if name in today and value != today[name]:
                instead = CONSTANT.format(name)
                raise UsageError(f"{given}; {name} was {value}, and is {today[name]} now: {instead}")
    types = {f.name: f.type for f in fields(RunConfig)}
    for name, value in options.items():
        if name in GONE:
            raise UsageError(f"{given}; {name} is no option any more: {GONE[name].instead}")
        if name not in types:
            raise UsageError(f"{given}; {name} is no option")
        kinds = get_args(types[name]) or (types[name],)
        if value is False and name == "mixed_precision":
            value = "no"  # which YAML takes for False
        options[name] = as_float(value) if float in kinds else value
        if type(options[name]) not in kinds:
            kind = getattr(types[name], "__name__", str(types[name]))
            raise UsageError(f"{given}; {name} is {value!r}; allowed is {kind}")
    return options


def read_content(path: str) -> Any:
    """What a file of JSON or YAML holds. JSON first: YAML takes two escapes of one character for two.

    Raises:
        UsageError: it cannot be read.
    """
    import yaml

    try:
        text = Path(path).read_text(encoding="utf-8")
        try:
            return json.loads(text)
        except json.JSONDecodeError:
            return yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"--config: {path!r} was given, which cannot be read ({reason})") from error


def as_float(value: Any) -> Any:
    """A whole number, or a text such as YAML makes of 1e-5, as a decimal number; anything else as it is."""
    try:
        return float(value) if type(value) in (int, str) else value
    except ValueError:
        return value
