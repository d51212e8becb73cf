"""The classes of a run as a queue that several processes and machines share by their output folder.

A class is claimed, done and released; what is finished is left out. Nobody is in charge: each process
reads from the files what the others did.
"""

import gc
import os
import socket
import sys
import time
import traceback
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from apps.insight import is_looked_into
from apps.plan import Plan, Sources, check_inputs, check_sweep, classes_of, make_plan
from apps.provenance import is_evaluated
from config import RunConfig
from discriminative.command_line import is_first_process
from discriminative.errors import UsageError, WorkError
from discriminative.records.environment import environment
from discriminative.records.files import read_json, write_json
from discriminative.records.layout import RunFolder, class_folder
from discriminative.records.locks import Claim, ClaimLost, disk_time
from discriminative.records.summary import has_row
from discriminative.tokens.dataset import number_of_images
from evaluate import templates_of

POLL = 5.0  # seconds between two looks at what is at work elsewhere
COLLECT_EVERY = 20.0  # seconds between two collections of garbage


@dataclass
class Taken:
    """A class that this process has claimed: its plan, and the claim, which is to be released."""

    number: int
    plan: Plan
    claim: Claim


class ClassQueue:
    """The classes that the options ask for, each in one state; leaving the block releases every claim.

    Args:
        config: the options, of several classes.

    Raises:
        UsageError: whatever is wrong with all classes and can be told before weights are loaded.
    """

    def __init__(self, config: RunConfig, sources: Sources):
        check_sweep(config)
        check_inputs(config)
        self.config = config
        self.sources = sources
        self.labels = sources.labels(sources.guides[0])
        self.free = deque(classes_of(config, sources.guides[0], self.labels))  # not looked at yet
        self.total = len(self.free)
        self.elsewhere: dict[int, Claim] = {}  # at work there; each claim watches for signs of life
        self.held: dict[int, Taken] = {}
        self.done: dict[int, bool] = {}  # whether it was done here
        self.skipped: list[int] = []  # finished before this process began
        self.failed: dict[int, str] = {}  # with the reason
        self.untold: list[str] = []  # failures, until one class can be done
        self.is_usable = False  # one class could be planned
        self.began = time.monotonic()
        self.collected = self.began
        self.mark = disk_time(Path(config.output_path))
        self.told_of: set[int] = set()

    def __enter__(self) -> "ClassQueue":
        return self

    def __exit__(self, *_) -> None:
        for taken in list(self.held.values()):
            self.release(taken)

    # Taking classes.

    def take(self, most: int = 1, waits: bool = True) -> list[Taken]:
        """Claim the next free classes, ``most`` at most; none where all are settled.

        Args:
            waits: where all that are left are at work elsewhere, until one is done or given up there.

        Raises:
            UsageError: no class at all can be done.
        """
        while True:
            taken = []
            while self.free and len(taken) < most:
                taken += self.try_to_take(self.free.popleft())
            for number in list(self.elsewhere):
                if len(taken) < most:
                    taken += self.try_to_take(number)
            if taken or not self.elsewhere or not waits:
                self.tell_failures()
                return taken
            self.tell_waiting()
            time.sleep(POLL)

    def try_to_take(self, number: int) -> list[Taken]:
        """The class with its claim; nothing where it is settled, or at work elsewhere."""
        if self.is_settled(number) or not (claim := self.claimed(number)):
            return []
        with ExitStack() as unless_taken:
            unless_taken.callback(claim.release)
            self.take_training(number)
            # Another process may have ended here since.
            if self.is_settled(number, is_claimed=True):
                return []
            plan = self.plan_of(number)
            unless_taken.pop_all()
        plan.folder.claimed_by(claim.check)
        self.held[number] = Taken(number, plan, claim)
        return [self.held[number]]

    def take_training(self, number: int) -> None:
        """Put a training that is done in its place, where whoever did it was killed before."""
        folder = self.folder(number)
        if self.config.train and folder.is_to_be_taken:
            folder.take_training()

    def claimed(self, number: int) -> Claim | None:
        """A claim that this process holds now; None where another does, or nothing can be written."""
        claim = self.elsewhere.pop(number, None) or Claim(self.folder(number).records)
        try:
            if claim.take():
                return claim
            self.elsewhere[number] = claim
        except WorkError as error:
            self.fail(number, str(error))
        return None

    def is_settled(self, number: int, is_claimed: bool = False) -> bool:
        """Whether nothing is left to do: the class is finished, or failed since this process began.

        Args:
            is_claimed: nobody else writes there, so that what cannot be planned has failed.
        """
        folder = self.folder(number)
        reason = self.failure_since(folder)
        if reason is None:
            try:
                plan = self.plan_of(number)
                self.is_usable = True
                if not is_finished(plan):
                    return False
            except (UsageError, WorkError) as error:
                if not is_claimed:
                    return False
                reason = str(error)
        else:
            self.is_usable = True
        if reason is not None:
            self.fail(number, reason)
        elif self.is_since(folder.result if self.config.evaluate or self.config.insight else folder.config):
            self.done[number] = False
        else:
            self.skipped.append(number)
        self.elsewhere.pop(number, None)
        return True

    def plan_of(self, number: int) -> Plan:
        """The plan of a class, as its files are now."""
        return make_plan(replace(self.config, class_index=number), self.sources, resume=True)

    def folder(self, number: int) -> RunFolder:
        """Where a class's files are."""
        name = class_folder(number, self.labels[number - 1])
        return RunFolder(self.config.output_path, name, self.config.exp_id)

    def is_since(self, path: Path) -> bool:
        """Whether a file was written since this process began, both by the disk's clock."""
        try:
            return path.stat().st_mtime >= self.mark
        except OSError:  # it is not there
            return False

    def failure_since(self, folder: RunFolder) -> str | None:
        """Why another process failed since this one began; None where none did."""
        if not self.is_since(folder.failed):
            return None
        try:
            return str(read_json(folder.failed).get("reason"))
        except WorkError:  # gone just now
            return None

    # Ending with a class.

    @contextmanager
    def at_work_on(self, taken: Taken) -> Iterator[None]:
        """Around the work on a class: how it ends is noted, and its claim released.

        What keeps all classes from being done is raised.
        """
        try:
            yield
        except ClaimLost as error:
            self.give_up(taken, error)
        except BrokenPipeError:  # nobody reads the lines any more
            raise
        except Exception as error:
            if not isinstance(error, (WorkError, UsageError, OSError)):
                traceback.print_exc()  # a fault of the program, which the other classes need not have
            self.note_failure(taken, error)
        else:
            self.note_done(taken)
        finally:
            self.release(taken)

    def note_done(self, taken: Taken) -> None:
        """A class is finished."""
        taken.plan.folder.failed.unlink(missing_ok=True)
        self.done[taken.number] = True

    def note_failure(self, taken: Taken, error: Exception) -> None:
        """A class failed: the reason is written down and printed."""
        try:
            write_failure(taken.plan, error, self.sources)
        except WorkError as unwritten:
            print(f"note: {unwritten}", file=sys.stderr)
        self.fail(taken.number, str(error) or type(error).__name__)
        self.tell_failures()

    def give_up(self, taken: Taken, error: ClaimLost) -> None:
        """Another process has taken the class over: it is looked at again, as one at work elsewhere."""
        print(f"note: {error}", file=sys.stderr, flush=True)
        self.elsewhere[taken.number] = Claim(taken.plan.folder.records)

    def release(self, taken: Taken) -> None:
        """Let a class go; does nothing where it is not held."""
        if self.held.pop(taken.number, None):
            taken.claim.release()
            self.collect_garbage()

    def collect_garbage(self) -> None:
        """Free what classes left in cycles, as figures and tokenizers are: some MB each, which Python itself
        looks for too rarely."""
        if time.monotonic() - self.collected >= COLLECT_EVERY:
            gc.collect()
            self.collected = time.monotonic()

    def fail(self, number: int, reason: str) -> None:
        """Count a class as failed; :meth:`tell_failures` prints it."""
        self.failed[number] = reason
        self.untold.append(f"class {number} ({self.labels[number - 1]}): {reason}")

    # In printed lines.

    def tell_failures(self) -> None:
        """Print the failures that were not printed yet.

        Raises:
            UsageError: all classes failed before anything was done.
        """
        if not self.is_usable:
            raise UsageError(f"no class can be done; {self.untold[0]}")
        for line in self.untold:
            print(f"run.py: failed: {line}", file=sys.stderr, flush=True)
        self.untold = []

    def tell_waiting(self) -> None:
        """Print for whom this process waits, once for each."""
        new = {number: claim for number, claim in self.elsewhere.items() if number not in self.told_of}
        if new:
            who = ", ".join(f"class {number} ({claim.holder})" for number, claim in new.items())
            print(f"waiting for what is at work elsewhere: {who}", flush=True)
            self.told_of |= set(new)

    def look_ahead(self) -> None:
        """Settle what others finished, up to the next class that is free."""
        for number in list(self.elsewhere):
            self.is_settled(number)
        while self.free and (self.is_settled(self.free[0]) or self.is_claimed(self.free[0])):
            self.free.popleft()

    def is_claimed(self, number: int) -> bool:
        """Whether a class seems to be at work elsewhere; it is then looked at again."""
        claim = Claim(self.folder(number).records)
        if claim.path.exists():
            self.elsewhere[number] = claim
        return number in self.elsewhere

    def progress(self) -> str:
        """ "12 of 200 classes, 1 failed, 00:31 so far, 04:10 left", of what all processes did."""
        self.look_ahead()
        worked = len(self.done) + len(self.failed)
        ended = worked + len(self.skipped)
        elapsed = time.monotonic() - self.began
        left = elapsed / max(worked, 1) * (self.total - ended)
        failed = f", {len(self.failed)} failed" if self.failed else ""
        times = f"{tqdm.format_interval(elapsed)} so far, {tqdm.format_interval(left)} left"
        return f"{ended} of {self.total} classes{failed}, {times}"

    def table(self) -> str:
        """How all classes ended: done, skipped and failed, how many and which, and why they failed."""
        elsewhere = sum(not here for here in self.done.values())
        rows = {"done": sorted(self.done), "skipped": sorted(self.skipped), "failed": sorted(self.failed)}
        notes = {"done": f"   ({elsewhere} elsewhere)" if elsewhere else ""}
        notes["skipped"] = "   (finished before)" if self.skipped else ""
        lines = [
            f"{name:<8}{len(numbers):>6}   {ranges(numbers)}{notes.get(name, '')}".rstrip()
            for name, numbers in rows.items()
        ]
        lines += [f"  class {i} ({self.labels[i - 1]}): {self.failed[i]}" for i in rows["failed"]]
        return "\n".join(lines)

    def tell_end(self) -> None:
        """Print the table; of several processes the first has it, the others say what they did."""
        self.tell_failures()
        if is_first_process():
            print(self.table(), flush=True)
        else:
            print(f"{sum(self.done.values())} classes done here", flush=True)


