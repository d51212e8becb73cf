"""When training goes on to another stage or start, and when it ends: on scores alone.

    pytest tests/test_curriculum.py

Expect all to pass within seconds: there is no model, no image and no torch.
"""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from discriminative.settings import NEVER, CurriculumSettings
from discriminative.tokens.curriculum import Best, Curriculum, Step

ROOT = Path(__file__).parent.parent
GO_ON = Step.GO_ON
NEXT_STAGE = Step.NEXT_STAGE
NEXT_START = Step.NEXT_START
STOP = Step.STOP

# Nothing ends training, and a stage is over after two updates without a better token.
SETTINGS = CurriculumSettings(
    max_epochs=1000,
    patience=0,
    stop_train_accuracy=1.0,
    stop_validation_accuracy=0.0,
    validate_every=1,
    attempt_patience=2,
    enough_validation_accuracy=0.0,
)


def after(curriculum: Curriculum, epoch: int, accuracy: float, train_accuracy: float = 0.0) -> Step:
    """Offer a token of this validation accuracy after ``epoch``; what comes next."""
    curriculum.offer((accuracy, -1.0), f"vector {epoch}", epoch, epoch)
    return curriculum.observe(epoch, train_accuracy, is_scored=True)


def walked(curriculum: Curriculum, accuracies: list[float]) -> list[Step]:
    """The steps after validations of these accuracies, the first one before any update."""
    return [after(curriculum, epoch, accuracy) for epoch, accuracy in enumerate(accuracies)]


def places(curriculum: Curriculum, accuracies: list[float]) -> list[tuple[int, int]]:
    """Start and stage of each update, each followed by a validation; the first accuracy is the start's."""
    found = []
    after(curriculum, 0, accuracies[0])
    for epoch, accuracy in enumerate(accuracies[1:], start=1):
        found.append((curriculum.start, curriculum.stage))
        after(curriculum, epoch, accuracy)
    return found


def test_nothing_heavy_is_imported():
    """A curriculum is tried out where there is no torch."""
    code = (
        "import sys; import discriminative.tokens.curriculum; "
        "print([m for m in ('torch', 'numpy', 'transformers', 'diffusers', 'config') if m in sys.modules])"
    )
    told = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "[]"


# The best token.


def test_the_best_token_is_the_one_of_the_highest_score():
    """By the first figure, then by the second; the earlier one where both are alike."""
    curriculum = Curriculum(SETTINGS)
    offers = [((0.5, -2.0), True), ((0.5, -1.0), True), ((0.5, -1.0), False), ((0.4, -0.1), False)]
    for epoch, (score, is_best) in enumerate(offers):
        assert curriculum.offer(score, f"vector {epoch}", epoch, epoch) is is_best
    assert curriculum.best == Best((0.5, -1.0), "vector 1", 1, 1)
    assert str(curriculum.best) == "0.50 after 1"


def test_a_first_token_is_the_best_however_bad_it_is():
    for score in ((0.0, -1000.0), (-1000.0,)):
        assert Curriculum(SETTINGS).offer(score, "vector", 1, 1)
    assert str(Best()) == "none"
    assert Best().accuracy < 0


def test_the_updates_that_made_a_token_need_not_be_those_after_which_it_was_found():
    """A loss is that of the images which the token before the update drew."""
    curriculum = Curriculum(SETTINGS)
    curriculum.offer((-3.0,), "vector", 5, 4)
    assert (curriculum.best.epoch, curriculum.best.updates) == (5, 4)
    assert str(curriculum.best) == "3.00 after 5"


def test_the_best_token_of_all_outlives_its_start():
    curriculum = Curriculum(SETTINGS, starts=2)
    assert walked(curriculum, [0.1, 0.2, 0.15, 0.12])[-2:] == [NEXT_START, GO_ON]
    assert curriculum.best.vector == "vector 1"
    assert curriculum.attempt.vector == "vector 3"
    assert not curriculum.offer((0.15, 0.0), "vector 4", 4, 4)  # the best of its start alone
    assert curriculum.attempt.vector == "vector 4"
    assert curriculum.best.vector == "vector 1"


# Stages and starts.


def test_where_a_start_brings_nothing_the_next_is_tried():
    """And after the last one the first again."""
    curriculum = Curriculum(SETTINGS, stages=3, starts=2)
    steps = walked(curriculum, [0.1, 0.1, 0.3, 0.2, 0.3, 0.1, 0.1])
    assert steps == [GO_ON, GO_ON, NEXT_START, GO_ON, NEXT_START, GO_ON, NEXT_START]
    assert (curriculum.start, curriculum.stage) == (1, 0)


