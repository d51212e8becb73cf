"""Learn one class token: sample, classify, cross-entropy, step on one vector, keep the best, stop.

The loop is the method of Discriminative Class Tokens (ICCV 2023, arXiv 2303.17155), section 3.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

from config import RunConfig
from discriminative.errors import WorkError
from discriminative.guides.classifier import Guide
from discriminative.precision import make_scaler, trains_in_bf16
from discriminative.records.files import clear, grid, write_image, write_lines, write_tensors
from discriminative.records.layout import RunFolder
from discriminative.records.pictures import write_evolution
from discriminative.tokens.class_token import ClassToken
from discriminative.tokens.objective import FOLLOWED, Task

OnUpdate = Callable[[dict, torch.Tensor], None]  # is told an update's log row and images (N, 3, H, W)

MORE = (
    0.25  # share of the way from the start's validation accuracy to 1 after which a token is clearly better
)
LONGER = (
    2  # patience with the last of several stages: a late step makes a token worse before it makes it better
)
OVERFLOWS = 10  # updates in a row that may lose their loss to an overflow in half precision
NEARLY = 0.9  # validation accuracy of a token that is nearly right: large steps would do it harm


@dataclass
class Training:
    """What a training came to: one log row an update, when the kept vector was found, why it ended, and what it cost."""

    rows: list[dict] = field(default_factory=list)
    kept_updates: int = 0  # updates, of all attempts, after which the kept vector was found
    last_vector: torch.Tensor | None = None  # (N, width), after the last update
    stopped_by: str = ""
    images: int = 0  # drawn, for updates and for validation
    seconds: float = 0.0
    precision: str = ""  # of UNet and decoder


@dataclass
class Best:
    """The best vector so far, by a score that is compared as tuples are; higher is better."""

    score: tuple = ()
    vector: torch.Tensor | None = None
    epoch: int = 0  # when it was found; patience counts from here
    updates: int = 0  # after which it was what it is; of all attempts
    file: Path | None = (
        None  # where each better vector is written at once: a run that breaks off loses no more than its last updates
    )
    placeholder: str = ""

    def told(self) -> str:
        """The best score so far, and the update that it was found after."""
        return f"{abs(self.score[0]):.2f} after {self.epoch}" if self.score else "none"

    def offer(self, score: tuple, vector: torch.Tensor, epoch: int, updates: int) -> None:
        """Keep ``vector`` if its score is the best yet."""
        if self.vector is None or score > self.score:
            self.score, self.vector, self.epoch, self.updates = score, vector.detach().clone(), epoch, updates
            if self.file:
                write_tensors(self.file, {self.placeholder: self.vector.cpu()}, {"updates": str(updates)})


def train(
    config: RunConfig,
    token: ClassToken,
    guides: list[Guide],
    class_name: str,
    folder: RunFolder,
    on_update: OnUpdate | None = None,
) -> Training:
    """Learn ``token`` for the class that the guides are asked for; several guides count alike.

    Args:
        class_name: the name of the class in the prompts.
        folder: where the training images and the log go.
        on_update: is told each update's log row and images (N, 3, H, W).

    Returns:
        the training; ``token`` holds the kept vector.

    Raises:
        WorkError: loss or gradient are not finite, or with a scaled loss never were.
    """
    models = token.models
    with (
        models.bf16_without_gradient(trains_in_bf16(config.mixed_precision, models.device)),
        models.channels_last(),
    ):
        return loop(config, token, guides, class_name, folder, on_update)


def loop(
    config: RunConfig,
    token: ClassToken,
    guides: list[Guide],
    class_name: str,
    folder: RunFolder,
    on_update: OnUpdate | None,
) -> Training:
    """What :func:`train` does, update by update."""
    start, result = time.monotonic(), Training(precision=token.models.precision)
    best = Best(file=folder.partial_token, placeholder=token.placeholder)
    scaler = make_scaler(token.models)
    task, attempts = Task(config, token, guides, class_name), Attempts(config, token, class_name, folder)
    clear(folder.train_images, "*.png")
    folder.evolution.unlink(missing_ok=True)

    # The initial token may do already: a class that its name alone draws needs no update.
    attempts.begin(0)
    if config.choose_by == "validation":
        attempts.score(task, best, 0)
        result.stopped_by = stopping_rule(config, 0, 0.0, best)
    progress = tqdm(
        range(1, 1 + (0 if result.stopped_by else config.max_epochs)),
        desc=f"learning {class_name!r}",
        unit="update",
    )
    for epoch in progress:
        began, drawn_with = time.monotonic(), token.vector.detach().clone()

        # Sample images with the current token, score them, and accumulate the gradient of their mean cross-entropy.
        attempts.optimizer.zero_grad(set_to_none=True)
        images, losses, probabilities, right = task.accumulate(epoch - 1, scaler, attempts.stage)
        loss, accuracy = losses.mean().item(), right.float().mean().item()

        # Clip, step on the one vector, and keep it as short as words are.
        scaler.unscale_(attempts.optimizer)
        norm = torch.nn.utils.clip_grad_norm_([token.vector], config.max_grad_norm or math.inf).item()
        check_finite(epoch, loss, norm, scaled=scaler.get_scale() > 1, before=result.rows)
        scaler.step(attempts.optimizer)
        # An image that overflows on its way is not the scale's fault.
        scaler.update(None if math.isfinite(loss) else scaler.get_scale())
        token.bound(config.max_token_norm)
        attempts.average()

        # Keep the best token: by unseen seeds, or by the loss of the images that it drew.
        row = {
            "epoch": epoch,
            "loss": loss,
            "accuracy": accuracy,
            "probability": probabilities.mean().item(),
            **attempts.told(),
        }
        if config.choose_by == "loss" and math.isfinite(loss):
            best.offer((-loss,), drawn_with, epoch, epoch - 1)
        elif config.choose_by == "validation" and is_validated(config, epoch, accuracy):
            row |= zip(
                ("validation_accuracy", "validation_log_probability"),
                attempts.score(task, best, epoch),
                strict=True,
            )
        row |= {
            "gradient_norm": norm,
            "token_norm": token.norm(),
            "best_epoch": best.epoch,
            "images": task.images,
        }
        row["seconds"] = time.monotonic() - began
        record(config, folder, result.rows, row, images, on_update)
        progress.set_postfix(
            {name: f"{row[name]:.2f}" for name in ("loss", "accuracy", "probability")} | {"best": best.told()}
        )

        # Stop by train accuracy, validation accuracy, patience or the number of epochs; or go on to a stage or start.
        result.stopped_by = stopping_rule(config, epoch, accuracy, best)
        if not result.stopped_by and attempts.is_over(epoch):
            result.stopped_by = attempts.go_on(task, epoch, best)
        if result.stopped_by:
            break
    progress.close()
    write_lines(folder.log, result.rows)  # empty where no update was needed
    result.last_vector = token.vector.detach().clone()
    if best.vector is None:
        raise WorkError(
            f"none of {len(result.rows)} updates had a finite loss; try --mixed_precision no or bf16, or more --max_epochs"
        )
    token.load(best.vector)
    result.kept_updates, result.images, result.seconds = best.updates, task.images, time.monotonic() - start
    show_evolution(config, folder, result.rows)
    return result


class Attempts:
    """Stage by stage from a start, and again from the next start where that brings nothing.

    The first stage has to leave the plateau on which no image is right, and is over once the token is clearly better than the start. A
    later one makes the token reliable, from the best one of the attempt on, until it brings nothing any more: the second settles what is
    drawn, the third how it looks. From which start the plateau is left differs from class to class.

    Args:
        class_name: the name of the class in the prompts.
        folder: where the images of validations go.
    """

    def __init__(self, config: RunConfig, token: ClassToken, class_name: str, folder: RunFolder):
        self.config, self.token, self.rate = config, token, config.update_learning_rate(token.word_rms)
        self.starts = [token.start_vector(start, class_name) for start in config.starts]
        self.folder = folder
        self.start, self.stage, self.began = -1, 0, 0  # begin() makes it the first start
        self.best, self.first = Best(), -math.inf

    @property
    def has_progress(self) -> bool:
        """Whether the attempt's best token is clearly better than the first start, or better and nearly right."""
        return bool(self.best.score) and self.best.score[0] > min(
            self.first + MORE * (1 - self.first), max(self.first, NEARLY)
        )

    @property
    def goes_on(self) -> bool:
        """Whether there is a next stage for the attempt's best token."""
        return self.has_progress and self.stage + 1 < len(self.config.stages)

    def begin(self, epoch: int) -> None:
        """The next stage or the next start, after ``epoch`` updates, with a fresh optimiser."""
        if self.goes_on:
            self.stage += 1
            self.token.load(self.best.vector)
        else:
            self.start, self.stage, self.best = (self.start + 1) % len(self.starts), 0, Best()
            self.token.load(self.starts[self.start])
        self.began, self.optimizer = epoch, make_optimizer(self.config, self.token, self.rate)
        self.adapt()
        self.mean, self.weight = torch.zeros_like(self.token.vector), 0.0

    @torch.no_grad()
    def average(self) -> None:
        """Take the token after an update into the running mean, as Adam does: without bias to the beginning."""
        old = self.config.token_ema
        self.mean, self.weight = (
            old * self.mean + (1 - old) * self.token.vector.detach(),
            old * self.weight + 1 - old,
        )

    def score(self, task: Task, best: Best, epoch: int) -> tuple[float, float]:
        """Score the token, or its running mean, on the validation seeds, and offer it to ``best``; returns the score."""
        current = self.token.vector.detach().clone()
        if self.weight:
            self.token.load(self.mean / self.weight)
        beats = max((NEARLY, *self.best.score[:1])) if self.config.confirm_best else math.inf
        score, scored = task.validate(beats=beats), self.token.vector.detach().clone()
        self.token.load(current)
        self.first = score[0] if not epoch else self.first
        self.best.offer(score, scored, epoch, epoch)
        best.offer(score, scored, epoch, epoch)
        show_validation(self.folder, task, epoch)
        self.adapt()
        return score

    def adapt(self) -> None:
        """Take small steps from where the token is nearly right."""
        nearly = bool(self.best.score) and self.best.score[0] > NEARLY
        self.optimizer.param_groups[0]["lr"] = self.rate * (self.config.fine_rate if nearly else 1)

    def is_over(self, epoch: int) -> bool:
        """Whether the stage has done its part, or brings nothing any more."""
        if self.config.choose_by != "validation":
            return False
        has_left_the_plateau = self.stage == 0 and self.goes_on
        since = max(self.began, self.best.epoch if self.has_progress else 0)
        is_last = 0 < self.stage == len(self.config.stages) - 1
        return has_left_the_plateau or epoch - since >= self.config.attempt_patience * (
            LONGER if is_last else 1
        )

    def go_on(self, task: Task, epoch: int, best: Best) -> str:
        """Begin the next stage or start; or give the rule that ends training where the best token of all is too good to begin anew for."""
        enough = self.config.enough_validation_accuracy
        if not self.goes_on and 0 < enough <= best.score[0]:
            if not (self.config.confirm_best and best.score[0] > NEARLY):
                # It may have been the best on a part of the validation, and lucky.
                self.token.load(best.vector)
                best.score = task.validate(beats=-math.inf)
            if enough <= best.score[0]:
                return "enough"
        self.begin(epoch)
        task.kept_for = ()  # another token walks trajectories of its own
        return ""

    def told(self) -> dict:
        """The attempt for the log."""
        return {"start": self.config.starts[self.start], "stage": self.stage + 1}


