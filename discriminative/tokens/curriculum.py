"""When training goes on to another stage or start, and when it ends. Pure: it sees scores, no model.

Which place of the gradient helps differs from class to class, from guide to guide, and along the way. The
first stage is tried from every start, until one makes the token clearly better. From there each stage goes on
for as long as it helps, and hands its best token to the next. After the last one, and where no start helped,
steps are measured from the best token: the gradients of many images say where to, others which way is best.

A guide that is sure of what it sees gives next to no probability to a class that it does not see. How much
that is says little then, and its verdicts say much: they decide. Starts are short and tried again with other
noises, which does more there than measured steps. Where none helps, the later stages may: a guide may be sure
of whole images, and see nothing in those of the first stage.
"""

import math
from dataclasses import asdict, dataclass
from enum import Enum
from statistics import fmean, stdev
from typing import Any

from discriminative.errors import WorkError
from discriminative.settings import CurriculumSettings

MIN_PROGRESS = 0.25  # share of the way from the start's accuracy to 1 after which the first stage is done
NEARLY_RIGHT_ACCURACY = 0.9  # validation accuracy from which large steps would do a token harm
MIN_GAIN = 1.0  # standard errors that a mean gain in log-probability has to be above 0
COLLAPSED = 2.0  # times the loss of a start's best token, from where a token is lost
LEAST_LOSS = 1.0  # below, twice a loss is no harm
MAX_FALLS = 2  # times that training goes back to its best token with half the rate
LAST_STAGE_PATIENCE = 2  # times as long: a late step makes a token worse before it makes it better
SURE = 0.75  # median probability of what a guide sees in the first images, from where it is sure
SURE_TRIES = 3  # of each start under a sure guide, before the later stages
POOLED_UPDATES = 10  # of each stage, whose gradients a measured step goes by
LOOKS_IN_VAIN = 2  # in a row, after which no measured step is looked for any more


class Step(Enum):
    """What training does next."""

    GO_ON = "go on"
    NEXT_STAGE = "next stage"
    MEASURE = "measure steps"
    NEXT_START = "next start"
    GO_BACK = "go back to the best token"
    STOP = "stop"


def is_a_gain(gains: list[float]) -> bool:
    """Whether gains in log-probability, noise by noise, are more than chance in the mean."""
    error = stdev(gains) / math.sqrt(len(gains)) if len(gains) > 1 else 0.0
    return fmean(gains) > MIN_GAIN * error


@dataclass(frozen=True)
class Score:
    """What a validation makes of a token.

    Args:
        accuracy: share of its images that count.
        log_probabilities: of the class, image by image, of the same noises in the same order; of the paper's
            rule one, minus the loss.
    """

    accuracy: float
    log_probabilities: tuple[float, ...]

    @property
    def loss(self) -> float:
        """Mean cross-entropy of the class."""
        return -fmean(self.log_probabilities)

    def beats(self, other: "Score", is_sure: bool = False) -> bool:
        """Whether the token is better.

        The verdicts of a sure guide decide, and of equal ones the loss. Another guide's on a few images are
        luck as long as many are wrong, and say nothing below the first right one: there log-probabilities
        decide, pair by pair. Of tokens that are nearly right the verdicts do.
        """
        if is_sure:
            return (self.accuracy, -self.loss) > (other.accuracy, -other.loss)
        nearly_right = max(self.accuracy, NEARLY_RIGHT_ACCURACY), max(other.accuracy, NEARLY_RIGHT_ACCURACY)
        if nearly_right[0] != nearly_right[1]:
            return nearly_right[0] > nearly_right[1]
        pairs = zip(self.log_probabilities, other.log_probabilities, strict=False)
        return is_a_gain([mine - its for mine, its in pairs])


@dataclass
class Best:
    """The best token so far.

    Args:
        score: None where there is none yet.
        vector: the token, whatever the caller keeps of it.
        epoch: update after which it was found; patience counts from here.
        updates: after which it was what it is.
    """

    score: Score | None = None
    vector: Any = None
    epoch: int = 0
    updates: int = 0

    @property
    def accuracy(self) -> float:
        """Share of its images that count; -1 where there is none."""
        return self.score.accuracy if self.score else -1.0

    def beaten_by(self, score: Score, is_sure: bool = False) -> bool:
        """Whether a token of that score is better, by a guide that is sure or not."""
        return self.score is None or score.beats(self.score, is_sure)

    def __str__(self) -> str:
        if not self.score:
            return "none"
        right = f"{self.accuracy:.2f} right, " if self.accuracy else ""
        return f"{right}{-self.score.loss:.2f} after {self.epoch}"

    def state(self) -> dict[str, Any]:
        """All but the vector, as JSON has it."""
        return {"score": self.score and asdict(self.score), "epoch": self.epoch, "updates": self.updates}

    @classmethod
    def of(cls, state: dict[str, Any], vector: Any) -> "Best":
        """What :meth:`state` gave, with its vector."""
        score = state["score"] and Score(
            state["score"]["accuracy"], tuple(state["score"]["log_probabilities"])
        )
        return cls(score, vector, state["epoch"], state["updates"])


