"""Pictures of prompts: all arms share prompts and noises, and gains are told prompt by prompt.

pytest tests/test_dpt_pictures.py
"""

import json

import pytest
import torch

from discriminative.settings import SamplerSettings
from dpt import pictures
from dpt.alignment import Alignment
from dpt.choose import Choice
from dpt.correct import Correction
from dpt.data.facts import Fact, Phrase
from dpt.data.scenes import PROMPT_KINDS, Prompt
from dpt.files import add_lora, new_reader
from dpt.pictures import CORRECTED, NOISES, PLAIN, TUNED, Arm, draw_all, judge_pictures, picture_figures
from dpt.report import picture_cells
from dpt.settings import MINIATURE_ADAPTER

FEW = SamplerSettings(2, 7.0)
SEED = 0  # with it, three prompts' best pictures are not all of one round
TEXTS = ["a photo of a bat", "a frog", "two cars"]


@pytest.fixture
def reader():
    from discriminative.diffusion.models import load_models

    models = load_models("miniature", torch.device("cpu"), torch.float32)
    torch.manual_seed(SEED)  # of the adapter's first weights
    reader = new_reader(models, "up0", MINIATURE_ADAPTER, "pipeline")
    for module in (reader.adapter, reader.point):
        module.eval().requires_grad_(False)
    return reader


class Blind:
    """A detector that sees nothing, and keeps what it was shown."""

    def __init__(self):
        self.shown = []

    def things(self, images):
        self.shown.append(images)
        return [() for _ in images]


def with_lora(reader):
    for parameter in add_lora(reader.models).values():
        parameter.data.normal_(std=0.05)
        parameter.requires_grad_(False)


def judged(name, right):
    prompt = Prompt(f"a {name}", Fact((Phrase(name),)), "presence")
    return prompt, Alignment(right, right, None, None, right)


def test_an_image_follows_from_its_own_text_and_seed_whatever_the_batch(reader, monkeypatch):
    together = draw_all(reader, TEXTS, [5, 6, 7], FEW, Correction(0.0), "draw").images
    monkeypatch.setattr(pictures, "DRAWN_AT_ONCE", 2)
    apart = draw_all(reader, TEXTS, [5, 6, 7], FEW, Correction(0.0), "draw").images
    assert torch.allclose(together, apart, atol=1e-4)
    assert not torch.allclose(together[0], together[1], atol=0.1)


def test_each_image_has_the_scores_of_its_corrected_steps(reader):
    drawn = draw_all(reader, TEXTS, [1, 2, 3], FEW, Correction(0.5), "draw")
    steps = {len(one.scores) for one in drawn.kept}
    assert len(drawn.kept) == 3 and steps.pop() >= 2 and not steps
    plain = draw_all(reader, TEXTS, [1, 2, 3], FEW, Correction(0.0), "draw")
    assert [one.scores for one in plain.kept] == [[]] * 3


def test_of_several_pictures_that_is_kept_which_fits_best_as_its_own_seed_draws_it(reader):
    every = [draw_all(reader, TEXTS, [n, n + 1, n + 2], FEW, Correction(0.5), "draw") for n in (1, 4, 7)]
    choice = Choice(number=3, stride=3, timestep=200)
    best = draw_all(reader, TEXTS, [1, 2, 3], FEW, Correction(0.5), "draw", choice=choice)
    for i, (seed, scores, fits) in enumerate(best.kept):
        assert list(fits) == [i + 1, i + 4, i + 7] and len(set(fits.values())) == 3
        assert seed == max(fits, key=fits.get)
        own = every[(seed - 1) // 3]
        assert torch.equal(best.images[i], own.images[i]) and scores == own.kept[i].scores
    assert len({one.seed - i for i, one in enumerate(best.kept)}) > 1  # not all of one round
    assert [(one.seed, one.candidates) for one in every[0].kept] == [(1, {}), (2, {}), (3, {})]


def test_plain_pictures_are_those_of_the_model_before_its_lora(reader):
    """A comparison with half a LoRA in it would show half of a gain."""
    before = draw_all(reader, TEXTS, [1, 2, 3], FEW, Correction(0.0), "draw").images
    with_lora(reader)
    detector = Blind()
    arms = judge_pictures(reader, detector, 1, 1, FEW, Correction(0.5), has_lora=True)
    assert list(arms) == [PLAIN, TUNED, CORRECTED]
    texts = [prompt.text for prompt, _ in arms[PLAIN].judged]
    assert len(texts) == len(PROMPT_KINDS) * NOISES
    assert all([p for p, _ in arm.judged] == [p for p, _ in arms[PLAIN].judged] for arm in arms.values())
    assert not torch.allclose(arms[PLAIN].images, arms[TUNED].images, atol=1e-3)
    assert not torch.equal(arms[TUNED].images, arms[CORRECTED].images)
    # The LoRA is on again.
    after = draw_all(reader, TEXTS, [1, 2, 3], FEW, Correction(0.0), "draw").images
    assert not torch.allclose(before, after, atol=1e-3)
    with pictures.without_lora(reader.models):
        assert torch.equal(draw_all(reader, TEXTS, [1, 2, 3], FEW, Correction(0.0), "draw").images, before)


def test_without_lora_and_correction_there_is_one_arm(reader):
    assert list(judge_pictures(reader, Blind(), 1, 0, FEW, Correction(0.0), has_lora=False)) == [PLAIN]


def test_gains_are_of_prompts_and_not_of_pictures():
    images = torch.zeros(4, 3, 64, 64)
    plain = Arm(images, [judged("frog", 0.0), judged("frog", 1.0), judged("car", 0.0), judged("car", 0.0)])
    better = Arm(images, [judged("frog", 1.0), judged("frog", 1.0), judged("car", 0.0), judged("car", 0.0)])
    told = picture_figures({PLAIN: plain, CORRECTED: better})
    assert told["arms"][PLAIN]["all"]["full"]["share"] == 0.25
    assert told["arms"][CORRECTED]["all"]["full"]["share"] == 0.5
    gain = told["gain"][CORRECTED]
    assert (gain["share"], gain["number"], gain["pictures"]) == (0.25, 2, 4)
    assert (gain["low"], gain["high"]) == (0, 0.5)
    assert json.loads(json.dumps(told)) == told


def test_a_sheet_shows_each_prompt_once_in_all_arms():
    images = torch.rand(3, 3, 64, 64)
    found = [judged("frog", 1.0), judged("frog", 0.0), judged("car", 0.0)]
    cells = picture_cells({PLAIN: Arm(images, found), CORRECTED: Arm(images, found)})
    assert len(cells) == 2
    assert cells[0].width >= 2 * 230
