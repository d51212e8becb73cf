"""The loop, on tiny fakes."""

import json
import math
from itertools import repeat

import pytest
import torch
from conftest import SHORT_TRAINING, learned, learning, tiny_classifier, weight_hashes

from discriminative.errors import WorkError
from discriminative.guides.classifier import Guide
from discriminative.records.layout import RunFolder
from discriminative.seeds import VALIDATION_BASE
from discriminative.tokens.class_token import ClassToken
from discriminative.tokens.curriculum import Score
from discriminative.tokens.files import read_token
from discriminative.tokens.objective import FINAL_SIZE, Objective
from trainer import Gain, train

IDLE = torch.amp.GradScaler("cpu", enabled=False)
CONFIG = learning()


@pytest.mark.parametrize("mode", ["jump", "last"])
def test_every_weight_and_every_other_prompt_is_bit_identical_after_training(
    models, token, guides, folder, mode
):
    frozen = (models.text_encoder, models.unet, models.vae, guides[0].classifier.model)
    before = weight_hashes(*frozen)
    start = token.vector.detach().clone()
    picture = token.sample(["a photo of cat"], [5], SHORT_TRAINING.sampler)
    training = train(learning(gradient_mode=mode, choose_by="loss"), token, guides, "tiger cat", folder)
    assert weight_hashes(*frozen) == before
    assert torch.equal(picture, token.sample(["a photo of cat"], [5], SHORT_TRAINING.sampler))
    assert not torch.equal(start, training.last_vector)
    assert all(p.grad is None for m in frozen for p in m.parameters())


def test_the_optimiser_holds_one_vector(monkeypatch, tmp_path):
    held = []
    adamw = torch.optim.AdamW
    monkeypatch.setattr(torch.optim, "AdamW", lambda params, **kw: held.append(params) or adamw(params, **kw))
    token, _ = learned(tmp_path, max_epochs=1)
    assert len(held) == 1
    assert len(held[0]) == 1
    assert held[0][0] is token.vector
    assert token.vector.shape == (1, 16)


def test_same_seed_gives_the_same_token_and_another_seed_another(tmp_path):
    first, second, other = (learned(tmp_path, seed=s, choose_by="loss")[1].last_vector for s in (1, 1, 2))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_the_gradient_is_clipped_after_backward(monkeypatch, tmp_path):
    """The official code clips before it: there is nothing to clip then."""
    norms = []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(
        torch.optim.AdamW,
        "step",
        lambda self: norms.append(self.param_groups[0]["params"][0].grad.norm().item()) or step(self),
    )
    _, training = learned(tmp_path, max_grad_norm=1e-4, max_epochs=1)
    assert training.rows[0]["gradient_norm"] > 1e-4
    assert norms[0] == pytest.approx(1e-4, rel=1e-2)


def test_the_log_counts_all_images_that_were_drawn_so_far(tmp_path):
    """Those of the start's validation too, and in the end those that two tokens are compared on; without
    validation those of the updates alone."""
    changes = {"stop_validation_accuracy": 0.0, "enough_validation_accuracy": 0.0}
    _, training = learned(tmp_path, validate_every=2, max_epochs=2, **changes)
    first, second = (row["images"] for row in training.rows)
    assert first == CONFIG.images_per_update + CONFIG.validation.validation_size
    assert second > first + CONFIG.images_per_update
    assert training.images == second + 2 * FINAL_SIZE
    _, training = learned(tmp_path, choose_by="loss", max_epochs=2)
    assert [row["images"] for row in training.rows] == [
        CONFIG.images_per_update,
        2 * CONFIG.images_per_update,
    ]
    assert training.images == 2 * CONFIG.images_per_update


SURE = [1.0, 1.1, 1.2, 1.3]  # gains that are no chance
DOUBTFUL = [1.0, -1.1, 1.2, -1.0]


def scored(accuracy, log_probability=None):
    """A validation of three noises; the probability of the class is its accuracy, if none is given."""
    found = math.log(max(accuracy, 0.001)) if log_probability is None else log_probability
    return Score(accuracy, (found,) * 3)


def scored_with(monkeypatch, scores, gains=SURE):
    """Have the validations find these scores, and the kept token these gains; returns a list, of the vectors
    that the validations are asked of."""
    found = iter(scores)
    seen = []

    def validate(self, beats):
        seen.append(self.token.vector.detach().clone())
        return next(found)

    monkeypatch.setattr(Objective, "validate", validate)
    monkeypatch.setattr(Objective, "compare", lambda self, vector, other: gains)
    return seen


