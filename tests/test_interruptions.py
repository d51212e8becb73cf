"""What the world does to a run: full disks, Ctrl-C, SIGTERM, closed pipes. One line says what is kept, and
whatever was finished before is as it was."""

import os
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from conftest import tiny_models
from safetensors import SafetensorError
from short_runs import small_validations
from test_session import SHORT

import trainer
from apps.session import Session
from discriminative.command_line import ended_by_signals
from discriminative.errors import WorkError
from discriminative.records import files
from discriminative.records.files import write_tensors
from discriminative.records.layout import RunFolder
from discriminative.tokens.class_token import ClassToken
from discriminative.tokens.files import read_token, write_pipeline
from dpt import work as dpt_work
from dpt.__main__ import main as dpt_main
from dpt.files import add_lora, write_lora
from run import main

ROOT = Path(__file__).parent.parent
FULL = "No space left on device"
SIGNALS = {"SIGINT": 130, "SIGTERM": 143, "SIGHUP": 129}


@pytest.fixture(autouse=True, scope="module")
def small():
    with small_validations():
        yield


@pytest.fixture
def argv(names, tmp_path):
    """A short run of class 1 in ``tmp_path``, without saying what is to be done; every update is validated
    and written down as the best."""
    options = SHORT | names | {"class_index": 1, "output_path": tmp_path / "r"}
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


DEFAULTS = {"SIGINT": "default_int_handler", "SIGHUP": "SIG_DFL", "SIGTERM": "SIG_DFL"}


@pytest.fixture(autouse=True)
def signals_at_their_defaults():
    """A suite in the background, or under nohup, ignores some."""
    before = {name: signal.signal(getattr(signal, name), getattr(signal, h)) for name, h in DEFAULTS.items()}
    yield
    for name, handler in before.items():
        signal.signal(getattr(signal, name), handler)


@pytest.fixture
def folder(tmp_path):
    return RunFolder(tmp_path / "r", "0001_tiger_cat", "default")


def contents(root: Path, but: Path) -> dict[Path, bytes]:
    """Every file below a folder, but those in another one, kept latents, and the reason of a failure."""
    apart = (but, root / "cache")  # what other evaluations may use again is no result
    paths = [path for path in root.rglob("*") if path.is_file() and not any(map(path.is_relative_to, apart))]
    paths = [path for path in paths if path.name != "failed.json"]
    return {path: path.read_bytes() for path in paths}


def before_the_second(monkeypatch, target: str, name: str, act) -> None:
    """Do something before a function is called for the second time."""
    module = sys.modules[target]
    whole = getattr(module, name)
    calls = []

    def counted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            act()
        return whole(*args, **kwargs)

    monkeypatch.setattr(module, name, counted)


@pytest.fixture
def better(monkeypatch):
    """Every validation is better than the last one, so that the token of every update is written down."""
    scores = iter(range(1, 100))
    offer = trainer.Curriculum.offer

    def always(self, score, vector, epoch, updates):
        better = trainer.Score(0.0, (float(next(scores)),) * len(score.log_probabilities))
        return offer(self, better, vector, epoch, updates)

    monkeypatch.setattr(trainer.Curriculum, "offer", always)


def last_line(capsys) -> str:
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said.strip().splitlines()[-1]


# --- signals


@pytest.mark.parametrize("name", SIGNALS)
def test_an_interrupted_training_says_what_is_kept_and_how_to_use_it(
    name, argv, folder, better, monkeypatch, capsys
):
    number = getattr(signal, name)
    before_the_second(monkeypatch, "trainer", "update", lambda: os.kill(os.getpid(), number))
    assert main([*argv, "--train", "--evaluate"]) == SIGNALS[name]
    partial = folder.unfinished.partial_token
    assert last_line(capsys) == (
        "run.py: interrupted; the same command goes on from there; the best token so far, after 1 updates, "
        "is kept: "
        f"use it with --token_path {partial}, without --train"
    )
    assert not folder.token.exists()
    # As it is told.
    assert main([*argv, "--evaluate", "--token_path", str(partial)]) == 0
    assert folder.result.exists()


