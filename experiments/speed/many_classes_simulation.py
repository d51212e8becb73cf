"""Ten thousand classes on 64 workers that share one folder, simulated: how long, over the ideal.

    python -m experiments.speed.many_classes_simulation

Five minutes on one core. Expect at most 1.05 of the ideal (all work over all workers) with 1 % of the workers
failing an hour, no class done twice and none lost.

Events on a heap, with the rule of the program's queue: each worker walks down the same list and claims the
next class that is neither done nor claimed. At the end it looks again at those that others were at, and takes
over a class whose claim showed it no heartbeat for the length of the lease. A class that was killed goes on
from its last checkpoint; an evaluation begins again. Every worker is on a machine of its own: on the same one
a dead process is noticed at once, which is not reckoned with.

Training seconds are drawn from the miniature's classes (experiments/results), evaluation and start-up are
CPU seconds that many_classes.py measured. All are multiplied by ``--scale``. Its default is an assumption: no
card was measured, and an update of SD 1.4 in 1.0 s is 1.5 times what the miniature's takes on a CPU. Rates of
failure and preemption are assumptions too.
"""

import argparse
import heapq
import itertools
import math
import statistics
from collections import deque
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch

from apps.queue import POLL, ClassQueue, Taken
from discriminative.records.files import write_json
from discriminative.records.locks import HEARTBEAT, LEASE
from experiments.rows import read
from experiments.speed import common
from experiments.speed.table import load

ROWS = Path(__file__).parents[1] / "results" / "classes_0.3.0_seeds38_39_40.jsonl"
HOUR = 3600.0
ORDERS = {
    "as drawn": lambda work: 0,
    "longest first": lambda work: -work,
    "shortest first": lambda work: work,
}


@dataclass(frozen=True)
class Setting:
    """What is simulated; times in seconds, rates per worker and hour.

    Args:
        failures: a worker dies without warning.
        preemptions: a worker is taken away.
        warned: share of preemptions with a warning, at which it saves and lets go of its class.
        stalls: a worker stands still, heartbeat too, as a network disk may make it.
        stall: how long.
        back_after: until a worker that went is there again, before its start-up; infinite: never.
        lease: a claim is taken over by who has seen no heartbeat for longer.
        beat: between heartbeats.
        checkpoint: between checkpoints of a training.
        look: one look at a class's claim.
        poll: between looks at what is left at the end.
        order: of the list, see ``ORDERS``.
        notices: a worker that stood still asks whether its claim is still its own.
    """

    classes: int = 10_000
    workers: int = 64
    failures: float = 0.01
    preemptions: float = 0.05
    warned: float = 0.5
    stalls: float = 0.0
    stall: float = 120.0
    back_after: float = 300.0
    start_up: float = 10.0
    lease: float = LEASE
    beat: float = HEARTBEAT
    checkpoint: float = 30.0
    look: float = 0.005
    poll: float = POLL
    order: str = "as drawn"
    notices: bool = True


@dataclass
class Task:
    """A class.

    Args:
        number: its place in the drawing.
        training: seconds of it.
        evaluation: seconds of it.
        saved: seconds of training that need not be done again.
        owner: worker and its life; None: not claimed.
        last_beat: of an owner that beats no more.
        completions: how often it was done to its end.
    """

    number: int
    training: float
    evaluation: float
    saved: float = 0.0
    owner: tuple[int, int] | None = None
    last_beat: float = math.inf
    completions: int = 0

    @property
    def work(self) -> float:
        """Seconds of all of it."""
        return self.training + self.evaluation


class Waiting(Exception):
    """All classes that are left are at work elsewhere."""


class SimulatedClaim:
    """A claim whose heartbeats are the simulation's, taken over by the rule of the program's claims.

    Args:
        place: a walk, and the class that it claims.
    """

    def __init__(self, place: tuple["Walk", Task]):
        self.walk, self.task = place
        self.mark: tuple | None = None  # what changes with every sign of life
        self.marked = 0.0

    def take(self) -> bool:
        """Take the claim where it is free or stale; whether it is held now."""
        is_free = self.task.owner is None or self.silence() > self.walk.lease
        if is_free:
            self.task.owner = self.walk.claim
        return is_free

    def silence(self) -> float:
        """Seconds for which this object saw no sign of life."""
        mark = (self.task.owner, self.task.last_beat)
        if mark != self.mark or math.isinf(self.task.last_beat):
            self.mark = mark
            self.marked = self.walk.now
        return self.walk.now - self.marked

    def check(self) -> None:
        """Nothing is written."""

    def release(self) -> None:
        """Let it go."""
        if self.task.owner == self.walk.claim:
            self.task.owner = None


