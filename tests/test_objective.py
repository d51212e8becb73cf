"""How images of a class are sampled and scored in training, on tiny fakes."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import SHORT_TRAINING, learning, tiny_classifier

from config import with_preset
from discriminative.guides.classifier import Guide
from discriminative.seeds import evaluation_seeds, training_seeds, turn, validation_seeds
from discriminative.tokens import batch
from discriminative.tokens.batch import token_gradient
from discriminative.tokens.curriculum import Score
from discriminative.tokens.objective import FINAL_SIZE, Objective, counted

IDLE = torch.amp.GradScaler("cpu", enabled=False)
CONFIG = learning()


def test_micro_batches_add_up_to_the_whole_batch(token, guides):
    gradients = []
    for batch_size in (4, 3, 1):
        token.vector.grad = None
        objective = Objective(learning(batch_size=batch_size), token, guides, "tiger cat")
        images, losses, _, _ = objective.accumulate(0, IDLE)
        assert images.shape == (4, 3, 16, 16)
        assert losses.shape == (4,)
        gradients.append(token.vector.grad.clone())
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-7)
    torch.testing.assert_close(gradients[2], gradients[0], rtol=1e-3, atol=1e-7)


def test_an_update_has_the_gradient_of_its_images_mean_loss(token, guides):
    """However many there are; a scaled loss has a scaled gradient."""
    settings = learning(images_per_update=3, jump_at="0.5")
    objective = Objective(settings, token, guides, "tiger cat")
    path, sampler = objective.stages[0]
    seeds = training_seeds(settings.seed, 0, 3)
    plain = [
        token_gradient(
            token, [prompt], [seed], sampler, path, lambda x, _: objective.class_loss(x), 1.0
        ).gradient
        for prompt, seed in zip(objective.prompts(0), seeds, strict=True)
    ]
    objective.accumulate(0, IDLE)
    mean = sum(plain) / 3
    torch.testing.assert_close(token.vector.grad, mean, rtol=1e-3, atol=1e-7)
    token.vector.grad = None
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.zeros(()))  # only this makes its state
    objective.accumulate(0, scaler)
    torch.testing.assert_close(token.vector.grad, 8 * mean, rtol=1e-3, atol=1e-6)


def test_a_stage_has_its_own_trajectory(token, guides, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        "discriminative.tokens.batch.token_gradients", lambda *args: drawn.append(args[3:5]) or 1 / 0
    )
    objective = Objective(learning(jump_at="0@2;0.5", training_sampler="dpmsolver++@3"), token, guides, "cat")
    for stage in (0, 1):
        with pytest.raises(ZeroDivisionError):
            objective.accumulate(0, IDLE, stage)
    assert [(settings.num_inference_steps, path.place) for settings, path in drawn] == [(2, 0.0), (3, 0.5)]


@pytest.mark.parametrize(
    ("changes", "scheduler", "steps"),
    [
        ({}, "dpmsolver++", 12),
        ({"training_sampler": "ddim@5"}, "ddim", 5),
        ({"training_sampler": "ddim"}, "ddim", 4),
        ({"training_sampler": "same@5"}, None, 5),
        ({"training_sampler": "same"}, None, 4),
    ],
)
def test_training_draws_with_its_own_sampler_and_evaluation_with_the_models(
    token, guides, monkeypatch, changes, scheduler, steps
):
    drawn = []
    monkeypatch.setattr(
        batch,
        "draw",
        lambda tokens, prompts, seeds, settings: drawn.append(settings) or torch.rand(3, 3, 16, 16),
    )
    settings = learning(**{"training_sampler": "dpmsolver++@12", "confirm_size": 0} | changes)
    objective = Objective(settings, token, guides, "cat")
    objective.validate()
    used = {(s.scheduler, s.num_inference_steps, s.guidance_scale) for s in drawn}
    assert used == {(scheduler, steps, SHORT_TRAINING.guidance_scale)}
    trajectories = {(s.scheduler, s.num_inference_steps) for _, s in objective.stages}
    assert trajectories >= {(scheduler, 8)}  # the first stage, "0@8"
    evaluation = replace(SHORT_TRAINING, **changes).sampler
    assert (evaluation.scheduler, evaluation.num_inference_steps) == (None, 4)


def test_most_of_the_validation_has_the_prompt_of_the_evaluation(token, guides, monkeypatch):
    prompts = []
    monkeypatch.setattr(
        batch,
        "draw",
        lambda tokens, drawn, seeds, settings: prompts.extend(drawn[0]) or torch.rand(len(seeds), 3, 16, 16),
    )
    settings = learning(validation_size=12, confirm_size=0, eval_batch_size=5)
    Objective(settings, token, guides, "cat").validate()
    assert len(prompts) == 12
    assert prompts.count("A photo of newclas cat") == 8
    assert len(set(prompts)) == 3


def test_the_images_that_are_followed_are_those_of_the_first_noises(token, guides):
    """In however many batches, and parts, the validation is sampled."""
    settings = learning(validation_size=8, confirm_size=8, eval_batch_size=4)
    objective = Objective(settings, token, guides, "cat")
    objective.validate(beats=-math.inf)
    assert objective.images == 16
    first = token.sample(objective.validation_prompts[:3], validation_seeds(3), settings.sampler)
    torch.testing.assert_close(objective.first_images, first, rtol=1e-4, atol=1e-5)


def test_how_sure_the_guide_is_is_told_of_all_first_images_by_the_least_sure_guide(token, guides):
    settings = learning(validation_size=8, confirm_size=0, eval_batch_size=3)
    objective = Objective(settings, token, guides * 2, "cat")
    assert objective.sureness() == 0
    objective.validate()
    images = torch.cat(objective.first_batches)
    assert len(images) == 8
    with torch.no_grad():
        own = guides[0].classifier.logits(images).softmax(1).amax(1).median().item()
    assert objective.sureness() == pytest.approx(own)
    other = SimpleNamespace(classifier=SimpleNamespace(logits=lambda images: torch.zeros(len(images), 50)))
    objective.guides = [*guides, other]
    assert objective.sureness() == pytest.approx(1 / 50)


def test_a_validation_gives_the_class_log_probability_image_by_image(token, guides):
    """In the noises' order, in however many batches and parts: two tokens are compared noise by noise."""
    settings = learning(validation_size=4, confirm_size=4, eval_batch_size=3)
    objective = Objective(settings, token, guides, "cat")
    found = objective.validate(beats=-math.inf).log_probabilities
    prompts = [objective.validation_prompts[i % 6] for i in range(8)]
    images = token.sample(prompts, validation_seeds(8), settings.sampler)
    losses, _ = objective.class_loss(images)
    assert found == pytest.approx([-loss for loss in losses.tolist()], rel=1e-3)
    assert len(set(found)) == 8