def test_a_start_that_only_gets_a_little_better_has_no_more_patience():
    """In the first stage only a clearly better token counts: one that only lowers the loss leads astray."""
    curriculum = Curriculum(SETTINGS, stages=2)
    assert walked(curriculum, [0.1, 0.2, 0.25])[-1] is NEXT_START


def test_a_clearly_better_token_goes_on_at_the_next_stage():
    """Each stage has its patience, the last one twice as much; after that learning begins again."""
    curriculum = Curriculum(SETTINGS, stages=3, starts=2)
    accuracies = [0.1, 0.3, 0.5, 0.6, 0.4, 0.4, 0.5, 0.5, 0.5, 0.5, 0.2]
    stages = [0, 0, 1, 1, 1, 2, 2, 2, 2, 0]
    assert places(curriculum, accuracies) == [(int(i == 9), stage) for i, stage in enumerate(stages)]


def test_the_next_stage_begins_with_the_best_token_of_its_start():
    """Not with the last one; nor with the best of all, which another start found."""
    curriculum = Curriculum(SETTINGS, stages=3, starts=2)
    steps = walked(curriculum, [0.1, 0.5, 0.6, 0.4, 0.3])
    assert steps == [GO_ON, NEXT_STAGE, GO_ON, GO_ON, NEXT_STAGE]
    assert curriculum.attempt.vector == "vector 2"
    later = [after(curriculum, epoch, 0.5) for epoch in range(5, 9)]
    assert later == [GO_ON] * 3 + [NEXT_START]
    assert after(curriculum, 9, 0.45) is NEXT_STAGE
    assert curriculum.attempt.vector == "vector 9"
    assert curriculum.best.vector == "vector 2"


def test_the_plateau_is_left_at_once_but_a_later_stage_only_where_it_brings_nothing():
    curriculum = Curriculum(SETTINGS, stages=3)
    steps = walked(curriculum, [0.0, 0.3, 0.4, 0.5, 0.6, 0.7, 0.6, 0.6])
    assert steps == [GO_ON, NEXT_STAGE, GO_ON, GO_ON, GO_ON, GO_ON, GO_ON, NEXT_STAGE]


@pytest.mark.parametrize(
    ("first", "accuracy", "goes_on"),
    [
        (0.0, 0.25, False),  # a quarter of the way to 1, and no more
        (0.0, 0.26, True),
        (0.8, 0.84, False),
        (0.8, 0.86, True),  # from .8 on, one more right image in ten is half of the way
        (0.88, 0.9, False),
        (0.88, 0.905, True),  # better and nearly right, before the quarter of the way
        (0.92, 0.92, False),
        (0.92, 0.93, True),  # a quarter of the way would be .94
        (1.0, 1.0, False),
    ],
)
def test_a_clearly_better_token_has_gone_a_quarter_of_the_way_or_is_nearly_right(first, accuracy, goes_on):
    curriculum = Curriculum(SETTINGS, stages=2)
    assert walked(curriculum, [first, accuracy])[1] is (NEXT_STAGE if goes_on else GO_ON)
    assert curriculum.has_progress is goes_on


def test_progress_counts_from_the_first_start():
    """Another start may be a worse one: its tokens are compared with what came for nothing."""
    curriculum = Curriculum(SETTINGS, stages=2, starts=2)
    assert walked(curriculum, [0.4, 0.1, 0.1, 0.0, 0.5])[2:] == [NEXT_START, GO_ON, NEXT_START]
    assert after(curriculum, 5, 0.56) is NEXT_STAGE


def test_the_next_start_forgets_the_best_token_of_the_one_before():
    curriculum = Curriculum(SETTINGS, stages=2, starts=2)
    walked(curriculum, [0.1, 0.95, 0.5, 0.5, 0.5, 0.5])
    assert (curriculum.start, curriculum.stage) == (1, 0)
    assert curriculum.attempt == Best()
    assert not curriculum.has_progress
    assert curriculum.best.accuracy == 0.95


def test_a_stage_has_its_patience_from_where_it_began():
    """Updates that the stage before it spent do not count."""
    settings = replace(SETTINGS, attempt_patience=3)
    curriculum = Curriculum(settings, stages=3)
    steps = walked(curriculum, [0.0, 0.0, 0.5, 0.4, 0.4, 0.4])
    assert steps == [GO_ON, GO_ON, NEXT_STAGE, GO_ON, GO_ON, NEXT_STAGE]


