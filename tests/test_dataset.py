"""Data sets; and finished tokens at work in prompts, several in one among them."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_classifier, tiny_models
from PIL import Image

from apps.plan import prompts_to_draw
from apps.provenance import dataset_options
from apps.session import Session
from config import RunConfig
from discriminative.errors import UsageError, WorkError
from discriminative.guides.classifier import Guide
from discriminative.records.layout import RunFolder
from discriminative.seeds import DATASET_BASE, END_OF_SEEDS, MAX_DATASET, MAX_SEED, SEED_RANGE, training_seeds
from discriminative.settings import SamplerSettings
from discriminative.tokens.class_token import ClassToken
from discriminative.tokens.dataset import TRIES, Dataset, check_dataset

CONFIG = RunConfig(num_inference_steps=2, eval_batch_size=2, num_images=3)
FAST = SamplerSettings(num_inference_steps=2, guidance_scale=7.0)


def test_several_prompts_have_a_folder_each(token, tmp_path):
    folder = RunFolder(str(tmp_path), "c", "e")
    prompts = ("a photo of newclas cat", "a bat")
    plan = SimpleNamespace(config=CONFIG, folder=folder, to_draw=prompts, others={}, label="cat")
    folders = Session.generate(None, plan, token)
    assert [f.name[:-9] for f in folders] == ["a_photo_of_newclas_cat", "a_bat"]
    for folder in folders:
        assert {p.name for p in folder.iterdir()} == {
            "0035.png",
            "0036.png",
            "0037.png",
            "grid.png",
            "prompt.json",
        }


def test_prompts_name_tokens_of_other_classes(tmp_path):
    file = tmp_path / "p.txt"
    text = "# Windows marks the beginning\n{token} {class} and {token:7} bat\n"
    text += "# a comment\n\n{token:house cat}, {token:3}\n"
    file.write_text(text, encoding="utf-8-sig")
    config = RunConfig(class_index=3, prompt=f"@{file}")
    find = {"7": 7, "house cat": 24, "3": 3}.get
    assert prompts_to_draw(replace(config, prompt="a {token:7}"), "cat", find)[0] == ["a classtoken7"]
    prompts, others = prompts_to_draw(config, "cat", find)
    assert prompts == ["newclas cat and classtoken7 bat", "classtoken24, newclas"]
    assert others == {"classtoken7": 7, "classtoken24": 24}


def test_a_second_token_in_a_prompt_is_its_own_word():
    """Each token's vectors stand for it alone, however many it has, and words that are no tokens draw as
    before."""
    token, alone = (ClassToken(tiny_models(), "newclas", "a") for _ in range(2))
    plain = token.sample(["a photo of cat"], [3], FAST)
    words = torch.cat([token.word_mean("tiger"), token.word_mean("bat")])
    token.load(token.word_mean("blue"))
    token.join("classtoken7", words)
    assert torch.equal(
        token.sample(["a newclas photo of classtoken7"], [3], FAST),
        alone.sample(["a blue photo of tiger bat"], [3], FAST),
    )
    assert torch.equal(token.sample(["a photo of cat"], [3], FAST), plain)


def test_a_token_whose_name_begins_anothers_stays_apart():
    token, alone = (ClassToken(tiny_models(), "newclas", "a") for _ in range(2))
    token.join("classtoken28", torch.cat([token.word_mean("tiger"), token.word_mean("bat")]))
    token.join("classtoken283", token.word_mean("blue"))
    drawn = token.sample(["classtoken28 of classtoken283"], [3], FAST)
    assert torch.equal(drawn, alone.sample(["tiger bat of blue"], [3], FAST))


def dataset_of(path):
    return Dataset(path, [Guide(tiny_classifier(), 0)], Guide(tiny_classifier(), 1), {"token": "one"})


def test_a_data_set_is_added_to_and_no_seed_comes_twice(token, tmp_path):
    dataset_of(tmp_path).fill(token, "cat", 3, FAST, 2)
    dataset_of(tmp_path).fill(token, "cat", 5, FAST, 2)
    rows = [json.loads(line) for line in (tmp_path / "metadata.jsonl").read_text().splitlines()]
    assert [r["seed"] - DATASET_BASE for r in rows] == [0, 1, 2, 3, 4]
    assert {r["file_name"] for r in rows} == {p.name for p in tmp_path.glob("*.png")}
    assert set(rows[0]) == {"file_name", "label", "prompt", "seed", "guide", "judge"}
    assert rows[0]["label"] == tiny_classifier().labels[0]
    assert {r[who] for r in rows for who in ("guide", "judge")} <= {"right", "wrong"}
    # Training's prompts in turn, by the seed: batch size and interruptions change none.
    prompts = ["A photo of", "a high resolution realistic image of", "A close-up photo of"]
    assert [r["prompt"] for r in rows] == [f"{prompts[i % 3]} newclas cat" for i in range(5)]
    with Image.open(tmp_path / rows[0]["file_name"]) as picture:
        assert picture.size == (16, 16)
    assert dataset_of(tmp_path).fill(token, "cat", 5, FAST, 2) == 0  # it is full


def test_a_data_set_of_another_token_is_not_added_to(token, tmp_path):
    dataset_of(tmp_path)
    with pytest.raises(
        UsageError, match="was made with another token or other options; move it, or give another --exp_id"
    ):
        Dataset(tmp_path, [], None, {"token": "other"})
    options = dataset_options(CONFIG, token.vector)
    assert options == json.loads(json.dumps(options))
    assert options != dataset_options(RunConfig(), token.vector)


def test_data_sets_and_training_share_no_seed():
    last = SEED_RANGE * (2 + MAX_SEED) - 1  # of the last --seed; the number of images is bounded
    assert training_seeds(MAX_SEED, 100_000, RunConfig().images_per_update)[-1] < last < DATASET_BASE
    assert DATASET_BASE + TRIES * MAX_DATASET < END_OF_SEEDS


def test_a_data_set_without_a_judge_has_columns_of_the_same_kind(token, tmp_path):
    """A null column beside one of truth values keeps `datasets` from reading two classes together."""
    Dataset(tmp_path, [Guide(tiny_classifier(), 0)], None, {}).fill(token, "cat", 1, FAST, 1)
    (row,) = [json.loads(line) for line in (tmp_path / "metadata.jsonl").read_text().splitlines()]
    assert row["judge"] == "unknown"


def test_a_data_set_that_may_not_be_added_to_is_refused_before_anything_is_learned(token, tmp_path):
    check_dataset(tmp_path, dataset_options(CONFIG, None))  # there is none
    Dataset(tmp_path, [Guide(tiny_classifier(), 0)], None, dataset_options(CONFIG, token.vector))
    check_dataset(tmp_path, dataset_options(CONFIG, token.vector))
    for vectors in (None, token.vector + 1):  # yet to be learned, or another one
        with pytest.raises(UsageError, match="was made with another token or other options"):
            check_dataset(tmp_path, dataset_options(CONFIG, vectors))


def test_only_images_that_the_guide_accepts_are_kept(token, tmp_path):
    dataset, verdicts = dataset_of(tmp_path), iter([0, 5, 0, 0, 5])

    def look(images):
        return torch.nn.functional.one_hot(torch.tensor([next(verdicts) for _ in images]), 6).float(), None

    dataset.guides[0].classifier.look = look
    thrown = dataset.fill(token, "cat", 3, FAST, 1, only_correct=True)
    assert thrown == 1
    assert [r["seed"] - DATASET_BASE for r in dataset.rows] == [0, 2, 3]
    assert [
        json.loads(line)["seed"] - DATASET_BASE
        for line in (tmp_path / "thrown_away.jsonl").read_text().splitlines()
    ] == [1]


def test_a_token_that_draws_no_right_image_is_given_up(token, tmp_path):
    dataset = dataset_of(tmp_path)
    dataset.guides[0].classifier.look = lambda images: (torch.eye(6)[[5] * len(images)], None)
    with pytest.raises(WorkError, match="only 0 of 20 images were right; gave up"):
        dataset.fill(token, "cat", 1, FAST, 10, only_correct=True)