def check_finite(epoch: int, loss: float, norm: float, scaled: bool, before: list[dict]) -> None:
    """Raises WorkError where loss or gradient norm are not finite; with a scaled loss they may be, and the scaler skips the update.

    Args:
        before: the log's rows so far: as many losses in a row that are not finite are too many with a scaled loss, too.
    """
    in_vain = (
        not math.isfinite(loss) and [row["loss"] is None for row in before[-OVERFLOWS:]] == [True] * OVERFLOWS
    )
    if in_vain or not (scaled or math.isfinite(loss) and math.isfinite(norm)):
        raise WorkError(
            f"update {epoch}: loss {loss}, gradient norm {norm}; try --mixed_precision no or bf16, or a lower --learning_rate"
        )


def record(
    config: RunConfig,
    folder: RunFolder,
    rows: list[dict],
    row: dict,
    images: torch.Tensor,
    on_update: OnUpdate | None,
) -> None:
    """Log one update, and show the images (N, 3, H, W) that it learned from; JSON has no number for what is not finite."""
    row = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    rows.append(row)
    write_lines(folder.log, rows)
    if config.train_images_every and row["epoch"] % config.train_images_every == 0:
        write_image(folder.train_images / f"epoch_{row['epoch']:03d}.png", grid(images, columns=len(images)))
    if on_update:
        on_update(row, images)