def attempted(tmp_path, monkeypatch, accuracies, **changes):
    """Train with these validation accuracies: of the first start, of updates, and of each start that follows.

    Returns:
        the token, the training, for every update its stage and the vector that it began with, and the vectors
        that were scored.
    """
    started = []
    seen = scored_with(monkeypatch, map(scored, accuracies))
    accumulate = Objective.accumulate

    def noting(self, epoch, scaler, stage):
        started.append((stage, self.token.vector.detach().clone()))
        return accumulate(self, epoch, scaler, stage)

    monkeypatch.setattr(Objective, "accumulate", noting)
    changes = {
        "attempt_patience": 2,
        "validate_every": 1,
        "max_token_norm": 0.0,
        "stop_validation_accuracy": 0.0,
        "start": "cat;tiger+cat",
    } | changes
    token, training = learned(tmp_path, **changes)
    return token, training, started, seen


@pytest.mark.parametrize(
    ("accuracies", "first_in_vain", "best"),
    [
        (
            [0.1, 0.1, 0.1, 0.05, 0.15, 0.1, 0.1, 0.1],
            2,
            4,
        ),  # the start after the third update's is the second's
        ([0.1, 0.15, 0.1, 0.1, 0.05, 0.05, 0.05, 0.1], 3, 1),
    ],
)
def test_where_no_start_helps_steps_are_measured_from_the_best_token_of_all(
    tmp_path, monkeypatch, accuracies, first_in_vain, best
):
    """Each start has its turn first, and is scored before it is learned from."""
    token, training, started, seen = attempted(tmp_path, monkeypatch, accuracies, max_epochs=6)
    others = 6 - first_in_vain
    assert [row["start"] for row in training.rows] == ["cat"] * first_in_vain + ["tiger+cat"] * others
    assert [stage for stage, _ in started] == [0] * 6
    second = token.start_vector("tiger+cat", "tiger cat")
    assert torch.equal(started[0][1], token.start_vector("cat", "tiger cat"))
    assert torch.equal(started[first_in_vain][1], second)
    assert torch.equal(seen[first_in_vain + 1], second)
    assert torch.equal(started[5][1], seen[best])
    assert torch.equal(token.vector, seen[best])


@pytest.mark.parametrize(
    ("sureness", "tried"), [(0.8, ["cat", "tiger+cat", "cat"]), (0.7, ["cat", "tiger+cat"])]
)
def test_how_sure_the_guide_is_decides_whether_starts_are_tried_again(tmp_path, monkeypatch, sureness, tried):
    monkeypatch.setattr(Objective, "sureness", lambda self: sureness)
    accuracies = [0.1, 0.15, 0.1, 0.1, 0.05, 0.05, 0.05, 0.05, 0.05]
    token, training, _, seen = attempted(tmp_path, monkeypatch, accuracies, max_epochs=6)
    starts = [row["start"] for row in training.rows]
    assert [start for i, start in enumerate(starts) if [start] != starts[i - 1 : i]] == tried
    assert training.sureness == sureness
    # A sure guide's verdict on a start says nothing of what can be learned from it.
    second = token.start_vector("tiger+cat", "tiger cat")
    assert any(torch.equal(vector, second) for vector in seen) is (sureness < 0.75)


def test_a_clearly_better_token_goes_on_at_the_next_stage(tmp_path, monkeypatch):
    """Each begins with the best token and has its patience, the last one twice as much.

    After that steps are measured.
    """
    accuracies = [0.1, 0.3, 0.5, 0.6, 0.4, 0.4, 0.5, 0.5, 0.5, 0.5, 0.2]
    token, training, started, seen = attempted(
        tmp_path, monkeypatch, accuracies, jump_at="0@8;0.3;0.5", max_epochs=10
    )
    assert [row["start"] for row in training.rows] == ["cat"] * 10
    assert [stage for stage, _ in started] == [0, 0, 1, 1, 1, 2, 2, 2, 2, 0]
    assert torch.equal(started[2][1], seen[2])
    assert torch.equal(started[5][1], seen[3])
    assert torch.equal(started[9][1], seen[3])
    assert training.kept_updates == 3
    assert torch.equal(token.vector, seen[3])