def is_finished(plan: Plan) -> bool:
    """Whether all that a plan asks for is there; images of prompts are never taken for it."""
    config = plan.config
    folder = plan.folder
    if plan.vectors is None or plan.to_draw:
        return False
    if config.evaluate:
        key = (config.output_path, config.class_index, plan.label, config.exp_id)
        if not (is_evaluated(config, folder, plan.vectors, templates_of(config)) and has_row(*key)):
            return False
    if config.insight and not is_looked_into(plan):
        return False
    exported = {"a1111": folder.web_ui / f"{config.placeholder_token}.safetensors"}
    exported["pipeline"] = folder.pipeline / "model_index.json"
    if not all(exported[name].exists() for name in config.exports):
        return False
    return not config.export_dataset or number_of_images(folder.dataset) >= config.export_dataset


def write_failure(plan: Plan, error: Exception, sources: Sources) -> None:
    """Write down why a class failed: ``failed.json`` among its records.

    Raises:
        WorkError: it cannot be written.
    """
    said: dict[str, Any] = {"reason": str(error) or type(error).__name__, "kind": type(error).__name__}
    said |= {"host": socket.gethostname(), "pid": os.getpid()}
    write_json(plan.folder.failed, said | environment(sources.device))


def ranges(numbers: list[int]) -> str:
    """Sorted numbers in short: "1-3, 5"."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1] = [parts[-1][0], number]
        else:
            parts.append([number])
    return ", ".join("-".join(map(str, part)) for part in parts)
