"""Measured steps: pooled gradients say where to, images of new noises which way is the best.

    pytest tests/test_measured.py

Expect all to pass within seconds: the objective is a function of the vector.
"""

from types import SimpleNamespace

import pytest
import torch
from conftest import learned, tiny_models

from discriminative.seeds import (
    MEASURING_BASE,
    SEED_RANGE,
    SEEDS_OF_A_LOOK,
    VALIDATION_BASE,
    measuring_seeds,
    training_seeds,
)
from discriminative.tokens import curriculum, measured
from discriminative.tokens.class_token import ClassToken
from discriminative.tokens.measured import HALVINGS, LENGTHS, NOISES, Pool, candidates, measured_step
from discriminative.tokens.objective import Objective


class Landscape:
    """Stands for an objective: the log-probability of a vector on a noise.

    Args:
        height: of a vector (N, width).
        luck: what a seed adds to a vector's first number.
    """

    def __init__(self, height, luck=lambda seed: 0.0, limit=0.0):
        self.token = ClassToken(tiny_models(), "newclas", "a")
        self.settings = SimpleNamespace(optimizer=SimpleNamespace(max_token_norm=limit))
        self.height = height
        self.luck = luck
        self.asked = []  # vector and seeds of each call

    def log_probabilities(self, vector, seeds):
        self.token.load(vector)
        self.asked.append((vector.clone(), tuple(seeds)))
        return [float(self.height(vector)) + self.luck(seed) * float(vector[0, 0]) for seed in seeds]


def one_hot(place: int, size: float = 1.0) -> torch.Tensor:
    vector = torch.zeros(1, 16)
    vector[0, place] = size
    return vector


START = one_hot(5, 0.01)


def test_the_mean_gradient_and_what_the_images_agree_on_say_where_to():
    """A coordinate that is large by chance counts less in the second."""
    pool = Pool()
    for wobble in (-3.0, 5.0, -3.0, 5.0):
        pool.add(0, one_hot(1, wobble) + one_hot(2, 1.0 + wobble / 100))
    mean, agreed = pool.directions()
    assert torch.allclose(mean, -(one_hot(1, 1.0) + one_hot(2, 1.01)) / (1 + 1.01**2) ** 0.5)
    assert agreed[0, 2] < 10 * agreed[0, 1] < 0
    assert agreed.norm() == pytest.approx(1)


def test_gradients_that_are_all_the_same_have_one_direction():
    """They come back with a pool of noises; over an error of 0 the other would not be finite."""
    way = torch.full((1, 16), 0.5)
    found = Pool({0: [way, way, way]}).directions()
    assert len(found) == 1
    assert torch.allclose(found[0], -way / way.norm())


def test_each_stage_has_its_own_directions():
    pool = Pool()
    for stage in (0, 2):
        pool.add(stage, one_hot(stage))
    assert [way.argmin().item() for way in pool.directions()] == [0, 2]


def test_a_gradient_that_is_not_finite_or_zero_leads_nowhere():
    pool = Pool()
    pool.add(0, one_hot(1, float("nan")))
    pool.add(1, torch.zeros(1, 16))
    pool.add(1, torch.zeros(1, 16))
    assert pool.directions() == []
    landscape = Landscape(lambda vector: 0.0)
    assert measured_step(landscape, START, pool, 0, 0) == []
    assert torch.equal(landscape.token.vector, START)


def test_a_pool_goes_through_a_checkpoint():
    pool = Pool()
    for stage, place in ((0, 1), (0, 2), (2, 3)):
        pool.add(stage, one_hot(place))
    again = Pool.of({"vector": START} | pool.state())
    assert all(torch.equal(a, b) for a, b in zip(again.directions(), pool.directions(), strict=True))


def test_candidates_lie_a_few_words_norms_along_each_direction():
    landscape = Landscape(lambda vector: 0.0)
    pool = Pool({0: [one_hot(1)], 1: [one_hot(2)]})
    found = candidates(landscape, START, pool, 0)
    lengths = [(vector - START).norm().item() / landscape.token.word_norm for vector in found]
    assert lengths == pytest.approx([*LENGTHS, *LENGTHS])


def test_after_a_look_in_vain_steps_are_half_as_long():
    landscape = Landscape(lambda vector: 0.0)
    longest = [candidates(landscape, START, Pool({0: [one_hot(1)]}), in_vain)[-1] for in_vain in (0, 1)]
    assert (longest[1] - START).norm() == pytest.approx((longest[0] - START).norm().item() / 2)


