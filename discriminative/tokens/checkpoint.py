"""The state of a training after an update, from which it goes on as if it had never been interrupted."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from discriminative.errors import WorkError, WriteError
from discriminative.hub import one_line
from discriminative.records.files import write_tensors
from discriminative.records.layout import unclaimed

DAMAGED = (OSError, SafetensorError, ValueError, KeyError, TypeError)  # what reading a file may raise


@dataclass
class State:
    """A training after an update: all that the next one depends on.

    Args:
        tensors: by their names: vectors (N, width), and the optimizer's moments.
        values: the rest, as JSON has it.
    """

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)


class Checkpoint:
    """The file of a training's last state: written now and then, and where the training is interrupted.

    Args:
        path: of the file; None keeps nothing.
        made_with: all that decides the token, as JSON has it.
        seconds: between two writings at least.
        check_claim: is called before a writing; raises where another run has taken the folder over.
    """

    def __init__(
        self,
        path: Path | None = None,
        made_with: dict[str, Any] | None = None,
        seconds: float = 0.0,
        check_claim: Callable[[], None] = unclaimed,
    ):
        self.path = path
        self.made_with = made_with or {}
        self.seconds = seconds
        self.check_claim = check_claim
        self.written = time.monotonic()
        self.pending: State | None = None

    def read(self) -> State | None:
        """The state that is there; None where there is none, or a damaged one, which is said."""
        if self.path is None or not self.path.exists():
            return None
        try:
            with safe_open(self.path, "pt") as file:
                values = json.loads(file.metadata()["state"])
                return State({name: file.get_tensor(name) for name in file.keys()}, values)  # noqa: SIM118
        except DAMAGED as error:
            tqdm.write(f"note: {self.path}: damaged ({one_line(error)}), so the training begins anew")
            return None

    def note(self, state: State) -> None:
        """Remember the state after an update, and write it where the last one is old enough.

        Raises:
            WriteError: it cannot be written.
        """
        self.pending = state
        if time.monotonic() - self.written >= self.seconds:
            self.write()

    def write(self) -> None:
        """Write what is remembered.

        Raises:
            WriteError: it cannot be written.
        """
        if self.pending is None or self.path is None:
            return
        self.check_claim()
        said = {"made_with": json.dumps(self.made_with), "state": json.dumps(self.pending.values)}
        write_tensors(self.path, self.pending.tensors, said)
        self.pending = None
        self.written = time.monotonic()

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Around a training: its last state is kept where it is interrupted, not where it fails by itself,
        as it would again."""
        try:
            yield
        except WorkError as error:
            if not isinstance(error, WriteError):
                self.remove()
            raise
        except BaseException:
            with suppress(WriteError):  # the first error is the one to tell
                self.write()
            raise

    def remove(self) -> None:
        """Leave no state."""
        if self.path:
            self.path.unlink(missing_ok=True)


def made_with(path: Path) -> dict[str, Any] | None:
    """What the training of a checkpoint was asked for with; None where there is none, or a damaged one."""
    try:
        with safe_open(path, "pt") as file:
            return json.loads(file.metadata()["made_with"])
    except DAMAGED:
        return None