class Walk(ClassQueue):
    """One worker's queue: the program's own, without options and files.

    Args:
        tasks: in the order of the list.
        claim: what it writes into a claim.
        lease: seconds, see :class:`Setting`.
    """

    def __init__(self, tasks: list[Task], claim: tuple[int, int], lease: float):
        self.tasks = tasks
        self.free = deque(range(len(tasks)))
        self.elsewhere = {}
        self.held = {}
        self.claim = claim
        self.lease = lease
        self.now = 0.0
        self.looks = 0

    def next_task(self, now: float) -> Task | None:
        """What the program would claim next; None where it would wait, or all is settled."""
        self.now = now
        try:
            with mock.patch("apps.queue.Claim", SimulatedClaim):
                taken = self.take()
        except Waiting:
            return None
        return self.tasks[taken[0].number] if taken else None

    def try_to_take(self, number: int) -> list[Taken]:
        """Every look is counted."""
        self.looks += 1
        return super().try_to_take(number)

    def is_settled(self, number: int, is_claimed: bool = False) -> bool:
        """Whether a class is done."""
        is_done = self.tasks[number].completions > 0
        if is_done:
            self.elsewhere.pop(number, None)
        return is_done

    def take_training(self, number: int) -> None:
        """Nothing lies there half done."""

    def folder(self, number: int) -> SimpleNamespace:
        """What a claim is made from."""
        return SimpleNamespace(records=(self, self.tasks[number]))

    def plan_of(self, number: int) -> SimpleNamespace:
        """A plan without files."""
        return SimpleNamespace(folder=SimpleNamespace(claimed_by=lambda check: None))

    def tell_failures(self) -> None:
        """None fail."""

    def tell_waiting(self) -> None:
        """The simulation's clock goes on."""
        raise Waiting


@dataclass
class Worker:
    """A process that takes classes.

    Args:
        number: its own.
        life: how often it was started; what was planned for an earlier life is void.
        walk: through the classes, in this life.
        task: the class that it is at.
        began: when, shifted by the time that it stood still.
        had: seconds of the class that were saved by then.
        still_since: it stands still.
    """

    number: int
    life: int = 0
    walk: Walk | None = None
    task: Task | None = None
    began: float = 0.0
    had: float = 0.0
    still_since: float | None = None


