"""Numbers that are expected from a table or logits made by hand, not from the code that they check."""

import math

import conftest
import pytest
import torch
from conftest import learned, learning, tiny_models

from config import RunConfig
from discriminative.diffusion import gradients
from discriminative.diffusion.sampler import draw_noise, sample
from discriminative.guides.classifier import Classifier, Guide
from discriminative.seeds import evaluation_seeds, training_seeds, validation_seeds
from discriminative.tokens import batch, class_token
from discriminative.tokens.class_token import ClassToken
from discriminative.tokens.objective import Objective
from evaluate import Seen, evaluate

WIDTH = 16  # of the tiny text encoder's embeddings


def with_norms(models) -> tuple[int, float]:
    """Give the V words embeddings of the norms 1 to V, shuffled; returns V and what nine tenths are below."""
    table = models.text_encoder.get_input_embeddings().weight
    number = len(table)
    norms = torch.randperm(number, generator=torch.Generator().manual_seed(0)).float() + 1
    directions = torch.randn(number, WIDTH, generator=torch.Generator().manual_seed(1))
    table.data.copy_(directions / directions.norm(dim=1, keepdim=True) * norms[:, None])
    return number, 1 + 0.9 * (number - 1)


@pytest.fixture
def known():
    """A token among words of known norms, and the norm that a word is taken to have."""
    models = tiny_models()
    _, norm = with_norms(models)
    return ClassToken(models, "newclas", "a"), norm


def test_a_words_norm_is_what_nine_tenths_of_the_vocabulary_are_below(known):
    token, norm = known
    assert token.word_norm == pytest.approx(norm, rel=1e-5)
    assert token.word_rms == pytest.approx(norm / 4, rel=1e-5)  # of 16 numbers


def test_a_long_token_is_cut_to_so_many_words_and_a_short_one_is_left(known):
    models = tiny_models()
    _, norm = with_norms(models)
    token = ClassToken(models, "newclas", "a", 2)
    token.load(torch.stack([torch.full((WIDTH,), 100 * norm), torch.full((WIDTH,), norm / 4)]))
    token.bound(1.5)
    assert token.vector[0].norm().item() == pytest.approx(1.5 * norm, rel=1e-5)
    assert torch.equal(token.vector[1].detach(), torch.full((WIDTH,), norm / 4))  # whose norm is one word's
    assert token.norm() == pytest.approx(math.sqrt((1.5**2 + 1) / 2), rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"relative_rate": 0.05}, 4 * 0.05 / 4),  # four images an update; a word's norm over the root of 16
        ({"relative_rate": 0.2, "images_per_update": 1}, 0.2 / 4),
        ({"learning_rate": 0.01}, None),
    ],
)
def test_the_optimisers_step_follows_the_vocabularys_norms(tmp_path, monkeypatch, changes, words):
    norms = []
    made = conftest.tiny_models

    def models_of_known_norms():
        models = made()
        norms.append(with_norms(models)[1])
        return models

    monkeypatch.setattr(conftest, "tiny_models", models_of_known_norms)
    rates = []
    step = torch.optim.AdamW.step
    noted = lambda self: rates.append(self.param_groups[0]["lr"]) or step(self)  # noqa: E731
    monkeypatch.setattr(torch.optim.AdamW, "step", noted)
    learned(tmp_path, choose_by="loss", max_epochs=1, **changes)
    (norm,) = norms
    assert rates == [pytest.approx(0.04 if words is None else words * norm, rel=1e-5)]


def test_a_trained_token_is_as_long_as_the_bound_says(tmp_path, monkeypatch):
    norms = []
    made = conftest.tiny_models

    def models_of_known_norms():
        models = made()
        norms.append(with_norms(models)[1])
        return models

    monkeypatch.setattr(conftest, "tiny_models", models_of_known_norms)
    changes = {"learning_rate": 1000.0, "choose_by": "loss", "max_token_norm": 1.5}
    _, training = learned(tmp_path, max_epochs=1, **changes)
    (norm,) = norms
    assert training.last_vector.norm().item() == pytest.approx(1.5 * norm, rel=1e-4)
    assert training.rows[0]["token_norm"] == pytest.approx(1.5, rel=1e-4)


