"""What many classes cost is measured, and simulated, as it is said to be."""

import json
import math
import sys

import pytest

from experiments.speed import many_classes
from experiments.speed.many_classes import Job, LeftOut, begin, classes_of, kept_bytes, measure
from experiments.speed.many_classes_simulation import Setting, Simulation, Task, Walk, interval
from experiments.speed.table import RESULTS

TIMES = {"lease": 30, "beat": 10, "poll": 10}
QUIET = Setting(failures=0, preemptions=0, start_up=5, look=0, workers=2, **TIMES)
ROUGH = Setting(failures=20, preemptions=20, stalls=20, workers=4, start_up=5, back_after=20, **TIMES)


def tasks(*seconds: float, evaluation: float = 1.0) -> list[Task]:
    return [Task(i, training, evaluation) for i, training in enumerate(seconds)]


def disrupted(happens: str, at: float, *seconds: float, evaluation: float = 1.0) -> Simulation:
    """Two workers, of whom the first meets with something, and is not there again."""
    setting = QUIET if happens == "stand_still" else Setting(**vars(QUIET) | {"back_after": math.inf})
    simulation = Simulation(setting, tasks(*seconds, evaluation=evaluation), 0)
    (worker, _) = simulation.workers
    simulation.plan(at, getattr(simulation, happens), worker)
    simulation.run()
    return simulation


def test_without_failures_the_makespan_is_that_computed_by_hand():
    """The first worker ends at 16, the second at 26; the first has the third class until 16 + 31."""
    found = Simulation(QUIET, tasks(10, 20, 30), 0).run()
    assert found["hours"] * 3600 == pytest.approx(47)
    assert found["makespan_over_ideal"] == pytest.approx(47 / (63 / 2))
    assert found["work_lost"] == found["taken_over"] == 0


def test_every_look_at_a_class_takes_time():
    """The second worker looks at two classes, and then at the third one."""
    setting = Setting(**vars(QUIET) | {"look": 1})
    assert Simulation(setting, tasks(10, 10, 10), 0).run()["hours"] * 3600 == pytest.approx(
        5 + 1 + 11 + 2 + 11
    )


@pytest.mark.parametrize(
    ("happens", "at", "seconds", "end", "lost"),
    [
        # Killed after 42 s of work with 30 saved. The other looks at 15, 25, ...; the claim is silent from
        # its look at 56 on, and is taken over at 96.
        ("fail", 47, (100, 10), 96 + 71, 12),
        # All 42 s are saved, and the class is free for the look at 56.
        ("save_and_go", 47, (100, 10), 56 + 59, 0),
        # In its evaluation, which begins again.
        ("fail", 25.5, (20, 40), 86 + 1, 0.5),
        # Takes its class up again after 120 s, but the other one has it since 96.
        ("stand_still", 47, (100, 10), 96 + 71, 12),
    ],
)
def test_a_class_that_was_left_goes_on_from_what_was_saved(happens, at, seconds, end, lost):
    simulation = disrupted(happens, at, *seconds)
    assert [task.completions for task in simulation.tasks] == [1, 1]
    assert simulation.end == pytest.approx(end)
    assert simulation.lost == pytest.approx(lost)


@pytest.mark.parametrize("seed", range(8))
def test_no_class_is_done_twice_or_lost_whatever_happens(seed):
    found = Simulation(ROUGH, tasks(*range(10, 210, 2)), seed).run()
    assert found["classes_twice"] == found["classes_lost"] == 0
    assert found["makespan_over_ideal"] > 1
    assert found["work_lost"] > 0
    assert found["taken_over"] > 0


def test_the_checks_can_fail():
    """Workers that do not ask whether a claim is still theirs do classes twice; without workers some are
    lost."""
    blind = Setting(**vars(ROUGH) | {"notices": False})
    many = tasks(*range(10, 210, 2))
    assert Simulation(blind, many, 0).run()["classes_twice"] > 0
    gone = Setting(**vars(ROUGH) | {"back_after": math.inf})
    assert Simulation(gone, tasks(*range(10, 210, 2)), 0).run()["classes_lost"] > 0


def test_a_claim_with_a_heartbeat_is_never_stale():
    task = Task(0, 10.0, 1.0, owner=(1, 0))
    walk = Walk([task], (2, 0), lease=30)
    assert [walk.next_task(now) for now in (0, 1000)] == [None, None]
    task.last_beat = 1000.0
    assert [walk.next_task(now) for now in (1001, 1031)] == [None, None]
    assert walk.next_task(1032) is task
    assert task.owner == (2, 0)


def test_an_interval_holds_the_mean():
    told = interval([1.0, 2.0, 3.0])
    assert told["interval"][0] < told["mean"] == 2.0 < told["interval"][1]
    assert told["most"] == 3.0


def test_the_committed_simulation_meets_its_target():
    base = json.loads((RESULTS / "many_classes_simulation.json").read_text())["figures"]["base"]
    assert base["makespan_over_ideal"]["interval"][1] <= 1.05
    assert base["classes_twice"]["most"] == base["classes_lost"]["most"] == 0