@pytest.mark.parametrize(("stages", "patience"), [(1, 2), (2, 4), (3, 4)])
def test_the_last_of_several_stages_has_twice_the_patience(stages, patience):
    """A single stage, which is the first one too, has not."""
    curriculum = Curriculum(SETTINGS, stages=stages)
    epoch = 0
    after(curriculum, epoch, 0.0)
    while curriculum.stage < stages - 1:
        epoch += 1
        after(curriculum, epoch, 0.5)
    began = epoch
    for epoch in range(began + 1, began + 10):
        if after(curriculum, epoch, 0.0) is not GO_ON:
            break
    assert epoch - began == patience


def test_a_single_stage_goes_on_as_long_as_it_brings_something():
    curriculum = Curriculum(SETTINGS)
    steps = walked(curriculum, [0.0, 0.3, 0.4, 0.5, 0.6, 0.6, 0.6])
    assert steps == [GO_ON] * 6 + [NEXT_START]
    assert (curriculum.start, curriculum.stage) == (0, 0)  # the only start, from its beginning


def test_a_better_token_of_the_same_accuracy_is_better():
    """The log-probability decides: patience counts from there."""
    curriculum = Curriculum(SETTINGS, stages=3)
    walked(curriculum, [0.0, 0.5, 0.5])
    curriculum.offer((0.5, -0.5), "surer", 2, 2)
    assert curriculum.attempt.vector == "surer"
    assert after(curriculum, 3, 0.5) is GO_ON
    assert after(curriculum, 4, 0.5) is NEXT_STAGE


def test_patience_runs_between_validations_too():
    curriculum = Curriculum(SETTINGS, stages=2)
    after(curriculum, 0, 0.0)
    assert curriculum.observe(1, 0.0, is_scored=False) is GO_ON
    assert curriculum.observe(2, 0.0, is_scored=False) is NEXT_START


def test_before_the_first_update_no_stage_is_over():
    settings = replace(SETTINGS, attempt_patience=0)
    assert after(Curriculum(settings, stages=2), 0, 1.0) is GO_ON


# What ends training.


def test_stopping_rules_are_told_apart():
    settings = CurriculumSettings(
        max_epochs=50,
        patience=5,
        stop_train_accuracy=0.7,
        stop_validation_accuracy=0.9,
        validate_every=5,
    )

    def rule(epoch, accuracy, is_scored, score=(0.5, -1.0), **changes):
        curriculum = Curriculum(replace(settings, **changes))
        curriculum.offer(score, "vector", 10, 10)
        return curriculum.stopping_rule(epoch, accuracy, is_scored)

    assert rule(12, 0.6, False) == ""
    assert rule(12, 0.7, False) == ""
    assert rule(12, 0.8, True) == "train_accuracy"
    assert rule(14, 0.6, True) == ""
    assert rule(15, 0.6, True) == "patience"
    assert rule(15, 0.6, False) == ""
    assert rule(50, 0.6, True, patience=0) == "max_epochs"
    assert rule(49, 0.6, True, patience=0) == ""
    assert rule(12, 0.6, False, score=(0.9, -1.0)) == "validation_accuracy"
    assert rule(12, 0.6, False, score=(0.89, -1.0)) == ""
    assert rule(12, 0.6, False, score=(1.0, -1.0), stop_validation_accuracy=0.0) == ""


@pytest.mark.parametrize(
    ("changes", "accuracies", "updates", "stopped_by"),
    [
        ({"stop_validation_accuracy": 0.9}, [0.0, 0.5, 0.9, 0.9], 2, "validation_accuracy"),
        ({"stop_validation_accuracy": 0.9}, [0.9], 0, "validation_accuracy"),  # a name may do already
        ({"patience": 2}, [0.0, 0.5, 0.4, 0.4, 0.4], 3, "patience"),
        ({"patience": 2}, [0.5, 0.0, 0.0, 0.0], 2, "patience"),  # from the start where nothing improves
        ({"max_epochs": 3}, [0.0] * 9, 3, "max_epochs"),
    ],
)
def test_training_ends_by_the_rule_that_it_names(changes, accuracies, updates, stopped_by):
    curriculum = Curriculum(replace(SETTINGS, attempt_patience=NEVER, **changes))
    for epoch, accuracy in enumerate(accuracies):
        step = after(curriculum, epoch, accuracy)
        assert step is (STOP if epoch == updates else GO_ON)
        assert curriculum.stopped_by == (stopped_by if epoch == updates else "")
        if step is STOP:
            break
    assert epoch == updates


