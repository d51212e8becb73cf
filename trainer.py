"""Learn one class token: sample, classify, cross-entropy, step on one vector, keep the best, stop.

The loop is the method of Discriminative Class Tokens (ICCV 2023, arXiv 2303.17155), section 3.
"""

import math
import random
import time
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import fmean as mean

import torch
import torch.nn.functional as F
from tqdm import tqdm

from class_token import TEMPLATES, ClassToken, fill
from classifiers import Guide, finite
from config import RunConfig, WorkError, parse_interval, training_seeds, turn, validation_seeds
from gradients import GradientPath, Verdict, combined, token_gradients
from memory import Batches
from outputs import RunFolder, clear, grid, write_image, write_lines, write_tensors
from recipes import augmented
from sampler import SamplerSettings, draw

MORE = 0.25  # share of the way from the start's validation accuracy to 1 after which a token is clearly better
LEAST = 0.15  # weight in training of a prompt that is always right; of one that never is 1 more
LONGER = 2  # patience with the last of several stages: a late step makes a token worse before it makes it better
NEARLY = 0.9  # validation accuracy of a token that is nearly right: large steps would do it harm


@dataclass
class Training:
    """What a training came to: one log row an update, the kept vector's age, why it ended, and what it cost."""

    rows: list[dict] = field(default_factory=list)
    kept_updates: int = 0  # updates that the kept vector has seen
    last_vector: torch.Tensor | None = None  # (N, width), after the last update
    stopped_by: str = ""
    images: int = 0  # drawn, for updates and for validation
    seconds: float = 0.0


@dataclass
class Best:
    """The best vector so far, by a score that is compared as tuples are; higher is better."""

    score: tuple = ()
    vector: torch.Tensor | None = None
    epoch: int = 0  # when it was found; patience counts from here
    updates: int = 0  # that it has seen
    file: Path | None = None  # where each better vector is written at once: a run that breaks off loses no more than its last updates
    placeholder: str = ""

    def offer(self, score: tuple, vector: torch.Tensor, epoch: int, updates: int) -> None:
        """Keep ``vector`` if its score is the best yet."""
        if self.vector is None or score > self.score:
            self.score, self.vector, self.epoch, self.updates = score, vector.detach().clone(), epoch, updates
            if self.file:
                write_tensors(self.file, {self.placeholder: self.vector.cpu()}, {"updates": str(updates)})


def sampler_settings(config: RunConfig) -> SamplerSettings:
    """How the options want images evaluated and shown."""
    return SamplerSettings(
        config.num_inference_steps,
        config.guidance_scale,
        config.height,
        config.width,
        guidance_interval=parse_interval(config.guidance_interval),
        decode_batch_size=config.decode_batch_size,
    )


def training_settings(config: RunConfig) -> SamplerSettings:
    """How they want images drawn in training; a solver of higher order draws nearly the same images in fewer steps."""
    scheduler, steps = config.training_sampler
    return replace(sampler_settings(config), scheduler=scheduler, num_inference_steps=steps)