# What a curriculum knows beside its settings and its best tokens.
STATE = ("stage", "start", "began", "measures", "looks", "in_vain", "searches", "tried", "first", "left")
STATE += ("stopped_by", "falls", "sound", "sureness")


class Curriculum:
    """The first stage from every start, then the other stages, then measured steps.

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
        self.measures = False  # steps are measured, from the best token of the start
        self.looks = 0  # for a measured step, so far
        self.in_vain = 0  # of these, the last ones in a row
        self.has_moved = False  # the token made a measured step after this update
        self.searches = True  # a start is still looked for, by its first stage
        self.tried = 0  # starts in vain
        self.sureness = 0.0  # of the guide, of what it sees: a probability
        self.first = -math.inf  # validation accuracy of the first start
        self.attempt = Best()  # of this start
        self.best = Best()  # of all
        self.left: list[int] = []  # update after which the best of all was found, when each start was left
        self.stopped_by = ""
        self.falls = 0  # times that it went back to its best token
        self.sound = 0  # update after which a token was last not lost

    def state(self) -> dict[str, Any]:
        """All but settings and vectors, as JSON has it."""
        bests = {"attempt": self.attempt.state(), "best": self.best.state()}
        return {name: getattr(self, name) for name in STATE} | {"left": list(self.left)} | bests

    def restore(self, state: dict[str, Any], vectors: dict[str, Any]) -> None:
        """Take over what :meth:`state` gave, and the vectors of "attempt" and "best"."""
        for name in STATE:
            setattr(self, name, state[name])
        self.attempt = Best.of(state["attempt"], vectors.get("attempt"))
        self.best = Best.of(state["best"], vectors.get("best"))

    @property
    def rate(self) -> float:
        """Share of the step size: halved each time that training went back to its best token."""
        return 0.5**self.falls

    @property
    def is_nearly_right(self) -> bool:
        """Whether the attempt's best token is so good that large steps would do it harm."""
        return self.attempt.accuracy > NEARLY_RIGHT_ACCURACY

    @property
    def to_confirm(self) -> float:
        """The accuracy above which a token's whole validation is drawn: it would be the best of its start."""
        return max(NEARLY_RIGHT_ACCURACY, self.attempt.accuracy)

    def is_clearly_better(self, found: Best) -> bool:
        """Whether a token is clearly better than the first start, or better and nearly right."""
        clearly = self.first + MIN_PROGRESS * (1 - self.first)
        nearly_right = max(self.first, NEARLY_RIGHT_ACCURACY)
        return found.accuracy > min(clearly, nearly_right)

    @property
    def has_another_start(self) -> bool:
        """Whether a start is tried again, with other noises: some start helped; where the guide is not sure,
        one of late."""
        of_late = len(self.left) <= self.starts or self.best.epoch > self.left[-self.starts - 1]
        return self.is_clearly_better(self.best) and (self.is_sure or of_late)

    @property
    def is_enough(self) -> bool:
        """Whether the best token of all is good enough for no further start."""
        return 0 < self.settings.enough_validation_accuracy <= self.best.accuracy

    @property
    def is_sure(self) -> bool:
        """Whether the guide is sure of what it sees, be it the class or not."""
        return self.sureness > SURE

    def is_due(self, epoch: int, accuracy: float) -> bool:
        """Whether the token is to be validated after ``epoch``: every so often, and before a stage ends; of
        measured steps after each."""
        settings = self.settings
        if self.measures:
            return self.has_moved
        is_last = epoch == settings.max_epochs or accuracy > settings.stop_train_accuracy
        return is_last or epoch % settings.validate_every == 0 or self.runs_out(epoch)

    def offer(self, score: Score, vector: Any, epoch: int, updates: int) -> bool:
        """Take a token's score into account, and keep its vector if it is the best; says whether it is,
        of all."""
        if not epoch:
            self.first = score.accuracy
        found = Best(score, vector, epoch, updates)
        best = self.attempt.score or score
        if score.loss <= COLLAPSED * max(best.loss, LEAST_LOSS):
            self.sound = epoch
        is_best = self.best.beaten_by(score, self.is_sure)
        if self.has_moved:  # from the attempt's best, proved on more noises than a validation has
            is_best |= self.attempt.epoch == self.best.epoch
            self.attempt = found
        elif self.attempt.beaten_by(score, self.is_sure):
            self.attempt = found
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
        if epoch and is_scored and self.has_collapsed(epoch):
            return self.go_back(epoch, f"every token of {epoch - self.sound} updates was lost")
        if self.measures:
            return self.after_a_pooled_update(epoch)
        if not epoch or not self.is_over(epoch):
            return Step.GO_ON
        self.began = epoch
        if self.stage == 0 and not self.is_clearly_better(self.attempt):
            return self.after_a_start_in_vain(epoch)
        self.searches = False
        return self.next_stage(epoch)

    def looks_after(self, epoch: int) -> bool:
        """Whether a measured step is looked for after ``epoch``: each stage's gradients are pooled."""
        return self.measures and epoch - self.began == POOLED_UPDATES * self.stages

    def looked(self, has_moved: bool) -> None:
        """Take note of a look for a measured step, and whether the token made one."""
        self.has_moved = has_moved
        self.looks += 1
        self.in_vain = 0 if has_moved else self.in_vain + 1

    def after_a_pooled_update(self, epoch: int) -> Step:
        """The next gradient's turn, of the stage that it is taken at; or the end, after looks in vain."""
        self.has_moved = False
        if self.looks_after(epoch):
            self.began = epoch
        self.stage = (epoch - self.began) // POOLED_UPDATES
        return self.leave_start(epoch) if self.in_vain == LOOKS_IN_VAIN else Step.GO_ON

    def has_collapsed(self, epoch: int) -> bool:
        """Whether no token was sound for the length of the patience: far worse than the best of its start."""
        patience = self.settings.patience or self.settings.attempt_patience
        return epoch - max(self.sound, self.began) >= patience

    def go_back(self, epoch: int, reason: str) -> Step:
        """The best token's turn again, with half the rate.

        Args:
            reason: what went wrong after ``epoch`` updates.

        Raises:
            WorkError: it has gone back ``MAX_FALLS`` times already.
        """
        if self.falls == MAX_FALLS:
            raise WorkError(f"{reason} (the rate was halved {MAX_FALLS} times already)")
        self.falls += 1
        self.began = epoch
        self.sound = epoch
        return Step.GO_BACK

    def after_a_start_in_vain(self, epoch: int) -> Step:
        """The next start's turn; where none is left, measured steps', from the best token of all; under a
        sure guide the later stages'."""
        self.tried += 1
        if not self.searches or self.is_enough:
            return self.leave_start(epoch)
        if self.tried < self.starts * (SURE_TRIES if self.is_sure else 1):
            return self.begin_start(epoch)
        self.searches = False
        self.attempt = self.best
        return self.next_stage(epoch) if self.is_sure else self.begin_measuring(epoch)

    def next_stage(self, epoch: int) -> Step:
        """The next stage's turn; after the last one measured steps', unless the token is nearly right or
        the guide is sure."""
        if self.stage + 1 < self.stages:
            self.stage += 1
            return Step.NEXT_STAGE
        needs_none = self.is_nearly_right or self.is_sure
        return self.leave_start(epoch) if needs_none else self.begin_measuring(epoch)

    def begin_measuring(self, epoch: int) -> Step:
        """Measured steps' turn, from the attempt's best token."""
        self.searches = False
        self.measures = True
        self.in_vain = 0
        self.began = epoch
        self.stage = 0
        return Step.MEASURE

    def leave_start(self, epoch: int) -> Step:
        """Another start's turn, or the end."""
        self.left.append(self.best.epoch)
        if self.is_enough:
            self.stopped_by = "enough"
        elif not self.has_another_start:
            self.stopped_by = "no_progress"
        return Step.STOP if self.stopped_by else self.begin_start(epoch)

    def begin_start(self, epoch: int) -> Step:
        """Begin with the next start."""
        self.start = (self.start + 1) % self.starts
        self.attempt = Best()
        self.measures = False
        self.began = epoch
        self.stage = 0
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
        is_first = self.stage == 0 and self.stages > 1
        return (is_first and self.is_clearly_better(self.attempt)) or self.runs_out(epoch)

    def runs_out(self, epoch: int) -> bool:
        """Whether the stage's patience is over, unless the token after ``epoch`` is a better one.

        It counts from the best token; where a sure guide does not see a clearly better one yet, from the
        beginning.
        """
        is_last = 0 < self.stage == self.stages - 1
        times = LAST_STAGE_PATIENCE if is_last and self.is_clearly_better(self.attempt) else 1
        since = max(self.began, self.attempt.epoch)
        if self.is_sure and not self.is_clearly_better(self.attempt):
            since = self.began
        return epoch - since >= times * self.settings.attempt_patience