def test_an_update_whose_images_are_right_ends_training_but_the_start_has_none():
    curriculum = Curriculum(replace(SETTINGS, stop_train_accuracy=0.7))
    assert after(curriculum, 0, 0.0, train_accuracy=1.0) is GO_ON
    assert after(curriculum, 1, 0.0, train_accuracy=0.7) is GO_ON
    assert after(curriculum, 2, 0.0, train_accuracy=0.71) is STOP
    assert curriculum.stopped_by == "train_accuracy"


def test_what_is_to_be_1_or_0_to_be_off_is_off():
    settings = replace(SETTINGS, attempt_patience=NEVER)
    curriculum = Curriculum(settings)
    assert {after(curriculum, epoch, 1.0, train_accuracy=1.0) for epoch in range(200)} == {GO_ON}


def test_patience_ends_no_training_before_what_was_learned_is_scored():
    curriculum = Curriculum(replace(SETTINGS, patience=3, attempt_patience=NEVER))
    after(curriculum, 0, 0.0)
    for epoch in range(1, 5):
        assert curriculum.observe(epoch, 0.0, is_scored=False) is GO_ON
    assert after(curriculum, 5, 0.5) is GO_ON


def test_the_patience_of_all_counts_over_starts():
    """Another start that is better than its own first tokens alone is no better token."""
    curriculum = Curriculum(replace(SETTINGS, patience=4), starts=2)
    assert walked(curriculum, [0.5, 0.1, 0.1, 0.2, 0.3]) == [GO_ON, GO_ON, NEXT_START, GO_ON, STOP]
    assert curriculum.stopped_by == "patience"


@pytest.mark.parametrize(
    ("changes", "epoch", "accuracy", "is_due"),
    [
        ({}, 5, 0.0, True),
        ({}, 10, 0.0, True),
        ({}, 7, 0.0, False),
        ({}, 12, 0.0, True),  # the last one
        ({}, 7, 1.0, False),
        ({"stop_train_accuracy": 0.7}, 7, 0.7, False),
        ({"stop_train_accuracy": 0.7}, 7, 0.8, True),  # would be the last one
        ({"validate_every": 1}, 7, 0.0, True),
    ],
)
def test_a_token_is_validated_every_so_often_and_before_training_ends(changes, epoch, accuracy, is_due):
    settings = replace(SETTINGS, validate_every=5, max_epochs=12)
    assert Curriculum(replace(settings, **changes)).is_due(epoch, accuracy) is is_due


@pytest.mark.parametrize(
    ("enough", "best", "steps"),
    [
        (0.93, 0.94, [NEXT_STAGE, GO_ON, STOP]),
        (0.93, 0.93, [NEXT_STAGE, GO_ON, STOP]),
        (0.95, 0.94, [NEXT_STAGE, GO_ON, NEXT_START]),
        (0.0, 0.94, [NEXT_STAGE, GO_ON, NEXT_START]),
    ],
)
def test_a_good_token_is_enough_where_an_attempt_brings_nothing_any_more(enough, best, steps):
    """But not before: as long as there is a stage, or patience with it, it may get better."""
    settings = replace(SETTINGS, enough_validation_accuracy=enough, attempt_patience=1)
    curriculum = Curriculum(settings, stages=2, starts=2)
    assert walked(curriculum, [0.5, best, 0.8, 0.8]) == [GO_ON, *steps]
    assert curriculum.stopped_by == ("enough" if STOP in steps else "")
    assert curriculum.best.vector == "vector 1"


def test_the_best_token_of_an_earlier_start_is_enough_too():
    """It holds for the best of all, whichever start has just failed."""
    settings = replace(SETTINGS, enough_validation_accuracy=0.93)
    curriculum = Curriculum(settings, stages=1, starts=2)
    curriculum.best = Best((0.94, -1.0), "of an earlier start", 1, 1)
    assert walked(curriculum, [0.1, 0.1, 0.1])[-1] is STOP
    assert curriculum.stopped_by == "enough"


def test_a_rule_that_ends_training_comes_before_the_next_stage():
    curriculum = Curriculum(replace(SETTINGS, stop_validation_accuracy=0.9, max_epochs=2), stages=2)
    assert walked(curriculum, [0.0, 0.9])[-1] is STOP
    assert (curriculum.stage, curriculum.stopped_by) == (0, "validation_accuracy")
    curriculum = Curriculum(replace(SETTINGS, max_epochs=2), stages=2)
    assert walked(curriculum, [0.0, 0.0, 0.5])[-1] is STOP
    assert (curriculum.stage, curriculum.stopped_by) == (0, "max_epochs")


