#!/usr/bin/env python
"""Learn a class token for a text-to-image model from a pretrained classifier, evaluate it, and generate with it.

python run.py --class_index 283 --train True --evaluate True                          # SD 1.4, ImageNet's tiger cat
python run.py --class_index 283 --train True --evaluate True --preset paper           # with the paper's settings
python run.py --class_index 283 --prompt "A photo of {token} {class} in the snow"     # with the token found on disk
python run.py --model miniature --class_index 2 --train True --evaluate True          # the bundled model, on a laptop
python run.py --classifier cub --list_classes True                                    # number, label and prompt name of every class
"""

import argparse
import sys
import types
from dataclasses import asdict, fields
from pathlib import Path
from typing import get_args

from config import PRESETS, RunConfig, UsageError, WorkError, with_preset
from plan import Plan, changed_settings, describe, guides_of, hub_of, make_plan, origin


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
        kind = f.metadata["parse"] or (boolean if kind is bool else kind)
        parser.add_argument(
            f"--{f.name}", type=kind, choices=f.metadata["choices"], default=argparse.SUPPRESS, help=f.metadata["help"] + shown
        )
    return parser


def run(plan: Plan) -> None:
    """Do what the plan says: train, evaluate, generate.

    Raises:
        UsageError, WorkError: in one line what was wrong.
    """
    import torch

    try:
        carry_out(plan)
    except torch.OutOfMemoryError as error:
        raise WorkError(f"out of memory on {plan.device}; try --memory 8gb, or a smaller --height and --width") from error


def carry_out(plan: Plan) -> None:
    """The plan's steps, in their order."""
    from class_token import ClassToken
    from classifiers import Guide, load_classifier
    from memory import checkpointed
    from models import load_models

    config, folder, hub, to = plan.config, plan.folder, hub_of(plan.config), (plan.device, plan.dtype)
    print(f"class {config.class_index}: {plan.label}; on {plan.device} in {str(plan.dtype).removeprefix('torch.')}")
    for change in changed_settings(plan):
        print(f"note: not as the token was learned: {change}")
    # The classifiers first: they are small, and what is wrong with them is better told before gigabytes are loaded.
    scores, judges = config.train or config.evaluate, config.evaluate and plan.judge_target is not None
    guides = [Guide(load_classifier(name, *to, hub=hub), target) for name, target in plan.guides.items()] if scores else []
    judge = Guide(load_classifier(plan.judge, *to, "judge", hub), plan.judge_target) if judges else None
    models = load_models(config.model, *to, checkpointed(config), config.scheduler, hub)
    if config.compile:
        models.compile()
    number = config.num_vectors if plan.saved is None else len(plan.saved)
    token = ClassToken(models, config.placeholder_token, config.initializer_token, number)
    if config.train:
        learn(plan, token, guides)
    else:
        token.load(plan.saved)
    export(plan, token)
    if config.evaluate:
        from evaluate import evaluate

        print_result(plan, evaluate(config, token, guides, judge, plan.class_name, folder))
    if config.prompt:
        from evaluate import generate

        generate(config, token, plan.prompts[-1], folder)
        print(f"images of {plan.prompts[-1]!r}: {folder.prompt_images}")


def learn(plan: Plan, token, guides: list) -> None:
    """Train, then write the token and how it came about."""
    from class_token import token_tensors
    from outputs import write_json, write_tensors
    from trainer import train

    config, folder = plan.config, plan.folder
    training = train(config, token, guides, plan.class_name, folder)
    outcome = {
        "updates": len(training.rows),
        "kept_after_updates": training.kept_updates,
        "stopped_by": training.stopped_by,
        "images": training.images,
        "seconds": round(training.seconds, 2),
    }
    write_json(folder.config, {"config": asdict(config), "class_name": plan.label, "classifier": config.classifier, "training": outcome})
    write_tensors(folder.token, token_tensors(token), origin(plan))
    folder.partial_token.unlink(missing_ok=True)
    folder.result.unlink(missing_ok=True)  # an earlier token's evaluation would pass for this one's
    print("training: {updates} updates, kept the token after {kept_after_updates}, stopped by {stopped_by}, {seconds} s".format(**outcome))
    print(f"token: {folder.token}\ntraining images: {folder.train_images}")


def export(plan: Plan, token) -> None:
    """Write the token in other tools' formats, where that was asked for."""
    config, folder = plan.config, plan.folder
    if not (config.export or config.save_as_full_pipeline):
        return
    from class_token import read_origin
    from export import write_pipeline, write_web_ui

    if config.export:
        path = folder.records / config.export / f"{config.placeholder_token}.safetensors"
        write_web_ui(path, token, origin(plan) if config.train else read_origin(Path(config.token_path or folder.token)))
        print(f"for AUTOMATIC1111 and ComfyUI: {path}")
    if config.save_as_full_pipeline:
        write_pipeline(folder.pipeline, token)
        print(f"pipeline: {folder.pipeline}")


def list_classes(config: RunConfig) -> None:
    """Print number, label and name in the prompts of every class of the guide."""
    from classifiers import read_labels
    from hub import quiet_libraries
    from labels import prompt_class_name

    quiet_libraries()
    for name in guides_of(config):
        for i, label in enumerate(read_labels(name, hub=hub_of(config)), start=1):
            print(f"{i:>5}  {label}  ->  {prompt_class_name(label)}")


def print_result(plan: Plan, result: dict) -> None:
    """The closing lines: where everything is, and the accuracies side by side."""
    print(f"evaluation: {plan.folder.result}\nimages: {plan.folder.eval_images}")
    print(f"{'':<10}{'without':>9}{'with token':>12}   ({result['test_size']} seeds)")
    rows = {"guide": ("accuracy_baseline", "accuracy_token")}
    if result["judge_accuracy_token"] is not None:
        rows["judge"] = ("judge_accuracy_baseline", "judge_accuracy_token")
    for name, (without, with_token) in rows.items():
        print(f"{name:<10}{result[without]:>9.2f}{result[with_token]:>12.2f}")
    if plan.judge and "judge" not in rows:
        print(f"judge     not judged: {plan.judge} has no label, or several, for {plan.label!r}")


def main(argv: list[str] | None = None) -> int:
    """Parse and dispatch; returns the exit code: 0, 1 where work failed, 2 for wrong usage."""
    given = vars(build_parser().parse_args(argv))
    preset = given.pop("preset")
    try:
        config = with_preset(preset, given)
        if config.list_classes:
            list_classes(config)
            return 0
        plan = make_plan(config)
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
