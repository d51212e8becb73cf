#!/usr/bin/env python
"""Learn a class token for a text-to-image model from a pretrained classifier, evaluate it, and generate with it.

python run.py --class_index 283 --train True --evaluate True                          # SD 1.4, ImageNet's tiger cat
python run.py --class_index 283 --train True --evaluate True --preset paper           # with the paper's settings
python run.py --class_index 283 --prompt "A photo of {token} {class} in the snow"     # with the token found on disk
python run.py --model miniature --class_index 2 --train True --evaluate True          # the bundled model, on a laptop
"""

import argparse
import json
import sys
import types
from dataclasses import asdict, dataclass, fields
from typing import Any, get_args

from config import PRESETS, RunConfig, UsageError, WorkError, validate, with_preset


def boolean(text: str) -> bool:
    """True/False, true/false, 1/0 and nothing else."""
    values = {"True": True, "true": True, "1": True, "False": False, "false": False, "0": False}
    if text not in values:
        raise argparse.ArgumentTypeError(f"{text!r} was given; allowed is True, true, 1, False, false or 0")
    return values[text]


class Parser(argparse.ArgumentParser):
    """An argparse parser whose errors are one line."""

    def error(self, message: str):
        """Print the message and exit with 2."""
        self.exit(2, f"run.py: error: {message}\n")


def build_parser() -> argparse.ArgumentParser:
    """A flag for every field of :class:`RunConfig`, with its help line and default, and ``--preset``."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--preset", choices=PRESETS, default="default", help="set of options to start from; flags given beside it win")
    for f in fields(RunConfig):
        kind = next(t for t in get_args(f.type) if t is not types.NoneType) if isinstance(f.type, types.UnionType) else f.type
        shown = "" if f.default is None else f" (default: {f.default})"
        kind = boolean if kind is bool else kind
        parser.add_argument(
            f"--{f.name}", type=kind, choices=f.metadata["choices"], default=argparse.SUPPRESS, help=f.metadata["help"] + shown
        )
    return parser


def resolve_classifiers(config: RunConfig) -> tuple[str, str | None]:
    """Names of guide and judge after the defaults of model and classifier."""
    from classifiers import CLASSIFIERS, check_classifier
    from models import BROUGHT_CLASSIFIERS

    guide = config.classifier or BROUGHT_CLASSIFIERS.get(config.model, "inet")
    check_classifier("classifier", guide)
    judge = config.judge or CLASSIFIERS[guide].judge
    if judge in (None, "none"):
        return guide, None
    check_classifier("judge", judge)
    return guide, judge


@dataclass(frozen=True)
class Plan:
    """What the options come to, told without loading a weight."""

    config: RunConfig
    guide: str
    judge: str | None
    label: str
    class_name: str  # in the prompts
    prompts: tuple[str, ...]
    folder: Any  # RunFolder
    device: Any  # torch.device
    dtype: Any  # torch.dtype
    saved: Any  # the vector found on disk, None with --train


def make_plan(config: RunConfig) -> Plan:
    """Resolve names and check them.

    Raises:
        UsageError: whatever is wrong and can be told before weights are loaded.
    """
    validate(config)
    from class_token import TEMPLATES, check_apart, check_words, fill, read_token, tokenize
    from classifiers import check_class_index, prompt_class_name, read_labels
    from models import check_model, check_sampling, is_local, load_tokenizer, resolve_device, resolve_dtype
    from outputs import RunFolder, class_folder

    check_model(config.model)
    guide, judge = resolve_classifiers(config)
    labels = read_labels(guide)
    check_class_index(guide, config.class_index, labels)
    device = resolve_device(config.device)
    label = labels[config.class_index - 1]
    class_name = config.prompt_name or prompt_class_name(label)
    prompts = [fill(t, config.placeholder_token, class_name) for t in TEMPLATES[: config.num_templates]]
    if config.prompt:
        prompts.append(config.prompt.replace("{token}", config.placeholder_token).replace("{class}", class_name))
    check_apart(config.placeholder_token, prompts)
    folder = RunFolder(config.output_path, class_folder(config.class_index, label), config.exp_id)
    check_origin(config, guide, folder.token)
    saved = None
    if not config.train and folder.token.exists():
        saved = read_token(folder.token)[1]
    elif not config.train:
        raise UsageError(f"--train: there is no token at {folder.token}; learn it with --class_index {config.class_index} --train True")
    if is_local(config.model) or not config.dry_run:  # a dry run fetches nothing
        check_sampling(config.model, config.height, config.width, config.num_inference_steps, config.gradient_steps)
        tokenizer = load_tokenizer(config.model)
        check_words(tokenizer, config.placeholder_token, config.initializer_token)
        tokenizer.add_tokens([config.placeholder_token])
        tokenize(tokenizer, prompts)
    dtype = resolve_dtype(config.mixed_precision, device)
    return Plan(config, guide, judge, label, class_name, tuple(prompts), folder, device, dtype, saved)


def check_origin(config: RunConfig, guide: str, path) -> None:
    """Check that a token which is there belongs to this model and classifier: else it would be lost, or judged by the wrong ones.

    Raises:
        UsageError: it was learned with another model or classifier.
    """
    from class_token import read_origin

    origin = read_origin(path) if path.exists() else {}
    for flag, now in (("model", config.model), ("classifier", guide)):
        if origin.get(flag, now) != now:
            raise UsageError(f"--{flag}: {now!r} was given, but {path} was learned with {origin[flag]!r}; give that, or another --exp_id")


def changed_settings(plan: Plan) -> list[str]:
    """What a token on disk was learned with and is now drawn with otherwise: "guidance_scale 5.0 -> 7.0"."""
    if plan.config.train or not plan.folder.config.exists():
        return []
    then, now = json.loads(plan.folder.config.read_text())["config"], asdict(plan.config)
    names = ("prompt_name", "initializer_token", "num_inference_steps", "guidance_scale", "height", "width")
    return [f"{n} {then[n]} -> {now[n]}" for n in names if n in then and then[n] != now[n]]


def describe(plan: Plan) -> str:
    """The resolved configuration and the plan as JSON."""
    steps = [verb for verb in ("train", "evaluate") if getattr(plan.config, verb)] + ["generate"] * bool(plan.config.prompt)
    names = {"do": steps, "classifier": plan.guide, "judge": plan.judge, "class": plan.label, "prompts": plan.prompts}
    places = {
        "device": str(plan.device),
        "precision": str(plan.dtype),
        "token": str(plan.folder.token),
        "images": str(plan.folder.eval_images),
    }
    return json.dumps({"config": asdict(plan.config), "plan": names | places}, indent=2)


def run(plan: Plan) -> None:
    """Do what the plan says: train, evaluate, generate.

    Raises:
        UsageError, WorkError: in one line what was wrong.
    """
    import torch

    try:
        carry_out(plan)
    except torch.OutOfMemoryError as error:
        raise WorkError(f"out of memory on {plan.device}; try --batch_size 1 and --eval_batch_size 1 (they change nothing else)") from error


def carry_out(plan: Plan) -> None:
    """The plan's steps, in their order."""
    from class_token import ClassToken
    from classifiers import load_classifier
    from models import load_models

    config, folder = plan.config, plan.folder
    print(f"class {config.class_index}: {plan.label}; on {plan.device} in {str(plan.dtype).removeprefix('torch.')}")
    for change in changed_settings(plan):
        print(f"note: other settings than the token was learned with: {change}")
    # The classifiers first: they are small, and what is wrong with them is better told before gigabytes are loaded.
    scores, judges = config.train or config.evaluate, config.evaluate and plan.judge
    classifier = load_classifier(plan.guide, plan.device, plan.dtype) if scores else None
    judge = load_classifier(plan.judge, plan.device, plan.dtype, "judge") if judges else None
    models = load_models(config.model, plan.device, plan.dtype, config.gradient_checkpointing)
    token = ClassToken(models, config.placeholder_token, config.initializer_token)
    if config.train:
        learn(plan, token, classifier)
    else:
        token.load(plan.saved)
    if config.evaluate:
        from evaluate import evaluate

        print_result(plan, evaluate(config, token, classifier, judge, plan.class_name, folder))
    if config.prompt:
        from evaluate import generate

        generate(config, token, plan.prompts[-1], folder)
        print(f"images of {plan.prompts[-1]!r}: {folder.prompt_images}")