def test_a_later_start_goes_on_with_its_own_best_token(tmp_path, monkeypatch):
    """Not with the best of all, which is kept."""
    accuracies = [0.1, 0.5, 0.95, 0.4, 0.4, 0.4, 0.4, 0.2, 0.45, 0.4]
    changes = {"jump_at": "0@8;0.5", "max_epochs": 8, "enough_validation_accuracy": 0.0}
    token, training, started, seen = attempted(tmp_path, monkeypatch, accuracies, **changes)
    assert [row["start"] for row in training.rows] == ["cat"] * 6 + ["tiger+cat"] * 2
    assert [stage for stage, _ in started] == [0, 1, 1, 1, 1, 1, 0, 1]
    assert torch.equal(started[6][1], seen[7])
    assert torch.equal(started[7][1], seen[8])
    assert training.kept_updates == 2
    assert torch.equal(token.vector, seen[2])


def test_another_start_is_scored_before_it_is_learned_from(tmp_path, monkeypatch):
    """It may be the best token of all: it is kept then."""
    accuracies = [0.1, 0.1, 0.1, 0.2, 0.1]
    token, training, _, seen = attempted(tmp_path, monkeypatch, accuracies, max_epochs=3)
    second = token.start_vector("tiger+cat", "tiger cat")
    assert [row["start"] for row in training.rows] == ["cat", "cat", "tiger+cat"]
    assert len(seen) == 5
    assert torch.equal(seen[3], second)
    assert torch.equal(token.vector, second)


def test_a_good_start_is_improved_too(tmp_path, monkeypatch):
    """Better counts by what was missing: from 0.8 on, one more right image in ten is half of it."""
    _, _, started, _ = attempted(tmp_path, monkeypatch, [0.8, 0.84, 0.9, 0.9], max_epochs=3)
    assert [stage for stage, _ in started] == [0, 0, 1]


def step_sizes(monkeypatch):
    """A list, of the step size of every update."""
    rates = []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(
        torch.optim.AdamW, "step", lambda self: rates.append(self.param_groups[0]["lr"]) or step(self)
    )
    return rates


def test_the_step_is_smaller_once_the_token_is_nearly_right(tmp_path, monkeypatch):
    """At the next stage too, but not from another start."""
    rates = step_sizes(monkeypatch)
    accuracies = [0.1, 0.5, 0.95, 0.7, 0.7, 0.7, 0.7, 0.1, 0.7]
    token, *_ = attempted(
        tmp_path,
        monkeypatch,
        accuracies,
        jump_at="0@8;0.5",
        fine_rate=0.25,
        max_epochs=7,
        enough_validation_accuracy=0.0,
    )
    assert rates == pytest.approx(
        [4 * 0.05 * token.word_rms * share for share in (1, 1, 0.25, 0.25, 0.25, 0.25, 1)]
    )


def test_a_bounded_token_stays_as_short_as_asked(tmp_path):
    """Unbounded it grows at every update: a long vector deforms what the other words say."""
    free, training = learned(tmp_path, learning_rate=0.05, choose_by="loss", max_token_norm=0.0)
    assert training.rows[-1]["token_norm"] > 3
    token, training = learned(tmp_path, learning_rate=0.05, choose_by="loss", max_token_norm=1.5)
    assert max(r["token_norm"] for r in training.rows) == pytest.approx(1.5, rel=1e-5)
    assert training.last_vector.norm().item() == pytest.approx(1.5 * token.word_norm, rel=1e-5)


def test_the_kept_token_is_the_best_of_validation(tmp_path, monkeypatch):
    seen = scored_with(monkeypatch, map(scored, (0.1, 0.6, 0.3)))
    token, training = learned(tmp_path, max_epochs=4, validate_every=2)
    assert training.kept_updates == 2
    assert torch.equal(token.vector, seen[1])


def test_with_keep_loss_the_kept_token_drew_the_lowest_loss(tmp_path):
    token, training = learned(tmp_path, choose_by="loss", noise_pool=1, max_epochs=4)
    lowest = min(training.rows, key=lambda row: row["loss"])
    assert training.kept_updates == lowest["epoch"] - 1
    objective = Objective(learning(noise_pool=1), token, [Guide(tiny_classifier(), 0)], "tiger cat")
    _, losses, _, _ = objective.accumulate(0, IDLE)
    assert losses.mean().item() == pytest.approx(lowest["loss"], rel=1e-4)


