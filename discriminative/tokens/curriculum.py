"""When training goes on to another stage or start, and when it ends. Pure: it sees scores, no model.

The first stage has to leave the plateau on which no image is right, and is over once the token is clearly
better than the start. A later one makes the token reliable, from the best one of the attempt on, until it
brings nothing any more: the second settles what is drawn, the third how it looks. From which start the
plateau is left differs from class to class.
"""

import math
from dataclasses import dataclass
from enum import Enum
from typing import Any

from discriminative.settings import CurriculumSettings

MIN_PROGRESS = 0.25  # share of the way from the start's accuracy to 1 after which a token is clearly better
NEARLY_RIGHT_ACCURACY = 0.9  # validation accuracy from which large steps would do a token harm
LAST_STAGE_PATIENCE = 2  # times as long: a late step makes a token worse before it makes it better


class Step(Enum):
    """What training does next."""

    GO_ON = "go on"
    NEXT_STAGE = "next stage"
    NEXT_START = "next start"
    STOP = "stop"


@dataclass
class Best:
    """The best token so far, by a score that is compared as tuples are; higher is better.

    Args:
        score: () where none was scored yet.
        vector: the token, whatever the caller keeps of it.
        epoch: update after which it was found; patience counts from here.
        updates: after which it was what it is.
    """

    score: tuple = ()
    vector: Any = None
    epoch: int = 0
    updates: int = 0

    @property
    def accuracy(self) -> float:
        """The first figure of the score; -1 where there is none."""
        return self.score[0] if self.score else -1.0

    def beaten_by(self, score: tuple) -> bool:
        """Whether ``score`` is better."""
        return not self.score or score > self.score

    def __str__(self) -> str:
        return f"{abs(self.score[0]):.2f} after {self.epoch}" if self.score else "none"


class Curriculum:
    """Stage by stage from a start, and again from the next start where that brings nothing.

    Args:
        stages: number of stages.
        starts: number of starts, tried in turn.

    Raises:
        ValueError: ``enough_validation_accuracy`` is so low that no whole validation would stand behind it.
    """

    def __init__(self, settings: CurriculumSettings, stages: int = 1, starts: int = 1):
        enough = settings.enough_validation_accuracy
        if 0 < enough <= NEARLY_RIGHT_ACCURACY:
            allowed = f"0 or above {NEARLY_RIGHT_ACCURACY}"
            raise ValueError(f"enough_validation_accuracy: {enough} was given; allowed is {allowed}")
        self.settings = settings
        self.stages = stages
        self.starts = starts
        self.stage = 0
        self.start = 0
        self.began = 0  # update after which the stage began
        self.first = -math.inf  # validation accuracy of the first start
        self.attempt = Best()  # of this start
        self.best = Best()  # of all
        self.stopped_by = ""

    @property
    def is_nearly_right(self) -> bool:
        """Whether the attempt's best token is so good that steps are to be small."""
        return self.attempt.accuracy > NEARLY_RIGHT_ACCURACY

    @property
    def to_confirm(self) -> float:
        """The accuracy above which a token's whole validation is drawn: it would be the best of its start."""
        return max(NEARLY_RIGHT_ACCURACY, self.attempt.accuracy)

    @property
    def has_progress(self) -> bool:
        """Whether the attempt's best token is clearly better than the first start, or better and nearly
        right."""
        clearly = self.first + MIN_PROGRESS * (1 - self.first)
        nearly_right = max(self.first, NEARLY_RIGHT_ACCURACY)
        return bool(self.attempt.score) and self.attempt.accuracy > min(clearly, nearly_right)

    @property
    def has_next_stage(self) -> bool:
        """Whether there is a next stage for the attempt's best token."""
        return self.has_progress and self.stage + 1 < self.stages

    def is_due(self, epoch: int, accuracy: float) -> bool:
        """Whether the token is to be validated after ``epoch``: every so often, and before training ends."""
        settings = self.settings
        is_last = epoch == settings.max_epochs or accuracy > settings.stop_train_accuracy
        return is_last or epoch % settings.validate_every == 0

    def offer(self, score: tuple, vector: Any, epoch: int, updates: int) -> bool:
        """Take a token's score into account, and keep its vector if it is the best; says whether it is,
        of all."""
        if not epoch:
            self.first = score[0]
        found = Best(score, vector, epoch, updates)
        if self.attempt.beaten_by(score):
            self.attempt = found
        is_best = self.best.beaten_by(score)
        if is_best:
            self.best = found
        return is_best

    def observe(self, epoch: int, accuracy: float, is_scored: bool) -> Step:
        """What comes after update ``epoch`` (0: before the first); moves on to the stage or start that it
        names.

        Args:
            accuracy: share of the update's images that every guide gives to the class.
            is_scored: whether the token was offered after this update.
        """
        self.stopped_by = self.stopping_rule(epoch, accuracy, is_scored)
        if self.stopped_by:
            return Step.STOP
        if not epoch or not self.is_over(epoch):
            return Step.GO_ON
        self.began = epoch
        if self.has_next_stage:
            self.stage += 1
            return Step.NEXT_STAGE
        if 0 < self.settings.enough_validation_accuracy <= self.best.accuracy:
            self.stopped_by = "enough"
            return Step.STOP
        self.start = (self.start + 1) % self.starts
        self.stage = 0
        self.attempt = Best()
        return Step.NEXT_START

    def stopping_rule(self, epoch: int, accuracy: float, is_scored: bool) -> str:
        """Name of the rule that ends training after ``epoch`` updates, or ""."""
        settings = self.settings
        if epoch and accuracy > settings.stop_train_accuracy:
            return "train_accuracy"
        if 0 < settings.stop_validation_accuracy <= self.best.accuracy:
            return "validation_accuracy"
        if settings.patience and is_scored and epoch - self.best.epoch >= settings.patience:
            return "patience"
        return "max_epochs" if epoch >= settings.max_epochs else ""

    def is_over(self, epoch: int) -> bool:
        """Whether the stage has done its part, or brings nothing any more."""
        has_left_the_plateau = self.stage == 0 and self.has_next_stage
        since = max(self.began, self.attempt.epoch if self.has_progress else 0)
        is_last = 0 < self.stage == self.stages - 1
        patience = self.settings.attempt_patience * (LAST_STAGE_PATIENCE if is_last else 1)
        return has_left_the_plateau or epoch - since >= patience