def learn(plan: Plan, token, classifier) -> None:
    """Train, then write the token and how it came about."""
    from class_token import token_tensors
    from outputs import write_json, write_tensors
    from trainer import train

    config, folder = plan.config, plan.folder
    training = train(config, token, classifier, plan.class_name, folder)
    outcome = {
        "updates": len(training.rows),
        "kept_after_updates": training.kept_updates,
        "stopped_by": training.stopped_by,
        "seconds": round(training.seconds, 2),
    }
    write_json(folder.config, {"config": asdict(config), "class_name": plan.label, "classifier": plan.guide, "training": outcome})
    write_tensors(folder.token, token_tensors(token), {"class_name": plan.label, "model": config.model, "classifier": plan.guide})
    folder.partial_token.unlink(missing_ok=True)
    folder.result.unlink(missing_ok=True)  # an earlier token's evaluation would pass for this one's
    print("training: {updates} updates, kept the token after {kept_after_updates}, stopped by {stopped_by}, {seconds} s".format(**outcome))
    print(f"token: {folder.token}\ntraining images: {folder.train_images}")


def print_result(plan: Plan, result: dict) -> None:
    """The closing lines: where everything is, and the accuracies side by side."""
    print(f"evaluation: {plan.folder.result}\nimages: {plan.folder.eval_images}")
    print(f"{'':<10}{'without':>9}{'with token':>12}   ({result['test_size']} seeds)")
    rows = {"guide": ("accuracy_baseline", "accuracy_token")}
    if result["judge"]:
        rows["judge"] = ("judge_accuracy_baseline", "judge_accuracy_token")
    for name, (without, with_token) in rows.items():
        print(f"{name:<10}{result[without]:>9.2f}{result[with_token]:>12.2f}")
    if plan.judge and not result["judge"]:
        print(f"judge     not judged: {plan.judge} does not know the label {plan.label!r}, or knows it twice")


def main(argv: list[str] | None = None) -> int:
    """Parse and dispatch; returns the exit code: 0, 1 where work failed, 2 for wrong usage."""
    given = vars(build_parser().parse_args(argv))
    preset = given.pop("preset")
    try:
        plan = make_plan(with_preset(preset, given))
        if plan.config.dry_run:
            print(describe(plan))
        else:
            run(plan)
    except UsageError as error:
        print(f"run.py: error: {error}", file=sys.stderr)
        return 2
    except WorkError as error:
        print(f"run.py: failed: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
