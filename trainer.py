"""Learn one class token: sample, classify, cross-entropy, step on one vector, keep the best, stop.

The loop is the method of Discriminative Class Tokens (ICCV 2023, arXiv 2303.17155), section 3.
"""

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from statistics import fmean

import torch
from tqdm import tqdm

from discriminative.errors import WorkError
from discriminative.guides.classifier import Guide
from discriminative.precision import (
    advice_on_overflow,
    make_scaler,
    precision_name,
    training_precision,
    update_scale,
)
from discriminative.progress import progress
from discriminative.records.environment import timestamp
from discriminative.records.files import clear, grid, thumbnails, write_image, write_lines, write_tensors
from discriminative.records.layout import TrainingFiles
from discriminative.records.pictures import write_evolution
from discriminative.settings import NEVER, LearningSettings
from discriminative.tokens.batch import Work
from discriminative.tokens.checkpoint import Checkpoint, State
from discriminative.tokens.class_token import ClassToken
from discriminative.tokens.curriculum import Curriculum, Score, Step
from discriminative.tokens.measured import Pool, measured_step
from discriminative.tokens.objective import FOLLOWED, Objective

OnUpdate = Callable[[dict, torch.Tensor], None]  # is given an update's log row and images (N, 3, H, W)

DOUBTFUL = 0.05  # p-value of a gain from which it may be chance
IN_VAIN = 0.2  # ... from which the token is not kept: below, more is won than lost by keeping it
MAX_OVERFLOWS = 10  # updates in a row that may lose their loss to an overflow in half precision


@dataclass(frozen=True)
class Gain:
    """What the kept token gains over the word in its place, in log-probability, on noises that chose nothing.

    Args:
        p_value: of a paired t-test, one-sided.
        noises: on which both were drawn.
    """

    log_probability: float
    p_value: float
    noises: int

    @classmethod
    def of(cls, gains: list[float]) -> "Gain":
        """From the gain of each noise."""
        from scipy.stats import ttest_1samp

        found = ttest_1samp(gains, 0, alternative="greater") if len(set(gains)) > 1 else None
        return cls(fmean(gains), float(found.pvalue) if found else 1.0, len(gains))

    @property
    def is_there(self) -> bool:
        """Whether the token is worth keeping."""
        return self.p_value < IN_VAIN

    @property
    def is_doubtful(self) -> bool:
        """Whether it may be chance all the same."""
        return self.p_value >= DOUBTFUL


@dataclass
class Training:
    """What a training came to: one log row an update, where the kept vector was found, why it ended, its
    cost."""

    rows: list[dict] = field(default_factory=list)
    kept_updates: int = 0  # updates, of all attempts, after which the kept vector was found
    last_vector: torch.Tensor | None = None  # (N, width), after the last update
    stopped_by: str = ""
    images: int = 0  # sampled, for updates and for validation
    seconds: float = 0.0
    precision: str = ""  # of UNet and decoder
    learning_rate: float = 0.0  # for each image of an update, before small steps make it less
    gain: Gain | None = None  # over the word in its place; None where it is beyond doubt, or not asked for
    sureness: float = 0.0  # of the guide, of what it sees in the first images; 0 where nothing validates

    @property
    def is_in_vain(self) -> bool:
        """Whether the word in the token's place is kept, as nothing was gained over it."""
        return self.gain is not None and not self.gain.is_there

    @property
    def kept(self) -> str:
        """Which vector is kept, in words."""
        if self.is_in_vain:
            return "the word in its place"
        if not self.kept_updates:
            return "the vector that it started from"
        return f"the token after {self.kept_updates}"


def train(
    settings: LearningSettings,
    token: ClassToken,
    guides: list[Guide],
    class_name: str,
    folder: TrainingFiles,
    on_update: OnUpdate | None = None,
    checkpoint: Checkpoint | None = None,
    work: Work | None = None,
) -> Training:
    """Learn ``token`` for the class that the guides are asked for; several guides count alike.

    Args:
        class_name: the name of the class in the prompts.
        folder: where the training images, the log and the best token so far go.
        on_update: is given each update's log row and images (N, 3, H, W).
        checkpoint: where the state is kept; training goes on from a state that is there. None keeps none.
        work: does what is asked of the models, in their precision of training; None does it at once.

    Returns:
        the training; ``token`` holds the kept vector.

    Raises:
        WorkError: loss or gradient are not finite, or the token is lost, again and again; with a scaled
            loss they never were finite.
    """
    checkpoint = checkpoint or Checkpoint()
    own_precision = nullcontext() if work else training_precision(token.models, settings.mixed_precision)
    with own_precision, checkpoint.kept():
        return loop(settings, token, guides, class_name, folder, on_update, checkpoint, work)