class Simulation:
    """One run over all classes.

    Args:
        tasks: in the order that they are drawn.
        seed: of failures, preemptions and stalls.
    """

    def __init__(self, setting: Setting, tasks: list[Task], seed: int):
        self.setting = setting
        self.tasks = sorted(tasks, key=lambda task: ORDERS[setting.order](task.work))
        self.workers = [Worker(number) for number in range(setting.workers)]
        self.random = np.random.default_rng(seed)
        self.events = []
        self.count = itertools.count()
        self.lost = 0.0
        self.end = 0.0
        self.left = len(tasks)
        self.takeovers = 0

    def run(self) -> dict[str, float]:
        """Until every class is done, or no worker is left; see :meth:`outcome`."""
        for worker in self.workers:
            self.start(worker, 0.0)
        while self.events and self.left:
            now, _, happens, worker, life = heapq.heappop(self.events)
            if life == worker.life:
                happens(worker, now)
        return self.outcome()

    def outcome(self) -> dict[str, float]:
        """What it came to."""
        work = sum(task.work for task in self.tasks)
        ideal = work / self.setting.workers
        return {
            "makespan_over_ideal": self.end / ideal,
            "hours": self.end / HOUR,
            "work_lost": self.lost / work,
            "taken_over": self.takeovers,
            "classes_twice": sum(task.completions > 1 for task in self.tasks),
            "classes_lost": sum(task.completions == 0 for task in self.tasks),
        }

    def plan(self, when: float, happens, worker: Worker) -> None:
        """Let something happen to a worker, if it lives as long."""
        if math.isfinite(when):
            heapq.heappush(self.events, (when, next(self.count), happens, worker, worker.life))

    def start(self, worker: Worker, now: float) -> None:
        """The process begins."""
        worker.walk = Walk(self.tasks, (worker.number, worker.life), self.setting.lease)
        self.plan(now + self.setting.start_up, self.seek, worker)
        self.plan_disruption(worker, now)

    def seek(self, worker: Worker, now: float) -> None:
        """Go on with the next class from its checkpoint, or wait for those that others are at."""
        walk = worker.walk
        looks = walk.looks
        task = walk.next_task(now)
        if task:
            self.takeovers += math.isfinite(task.last_beat)
            task.last_beat = math.inf
            worker.task = task
            worker.began = now + (walk.looks - looks) * self.setting.look
            worker.had = task.saved
            self.plan(worker.began + task.work - task.saved, self.finish, worker)
        elif walk.elsewhere:
            self.plan(now + self.setting.poll, self.seek, worker)

    def finish(self, worker: Worker, now: float) -> None:
        """A class is done, unless the worker has stood still meanwhile."""
        due = worker.began + worker.task.work - worker.had if worker.task else math.inf
        if worker.still_since is not None or now < due - 1e-6:
            return
        task = worker.task
        self.left -= task.completions == 0
        task.completions += 1
        task.owner = None
        self.end = now
        worker.task = None
        self.seek(worker, now)

    # What goes wrong.

    def plan_disruption(self, worker: Worker, now: float) -> None:
        """Draw when the worker's next failure, preemption or stall is, and which."""
        setting = self.setting
        rates = {
            self.fail: setting.failures + setting.preemptions * (1 - setting.warned),
            self.save_and_go: setting.preemptions * setting.warned,
            self.stand_still: setting.stalls,
        }
        total = sum(rates.values())
        if total:
            kinds = list(rates)
            kind = self.random.choice(len(kinds), p=[rate / total for rate in rates.values()])
            self.plan(now + self.random.exponential(HOUR / total), kinds[kind], worker)

    def fail(self, worker: Worker, now: float) -> None:
        """Gone without a word: the claim stays, with its last heartbeat."""
        if worker.task:
            self.keep_checkpoint(worker, now)
        self.go(worker, now)

    def save_and_go(self, worker: Worker, now: float) -> None:
        """Warned: all that was trained is saved, and the class is let go."""
        task = worker.task
        if task and task.owner == worker.walk.claim:
            reached = worker.had + self.worked(worker, now)
            task.saved = min(reached, task.training)
            self.lost += reached - task.saved
            task.owner = None
            task.last_beat = math.inf
        self.go(worker, now)

    def go(self, worker: Worker, now: float) -> None:
        """The worker's life ends; it is started again later."""
        worker.life += 1
        worker.task = None
        worker.still_since = None
        self.plan(now + self.setting.back_after, self.start, worker)

    def stand_still(self, worker: Worker, now: float) -> None:
        """Neither work nor heartbeat for a while."""
        if worker.task:
            self.keep_checkpoint(worker, now)
            worker.still_since = now
        self.plan(now + self.setting.stall, self.wake, worker)

    def wake(self, worker: Worker, now: float) -> None:
        """Go on, unless another has the class by now."""
        self.plan_disruption(worker, now)
        task = worker.task
        if not task or worker.still_since is None:
            return
        worker.began += now - worker.still_since
        worker.still_since = None
        is_mine = task.owner == worker.walk.claim
        if is_mine:
            self.lost -= worker.had + self.worked(worker, now) - task.saved
            task.last_beat = math.inf
        if is_mine or not self.setting.notices:
            self.plan(worker.began + task.work - worker.had, self.finish, worker)
        else:
            worker.task = None
            self.seek(worker, now)

    def worked(self, worker: Worker, now: float) -> float:
        """Seconds of work on the class since it was taken."""
        until = now if worker.still_since is None else worker.still_since
        return max(until - worker.began, 0.0)

    def keep_checkpoint(self, worker: Worker, now: float) -> None:
        """What is left of a class whose owner beats no more."""
        task = worker.task
        if worker.still_since is not None or task.owner != worker.walk.claim:
            return
        setting = self.setting
        worked = self.worked(worker, now)
        reached = worker.had + worked
        kept = worker.had
        if math.isfinite(setting.checkpoint):
            kept += worked // setting.checkpoint * setting.checkpoint
        # The token is saved when its training ends; an evaluation begins again.
        task.saved = task.training if reached >= task.training else kept
        task.last_beat = worker.began + worked // setting.beat * setting.beat
        self.lost += reached - task.saved