def test_an_interrupted_retraining_leaves_the_last_one_as_it_was(
    argv, folder, better, tmp_path, monkeypatch, capsys
):
    """The old token used to stand beside the new run's log and pictures."""
    assert main([*argv, "--train", "--evaluate"]) == 0
    before = contents(tmp_path / "r", folder.unfinished_records)
    before_the_second(monkeypatch, "trainer", "record", lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert main([*argv, "--train", "--seed", "3"]) == 143
    assert "and another --exp_id, without --train" in last_line(capsys)
    assert contents(tmp_path / "r", folder.unfinished_records) == before
    monkeypatch.undo()
    with small_validations():
        assert main([*argv, "--train", "--seed", "3"]) == 0
    assert not folder.unfinished_records.exists()
    assert not folder.result.exists()
    after = contents(tmp_path / "r", folder.unfinished_records)
    assert after[folder.token] != before[folder.token]


def test_a_training_that_is_interrupted_at_its_end_replaces_nothing(argv, folder, tmp_path, monkeypatch):
    assert main([*argv, "--train"]) == 0
    before = contents(tmp_path / "r", folder.unfinished_records)

    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer, "show_evolution", stop)
    assert main([*argv, "--train", "--seed", "3"]) == 130
    assert contents(tmp_path / "r", folder.unfinished_records) == before


def test_an_interrupted_evaluation_keeps_the_token_and_the_last_evaluation(
    argv, folder, tmp_path, monkeypatch, capsys
):
    assert main([*argv, "--train", "--evaluate"]) == 0
    before = contents(tmp_path / "r", folder.unfinished_eval_images)
    stop = lambda: os.kill(os.getpid(), signal.SIGTERM)  # noqa: E731
    before_the_second(monkeypatch, "evaluate", "keep", stop)
    assert main([*argv, "--evaluate", "--test_size", "3"]) == 143
    assert last_line(capsys) == "run.py: interrupted; what was finished is kept"
    assert contents(tmp_path / "r", folder.unfinished_eval_images) == before


def test_an_evaluation_that_is_interrupted_after_its_training_says_that_the_token_is_there(
    argv, folder, monkeypatch, capsys
):
    before_the_second(monkeypatch, "evaluate", "keep", lambda: os.kill(os.getpid(), signal.SIGINT))
    assert main([*argv, "--train", "--evaluate"]) == 130
    told = f"; the token is kept, {folder.token}: go on without --train"
    assert last_line(capsys) == f"run.py: interrupted{told}"


