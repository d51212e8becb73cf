"""More than one guide, outside the loss: an image is right where all say so, in every figure and file."""

import json
from dataclasses import replace

import pytest
import torch
from PIL import Image

from apps.plan import Sources, make_plan
from config import RunConfig
from discriminative.guides.classifier import Classifier, Guide
from discriminative.records.evaluation import EvaluationRecord
from discriminative.records.files import read_json
from discriminative.records.summary import read, replace_row, row_of
from discriminative.seeds import DATASET_BASE
from discriminative.tokens.dataset import Dataset
from discriminative.tokens.files import fingerprint
from evaluate import evaluate

CONFIG = RunConfig(class_index=1, evaluate=True, num_inference_steps=2, test_size=4, classifier="one,two")
GREEN = (0x2A, 0x9D, 0x4A)
RED = (0xC8, 0x37, 0x2D)


class Told(torch.nn.Module):
    """Says of one image after the other what it was told to: the class, or the other one."""

    def __init__(self, verdicts: list[int], target: int):
        super().__init__()
        self.verdicts = list(verdicts)
        self.target = target

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        said = [self.verdicts.pop(0) for _ in images]
        return torch.tensor(
            [[4.0, 0.0] if (self.target == 0) == bool(right) else [0.0, 4.0] for right in said]
        )


def told(name: str, verdicts: list[int], target: int = 0) -> Guide:
    """A guide whose class has this number in its own labels."""
    labels = ["cat", "bat"] if target == 0 else ["bat", "cat"]
    return Guide(Classifier(name, Told(verdicts, target), labels, lambda images: images), target)


@pytest.fixture
def two_guides():
    """What they say of the token's four images, then of the baseline's; the second has another order."""
    first = told("one", [1, 1, 0, 1] + [1, 0, 0, 0])
    second = told("two", [1, 0, 1, 1] + [0, 1, 1, 0], target=1)
    return [first, second]


def test_the_headline_accuracy_is_that_of_images_which_all_guides_call_right(token, folder, two_guides):
    result = evaluate(CONFIG, token, two_guides, None, "cat", folder)
    (first,) = result["prompts"]
    with_token = first["arms"]["token"]
    without = first["arms"]["baseline"]
    assert with_token["guide"]["accuracy"] == 0.5
    assert with_token["guide"]["accuracy_interval"] == pytest.approx([0.1500, 0.8500], abs=1e-4)  # Wilson's
    assert without["guide"]["accuracy"] == 0.0
    verdicts = {"difference": 0.5, "only_with": 2, "only_without": 0, "p_value": 0.5}
    assert first["paired"]["guide"] == verdicts | {
        "log_probability_difference": pytest.approx(1.5),  # three more of eight verdicts, by 4 each
        "log_probability_p_value": 0.5,
    }
    assert result["verdict"].startswith("cat: guide 0.00 -> 0.50 [0.15, 0.85], p=0.5")


def test_each_guide_keeps_its_own_figures_beside_the_common_ones(token, folder, two_guides):
    result = evaluate(CONFIG, token, two_guides, None, "cat", folder)
    arms = result["prompts"][0]["arms"]
    own = {arm: {name: seen["accuracy"] for name, seen in arms[arm]["guides"].items()} for arm in arms}
    assert own == {"token": {"one": 0.75, "two": 0.75}, "baseline": {"one": 0.25, "two": 0.5}}
    assert arms["token"]["guides"]["two"]["predicted"] == [["cat", 0.75], ["bat", 0.25]]


def test_files_and_the_summary_follow_all_guides(token, folder, two_guides, tmp_path):
    result = evaluate(CONFIG, token, two_guides, None, "cat", folder)
    assert sorted(path.name for path in folder.eval_images.glob("token_*")) == [
        "token_0000_right.png",
        "token_0001_wrong.png",
        "token_0002_wrong.png",
        "token_0003_right.png",
    ]
    assert all("wrong" in path.name for path in folder.eval_images.glob("baseline_*"))
    replace_row(str(tmp_path), row_of(EvaluationRecord(result, folder)))
    (row,) = read(str(tmp_path))
    assert (row["guide_without"], row["guide_with"]) == ("0.0", "0.5")