def loop(
    settings: LearningSettings,
    token: ClassToken,
    guides: list[Guide],
    class_name: str,
    folder: TrainingFiles,
    on_update: OnUpdate | None,
    checkpoint: Checkpoint,
    work: Work | None,
) -> Training:
    """What :func:`train` does, update by update."""
    rate = settings.optimizer.rate(token.word_rms)
    result = Training(precision=precision_name(token.models), learning_rate=rate)
    objective = Objective(settings, token, guides, class_name, work)
    keeper = KEEPERS[settings.choose_by](settings, objective, folder)
    curriculum = keeper.curriculum
    starts = [token.start_vector(name, class_name) for name in settings.starts]
    run = Running(settings, token, keeper, result)
    run.begin(starts[0])

    # Go on where it was interrupted; or look at the initial token, which may do already.
    if not run.goes_on(checkpoint):
        clear(folder.train_images, "*.png")
        folder.evolution.unlink(missing_ok=True)
        keeper.begin()
    done = len(result.rows)
    last = 0 if curriculum.stopped_by else settings.curriculum.max_epochs
    updates = range(done + 1, last + 1)
    told = {"desc": f"learning {class_name!r}", "unit": "update"}
    bar = progress(updates, initial=done, total=done + len(updates), **told)
    for epoch in bar:
        began = time.monotonic()
        sampled_with = token.vector.detach().clone()
        attempt = {"start": settings.starts[curriculum.start], "stage": curriculum.stage + 1}

        # Sample, classify, step on the one vector.
        share = curriculum.rate * (settings.optimizer.fine_rate if curriculum.is_nearly_right else 1)
        set_step_size(settings, run.optimizer, token, share)
        figures, norm, images, trouble = update(objective, run, epoch)

        # Where that led nowhere, step where many images say.
        measured = {} if trouble else run.look(epoch)

        # Keep the best token.
        found = {} if trouble else keeper.look(epoch, figures["loss"], figures["accuracy"], sampled_with)
        row = {"epoch": epoch} | figures | attempt | measured | found | {"gradient_norm": norm}
        row |= {"token_norm": token.norm(), "best_epoch": curriculum.best.epoch}
        row |= {"images": objective.images, "learning_rate": rate * share}
        row |= {"time": timestamp(), "seconds": time.monotonic() - began}
        record(folder, result.rows, row, images, on_update)
        shown = {name: f"{value:.2f}" for name, value in figures.items()}
        bar.set_postfix(shown | {"best": str(curriculum.best)})

        # Stop, or go on to a stage or start, or back.
        if trouble:
            step = curriculum.go_back(epoch, trouble)
        else:
            step = curriculum.observe(epoch, figures["accuracy"], keeper.is_scored)
        run.follow(step, epoch, starts)
        checkpoint.note(run.state())
        if step is Step.STOP:
            break
    bar.close()
    write_lines(folder.log, result.rows)  # empty where no update was needed
    result.last_vector = token.vector.detach().clone()
    keep_best(result, token, keeper)
    result.images = objective.images
    result.seconds = run.seconds
    show_evolution(folder, result.rows, keeper.strips, keeper.columns)
    return result


