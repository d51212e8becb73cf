"""Discriminative Probing and Tuning: a UNet's features judge images, and the judgement tunes and corrects it.

python -m dpt probe --model miniature                     # stage 1, on a laptop
python -m dpt probe --model miniature --probe all         # every block, with a table
python -m dpt tune --model miniature                      # stage 2: a LoRA
python -m dpt evaluate --model miniature
python -m dpt generate --model miniature --prompt "a photo of a red car and a bat"
python -m dpt mine --coco_root coco --refcoco_root mdetr  # then probe without --model: SD 1.4 on COCO
python -m dpt experiment                                  # whether tuning helps: hours, resumable
"""

import argparse
import difflib
import sys
import types
from dataclasses import fields
from typing import get_args

from discriminative.command_line import (
    KEPT,
    OneLineParser,
    boolean,
    ended_at_once,
    ended_by_signals,
    run_program,
    with_underscores,
)
from discriminative.errors import UsageError
from dpt.config import COMMANDS, Options, validate


class Parser(OneLineParser):
    """Errors begin with the program's name."""

    name = "dpt"


def fields_of(command: str) -> list:
    """The options that a command takes."""
    return [f for f in fields(Options) if command in f.metadata["commands"]]


def build_parser() -> argparse.ArgumentParser:
    """A command and its flags, in groups, with their help lines and defaults."""
    shape = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    parser = Parser(prog="python -m dpt", description=__doc__, **shape)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command, told in COMMANDS.items():
        sub = commands.add_parser(command, help=told, description=told, **shape)
        group = sub
        headings = {}
        heading = ""
        for f in fields(Options):
            heading = f.metadata["heading"] or heading
            if command in f.metadata["commands"]:
                if heading not in headings:
                    headings[heading] = sub.add_argument_group(heading)
                group = headings[heading]
                add_flag(group, f)
    return parser


def add_flag(group, f) -> None:
    """One flag of a field."""
    is_union = isinstance(f.type, types.UnionType)
    kind = next(t for t in get_args(f.type) if t is not types.NoneType) if is_union else f.type
    settings = {"type": kind, "default": argparse.SUPPRESS}
    if kind is bool:
        settings |= {"type": boolean, "nargs": "?", "const": True, "metavar": "True|False"}
    elif f.metadata["choices"]:
        settings["choices"] = f.metadata["choices"]
    else:
        settings["metavar"] = "TEXT" if kind is str else kind.__name__.upper()
    shown = "" if f.default is None else f" (default: {f.default})"
    group.add_argument(f"--{f.name}", help=(f.metadata["help"] + shown).replace("%", "%%"), **settings)


def parse(argv: list[str]) -> tuple[str, Options]:
    """The command and its options.

    Raises:
        UsageError: a flag is not known; with the nearest.
    """
    argv = [with_underscores(text) for text in argv]
    command = argv[0]
    if command in COMMANDS:
        known = [f.name for f in fields_of(command)]
        for text in argv[1:]:
            name = text[2:].partition("=")[0]
            if text.startswith("--") and name and name not in (*known, "help"):
                near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
                advice = f"; the nearest is --{near[0]}" if near else f"; python -m dpt {command} --help"
                raise UsageError(f"--{name} is no option of {command}{advice}")
    given = vars(build_parser().parse_args(argv))
    return given.pop("command"), Options(**given)


def main(argv: list[str] | None = None) -> int:
    """The program; returns its exit code, see :func:`run_program`."""
    return run_program("dpt", dispatch, argv)


def dispatch(argv: list[str]) -> int:
    """Parse, and do what is asked for.

    Raises:
        UsageError, WorkError: in one line what was wrong.
    """
    if not argv:
        print(__doc__.strip())
        return 2
    command, options = parse(argv)
    validate(command, options)
    # Everything heavy is imported from here on.
    with ended_at_once("dpt"):
        from dpt.experiment.run import run_experiment
        from dpt.work import work
    try:
        with ended_by_signals():
            return run_experiment(options) if command == "experiment" else work(command, options)
    except KeyboardInterrupt as error:
        error.args = (f"{KEPT}, and the same command goes on with a training",)
        raise


if __name__ == "__main__":
    sys.exit(main())
