"""Two runs in one folder: one of them is refused in one line, and takes nothing away from the other."""

import os
import shutil
import socket
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from short_runs import small_validations
from test_reuse import write_learned
from test_session import SHORT

from apps import work
from apps.plan import Sources, make_plan
from apps.session import Session
from discriminative.errors import UsageError
from discriminative.records.layout import RunFolder
from discriminative.records.locks import Claim, alone_in
from dpt.__main__ import main as dpt_main
from run import main, options_of, parse

CAT = "0001_tiger_cat"
HERE = f"({socket.gethostname()}, process {os.getpid()})"
REFUSED = f"another run is at work there {HERE}; wait until it is done, or give another --output_path"


@pytest.fixture(autouse=True, scope="module")
def small():
    with small_validations():
        yield


@pytest.fixture
def argv(names, tmp_path):
    """A short run of class 1 in ``tmp_path / "r"``, without saying what is to be done."""
    options = SHORT | names | {"class_index": 1, "output_path": tmp_path / "r"}
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


@pytest.fixture
def folder(tmp_path):
    """Class 1's, with a token."""
    folder = RunFolder(tmp_path / "r", CAT, "default")
    folder.records.mkdir(parents=True)
    save_file({"newclas": torch.ones(1, 16)}, folder.token)
    return folder


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


WORK = [
    ["--train"],
    ["--evaluate"],
    ["--prompt", "a {token} {class}"],
    ["--export_dataset", "2"],
    ["--export", "a1111"],
]


@pytest.mark.parametrize("what", WORK, ids=lambda what: what[0])
def test_a_second_run_is_refused_before_anything_is_loaded(what, argv, folder, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("apps.session.load_models", lambda *args: pytest.fail("loaded a model"))
    with alone_in(folder.records):
        before = contents(tmp_path)
        assert main([*argv, *what]) == 2
        assert contents(tmp_path) == before
    assert capsys.readouterr().err == f"run.py: error: {folder.records}: {REFUSED}\n"


def test_a_dry_run_and_another_experiment_are_in_nobodys_way(argv, folder):
    with alone_in(folder.records):
        assert main([*argv, "--train", "--dry_run"]) == 0
        assert main([*argv, "--train", "--exp_id", "other"]) == 0


def test_the_same_class_learned_twice_at_once_is_learned_once(names, tmp_path):
    """Both used to go on, and each removed the other's pictures."""
    said = []
    options = names | SHORT | {"output_path": str(tmp_path)}

    def learn_too() -> None:
        with pytest.raises(UsageError, match="another run is at work"):
            Session(**options).learn(1)
        said.append("refused")

    def meanwhile(row, images) -> None:
        if row["epoch"] == 1:
            other = threading.Thread(target=learn_too, daemon=True)
            other.start()
            other.join(timeout=30)

    learned = Session(**options).learn(1, on_update=meanwhile)
    assert said == ["refused"]
    pictures = {path.name for path in learned.plan.folder.train_images.iterdir()}
    assert {"epoch_001.png", "epoch_002.png", "validation_000.png"} <= pictures


def test_a_sweep_does_the_others_and_waits_for_a_class_at_work_elsewhere(
    argv, folder, tmp_path, capsys, monkeypatch
):
    claim = Claim(folder.records)
    assert claim.take()
    monkeypatch.setattr("apps.queue.time.sleep", lambda seconds: claim.release())  # it ends, or gives up
    assert main([*argv, "--class_index", "1,2", "--train"]) == 0
    said = capsys.readouterr().out
    assert f"waiting for what is at work elsewhere: class 1 {HERE}" in said
    assert said.index("class 2 of") < said.index("waiting for") < said.index("class 1 of")
    assert RunFolder(tmp_path / "r", "0002_bat", "default").token.exists()


def test_what_another_run_learned_since_the_plan_was_made_is_not_learned_again(argv, tmp_path, monkeypatch):
    """Two sweeps share the classes between them."""
    config = options_of(parse([*argv, "--train"])[0])
    sources = Sources(config)
    plan = make_plan(config, sources, resume=True)
    assert plan.vectors is None
    write_learned(plan.config, plan.folder)
    save_file({"newclas": torch.ones(1, 16)}, plan.folder.token)
    found = []
    monkeypatch.setattr(work, "take_steps", lambda plan, session, resume: found.append(plan.vectors))
    work.carry_out(plan, Session.of(sources), resume=True)
    assert torch.equal(found[0], torch.ones(1, 16))


def test_a_lock_of_an_earlier_version_is_in_nobodys_way(argv, folder):
    (folder.records.parent / ".default.lock").touch()
    assert main([*argv, "--export", "a1111"]) == 0


def test_a_lock_that_is_let_go_leaves_nothing(tmp_path):
    with alone_in(tmp_path / "r" / "class" / "default"):
        assert [path.name for path in (tmp_path / "r" / "class").iterdir()] == [".default.claim"]
    assert not list(tmp_path.iterdir())


def test_a_lock_is_taken_once_whoever_comes_and_goes(tmp_path):
    """It is removed while it is held: whoever has opened it by then must not take it for the lock."""
    inside = []
    most = []

    def run() -> None:
        for _ in range(50):
            try:
                with alone_in(tmp_path / "default"):
                    inside.append(1)
                    most.append(len(inside))
                    inside.pop()
            except UsageError:
                pass

    threads = [threading.Thread(target=run, daemon=True) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert set(most) == {1}


def test_a_folder_that_cannot_be_made_is_one_line(argv, folder, capsys):
    shutil.rmtree(folder.records.parent)
    folder.records.parent.write_text("a file")
    assert main([*argv, "--train"]) == 1
    assert f"run.py: failed: {folder.records}: cannot be written (" in capsys.readouterr().err


def test_dpt_refuses_a_second_run_as_well(tmp_path, capsys):
    with alone_in(tmp_path / "probe"):
        assert dpt_main(["probe", "--model", "miniature", "--output_path", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"dpt: error: {tmp_path / 'probe'}: {REFUSED}\n"