def train(config: RunConfig, token: ClassToken, guides: list[Guide], class_name: str, folder: RunFolder) -> Training:
    """Learn ``token`` for the class that the guides are asked for; several guides count alike.

    Args:
        class_name: the name of the class in the prompts.
        folder: where the training images and the log go.

    Returns:
        the training; ``token`` holds the kept vector.

    Raises:
        WorkError: loss or gradient are not finite.
    """
    start, result, best = time.monotonic(), Training(), Best(file=folder.partial_token, placeholder=token.placeholder)
    # Half-precision gradients underflow without a scaled loss; the scaler is idle in other precisions.
    scaler = torch.amp.GradScaler(token.models.device.type, init_scale=2.0**10, enabled=token.models.dtype == torch.float16)
    task, attempts = Task(config, token, guides, class_name), Attempts(config, token, class_name)
    clear(folder.train_images, "epoch_*.png")

    # The initial token may do already: a class that its name alone draws needs no update.
    attempts.begin(0)
    if config.keep == "validation":
        attempts.score(task, best, 0)
        result.stopped_by = stopping_rule(config, 0, 0.0, best)
    progress = tqdm(range(1, 1 + (0 if result.stopped_by else config.max_epochs)), desc=f"learning {class_name!r}", unit="update")
    for epoch in progress:
        began, drawn_with = time.monotonic(), token.vector.detach().clone()

        # Sample images with the current token, score them, and accumulate the gradient of their mean cross-entropy.
        attempts.optimizer.zero_grad(set_to_none=True)
        images, losses, probabilities, right = task.accumulate(epoch - 1, scaler, attempts.stage)
        loss, accuracy = losses.mean().item(), right.float().mean().item()

        # Clip, step on the one vector, and keep it as short as words are.
        scaler.unscale_(attempts.optimizer)
        norm = torch.nn.utils.clip_grad_norm_([token.vector], config.max_grad_norm or math.inf).item()
        check_finite(epoch, loss, norm, scaled=scaler.get_scale() > 1)
        scaler.step(attempts.optimizer)
        scaler.update()
        token.bound(config.max_token_norm)
        attempts.average()

        # Keep the best token: by unseen seeds, or by the loss of the images that it drew.
        row = {"epoch": epoch, "loss": loss, "accuracy": accuracy, "probability": probabilities.mean().item(), **attempts.told()}
        if config.keep == "loss":
            best.offer((-loss,), drawn_with, epoch, epoch - 1)
        elif is_validated(config, epoch, accuracy):
            row |= zip(("validation_accuracy", "validation_log_probability"), attempts.score(task, best, epoch), strict=True)
        row |= {"gradient_norm": norm if math.isfinite(norm) else None, "token_norm": token.norm(), "best_epoch": best.epoch}
        record(folder, result.rows, row | {"seconds": time.monotonic() - began}, images)
        progress.set_postfix(loss=f"{loss:.3f}", accuracy=f"{accuracy:.2f}", best=best.epoch)

        # Stop by train accuracy, validation accuracy, patience or the number of epochs; or go on to a stage or start.
        result.stopped_by = stopping_rule(config, epoch, accuracy, best)
        if result.stopped_by:
            break
        if attempts.is_over(epoch):
            attempts.begin(epoch)
    progress.close()
    write_lines(folder.log, result.rows)  # empty where no update was needed
    result.last_vector = token.vector.detach().clone()
    token.load(best.vector)
    result.kept_updates, result.images, result.seconds = best.updates, task.images, time.monotonic() - start
    return result


class Attempts:
    """Stage by stage from a start, and again from the next start where that brings nothing.

    The first stage has to leave the plateau on which no image is right, and is over once the token is clearly better than the start. A
    later one makes the token reliable, from the best one of the attempt on, until it brings nothing any more: the second settles what is
    drawn, the third how it looks. From which start the plateau is left differs from class to class.

    Args:
        class_name: the name of the class in the prompts.
    """

    def __init__(self, config: RunConfig, token: ClassToken, class_name: str):
        self.config, self.token, self.rate = config, token, config.update_learning_rate(token.word_rms)
        self.starts = [token.start_vector(start, class_name) for start in config.starts]
        self.start, self.stage, self.began = -1, 0, 0  # begin() makes it the first start
        self.best, self.first = Best(), -math.inf

    @property
    def has_progress(self) -> bool:
        """Whether the attempt's best token is clearly better than the first start."""
        return bool(self.best.score) and self.best.score[0] > self.first + MORE * (1 - self.first)

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
        self.mean, self.weight = old * self.mean + (1 - old) * self.token.vector.detach(), old * self.weight + 1 - old

    def score(self, task: "Task", best: Best, epoch: int) -> tuple[float, float]:
        """Score the token, or its running mean, on the validation seeds, and offer it to ``best``; returns the score."""
        current = self.token.vector.detach().clone()
        if self.weight:
            self.token.load(self.mean / self.weight)
        score, scored = task.validate(), self.token.vector.detach().clone()
        self.token.load(current)
        self.first = score[0] if not epoch else self.first
        self.best.offer(score, scored, epoch, epoch)
        best.offer(score, scored, epoch, epoch)
        self.adapt()
        return score

    def adapt(self) -> None:
        """Take small steps from where the token is nearly right."""
        nearly = bool(self.best.score) and self.best.score[0] > NEARLY
        self.optimizer.param_groups[0]["lr"] = self.rate * (self.config.fine_rate if nearly else 1)

    def is_over(self, epoch: int) -> bool:
        """Whether the stage has done its part, or brings nothing any more."""
        if self.config.keep != "validation":
            return False
        has_left_the_plateau = self.stage == 0 and self.goes_on
        since = max(self.began, self.best.epoch if self.has_progress else 0)
        is_last = 0 < self.stage == len(self.config.stages) - 1
        return has_left_the_plateau or epoch - since >= self.config.attempt_patience * (LONGER if is_last else 1)

    def told(self) -> dict:
        """The attempt for the log."""
        return {"start": self.config.starts[self.start], "stage": self.stage + 1}