def test_an_interrupted_sweep_does_not_go_on_with_the_next_class(argv, tmp_path, monkeypatch):
    before_the_second(monkeypatch, "trainer", "update", lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert main([*argv, "--train", "--class_index", "1,2"]) == 143
    assert not (tmp_path / "r" / "pipeline_token" / "0002_bat").exists()


def test_a_session_that_is_interrupted_keeps_the_token_that_was_there(names, tmp_path):
    session = Session(**names | SHORT, output_path=str(tmp_path))
    first = session.learn(1)

    def stop(row, images):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        session.learn(1, seed=3, on_update=stop)
    assert torch.equal(read_token(first.path)[1], first.token.vector)
    assert session.learn(1, seed=3).path == first.path  # nothing is locked any more


def test_dpt_ends_in_one_line_as_well(monkeypatch, tmp_path, capsys):
    end = lambda plan: os.kill(os.getpid(), signal.SIGTERM)  # noqa: E731
    monkeypatch.setitem(dpt_work.COMMANDS, "probe", end)
    assert dpt_main(["probe", "--model", "miniature", "--output_path", str(tmp_path)]) == 143
    assert last_line(capsys).startswith("dpt: interrupted; what was finished is kept")


@pytest.mark.parametrize("name", SIGNALS)
def test_a_run_that_is_interrupted_while_it_imports_says_so_in_one_line(name):
    """An exception in the midst of torch's import was "terminate called after throwing an instance"."""
    program = f"""
import os, signal
from discriminative.command_line import ended_at_once
signal.signal(signal.{name}, signal.{DEFAULTS[name]})
class Broken:
    def __del__(self):
        os.kill(os.getpid(), signal.{name})  # no exception gets out of here
with ended_at_once("run.py"):
    Broken()
print("went on")
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (SIGNALS[name], "")
    assert done.stderr == "run.py: interrupted; what was finished is kept\n"


def test_handlers_are_put_back_and_an_ignored_signal_stays_ignored():
    """nohup ignores SIGHUP."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with ended_by_signals():
            os.kill(os.getpid(), signal.SIGHUP)
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


def test_another_thread_than_the_main_one_may_run_it():
    codes = []
    thread = threading.Thread(target=lambda: codes.append(main(["--list_classes", "--model", "miniature"])))
    thread.start()
    thread.join()
    assert codes == [0]


# --- full disks


def test_a_disk_that_is_full_leaves_the_old_file_and_names_it(tmp_path):
    """What the library tells of its system's refusal is no OSError."""
    path = tmp_path / "a.safetensors"
    write_tensors(path, {"a": torch.zeros(4)}, {})
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        with pytest.raises(WorkError, match=r"a\.safetensors: cannot be written \(.*File too large"):
            write_tensors(path, {"a": torch.zeros(1 << 20)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def no_space(*args, **kwargs):
    raise SafetensorError(f"Error while serializing: I/O error: {FULL} (os error 28)")


@pytest.mark.parametrize("what", ["pipeline", "lora"])
def test_a_disk_that_is_full_while_a_library_writes_is_told_alike(what, tmp_path, monkeypatch):
    models = tiny_models()
    monkeypatch.setattr("diffusers.StableDiffusionPipeline.save_pretrained", no_space)
    monkeypatch.setattr("diffusers.StableDiffusionPipeline.save_lora_weights", no_space)
    with pytest.raises(WorkError, match=rf"{what}.*: cannot be written \(.*{FULL}"):
        if what == "pipeline":
            write_pipeline(tmp_path / what, ClassToken(models, "newclas", "a"))
        else:
            add_lora(models)
            write_lora(tmp_path / what, models)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("writer", ["side_by_side", "write_json"])
def test_a_disk_that_is_full_at_an_evaluations_end_keeps_the_last_one(
    writer, argv, folder, tmp_path, monkeypatch, capsys
):
    assert main([*argv, "--train", "--evaluate"]) == 0
    before = contents(tmp_path / "r", folder.unfinished_eval_images)

    def no_space(*args):
        raise WorkError(FULL)

    monkeypatch.setattr(f"evaluate.{writer}", no_space)
    assert main([*argv, "--evaluate", "--test_size", "3"]) == 1
    assert last_line(capsys) == f"run.py: failed: {FULL}"
    assert contents(tmp_path / "r", folder.unfinished_eval_images) == before


def test_a_disk_that_gets_full_in_training_is_one_line_that_names_what_is_kept(
    argv, folder, better, tmp_path, monkeypatch, capsys
):
    assert main([*argv, "--train"]) == 0
    before = contents(tmp_path / "r", folder.unfinished_records)
    fill = lambda: monkeypatch.setattr(files, "save_file", no_space)  # noqa: E731
    before_the_second(monkeypatch, "trainer", "update", fill)
    capsys.readouterr()
    assert main([*argv, "--train", "--seed", "3"]) == 1
    said = last_line(capsys)
    assert said.startswith(f"run.py: failed: {folder.unfinished.partial_token}: cannot be written (")
    assert FULL in said
    assert "; the best token so far, after 1 updates, is kept: use it with --token_path" in said
    assert contents(tmp_path / "r", folder.unfinished_records) == before


def test_pictures_on_another_disk_are_taken_over_too(argv, folder, tmp_path, monkeypatch):
    """Whoever has little room links ``img`` to a larger disk, where no renaming leads."""
    rename = os.rename

    def within_a_disk(old, new, **kwargs):
        if "training.partial" in str(old) and "/img/" in str(new):
            raise OSError(18, "Invalid cross-device link")
        return rename(old, new, **kwargs)

    monkeypatch.setattr(os, "rename", within_a_disk)
    assert main([*argv, "--train"]) == 0
    assert (folder.train_images / "epoch_001.png").exists()
    assert folder.evolution.exists()
    assert not folder.unfinished_records.exists()
