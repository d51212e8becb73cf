"""What many classes cost on the miniature: time, memory and disk, in one process, a shell loop and several.

    python -m experiments.speed.many_classes
    python -m experiments.speed.many_classes --parts memory bytes

Half an hour on 2 CPU cores. Each run of the program is one entry of the JSON file, written as soon as it is
done: what is there already is not run again, so delete the file to measure anew. The parts:

- sweep: 1, 2, 4 and 8 classes in one process and as a shell loop of single commands, in turns; start-up,
  training and evaluation of a class;
- memory: resident memory of one process after each of 50 classes, with few updates, steps and seeds;
- bytes: what a class leaves on disk with the default options;
- batch: training with 1, 2, 4 and 8 classes side by side, with one thread and with all;
- processes: one and two processes of accelerate, with one thread each.

What run.py does not do, or not yet, is left out with its own line.
"""

import argparse
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from classifiers import load_classifier
from discriminative.guides.classifier import Classifier
from discriminative.records.files import write_json
from discriminative.records.layout import RECORDS
from experiments.speed import common
from experiments.speed.startup import ROOT
from experiments.speed.table import RESULTS
from miniature.scenes import CLASSES

SIZES = (1, 2, 4, 8)
OF_MEMORY = (5, 50)  # between these classes it should not grow
# The lines of run.py that end a step of a class, or begin one.
STEP = re.compile(r"(?:^|\s)(class \d+ of|training:|evaluation:|summary:)")
ACCELERATE = ("-m", "accelerate.commands.launch", "--num_machines", "1", "--mixed_precision", "no")
# On a machine without cards, too, this is what makes accelerate start several processes.
SEVERAL = "--multi_gpu"
# The same calls of everything, but over soon.
SHORT = ("--max_epochs", "2", "--training_sampler", "dpmsolver++@4")
SHORT += ("--test_size", "2", "--num_inference_steps", "4")


class LeftOut(Exception):
    """A run that the program refused, or that failed; with its last line."""


@dataclass(frozen=True)
class Job:
    """A run of the program over some classes.

    Args:
        name: its key in the result.
        classes: from 1.
        options: of run.py, beside model, classes and folders.
        launcher: what stands between python and run.py.
        threads: a process; 0 is as many as there are cores.
        is_loop: a command for each class, one after the other.
    """

    name: str
    classes: Sequence[int]
    options: tuple[str, ...]
    launcher: tuple[str, ...] = ()
    threads: int = 1
    is_loop: bool = False

    def commands(self, out: str) -> list[list[str]]:
        """The command lines, all into one folder."""
        numbers = [str(number) for number in self.classes]
        lists = numbers if self.is_loop else [",".join(numbers)]
        program = [sys.executable, *self.launcher, str(ROOT / "run.py"), "--model", "miniature"]
        return [
            [*program, "--device", "cpu", "--class_index", classes, *self.options, "--output_path", out]
            for classes in lists
        ]


