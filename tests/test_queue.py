"""Many classes: each is done once, by whichever process claims it; what fails is written down."""

import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_reuse import write_learned
from test_session import SHORT
from tiny_folders import save_sd1, save_timm

from apps import queue, submit, work
from apps.plan import Sources, numbers_in_file, own_card
from apps.queue import ClassQueue, ranges
from apps.session import Session
from apps.submit import RunJob, settings_of
from config import RunConfig
from discriminative.errors import UsageError, WorkError
from discriminative.records import files, locks
from discriminative.records.layout import RunFolder
from discriminative.records.locks import Claim, ClaimLost
from run import main

ROOT = Path(__file__).parents[1]
LABELS = [f"thing {i}" for i in range(1, 11)]


# --- the classes of a file


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("3\n1\n", [3, 1]),
        ("# all\n\n2-4 # some\n9, 7-8\n", [2, 3, 4, 9, 7, 8]),
        ("5 6  7 - 8\n5\n", [5, 6, 7, 8]),
        ("thing 2\nthing 10; thing 3\n", [2, 10, 3]),
        ("\ufeff1\n", [1]),
    ],
)
def test_a_file_names_classes_by_numbers_ranges_and_names(text, numbers, tmp_path):
    path = tmp_path / "classes.txt"
    path.write_text(text, encoding="utf-8")
    assert numbers_in_file(str(path), "mine", LABELS) == numbers


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("1\n\n11\n", ", line 3: '11' was given; allowed is 1 to 10, the smaller first"),
        ("4-2", ", line 1: '4-2' was given; allowed is 1 to 10, the smaller first"),
        ("1\nthingy 2", ", line 2: 'thingy 2' was given, which is no label of the classifier mine"),
        ("# nothing\n", "' was given, which names no class"),
        (None, "' was given, which cannot be read"),
    ],
)
def test_a_wrong_line_of_a_file_is_named(text, told, tmp_path):
    path = tmp_path / "classes.txt"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UsageError, match="^--class_index: ") as error:
        numbers_in_file(str(path), "mine", LABELS)
    assert f"{path}{told}" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("numbers", "short"), [([], ""), ([4], "4"), ([1, 2, 3, 5, 7, 8], "1-3, 5, 7-8")], ids=str
)
def test_numbers_are_told_in_short(numbers, short):
    assert ranges(numbers) == short


# --- claims


@pytest.fixture
def quick_claims(monkeypatch):
    """Claims that are stale soon."""
    monkeypatch.setattr(locks, "LEASE", 0.3)
    monkeypatch.setattr(locks, "HEARTBEAT", 0.05)
    monkeypatch.setattr(locks, "LOOK_EVERY", 0.02)
    monkeypatch.setattr(queue, "POLL", 0.02)


def marker(host: str, pid: int, lease: float) -> str:
    """What a claim of another process has in its file."""
    return f"filelock/2\npid={pid}\nhost={host}\nmode=lease\ntoken=abc\nduration={lease!r}\n"


def dead_pid() -> int:
    """The number of a process that is gone."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def write_claim(folder: Path, text: str) -> Path:
    path = folder.with_name(f".{folder.name}.claim")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_a_claim_whose_process_died_here_is_taken_over_at_once(tmp_path):
    folder = tmp_path / "default"
    kill = f"""
import os, signal
from pathlib import Path
from discriminative.records.locks import Claim
claim = Claim(Path({str(folder)!r}))
assert claim.take()
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", kill], cwd=ROOT).returncode == -signal.SIGKILL
    claim = Claim(folder)
    assert claim.path.exists()
    assert claim.take()
    claim.check()
    claim.release()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("left", ["by another machine", "empty, by a power failure"])
@pytest.mark.parametrize("exchanges", [True, False], ids=["local disk", "network disk"])
def test_a_claim_without_a_sign_of_life_is_taken_over_once(
    left, exchanges, tmp_path, monkeypatch, quick_claims
):
    """A network's file system does not exchange two names, which filelock's own taking over needs."""
    if not exchanges:
        monkeypatch.setattr("filelock._soft.exchange_names", lambda source, target: False)
    folder = tmp_path / "default"
    text = marker("node7", dead_pid(), locks.LEASE)
    write_claim(folder, text if left.startswith("by") else "")
    claims = [Claim(folder) for _ in range(3)]
    assert not any(claim.take() for claim in claims)
    time.sleep(1.2 * locks.LEASE)
    assert [claim.take() for claim in claims].count(True) == 1
    for claim in claims:
        claim.release()
    assert not list(tmp_path.iterdir())


