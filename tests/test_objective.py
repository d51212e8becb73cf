"""How images of a class are drawn and scored in training, on tiny fakes."""

import math
from dataclasses import replace

import pytest
import torch
from conftest import SHORT_TRAINING as CONFIG
from conftest import tiny_classifier

from config import with_preset
from discriminative.guides.classifier import Guide
from discriminative.seeds import evaluation_seeds, training_seeds, turn, validation_seeds
from discriminative.tokens.class_token import ClassToken
from discriminative.tokens.objective import Task, counted, sampler_settings

IDLE = torch.amp.GradScaler("cpu", enabled=False)


def test_micro_batches_add_up_to_the_whole_batch(token, guides):
    gradients = []
    for batch_size in (4, 3, 1):
        token.vector.grad = None
        task = Task(replace(CONFIG, batch_size=batch_size), token, guides, "tiger cat")
        images, losses, _, _ = task.accumulate(0, IDLE)
        assert images.shape == (4, 3, 16, 16)
        assert losses.shape == (4,)
        gradients.append(token.vector.grad.clone())
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-7)
    torch.testing.assert_close(gradients[2], gradients[0], rtol=1e-3, atol=1e-7)


def test_a_stage_has_its_own_trajectory(token, guides, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        "discriminative.tokens.objective.token_gradients", lambda *args: drawn.append(args[3:5]) or 1 / 0
    )
    task = Task(replace(CONFIG, jump_at="0@2;0.5", training_steps=3), token, guides, "cat")
    for stage in (0, 1):
        with pytest.raises(ZeroDivisionError):
            task.accumulate(0, IDLE, stage)
    assert [(settings.num_inference_steps, path.at) for settings, path in drawn] == [(2, (0.0,)), (3, (0.5,))]


@pytest.mark.parametrize(
    ("changes", "scheduler", "steps"),
    [
        ({}, "dpmsolver++", 12),
        ({"training_scheduler": "ddim", "training_steps": 5}, "ddim", 5),
        ({"training_scheduler": "same", "training_steps": 0}, None, 4),
    ],
)
def test_training_draws_with_its_own_sampler_and_evaluation_with_the_models(
    token, guides, monkeypatch, changes, scheduler, steps
):
    drawn = []
    monkeypatch.setattr(
        ClassToken,
        "sample",
        lambda token, prompts, seeds, settings: drawn.append(settings) or torch.rand(3, 3, 16, 16),
    )
    config = replace(CONFIG, training_scheduler="dpmsolver++", training_steps=12, confirm_size=0)
    task = Task(replace(config, **changes), token, guides, "cat")
    task.validate()
    assert {(s.scheduler, s.num_inference_steps, s.guidance_scale) for s in drawn} == {
        (scheduler, steps, config.guidance_scale)
    }
    assert {(s.scheduler, s.num_inference_steps) for _, s in task.stages} >= {
        (scheduler, 8)
    }  # the first stage, "0@8"
    assert (sampler_settings(config).scheduler, sampler_settings(config).num_inference_steps) == (None, 4)


@pytest.mark.parametrize(
    ("interval", "end", "expected"),
    [("0,1", 0.5, (0, 0.5)), ("0.1,0.3", 0.5, (0.1, 0.3)), ("0.1,0.8", 1.0, (0.1, 0.8))],
)
def test_guidance_ends_sooner_in_a_validation_alone(token, guides, monkeypatch, interval, end, expected):
    drawn = []
    monkeypatch.setattr(
        ClassToken,
        "sample",
        lambda token, prompts, seeds, settings: drawn.append(settings) or torch.rand(3, 3, 16, 16),
    )
    config = replace(CONFIG, guidance_interval=interval, validation_guidance_end=end)
    task = Task(config, token, guides, "cat")
    task.validate()
    assert {s.guidance_interval for s in drawn} == {expected}
    whole = sampler_settings(config).guidance_interval
    assert (
        {s.guidance_interval for _, s in task.stages}
        == {whole}
        == {tuple(float(x) for x in interval.split(","))}
    )


def test_most_of_the_validation_has_the_prompt_of_the_evaluation(token, guides, monkeypatch):
    prompts = []
    monkeypatch.setattr(
        ClassToken,
        "sample",
        lambda token, drawn, seeds, settings: prompts.extend(drawn) or torch.rand(len(seeds), 3, 16, 16),
    )
    Task(
        replace(CONFIG, validation_size=12, confirm_size=0, eval_batch_size=5), token, guides, "cat"
    ).validate()
    assert len(prompts) == 12
    assert prompts.count("A photo of newclas cat") == 8
    assert len(set(prompts)) == 3


