"""What the command lines share: parsers, flags, limits and signals. No torch here: they answer at once."""

import argparse
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from types import FrameType
from typing import TextIO

from discriminative.errors import UsageError, WorkError

BOOLEANS = {"True": True, "true": True, "1": True, "False": False, "false": False, "0": False}


def existing_file(text: str) -> Path:
    """A file that the command line names.

    Raises:
        argparse.ArgumentTypeError: there is none.
    """
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"{text!r} was given; allowed is a file that is there")
    return Path(text)


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


def whole_number(low: int, high: int) -> Callable[[str], int]:
    """A parser of whole numbers from ``low`` to ``high``; it raises ``ArgumentTypeError`` of others."""

    def parse(text: str) -> int:
        if not (text.isdecimal() and low <= int(text) <= high):
            raise argparse.ArgumentTypeError(f"{text!r} was given; allowed is a number from {low} to {high}")
        return int(text)

    return parse


def at_least(low: float, high: float = math.inf) -> dict:
    """The limits of an option: ``low`` to ``high``, both allowed."""
    allowed = f"{low:g} or more" if high == math.inf else f"{low:g} to {high:.10g}"
    return {"check": lambda value: low <= value <= high, "allowed": allowed}


# Ask a program to end: Ctrl-C, kill, a terminal that is closed. Windows has not all.
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
KEPT = "; what was finished is kept"  # all that can be said of what an interruption leaves


class Ended(KeyboardInterrupt):
    """A signal ended the program; ``number`` is its own."""

    def __init__(self, number: int):
        super().__init__()
        self.number = number


@contextmanager
def signals_to(handle: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Within the block ``handle`` is called where a signal asks the program to end.

    A signal that is ignored, as with nohup, or that somebody handles stays so.
    """
    is_main = threading.current_thread() is threading.main_thread()  # no other thread may handle signals
    before = {number: signal.getsignal(number) for number in SIGNALS if is_main}
    free = {n: h for n, h in before.items() if h in (signal.SIG_DFL, signal.default_int_handler)}
    for number in free:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in free.items():
            signal.signal(number, handler)


def ended_by_signals() -> AbstractContextManager[None]:
    """Within the block all signals do as Ctrl-C does: what is being written is cleared away, and what is
    kept can be told.

    Raises:
        Ended: a signal came.
    """

    def end(number: int, frame: FrameType | None) -> None:
        raise Ended(number)

    return signals_to(end)


def ended_at_once(name: str) -> AbstractContextManager[None]:
    """Around imports: an exception in the midst of torch's is an abort, and there is nothing to clear away.

    Args:
        name: of the program, which begins the line.
    """

    def end(number: int, frame: FrameType | None) -> None:
        os.write(sys.__stderr__.fileno(), f"{name}: interrupted{KEPT}\n".encode())
        os._exit(128 + number)

    return signals_to(end)


def is_first_process() -> bool:
    """Whether this is the only process, or the one of several that speaks for all."""
    return os.environ.get("RANK", "0") == "0"


def is_one_of_several() -> bool:
    """Whether ``accelerate launch`` or torchrun started this process with others."""
    return os.environ.get("WORLD_SIZE", "1") not in ("", "1")


class Prefixed:
    """A stream whose lines begin with a prefix; nobody's terminal, so no bars are drawn over each other."""

    def __init__(self, stream: TextIO, prefix: str):
        self.stream = stream
        self.prefix = prefix
        self.text = ""  # of the line that is not ended yet

    def write(self, text: str) -> int:
        """Write the lines that are complete, each in one piece."""
        *lines, self.text = (self.text + text).split("\n")
        if lines:
            self.stream.write("".join(f"{self.prefix}{line}\n" for line in lines))
        return len(text)

    def flush(self) -> None:
        """Of what is complete."""
        self.stream.flush()

    def isatty(self) -> bool:
        """No."""
        return False

    def __getattr__(self, name: str):
        return getattr(self.stream, name)


@contextmanager
def lines_with_rank() -> Iterator[None]:
    """Within the block each line begins with the process's rank, "[1] ", where there are several."""
    if not is_one_of_several():
        yield
        return
    prefix = f"[{os.environ.get('RANK', '0')}] "
    with redirect_stdout(Prefixed(sys.stdout, prefix)), redirect_stderr(Prefixed(sys.stderr, prefix)):
        yield


HEARD = 3.0  # seconds after which the first process has told what is wrong; a launcher ends all with one
READER_LEFT = 141  # exit code of a program whose output nobody reads any more, as shells have it


def run_program(name: str, dispatch: Callable[[list[str]], int], argv: list[str] | None = None) -> int:
    """A command line from its arguments to its exit code.

    Characters that the output cannot encode are replaced.

    Args:
        name: of the program, which begins each error's line.
        dispatch: does the work, and raises what went wrong.
        argv: None is the program's own arguments.

    Returns:
        what ``dispatch`` returns, 1 where work failed, 2 for wrong usage, 128 and its number where a signal
        ended it, ``READER_LEFT`` where nobody reads on, as behind ``head``.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        try:
            return told(name, dispatch, sys.argv[1:] if argv is None else argv)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # What is left in the buffer would fail once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return READER_LEFT


def told(name: str, dispatch: Callable[[list[str]], int], argv: list[str]) -> int:
    """What ``dispatch`` returns; or what it raises, told in one line, and the exit code that goes with it."""
    try:
        return dispatch(argv)
    except BrokenPipeError:
        raise
    except UsageError as error:
        code = 2
        said = f"error: {error}"
    except (WorkError, OSError) as error:
        code = 1
        said = f"failed: {error}"
    except KeyboardInterrupt as error:
        code = 128 + getattr(error, "number", signal.SIGINT)
        said = f"interrupted{str(error) or KEPT}"
    # Out here the work's progress bars are gone from the line. Of several processes all fail alike.
    if code == 1 or is_first_process():
        print(f"{name}: {said}", file=sys.stderr)
    elif code == 2:
        time.sleep(HEARD)
    return code