class Running:
    """What an update changes, beside the files: token, optimizer, scaler, and what is known so far.

    Args:
        keeper: with the curriculum and the objective.
        result: takes a row an update.
    """

    def __init__(
        self,
        settings: LearningSettings,
        token: ClassToken,
        keeper: "ValidationKeeper | LossKeeper",
        result: Training,
    ):
        self.settings = settings
        self.token = token
        self.keeper = keeper
        self.result = result
        self.scaler = make_scaler(token.models)
        self.pool = Pool()
        self.began = time.monotonic()
        self.before = 0.0  # seconds, where it goes on from a state

    def begin(self, vector: torch.Tensor) -> None:
        """A fresh AdamW over the token's vectors alone, which start from ``vector`` (N, width)."""
        self.token.load(vector)
        chosen = self.settings.optimizer
        self.optimizer = torch.optim.AdamW(
            [self.token.vector],
            betas=(chosen.adam_beta1, chosen.adam_beta2),
            eps=chosen.adam_epsilon,
            weight_decay=chosen.weight_decay,
        )

    def goes_on(self, checkpoint: Checkpoint) -> bool:
        """Take over the state that is there; whether one is."""
        state = checkpoint.read()
        if state:
            self.restore(state)
            tqdm.write(f"goes on after {len(self.result.rows)} updates, from {checkpoint.path}")
        return state is not None

    def follow(self, step: Step, epoch: int, starts: list[torch.Tensor]) -> None:
        """Go on from where the curriculum wants to after update ``epoch``; ``starts`` are (N, width) each."""
        curriculum = self.keeper.curriculum
        if step is not Step.GO_ON:
            self.pool = Pool()
        if step in (Step.NEXT_STAGE, Step.MEASURE, Step.GO_BACK):
            best = curriculum.attempt.vector
            self.begin(starts[curriculum.start] if best is None else best)
        elif step is Step.NEXT_START:
            self.begin(starts[curriculum.start])
            if not curriculum.is_sure:  # whose verdict on a start says nothing of what it leads to
                self.keeper.look_at_start(epoch)

    @property
    def max_grad_norm(self) -> float:
        """That a gradient is clipped to; of those that are pooled the large ones are those that know."""
        pooled = self.keeper.curriculum.measures
        return math.inf if pooled else self.settings.optimizer.max_grad_norm or math.inf

    def step(self, loss: float) -> None:
        """Step on the one vector, and keep it as short as words are; where steps are measured, pool its
        gradient."""
        curriculum = self.keeper.curriculum
        if curriculum.measures:
            self.pool.add(curriculum.stage, self.token.vector.grad)
        else:
            self.scaler.step(self.optimizer)
            self.token.bound(self.settings.optimizer.max_token_norm)
        update_scale(self.scaler, math.isfinite(loss))

    def look(self, epoch: int) -> dict[str, float]:
        """Make a measured step, where one is due after update ``epoch`` and is found; columns of the log."""
        curriculum = self.keeper.curriculum
        if not curriculum.looks_after(epoch):
            return {}
        vector = self.token.vector.detach().clone()
        gains = measured_step(self.keeper.objective, vector, self.pool, curriculum.looks, curriculum.in_vain)
        curriculum.looked(bool(gains))
        if not gains:
            return {"measured_gain": 0.0}
        self.pool = Pool()
        return {"measured_gain": fmean(gains)}

    @property
    def seconds(self) -> float:
        """That the training took so far."""
        return self.before + time.monotonic() - self.began

    def state(self) -> State:
        """All that the next update depends on."""
        curriculum = self.keeper.curriculum
        objective = self.keeper.objective
        bests = {"attempt": curriculum.attempt.vector, "best": curriculum.best.vector}
        moments = self.optimizer.state_dict()["state"].get(0, {})
        tensors = {"vector": self.token.vector} | {
            f"optimizer.{name}": value for name, value in moments.items()
        }
        tensors |= {name: vector for name, vector in bests.items() if vector is not None}
        tensors |= self.pool.state()
        values = {"rows": list(self.result.rows), "seconds": self.seconds, "curriculum": curriculum.state()}
        values |= {"images": objective.images, "wrong": dict(objective.wrong)}
        values |= {"scaler": self.scaler.state_dict()}
        return State({name: value.detach().cpu().clone() for name, value in tensors.items()}, values)

    def restore(self, state: State) -> None:
        """Take over what :meth:`state` gave."""
        tensors = {name: value.to(self.token.models.device) for name, value in state.tensors.items()}
        values = state.values
        self.begin(tensors["vector"])
        prefix = "optimizer."
        of_optimizer = {name: t for name, t in state.tensors.items() if name.startswith(prefix)}
        if of_optimizer:  # it brings them to its device itself
            moments = {name.removeprefix(prefix): value for name, value in of_optimizer.items()}
            empty = self.optimizer.state_dict()
            self.optimizer.load_state_dict(empty | {"state": {0: moments}})
        self.pool = Pool.of(tensors)
        self.scaler.load_state_dict(values["scaler"])
        self.result.rows = values["rows"]
        self.before = values["seconds"]
        self.keeper.curriculum.restore(values["curriculum"], tensors)
        self.keeper.objective.images = values["images"]
        self.keeper.objective.wrong = values["wrong"]

    def not_finite(self, epoch: int, loss: float, norm: float) -> str:
        """What is wrong with an update whose loss or gradient norm is not finite; "" where nothing is.

        With a scaled loss they need not be, as the scaler skips the update; but ``MAX_OVERFLOWS`` losses in a
        row are too many.
        """
        rows = self.result.rows[self.keeper.curriculum.began :]
        recent = [row["loss"] is None for row in rows[-MAX_OVERFLOWS:]]
        in_vain = not math.isfinite(loss) and recent == [True] * MAX_OVERFLOWS
        is_scaled = self.scaler.get_scale() > 1
        if not in_vain and (is_scaled or (math.isfinite(loss) and math.isfinite(norm))):
            return ""
        advice = advice_on_overflow(self.token.models.dtype)
        return f"update {epoch}: loss {loss}, gradient norm {norm}; {advice}"