def miniature_twice() -> Classifier:
    """The miniature's guide with each of its 44 classes twice; an image never is of the second one."""
    guide = load_classifier("miniature", torch.device("cpu"), torch.float32)

    class Twice(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            logits = guide.model(images)  # (B, 44)
            return torch.cat([logits, logits - 20.0], dim=1)  # (B, 88)

    return Classifier("twice", Twice(), [*guide.labels, *guide.labels], guide.recipe)


def sweep(updates: int, classes: int) -> list[Job]:
    """One process and a shell loop in turns, of more and more classes."""
    options = ("--train", "--evaluate", "--test_size", "10", "--max_epochs", str(updates))
    return [
        Job(f"{way} of {size}", range(1, size + 1), options, is_loop=way == "loop")
        for size in SIZES
        if size <= classes
        for way in ("sweep", "loop")
    ]


def memory(updates: int, classes: int) -> list[Job]:
    """One process over many classes."""
    guide = "python:experiments.speed.many_classes:miniature_twice"
    options = ("--train", "--evaluate", *SHORT, "--classifier", guide, "--judge", "miniature-judge")
    return [Job(f"{OF_MEMORY[-1]} classes", range(1, OF_MEMORY[-1] + 1), options)]


def size_on_disk(updates: int, classes: int) -> list[Job]:
    """The default training and evaluation of the demo's pair of classes."""
    return [Job("default options", range(1, min(classes, 2) + 1), ("--train", "--evaluate"))]


def batch(updates: int, classes: int) -> list[Job]:
    """Training alone, of the same classes, more and more at once."""
    options = ("--train", "--max_epochs", str(updates), "--classes_per_batch")
    return [
        Job(f"M={size} of {classes}, {told}", range(1, classes + 1), (*options, str(size)), threads=threads)
        for told, threads in (("one thread", 1), ("all threads", 0))
        for size in SIZES
        if size <= classes
    ]


def processes(updates: int, classes: int) -> list[Job]:
    """One process and two, each with one thread, over classes of different words.

    Two classes of one word share their images without the token, where they do not begin at the same time.
    """
    words = [scene_class.word for scene_class in CLASSES]
    numbers = [words.index(word) + 1 for word in dict.fromkeys(words)]
    options = ("--train", "--evaluate", "--test_size", "10", "--max_epochs", str(updates))
    several = {1: (), 2: (SEVERAL,)}
    return [
        Job(
            f"processes: {n}, classes: {classes}",
            numbers[:classes],
            options,
            (*ACCELERATE, *flags, "--num_processes", str(n)),
        )
        for n, flags in several.items()
    ]


PARTS = {
    "sweep": sweep,
    "memory": memory,
    "bytes": size_on_disk,
    "batch": batch,
    "processes": processes,
}


def timed(command: list[str], threads: int) -> dict:
    """Run the program; its seconds, and when each step of a class ended.

    Returns:
        "seconds" and "cpu" since the start, and "steps", each with both and with "resident" bytes.

    Raises:
        LeftOut: it ended with an error.
    """
    counted = str(threads or os.cpu_count())
    environment = os.environ | {"OMP_NUM_THREADS": counted, "PYTHONUNBUFFERED": "1"}
    steps = []
    before = cpu_of_children()
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as errors:
        program = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True
        )
        for line in program.stdout:
            step = STEP.search(line)
            if step:
                seconds = time.perf_counter() - start
                steps.append({"step": step[1].rstrip(":"), "seconds": seconds} | used(program.pid))
        if program.wait():
            errors.seek(0)
            raise LeftOut((errors.read().strip().splitlines() or [f"exit code {program.returncode}"])[-1])
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "cpu": cpu_of_children() - before, "steps": steps}


def used(pid: int) -> dict[str, float]:
    """A process's CPU seconds so far, and its resident bytes."""
    process = psutil.Process(pid)
    times = process.cpu_times()
    return {"cpu": times.user + times.system, "resident": process.memory_info().rss}


def cpu_of_children() -> float:
    """CPU seconds of the processes that were started here and have ended."""
    times = psutil.Process().cpu_times()
    return times.children_user + times.children_system


def kept_bytes(out: Path) -> dict[str, int]:
    """Bytes below a run's folder: of tokens with their records, of images, and of the rest (a cache, the
    summary)."""
    sizes = {"records": 0, "images": 0, "rest": 0}
    kinds = {RECORDS: "records", "img": "images"}
    for path in out.rglob("*"):
        if path.is_file():
            sizes[kinds.get(path.relative_to(out).parts[0], "rest")] += path.stat().st_size
    return sizes


def run_job(job: Job) -> dict:
    """Run its commands in a folder of their own.

    Raises:
        LeftOut: one ended with an error.
    """
    with tempfile.TemporaryDirectory() as out:
        commands = [timed(command, job.threads) for command in job.commands(out)]
        sizes = kept_bytes(Path(out))
    return {"classes": len(job.classes), "threads": job.threads, "commands": commands, "bytes": sizes}