def test_the_log_has_one_object_an_update(tmp_path):
    _, training = learned(tmp_path, max_epochs=3, stop_validation_accuracy=0.0)
    folder = RunFolder(str(tmp_path), "c", "e")
    rows = [json.loads(line) for line in folder.log.read_text().splitlines()]
    assert rows == training.rows
    assert [r["epoch"] for r in rows] == [1, 2, 3]
    assert set(rows[0]) >= {"epoch", "loss", "accuracy", "probability", "gradient_norm", "seconds"}
    pictures = {path.stem for path in folder.train_images.iterdir()}
    updates = {"epoch_001", "epoch_002", "epoch_003"}
    assert pictures == updates | {"validation_000", "validation_002", "validation_003"}


def test_patience_counts_from_the_start_when_nothing_improves(tmp_path, monkeypatch):
    """The official code ignores the configured patience until the first improvement."""
    scored_with(monkeypatch, repeat(scored(0.0)))
    _, training = learned(tmp_path, patience=2, max_epochs=10)
    assert (len(training.rows), training.stopped_by, training.kept_updates) == (2, "patience", 0)


def test_a_token_that_does_already_needs_no_update(tmp_path, monkeypatch):
    monkeypatch.setattr(Objective, "validate", lambda self, **_: scored(1.0))
    token, training = learned(tmp_path)
    assert (training.rows, training.stopped_by) == ([], "validation_accuracy")
    assert training.gain is None
    assert torch.equal(token.vector, token.start_vector(CONFIG.starts[0], "tiger cat"))


@pytest.mark.parametrize("choose_by", ["loss", "validation"])
def test_a_loss_that_is_never_finite_fails_after_two_halved_rates(
    token, guides, folder, monkeypatch, choose_by
):
    monkeypatch.setattr(Objective, "validate", lambda self, **_: scored(0.1))
    guides[0].classifier.model[1].weight.data.fill_(float("nan"))
    why = r"update 3: loss nan, gradient norm nan; try a lower --learning_rate \(the rate was halved 2 times"
    with pytest.raises(WorkError, match=why):
        train(learning(choose_by=choose_by, max_epochs=9), token, guides, "tiger cat", folder)
    assert token.vector.isfinite().all()


def test_a_gradient_that_is_not_finite_is_reported(token, guides, folder, monkeypatch):
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *args: torch.tensor(float("inf")))
    with pytest.raises(WorkError, match="update 3: loss .* gradient norm inf"):
        train(learning(choose_by="loss"), token, guides, "tiger cat", folder)


def test_after_a_loss_that_is_not_finite_training_goes_back_to_the_best_token_with_half_the_rate(
    tmp_path, monkeypatch
):
    losses = Objective.class_loss
    vectors = []

    def broken(self, images):
        loss, right = losses(self, images)
        vectors.append(self.token.vector.detach().clone())
        return (loss * math.nan if len(vectors) == 3 else loss), right

    monkeypatch.setattr(Objective, "class_loss", broken)
    _, training = learned(tmp_path, choose_by="loss", max_epochs=5, stop_train_accuracy=1.0)
    lost = [row["epoch"] for row in training.rows if row["loss"] is None]
    assert lost == [3]
    losses_before = [row["loss"] for row in training.rows[:2]]
    assert torch.equal(vectors[3], vectors[losses_before.index(min(losses_before))])  # the best
    rates = [row["learning_rate"] for row in training.rows]
    assert rates == [rates[0]] * 3 + [rates[0] / 2] * 2


def test_patience_of_the_paper_counts_updates_without_a_lower_loss(tmp_path, monkeypatch):
    losses = iter([3.0, 2.0, 2.5, 2.5, 2.5, 2.5])
    accumulate = Objective.accumulate

    def worse_and_worse(self, *args):
        images, _, probabilities, right = accumulate(self, *args)
        return images, torch.full((4,), next(losses)), probabilities, right

    monkeypatch.setattr(Objective, "accumulate", worse_and_worse)
    _, training = learned(tmp_path, choose_by="loss", patience=3, max_epochs=10, stop_train_accuracy=1.0)
    assert (len(training.rows), training.stopped_by, training.kept_updates) == (5, "patience", 1)