def measured(result: dict, scale: float) -> dict[str, np.ndarray | float]:
    """Seconds of the miniature's trainings (N), of an evaluation and of a start-up, times ``scale``.

    Args:
        result: of many_classes.py.
    """
    sizes = result["figures"]["sweep"]
    split = sizes[max(sizes, key=int)]["cpu"]["split in the sweep"]
    seconds = [row["training"]["seconds"] for row in read(ROWS)]
    return {
        "training": np.array(seconds) * scale,
        "evaluation": split["evaluation"] * scale,
        "start-up": split["start-up"] * scale,
    }


def draw_tasks(number: int, found: dict, seed: int) -> list[Task]:
    """Classes whose trainings are drawn from the measured ones, with replacement."""
    random = np.random.default_rng((seed, 1))
    trainings = random.choice(found["training"], size=number)
    return [Task(i, seconds, found["evaluation"]) for i, seconds in enumerate(trainings)]


def interval(values: list[float]) -> list[float]:
    """Mean with its 95 % interval over the seeds, and the largest."""
    mean = statistics.fmean(values)
    half = 1.96 * statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return {"mean": mean, "interval": [mean - half, mean + half], "most": max(values)}


def simulate(setting: Setting, found: dict, seeds: range) -> dict[str, dict]:
    """Every figure over the seeds."""
    outcomes = [Simulation(setting, draw_tasks(setting.classes, found, seed), seed).run() for seed in seeds]
    return {name: interval([outcome[name] for outcome in outcomes]) for name in outcomes[0]}


def variants(base: Setting) -> dict[str, Setting]:
    """The base, and what changes when one thing does."""
    changes = {
        "failures": (0.0, 0.1, 1.0),
        "preemptions": (0.0, 1.0),
        "back_after": (math.inf,),
        "lease": (10.0, 120.0, 600.0),
        "checkpoint": (120.0, math.inf),
        "look": (0.0, 0.05),
        "order": ("longest first", "shortest first"),
        "workers": (16, 256),
        "classes": (1000,),
        "stalls": (0.1,),
    }
    changed = {
        f"{name} {value}": replace(base, **{name: value})
        for name, values in changes.items()
        for value in values
    }
    unwarned = {"preemptions 1, none with a warning": replace(base, preemptions=1.0, warned=0.0)}
    return {"base": base} | changed | unwarned


def print_table(told: dict[str, dict]) -> None:
    """One line a setting."""
    print("| what | hours | makespan over ideal | 95 % | most | work lost, % | taken over | twice | lost |")
    print("|-|-|-|-|-|-|-|-|-|")
    for name, found in told.items():
        over = found["makespan_over_ideal"]
        low, high = over["interval"]
        cells = [
            name,
            f"{found['hours']['mean']:.2f}",
            f"{over['mean']:.3f}",
            f"{low:.3f} to {high:.3f}",
            f"{over['most']:.3f}",
            f"{100 * found['work_lost']['mean']:.3f}",
            f"{found['taken_over']['mean']:.1f}",
            str(found["classes_twice"]["most"]),
            str(found["classes_lost"]["most"]),
        ]
        print(f"| {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for f in fields(Setting):
        if f.type in (int, float):
            shown = "as measured" if f.name == "start_up" else f.default
            parser.add_argument(f"--{f.name}", type=f.type, help=f"default: {shown}")
    parser.add_argument(
        "--scale", type=float, default=1.5, help="times the miniature's seconds (default: 1.5)"
    )
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    args = parser.parse_args()
    measurement = load("many_classes.json")
    if "sweep" not in measurement.get("figures", {}):
        parser.error("nothing is measured yet: python -m experiments.speed.many_classes --parts sweep")
    found = measured(measurement, args.scale)
    given = {f.name: getattr(args, f.name, None) for f in fields(Setting)}
    known = {"start_up": found["start-up"]} | {k: v for k, v in given.items() if v is not None}
    base = Setting(**known)
    settings = variants(base)
    told = {name: simulate(setting, found, range(args.seeds)) for name, setting in settings.items()}
    print_table(told)
    if args.out:
        here = common.environment(torch.device("cpu"))
        assumed = {"scale": args.scale, "seeds": args.seeds, "setting": asdict(base)}
        measured_times = {
            "training, mean": float(found["training"].mean()),
            "training, longest": float(found["training"].max()),
            "evaluation": found["evaluation"],
            "rows": ROWS.name,
        }
        write_json(args.out, here | assumed | {"seconds": measured_times, "figures": told})


if __name__ == "__main__":
    main()
