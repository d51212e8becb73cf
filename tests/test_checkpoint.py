"""A training that is interrupted goes on from its checkpoint as if nothing had happened."""

import json
import shutil
import sys
from dataclasses import replace

import pytest
import torch
from conftest import learning, tiny_classifier, tiny_models
from short_runs import small_validations
from test_session import SHORT

import trainer
from apps.session import Session
from discriminative.errors import WorkError, WriteError
from discriminative.guides.classifier import Guide
from discriminative.records import files
from discriminative.records.layout import RunFolder
from discriminative.tokens.checkpoint import Checkpoint
from discriminative.tokens.class_token import ClassToken
from discriminative.tokens.files import read_token
from run import main
from trainer import train

CLOCKED = ("time", "seconds")
CAT = "0001_tiger_cat"


class Killed(BaseException):
    """Stands for SIGKILL: nothing is written on the way out."""


def whole(rows: list[dict]) -> list[dict]:
    """Log rows without what the clock says."""
    return [{k: v for k, v in row.items() if k not in CLOCKED} for row in rows]


def trained(root, settings, *, killed_after: int = 0, seconds: float = 0.0):
    """A training from the checkpoint in ``root``; killed once so many updates are recorded."""
    token = ClassToken(tiny_models(), "newclas", "a")
    folder = RunFolder(root, "c", "e")
    checkpoint = Checkpoint(folder.checkpoint, {}, seconds)

    def note(row, images):
        if row["epoch"] == killed_after:
            checkpoint.write = lambda: None
            raise Killed

    guides = [Guide(tiny_classifier(), 0)]
    return token, train(settings, token, guides, "tiger cat", folder, note, checkpoint)


SETTINGS = {
    "through stages and starts": {"validate_every": 1, "attempt_patience": 1, "max_epochs": 9},
    "to measured steps": {"validate_every": 1, "attempt_patience": 1, "max_epochs": 10, "jump_at": "0.5"},
    "the paper's rule": {"choose_by": "loss", "max_epochs": 6, "noise_pool": 1, "gradient_mode": "last:2"},
    "augmented": {"augment": True, "validate_every": 2, "max_epochs": 4},
}


@pytest.mark.parametrize("changes", SETTINGS.values(), ids=list(SETTINGS))
def test_a_training_that_is_killed_after_every_update_ends_as_one_that_was_not(tmp_path, changes):
    settings = learning(stop_validation_accuracy=0.0, stop_train_accuracy=1.0, **changes)
    token, training = trained(tmp_path / "whole", settings)
    for epoch in range(1, len(training.rows) + 1):
        with pytest.raises(Killed):
            trained(tmp_path / "killed", settings, killed_after=epoch)
    again, resumed = trained(tmp_path / "killed", settings)
    assert torch.equal(again.vector, token.vector)
    assert torch.equal(resumed.last_vector, training.last_vector)
    assert whole(resumed.rows) == whole(training.rows)
    for name in ("kept_updates", "stopped_by", "images", "gain"):
        assert getattr(resumed, name) == getattr(training, name)
    assert pictures(tmp_path / "killed") == pictures(tmp_path / "whole")


def pictures(root) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*.png")}


