"""When training goes on to another stage or start, and when it ends: on scores alone.

    pytest tests/test_curriculum.py

Expect all to pass within seconds: there is no model, no image and no torch.
"""

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

from config import RunConfig
from discriminative.errors import WorkError
from discriminative.settings import NEVER, CurriculumSettings
from discriminative.tokens import curriculum as rules
from discriminative.tokens.curriculum import Best, Curriculum, Score, Step

ROOT = Path(__file__).parent.parent
GO_ON = Step.GO_ON
NEXT_STAGE = Step.NEXT_STAGE
MEASURE = Step.MEASURE
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

FOUND = [0.1, 0.95, 0.5, 0.5, 0.5, 0.5]  # of the first of two stages, by the first start: over after update 5


def scored(accuracy: float) -> Score:
    """What a validation of four noises makes of a token: its log-probability follows its accuracy, and is
    never so low that the token counts as lost."""
    return Score(accuracy, (math.log(max(accuracy, 0.001)) / 10,) * 4)


@pytest.fixture(autouse=True)
def one_gradient_of_each_stage(monkeypatch):
    """A measured step is looked for after as many updates as there are stages."""
    monkeypatch.setattr(rules, "POOLED_UPDATES", 1)


def after(curriculum: Curriculum, epoch: int, accuracy: float, train_accuracy: float = 0.0) -> Step:
    """Offer a token of this validation accuracy after ``epoch``; what comes next.

    A measured step is made where that is a better one; without it nothing is offered.
    """
    if curriculum.looks_after(epoch):
        curriculum.looked(accuracy > curriculum.attempt.accuracy)
    is_scored = not curriculum.measures or curriculum.has_moved
    if is_scored:
        curriculum.offer(scored(accuracy), f"vector {epoch}", epoch, epoch)
    return curriculum.observe(epoch, train_accuracy, is_scored)


def walked(curriculum: Curriculum, accuracies: list[float]) -> list[Step]:
    """The steps after validations of these accuracies, the first one before any update."""
    return [after(curriculum, epoch, accuracy) for epoch, accuracy in enumerate(accuracies)]


def places(curriculum: Curriculum, accuracies: list[float]) -> list[tuple[int, bool, int]]:
    """Start, whether steps are measured, and stage of each update; each is validated, and so is the token
    before the first."""
    found = []
    after(curriculum, 0, accuracies[0])
    for epoch, accuracy in enumerate(accuracies[1:], start=1):
        found.append((curriculum.start, curriculum.measures, curriculum.stage))
        after(curriculum, epoch, accuracy)
    return found


def events(curriculum: Curriculum, accuracies: list[float]) -> list[tuple[int, Step]]:
    """After which updates training does not just go on, and what comes there, until it ends."""
    found = []
    for epoch, accuracy in enumerate(accuracies):
        step = after(curriculum, epoch, accuracy)
        found += [(epoch, step)] if step is not GO_ON else []
        if step is STOP:
            break
    return found


def test_nothing_heavy_is_imported():
    """A curriculum is tried out where there is no torch."""
    code = (
        "import sys; import discriminative.tokens.curriculum; "
        "heavy = ('torch', 'numpy', 'scipy', 'transformers', 'diffusers', 'config'); "
        "print([m for m in heavy if m in sys.modules])"
    )
    told = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "[]"


# Which of two tokens is better.


@pytest.mark.parametrize(("better", "worse"), [(0.1, 0.5), (0.0, 0.5), (0.5, 0.5), (0.0, 0.9), (0.9, 0.1)])
def test_below_nearly_right_the_log_probability_decides(better, worse):
    """A verdict more or less of twelve is luck, and below the first right one there is none."""
    surer = Score(better, (-1.0, -2.0, -3.0))
    other = Score(worse, (-1.5, -2.5, -3.6))
    assert surer.beats(other)
    assert not other.beats(surer)


@pytest.mark.parametrize(("better", "worse"), [(0.91, 0.9), (0.95, 0.92), (0.91, 0.0), (1.0, 0.99)])
def test_of_tokens_that_are_nearly_right_the_verdicts_decide(better, worse):
    """A few images that are surer still are worth less than one more that is right."""
    right = Score(better, (-1.5, -2.5, -3.6))
    other = Score(worse, (-1.0, -2.0, -3.0))
    assert right.beats(other)
    assert not other.beats(right)


def test_of_nearly_right_tokens_of_the_same_accuracy_the_surer_one_is_better():
    assert Score(0.95, (-0.1, -0.2)).beats(Score(0.95, (-0.3, -0.5)))
    assert not Score(0.95, (-0.3, -0.5)).beats(Score(0.95, (-0.1, -0.2)))


