"""Whether generated pictures help a classifier where real ones are few.

python run.py --class_index all --export_dataset 64 --keep correct       # draws results/dataset/<class>/
python -m apps.augment --real real --generated results/dataset --test test --classifier timm:resnet50.a1_in1k
python -m apps.augment ... --layers head                                 # a linear head on frozen features
python -m apps.augment ... --classifier timm:resnet18 --from_scratch     # without weights

Trains on the real pictures, and on real plus generated ones, with the same number of steps and from the same
seeds; prints the paired difference on --test with its interval over the seeds, and the classes that lose.
"""

import argparse
import sys
from dataclasses import fields

from apps.augment.options import AUGMENTATIONS, LAYERS, Options, parse_shares, validate
from discriminative.command_line import (
    OneLineParser,
    boolean,
    ended_at_once,
    ended_by_signals,
    run_program,
    with_underscores,
)

PICTURES = "folder with a folder of {} for each class, as torchvision's ImageFolder reads it"
HELP = {
    "real": (str, "DIR", PICTURES.format("real pictures to train on")),
    "generated": (
        str,
        "DIR",
        PICTURES.format("generated pictures") + "; --export_dataset of run.py makes it",
    ),
    "test": (str, "DIR", PICTURES.format("real pictures to measure on")),
    "classifier": (
        str,
        "NAME",
        "timm:<name>, timm:hf-hub:<id>, timm:<folder>, timm:<name>@<file>, or miniature",
    ),
    "val": (str, "DIR", "pictures to choose the share on; default: a fifth of each class of --real"),
    "from_scratch": (boolean, "True|False", "begin with random weights"),
    "layers": (LAYERS, "", "layers that are trained: all, or a linear head on frozen features"),
    "image_size": (int, "N", "pixels of a side that the classifier sees; default: its own"),
    "augmentation": (AUGMENTATIONS, "", "basic: crop and mirror; strong: RandAugment and CutMix as well"),
    "shares": (
        parse_shares,
        "X,X,...",
        "shares of generated pictures in a batch, of which validation chooses one",
    ),
    "steps": (int, "N", "steps of a training, the same with and without generated pictures"),
    "batch_size": (int, "N", "pictures of a step"),
    "learning_rate": (float, "X", "AdamW's; default: 0.0002, 0.001 from scratch and for a head"),
    "seeds": (int, "N", "pairs of trainings; a larger number later goes on"),
    "device": (("auto", "cpu", "cuda"), "", "auto is CUDA if there is one"),
    "output_path": (str, "DIR", "folder for rows.jsonl, report.json and report.html"),
}


class Parser(OneLineParser):
    """Errors begin with the program's name."""

    name = "apps.augment"


def shown(default) -> str:
    """A default in the help; nothing where there is none."""
    if default is None:
        return ""
    return f" (default: {','.join(map(str, default)) if isinstance(default, tuple) else default})"


def build_parser() -> argparse.ArgumentParser:
    """A flag for each option."""
    parser = Parser(
        prog="python -m apps.augment",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    for f in fields(Options):
        kind, metavar, told = HELP[f.name]
        is_needed = f.name in ("real", "generated", "test", "classifier")
        settings = {"required": True} if is_needed else {"default": f.default}
        if isinstance(kind, tuple):
            settings["choices"] = kind
        else:
            settings |= {"type": kind, "metavar": metavar}
        if kind is boolean:
            settings |= {"nargs": "?", "const": True}
        told += "" if is_needed else shown(f.default)
        parser.add_argument(f"--{f.name}", help=told, **settings)
    return parser


def main(argv: list[str] | None = None) -> int:
    """The program; returns its exit code, see :func:`run_program`."""
    return run_program("apps.augment", dispatch, argv)


def dispatch(argv: list[str]) -> int:
    """Parse, and do what is asked for.

    Raises:
        UsageError, WorkError: in one line what was wrong.
    """
    if not argv:
        print(__doc__.strip())
        return 2
    options = Options(**vars(build_parser().parse_args([with_underscores(text) for text in argv])))
    validate(options)
    # Everything heavy is imported from here on.
    with ended_at_once("apps.augment"):
        from apps.augment.work import work
    try:
        with ended_by_signals():
            return work(options)
    except KeyboardInterrupt as error:
        error.args = ("; finished trainings are kept, and the same command goes on",)
        raise


if __name__ == "__main__":
    sys.exit(main())
