#!/usr/bin/env python
"""Learn a class token for a text-to-image model from a pretrained classifier, evaluate it, and generate with it.

python run.py --class_index 283 --train True --evaluate True                          # SD 1.4, ImageNet's tiger cat
python run.py --class_index 283 --train True --evaluate True --preset paper           # with the paper's settings
python run.py --class_index 283 --prompt "A photo of {token} {class} in the snow"     # with the token found on disk
python run.py --model miniature --class_index 2 --train True --evaluate True          # the bundled model, on a laptop
python run.py --classifier cub --list_classes True                                    # number, label and prompt name of every class
"""

import argparse
import copy
import sys
import traceback
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from functools import cached_property
from pathlib import Path
from typing import get_args

from apps.plan import Plan, describe, guides_of, hub_of, is_sweep, make_plans, works
from apps.provenance import changed_settings, evaluation_options, is_evaluated, origin
from config import PRESETS, RunConfig, validate, with_preset
from discriminative.errors import UsageError, WorkError


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
    parser = Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--preset",
        choices=PRESETS,
        default="default",
        help="set of options to start from; flags given beside it win",
    )
    for f in fields(RunConfig):
        kind = (
            next(t for t in get_args(f.type) if t is not types.NoneType)
            if isinstance(f.type, types.UnionType)
            else f.type
        )
        shown = "" if f.default is None else f" (default: {f.default})"
        kind = f.metadata["parse"] or (boolean if kind is bool else kind)
        parser.add_argument(
            f"--{f.name}",
            type=kind,
            choices=f.metadata["choices"],
            default=argparse.SUPPRESS,
            help=f.metadata["help"] + shown,
        )
    return parser


def run(plans: list[Plan], sweep: bool) -> int:
    """Do what the plans say, one class after the other, with models that are loaded once; returns how many classes failed.

    Args:
        sweep: what is there already is left out, and a class that fails does not end the run.

    Raises:
        UsageError, WorkError: in one line what was wrong; of a sweep, what keeps all classes from being done.
    """
    bench, failed = Bench(plans[0]), 0
    with told_out_of_memory(plans[0]):
        bench.load()
    for plan in plans:
        try:
            with told_out_of_memory(plan):
                carry_out(plan, bench, resume=sweep)
        except Exception as error:
            if not sweep:
                raise
            if not isinstance(error, (WorkError, UsageError, OSError)):
                traceback.print_exc()  # a fault of the program, which the other classes need not have
            print(
                f"run.py: failed: class {plan.config.class_index} ({plan.label}): {error}",
                file=sys.stderr,
                flush=True,
            )
            failed += 1
    return failed


@contextmanager
def told_out_of_memory(plan: Plan) -> Iterator[None]:
    """Raises WorkError where the block runs out of a device's memory."""
    from discriminative.diffusion.memory import is_out_of_memory

    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise WorkError(
            f"out of memory on {plan.device}; try --memory 8gb, or a smaller --height and --width"
        ) from error


class Bench:
    """What all classes of a run share: classifiers and models, each loaded when it is first needed.

    Raises:
        UsageError: something cannot be loaded.
    """

    def __init__(self, plan: Plan):
        self.config, self.hub, self.to, self.judge_name = (
            plan.config,
            hub_of(plan.config),
            (plan.device, plan.dtype),
            plan.judge,
        )
        self.judges = bool(plan.judge and (plan.config.evaluate or plan.config.export_dataset))
        self.scores = bool(plan.config.train or plan.config.evaluate or plan.config.export_dataset)

    def load(self) -> None:
        """Load all that will be needed: what is missing ends the run, not one class."""
        for name, needed in {
            "guides": self.scores,
            "judge": self.judges,
            "clip": self.config.evaluate,
            "models": True,
        }.items():
            if needed:
                getattr(self, name)

    @cached_property
    def guides(self) -> dict:
        """The guides by name. They come before the models: they are small, and what is wrong with them is better told first."""
        from classifiers import load_classifier

        return {
            name: load_classifier(name, *self.to, hub=self.hub) for name in self.config.classifier.split(",")
        }

    @cached_property
    def judge(self):
        """The classifier that only judges."""
        from classifiers import load_classifier

        return load_classifier(self.judge_name, *self.to, "judge", self.hub)

    @cached_property
    def clip(self):
        """The model of text similarity, where one is named."""
        from discriminative.guides.similarity import TextSimilarity

        return (
            TextSimilarity(self.config.clip_model, self.to[0], self.hub) if self.config.clip_model else None
        )

    @cached_property
    def models(self):
        """The frozen parts of the pipeline."""
        from apps.plan import checkpointed
        from discriminative.diffusion.models import load_models, load_tiny_vae

        models = load_models(
            self.config.model, *self.to, checkpointed(self.config), self.config.scheduler, self.hub
        )
        if self.config.trains_with_tiny_vae:
            models.tiny_vae = load_tiny_vae(self.config.tiny_vae, *self.to, self.hub)
        if self.config.compile:
            models.compile()
        return models

    def token(self, plan: Plan):
        """A class's token, with a tokenizer of its own, which knows no other class's word."""
        from discriminative.tokens.class_token import ClassToken

        number = plan.config.num_vectors if plan.saved is None else len(plan.saved)
        models = replace(self.models, tokenizer=copy.deepcopy(self.models.tokenizer))
        token = ClassToken(models, plan.config.placeholder_token, plan.config.initializer_token, number)
        if plan.saved is not None:
            token.load(plan.saved)
        return token