def compared(monkeypatch, objective: Objective, vector, other) -> tuple[list[float], list[tuple]]:
    """The gains of one token over another, and what was drawn for them: the vector, prompts and seeds."""
    drawn = []
    draw = batch.draw

    def noted(tokens, prompts, seeds, settings):
        drawn.append((tokens[0].vector.detach().clone(), prompts[0], seeds))
        return draw(tokens, prompts, seeds, settings)

    with monkeypatch.context() as patch:
        patch.setattr(batch, "draw", noted)
        return objective.compare(vector, other), drawn


def test_two_tokens_are_compared_on_the_same_noises_and_prompts(token, guides, monkeypatch):
    vector, other = (token.start_vector(word, "cat") for word in ("tiger", "a"))
    objective = Objective(learning(eval_batch_size=20), token, guides, "cat")
    gains, drawn = compared(monkeypatch, objective, vector, other)
    of_vector, of_other = (
        [(prompts, seeds) for tried, prompts, seeds in drawn if torch.equal(tried, asked)]
        for asked in (vector, other)
    )
    assert of_vector == of_other
    assert len(of_vector) + len(of_other) == len(drawn)
    assert sum(len(seeds) for _, seeds in of_vector) == len(gains) == FINAL_SIZE
    assert objective.images == 2 * FINAL_SIZE


@pytest.mark.parametrize("sizes", [{}, {"validation_size": 4, "confirm_size": 0}])
def test_two_tokens_are_compared_on_noises_that_nothing_was_chosen_on(token, guides, monkeypatch, sizes):
    """The best of many validations was lucky on its noises, and would be sure of a gain that is none."""
    objective = Objective(learning(eval_batch_size=99, **sizes), token, guides, "cat")
    drawn = []
    score_seeds = Objective.score_seeds
    monkeypatch.setattr(
        Objective, "score_seeds", lambda self, seeds: drawn.extend(seeds) or score_seeds(self, seeds)
    )
    objective.validate(beats=-math.inf)
    validated = set(drawn)
    validation = objective.settings.validation
    assert len(validated) == validation.validation_size + validation.confirm_size
    drawn.clear()
    vector = token.vector.detach().clone()
    objective.compare(vector, vector)
    assert len(set(drawn)) == FINAL_SIZE
    assert not validated & set(drawn)
    trained = [s for update in range(300) for s in training_seeds(objective.settings.seed, update, 4)]
    assert not set(drawn) & {*trained, *evaluation_seeds(1000)}