# What the trainer asks on its way.


def test_steps_are_small_once_a_token_of_the_start_was_nearly_right():
    """At the next stage too, and where a later token is worse, but not from another start."""
    curriculum = Curriculum(SETTINGS, stages=2, starts=2)
    nearly_right = []
    for epoch, accuracy in enumerate([0.1, 0.5, 0.95, 0.7, 0.7, 0.7, 0.7, 0.7]):
        after(curriculum, epoch, accuracy)
        nearly_right.append(curriculum.is_nearly_right)
    assert nearly_right == [False, False, True, True, True, True, False, False]
    assert not Curriculum(SETTINGS).is_nearly_right


def test_nearly_right_begins_above_nine_in_ten():
    for accuracy, expected in ((0.9, False), (0.91, True)):
        curriculum = Curriculum(SETTINGS)
        after(curriculum, 0, accuracy)
        assert curriculum.is_nearly_right is expected


def test_what_a_token_has_to_beat_to_be_sampled_on():
    """The best token of its start, and .9."""
    curriculum = Curriculum(SETTINGS, starts=2)
    asked = []
    for epoch, accuracy in enumerate([0.5, 0.95, 0.92, 0.8, 0.4]):
        asked.append(curriculum.to_confirm)
        after(curriculum, epoch, accuracy)
    assert curriculum.start == 1
    assert asked == [0.9, 0.9, 0.95, 0.95, 0.9]


# The token of the lowest loss, which the trainer offers as a score below 0.


def test_without_patience_of_stages_no_stage_and_no_start_ever_changes():
    """As the paper learns: one stage from one start, until a rule ends it."""
    curriculum = Curriculum(replace(SETTINGS, attempt_patience=NEVER, max_epochs=300))
    steps = []
    for epoch in range(1, 301):
        curriculum.offer((-1.0 / epoch if epoch < 100 else -5.0,), f"vector {epoch}", epoch, epoch - 1)
        steps.append(curriculum.observe(epoch, 0.5, is_scored=True))
        assert (curriculum.start, curriculum.stage) == (0, 0)
    assert steps == [GO_ON] * 299 + [STOP]
    assert curriculum.stopped_by == "max_epochs"
    assert curriculum.best == Best((-1.0 / 99,), "vector 99", 99, 98)


def test_patience_of_the_paper_counts_updates_without_a_lower_loss():
    curriculum = Curriculum(replace(SETTINGS, attempt_patience=NEVER, patience=3))
    for epoch, loss in enumerate([3.0, 2.0, 2.5, 2.5, 2.5, 2.5], start=1):
        curriculum.offer((-loss,), f"vector {epoch}", epoch, epoch - 1)
        if curriculum.observe(epoch, 0.0, is_scored=True) is STOP:
            break
    assert (epoch, curriculum.stopped_by, curriculum.best.updates) == (5, "patience", 1)


def test_a_loss_is_no_accuracy():
    """However low: it ends no training as a validation would, and makes no token nearly right."""
    settings = replace(SETTINGS, stop_validation_accuracy=0.9, enough_validation_accuracy=0.95)
    curriculum = Curriculum(replace(settings, attempt_patience=NEVER))
    for epoch, loss in enumerate([5.0, 0.95, 1e-9, 0.0], start=1):
        curriculum.offer((-loss,), "vector", epoch, epoch - 1)
        assert curriculum.observe(epoch, 0.0, is_scored=True) is GO_ON
        assert not curriculum.is_nearly_right


def test_updates_without_a_finite_loss_leave_no_best_token():
    """Nothing is offered then; rules still end the training."""
    curriculum = Curriculum(replace(SETTINGS, attempt_patience=NEVER, max_epochs=2))
    assert [curriculum.observe(epoch, 0.0, is_scored=True) for epoch in (1, 2)] == [GO_ON, STOP]
    assert curriculum.best.vector is None


@pytest.mark.parametrize("enough", [0.5, 0.9])
def test_what_no_whole_validation_stands_behind_is_never_enough(enough):
    """Up to there a part of the validation scores a token, and may be lucky."""
    with pytest.raises(ValueError, match="allowed is 0 or above 0.9"):
        Curriculum(replace(SETTINGS, enough_validation_accuracy=enough))