def test_a_claim_with_signs_of_life_stays_another_machines(tmp_path, quick_claims, capsys):
    folder = tmp_path / "default"
    path = write_claim(folder, marker("node7", 4711, locks.LEASE))
    ended = threading.Event()

    def live() -> None:
        while not ended.wait(locks.HEARTBEAT):
            os.utime(path)

    threading.Thread(target=live, daemon=True).start()
    told = r"another run is at work there \(node7, process 4711\); wait until it is done"
    try:
        with pytest.raises(UsageError, match=told), locks.alone_in(folder):
            pytest.fail("two at once")
    finally:
        ended.set()
    assert (
        "claimed by node7, process 4711; waiting at most 0.3 s for a sign of life" in capsys.readouterr().err
    )
    with locks.alone_in(folder):  # and then without
        pass


def test_who_has_lost_a_claim_notices_and_leaves_the_successors_files(tmp_path, quick_claims):
    """A laptop was suspended; meanwhile another run took the class over."""
    folder = RunFolder(tmp_path, "0001_cat", "default")
    claim = Claim(folder.records)
    assert claim.take()
    folder.claimed_by(claim.check)
    folder.unfinished_records.mkdir(parents=True)
    folder.token.write_text("the successor's")
    claim.path.unlink()
    path = write_claim(folder.records, marker("node7", 4711, locks.LEASE))
    for replaces in (folder.take_training, folder.take_evaluation, folder.unfinished.check_claim):
        with pytest.raises(ClaimLost, match="this run's claim was lost, now node7, process 4711"):
            replaces()
    claim.release()
    assert folder.token.read_text() == "the successor's"
    assert path.exists()


def test_two_machines_write_the_same_file_at_once(tmp_path, monkeypatch):
    """Their processes may have the same number; one used to move the other's temporary file away."""
    monkeypatch.setattr(os, "getpid", lambda: 7)
    path = tmp_path / "report.html"

    def write_while_another_does(temporary: Path) -> None:
        temporary.write_text("first")
        files.write_text(path, "second")

    files._replace(path, write_while_another_does)
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]


# --- the queue, with trainings that only write what a training leaves


@pytest.fixture
def config(tmp_path):
    """Ten classes of the miniature."""
    return RunConfig(
        class_index="1-10",
        train=True,
        model="miniature",
        classifier="miniature",
        judge="none",
        device="cpu",
        output_path=str(tmp_path / "r"),
    )


def learn(plan) -> None:
    """Leave a token."""
    plan.folder.check_claim()
    write_learned(plan.config, plan.folder)
    save_file({"newclas": torch.ones(1, 128)}, plan.folder.token)


@pytest.fixture
def learned(monkeypatch, quick_claims):
    """The classes that were learned, in order; no model is loaded. ``before`` is called with each plan."""

    class Learned(list):
        before = staticmethod(lambda plan: None)

    numbers = Learned()

    def take_steps(plan, session, resume):
        numbers.append(plan.config.class_index)
        numbers.before(plan)
        learn(plan)

    monkeypatch.setattr(work, "take_steps", take_steps)
    monkeypatch.setattr(work, "loaded", Session.of)
    return numbers


def run(config) -> int:
    return work.work(config)