def test_a_scaler_that_has_halved_its_scale_goes_on_with_it(tmp_path, monkeypatch):
    scalers = []

    def scaled(models):
        scalers.append(torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2))
        scalers[-1].scale(torch.zeros(()))
        return scalers[-1]

    monkeypatch.setattr("trainer.make_scaler", scaled)
    settings = learning(choose_by="loss", max_epochs=5)
    with pytest.raises(Killed):
        trained(tmp_path, settings, killed_after=4)
    found = scalers[0].state_dict()
    monkeypatch.setattr("trainer.update", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trained(tmp_path, settings)
    before = scalers[1].state_dict()
    assert before["scale"] in (found["scale"], found["scale"] / 2)  # of the update before, or that one
    assert before["scale"] != 8.0


def test_a_state_is_written_now_and_then_and_where_the_training_is_interrupted(tmp_path, monkeypatch):
    settings = learning(choose_by="loss", max_epochs=6)
    checkpoint = RunFolder(tmp_path, "c", "e").checkpoint
    with pytest.raises(Killed):
        trained(tmp_path, settings, killed_after=5, seconds=3600)
    assert not checkpoint.exists()
    record = trainer.record

    def interrupted(folder, rows, row, images, on_update):
        record(folder, rows, row, images, on_update)
        if row["epoch"] == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(trainer, "record", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path, settings, seconds=3600)
    state = Checkpoint(checkpoint).read()
    assert [row["epoch"] for row in state.values["rows"]] == [1, 2]


def test_a_training_that_fails_by_itself_leaves_no_state(tmp_path, monkeypatch):
    """It would fail again, whatever options are tried next."""
    settings = learning(choose_by="loss", max_epochs=9, stop_train_accuracy=1.0)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *args: torch.tensor(float("inf")))
    with pytest.raises(WorkError, match="gradient norm inf"):
        trained(tmp_path, settings)
    assert not RunFolder(tmp_path, "c", "e").checkpoint.exists()


@pytest.mark.parametrize("damage", [b"", b"not a checkpoint", b"\x10\0\0\0\0\0\0\0{}"])
def test_a_damaged_checkpoint_is_said_and_begun_anew(tmp_path, damage, capsys):
    settings = learning(choose_by="loss", max_epochs=2)
    _, training = trained(tmp_path / "whole", settings)
    path = RunFolder(tmp_path / "other", "c", "e").checkpoint
    path.parent.mkdir(parents=True)
    path.write_bytes(damage)
    _, again = trained(tmp_path / "other", settings)
    assert f"note: {path}: damaged" in capsys.readouterr().out
    assert whole(again.rows) == whole(training.rows)


# --- the command line


@pytest.fixture(autouse=True, scope="module")
def small():
    with small_validations():
        yield


@pytest.fixture
def argv(names, tmp_path):
    """A short training of class 1 in ``tmp_path / "r"``."""
    options = SHORT | names | {"class_index": 1, "output_path": tmp_path / "r", "checkpoint_seconds": 0}
    return [word for name, value in options.items() for word in (f"--{name}", str(value))] + ["--train"]


@pytest.fixture
def folder(tmp_path):
    return RunFolder(tmp_path / "r", CAT, "default")