def test_prompts_that_fail_are_trained_more(token, guides):
    task = Task(replace(CONFIG, images_per_update=30), token, guides, "cat")
    assert [task.prompts(0).count(t) for t in task.templates] == [10, 10, 10]
    task.wrong = dict(zip(task.templates, (0.9, 0.0, 0.0), strict=True))
    counts = [[task.prompts(epoch).count(t) for t in task.templates] for epoch in range(20)]
    first, *others = (sum(c) for c in zip(*counts, strict=True))
    assert first > 3 * max(others)
    assert min(others) > 0
    assert task.prompts(3) == task.prompts(3)


def test_a_validation_tells_which_prompts_fail(token, guides, monkeypatch):
    monkeypatch.setattr(
        Task, "score", lambda self, images: (torch.ones(4), torch.tensor([False, True, True, True]))
    )
    task = Task(replace(CONFIG, validation_size=8, confirm_size=0, eval_batch_size=4), token, guides, "cat")
    assert task.validate() == (0.75, -1.0)
    assert list(task.wrong.values()) == [pytest.approx(1 / 3), 0.0, 0.0]


def test_a_prompt_that_a_small_validation_leaves_out_is_trained_as_the_others(token, guides, monkeypatch):
    """And the parts of a validation go on in the prompts' order."""
    monkeypatch.setattr(
        Task, "score", lambda self, images: (torch.ones(4), torch.tensor([False, True, True, True]))
    )
    task = Task(replace(CONFIG, validation_size=4, confirm_size=0, eval_batch_size=4), token, guides, "cat")
    task.validate()
    assert list(task.wrong.values()) == [pytest.approx(1 / 3), 0.0, pytest.approx(1 / 4)]
    task = Task(replace(CONFIG, validation_size=4, confirm_size=4, eval_batch_size=4), token, guides, "cat")
    task.validate(beats=0.0)
    assert list(task.wrong.values()) == [pytest.approx(1 / 3), 0.0, 0.0]


@pytest.mark.parametrize(
    ("wrong", "drawn_in_all", "accuracy"),
    [
        ((0, 0, 0), 9, 1.0),
        ((1, 0, 0), 9, 8 / 9),
        ((1, 1, 0), 6, 4 / 6),
        ((0, 2, 0), 6, 4 / 6),
        ((2, 0, 0), 3, 1 / 3),
    ],
)
def test_a_lucky_validation_is_confirmed_before_it_ends_the_training(
    token, guides, monkeypatch, wrong, drawn_in_all, accuracy
):
    """Twelve images of a class that is drawn right four times in five are all right now and then. Here one of nine may be wrong."""
    drawn = []

    def score(self, images):
        right = torch.tensor([i >= wrong[len(drawn)] for i in range(len(images))])
        drawn.append(len(images))
        return torch.ones(len(images)), right

    monkeypatch.setattr(Task, "score", score)
    config = replace(
        CONFIG, validation_size=3, confirm_size=6, eval_batch_size=9, stop_validation_accuracy=0.88
    )
    task = Task(config, token, guides, "cat")
    assert task.validate() == (pytest.approx(accuracy), -1.0)
    assert sum(drawn) == drawn_in_all
    drawn.clear()
    assert task.validate(beats=-math.inf) == (pytest.approx(1 - sum(wrong) / 9), -1.0)


@pytest.mark.parametrize(("beats", "drawn_in_all"), [(0.8, 3), (0.6, 6), (0.5, 9)])
def test_a_token_that_would_be_the_best_is_drawn_on(token, guides, monkeypatch, beats, drawn_in_all):
    """Of each three images two are right, then one, then all: .67, .5, .67; none of it can end a training."""
    drawn, right = [], iter([(1, 1, 0), (1, 0, 0), (1, 1, 1)] if beats == 0.6 else [(1, 1, 0)] * 3)
    monkeypatch.setattr(
        Task,
        "score",
        lambda self, images: (drawn.append(3), (torch.ones(3), torch.tensor(next(right)).bool()))[1],
    )
    config = replace(
        CONFIG, validation_size=3, confirm_size=6, eval_batch_size=9, stop_validation_accuracy=1.0
    )
    Task(config, token, guides, "cat").validate(beats=beats)
    assert sum(drawn) == drawn_in_all


def test_a_validation_that_can_just_end_the_training_is_confirmed(token, guides, monkeypatch):
    """One wrong image of ten is .9, not less by a rounding."""
    drawn = []
    monkeypatch.setattr(
        Task,
        "score",
        lambda self, images: (drawn.append(1), (torch.ones(1), torch.tensor([len(drawn) > 1])))[1],
    )
    config = replace(
        CONFIG, validation_size=1, confirm_size=9, eval_batch_size=1, stop_validation_accuracy=0.9
    )
    assert Task(config, token, guides, "cat").validate() == (0.9, -1.0)


