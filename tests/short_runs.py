"""Runs of the command line that are over soon: what no flag makes small is made small here."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from config import RunConfig


@contextmanager
def small_validations(size: int = 2) -> Iterator[None]:
    """Every training in the block validates on ``size`` seeds, and confirms on as many."""
    learning = RunConfig.learning

    def small(config: RunConfig, **constants):
        return learning(config, **({"validation_size": size, "confirm_size": size} | constants))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunConfig, "learning", small)
        yield