def seconds_a_class(run: dict, clock: str = "seconds") -> float:
    """All of a run's seconds over its classes; ``clock`` is "seconds" or "cpu"."""
    return sum(command[clock] for command in run["commands"]) / run["classes"]


def without_start_up(run: dict) -> float:
    """The same without what comes before a command's first class."""
    return sum(c["seconds"] - c["steps"][0]["seconds"] for c in run["commands"]) / run["classes"]


def classes_of(command: dict, clock: str) -> list[dict[str, float]]:
    """Seconds of training, evaluation and all of each class that a command took, one after the other, and
    the resident bytes at its end."""
    steps = iter(command["steps"])
    return [
        {
            "training": trained[clock] - begun[clock],
            "evaluation": evaluated[clock] - trained[clock],
            "all": done[clock] - begun[clock],
            "resident": done["resident"],
        }
        for begun, trained, evaluated, done in zip(steps, steps, steps, steps, strict=True)
    ]


def split(runs: list[dict], clock: str) -> dict[str, float]:
    """Median seconds of a command's start-up, and of a class's training and evaluation."""
    commands = [command for run in runs for command in run["commands"]]
    classes = [found for command in commands for found in classes_of(command, clock)]
    start_up = statistics.median(command["steps"][0][clock] for command in commands)
    return {"start-up": start_up} | {
        step: statistics.median(found[step] for found in classes) for step in ("training", "evaluation")
    }


def over_alone(sweep: dict, loop: dict, clock: str) -> float:
    """Median of what a class takes in a sweep, over all of the command for the same class alone."""
    within = classes_of(sweep["commands"][0], clock)
    alone = loop["commands"]
    return statistics.median(a["all"] / b[clock] for a, b in zip(within, alone, strict=True))


def over_rounds(figure: Callable[..., float], *runs: list[dict]) -> float:
    """Median over the rounds of a figure of runs of the same round."""
    return statistics.median(figure(*of_round) for of_round in zip(*runs, strict=False))


def of_sweep(runs: dict[str, list[dict]]) -> dict:
    """Seconds a class by the number of classes, and where they go; by the clock and in CPU seconds, which
    other work on the machine disturbs less."""
    told = {}
    for size in SIZES:
        sweeps = runs.get(f"sweep of {size}")
        loops = runs.get(f"loop of {size}")
        if sweeps and loops:
            told[str(size)] = {clock: by_clock(sweeps, loops, clock) for clock in ("seconds", "cpu")}
    return told


def by_clock(sweeps: list[dict], loops: list[dict], clock: str) -> dict:
    """A sweep beside the loop over the same classes."""
    return {
        "sweep, a class": over_rounds(lambda run: seconds_a_class(run, clock), sweeps),
        "loop, a class": over_rounds(lambda run: seconds_a_class(run, clock), loops),
        "sweep over loop": over_rounds(
            lambda a, b: seconds_a_class(a, clock) / seconds_a_class(b, clock), sweeps, loops
        ),
        "a class in the sweep over alone": over_rounds(lambda a, b: over_alone(a, b, clock), sweeps, loops),
        "split in the sweep": split(sweeps, clock),
        "split alone": split(loops, clock),
    }


def of_memory(runs: dict[str, list[dict]]) -> dict:
    """Resident bytes after the fifth and after the last class, by how much they grew, and by how much the
    most after any class between them."""
    told = {}
    for run in runs.get(f"{OF_MEMORY[-1]} classes", ()):
        resident = [found["resident"] for found in classes_of(run["commands"][0], "seconds")]
        resident = resident[OF_MEMORY[0] - 1 :]
        told["resident"] = {str(OF_MEMORY[0]): resident[0], str(OF_MEMORY[-1]): resident[-1]}
        told["growth"] = resident[-1] / resident[0] - 1
        told["growth, most"] = max(resident) / resident[0] - 1
    return told


