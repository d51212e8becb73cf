"""Several classes learned side by side in one batch: each gets the token that it gets alone."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from conftest import learning, tiny_classifier, tiny_models
from short_runs import small_validations
from test_session import SHORT

from discriminative.errors import WorkError
from discriminative.guides.classifier import Guide
from discriminative.precision import training_precision
from discriminative.records.layout import RunFolder
from discriminative.tokens import batch, side_by_side
from discriminative.tokens.checkpoint import Checkpoint
from discriminative.tokens.class_token import ClassToken
from discriminative.tokens.files import read_token
from discriminative.tokens.objective import Objective
from discriminative.tokens.side_by_side import SideBySide
from run import main
from trainer import train

CLASSES = ("tiger cat", "bat", "cat")
ONE_UPDATE = {"choose_by": "loss", "max_epochs": 1}
MODES = ["jump", "skip", "last", "last:2", "random:3", "lv:2"]


def jobs(root, settings, models=None) -> list:
    """A training of each of the tiny classifier's classes; each has its own tokenizer, as in a session."""
    models = models or tiny_models()
    found = []
    for target, name in enumerate(CLASSES):
        own = replace(models, tokenizer=models.fresh_tokenizer())
        token = ClassToken(own, "newclas", "a")
        guides = [Guide(tiny_classifier(), target)]
        folder = RunFolder(root, name, "e")
        found.append(partial(train, settings, token, guides, name, folder))
    return found


def alone(root, settings) -> list:
    return [job() for job in jobs(root, settings)]


def together(root, settings, size: int = 3) -> list:
    """The trainings, at most ``size`` at a time, in the order of the classes."""
    models = tiny_models()
    waiting = [(i, job) for i, job in enumerate(jobs(root, settings, models))]
    running = SideBySide()
    done = {}
    of_worker = {}
    with training_precision(models, settings.mixed_precision):
        while waiting or running.workers:
            while waiting and len(running.workers) < size:
                i, job = waiting.pop(0)
                worker = running.add(lambda work, job=job: job(work=work))
                of_worker[id(worker)] = i
            for worker in running.until_one_ends():
                done[of_worker[id(worker)]] = worker.ended
    return [done[i].result or done[i].error for i in range(len(done))]


@pytest.mark.parametrize("mode", MODES)
def test_after_an_update_each_token_is_the_one_that_is_learned_alone(mode, tmp_path):
    settings = learning(gradient_mode=mode, **ONE_UPDATE)
    one_by_one = alone(tmp_path / "alone", settings)
    side = together(tmp_path / "together", settings)
    for mine, its in zip(side, one_by_one, strict=True):
        torch.testing.assert_close(mine.last_vector, its.last_vector, rtol=0, atol=1e-5)
        assert mine.rows[0]["loss"] == pytest.approx(its.rows[0]["loss"], abs=1e-4)
    assert not torch.allclose(side[0].last_vector, side[1].last_vector, atol=1e-3)


@pytest.mark.parametrize("changes", [{}, {"augment": True}, {"batch_size": 3}, {"decode_batch_size": 2}])
def test_through_stages_and_starts_each_goes_its_own_way(changes, tmp_path):
    constants = {"validate_every": 1, "attempt_patience": 1, "max_epochs": 4, "stop_validation_accuracy": 0.0}
    settings = learning(**constants, **changes)
    if "decode_batch_size" in changes:
        settings = replace(settings, sampler=replace(settings.sampler, **changes))
    for mine, its in zip(together(tmp_path / "t", settings), alone(tmp_path / "a", settings), strict=True):
        assert [(r["start"], r["stage"]) for r in mine.rows] == [(r["start"], r["stage"]) for r in its.rows]
        assert (mine.kept_updates, mine.stopped_by, mine.images) == (
            its.kept_updates,
            its.stopped_by,
            its.images,
        )
        torch.testing.assert_close(mine.last_vector, its.last_vector, rtol=0, atol=1e-3)


def test_what_is_asked_at_the_same_place_is_done_in_one_batch(tmp_path, monkeypatch):
    sizes = []
    cond_gradient = batch.cond_gradient

    def counted(models, cond, *args):
        sizes.append(len(cond))
        return cond_gradient(models, cond, *args)

    monkeypatch.setattr(batch, "cond_gradient", counted)
    settings = learning(**ONE_UPDATE)
    together(tmp_path, settings)
    assert sizes == [3 * settings.images_per_update]


def test_a_class_that_ends_makes_room(tmp_path, monkeypatch):
    """Two at a time: the third begins as soon as one of them has ended."""
    sizes = []
    joined = side_by_side.together
    monkeypatch.setattr(side_by_side, "together", lambda asked: sizes.append(len(asked)) or joined(asked))
    settings = learning(choose_by="loss", max_epochs=2)
    assert len(together(tmp_path, settings, size=2)) == 3
    assert sizes == [2, 2, 1, 1]


def test_a_class_that_fails_leaves_the_others_alone(tmp_path, monkeypatch):
    losses = Objective.class_loss

    def fails(self, images):
        if self.guides[0].target == 1:
            raise WorkError("cannot be scored")
        return losses(self, images)

    settings = learning(**ONE_UPDATE)
    whole = alone(tmp_path / "alone", settings)
    monkeypatch.setattr(Objective, "class_loss", fails)
    first, failed, last = together(tmp_path / "together", settings)
    assert str(failed) == "cannot be scored"
    for mine, its in ((first, whole[0]), (last, whole[2])):
        torch.testing.assert_close(mine.last_vector, its.last_vector, rtol=0, atol=1e-5)