def check_finite(epoch: int, loss: float, norm: float, scaled: bool) -> None:
    """Raises WorkError where loss or gradient norm are not finite; a scaled loss may overflow, and the scaler then skips the update."""
    if not (math.isfinite(loss) and (math.isfinite(norm) or scaled)):
        raise WorkError(f"update {epoch}: loss {loss}, gradient norm {norm}; try --mixed_precision bf16 or no, or a lower --learning_rate")


def record(folder: RunFolder, rows: list[dict], row: dict, images: torch.Tensor) -> None:
    """Log one update, and show the images (N, 3, H, W) that it learned from."""
    rows.append(row)
    write_lines(folder.log, rows)
    write_image(folder.train_images / f"epoch_{row['epoch']:03d}.png", grid(images, columns=len(images)))


def make_optimizer(config: RunConfig, token: ClassToken, rate: float) -> torch.optim.AdamW:
    """AdamW over the token's vectors alone."""
    return torch.optim.AdamW([token.vector], lr=rate, betas=config.betas, eps=config.adam_epsilon, weight_decay=config.weight_decay)


def is_validated(config: RunConfig, epoch: int, accuracy: float) -> bool:
    """Whether the token is scored on the validation seeds after ``epoch``: every so often, and before training ends."""
    return epoch % config.validate_every == 0 or epoch == config.max_epochs or accuracy > config.stop_train_accuracy


def is_scored(config: RunConfig, epoch: int, accuracy: float) -> bool:
    """Whether the token of ``epoch`` was compared with the best one."""
    return config.keep == "loss" or is_validated(config, epoch, accuracy)


def stopping_rule(config: RunConfig, epoch: int, accuracy: float, best: Best) -> str:
    """Name of the rule that ends training after ``epoch`` updates, or "".

    Args:
        accuracy: share of this update's images that every guide gives to the class.
    """
    if epoch and accuracy > config.stop_train_accuracy:
        return "train_accuracy"
    if config.keep == "validation" and 0 < config.stop_validation_accuracy <= best.score[0]:
        return "validation_accuracy"
    if config.patience and is_scored(config, epoch, accuracy) and epoch - best.epoch >= config.patience:
        return "patience"
    return "max_epochs" if epoch >= config.max_epochs else ""