@pytest.mark.parametrize(
    "changes", [{"patience": 3, "validate_every": 5}, {"stop_train_accuracy": 0.0, "validate_every": 5}]
)
def test_no_rule_ends_training_before_what_was_learned_is_scored(tmp_path, monkeypatch, changes):
    """A rule that fired between two validations used to throw the learned vector away."""
    scored_with(monkeypatch, map(scored, (0.0, 0.5, 0.4)))
    monkeypatch.setattr(Objective, "accumulate", always_right(Objective.accumulate))
    _, training = learned(tmp_path, max_epochs=8, **changes)
    assert training.kept_updates > 0


def always_right(accumulate):
    """The real images, losses and probabilities, with every image called right."""

    def wrapped(self, *args):
        images, losses, probabilities, right = accumulate(self, *args)
        return images, losses, probabilities, torch.ones_like(right)

    return wrapped


def test_a_training_that_breaks_off_leaves_the_best_token_so_far(tmp_path, monkeypatch):
    scores, seen = map(scored, (0.1, 0.6)), []

    def validate(self, **_):
        seen.append(self.token.vector.detach().clone())
        if len(seen) == 3:
            raise WorkError("the machine is taken away")
        return next(scores)

    monkeypatch.setattr(Objective, "validate", validate)
    with pytest.raises(WorkError):
        learned(tmp_path, max_epochs=4, validate_every=1)
    placeholder, vector = read_token(RunFolder(str(tmp_path), "c", "e").partial_token)
    assert placeholder == "newclas"
    assert torch.equal(vector, seen[1])


def test_what_a_token_has_to_beat_to_be_sampled_on(tmp_path, monkeypatch):
    """The best token of its start, and .9; the next start itself has no best one to beat."""
    scores = map(scored, (0.5, 0.95, 0.92, 0.8, 0.4, 0.4, 0.4))
    asked = []
    monkeypatch.setattr(Objective, "compare", lambda *_: SURE)
    monkeypatch.setattr(Objective, "validate", lambda self, beats: asked.append(beats) or next(scores))
    changes = {"jump_at": "0.1", "enough_validation_accuracy": 0.0, "stop_validation_accuracy": 0.96}
    learned(tmp_path, validate_every=1, max_epochs=5, attempt_patience=2, **changes)
    assert asked == [0.9, 0.9, 0.95, 0.95, 0.9, 0.9, 0.9]


@pytest.mark.parametrize(
    ("enough", "stopped_by", "updates"),
    [(0.93, "enough", 3), (0.0, "max_epochs", 8), (0.95, "max_epochs", 8)],
)
def test_a_good_token_is_enough_where_an_attempt_brings_nothing_any_more(
    tmp_path, monkeypatch, enough, stopped_by, updates
):
    scored_with(monkeypatch, map(scored, [0.5, 0.94, *[0.8] * 20]))
    changes = {"jump_at": "0.1;0.5", "attempt_patience": 1, "enough_validation_accuracy": enough}
    _, training = learned(tmp_path, validate_every=1, max_epochs=8, **changes)
    assert (training.stopped_by, len(training.rows)) == (stopped_by, updates)
    assert training.kept_updates == 1


@pytest.mark.parametrize(
    ("whole", "stopped_by", "updates"),
    [([True] * 4, "enough", 3), ([False] * 4, "no_progress", 13)],
    ids=["as good", "lucky"],
)
def test_a_token_that_was_lucky_on_a_part_of_the_validation_is_not_enough(
    tmp_path, monkeypatch, whole, stopped_by, updates
):
    """It has to be as good on the whole, which is drawn for a token that would be the best above .9."""
    parts = []

    def score_seeds(self, seeds):
        is_first_part = seeds[0] == VALIDATION_BASE
        parts.append(is_first_part)
        right = [parts.count(True) == 2] * 4 if is_first_part else whole
        return [(self.templates[0], 0.1 if is_right else 1.0, is_right) for is_right in right]

    monkeypatch.setattr(Objective, "score_seeds", score_seeds)
    monkeypatch.setattr(Objective, "compare", lambda *_: SURE)
    sizes = {"validation_size": 4, "confirm_size": 12, "stop_validation_accuracy": 0.0}
    changes = {"jump_at": "0.1;0.5", "attempt_patience": 1, "enough_validation_accuracy": 0.93}
    _, training = learned(tmp_path, validate_every=1, max_epochs=50, **sizes, **changes)
    assert (training.stopped_by, len(training.rows)) == (stopped_by, updates)
    assert training.kept_updates == 1
    assert parts[:3] == [True, True, False]  # the start's part, and more than one of the second token's