@pytest.mark.parametrize(
    ("gains", "is_better"),
    [
        ((-0.1, 2.0), False),  # .95 on average, of a standard error of 1.05
        ((0.1, 2.0), True),  # 1.05, of .95
        ((-1.0, 1.0), False),
        ((-0.1, -0.1), False),
        ((0.0, 0.0), False),
        ((0.1, 0.1), True),
        ((-1.0, 1.0, 1.0, 1.0) * 9, True),
        ((-5.0, 1.0, 1.0, 4.0), False),
    ],
)
def test_a_gain_within_chance_is_none(gains, is_better):
    """The best of many that are as good is the luckiest one: patience would never end."""
    other = Score(0.5, (-9.0,) * len(gains))
    assert Score(0.5, tuple(-9.0 + gain for gain in gains)).beats(other) is is_better


def test_the_same_noises_are_compared():
    """Noises differ far more from each other than tokens do, and each is drawn with both."""
    other = (-0.01, -1.0, -3.0, -9.0)
    assert Score(0.0, tuple(p + 0.05 + 0.001 * i for i, p in enumerate(other))).beats(Score(0.0, other))
    assert not Score(0.0, (-8.95, -2.9, -0.9, 0.0)).beats(Score(0.0, other))  # as much more, in another order


def test_a_token_does_not_beat_itself():
    for accuracy in (0.0, 0.5, 0.95, 1.0):
        score = Score(accuracy, (-0.01, -1.0, -3.0))
        assert not score.beats(score)


def test_of_a_validation_that_drew_more_the_noises_of_both_are_compared():
    few = Score(0.5, (-1.0, -2.0))
    assert few.beats(Score(0.5, (-1.1, -2.1, 0.0, 0.0)))
    assert Score(0.5, (-0.9, -1.9, -99.0, -99.0)).beats(few)


def test_of_one_loss_each_the_lower_is_better():
    """There is no standard error of one, as the paper's rule has it."""
    assert Score(0.0, (-1.0,)).beats(Score(0.0, (-1.001,)))
    assert not Score(0.0, (-1.001,)).beats(Score(0.0, (-1.0,)))


# The best token.


def test_the_best_token_is_the_earlier_one_where_both_are_alike():
    curriculum = Curriculum(SETTINGS)
    offers = [(-2.0, True), (-1.0, True), (-1.0, False), (-1.5, False)]
    for epoch, (log_probability, is_best) in enumerate(offers):
        score = Score(0.5, (log_probability,) * 3)
        assert curriculum.offer(score, f"vector {epoch}", epoch, epoch) is is_best
    assert curriculum.best == Best(Score(0.5, (-1.0,) * 3), "vector 1", 1, 1)


def test_a_better_token_within_chance_is_not_kept():
    """Nor does it give the stage more patience."""
    curriculum = Curriculum(SETTINGS, stages=2)
    curriculum.offer(Score(0.0, (-3.0, -3.0)), "vector 0", 0, 0)
    for epoch, expected in ((1, GO_ON), (2, MEASURE)):
        assert not curriculum.offer(Score(0.5, (-1.0, -4.5)), f"vector {epoch}", epoch, epoch)
        assert curriculum.observe(epoch, 0.0, is_scored=True) is expected
    assert curriculum.best.vector == curriculum.attempt.vector == "vector 0"


def test_a_first_token_is_the_best_however_bad_it_is():
    assert Curriculum(SETTINGS).offer(Score(0.0, (-1000.0,)), "vector", 1, 1)
    assert Best().accuracy < 0
    assert Best().beaten_by(Score(0.0, (-math.inf,)))


def test_the_best_token_says_how_good_it_is():
    """Where no image is right, or none was looked at, its log-probability alone."""
    assert str(Best()) == "none"
    assert str(Best(Score(0.5, (-1.0, -2.0)), "vector", 7, 7)) == "0.50 right, -1.50 after 7"
    assert str(Best(Score(0.0, (-3.0,)), "vector", 5, 4)) == "-3.00 after 5"


def test_the_updates_that_made_a_token_need_not_be_those_after_which_it_was_found():
    """A loss is that of the images which the token before the update drew."""
    curriculum = Curriculum(SETTINGS)
    curriculum.offer(Score(0.0, (-3.0,)), "vector", 5, 4)
    assert (curriculum.best.epoch, curriculum.best.updates) == (5, 4)


def test_the_best_token_of_all_outlives_its_start():
    curriculum = Curriculum(SETTINGS, starts=2)
    assert walked(curriculum, [0.1, 0.2, 0.15, 0.12, 0.12])[-2:] == [NEXT_START, GO_ON]
    assert curriculum.best.vector == "vector 1"
    assert curriculum.attempt.vector == "vector 4"
    assert not curriculum.offer(scored(0.15), "vector 5", 5, 5)  # the best of its start alone
    assert curriculum.attempt.vector == "vector 5"
    assert curriculum.best.vector == "vector 1"