@pytest.fixture
def seen():
    """Four images of class 2 of seven, by logits made by hand: first, second, sixth and last of the seven."""
    logits = torch.tensor(
        [
            [0.0, 1.0, 5.0, 0.0, 0.0, 0.0, 0.0],
            [0.0, 0.0, 5.0, 6.0, 0.0, 0.0, 0.0],
            [5.0, 4.0, 1.5, 3.0, 2.0, 6.0, 0.0],
            [7.0, 6.0, 1.0, 5.0, 4.0, 3.0, 2.0],
        ]
    )
    labels = list("abcdefg")
    seen = Seen(Guide(Classifier("by hand", torch.nn.Identity(), labels, lambda images: images), 2))
    seen.keep(logits, logits)
    return seen


def test_accuracies_are_counted_as_by_hand(seen):
    figures = seen.figures()
    assert seen.right.tolist() == [True, False, False, False]
    assert figures["accuracy"] == 0.25
    assert figures["top5"] == 0.5
    assert sorted(figures["predicted"]) == [["a", 0.25], ["c", 0.25], ["d", 0.25], ["f", 0.25]]


def test_the_probability_is_the_mean_of_the_softmax(seen):
    rows = [
        math.exp(5) / (math.exp(5) + math.exp(1) + 5),
        math.exp(5) / (math.exp(5) + math.exp(6) + 5),
        math.exp(1.5) / sum(math.exp(x) for x in (5, 4, 1.5, 3, 2, 6, 0)),
        math.exp(1) / sum(math.exp(x) for x in (7, 6, 1, 5, 4, 3, 2)),
    ]
    assert seen.figures()["probability"] == pytest.approx(sum(rows) / 4, rel=1e-5)


def test_seeds_are_the_numbers_that_earlier_tokens_were_learned_with():
    config = RunConfig()
    assert training_seeds(config.seed, 0, config.images_per_update) == [
        36_000_000,
        36_000_001,
        36_000_002,
        36_000_003,
        36_000_004,
    ]
    assert training_seeds(0, 2, 5) == [1_000_010, 1_000_011, 1_000_012, 1_000_013, 1_000_014]
    assert validation_seeds(3) == [500_000, 500_001, 500_002]
    assert evaluation_seeds(3) == [0, 1, 2]


def drawn_seeds(monkeypatch) -> list[int]:
    """A list that takes every seed whose image is finished from now on."""
    seeds = []

    def noted(models, cond, uncond, of_batch, settings):
        seeds.extend(of_batch)
        return sample(models, cond, uncond, of_batch, settings)

    for module in (batch, class_token):
        monkeypatch.setattr(module, "sample", noted)
    return seeds


def test_a_validation_that_can_still_end_the_training_draws_all_of_its_seeds(token, guides, monkeypatch):
    seeds = drawn_seeds(monkeypatch)
    settings = learning(validation_size=2, confirm_size=1, stop_validation_accuracy=0.0001)
    Objective(settings, token, guides, "cat").validate()
    assert seeds == [500_000, 500_001, 500_002]


def test_an_evaluation_draws_its_seeds_once_for_each_arm(token, folder, guides, monkeypatch):
    seeds = drawn_seeds(monkeypatch)
    config = RunConfig(class_index=1, num_inference_steps=2, test_size=3)
    evaluate(config, token, guides, None, "cat", folder)
    assert seeds == [0, 1, 2] * 2


def test_updates_take_the_seeds_of_their_turn(token, guides, monkeypatch):
    seeds = []
    draw = gradients.draw_noise
    noted = lambda of_batch, *args: seeds.append(of_batch) or draw(of_batch, *args)  # noqa: E731
    monkeypatch.setattr(gradients, "draw_noise", noted)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    objective = Objective(learning(seed=0, images_per_update=2, noise_pool=2), token, guides, "cat")
    for epoch in range(4):
        objective.accumulate(epoch, scaler)
    assert seeds == [[1_000_000, 1_000_001], [1_000_002, 1_000_003]] * 2


def test_noise_is_torchs_own_of_the_seed():
    expected = torch.randn((4, 2, 3), generator=torch.Generator().manual_seed(36_000_001))
    assert torch.equal(draw_noise([36_000_000, 36_000_001], (4, 2, 3))[1], expected)