PROGRAM = """
import sys, time
print("class 1 of x\\ntraining: 2 updates\\ntoken: here\\nevaluation: there\\nsummary: x")
print("class 2 of x\\ntraining: 2 updates\\nevaluation: there\\nsummary: x")
sys.stdout.flush()
time.sleep(0.2)  # until its memory was looked at
sys.exit("run.py: no" if "refused" in sys.argv else 0)
"""


def fake_part(*jobs: str):
    return lambda updates, classes: [Job(name, range(1, 3), (name,)) for name in jobs]


@pytest.fixture
def fakes(monkeypatch):
    """The program is one that prints lines alone."""
    monkeypatch.setattr(Job, "commands", lambda job, out: [[sys.executable, "-c", PROGRAM, *job.options]])
    monkeypatch.setattr(many_classes, "PARTS", {"bytes": fake_part("good", "refused")})


def test_runs_are_kept_and_what_the_program_refuses_is_left_out_with_its_line(fakes, tmp_path, capsys):
    out = tmp_path / "found.json"
    measure(["bytes"], 2, 1, begin(out, 10), out)
    found = json.loads(out.read_text())
    assert found["left_out"] == {"bytes, refused": "run.py: no"}
    assert list(found["runs"]["bytes"]) == list(found["figures"]["bytes"]) == ["good"]
    assert "bytes, refused: left out: run.py: no" in capsys.readouterr().err
    measure(["bytes"], 2, 2, begin(out, 10), out)
    again = json.loads(out.read_text())["runs"]["bytes"]["good"]
    assert len(again) == 2
    assert again[0] == found["runs"]["bytes"]["good"][0]
    with pytest.raises(ValueError, match="holds runs with updates 10, not 20"):
        begin(out, 20)


def test_the_steps_of_a_class_are_told_by_the_programs_lines(fakes):
    run = many_classes.run_job(Job("good", range(1, 3), ()))
    classes = classes_of(run["commands"][0], "seconds")
    assert len(classes) == 2
    assert all(found["resident"] > 0 and found["all"] >= found["training"] for found in classes)
    with pytest.raises(LeftOut, match="run.py: no"):
        many_classes.run_job(Job("bad", range(1, 3), ("refused",)))


def test_ratios_are_of_runs_of_the_same_round():
    def run(begun, *ends):
        """A command whose first class begins then, and whose steps take no time but the last."""
        starts = (begun, *ends[:-1])
        steps = [
            {"step": step, "seconds": when, "cpu": when, "resident": 1}
            for start, end in zip(starts, ends, strict=True)
            for step, when in (("class", start), ("training", start), ("evaluation", start), ("summary", end))
        ]
        return {"seconds": ends[-1], "cpu": ends[-1], "steps": steps}

    runs = {
        "sweep of 2": [{"classes": 2, "commands": [run(5, 15, 25)]}],
        "loop of 2": [{"classes": 2, "commands": [run(5, 20), run(5, 20)]}],
    }
    told = many_classes.of_sweep(runs)["2"]["cpu"]
    assert told["sweep, a class"] == 12.5
    assert told["sweep over loop"] == 25 / 40
    assert told["a class in the sweep over alone"] == 10 / 20
    assert told["split alone"]["start-up"] == 5
    both = many_classes.over_first(runs)["loop of 2"]
    assert both["speed over the first"] == 25 / 40
    assert both["... after start-up"] == 20 / 30


def test_bytes_are_of_records_images_and_the_rest(tmp_path):
    for name, size in (("pipeline_token/a/token", 3), ("img/a/eval/1.png", 5), ("cache/x", 7)):
        path = tmp_path / name
        path.parent.mkdir(parents=True)
        path.write_bytes(bytes(size))
    assert kept_bytes(tmp_path) == {"records": 3, "images": 5, "rest": 7}


def test_every_part_names_options_and_classes_of_the_program():
    for part in many_classes.PARTS.values():
        for job in part(3, 2):
            lines = job.commands("out")
            assert len(lines) == (len(job.classes) if job.is_loop else 1)
            assert all(line[-2:] == ["--output_path", "out"] for line in lines)


@pytest.mark.slow
def test_parts_run_on_two_classes_of_the_miniature(tmp_path, monkeypatch):
    monkeypatch.setattr(many_classes, "OF_MEMORY", (1, 2))
    monkeypatch.setattr(many_classes, "SIZES", (1, 2))
    out = tmp_path / "found.json"
    measure(["sweep", "memory"], 2, 1, begin(out, 1), out)
    figures = json.loads(out.read_text())["figures"]
    assert set(figures["sweep"]) == {"1", "2"}
    assert 0 < figures["sweep"]["2"]["cpu"]["a class in the sweep over alone"] < 1.5
    assert set(figures["memory"]["resident"]) == {"1", "2"}