def at_once(*runs) -> None:
    """Run functions in threads until all have ended."""
    threads = [threading.Thread(target=function, daemon=True) for function in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
        assert not thread.is_alive()


def test_two_runs_over_the_same_classes_learn_each_once(config, learned, capsys):
    learned.before = lambda plan: time.sleep(0.01)
    codes = []
    at_once(*[lambda: codes.append(run(config))] * 2)
    assert codes == [0, 0]
    assert sorted(learned) == list(range(1, 11))
    said = capsys.readouterr().out
    assert said.count("done        10   1-10") == 2


def test_a_class_that_fails_is_written_down_told_and_tried_again_by_the_next_run(config, learned, capsys):
    def break_off(plan):
        if plan.config.class_index == 3 and learned.count(3) == 1:
            raise WorkError("loss nan")

    learned.before = break_off
    folder = RunFolder(config.output_path, "0003_mouse_field_mouse", "default")
    assert run(config) == 1
    said = capsys.readouterr()
    assert "run.py: failed: class 3 (mouse, field mouse): loss nan\n" in said.err
    assert "2 of 10 classes, " in said.out
    assert "10 of 10 classes, 1 failed, " in said.out
    assert said.out.endswith(
        "done         9   1-2, 4-10\nskipped      0\nfailed       1   3\n"
        "  class 3 (mouse, field mouse): loss nan\n"
    )
    written = json.loads(folder.failed.read_text())
    assert (written["reason"], written["kind"]) == ("loss nan", "WorkError")
    assert (written["host"], written["pid"]) == (socket.gethostname(), os.getpid())
    assert {"date", "command", "commit", "device", "versions"} <= set(written)
    assert run(config) == 0
    assert Counter(learned)[3] == 2
    assert "skipped      9   1-2, 4-10   (finished before)" in capsys.readouterr().out
    assert not folder.failed.exists()


def test_a_class_whose_folder_cannot_be_written_fails_alone(config, learned, capsys):
    folder = RunFolder(config.output_path, "0002_bat_cricket_bat", "default")
    folder.records.parents[1].mkdir(parents=True)
    folder.records.parent.write_text("in the way")
    assert run(config) == 1
    assert learned == [1, *range(3, 11)]
    assert f"  class 2 (bat, cricket bat): {folder.records}: cannot be written (" in capsys.readouterr().out


def test_a_class_that_failed_elsewhere_since_this_process_began_is_not_tried_again(config, learned, capsys):
    def fail(plan):
        time.sleep(0.01)
        if plan.config.class_index == 3:
            raise WorkError("loss nan")

    learned.before = fail
    codes = []
    at_once(*[lambda: codes.append(run(config))] * 2)
    assert codes == [1, 1]
    assert sorted(learned) == list(range(1, 11))
    assert capsys.readouterr().out.count("  class 3 (mouse, field mouse): loss nan") == 2


def test_what_a_machine_that_crashed_had_begun_is_done_in_the_end(config, learned, capsys):
    folder = RunFolder(config.output_path, "0002_bat_cricket_bat", "default")
    write_claim(folder.records, marker("node7", 4711, locks.LEASE))
    assert run(config) == 0
    assert learned == [1, *range(3, 11), 2]
    said = capsys.readouterr().out
    assert said.count("waiting for what is at work elsewhere: class 2 (node7, process 4711)") == 1
    assert "done        10   1-10\n" in said


def test_the_progress_counts_what_others_did(config, quick_claims):
    with ClassQueue(config, Sources(config)) as mine, ClassQueue(config, Sources(config)) as others:
        (first,) = mine.take()
        for _ in range(3):
            (taken,) = others.take()
            with others.at_work_on(taken):
                learn(taken.plan)
        with mine.at_work_on(first):
            learn(first.plan)
        assert mine.progress().startswith("4 of 10 classes, 00:00 so far, ")
        assert mine.table().startswith("done         4   1-4   (3 elsewhere)")


def test_several_classes_are_claimed_at_once_where_they_are_free(config, quick_claims):
    with ClassQueue(config, Sources(config)) as mine, ClassQueue(config, Sources(config)) as others:
        assert [taken.number for taken in mine.take(4)] == [1, 2, 3, 4]
        assert [taken.number for taken in others.take(4)] == [5, 6, 7, 8]
        assert [taken.number for taken in mine.take(4)] == [9, 10]
    with ClassQueue(config, Sources(config)) as third:  # leaving the block lets all go
        assert len(third.take(20)) == 10


def test_a_class_that_another_run_took_over_is_not_counted_as_failed(config, learned, capsys):
    def lose(plan):
        if plan.config.class_index == 2 and learned.count(2) == 1:
            path = plan.folder.records.with_name(".default.claim")
            path.unlink()
            path.write_text(marker("node7", 4711, locks.LEASE))

    learned.before = lose
    assert run(config) == 0
    assert learned == [*range(1, 11), 2]
    assert "note: " in (said := capsys.readouterr()).err
    assert "this run's claim was lost, now node7, process 4711" in said.err


def test_the_first_class_of_ten_thousand_begins_within_a_second(config, monkeypatch):
    labels = [f"thing {i}" for i in range(10_000)]
    monkeypatch.setattr("apps.plan.read_labels", lambda *names: labels)
    config = RunConfig(**vars(config) | {"class_index": "all"})
    sources = Sources(config)
    _ = sources.configs  # the model's small files
    began = time.process_time()
    with ClassQueue(config, sources) as classes:
        assert classes.take()[0].number == 1
    assert time.process_time() - began < 1


# --- one class


def test_one_class_that_is_finished_is_left_as_it_is_and_told_how_to_learn_it_anew(config, learned, capsys):
    one = RunConfig(**vars(config) | {"class_index": 2})
    folder = RunFolder(config.output_path, "0002_bat_cricket_bat", "default")
    assert run(one) == 0
    before = folder.config.stat().st_mtime_ns
    assert run(one) == 0
    assert learned == [2]
    assert folder.config.stat().st_mtime_ns == before
    told = (
        f"learned already: {folder.token}; to learn it anew give another --exp_id, or remove {folder.records}"
    )
    assert told in capsys.readouterr().out
    assert run(RunConfig(**vars(one) | {"seed": 3})) == 0  # another configuration
    assert learned == [2, 2]


def test_one_class_that_fails_is_written_down_too(config, learned):
    def fail(plan):
        raise WorkError("loss nan")

    learned.before = fail
    with pytest.raises(WorkError):
        run(RunConfig(**vars(config) | {"class_index": 2}))
    folder = RunFolder(config.output_path, "0002_bat_cricket_bat", "default")
    assert json.loads(folder.failed.read_text())["reason"] == "loss nan"


# --- processes that accelerate launched


@pytest.fixture
def second_of_two(monkeypatch):
    monkeypatch.setattr("discriminative.command_line.HEARD", 0.0)
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)