def test_a_gain_is_how_much_more_probable_the_class_is_with_the_first_token(token, guides, monkeypatch):
    vector, other = (token.start_vector(word, "cat") for word in ("tiger", "a"))
    objective = Objective(learning(eval_batch_size=36), token, guides, "cat")
    gains, drawn = compared(monkeypatch, objective, vector, other)
    assert torch.equal(token.vector.detach(), vector)  # it is left as the first
    log_probabilities = []
    for tried in (vector, other):
        token.load(tried)
        _, prompts, seeds = drawn[0]
        losses, _ = objective.class_loss(token.sample(prompts, seeds, objective.settings.sampler))
        log_probabilities.append(-losses)
    assert gains == pytest.approx((log_probabilities[0] - log_probabilities[1]).tolist(), abs=1e-4)
    assert any(abs(gain) > 1e-3 for gain in gains)
    assert objective.compare(other, vector) == pytest.approx([-gain for gain in gains], abs=1e-6)
    assert objective.compare(vector, vector) == [0.0] * FINAL_SIZE


def test_a_comparison_changes_nothing_that_training_goes_by(token, guides):
    """Neither which prompts fail nor the images that are followed."""
    objective = Objective(learning(), token, guides, "cat")
    objective.validate()
    wrong, images = dict(objective.wrong), objective.first_images.clone()
    objective.compare(token.start_vector("tiger", "cat"), token.start_vector("a", "cat"))
    assert objective.wrong == wrong
    assert torch.equal(objective.first_images, images)
    assert token.vector.grad is None


def test_prompts_that_fail_are_trained_more(token, guides):
    objective = Objective(learning(images_per_update=30), token, guides, "cat")
    assert [objective.prompts(0).count(t) for t in objective.templates] == [10, 10, 10]
    objective.wrong = dict(zip(objective.templates, (0.9, 0.0, 0.0), strict=True))
    counts = [[objective.prompts(epoch).count(t) for t in objective.templates] for epoch in range(20)]
    first, *others = (sum(c) for c in zip(*counts, strict=True))
    assert first > 3 * max(others)
    assert min(others) > 0
    assert objective.prompts(3) == objective.prompts(3)


def test_a_validation_tells_which_prompts_fail(token, guides, monkeypatch):
    monkeypatch.setattr(
        Objective, "class_loss", lambda self, images: (torch.ones(4), torch.tensor([False, True, True, True]))
    )
    objective = Objective(
        learning(validation_size=8, confirm_size=0, eval_batch_size=4), token, guides, "cat"
    )
    assert objective.validate() == Score(0.75, (-1.0,) * 8)
    assert list(objective.wrong.values()) == [pytest.approx(1 / 3), 0.0, 0.0]


def test_a_prompt_that_a_small_validation_leaves_out_is_trained_as_the_others(token, guides, monkeypatch):
    """And the parts of a validation go on in the prompts' order."""
    monkeypatch.setattr(
        Objective, "class_loss", lambda self, images: (torch.ones(4), torch.tensor([False, True, True, True]))
    )
    objective = Objective(
        learning(validation_size=4, confirm_size=0, eval_batch_size=4), token, guides, "cat"
    )
    objective.validate()
    assert list(objective.wrong.values()) == [pytest.approx(1 / 3), 0.0, pytest.approx(1 / 4)]
    objective = Objective(
        learning(validation_size=4, confirm_size=4, eval_batch_size=4), token, guides, "cat"
    )
    objective.validate(beats=0.0)
    assert list(objective.wrong.values()) == [pytest.approx(1 / 3), 0.0, 0.0]


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
    """Twelve images of a class that is drawn right four times in five are all right now and then.

    Here one of nine may be wrong.
    """
    drawn = []

    def score(self, images):
        right = torch.tensor([i >= wrong[len(drawn)] for i in range(len(images))])
        drawn.append(len(images))
        return torch.ones(len(images)), right

    monkeypatch.setattr(Objective, "class_loss", score)
    settings = learning(validation_size=3, confirm_size=6, eval_batch_size=9, stop_validation_accuracy=0.88)
    objective = Objective(settings, token, guides, "cat")
    assert objective.validate() == Score(pytest.approx(accuracy), (-1.0,) * drawn_in_all)
    assert sum(drawn) == drawn_in_all
    drawn.clear()
    assert objective.validate(beats=-math.inf) == Score(pytest.approx(1 - sum(wrong) / 9), (-1.0,) * 9)


@pytest.mark.parametrize(("beats", "drawn_in_all"), [(0.8, 3), (0.6, 6), (0.5, 9)])
def test_a_token_that_would_be_the_best_is_drawn_on(token, guides, monkeypatch, beats, drawn_in_all):
    """Of each three images two are right, then one, then all: .67, .5, .67; none of it can end a training."""
    drawn = []
    right = iter([(1, 1, 0), (1, 0, 0), (1, 1, 1)] if beats == 0.6 else [(1, 1, 0)] * 3)
    monkeypatch.setattr(
        Objective,
        "class_loss",
        lambda self, images: (drawn.append(3), (torch.ones(3), torch.tensor(next(right)).bool()))[1],
    )
    settings = learning(validation_size=3, confirm_size=6, eval_batch_size=9, stop_validation_accuracy=1.0)
    Objective(settings, token, guides, "cat").validate(beats=beats)
    assert sum(drawn) == drawn_in_all