def test_frames_of_the_grid_follow_all_guides(token, folder, two_guides):
    """Above without, below with the token; seeds from left to right."""
    evaluate(CONFIG, token, two_guides, None, "cat", folder)
    with Image.open(folder.grid) as grid:
        rows = [
            framed_colours(grid, 0, grid.height // 2),
            framed_colours(grid, grid.height // 2, grid.height),
        ]
    assert rows == [[RED] * 4, [GREEN, RED, RED, GREEN]]


def framed_colours(grid: Image.Image, top: int, bottom: int) -> list[tuple[int, int, int]]:
    """Colours of the frames of a row of four: the first pixel of such a colour down each image's middle."""
    found = []
    for i in range(4):
        x = round(grid.width * (i + 0.5) / 4)
        column = [grid.getpixel((x, y)) for y in range(top, bottom)]
        found.append(next(colour for colour in column if colour in (GREEN, RED)))
    return found


def test_a_judge_is_none_of_the_guides_eyes(token, folder, two_guides):
    """Its figures are its own, and what the guides say has no part in them."""
    judge = told("judge", [0, 1, 1, 1] + [0, 0, 0, 0])
    result = evaluate(replace(CONFIG, judge="judge"), token, two_guides, judge, "cat", folder)
    arms = result["prompts"][0]["arms"]
    assert (arms["token"]["guide"]["accuracy"], arms["token"]["judge"]["accuracy"]) == (0.5, 0.75)
    assert result["prompts"][0]["paired"]["judge"]["only_with"] == 3
    assert (folder.eval_images / "token_0000_right.png").exists()  # where the judge alone is against it


def drawn(path, keep: str, number: int, token) -> Dataset:
    """A data set under two guides, and what these say of its images."""
    guides = [told("one", [1, 1, 0, 1, 0, 1]), told("two", [1, 0, 1, 1, 0, 1], target=1)]
    dataset = Dataset(path, guides, None, {"token": fingerprint(token.vector)})
    settings = RunConfig(num_inference_steps=2).sampler
    dataset.fill(token, "cat", number, settings, batch_size=2, only_correct=keep == "correct")
    return dataset


def rows_of(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_data_set_keeps_only_what_all_guides_call_right(token, tmp_path):
    dataset = drawn(tmp_path, "correct", 3, token)
    assert [row["seed"] - DATASET_BASE for row in dataset.rows] == [0, 3, 5]
    assert {row["guide"] for row in rows_of(tmp_path / "metadata.jsonl")} == {"right"}
    thrown = rows_of(tmp_path / "thrown_away.jsonl")
    assert [(row["seed"] - DATASET_BASE, row["guide"]) for row in thrown] == [
        (1, "wrong"),
        (2, "wrong"),
        (4, "wrong"),
    ]


def test_the_verdict_in_a_data_sets_row_is_that_of_all_guides(token, tmp_path):
    drawn(tmp_path, "all", 5, token)
    rows = rows_of(tmp_path / "metadata.jsonl")
    assert [row["guide"] for row in rows] == ["right", "wrong", "wrong", "right", "wrong"]
    assert {row["label"] for row in rows} == {"cat"}


@pytest.mark.parametrize(
    ("guides", "judge"),
    [
        (["miniature"], "miniature-judge"),
        (["miniature", "miniature-judge2"], "miniature-judge"),
        (["miniature", "miniature-judge"], None),
        (["miniature-judge", "miniature"], None),  # the first guide brings none
        (["inet", "timm:convnext_base.fb_in22k_ft_in1k"], None),
    ],
)
def test_the_default_judge_is_the_first_guides_unless_it_guides_itself(guides, judge):
    sources = Sources(RunConfig(classifier=",".join(guides), device="cpu"))
    assert sources.guides == guides
    assert sources.judge == judge


def test_a_plan_whose_default_judge_guides_has_none_and_counts_the_second_guide(tmp_path):
    guides = "miniature,miniature-judge"
    config = RunConfig(class_index=2, model="miniature", classifier=guides, train=True, evaluate=True)
    config = replace(config, device="cpu", output_path=str(tmp_path))
    sources = Sources(config)
    plan = make_plan(config, sources)
    assert (plan.judge, plan.judge_target, plan.config.judge) == (None, None, "none")
    assert list(plan.guides) == ["miniature", "miniature-judge"]
    assert sources.size.others == 0.608e9  # bytes of one more classifier


def test_an_evaluation_on_disk_says_that_nothing_judged(token, folder, two_guides):
    evaluate(replace(CONFIG, judge="none"), token, two_guides, None, "cat", folder)
    result = read_json(folder.result)
    assert result["judge"] is None
    assert result["prompts"][0]["arms"]["token"]["judge"] is None
    assert result["features"] == "one"