def argv_of(config, *more) -> list[str]:
    names = ("class_index", "train", "model", "device", "output_path")
    return [word for name in names for word in (f"--{name}", str(getattr(config, name)))] + [*more]


def test_lines_of_several_processes_begin_with_their_rank(config, learned, second_of_two, capsys):
    def fail(plan):
        if plan.config.class_index == 3:
            raise WorkError("loss nan")

    learned.before = fail
    # The first one has the table and the exit code.
    assert main(argv_of(config)) == 0
    said = capsys.readouterr()
    assert said.out == "[1] 9 classes done here\n"
    assert said.err == "[1] run.py: failed: class 3 (mouse, field mouse): loss nan\n"


def test_one_class_is_the_first_processes(config, learned, second_of_two, capsys):
    assert main(argv_of(config, "--class_index", "2")) == 0
    assert learned == []
    assert capsys.readouterr().out.startswith("[1] one class: the first process learns it")


def test_wrong_usage_is_told_by_the_first_process_alone(config, second_of_two, capsys, monkeypatch):
    assert main(argv_of(config, "--class_index", "1,99")) == 2
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("RANK", "0")
    assert main(argv_of(config, "--class_index", "1,99")) == 2
    assert "'99' of '1,99' was given" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("device", "own"), [("auto", "cuda:1"), ("cuda", "cuda:1"), ("cuda:0", "cuda:0"), ("cpu", "cpu")]
)
def test_each_process_has_its_own_card(device, own, second_of_two, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert own_card(device) == own
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert own_card(device) == device


# --- jobs of submitit: its local and debug executors stand for a cluster


@pytest.fixture(autouse=True)
def environment_as_it_was(monkeypatch):
    """A submission tells its jobs where the program is."""
    monkeypatch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))


@pytest.mark.parametrize(
    ("given", "settings"),
    [
        (None, {}),
        ("slurm_partition=gpu", {"slurm_partition": "gpu"}),
        ("timeout_min=1440,mem_gb=7.5", {"timeout_min": 1440, "mem_gb": 7.5}),
        ("slurm_exclude=n1,n2,nodes=1", {"slurm_exclude": "n1,n2", "nodes": 1}),
        ("slurm_use_srun=False", {"slurm_use_srun": False}),
        ("slurm_setup=module load cuda", {"slurm_setup": ["module load cuda"]}),
    ],
)
def test_settings_are_names_with_values(given, settings):
    assert settings_of(RunConfig(submit_settings=given)) == settings


def test_a_dry_run_prints_the_script_of_the_array_and_submits_nothing(config, capsys, tmp_path):
    settings = "slurm_partition=gpu,gpus_per_node=1,timeout_min=600,slurm_setup=module load cuda"
    more = ["--submit", "slurm", "--submit_jobs", "8", "--submit_settings", settings, "--dry_run"]
    assert main(argv_of(config, *more)) == 0
    script = capsys.readouterr().out
    assert script.startswith("#!/bin/bash\n")
    for flag in ("array=0-7%8", "partition=gpu", "gpus-per-node=1", "time=600", "requeue", "signal=USR2@90"):
        assert f"#SBATCH --{flag}\n" in script
    assert f"#SBATCH --output={tmp_path}/r/jobs/%A_%a_0_log.out\n" in script
    assert "# setup\nmodule load cuda\n" in script
    assert f" -u -m submitit.core._submit {tmp_path}/r/jobs" in script
    assert not (tmp_path / "r").exists()