def keep_best(result: Training, token: ClassToken, keeper: "ValidationKeeper | LossKeeper") -> None:
    """Load the best token of all; where it gains nothing over the plain prompt, the initializer, one word.

    Raises:
        WorkError: there is none, as no update had a finite loss.
    """
    best = keeper.curriculum.best
    if best.vector is None:
        raise WorkError(
            f"none of {len(result.rows)} updates had a finite loss; "
            f"{advice_on_overflow(token.models.dtype)}, or more --max_epochs"
        )
    token.load(best.vector)
    result.stopped_by = keeper.curriculum.stopped_by or "max_epochs"  # after an update in vain
    result.kept_updates = best.updates
    result.sureness = keeper.curriculum.sureness
    initial = token.word_mean(token.initializer)  # (1, width)
    result.gain = keeper.gain(initial)
    if result.is_in_vain:
        token.load(initial)
        result.kept_updates = 0


def update(
    objective: Objective, run: Running, epoch: int
) -> tuple[dict[str, float], float, torch.Tensor, str]:
    """One update of the token; none where loss or gradient are not finite.

    Returns:
        loss, accuracy and probability of the update's images; the gradient's norm; the images (N, 3, H, W);
        what is wrong, or "".
    """
    vector = objective.token.vector
    stage = run.keeper.curriculum.stage

    # Sample, score, accumulate the gradient of the cross-entropy.
    run.optimizer.zero_grad(set_to_none=True)
    images, losses, probabilities, right = objective.accumulate(epoch - 1, run.scaler, stage)
    loss = losses.mean().item()

    # Clip, step on the one vector.
    run.scaler.unscale_(run.optimizer)
    norm = torch.nn.utils.clip_grad_norm_([vector], run.max_grad_norm).item()
    trouble = run.not_finite(epoch, loss, norm)
    if not trouble:
        run.step(loss)

    accuracy = right.float().mean().item()
    figures = {"loss": loss, "accuracy": accuracy, "probability": probabilities.mean().item()}
    return figures, norm, images, trouble