def show_validation(folder: RunFolder, task: Task, epoch: int) -> None:
    """Keep what the first validation seeds have become."""
    if len(task.first_images):
        write_image(
            folder.train_images / f"validation_{epoch:03d}.png", grid(task.first_images, columns=FOLLOWED)
        )


def show_evolution(config: RunConfig, folder: RunFolder, rows: list[dict]) -> None:
    """The same noises over the updates: the validation's, or the training's where they always come back."""
    if config.choose_by == "validation" or config.noise_pool == 1:
        name = "validation" if config.choose_by == "validation" else "epoch"
        strips = {
            int(path.stem.rpartition("_")[2]): path for path in folder.train_images.glob(f"{name}_*.png")
        }
        columns = FOLLOWED if name == "validation" else config.images_per_update
        if strips:
            write_evolution(folder.evolution, strips, rows, columns, FOLLOWED)


def make_optimizer(config: RunConfig, token: ClassToken, rate: float) -> torch.optim.AdamW:
    """AdamW over the token's vectors alone."""
    return torch.optim.AdamW(
        [token.vector], lr=rate, betas=config.betas, eps=config.adam_epsilon, weight_decay=config.weight_decay
    )


def is_validated(config: RunConfig, epoch: int, accuracy: float) -> bool:
    """Whether the token is scored on the validation seeds after ``epoch``: every so often, and before training ends."""
    return (
        epoch % config.validate_every == 0
        or epoch == config.max_epochs
        or accuracy > config.stop_train_accuracy
    )


def is_scored(config: RunConfig, epoch: int, accuracy: float) -> bool:
    """Whether the token of ``epoch`` was compared with the best one."""
    return config.choose_by == "loss" or is_validated(config, epoch, accuracy)


def stopping_rule(config: RunConfig, epoch: int, accuracy: float, best: Best) -> str:
    """Name of the rule that ends training after ``epoch`` updates, or "".

    Args:
        accuracy: share of this update's images that every guide gives to the class.
    """
    if epoch and accuracy > config.stop_train_accuracy:
        return "train_accuracy"
    if config.choose_by == "validation" and 0 < config.stop_validation_accuracy <= best.score[0]:
        return "validation_accuracy"
    if config.patience and is_scored(config, epoch, accuracy) and epoch - best.epoch >= config.patience:
        return "patience"
    return "max_epochs" if epoch >= config.max_epochs else ""
