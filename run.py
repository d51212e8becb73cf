#!/usr/bin/env python
"""Learn a word for a text-to-image model from a pretrained classifier, evaluate it, and generate with it.

python run.py --model miniature --class_index 2 --train --evaluate       # the bundled model, on a laptop
python run.py --model miniature --class_index 2 --prompt "A photo of {token} {class} in the grass"
python run.py --class_index 283 --train --evaluate                       # SD 1.4, ImageNet's tiger cat
python run.py --class_index 283 --train --evaluate --preset paper        # with the paper's settings
python run.py --classifier cub --list_classes                            # every class of a classifier
"""

import argparse
import difflib
import sys
import types
from dataclasses import fields
from typing import get_args

from config import PRESETS, RunConfig, validate, with_preset
from discriminative import VERSION
from discriminative.command_line import (
    OneLineParser,
    boolean,
    ended_at_once,
    ended_by_signals,
    lines_with_rank,
    run_program,
    with_underscores,
)
from discriminative.errors import UsageError, WorkError

# Beside the fields of RunConfig.
OWN_FLAGS = ("help", "version", "preset", "config")


class Parser(OneLineParser):
    """Errors begin with the program's name."""

    name = "run.py"


def build_parser(more: bool = True) -> argparse.ArgumentParser:
    """A flag for every field of :class:`RunConfig`, in groups, with its help line and default.

    Args:
        more: show the flags in the help that only ``--help all`` shows.
    """
    parser = Parser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        add_help=False,
        usage="python run.py [--class_index N] [--train] [--evaluate] [--option value ...]",
    )
    group = parser.add_argument_group("Help and presets")
    group.add_argument("--help", "-h", nargs="?", const="main", choices=("main", "all"), help=help_line(more))
    group.add_argument("--version", action="version", version=VERSION, help="print the version, and stop")
    preset = "options to start from; flags given beside it win (default: default)"
    group.add_argument("--preset", choices=PRESETS, default="default", help=preset)
    config = (
        "a run's config.json, or YAML of options: run it again; it beats --preset, flags given beside it win"
    )
    group.add_argument("--config", metavar="FILE", help=config)
    for f in fields(RunConfig):
        if f.metadata["heading"]:
            group = parser.add_argument_group(f.metadata["heading"])
        is_union = isinstance(f.type, types.UnionType)
        kind = next(t for t in get_args(f.type) if t is not types.NoneType) if is_union else f.type
        shown = "" if f.default is None else f" (default: {f.default})"
        settings = {"type": f.metadata["parse"] or kind, "default": argparse.SUPPRESS}
        if kind is bool:
            settings |= {"type": boolean, "nargs": "?", "const": True, "metavar": "True|False"}
        elif f.metadata["choices"]:
            settings["choices"] = f.metadata["choices"]
        else:
            is_text = kind is str or f.metadata["parse"]
            settings["metavar"] = "TEXT" if is_text else kind.__name__.upper()
        is_hidden = f.metadata["more"] and not more
        line = argparse.SUPPRESS if is_hidden else (f.metadata["help"] + shown).replace("%", "%%")
        group.add_argument(f"--{f.name}", help=line, **settings)
    return parser


def help_line(more: bool) -> str:
    """What ``--help`` says of itself."""
    return "print this, and stop" if more else "print this, and stop; --help all has every option"


def parse(argv: list[str]) -> tuple[dict, argparse.ArgumentParser]:
    """The flags that were given, by their names; dashes in a flag count as underscores.

    Raises:
        UsageError: a flag is not known; with the nearest, or what serves instead of one that went.
    """
    argv = [with_underscores(text) for text in argv]
    for text in argv:
        name = text[2:].partition("=")[0]
        if text.startswith("--") and name:
            check_flag(name)
    parser = build_parser()
    return vars(parser.parse_args(argv)), parser


def check_flag(name: str) -> None:
    """Check that a flag is known.

    Raises:
        UsageError: it is not.
    """
    from apps.earlier import GONE

    known = [f.name for f in fields(RunConfig)] + list(OWN_FLAGS)
    if name in known:
        return
    if name in GONE:
        raise UsageError(f"--{name} is no option any more: {GONE[name].instead}")
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    starting = [other for other in known if other.startswith(name)]
    nearest = (starting or near or [""])[0]
    advice = f"; the nearest is --{nearest}" if nearest else "; --help all lists them"
    raise UsageError(f"--{name} is no option{advice}")


def options_of(given: dict) -> RunConfig:
    """The options: the preset's, then those of ``--config``, then those that were given.

    Raises:
        UsageError: the file cannot be read, or holds something else.
    """
    preset = given.pop("preset")
    path = given.pop("config")
    given.pop("help", None)
    if path:
        from apps.earlier import read_options

        given = read_options(path) | given
    return with_preset(preset, given)


BEGIN = """Learn a word from a classifier. To begin, on any machine, with the bundled miniature model:

  python run.py --model miniature --class_index 2 --train --evaluate
  python run.py --model miniature --class_index 2 --prompt "A photo of {token} {class} on a blue background"
  python run.py --model miniature --list_classes

With Stable Diffusion 1.4 (weights from the hub, a GPU in practice):

  python run.py --class_index 283 --train --evaluate

python run.py --help lists the main options, --help all every one."""


def main(argv: list[str] | None = None) -> int:
    """The program; returns its exit code, see :func:`run_program`."""
    return run_program("run.py", dispatch, argv)


def dispatch(argv: list[str]) -> int:
    """Parse, and do what is asked for.

    Raises:
        UsageError, WorkError: in one line what was wrong.
    """
    if not argv:
        print(BEGIN)
        return 2
    given, parser = parse(argv)
    if given["help"]:
        parser = parser if given["help"] == "all" else build_parser(more=False)
        parser.print_help()
        return 0
    config = options_of(given)
    validate(config)
    # Everything heavy is imported from here on.
    try:
        with ended_at_once("run.py"):
            from apps.work import work
    except ModuleNotFoundError as error:
        raise WorkError(f"{error}; is the environment active? See Install in README.md") from error
    with lines_with_rank(), ended_by_signals():
        return work(config)


if __name__ == "__main__":
    sys.exit(main())