# The first stage from every start.


def test_a_start_in_vain_gives_way_to_the_next():
    curriculum = Curriculum(SETTINGS, stages=3, starts=2)
    assert walked(curriculum, [0.1, 0.1, 0.1]) == [GO_ON, GO_ON, NEXT_START]
    assert (curriculum.start, curriculum.stage, curriculum.measures) == (1, 0, False)
    assert curriculum.attempt == Best()


def test_a_start_is_left_only_where_it_brings_nothing_any_more():
    """A token that is a little better again and again gets there; one that was better once has not."""
    curriculum = Curriculum(SETTINGS, stages=2, starts=2)
    accuracies = [0.1, 0.12, 0.14, 0.14, 0.16, 0.18, 0.18, 0.18]
    assert events(curriculum, accuracies) == [(7, NEXT_START)]


def test_a_start_that_makes_the_token_clearly_better_goes_on_at_the_next_stage_at_once():
    curriculum = Curriculum(SETTINGS, stages=2, starts=2)
    assert walked(curriculum, [0.1, 0.2, 0.5]) == [GO_ON, GO_ON, NEXT_STAGE]
    assert (curriculum.start, curriculum.stage, curriculum.measures) == (0, 1, False)
    assert curriculum.attempt.vector == "vector 2"


def test_the_first_start_that_helps_is_the_one_that_is_gone_on_from():
    """The third is not tried."""
    curriculum = Curriculum(SETTINGS, stages=2, starts=3)
    assert events(curriculum, [0.1, 0.1, 0.1, 0.2, 0.5]) == [(2, NEXT_START), (4, NEXT_STAGE)]
    assert (curriculum.start, curriculum.attempt.vector) == (1, "vector 4")