def killed_in(monkeypatch, target: str, name: str, call: int) -> None:
    """Kill the program before a function is called for this time; nothing is written on the way out."""
    module = sys.modules[target]
    before = getattr(module, name)
    calls = []

    def counted(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            monkeypatch.setattr(Checkpoint, "write", lambda self: None)
            raise Killed
        return before(*args, **kwargs)

    monkeypatch.setattr(module, name, counted)


def test_the_same_command_goes_on(argv, folder, tmp_path, monkeypatch, capsys):
    assert main([*argv, "--output_path", str(tmp_path / "whole")]) == 0
    with monkeypatch.context() as patch:
        killed_in(patch, "trainer", "record", 2)
        with pytest.raises(Killed):
            main(argv)
    epochs = []
    record = trainer.record
    monkeypatch.setattr(trainer, "record", lambda *args: epochs.append(args[2]["epoch"]) or record(*args))
    assert main(argv) == 0
    assert f"goes on after 1 updates, from {folder.unfinished.checkpoint}" in capsys.readouterr().out
    assert epochs[0] == 2
    theirs = RunFolder(tmp_path / "whole", CAT, "default")
    assert torch.equal(read_token(folder.token)[1], read_token(theirs.token)[1])
    assert pictures(tmp_path / "r") == pictures(tmp_path / "whole")
    rows = [[json.loads(line) for line in f.log.read_text().splitlines()] for f in (folder, theirs)]
    assert whole(rows[0]) == whole(rows[1])
    assert not folder.unfinished_records.exists()


@pytest.mark.parametrize(("flag", "value"), [("--seed", "7"), ("--learning_rate", "0.01")])
def test_another_configuration_is_refused_until_the_interrupted_one_is_done(
    flag, value, argv, folder, monkeypatch, capsys
):
    with monkeypatch.context() as patch:
        killed_in(patch, "trainer", "record", 2)
        with pytest.raises(Killed):
            main(argv)
    assert main([*argv, flag, value]) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith(
        f"run.py: error: {flag}: {value} was given, but a training that was interrupted there"
    )
    assert said.endswith(f"give that to go on, another --exp_id, or remove {folder.unfinished_records}")
    assert main([*argv, flag, value, "--exp_id", "other"]) == 0
    assert main([*argv, "--output_path", str(folder.records / "r")]) == 0  # elsewhere nothing is known of it
    shutil.rmtree(folder.unfinished_records)
    assert main([*argv, flag, value]) == 0


MOVES = ["log", "train_images", "evolution", "token", "config"]


@pytest.mark.parametrize("number", range(1, len(MOVES) + 1), ids=MOVES)
def test_a_training_that_is_killed_while_it_takes_its_place_takes_it_later(
    number, argv, folder, tmp_path, monkeypatch
):
    assert main([*argv, "--seed", "1", "--evaluate"]) == 0
    with monkeypatch.context() as patch:
        killed_in(patch, "shutil", "move", number)
        with pytest.raises(Killed):
            main(argv)
    monkeypatch.setattr("apps.session.train", lambda *args: pytest.fail("trained again"))
    assert main([*argv, "--class_index", "1,1"]) == 0
    monkeypatch.undo()
    with small_validations():
        assert main([*argv, "--output_path", str(tmp_path / "whole")]) == 0
    assert pictures(tmp_path / "r" / "img") == pictures(tmp_path / "whole" / "img")
    theirs = RunFolder(tmp_path / "whole", CAT, "default")
    assert torch.equal(read_token(folder.token)[1], read_token(theirs.token)[1])
    assert not folder.result.exists()


def test_a_disk_that_is_full_at_every_write_in_turn_loses_nothing(argv, folder, tmp_path, monkeypatch):
    """Each run writes one file more than the last one before there is no room; the token is that of a run
    that had room."""
    assert main([*argv, "--output_path", str(tmp_path / "whole")]) == 0
    replace_file = files._replace
    for room in range(60):
        written = []

        def limited(path, write, written=written, room=room):
            written.append(path)
            if len(written) > room:
                raise WriteError(f"{path}: cannot be written (No space left on device)")
            replace_file(path, write)

        with monkeypatch.context() as patch:
            patch.setattr(files, "_replace", limited)
            code = main(argv)
        if not code:
            break
    assert code == 0
    theirs = RunFolder(tmp_path / "whole", CAT, "default")
    assert torch.equal(read_token(folder.token)[1], read_token(theirs.token)[1])
    assert pictures(tmp_path / "r") == pictures(tmp_path / "whole")


def test_a_session_goes_on_too(names, tmp_path, monkeypatch):
    options = SHORT | names | {"output_path": str(tmp_path / "r"), "checkpoint_seconds": 0}
    whole_token = Session(**(options | {"output_path": str(tmp_path / "whole")})).learn(1).token.vector
    with monkeypatch.context() as patch:
        killed_in(patch, "trainer", "record", 2)
        with pytest.raises(Killed):
            Session(**options).learn(1)
    assert torch.equal(Session(**options).learn(1).token.vector, whole_token)


def test_settings_that_decide_nothing_may_change_on_the_way(tmp_path):
    settings = learning(choose_by="loss", max_epochs=4)
    with pytest.raises(Killed):
        trained(tmp_path, settings, killed_after=3)
    _, training = trained(tmp_path, replace(settings, eval_batch_size=2, batch_size=2))
    assert len(training.rows) == 4