def of_bytes(runs: dict[str, list[dict]]) -> dict:
    """Bytes a class, by kind."""
    return {
        name: {kind: round(size / of_round[-1]["classes"]) for kind, size in of_round[-1]["bytes"].items()}
        for name, of_round in runs.items()
    }


def over_first(runs: dict[str, list[dict]]) -> dict:
    """Seconds a class after start-up, and how many times sooner than the first the whole run is done, and
    what comes after start-up."""
    first = next(iter(runs.values()), [])
    return {
        name: {
            "seconds a class after start-up": over_rounds(without_start_up, of_round),
            "speed over the first": over_rounds(
                lambda a, b: seconds_a_class(a) / seconds_a_class(b), first, of_round
            ),
            "... after start-up": over_rounds(
                lambda a, b: without_start_up(a) / without_start_up(b), first, of_round
            ),
        }
        for name, of_round in runs.items()
    }


def of_batch(runs: dict[str, list[dict]]) -> dict:
    """Every M over M = 1 with as many threads."""
    told = {}
    for threads in ("one thread", "all threads"):
        mine = {name: of_round for name, of_round in runs.items() if name.endswith(threads)}
        told |= over_first(mine)
    return told


FIGURES = {
    "sweep": of_sweep,
    "memory": of_memory,
    "bytes": of_bytes,
    "batch": of_batch,
    "processes": over_first,
}


def begin(out: Path, updates: int) -> dict:
    """The result so far, or an empty one.

    Raises:
        ValueError: it is of another machine, other versions or another number of updates.
    """
    here = common.environment(torch.device("cpu")) | {"updates": updates}
    found = json.loads(out.read_text()) if out.exists() else here | {"runs": {}}
    for name in ("hardware", "versions", "updates"):
        if found[name] != here[name]:
            told = f"{out} holds runs with {name} {found[name]}, not {here[name]}"
            raise ValueError(f"--out: {told}; delete it, or name another")
    return found | {"left_out": {}}


def measure(parts: list[str], classes: int, rounds: int, result: dict, out: Path) -> None:
    """Make the runs that are missing, in turns, and write each as soon as it is done."""
    for part in parts:
        runs = result["runs"].setdefault(part, {})
        jobs = PARTS[part](result["updates"], classes)
        for number, job in itertools.product(range(rounds), jobs):
            told = f"{part}, {job.name}"
            try:
                if len(runs.get(job.name, [])) <= number and told not in result["left_out"]:
                    run = run_job(job)
                    runs.setdefault(job.name, []).append(run)
                    print(f"{told}: {seconds_a_class(run):.1f} s a class", file=sys.stderr)
            except LeftOut as error:
                result["left_out"][told] = str(error)
                print(f"{told}: left out: {error}", file=sys.stderr)
            result["figures"] = {name: FIGURES[name](found) for name, found in result["runs"].items()}
            write_json(out, result)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--updates", type=int, default=10, help="of a class's training (default: 10)")
    parser.add_argument("--classes", type=int, choices=SIZES, default=SIZES[-1], help="at most (default: 8)")
    parser.add_argument("--rounds", type=int, default=1, help="of runs that take turns (default: 1)")
    parser.add_argument("--out", type=Path, default=RESULTS / "many_classes.json", help="JSON file")
    args = parser.parse_args()
    for name in ("updates", "rounds"):
        if getattr(args, name) < 1:
            parser.error(f"--{name}: {getattr(args, name)} was given; allowed is 1 or more")
    try:
        result = begin(args.out, args.updates)
    except ValueError as error:
        parser.error(str(error))
    measure(args.parts, args.classes, args.rounds, result, args.out)
    print(json.dumps(result["figures"], indent=2))


if __name__ == "__main__":
    main()