def carry_out(plan: Plan, bench: Bench, resume: bool) -> None:
    """One class's steps, in their order.

    Args:
        resume: leave out an evaluation that is there already.
    """
    from discriminative.guides.classifier import Guide

    config, folder = plan.config, plan.folder
    evaluates = config.evaluate and not (resume and plan.saved is not None and is_evaluated(plan))
    precision = str(plan.dtype).removeprefix("torch.")
    print(
        f"class {config.class_index} of {config.classifier}: {plan.label}; model {config.model} on {plan.device} in {precision}",
        flush=True,
    )
    for change in changed_settings(plan):
        print(f"note: not as the token was learned: {change}")
    guides = (
        [Guide(bench.guides[name], target) for name, target in plan.guides.items()] if bench.scores else []
    )
    judge = Guide(bench.judge, plan.judge_target) if bench.judges and plan.judge_target is not None else None
    clip = bench.clip if config.evaluate else None
    token = bench.token(plan)
    if config.train and plan.saved is None:
        learn(plan, token, guides)
    export(plan, token)
    if evaluates:
        from evaluate import evaluate, templates_of

        for template in templates_of(config):
            if "{token}" not in template:
                print(f"note: {template!r} does not hold {{token}}, so the token is not used in it")
        if folder.result.exists():
            print(f"note: replaces the evaluation that is there, {folder.result}, and its images")
        print_result(
            plan,
            evaluate(config, token, guides, judge, plan.class_name, folder, clip, evaluation_options(config)),
        )
    elif config.evaluate:
        print(f"evaluated already: {folder.result}")
    if config.evaluate:
        from discriminative.records.files import read_json
        from discriminative.records.summary import replace_row, row_of

        row = row_of(read_json(folder.result), folder, config.exp_id)
        print(f"summary: {replace_row(config.output_path, row)}")
    for placeholder, vectors in plan.others.items():
        token.join(placeholder, vectors)
    draw(plan, token, guides, judge)


def draw(plan: Plan, token, guides: list, judge) -> None:
    """Images of the user's prompts, and the data set."""
    from discriminative.tokens.dataset import Dataset, made_with
    from discriminative.tokens.drawing import generate

    config, folder = plan.config, plan.folder
    if plan.to_draw:
        for prompt in plan.to_draw:
            if config.placeholder_token not in prompt:
                print(f"note: {prompt!r} does not hold {{token}}, so the token is not used in it")
        for prompt, images in zip(
            plan.to_draw, generate(config, token, list(plan.to_draw), folder), strict=True
        ):
            print(f"images of {prompt!r}: {images}")
    if config.export_dataset:
        dataset = Dataset(folder.dataset, guides, judge, made_with(config, token))
        thrown_away = dataset.fill(config, token, plan.class_name)
        print(f"data set: {folder.dataset}, {len(dataset.rows)} images; {thrown_away} thrown away")


