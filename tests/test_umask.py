"""Who may read what a run leaves: all files follow the umask, as those of other programs do."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_models
from filelock import FileLock
from PIL import Image
from tiny_folders import save_sd1, save_timm

from apps.session import Session
from discriminative.records.files import (
    follow_umask,
    write_image,
    write_json,
    write_lines,
    write_tensors,
    write_text,
)
from discriminative.tokens.class_token import ClassToken
from discriminative.tokens.files import write_pipeline, write_web_ui
from dpt.files import add_lora, write_lora
from miniature import detector
from miniature.training import Trainee

TENSORS = {"newclas": torch.zeros(1, 4)}
SHORT = {
    "device": "cpu",
    "num_inference_steps": 2,
    "training_sampler": "dpmsolver++@2",
    "jump_at": "0.5",
    "max_epochs": 1,
    "images_per_update": 2,
    "test_size": 2,
}


@pytest.fixture(params=[0o022, 0o027], ids=oct)
def mode(request):
    """The permissions of a new file, under one umask after the other."""
    before = os.umask(request.param)
    yield 0o666 & ~request.param
    os.umask(before)


def modes(folder: Path) -> dict[str, str]:
    """Every file below a folder, and what may be done with it."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): oct(path.stat().st_mode & 0o777) for path in files}


def tiny_lora(folder: Path) -> None:
    models = tiny_models()
    add_lora(models)
    write_lora(folder, models)


def tiny_detector(folder: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(detector, "try_out", lambda model, held_out: (0.5, {}))
        detector.write(torch.nn.Linear(2, 2), None, folder / "detector")


WRITERS = {
    "text": lambda folder: write_text(folder / "a.csv", "a"),
    "json": lambda folder: write_json(folder / "a.json", {}),
    "lines": lambda folder: write_lines(folder / "a.jsonl", [{}]),
    "image": lambda folder: write_image(folder / "a.png", Image.new("RGB", (2, 2))),
    "tensors": lambda folder: write_tensors(folder / "a.safetensors", TENSORS, {}),
    "web-ui": lambda folder: write_web_ui(
        folder / "a.safetensors", SimpleNamespace(vector=torch.zeros(1, 4)), {}
    ),
    "pipeline": lambda folder: write_pipeline(folder / "p", ClassToken(tiny_models(), "newclas", "a")),
    "lora": tiny_lora,
    "checkpoint": lambda folder: Trainee({"m": torch.nn.Linear(2, 2)}, folder, "vae", [(1, 0.1)]).save(),
    "detector": tiny_detector,
}


@pytest.mark.parametrize("writer", WRITERS)
def test_files_follow_the_umask(writer, mode, tmp_path):
    """safetensors writes 0600: nobody else could read a token on a shared machine."""
    WRITERS[writer](tmp_path)
    found = modes(tmp_path)
    assert found
    assert set(found.values()) == {oct(mode)}, found


def test_a_file_that_is_replaced_is_as_readable_as_a_new_one(mode, tmp_path):
    """Tokens of earlier versions are there with 0600."""
    path = tmp_path / "a.safetensors"
    path.touch(0o600)
    write_tensors(path, TENSORS, {})
    assert modes(tmp_path) == {"a.safetensors": oct(mode)}


@pytest.mark.parametrize("mode", [0o027], indirect=True)
def test_a_whole_run_follows_the_umask(mode, tmp_path):
    save_sd1(tmp_path / "sd1")
    classifier = save_timm(tmp_path / "timm")
    out = tmp_path / "results"
    session = Session(
        str(tmp_path / "sd1"), classifier, output_path=str(out), export="a1111,pipeline", **SHORT
    )
    learned = session.learn(1, constants={"validation_size": 2, "confirm_size": 2})
    session.export(learned.plan, learned.token)
    session.evaluate(learned)
    session.save(learned, out / "cat.safetensors")
    found = modes(out)
    assert len(found) > 20
    assert set(found.values()) == {oct(mode)}, found


def test_a_lock_lets_others_of_the_group_in(mode, tmp_path):
    """The summary of a shared folder is locked by whoever writes a row."""
    with FileLock(tmp_path / ".summary.csv.lock"):
        assert modes(tmp_path) == {".summary.csv.lock": oct(mode)}


def test_files_of_a_folder_follow_and_no_other_file_is_left(mode, tmp_path):
    """The miniature's stages write folders with the libraries' own writers."""
    (tmp_path / "unet" / "deep").mkdir(parents=True)
    for name in ("a.safetensors", "deep/b.safetensors", "c.json"):
        (tmp_path / "unet" / name).touch(0o600)
    follow_umask(tmp_path / "unet")
    assert modes(tmp_path) == {
        f"unet/{name}": oct(mode) for name in ("a.safetensors", "deep/b.safetensors", "c.json")
    }
