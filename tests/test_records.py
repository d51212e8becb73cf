"""What a paper needs to say: versions, commit, date, command line, device, rates, and a row an image."""

import csv
import json
import re
import sys
from datetime import datetime
from importlib.metadata import version

import pytest
import torch
from conftest import learned, tiny_classifier
from PIL import Image
from test_what_people_see import page_of, result, write

from config import RunConfig
from discriminative import VERSION
from discriminative.guides.classifier import Guide
from discriminative.records import environment as room
from discriminative.records.environment import environment
from discriminative.records.files import image_files, thumbnails
from evaluate import evaluate

CPU = torch.device("cpu")
SMALL = RunConfig(class_index=1, evaluate=True, num_inference_steps=2, test_size=3)


@pytest.fixture
def evaluated(token, guides, folder, tmp_path):
    """An evaluation with a judge, two prompts and reference images, and its folder."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a {token} {class} on blue\n")
    reference = tmp_path / "reference"
    reference.mkdir()
    for i in range(2):
        Image.new("RGB", (8, 8), (i, i, i)).save(reference / f"{i}.png")
    asked = {"eval_prompts": str(prompts), "reference_images": str(reference)}
    config = RunConfig(**(vars(SMALL) | asked))
    judge = Guide(tiny_classifier(), 1)
    evaluate(config, token, guides, judge, "tiger cat", folder)
    return folder


def rows_of(folder) -> list[dict]:
    with folder.image_rows.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# --- the environment


def test_a_record_says_when_where_and_with_what_it_was_made(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["run.py", "--class_index", "tiger cat", "--train"])
    said = environment(CPU)
    assert datetime.fromisoformat(said["date"]).utcoffset().total_seconds() == 0
    assert said["command"] == "python run.py --class_index 'tiger cat' --train"
    assert said["device"].strip()
    assert said["versions"]["discriminative"] == VERSION
    for name in ("torch", "diffusers", "transformers", "timm"):
        assert said["versions"][name] == version(name)


def test_the_commit_is_this_programs_and_says_whether_files_were_changed():
    room.commit.cache_clear()
    found = room.commit()
    assert found is None or re.fullmatch(r"[0-9a-f]{40}(-dirty)?", found)


@pytest.mark.parametrize("missing", ["git", "repository"])
def test_without_git_there_is_no_commit_and_no_error(missing, monkeypatch, tmp_path):
    if missing == "git":
        monkeypatch.setenv("PATH", str(tmp_path))
    else:
        monkeypatch.setattr(room, "ROOT", tmp_path)  # which stands in no repository of its own
    room.commit.cache_clear()
    assert room.commit() is None
    room.commit.cache_clear()


def test_where_the_processor_does_not_say_its_name_the_machine_does(monkeypatch):
    def absent(*args, **kwargs):
        raise FileNotFoundError

    monkeypatch.setattr("pathlib.Path.read_text", absent)
    assert room.device_name(CPU)


# --- the training


def test_the_log_has_time_and_learning_rate_of_every_update(tmp_path):
    _, training = learned(tmp_path, learning_rate=0.01)
    for row in training.rows:
        assert row["learning_rate"] in (0.01, pytest.approx(0.004))  # whole, or small steps
        datetime.fromisoformat(row["time"])
    assert training.learning_rate == 0.01


def test_the_learning_rate_in_use_is_told_where_the_option_leaves_it_to_the_program(tmp_path):
    token, training = learned(tmp_path)
    assert training.learning_rate == pytest.approx(0.05 * token.word_rms)


# --- the evaluation


def test_every_image_has_a_row_that_agrees_with_its_file_and_with_the_figures(evaluated):
    rows = rows_of(evaluated)
    assert len(rows) == len(image_files(evaluated.eval_images)) - 1  # one is the second prompt's grid
    for row in rows:
        assert (evaluated.eval_images / row["file"]).is_file()
        assert row["file"].endswith(f"{row['arm']}_{int(row['seed']):04d}_{row['verdict']}.png")
        assert {row["guide_label"], row["judge_label"]} <= {"tiger cat", "bat", "cat"}
        assert (row["verdict"] == "right") == (row["guide_label"] == "tiger cat")
        assert 0 <= float(row["guide_probability"]) <= 1
    for prompt in json.loads(evaluated.result.read_text())["prompts"]:
        for arm, figures in prompt["arms"].items():
            of_arm = [r for r in rows if (r["prompt"], r["arm"]) == (figures["prompt"], arm)]
            for who in ("guide", "judge"):
                mean = sum(float(r[f"{who}_probability"]) for r in of_arm) / len(of_arm)
                assert mean == pytest.approx(figures[who]["probability"], abs=1e-6)


def test_of_several_guides_each_has_its_columns(token, folder):
    guides = [Guide(tiny_classifier(), 0), Guide(tiny_classifier(), 2)]
    evaluate(SMALL, token, guides, None, "tiger cat", folder)
    columns = list(rows_of(folder)[0])
    assert columns[5:] == ["guide_label", "guide_probability", "guide2_label", "guide2_probability"]


def test_an_evaluation_knows_its_reference_images_again(evaluated):
    """It said their folder alone, whatever became of what is in it."""
    said = json.loads(evaluated.result.read_text())["reference_images"]
    assert (said["images"], len(said["sha256"])) == (2, 64)


def test_an_evaluation_says_its_environment_and_precision(evaluated):
    said = json.loads(evaluated.result.read_text())
    assert said["environment"]["versions"]["torch"] == version("torch")
    assert said["settings"]["precision"] == "torch.float32"


# --- the report


def test_the_page_says_its_date_versions_and_seeds(tmp_path):
    where = {"date": "2026-11-25T14:03:07+00:00", "versions": {"torch": "2.15.0"}, "commit": "c0ffee"}
    where |= {"device": "A card"}
    write(tmp_path, result() | {"environment": where, "seeds": list(range(10))})
    told = page_of(tmp_path).text
    for text in ("2026-11-25", "torch 2.15.0", "c0ffee", "A card", "0 to 9", f"version {VERSION}"):
        assert text in told


@pytest.mark.parametrize("term", ["Guide", "Judge", "p", "Diversity"])
def test_the_page_explains_its_figures_in_a_sentence_each(term, tmp_path):
    write(tmp_path, result())
    text = page_of(tmp_path).text
    assert re.search(rf"{term}: [^.]+\.", text)


def test_the_page_takes_an_evaluation_of_before_that_says_no_environment(tmp_path):
    write(tmp_path, result())
    assert "2 bat" in page_of(tmp_path).text


@pytest.mark.parametrize(
    ("shape", "small"), [((512, 512), (128, 128)), ((768, 512), (128, 85)), ((64, 64), (64, 64))]
)
def test_pictures_of_a_training_are_thumbnails(shape, small):
    images = torch.rand(2, 3, *shape, dtype=torch.float16)
    found = thumbnails(images)
    assert found.shape == (2, 3, *small)
    assert found.mean().item() == pytest.approx(images.float().mean().item(), abs=0.01)