def test_a_start_that_is_nearly_right_goes_on_with_the_least_progress(tmp_path, monkeypatch):
    """From .92 a quarter of the way to 1 is .94: a token at .93 would never leave the first stage."""
    scored_with(monkeypatch, map(scored, [0.92, 0.93, *[0.9] * 9]))
    _, training = learned(tmp_path, validate_every=1, max_epochs=2, jump_at="0.1;0.5", attempt_patience=9)
    assert [row["stage"] for row in training.rows] == [1, 2]


def test_choosing_by_the_loss_has_one_stage_and_one_start(tmp_path, monkeypatch):
    """And no validation, however many stages and starts are named and however soon they would change; nor is
    the kept token compared with the word in its place."""
    monkeypatch.setattr(Objective, "validate", lambda self, **_: 1 / 0)
    monkeypatch.setattr(Objective, "compare", lambda *_: 1 / 0)
    changes = {"jump_at": "0@8;0.5", "start": "cat;tiger+cat", "attempt_patience": 1}
    _, training = learned(tmp_path, choose_by="loss", max_epochs=5, **changes)
    assert [(row["start"], row["stage"]) for row in training.rows] == [("cat", 1)] * 5
    assert training.stopped_by == "max_epochs"
    assert not any("validation_accuracy" in row for row in training.rows)
    assert training.gain is None


# The honest end.


def test_a_guide_that_never_changes_its_mind_leaves_the_word_in_the_tokens_place(token, guides, folder):
    """Bit for bit, and soon: no start is tried twice, and two looks for a measured step are in vain."""
    guides[0].classifier.model[1].weight.data.zero_()
    changes = {"start": "cat;tiger+cat", "attempt_patience": 2, "validate_every": 1, "max_epochs": 50}
    training = train(learning(**changes), token, guides, "tiger cat", folder)
    assert (training.stopped_by, len(training.rows)) == ("no_progress", 16)
    looks = [row["epoch"] for row in training.rows if "measured_gain" in row]
    assert looks == [10, 16]
    assert [row["measured_gain"] for row in training.rows if "measured_gain" in row] == [0.0, 0.0]
    assert training.gain == Gain(0.0, 1.0, FINAL_SIZE)
    assert not training.gain.is_there
    assert training.kept_updates == 0
    assert torch.equal(token.vector, token.start_vector("initializer", "tiger cat"))
    assert not torch.equal(token.vector, token.start_vector("cat", "tiger cat"))


def test_of_two_vectors_without_a_gain_the_plain_prompt_is_kept(models, guides, folder):
    """One word is left, with which the token was compared: two would read "a a tiger cat"."""
    guides[0].classifier.model[1].weight.data.zero_()
    token = ClassToken(models, "newclas", "a", 2)
    changes = {"start": "cat", "attempt_patience": 2, "validate_every": 1, "max_epochs": 50}
    training = train(learning(**changes), token, guides, "tiger cat", folder)
    assert not training.gain.is_there
    assert token.names == ["newclas"]
    assert torch.equal(token.vector, token.word_mean("a"))
    assert torch.equal(token.encode(["a newclas tiger cat"]), token.encode(["a a tiger cat"]))
    assert training.last_vector.shape == (2, token.vector.shape[1])


def test_where_the_best_token_gains_nothing_for_sure_the_word_in_its_place_is_kept(tmp_path, monkeypatch):
    """The best of many validations was lucky on their noises; new ones say so."""
    scored_with(monkeypatch, map(scored, [0.1, 0.5, 0.6, 0.6]), gains=DOUBTFUL)
    token, training = learned(tmp_path, validate_every=1)
    assert training.rows[-1]["best_epoch"] == 2
    assert training.kept_updates == 0
    assert training.gain == Gain.of(DOUBTFUL)
    assert torch.equal(token.vector, token.start_vector("initializer", "tiger cat"))
    assert not torch.equal(training.last_vector, token.vector)