FOO = ["--submit_settings", "foo=1"]


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--submit", "slurm"], "--submit: 'slurm' was given, but there is no sbatch on this machine"),
        (["--submit_jobs", "2"], "--submit_jobs: 2 was given; allowed is a value only with --submit"),
        (
            ["--submit", "slurm", "--dry_run", "--submit_settings", "foo=1"],
            "--submit_settings: 'foo=1' was given; ",
        ),
        (["--submit", "debug", "--submit_settings", "foo=1"], "--submit_settings: 'foo=1' was given; "),
        (["--submit", "debug", "--submit_settings", "nodes=a"], "--submit_settings: 'nodes=a' was given; "),
        (
            ["--submit", "debug", "--submit_settings", "foo"],
            "--submit_settings: 'foo' was given; allowed is name=",
        ),
        (["--submit", "debug", "--class_index", "1,99"], "'99' of '1,99' was given"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_what_no_job_could_do_is_one_line_and_nothing_is_submitted(more, told, config, capsys, monkeypatch):
    monkeypatch.setattr(submit.shutil, "which", lambda name: None)
    monkeypatch.setattr(RunJob, "__call__", lambda self: pytest.fail("began"))
    assert main(argv_of(config, *more)) == 2
    said = capsys.readouterr().err
    assert told in said
    assert said.count("\n") == 1


@pytest.fixture
def a_cluster(tmp_path, monkeypatch):
    """Slurm's programs, as far as a submission calls them; gives the text of what sbatch does."""

    def make(sbatch: str) -> None:
        folder = tmp_path / "bin"
        folder.mkdir()
        for name, does in {"sbatch": sbatch, "srun": ":"}.items():
            (folder / name).write_text(f"#!/bin/sh\n{does}\n")
            (folder / name).chmod(0o755)
        monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)

    return make


def test_slurm_is_given_an_array(config, a_cluster, tmp_path, capsys):
    a_cluster("echo Submitted batch job 77")
    assert main(argv_of(config, "--submit", "slurm", "--submit_jobs", "2")) == 0
    jobs = tmp_path / "r" / "jobs"
    told = f"submitted: 2 jobs, 77_0 to 77_1; logs: {jobs}\nsqueue --me shows them, scancel 77 ends them\n"
    assert capsys.readouterr().out == told
    assert {path.name for path in jobs.glob("77*")} >= {"77_submission.sh", "77_0_submitted.pkl"}
    job = pickle.loads((jobs / "77_1_submitted.pkl").read_bytes())
    assert (job.function.config.class_index, job.function.config.submit) == ("1-10", None)
    assert job._timeout_countdown > 100  # a job of many days is requeued each day


def test_what_slurm_refuses_is_told_in_one_line(config, a_cluster, capsys):
    a_cluster("echo 'sbatch: error: invalid partition specified: gpu' >&2; exit 1")
    assert main(argv_of(config, "--submit", "slurm", "--submit_settings", "slurm_partition=gpu")) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == "run.py: failed: --submit: sbatch: error: invalid partition specified: gpu"


def test_jobs_of_the_debug_executor_share_the_classes(config, learned, capsys):
    assert main(argv_of(config, "--submit", "debug", "--submit_jobs", "2")) == 0
    assert learned == list(range(1, 11))
    said = capsys.readouterr().out
    assert "submitted: 2 jobs, DEBUG_" in said
    assert "done        10   1-10\n" in said  # of the first job
    assert "skipped     10   1-10   (finished before)\n" in said  # of the second


def test_the_exit_code_of_a_job_is_that_of_the_submission(config, learned):
    def fail(plan):
        raise OSError("no space")

    learned.before = fail
    assert main(argv_of(config, "--submit", "debug")) == 1


def test_a_job_that_is_to_be_requeued_ends_as_by_a_signal_and_is_the_same_again(config, monkeypatch, capsys):
    """Within a class submitit's exception would have counted as that class's failure."""
    seen = []
    requeued = []

    def work(options):
        try:
            os.kill(os.getpid(), signal.SIGUSR2)
        except BaseException as error:
            seen.append(type(error).__name__)
            raise

    job = RunJob(config, work)

    def of_submitit(number, frame):
        requeued.append(job.checkpoint())
        raise SystemExit(144)

    monkeypatch.setenv("SUBMITIT_EXECUTOR", "local")
    before = signal.signal(signal.SIGUSR2, of_submitit)
    try:
        with pytest.raises(SystemExit) as error:
            job()
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert error.value.code == 144
    assert seen == ["Ended"]
    assert requeued[0].function.config == job.config
    assert capsys.readouterr().err.startswith("run.py: interrupted")