def test_an_interruption_keeps_the_state_of_each(tmp_path):
    settings = learning(choose_by="loss", max_epochs=9, stop_train_accuracy=1.0)
    models = tiny_models()
    running = SideBySide()
    paths = [tmp_path / f"{i}.safetensors" for i in range(3)]

    def note(row, images):
        if row["epoch"] == 4:
            raise KeyboardInterrupt

    for path, job in zip(paths, jobs(tmp_path, settings, models), strict=True):
        checkpoint = Checkpoint(path, {}, 3600)
        on_update = note if path == paths[1] else None
        running.add(lambda work, j=job, c=checkpoint, n=on_update: j(n, c, work))
    with pytest.raises(KeyboardInterrupt):
        for worker in running.until_one_ends():
            raise worker.ended.error
    running.stop()
    rows = [Checkpoint(path).read().values["rows"] for path in paths]
    assert [len(of_one) for of_one in rows] == [4, 3, 4]
    assert not any(worker.thread.is_alive() for worker in running.workers)


# --- the command line


@pytest.fixture
def argv(names):
    """Classes 1 to 3, learned and evaluated."""
    options = SHORT | names | {"class_index": "1-3", "max_epochs": 2}
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def tokens(root) -> dict[str, torch.Tensor]:
    return {p.parts[-3]: read_token(p)[1] for p in root.rglob("learned_embeds.safetensors")}


def test_a_sweep_with_several_classes_a_batch_learns_and_evaluates_all(argv, tmp_path, capsys):
    with small_validations():
        assert main([*argv, "--train", "--evaluate", "--output_path", str(tmp_path / "one")]) == 0
        side = [*argv, "--train", "--evaluate", "--output_path", str(tmp_path / "two")]
        side += ["--classes_per_batch", "2"]
        assert main(side) == 0
        capsys.readouterr()
        assert main(side) == 0  # all is there
    assert "skipped      3   1-3   (finished before)" in capsys.readouterr().out
    one = tokens(tmp_path / "one")
    two = tokens(tmp_path / "two")
    assert len(one) == 3
    for name, vector in one.items():
        torch.testing.assert_close(two[name], vector, rtol=0, atol=1e-3)
    assert len(list((tmp_path / "two").rglob("evaluation.json"))) == 3
    assert not list((tmp_path / "two").rglob("*.claim"))


def test_a_batch_computes_in_the_precision_of_a_training_alone(argv, tmp_path, monkeypatch):
    """Each token has models of its own, which say what is coarse."""
    monkeypatch.setattr("discriminative.precision.has_bf16_units", lambda: True)
    coarse = []
    walk = batch.sample
    monkeypatch.setattr(
        batch, "sample", lambda models, *rest: coarse.append(models.coarse_dtype) or walk(models, *rest)
    )
    whole = [*argv, "--train", "--mixed_precision", "auto", "--max_epochs", "1"]
    found = []
    for size in ("1", "2"):
        root = tmp_path / size
        with small_validations():
            assert main([*whole, "--output_path", str(root), "--classes_per_batch", size]) == 0
        records = sorted(root.rglob("config.json"))
        found.append([json.loads(path.read_text())["training"]["precision"] for path in records])
    assert found == [["float32, bfloat16 without gradient"] * 3] * 2
    assert set(coarse) == {torch.bfloat16}


def test_a_class_of_a_batch_that_fails_is_written_down_and_the_others_are_done(
    argv, tmp_path, monkeypatch, capsys
):
    losses = Objective.class_loss

    def fails(self, images):
        if self.guides[0].target == 1:
            raise WorkError("cannot be scored")
        return losses(self, images)

    monkeypatch.setattr(Objective, "class_loss", fails)
    with small_validations():
        code = main([*argv, "--train", "--output_path", str(tmp_path), "--classes_per_batch", "3"])
    assert code == 1
    assert "run.py: failed: class 2 (bat): cannot be scored" in capsys.readouterr().err
    assert len(tokens(tmp_path)) == 2


def test_an_interruption_of_a_batch_says_that_it_goes_on(argv, tmp_path, monkeypatch, capsys):
    rounds = []
    joined = side_by_side.together

    def stop_at_the_third(asked):
        rounds.append(1)
        if len(rounds) == 5:
            raise KeyboardInterrupt
        return joined(asked)

    whole = [*argv, "--train", "--output_path", str(tmp_path), "--classes_per_batch", "3"]
    with small_validations():
        with monkeypatch.context() as patch:
            patch.setattr(side_by_side, "together", stop_at_the_third)
            assert main(whole) == 130
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert said == "run.py: interrupted; the same command goes on with the classes that were at work"
        assert not list(tmp_path.rglob("*.claim"))
        assert main(whole) == 0
    assert len(tokens(tmp_path)) == 3


def test_one_class_is_no_batch(argv, capsys):
    assert main([*argv, "--class_index", "1", "--train", "--classes_per_batch", "2"]) == 2
    said = capsys.readouterr().err.strip()
    assert said == "run.py: error: --classes_per_batch: 2 was given; allowed is 1 with one class"