def test_candidates_stay_as_short_as_tokens_do():
    landscape = Landscape(lambda vector: 0.0, limit=1.0)
    found = candidates(landscape, START, Pool({0: [one_hot(1)]}), 0)
    assert max(vector.norm().item() for vector in found) <= landscape.token.word_norm * 1.0001


def test_the_token_takes_the_best_candidate():
    """The longest way along the second direction here, however the noises fall."""
    landscape = Landscape(lambda vector: vector[0, 2], luck=lambda seed: seed % 7)
    pool = Pool({0: [one_hot(1)], 1: [one_hot(2, -1.0)]})
    gains = measured_step(landscape, START, pool, 3, 0)
    step = LENGTHS[-1] * landscape.token.word_norm
    assert torch.allclose(landscape.token.vector, START + one_hot(2, step))
    assert gains == pytest.approx([step] * HALVINGS[-1][0])


@pytest.mark.parametrize("slope", [-1.0, 0.0])
def test_where_no_candidate_is_better_the_token_stays_bit_for_bit(slope):
    landscape = Landscape(lambda vector: slope * vector[0, 2])
    assert measured_step(landscape, START, Pool({0: [one_hot(2, -1.0)]}), 1, 0) == []
    assert torch.equal(landscape.token.vector, START)


def test_a_gain_within_chance_is_no_step():
    """Of an error of its mean that is as large."""
    landscape = Landscape(lambda vector: 0.05 * vector[0, 0], luck=lambda seed: seed % 2 - 0.5)
    assert measured_step(landscape, START, Pool({0: [one_hot(0, -1.0)]}), 0, 0) == []


def test_the_last_noises_chose_nothing():
    """A candidate that is lucky on the first noises is not taken for a better one."""
    lucky = set(measuring_seeds(1, 12))
    landscape = Landscape(lambda vector: 0.0, luck=lambda seed: 5.0 if seed in lucky else 0.0)
    assert measured_step(landscape, START, Pool({0: [one_hot(0, -1.0)]}), 1, 0) == []
    assert len(landscape.asked[0][1]) == len(lucky)


def test_candidates_and_the_token_are_drawn_on_the_same_noises_the_better_ones_on_more():
    landscape = Landscape(lambda vector: vector[0, 2])
    pool = Pool({stage: [one_hot(stage, -1.0), one_hot(stage, -1.2)] for stage in range(3)})
    measured_step(landscape, START, pool, 1, 0)
    drawn = [seeds for _, seeds in landscape.asked]
    assert [len(seeds) for seeds in drawn] == [4] * 19 + [6] * 17 + [12] * 7 + [24] * 3
    assert len(set(drawn)) == 4
    assert all(torch.equal(landscape.asked[i][0], START) for i in (0, 19, 36, 43))


def test_each_look_has_noises_of_its_own_that_no_other_use_has():
    looks = [measuring_seeds(look, NOISES) for look in range(40)]
    seeds = [seed for look in looks for seed in look]
    assert len(set(seeds)) == len(seeds)
    assert NOISES <= SEEDS_OF_A_LOOK
    assert VALIDATION_BASE + 10_000 < MEASURING_BASE <= min(seeds)
    assert max(measuring_seeds(3_999, SEEDS_OF_A_LOOK)) < SEED_RANGE <= training_seeds(0, 0, 1)[0]
    assert measuring_seeds(4_000, 1) == measuring_seeds(0, 1)


def test_a_training_measures_steps_where_no_start_helps(tmp_path, monkeypatch):
    """The token of the log's best look is what is kept."""
    monkeypatch.setattr(curriculum, "POOLED_UPDATES", 1)
    monkeypatch.setattr(measured, "HALVINGS", ((1, 4), (3, 1)))
    monkeypatch.setattr(measured, "NOISES", 4)
    monkeypatch.setattr(curriculum.Curriculum, "is_clearly_better", lambda *_: False)
    monkeypatch.setattr(Objective, "compare", lambda *_: [1.0, 1.1])
    changes = {"attempt_patience": 1, "validate_every": 1, "max_epochs": 30, "stop_validation_accuracy": 0.0}
    _, training = learned(tmp_path, jump_at="0.5;1", **changes)
    looks = [row for row in training.rows if "measured_gain" in row]
    assert looks
    moved = [row["epoch"] for row in looks if row["measured_gain"] > 0]
    assert moved
    assert training.kept_updates == moved[-1]
    assert all("validation_accuracy" in row for row in looks if row["measured_gain"] > 0)