def test_a_job_travels_without_its_own_submission(config):
    asked = RunConfig(**vars(config) | {"submit": "slurm", "submit_jobs": 4, "submit_settings": "nodes=1"})
    job = pickle.loads(pickle.dumps(RunJob(asked, work.work)))
    assert job.config == config
    assert job.work is work.work


# --- real processes


# In words that the tiny tokenizer knows.
SIX = ["tiger cat", "bat", "blue cat", "tiger", "cat", "blue bat"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A tiny model and a tiny classifier of six classes, as flags of a short run."""
    root = tmp_path_factory.mktemp("saved")
    names = {"model": save_sd1(root / "sd1"), "classifier": save_timm(root / "timm", SIX)}
    options = SHORT | names | {"max_epochs": 1}
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def tokens(root: Path) -> dict[str, torch.Tensor]:
    """The tokens below a folder of results, by their classes."""
    paths = (root / "pipeline_token").glob("*/default/learned_embeds.safetensors")
    return {path.parts[-3]: load_file(path)["newclas"] for path in paths}


def assert_same_tokens(one: Path, other: Path, number: int) -> None:
    first = tokens(one)
    second = tokens(other)
    assert len(first) == number
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def start(*argv: str, **settings) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(argv, cwd=ROOT, env=environment, **pipes, **settings)


@pytest.mark.slow
def test_two_shell_loops_over_the_same_classes_learn_each_once(saved, tmp_path):
    """A loop goes on where a class is refused, as another one is at work on it."""
    flags = " ".join([*saved, "--train", "--output_path", str(tmp_path)])
    loop = f"for i in 1 2 3 4; do {sys.executable} run.py --class_index $i {flags}; done; true"
    loops = [start("bash", "-c", loop) for _ in range(2)]
    said = "".join(process.communicate()[0] for process in loops)
    assert len(tokens(tmp_path)) == 4
    assert said.count("training: 1 updates") == 4


@pytest.mark.slow
def test_two_launched_processes_learn_each_class_once_and_as_one_process_does(saved, tmp_path):
    flags = [*saved, "--class_index", "1-6", "--train", "--evaluate", "--output_path"]
    one = start(sys.executable, "run.py", *flags, str(tmp_path / "one"))
    assert one.wait() == 0, one.communicate()[1]
    # --multi_gpu has accelerate start several processes; without a card they are on the CPU.
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    two = start(*launch, "run.py", *flags, str(tmp_path / "two"))
    said, errors = two.communicate()
    assert two.returncode == 0, errors
    assert_same_tokens(tmp_path / "one", tmp_path / "two", 6)
    assert said.count("training: 1 updates") == 6
    assert "[0] done         6   1-6   (" in said
    assert " classes done here" in said
    assert all(line.startswith(("[0] ", "[1] ")) for line in said.splitlines())


@pytest.mark.slow
def test_a_launched_run_ends_with_1_where_a_class_failed(saved, tmp_path):
    (tmp_path / "pipeline_token").mkdir()
    (tmp_path / "pipeline_token" / "0002_bat").write_text("in the way")
    flags = [*saved, "--class_index", "1-3", "--train", "--output_path", str(tmp_path)]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    run = start(*launch, "run.py", *flags)
    said, errors = run.communicate()
    assert run.returncode == 1, errors
    assert "[0] failed       1   2\n" in said
    assert "interrupted" not in errors
    assert sorted(tokens(tmp_path)) == ["0001_tiger_cat", "0003_blue_cat"]


@pytest.mark.slow
def test_jobs_of_the_local_executor_share_the_classes(saved, tmp_path):
    flags = [*saved, "--class_index", "1-3", "--train", "--output_path", str(tmp_path)]
    run = start(sys.executable, "run.py", *flags, "--submit", "local", "--submit_jobs", "2")
    _, errors = run.communicate()
    assert run.returncode == 0, errors
    assert len(tokens(tmp_path)) == 3
    logs = [path.read_text() for path in (tmp_path / "jobs").glob("*.out")]
    assert sum(log.count("training: 1 updates") for log in logs) == 3
    assert all("3 of 3 classes" in log or "done " in log for log in logs)