class ValidationKeeper:
    """Keeps the token that is best on the validation seeds; stages and starts follow each other."""

    strips = "validation"  # of the training images, those that show the same noises
    columns = FOLLOWED

    def __init__(self, settings: LearningSettings, objective: Objective, folder: TrainingFiles):
        self.curriculum = Curriculum(settings.curriculum, len(settings.stages), len(settings.starts))
        self.objective = objective
        self.folder = folder
        self.is_scored = False

    def begin(self) -> Step:
        """Score the token that training starts from, and see whether the guide's verdicts say something."""
        self.score(0)
        self.curriculum.sureness = self.objective.sureness()
        return self.curriculum.observe(0, 0.0, is_scored=True)

    def look(self, epoch: int, loss: float, accuracy: float, sampled_with: torch.Tensor) -> dict:
        """Score the token after an update where that is due; returns columns of the log."""
        self.is_scored = self.curriculum.is_due(epoch, accuracy)
        if not self.is_scored:
            return {}
        score = self.score(epoch)
        log_probability = fmean(score.log_probabilities)
        return {"validation_accuracy": score.accuracy, "validation_log_probability": log_probability}

    def look_at_start(self, epoch: int) -> None:
        """Score another start before it is learned from."""
        self.take(self.objective.validate(beats=self.curriculum.to_confirm), epoch, updates=0)

    def gain(self, initial: torch.Tensor) -> Gain | None:
        """What the kept token gains over ``initial`` (1, width); None where it is beyond doubt."""
        if self.curriculum.best.accuracy >= self.curriculum.settings.enough_validation_accuracy > 0:
            return None
        return Gain.of(self.objective.compare(self.curriculum.best.vector, initial))

    def score(self, epoch: int) -> Score:
        """What the validation seeds make of the token; its first images are shown."""
        score = self.objective.validate(beats=self.curriculum.to_confirm)
        self.take(score, epoch, epoch)
        if len(self.objective.first_images):
            strip = grid(thumbnails(self.objective.first_images), columns=FOLLOWED)
            write_image(self.folder.train_images / f"validation_{epoch:03d}.png", strip)
        return score

    def take(self, score: Score, epoch: int, updates: int) -> None:
        """Take a score into account; the best token of all is written at once."""
        vector = self.objective.token.vector.detach().clone()
        if self.curriculum.offer(score, vector, epoch, updates):
            write_partial(self.folder, self.objective.token, vector, updates)


class LossKeeper:
    """Keeps the token of the lowest epoch loss, as the paper does; one stage, one start."""

    is_scored = True

    def __init__(self, settings: LearningSettings, objective: Objective, folder: TrainingFiles):
        self.curriculum = Curriculum(replace(settings.curriculum, attempt_patience=NEVER))
        self.objective = objective
        self.folder = folder
        self.strips = "epoch" if settings.noise_pool == 1 else ""
        self.columns = settings.images_per_update

    def begin(self) -> Step:
        """Nothing is known of the first token before it is trained with."""
        return Step.GO_ON

    def look(self, epoch: int, loss: float, accuracy: float, sampled_with: torch.Tensor) -> dict:
        """Take the loss of the token that the update's images were sampled with."""
        score = Score(0.0, (-loss,))  # the loss alone decides
        if math.isfinite(loss) and self.curriculum.offer(score, sampled_with, epoch, epoch - 1):
            write_partial(self.folder, self.objective.token, sampled_with, epoch - 1)
        return {}

    def gain(self, initial: torch.Tensor) -> None:
        """The paper asks for none."""


KEEPERS = {"validation": ValidationKeeper, "loss": LossKeeper}


def write_partial(folder: TrainingFiles, token: ClassToken, vector: torch.Tensor, updates: int) -> None:
    """Write the best vector so far: a run that breaks off loses no more than its last updates."""
    write_tensors(folder.partial_token, {token.placeholder: vector.cpu()}, {"updates": str(updates)})


def set_step_size(
    settings: LearningSettings, optimizer: torch.optim.AdamW, token: ClassToken, share: float
) -> None:
    """A share of the whole step: small from where large ones would do harm, or have had their turn."""
    whole = settings.optimizer.step_size(settings.images_per_update, token.word_rms)
    optimizer.param_groups[0]["lr"] = whole * share


def record(
    folder: TrainingFiles, rows: list[dict], row: dict, images: torch.Tensor, on_update: OnUpdate | None
) -> None:
    """Log one update, and show the images (N, 3, H, W) that it learned from."""
    folder.check_claim()
    # JSON has no number for what is not finite.
    row = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    rows.append(row)
    write_lines(folder.log, rows)
    strip = grid(thumbnails(images), columns=len(images))
    write_image(folder.train_images / f"epoch_{row['epoch']:03d}.png", strip)
    if on_update:
        on_update(row, images)


def show_evolution(folder: TrainingFiles, rows: list[dict], name: str, columns: int) -> None:
    """Show the same noises over the updates: the validation's, or the training's where they always come
    back."""
    paths = folder.train_images.glob(f"{name}_*.png") if name else ()
    strips = {int(path.stem.rpartition("_")[2]): path for path in paths}
    if strips:
        write_evolution(folder.evolution, strips, rows, columns, FOLLOWED)