@pytest.mark.parametrize("sure", [1.0, 0.5])
def test_of_right_images_those_count_that_the_guide_is_as_sure_of_as_of_most(sure):
    """However sure a guide is of anything: the bar follows the median of the right ones."""
    losses = [-math.log(sure * p) for p in (0.9, 0.92, 0.65, 0.6, 0.99, 0.94)]
    right = [True, True, True, True, False, True]  # the median of these is .9
    assert counted(losses, right, 0.7) == [True, True, True, False, False, True]
    assert counted(losses, right, 0.0) == right
    assert counted(losses, [False] * 6, 0.7) == [False] * 6


@pytest.mark.parametrize(("certainty", "share"), [(0.7, 0.75), (0.0, 1.0)])
def test_a_blend_does_not_end_a_training_nor_draw_more_prompts(token, guides, monkeypatch, certainty, share):
    monkeypatch.setattr(
        Task, "score", lambda self, images: (torch.tensor([0.1, 0.1, 0.1, 0.7]), torch.ones(4).bool())
    )
    config = replace(
        CONFIG, validation_size=8, confirm_size=0, eval_batch_size=4, validation_certainty=certainty
    )
    task = Task(config, token, guides, "cat")
    assert task.validate() == (share, pytest.approx(-0.25))
    assert set(task.wrong.values()) == {0.0}


def test_several_guides_have_the_gradient_of_their_mean_loss(token):
    """The second knows the class under another index."""
    first, second = (
        Guide(tiny_classifier(), 0),
        Guide(replace(tiny_classifier(), labels=["bat", "cat", "tiger cat"]), 2),
    )
    gradients, losses = [], []
    for guides in ([first], [second], [first, second]):
        token.vector.grad = None
        losses.append(Task(CONFIG, token, guides, "tiger cat").accumulate(0, IDLE)[1])
        gradients.append(token.vector.grad.clone())
    torch.testing.assert_close(losses[2], (losses[0] + losses[1]) / 2)
    torch.testing.assert_close(gradients[2], (gradients[0] + gradients[1]) / 2, rtol=1e-3, atol=1e-7)


def test_an_image_is_right_where_every_guide_says_so(token):
    images = torch.rand(24, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    each = [Guide(tiny_classifier(), target) for target in (1, 2)]
    singly = [Task(CONFIG, token, [g], "cat").score(images)[1] for g in each]
    assert singly[0].any()
    assert singly[1].any()
    assert not Task(CONFIG, token, each, "cat").score(images)[1].any()  # no image is of two classes


def test_seeds_of_training_validation_and_evaluation_never_meet():
    for preset in ("default", "paper"):
        for seed in (0, 35):
            config = with_preset(preset, {"seed": seed, "test_size": 1000, "validation_size": 1000})
            trained = {
                s
                for epoch in range(1000)
                for s in training_seeds(config.seed, turn(epoch, config.noise_pool), config.images_per_update)
            }
            assert len(trained) == (5 if config.noise_pool else 5000)
            assert not trained & set(validation_seeds(config.validation_size + config.confirm_size))
            assert not trained & set(evaluation_seeds(config.test_size))
            assert not set(validation_seeds(config.validation_size + config.confirm_size)) & set(
                evaluation_seeds(config.test_size)
            )


def test_noises_come_back_with_their_prompts(token, guides):
    config = replace(CONFIG, images_per_update=2, noise_pool=3)
    seeds = [training_seeds(config.seed, turn(epoch, 3), 2) for epoch in range(6)]
    assert seeds[:3] == seeds[3:]
    assert len({s for pair in seeds for s in pair}) == 6
    task = Task(config, token, guides, "cat")
    assert [task.prompts(epoch) for epoch in range(3)] == [task.prompts(epoch) for epoch in range(3, 6)]


def test_updates_that_share_a_trajectory_share_noises_and_prompts(token, guides):
    """And walk it once: of the steps without gradient the second update runs none."""
    config, sizes = (
        replace(CONFIG, images_per_update=2, reuse_trajectory=2, jump_at="0.5", choose_by="loss"),
        [],
    )
    task = Task(config, token, guides, "cat")
    handle = token.models.unet.register_forward_hook(lambda m, args, out: sizes.append(len(args[0])))
    for epoch in range(3):
        task.accumulate(epoch, IDLE)
    handle.remove()
    step = [2, 2]  # with gradient the two halves run one after the other
    assert sizes == [4, 4, *step, *step, 4, 4, *step]


def test_augmented_images_are_what_the_guide_sees_in_training_alone(token, guides, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "discriminative.tokens.objective.augmented", lambda images, seeds: seen.append(seeds) or images
    )
    task = Task(replace(CONFIG, augment=True, batch_size=3), token, guides, "cat")
    task.accumulate(0, IDLE)
    assert seen == [training_seeds(CONFIG.seed, 0, 4)[:3], training_seeds(CONFIG.seed, 0, 4)[3:]]
    task.validate()
    assert len(seen) == 2
