"""What the command lines share: parsers, flags and limits. No torch here: they answer at once."""

import argparse
import functools
import math
import os
import sys
from collections.abc import Callable

BOOLEANS = {"True": True, "true": True, "1": True, "False": False, "false": False, "0": False}


def boolean(text: str) -> bool:
    """True/False, true/false, 1/0 and nothing else.

    Raises:
        argparse.ArgumentTypeError: another text.
    """
    if text not in BOOLEANS:
        raise argparse.ArgumentTypeError(f"{text!r} was given; allowed is True, true, 1, False, false or 0")
    return BOOLEANS[text]


class OneLineParser(argparse.ArgumentParser):
    """An argparse parser whose errors are one line; ``name`` begins it."""

    name = ""

    def error(self, message: str):
        """Print the message and exit with 2."""
        self.exit(2, f"{self.name}: error: {message}\n")


def with_underscores(text: str) -> str:
    """``--class-index=2`` as ``--class_index=2``; whatever is no flag stays."""
    if not text.startswith("--"):
        return text
    name, equals, value = text.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value


def at_least(low: float, high: float = math.inf) -> dict:
    """The limits of an option: ``low`` to ``high``, both allowed."""
    allowed = f"{low:g} or more" if high == math.inf else f"{low:g} to {high:.10g}"
    return {"check": lambda value: low <= value <= high, "allowed": allowed}


READER_LEFT = 141  # exit code of a program whose output nobody reads any more, as shells have it


def for_any_output(main: Callable[..., int]) -> Callable[..., int]:
    """A ``main`` whose output may go anywhere.

    Characters that cannot be encoded there are replaced. A reader that leaves, as ``head`` does, ends the run
    without a message.
    """

    @functools.wraps(main)
    def run(*args) -> int:
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="replace")
        try:
            try:
                return main(*args)
            finally:
                sys.stdout.flush()
        except BrokenPipeError:
            # What is left in the buffer would fail once more at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return READER_LEFT

    return run
