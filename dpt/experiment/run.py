"""``python -m dpt experiment``: what is missing, how long it takes, and doing it, row by row."""

import json
import multiprocessing
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from discriminative.command_line import Prefixed
from discriminative.errors import WorkError
from discriminative.hub import quiet_libraries
from discriminative.records.files import told_what_cannot_be_written
from discriminative.records.locks import alone_in
from dpt.config import Options
from dpt.experiment.settings import PARTS, ROWS, SEEDS
from dpt.experiment.tables import tell
from dpt.experiment.units import (
    Progress,
    Unit,
    expected_seconds,
    missing,
    needs,
    share_of,
    units_of,
)
from dpt.experiment.work import carry_out, has_files, is_of_today

FOLDER = "experiment"


def run_experiment(options: Options) -> int:
    """Do what is missing of the parts that are asked for, or tell what is there; returns the exit code.

    Raises:
        UsageError, WorkError: in one line what was wrong.
    """
    quiet_libraries()
    root = Path(options.output_path) / FOLDER
    rows = Path(options.rows or ROWS)
    progress = Progress(read_rows(rows), partial(has_files, root))
    if options.table:
        tell(progress, rows, root)
        return 0
    parts = options.parts.split(",") if options.parts else PARTS
    seeds = [int(seed) for seed in options.seeds.split(",")] if options.seeds else SEEDS
    wanted = [unit for part in parts for unit in units_of(part, seeds)]
    left = missing(wanted, progress)
    print(announced(left, progress, options.workers), flush=True)
    if left and not options.dry_run:
        with alone_in(root):
            work_off(wanted, progress, root, rows, options.workers)
    return 0


def read_rows(path: Path) -> list[dict]:
    """The finished units' rows, as far as they are of today's prompts.

    Raises:
        WorkError: a line is damaged.
    """
    if not path.is_file():
        return []
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise WorkError(f"--rows: line {number} of {path} is no row ({error}); remove it") from error
    return [row for row in rows if is_of_today(row)]


# Time.


def pace(progress: Progress) -> float:
    """How much longer finished units took than expected."""
    rows = [row for row in progress.rows.values() if row["kind"] != "scenes"]
    expected = sum(expected_seconds(unit_of(row), row["settings"]) for row in rows)
    return sum(row["took"] for row in rows) / expected if rows else 1.0


def unit_of(row: dict) -> Unit:
    """The unit that a row is of."""
    return Unit(*(row[name] for name in ("kind", "name", "seed", "prompts", "part")))


def seconds_left(left: list[Unit], progress: Progress, workers: int) -> float:
    """About how long units take, on so many workers."""
    return sum(expected_seconds(unit, progress.settings(unit)) for unit in left) * pace(progress) / workers


def announced(left: list[Unit], progress: Progress, workers: int) -> str:
    """What is missing, in lines."""
    if not left:
        return "nothing is missing; python -m dpt experiment --table prints what came out"
    lines = []
    for kind in dict.fromkeys(unit.kind for unit in left):
        some = [unit for unit in left if unit.kind == kind]
        hours = seconds_left(some, progress, 1) / 3600
        lines.append(f"{len(some):5d} x {kind:<10} about {hours:.1f} core-hours")
    told = tqdm.format_interval(seconds_left(left, progress, workers))
    return "\n".join([*lines, f"{len(left)} units are missing: about {told} on {workers} workers"])


# Work.


class Here(Executor):
    """Does what is submitted at once, in this process."""

    def submit(self, work, *args) -> Future:
        future = Future()
        try:
            future.set_result(work(*args))
        except Exception as error:  # told by whoever asks for the result
            future.set_exception(error)
        return future


@contextmanager
def pool_of(workers: int) -> Iterator[Executor]:
    """Processes of one thread each; they end with the block, whatever they are at. One is this process."""
    if workers == 1:
        yield Here()
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, initializer=settle)
    try:
        yield pool
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for child in multiprocessing.active_children():
            child.terminate()


def settle() -> None:
    """A worker: one thread; an interruption is its parent's business."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    quiet_libraries()


def told_work(root: Path, unit: Unit, settings: dict) -> dict:
    """A unit in a worker; its progress in lines that begin with its name."""
    if multiprocessing.parent_process() is None:
        return carry_out(root, unit, settings)
    lines = Prefixed(sys.stderr, f"[{unit}] ")
    with redirect_stderr(lines), redirect_stdout(lines):
        return carry_out(root, unit, settings)


def work_off(wanted: list[Unit], progress: Progress, root: Path, rows: Path, workers: int) -> None:
    """Do what is missing, each unit as soon as what it needs is there, the first ones first; a row is written
    as it comes.

    Raises:
        UsageError, WorkError: a unit failed; finished ones are kept.
    """
    running: dict[Future, Unit] = {}
    with pool_of(workers) as pool, told_what_cannot_be_written(rows):
        rows.parent.mkdir(parents=True, exist_ok=True)
        left = missing(wanted, progress)
        while left:
            for unit in ready(left, running.values(), progress)[: workers - len(running)]:
                running[pool.submit(told_work, root, unit, progress.settings(unit))] = unit
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                unit = running.pop(future)
                finish(result_of(future, unit), progress, rows)
                # A choice that was made may need another training.
                left = missing(wanted, progress)
                print(finished_line(unit, progress, left, workers), flush=True)


def ready(left: list[Unit], running: Iterable[Unit], progress: Progress) -> list[Unit]:
    """The units that nobody is at and of which nothing that they need is still to be done, in their order."""
    busy = set(running)
    undone = set(left)
    return [unit for unit in left if unit not in busy and undone.isdisjoint(needs(unit, progress))]


def result_of(future: Future, unit: Unit) -> dict:
    """A unit's row.

    Raises:
        UsageError, WorkError: as the unit raised them.
        WorkError: its process died.
    """
    try:
        return future.result()
    except BrokenProcessPool as error:
        raise WorkError(
            f"{unit}: its process died, perhaps for want of memory; try fewer --workers"
        ) from error


def finish(row: dict, progress: Progress, rows: Path) -> None:
    """Write a row, and take note of it."""
    with rows.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    progress.add(row)


def finished_line(unit: Unit, progress: Progress, left: list[Unit], workers: int) -> str:
    """What a finished unit came to, and how much is left."""
    row = progress.row(unit) or {}
    full = f" {share_of([row]):.3f} whole captions" if "full" in row else ""
    took = f" in {row['took']:.0f} s" if row else ""
    told = tqdm.format_interval(seconds_left(left, progress, workers))
    now = time.strftime("%H:%M")
    return f"{now} {unit}:{full}{took}; {len(left)} left, about {told}"