@pytest.mark.parametrize(
    ("first", "accuracy", "is_clearly_better"),
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
def test_a_clearly_better_token_has_gone_a_quarter_of_the_way_or_is_nearly_right(
    first, accuracy, is_clearly_better
):
    curriculum = Curriculum(SETTINGS, stages=2)
    assert walked(curriculum, [first, accuracy])[1] is (NEXT_STAGE if is_clearly_better else GO_ON)
    assert curriculum.is_clearly_better(Best(scored(accuracy))) is is_clearly_better


def test_no_token_is_not_clearly_better():
    curriculum = Curriculum(SETTINGS)
    assert not curriculum.is_clearly_better(Best())
    after(curriculum, 0, 0.0)
    assert not curriculum.is_clearly_better(Best())


def test_clearly_better_counts_from_the_first_start():
    """Another start may be a worse one: its tokens are compared with what came for nothing."""
    curriculum = Curriculum(SETTINGS, stages=2, starts=2)
    accuracies = [0.4, 0.1, 0.1, 0.0, 0.5, 0.54, 0.56]
    assert events(curriculum, accuracies) == [(2, NEXT_START), (6, NEXT_STAGE)]


def test_where_no_start_helps_steps_are_measured_from_the_best_token_of_all():
    """A guide that says too little in one update may say enough in many."""
    curriculum = Curriculum(SETTINGS, stages=3, starts=2)
    steps = events(curriculum, [0.1, 0.15, 0.1, 0.1, 0.05, 0.05, 0.05])
    assert steps == [(3, NEXT_START), (6, MEASURE)]
    assert (curriculum.stage, curriculum.measures) == (0, True)
    assert curriculum.attempt is curriculum.best
    assert curriculum.attempt.vector == "vector 1"


def under_a_sure_guide(**changes) -> Curriculum:
    """Three stages and two starts, where the guide is sure of what it sees."""
    curriculum = Curriculum(replace(SETTINGS, **changes), stages=3, starts=2)
    curriculum.sureness = 0.8
    return curriculum


def test_a_sure_guide_gives_a_start_its_patience_and_no_more():
    """The log-probability of a class that it does not see may rise for long, and the class never come."""
    rising = [0.1, 0.11, 0.12, 0.13, 0.14, 0.15]
    assert events(under_a_sure_guide(), rising) == [(2, NEXT_START), (4, NEXT_START)]
    assert events(Curriculum(SETTINGS, stages=3, starts=2), rising) == []


def test_a_sure_guide_has_starts_tried_again_until_one_helps():
    """After measured steps from a start in vain a hand palm had 0 of 100 images; the third start had it."""
    curriculum = under_a_sure_guide()
    steps = events(curriculum, [0.1] * 7 + [0.5, 0.6])
    assert steps == [(2, NEXT_START), (4, NEXT_START), (6, NEXT_START), (7, NEXT_STAGE)]
    assert not curriculum.searches


def test_in_vain_under_a_sure_guide_each_start_is_tried_three_times_and_then_the_later_stages():
    """A guide may be sure of whole images, and see nothing in the first stage's."""
    curriculum = under_a_sure_guide()
    steps = events(curriculum, [0.15, *[0.1] * 20])
    assert steps[:6] == [*((epoch, NEXT_START) for epoch in (2, 4, 6, 8, 10)), (12, NEXT_STAGE)]
    assert curriculum.attempt.vector == "vector 0"  # the best of all
    assert steps[6:] == [(14, NEXT_STAGE), (16, STOP)]
    assert curriculum.stopped_by == "no_progress"


def test_under_a_sure_guide_starts_are_tried_until_the_end_once_one_helped():
    curriculum = under_a_sure_guide(max_epochs=40)
    steps = events(curriculum, [0.1, 0.5, *[0.1] * 39])
    assert steps[:3] == [(1, NEXT_STAGE), (3, NEXT_STAGE), (7, NEXT_START)]
    assert [step for _, step in steps[3:-1]] == [NEXT_START] * 16
    assert curriculum.stopped_by == "max_epochs"


def test_a_sure_guides_verdicts_decide_and_of_equal_ones_the_loss():
    curriculum = under_a_sure_guide()
    after(curriculum, 0, 0.1)
    curriculum.offer(Score(0.3, (-9.0, -9.0)), "more right ones", 1, 1)
    curriculum.offer(Score(0.2, (-1.0, -1.0)), "more probable", 2, 2)
    assert curriculum.best.vector == "more right ones"
    curriculum.offer(Score(0.3, (-8.0, -9.9)), "a little more probable", 3, 3)
    assert curriculum.best.vector == "a little more probable"


def test_under_a_sure_guide_a_later_stage_goes_on_as_long_as_it_makes_a_better_token():
    rising = [0.1, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75]
    assert events(under_a_sure_guide(), rising) == [(1, NEXT_STAGE)]


def test_under_a_sure_guide_the_last_stage_is_followed_by_another_start():
    """A ribbon bow had 300 s of measured steps that brought nothing; the next start had it in 40 updates."""
    steps = events(under_a_sure_guide(), [0.1, 0.5, 0.6, *[0.5] * 6])
    assert steps == [(1, NEXT_STAGE), (4, NEXT_STAGE), (8, NEXT_START)]


def test_measured_steps_pool_each_stage_in_turn():
    curriculum = Curriculum(SETTINGS, stages=3)
    assert places(curriculum, [0.1] * 9)[2:] == [(0, True, i) for i in (0, 1, 2, 0, 1, 2)]


def test_a_look_comes_after_as_many_updates_of_each_stage(monkeypatch):
    monkeypatch.setattr(rules, "POOLED_UPDATES", 2)
    curriculum = Curriculum(SETTINGS, stages=2)
    walked(curriculum, [0.1] * 3)
    stages = []
    looks = []
    for epoch in range(3, 11):
        stages.append(curriculum.stage)
        looks.append(curriculum.looks_after(epoch))
        after(curriculum, epoch, 0.1)
    assert stages == [0, 0, 1, 1] * 2
    assert looks == [False, False, False, True] * 2


def test_a_token_is_scored_after_a_measured_step_alone():
    curriculum = Curriculum(SETTINGS, stages=2)
    walked(curriculum, [0.1] * 3)
    assert not curriculum.is_due(3, 0.0)
    after(curriculum, 3, 0.1)
    curriculum.looked(True)
    assert curriculum.is_due(4, 0.0)


def test_a_measured_step_is_the_best_token_whatever_the_validation_says():
    """It was proved on more noises than a validation has."""
    curriculum = Curriculum(SETTINGS)
    walked(curriculum, [0.1] * 3)
    curriculum.looked(True)
    assert curriculum.offer(scored(0.05), "measured", 3, 3)
    assert curriculum.attempt.vector == curriculum.best.vector == "measured"


def test_a_measured_step_of_a_later_start_need_not_be_the_best_of_all():
    curriculum = Curriculum(SETTINGS, stages=1, starts=2)
    curriculum.best = Best(scored(0.8), "of an earlier start", 1, 1)
    curriculum.attempt = Best(scored(0.3), "of this start", 2, 2)
    curriculum.looked(True)
    assert not curriculum.offer(scored(0.4), "measured", 3, 3)
    assert (curriculum.attempt.vector, curriculum.best.vector) == ("measured", "of an earlier start")


def test_no_start_is_tried_again_where_nothing_helped():
    """Each start once, two looks for a measured step, and that is the end."""
    curriculum = Curriculum(SETTINGS, stages=3, starts=2)
    ended = events(curriculum, [0.1] * 20)
    assert ended == [(2, NEXT_START), (5, MEASURE), (11, STOP)]
    assert (curriculum.stopped_by, curriculum.looks) == ("no_progress", 2)
    assert curriculum.best.vector == "vector 0"


def test_steps_are_measured_for_as_long_as_they_help():
    """One look in vain is none: with twice the gradients the next may not be."""
    curriculum = Curriculum(SETTINGS)
    steps = events(curriculum, [0.1, 0.1, 0.1, 0.15, 0.1, 0.16, 0.17, 0.1, 0.1])
    assert steps == [(2, MEASURE), (8, STOP)]
    assert (curriculum.best.vector, curriculum.looks) == ("vector 6", 6)


def test_a_token_that_is_a_little_better_makes_no_start_worth_another_try():
    """It is kept, where measured steps bring nothing more to it."""
    curriculum = Curriculum(SETTINGS, starts=2)
    assert events(curriculum, [0.1, 0.15, *[0.1] * 20]) == [(3, NEXT_START), (6, MEASURE), (8, STOP)]
    assert (curriculum.stopped_by, curriculum.best.vector) == ("no_progress", "vector 1")


def trained_in_vain(settings: CurriculumSettings, stages: int, starts: int) -> tuple[int, Curriculum]:
    """After how many updates a training ends that never makes a better token."""
    curriculum = Curriculum(settings, stages, starts)
    after(curriculum, 0, 0.0)
    for epoch in range(1, settings.max_epochs + 1):
        if curriculum.looks_after(epoch):
            curriculum.looked(False)
        is_scored = curriculum.is_due(epoch, 0.0)
        if is_scored:
            curriculum.offer(scored(0.0), f"vector {epoch}", epoch, epoch)
        step = curriculum.observe(epoch, 0.0, is_scored)
        if step is STOP:
            break
        if step is NEXT_START:
            curriculum.offer(scored(0.0), f"start {curriculum.start}", epoch, epoch)
    return epoch, curriculum


def test_training_in_vain_ends_within_a_hundred_updates(monkeypatch):
    """Of some guides no token is to be had: two starts of 20 updates and two looks say so, not 300."""
    monkeypatch.setattr(rules, "POOLED_UPDATES", 10)
    settings = RunConfig().learning()
    assert settings.curriculum.validate_every == 10
    number, curriculum = trained_in_vain(settings.curriculum, len(settings.stages), len(settings.starts))
    assert (number, curriculum.stopped_by) == (100, "no_progress")
    assert curriculum.best.vector == "vector 0"


# Stage by stage, then measured steps.


def test_a_stage_goes_on_as_long_as_it_makes_a_better_token():
    curriculum = Curriculum(SETTINGS, stages=3)
    steps = events(curriculum, [0.0, 0.3, 0.4, 0.5, 0.6, 0.7, 0.6, 0.6])
    assert steps == [(1, NEXT_STAGE), (7, NEXT_STAGE)]
    assert curriculum.attempt.vector == "vector 5"  # not the last one


def test_each_stage_has_its_patience_and_the_last_twice_as_much():
    curriculum = Curriculum(SETTINGS, stages=3, starts=2)
    accuracies = [0.1, 0.3, 0.5, 0.6, 0.4, 0.4, 0.5, 0.5, 0.5, 0.5, 0.2]
    stages = [(0, False, 0)] * 2 + [(0, False, 1)] * 3 + [(0, False, 2)] * 4 + [(0, True, 0)]
    assert places(curriculum, accuracies) == stages


def test_a_stage_has_its_patience_from_where_it_began():
    """Updates that the stage before it spent do not count."""
    curriculum = Curriculum(replace(SETTINGS, attempt_patience=3), stages=3)
    assert events(curriculum, [0.0, 0.0, 0.5, 0.4, 0.4, 0.4]) == [(2, NEXT_STAGE), (5, NEXT_STAGE)]


@pytest.mark.parametrize(
    ("stages", "accuracy", "patience"),
    [(1, 0.5, 2), (2, 0.5, 4), (3, 0.5, 4)],
)
def test_the_last_of_several_stages_has_twice_the_patience_with_a_clearly_better_token(
    stages, accuracy, patience
):
    """A single stage, which is the first one too, has not."""
    curriculum = Curriculum(SETTINGS, stages=stages)
    epoch = 0
    after(curriculum, epoch, 0.0)
    while curriculum.stage < stages - 1:
        epoch += 1
        after(curriculum, epoch, accuracy)
    began = max(epoch, curriculum.attempt.epoch)
    while after(curriculum, epoch + 1, 0.0) is GO_ON:
        epoch += 1
    assert epoch + 1 - began == patience


def test_patience_runs_between_validations_too():
    curriculum = Curriculum(SETTINGS, stages=2, starts=2)
    after(curriculum, 0, 0.0)
    assert curriculum.observe(1, 0.0, is_scored=False) is GO_ON
    assert curriculum.observe(2, 0.0, is_scored=False) is NEXT_START


def test_before_the_first_update_no_stage_is_over():
    settings = replace(SETTINGS, attempt_patience=0)
    assert after(Curriculum(settings, stages=2), 0, 1.0) is GO_ON


def test_after_the_last_stage_steps_are_measured_from_its_best_token():
    curriculum = Curriculum(SETTINGS, stages=2, starts=2)
    steps = events(curriculum, [0.1, 0.5, 0.6, *[0.5] * 8])
    assert steps == [(1, NEXT_STAGE), (6, MEASURE), (10, NEXT_START)]
    assert curriculum.best.vector == "vector 2"
    assert not curriculum.measures


def test_one_stage_is_followed_by_measured_steps_too():
    curriculum = Curriculum(SETTINGS)
    steps = events(curriculum, [0.0, 0.3, 0.4, 0.5, 0.6, 0.6, 0.6, 0.6, 0.6])
    assert steps == [(6, MEASURE), (8, NEXT_START)]
    assert (curriculum.start, curriculum.stage) == (0, 0)  # the only start, from its beginning


def test_from_a_nearly_right_token_no_steps_are_measured():
    """It goes on to another start, which may find a better one, with large steps again."""
    curriculum = Curriculum(SETTINGS, stages=2, starts=2)
    steps = events(curriculum, [0.1, 0.5, 0.91, 0.5, 0.5, 0.5, 0.5])
    assert steps == [(1, NEXT_STAGE), (6, NEXT_START)]


# Another start.


def test_the_next_start_forgets_the_best_token_of_the_one_before():
    curriculum = Curriculum(SETTINGS, stages=2, starts=2)
    assert walked(curriculum, FOUND)[-1] is NEXT_START
    assert (curriculum.start, curriculum.measures, curriculum.stage) == (1, False, 0)
    assert curriculum.attempt == Best()
    assert curriculum.best.accuracy == 0.95


def test_a_later_start_goes_on_with_its_own_best_token():
    """Not with the best of all, which another start found."""
    curriculum = Curriculum(SETTINGS, stages=2, starts=2)
    assert events(curriculum, [*FOUND, 0.3, 0.5])[-1] == (7, NEXT_STAGE)
    assert curriculum.attempt.vector == "vector 7"
    assert curriculum.best.vector == "vector 1"


def test_a_later_start_in_vain_gives_way_to_the_next_and_to_no_stage():
    """The best token of all had its stages."""
    curriculum = Curriculum(SETTINGS, stages=2, starts=2)
    assert events(curriculum, [*FOUND, 0.1, 0.1, 0.1])[-1] == (8, NEXT_START)
    assert (curriculum.start, curriculum.stage) == (0, 0)


def test_after_the_last_start_comes_the_first_again():
    """With other noises it may be another matter."""
    curriculum = Curriculum(SETTINGS, stages=2, starts=3)
    walked(curriculum, FOUND)
    seen = []
    for epoch in range(6, 13):
        seen.append(curriculum.start)
        after(curriculum, epoch, 0.1)
    assert seen == [1, 1, 1, 2, 2, 2, 0]


@pytest.mark.parametrize("starts", [1, 2, 3])
def test_training_ends_once_every_start_was_tried_again_in_vain(starts):
    curriculum = Curriculum(SETTINGS, stages=2, starts=starts)
    steps = events(curriculum, [*FOUND, *[0.1] * 30])
    tried = [(5 + 3 * i, NEXT_START) for i in range(starts)]  # a new start's first token is its best
    assert steps == [(1, NEXT_STAGE), *tried, (5 + 3 * starts, STOP)]
    assert (curriculum.stopped_by, curriculum.best.vector) == ("no_progress", "vector 1")


def test_a_start_that_made_the_best_token_of_all_lets_all_be_tried_once_more():
    curriculum = Curriculum(SETTINGS, stages=2, starts=2)
    better = [0.97, *[0.5] * 4]  # clearly better at once, then the last stage's patience
    steps = events(curriculum, [*FOUND, *[0.1] * 3, *better, *[0.1] * 30])
    starts = [epoch for epoch, step in steps if step is NEXT_START]
    assert starts == [5, 8, 13, 16]
    assert steps[-1] == (19, STOP)
    assert (curriculum.stopped_by, curriculum.best.vector) == ("no_progress", "vector 9")


def test_a_start_that_is_the_best_token_of_all_by_itself_has_helped_too():
    """It is scored after the update that left the start before it."""
    curriculum = Curriculum(SETTINGS, stages=2)
    assert walked(curriculum, FOUND)[-1] is NEXT_START
    assert curriculum.offer(scored(0.97), "start", 5, 5)
    later = [after(curriculum, epoch, 0.5) for epoch in range(6, 11)]
    assert later == [NEXT_STAGE, GO_ON, GO_ON, GO_ON, NEXT_START]


# What ends training.


def test_stopping_rules_are_told_apart():
    settings = CurriculumSettings(
        max_epochs=50,
        patience=5,
        stop_train_accuracy=0.7,
        stop_validation_accuracy=0.9,
        validate_every=5,
    )

    def rule(epoch, accuracy, is_scored, validation_accuracy=0.5, **changes):
        curriculum = Curriculum(replace(settings, **changes))
        curriculum.offer(Score(validation_accuracy, (-1.0,)), "vector", 10, 10)
        return curriculum.stopping_rule(epoch, accuracy, is_scored)

    assert rule(12, 0.6, False) == ""
    assert rule(12, 0.7, False) == ""
    assert rule(12, 0.8, True) == "train_accuracy"
    assert rule(14, 0.6, True) == ""
    assert rule(15, 0.6, True) == "patience"
    assert rule(15, 0.6, False) == ""
    assert rule(50, 0.6, True, patience=0) == "max_epochs"
    assert rule(49, 0.6, True, patience=0) == ""
    assert rule(12, 0.6, False, 0.9) == "validation_accuracy"
    assert rule(12, 0.6, False, 0.89) == ""
    assert rule(12, 0.6, False, 1.0, stop_validation_accuracy=0.0) == ""


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
    settings = replace(SETTINGS, validate_every=5, max_epochs=12, attempt_patience=NEVER)
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


def test_a_first_token_that_is_enough_ends_by_that_and_not_for_want_of_progress():
    """A word that does already cannot be made clearly better."""
    settings = replace(SETTINGS, enough_validation_accuracy=0.95)
    curriculum = Curriculum(settings, stages=2, starts=2)
    assert events(curriculum, [0.96] * 20) == [(2, STOP)]
    assert curriculum.stopped_by == "enough"


def test_the_best_token_of_an_earlier_start_is_enough_too():
    """It holds for the best of all, whichever start has just failed."""
    settings = replace(SETTINGS, enough_validation_accuracy=0.93)
    curriculum = Curriculum(settings, stages=1, starts=2)
    curriculum.best = Best(scored(0.94), "of an earlier start", 1, 1)
    curriculum.searches = False
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
    small = []
    for epoch, accuracy in enumerate([0.1, 0.5, 0.95, 0.7, 0.7, 0.7, 0.7, 0.7]):
        after(curriculum, epoch, accuracy)
        small.append(curriculum.is_nearly_right)
    assert small == [False, False, True, True, True, True, False, False]
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


# The token of the lowest loss, which the trainer offers as a log-probability, with no image right.


def of_loss(loss: float) -> Score:
    """What the trainer makes of a loss."""
    return Score(0.0, (-loss,))


def test_without_patience_of_stages_no_stage_and_no_start_ever_changes():
    """As the paper learns: one stage from one start, until a rule ends it."""
    curriculum = Curriculum(replace(SETTINGS, attempt_patience=NEVER, max_epochs=300))
    steps = []
    for epoch in range(1, 301):
        loss = 1.0 / epoch if epoch < 100 else 5.0
        curriculum.offer(of_loss(loss), f"vector {epoch}", epoch, epoch - 1)
        steps.append(curriculum.observe(epoch, 0.5, is_scored=True))
        assert (curriculum.start, curriculum.stage, curriculum.measures) == (0, 0, False)
    assert steps == [GO_ON] * 299 + [STOP]
    assert curriculum.stopped_by == "max_epochs"
    assert curriculum.best == Best(of_loss(1.0 / 99), "vector 99", 99, 98)


def test_patience_of_the_paper_counts_updates_without_a_lower_loss():
    curriculum = Curriculum(replace(SETTINGS, attempt_patience=NEVER, patience=3))
    for epoch, loss in enumerate([3.0, 2.0, 2.5, 2.5, 2.5, 2.5], start=1):
        curriculum.offer(of_loss(loss), f"vector {epoch}", epoch, epoch - 1)
        if curriculum.observe(epoch, 0.0, is_scored=True) is STOP:
            break
    assert (epoch, curriculum.stopped_by, curriculum.best.updates) == (5, "patience", 1)


def test_a_loss_is_no_accuracy():
    """However low: it ends no training as a validation would, and makes no token nearly right."""
    settings = replace(SETTINGS, stop_validation_accuracy=0.9, enough_validation_accuracy=0.95)
    curriculum = Curriculum(replace(settings, attempt_patience=NEVER))
    for epoch, loss in enumerate([5.0, 0.95, 1e-9, 0.0], start=1):
        curriculum.offer(of_loss(loss), "vector", epoch, epoch - 1)
        assert curriculum.observe(epoch, 0.0, is_scored=True) is GO_ON
        assert not curriculum.is_nearly_right
    assert curriculum.best.epoch == 4


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


@pytest.mark.parametrize("validate_every", [10, 15, 25, 50])
def test_no_stage_ends_with_a_token_that_was_never_scored(validate_every):
    settings = replace(RunConfig().learning().curriculum, validate_every=validate_every)
    curriculum = Curriculum(settings, stages=3, starts=2)
    curriculum.offer(Score(0.0, (-5.0, -5.0)), "start", 0, 0)
    curriculum.observe(0, 0.0, is_scored=True)
    step = GO_ON
    epoch = 0
    while step is not STOP:
        epoch += 1
        measures = curriculum.measures
        if curriculum.looks_after(epoch):
            curriculum.looked(False)
        is_scored = curriculum.is_due(epoch, 0.0)
        if is_scored:
            curriculum.offer(Score(0.0, (-5.0, -5.0)), "vector", epoch, epoch)
        step = curriculum.observe(epoch, 0.0, is_scored)
        assert step is GO_ON or is_scored or measures  # a look in vain leaves the best token as it was
    assert curriculum.stopped_by == "no_progress"


# --- a token that is lost


def lost(curriculum: Curriculum, losses: list[float], first: int = 1) -> list[Step]:
    """The steps after validations of these losses."""
    steps = []
    for epoch, loss in enumerate(losses, start=first):
        curriculum.offer(Score(0.1, (-loss,) * 4), f"vector {epoch}", epoch, epoch)
        steps.append(curriculum.observe(epoch, 0.0, is_scored=True))
    return steps


def test_a_token_that_stays_lost_for_the_patience_goes_back_to_the_best_with_half_the_rate():
    curriculum = Curriculum(replace(SETTINGS, attempt_patience=3))
    assert lost(curriculum, [2.0, 4.1, 4.1, 4.1]) == [GO_ON] * 3 + [Step.GO_BACK]
    assert curriculum.rate == 0.5
    assert curriculum.attempt.vector == "vector 1"
    assert lost(curriculum, [9.0, 3.9], first=5) == [GO_ON] * 2  # not twice the best


def test_a_token_that_is_lost_a_third_time_fails():
    curriculum = Curriculum(SETTINGS)
    lost(curriculum, [2.0])
    assert lost(curriculum, [9.0] * 4, first=2) == [GO_ON, Step.GO_BACK] * 2
    with pytest.raises(WorkError, match=r"every token of 2 updates was lost \(the rate was halved 2 times"):
        lost(curriculum, [9.0] * 2, first=6)


def test_of_small_losses_twice_is_no_harm():
    curriculum = Curriculum(replace(SETTINGS, attempt_patience=NEVER, patience=3))
    lost(curriculum, [0.1])
    assert Step.GO_BACK not in lost(curriculum, [1.9] * 2, first=2)


def test_nothing_is_lost_before_it_is_validated():
    curriculum = Curriculum(SETTINGS)
    lost(curriculum, [2.0])
    assert [curriculum.observe(epoch, 0.0, is_scored=False) for epoch in (2, 3, 4)].count(Step.GO_BACK) == 0


def test_another_start_is_measured_by_its_own_best_token():
    """It may be far worse than the best of all at first."""
    curriculum = Curriculum(SETTINGS, stages=2, starts=2)
    curriculum.offer(Score(0.1, (-2.0,) * 4), "vector 0", 0, 0)
    curriculum.observe(0, 0.0, is_scored=True)
    assert lost(curriculum, [3.0, 3.0]) == [GO_ON, NEXT_START]
    curriculum.offer(Score(0.1, (-20.0,) * 4), "start", 2, 0)
    assert Step.GO_BACK not in lost(curriculum, [19.0, 18.0], first=3)


def test_a_curriculum_goes_on_from_its_state_as_if_nothing_had_happened():
    """After every update, through stages, starts and measured steps, by way of a file."""
    random = Random(3)
    scores = [Score(random.random() / 2, tuple(-random.random() for _ in range(4))) for _ in range(200)]
    settings = replace(SETTINGS, attempt_patience=4, validate_every=2)

    def step(curriculum: Curriculum, epoch: int) -> Step:
        if curriculum.looks_after(epoch):
            curriculum.looked(epoch % 3 == 0)
        scored = curriculum.is_due(epoch, 0.0)
        if scored:
            curriculum.offer(scores[epoch], f"vector {epoch}", epoch, epoch)
        return curriculum.observe(epoch, 0.0, scored)

    whole = Curriculum(settings, stages=3, starts=2)
    resumed = Curriculum(settings, stages=3, starts=2)
    for epoch in range(200):
        assert step(whole, epoch) == step(resumed, epoch)
        state = json.loads(json.dumps(resumed.state()))
        vectors = {"attempt": resumed.attempt.vector, "best": resumed.best.vector}
        resumed = Curriculum(settings, stages=3, starts=2)
        resumed.restore(state, vectors)
        assert vars(resumed) == vars(whole)
    assert whole.looks
    assert whole.left
