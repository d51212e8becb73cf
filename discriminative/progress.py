"""How far a piece of work is: a bar on a terminal, elsewhere a plain line every half minute."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any

from tqdm import tqdm

EVERY = 30.0  # seconds between two lines


class Lines:
    """Stands for tqdm where nobody sees a bar move: no carriage returns, nothing twice.

    Args:
        iterable: what is gone through; None counts what :meth:`update` is told.
        total: of ``unit``, None is the iterable's length.
        initial: of them, done before.
    """

    def __init__(
        self,
        iterable: Iterable | None = None,
        desc: str = "",
        total: int | None = None,
        unit: str = "step",
        initial: int = 0,
    ):
        self.iterable = iterable
        self.desc = desc
        self.total = len(iterable) if total is None else total
        self.unit = unit
        self.initial = initial
        self.done = initial
        self.began = time.monotonic()
        self.told = self.began
        self.figures: dict[str, Any] = {}

    def __iter__(self) -> Iterator:
        for item in self.iterable:
            yield item
            self.update()

    def __enter__(self) -> "Lines":
        return self

    def __exit__(self, *_) -> None:
        pass

    def update(self, number: int = 1) -> None:
        """So many more are done; a line where the last one is old enough."""
        self.done += number
        now = time.monotonic()
        if now - self.told >= EVERY and self.done < self.total:
            self.told = now
            print(self.line(now - self.began), file=sys.stderr, flush=True)

    def set_postfix(self, figures: dict[str, Any]) -> None:
        """Figures for the next line."""
        self.figures = figures

    def close(self) -> None:
        """The end is told by whoever did the work."""

    def line(self, elapsed: float) -> str:
        """ "learning 'cat': 12 of 300 updates, 00:30 so far, 12:00 left at most, loss 0.52"."""
        left = elapsed / (self.done - self.initial) * (self.total - self.done)
        times = f"{tqdm.format_interval(elapsed)} so far, {tqdm.format_interval(left)} left at most"
        figures = "".join(f", {name} {value}" for name, value in self.figures.items())
        return f"{self.desc}: {self.done} of {self.total} {self.unit}s, {times}{figures}"


def progress(*args, leave: bool = True, disable: bool = False, **settings) -> tqdm | Lines:
    """A tqdm bar on a terminal, else :class:`Lines`; the arguments are tqdm's."""
    if sys.stderr.isatty() or disable:
        return tqdm(*args, leave=leave, disable=disable, **settings)
    return Lines(*args, **settings)