def test_a_validation_that_can_just_end_the_training_is_confirmed(token, guides, monkeypatch):
    """One wrong image of ten is .9, not less by a rounding."""
    drawn = []
    monkeypatch.setattr(
        Objective,
        "class_loss",
        lambda self, images: (drawn.append(1), (torch.ones(1), torch.tensor([len(drawn) > 1])))[1],
    )
    settings = learning(validation_size=1, confirm_size=9, eval_batch_size=1, stop_validation_accuracy=0.9)
    assert Objective(settings, token, guides, "cat").validate() == Score(0.9, (-1.0,) * 10)


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
        Objective,
        "class_loss",
        lambda self, images: (torch.tensor([0.1, 0.1, 0.1, 0.7]), torch.ones(4).bool()),
    )
    settings = learning(validation_size=8, confirm_size=0, eval_batch_size=4, validation_certainty=certainty)
    objective = Objective(settings, token, guides, "cat")
    assert objective.validate() == Score(share, pytest.approx((-0.1, -0.1, -0.1, -0.7) * 2))
    assert set(objective.wrong.values()) == {0.0}


def test_several_guides_have_the_gradient_of_their_mean_loss(token):
    """The second knows the class under another index."""
    first = Guide(tiny_classifier(), 0)
    second = Guide(replace(tiny_classifier(), labels=["bat", "cat", "tiger cat"]), 2)
    gradients = []
    losses = []
    for guides in ([first], [second], [first, second]):
        token.vector.grad = None
        losses.append(Objective(CONFIG, token, guides, "tiger cat").accumulate(0, IDLE)[1])
        gradients.append(token.vector.grad.clone())
    torch.testing.assert_close(losses[2], (losses[0] + losses[1]) / 2)
    torch.testing.assert_close(gradients[2], (gradients[0] + gradients[1]) / 2, rtol=1e-3, atol=1e-7)


def test_an_image_is_right_where_every_guide_says_so(token):
    images = torch.rand(24, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    each = [Guide(tiny_classifier(), target) for target in (1, 2)]
    singly = [Objective(CONFIG, token, [g], "cat").class_loss(images)[1] for g in each]
    assert singly[0].any()
    assert singly[1].any()
    assert not Objective(CONFIG, token, each, "cat").class_loss(images)[1].any()  # no image is of two classes


def test_seeds_of_training_validation_and_evaluation_never_meet():
    for preset in ("default", "paper"):
        for seed in (0, 35):
            config = with_preset(preset, {"seed": seed, "test_size": 1000})
            settings = config.learning(validation_size=1000)
            number = settings.images_per_update
            updates = [turn(epoch, settings.noise_pool) for epoch in range(1000)]
            trained = {s for update in updates for s in training_seeds(settings.seed, update, number)}
            validation = settings.validation
            drawn = validation.validation_size + validation.confirm_size
            validated = set(validation_seeds(drawn + FINAL_SIZE))  # the kept token's comparison too
            evaluated = set(evaluation_seeds(config.test_size))
            assert len(trained) == (5 if settings.noise_pool else 5000)
            assert (len(validated), len(evaluated)) == (1072, 1000)
            assert not trained & validated
            assert not trained & evaluated
            assert not validated & evaluated


def test_noises_come_back_with_their_prompts(token, guides):
    settings = learning(images_per_update=2, noise_pool=3)
    seeds = [training_seeds(settings.seed, turn(epoch, 3), 2) for epoch in range(6)]
    assert seeds[:3] == seeds[3:]
    assert len({s for pair in seeds for s in pair}) == 6
    objective = Objective(settings, token, guides, "cat")
    assert [objective.turn(epoch) for epoch in range(6)] == [0, 1, 2, 0, 1, 2]
    prompts = [objective.prompts(epoch) for epoch in range(6)]
    assert prompts[:3] == prompts[3:]
    objective.wrong = dict(zip(objective.templates, (0.5, 0.5, 0.5), strict=True))
    prompts = [objective.prompts(epoch) for epoch in range(30)]
    assert prompts[:3] * 10 == prompts


def test_augmented_images_are_what_the_guide_sees_in_training_alone(token, guides, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "discriminative.tokens.batch.augmented", lambda images, seeds: seen.append(seeds) or images
    )
    objective = Objective(learning(augment=True, batch_size=3), token, guides, "cat")
    objective.accumulate(0, IDLE)
    assert seen == [training_seeds(CONFIG.seed, 0, 4)[:3], training_seeds(CONFIG.seed, 0, 4)[3:]]
    objective.validate()
    assert len(seen) == 2