def test_a_gain_that_is_sure_is_kept(tmp_path, monkeypatch):
    """The best token is compared with the word in its place, not with the start."""
    seen = scored_with(monkeypatch, map(scored, [0.1, 0.5, 0.6, 0.6]))
    asked = []
    monkeypatch.setattr(Objective, "compare", lambda self, *tokens: asked.append(tokens) or SURE)
    token, training = learned(tmp_path, validate_every=1, start="cat")
    ((vector, other),) = asked
    assert torch.equal(vector, seen[2])
    assert torch.equal(other, token.start_vector("initializer", "tiger cat"))
    assert training.gain == Gain.of(SURE)
    assert training.gain.is_there
    assert training.kept_updates == 2
    assert torch.equal(token.vector, seen[2])


def test_a_token_that_raises_the_probability_of_the_class_has_a_gain(token, guides, folder):
    """Measured, of a guide that tells bright from dark: no figure is made up."""
    linear = guides[0].classifier.model[1]
    linear.weight.data.zero_()
    linear.weight.data[0] = 0.3
    changes = {"validate_every": 1, "max_epochs": 8, "validation_size": 6, "stop_validation_accuracy": 0.0}
    settings = learning(attempt_patience=9, enough_validation_accuracy=0.0, **changes)
    training = train(settings, token, guides, "tiger cat", folder)
    assert training.gain.is_there
    assert training.gain.log_probability > 0
    assert training.gain.noises == FINAL_SIZE
    assert training.kept_updates > 0
    assert not torch.equal(token.vector, token.start_vector("initializer", "tiger cat"))


@pytest.mark.parametrize(
    ("gains", "p_value", "is_there"),
    [
        (SURE, 0.0004, True),
        ([-gain for gain in SURE], 0.9996, False),  # for sure a loss
        (DOUBTFUL, 0.4852, False),
        ([1.0, 4.0], 0.1720, True),  # t is 1.67 with one degree of freedom
        ([1.0, 5.0], 0.1872, True),
        ([1.0, 6.0], 0.1974, True),
        ([1.0, 7.0], 0.2048, False),
        ([0.0] * 36, 1.0, False),
    ],
)
def test_a_gain_is_there_where_chance_makes_it_less_than_once_in_five(gains, p_value, is_there):
    gain = Gain.of(gains)
    assert gain.is_there is is_there
    assert gain.p_value == pytest.approx(p_value, abs=5e-4)
    assert gain.log_probability == pytest.approx(sum(gains) / len(gains))
    assert gain.noises == len(gains)


@pytest.mark.parametrize(
    ("best", "enough", "is_asked"),
    [(0.96, 0.95, False), (0.95, 0.95, False), (0.94, 0.95, True), (1.0, 0.0, True)],
)
def test_no_gain_is_asked_for_of_a_token_that_is_good_enough(tmp_path, monkeypatch, best, enough, is_asked):
    """A whole validation stands behind it, and it need not be better than a word that does as well."""
    seen = scored_with(monkeypatch, map(scored, [0.1, best, 0.5, 0.5]), gains=DOUBTFUL)
    changes = {"stop_validation_accuracy": 0.0, "enough_validation_accuracy": enough}
    token, training = learned(tmp_path, validate_every=1, **changes)
    assert (training.gain is not None) is is_asked
    assert training.kept_updates == (0 if is_asked else 1)
    assert torch.equal(token.vector, seen[1]) is not is_asked


def test_channels_are_last_while_training_and_lie_as_before_after_it(token, guides, folder):
    """Images that are shown must be the stock pipeline's, bit for bit; after a training that failed, too."""
    models = token.models
    seen = []
    weights = [w for m in (models.unet, models.vae) for w in m.parameters()]
    before = [w.stride() for w in weights]
    (convolution,) = [
        m for m in models.unet.modules() if isinstance(m, torch.nn.Conv2d) and m.in_channels == 4
    ]

    def note(module, args, out):
        seen.append(module.weight.is_contiguous(memory_format=torch.channels_last))

    handle = convolution.register_forward_hook(note)
    train(learning(max_epochs=1), token, guides, "cat", folder)
    assert seen
    assert all(seen)
    assert [w.stride() for w in weights] == before
    handle.remove()
    convolution.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(CONFIG, token, guides, "cat", folder)
    assert [w.stride() for w in weights] == before