class Task:
    """The class to learn, and how its images are drawn and scored.

    Args:
        class_name: the name of the class in the prompts.
    """

    def __init__(self, config: RunConfig, token: ClassToken, guides: list[Guide], class_name: str):
        self.config, self.token, self.guides = config, token, guides
        self.images = 0  # that were drawn
        self.batches, self.eval_batches = Batches(config.batch_size), Batches(config.eval_batch_size)
        self.kept_for, self.kept = (), {}  # the steps without gradient of the last update, where the next one shares them
        self.wrong = {}  # share of wrong images in the last validation, by prompt
        self.settings = training_settings(config)
        # Each stage's gradients, and the trajectory that they are taken on.
        self.stages = [
            (
                GradientPath(config.gradient_mode, config.gradient_steps, stage.places, stage.anywhere, config.normalize_steps),
                replace(self.settings, num_inference_steps=stage.num_inference_steps or self.settings.num_inference_steps),
            )
            for stage in config.stages
        ]
        self.templates = [fill(t, token.placeholder, class_name) for t in TEMPLATES[: config.num_templates]]
        # The evaluation's prompt is the first one, which is also the hardest: most of the validation is of it.
        self.validation_prompts = [self.templates[i] for i in (0, 0, 1, 0, 0, 2) if i < len(self.templates)]

    def prompts(self, epoch: int) -> list[str]:
        """The prompts of one update: more of those that the last validation found wrong, without which the templates in turn."""
        number, templates = self.config.images_per_update, self.templates
        if self.wrong:
            return random.Random(f"{self.config.seed} {turn(self.config, epoch)} prompts").choices(
                templates, [self.wrong[t] + LEAST for t in templates], k=number
            )
        first = turn(self.config, epoch) * number
        return [templates[(first + i) % len(templates)] for i in range(number)]

    def accumulate(self, epoch: int, scaler: torch.amp.GradScaler, stage: int = 0) -> tuple[torch.Tensor, ...]:
        """Add the gradient of the mean cross-entropy of one update's images to the token, in micro-batches.

        Args:
            epoch, stage: count from 0.

        Returns:
            images (N, 3, H, W), losses (N,), probabilities of the class (N,), right or wrong (N,), all detached. Of several
            guides the probability is the geometric mean.
        """
        seeds, token = training_seeds(self.config, epoch), self.token
        prompts = self.prompts(epoch)
        path, settings = self.stages[stage]
        path = path.drawn(random.Random(f"{self.config.seed} {epoch}"))
        if self.kept_for != (stage, prompts, seeds):
            self.kept_for, self.kept = (stage, prompts, seeds), {}
        weight = scaler.get_scale() / len(seeds)  # micro-batches add up to the gradient of the whole mean

        def batch(chunk: slice) -> Verdict:
            score = partial(self.score_augmented, seeds[chunk]) if self.config.augment else self.score
            kept = self.kept.setdefault((chunk.start, chunk.stop), {}) if self.config.reuse_trajectory > 1 else None
            return token_gradients(token, prompts[chunk], seeds[chunk], settings, path, score, weight, kept)

        parts = self.batches.over(len(seeds), batch)
        self.images += len(seeds)
        by_step = [sum(gradients) for gradients in zip(*(p.gradients for p in parts), strict=True)]  # (V, width) each
        gradient = combined(by_step, path.normalize, scaler.get_scale())
        token.vector.grad = gradient if token.vector.grad is None else token.vector.grad + gradient
        losses = torch.cat([p.losses for p in parts])  # (N,)
        return torch.cat([p.images for p in parts]), losses, (-losses).exp(), torch.cat([p.right for p in parts])

    def score(self, images: torch.Tensor, chunk: slice | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Cross-entropy of the class (B,), mean over the guides, and whether every guide says it (B,), of images (B, 3, H, W).

        Raises:
            WorkError: a logit is not finite.
        """
        losses, right = [], []
        for guide in self.guides:
            logits = finite(guide.classifier.logits(images))  # (B, K)
            target = torch.full((len(logits),), guide.target, device=logits.device)
            losses.append(F.cross_entropy(logits, target, reduction="none"))  # (B,)
            right.append(logits.argmax(1) == target)  # (B,)
        return torch.stack(losses).mean(0), torch.stack(right).all(0)

    def score_augmented(self, seeds: list[int], images: torch.Tensor, chunk: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """The score of images (B, 3, H, W) that are varied as the seeds of this part of the batch say."""
        return self.score(augmented(images, seeds[chunk]))

    @torch.no_grad()
    def validate(self) -> tuple[float, float]:
        """Accuracy, then mean log-probability of the class, on the validation seeds with full sampling.

        A few images are lucky now and then: as long as the token can still end the training, one more ``validation_size`` after the
        other is drawn, up to ``confirm_size`` more, and all count.

        Raises:
            WorkError: a logit is not finite.
        """
        config, seeds, drawn = self.config, validation_seeds(self.config), []
        for i in range(0, len(seeds), config.validation_size):
            drawn += self.score_drawn(seeds[i : i + config.validation_size])
            reachable = (len(seeds) - sum(not right for _, _, right in drawn)) / len(seeds)
            if not 0 < config.stop_validation_accuracy <= reachable:
                break
        accuracy = mean(right for _, _, right in drawn)
        self.wrong = {t: 1 - mean([right for prompt, _, right in drawn if prompt == t] or [0]) for t in self.templates}
        return accuracy, -mean(loss for _, loss, _ in drawn)

    def score_drawn(self, seeds: list[int]) -> list[tuple[str, float, bool]]:
        """Prompt, loss and verdict of finished images, drawn in batches."""
        prompts = [self.validation_prompts[i % len(self.validation_prompts)] for i in range(len(seeds))]

        def batch(chunk: slice) -> list[tuple[str, float, bool]]:
            losses, right = self.score(draw(self.token, prompts[chunk], seeds[chunk], self.settings))  # (B,) each
            return list(zip(prompts[chunk], losses.tolist(), right.tolist(), strict=True))

        self.images += len(seeds)
        return [row for part in self.eval_batches.over(len(seeds), batch) for row in part]