def learn(plan: Plan, token, guides: list) -> None:
    """Train, then write the token and how it came about."""
    from discriminative.records.files import write_json, write_tensors
    from discriminative.records.summary import remove_row
    from discriminative.tokens.files import token_tensors
    from trainer import train

    config, folder = plan.config, plan.folder
    tracker = None
    if config.report_to != "none":
        from discriminative.records.tracking import Tracker

        tracker = Tracker(
            config.report_to,
            Path(config.output_path) / "tracking",
            f"{folder.name}/{config.exp_id}",
            asdict(config),
        )
    try:
        training = train(config, token, guides, plan.class_name, folder, tracker.log if tracker else None)
    finally:
        if tracker:
            tracker.close()
    outcome = {
        "updates": len(training.rows),
        "kept_after_updates": training.kept_updates,
        "stopped_by": training.stopped_by,
        "images": training.images,
        "seconds": round(training.seconds, 2),
        "precision": training.precision,
    }
    folder.forget_token()  # what was made of an earlier one would pass for this one's
    write_tensors(folder.token, token_tensors(token), origin(plan))
    write_json(
        folder.config,
        {
            "config": asdict(config),
            "class_name": plan.label,
            "classifier": config.classifier,
            "training": outcome,
        },
    )
    folder.partial_token.unlink(missing_ok=True)
    remove_row(config.output_path, config.class_index, plan.label, config.exp_id)
    print(
        "training: {updates} updates, kept the token after {kept_after_updates}, stopped by {stopped_by}, {seconds} s, {precision}".format(
            **outcome
        )
    )
    print(f"token: {folder.token}\ntraining images: {folder.train_images}")


def export(plan: Plan, token) -> None:
    """Write the token in other tools' formats, where that was asked for."""
    config, folder = plan.config, plan.folder
    if not (config.export or config.save_as_full_pipeline):
        return
    from discriminative.tokens.files import read_origin, write_pipeline, write_web_ui

    if config.export:
        path = folder.web_ui / f"{config.placeholder_token}.safetensors"
        write_web_ui(
            path,
            token,
            origin(plan) if config.train else read_origin(Path(config.token_path or folder.token)),
        )
        print(f"for AUTOMATIC1111 and ComfyUI: {path}")
    if config.save_as_full_pipeline:
        write_pipeline(folder.pipeline, token)
        print(f"pipeline: {folder.pipeline}")


def list_classes(config: RunConfig) -> None:
    """Print number, label and name in the prompts of every class of the guide."""
    from classifiers import read_labels
    from discriminative.guides.labels import prompt_class_name
    from discriminative.hub import quiet_libraries

    quiet_libraries()
    for name in guides_of(config):
        for i, label in enumerate(read_labels(name, hub=hub_of(config)), start=1):
            print(f"{i:>5}  {label}  ->  {prompt_class_name(label)}")


def print_result(plan: Plan, result: dict) -> None:
    """The closing lines: where everything is, and the verdict."""
    print(
        f"evaluation: {plan.folder.result}\nimages: {plan.folder.eval_images}, and side by side {plan.folder.grid}"
    )
    for prompt in result["prompts"][1:]:
        before, after = (prompt["arms"][arm]["guide"]["accuracy"] for arm in ("baseline", "token"))
        print(f"{prompt['template']!r}: guide {before:.2f} -> {after:.2f}")
    if not plan.judge:
        print("not judged: the guide brings no judge, or one that guides too; --judge names one")
    elif plan.judge_target is None:
        print(f"not judged: {plan.judge} has no label, or several, for {plan.label!r}")
    print(f"{result['verdict']}   ({result['test_size']} seeds)")


def report(output_path: str) -> None:
    """Write the report of all classes that were evaluated below ``output_path``."""
    from discriminative.records.report import write_report

    print(f"report: {write_report(Path(output_path))}")


def main(argv: list[str] | None = None) -> int:
    """Parse and dispatch; returns the exit code: 0, 1 where work failed, 2 for wrong usage."""
    given, failed = vars(build_parser().parse_args(argv)), 0
    preset = given.pop("preset")
    try:
        config = with_preset(preset, given)
        if config.list_classes:
            list_classes(config)
            return 0
        if works(config):
            plans, wrong = make_plans(config)
            for line in wrong:
                print(f"run.py: failed: {line}", file=sys.stderr)
            if config.dry_run:
                print("\n".join(describe(plan) for plan in plans))
            failed = len(wrong) + (0 if config.dry_run else run(plans, is_sweep(config)))
        else:
            validate(config)
        if config.report and not config.dry_run:
            report(config.output_path)
        return 1 if failed else 0
    except UsageError as error:
        print(f"run.py: error: {error}", file=sys.stderr)
        return 2
    except (WorkError, OSError) as error:
        print(f"run.py: failed: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
