"""Learn one class token: sample, classify, cross-entropy, step on one vector, keep the best, stop.

The loop is the method of Discriminative Class Tokens (ICCV 2023, arXiv 2303.17155), section 3.
"""

import math
import random
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from class_token import TEMPLATES, ClassToken, fill
from classifiers import Guide, finite
from config import RunConfig, WorkError, parse_places, training_seeds, validation_seeds
from gradients import GradientPath, combined, token_gradients
from outputs import RunFolder, clear, grid, write_image, write_lines, write_tensors
from sampler import SamplerSettings, draw

MORE = 0.25  # accuracy by which a token has to be better than the initial one for a further stage to build on it


@dataclass
class Training:
    """What a training came to: one log row an update, the kept vector's age, why it ended and how long it took."""

    rows: list[dict] = field(default_factory=list)
    kept_updates: int = 0  # updates that the kept vector has seen
    last_vector: torch.Tensor | None = None  # (N, width), after the last update
    stopped_by: str = ""
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
    """The sampler's part of the options: the same for training and for evaluation."""
    return SamplerSettings(config.num_inference_steps, config.guidance_scale, config.height, config.width)


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
    optimizer = make_optimizer(config, token)
    # Half-precision gradients underflow without a scaled loss; the scaler is idle in other precisions.
    scaler = torch.amp.GradScaler(token.models.device.type, init_scale=2.0**10, enabled=token.models.dtype == torch.float16)
    task, stage, stage_began = Task(config, token, guides, class_name), 0, 0
    clear(folder.train_images, "epoch_*.png")

    # The initial token may do already: a class that its name alone draws needs no update.
    initial, first_accuracy = token.vector.detach().clone(), -math.inf
    if config.keep == "validation":
        best.offer(task.validate(), token.vector, 0, 0)
        first_accuracy = best.score[0]
        result.stopped_by = stopping_rule(config, 0, 0.0, best)
    progress = tqdm(range(1, 1 + (0 if result.stopped_by else config.max_epochs)), desc=f"learning {class_name!r}", unit="update")
    for epoch in progress:
        began, drawn_with = time.monotonic(), token.vector.detach().clone()

        # Sample images with the current token, score them, and accumulate the gradient of their mean cross-entropy.
        optimizer.zero_grad(set_to_none=True)
        images, losses, probabilities, right = task.accumulate(epoch - 1, scaler, stage)
        loss, accuracy = losses.mean().item(), right.float().mean().item()

        # Clip, step on the one vector, and keep it as short as words are.
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_([token.vector], config.max_grad_norm or math.inf).item()
        check_finite(epoch, loss, norm, scaled=scaler.get_scale() > 1)
        scaler.step(optimizer)
        scaler.update()
        token.bound(config.max_token_norm)

        # Keep the best token: by unseen seeds, or by the loss of the images that it drew.
        if config.keep == "loss":
            best.offer((-loss,), drawn_with, epoch, epoch - 1)
        elif is_validated(config, epoch, accuracy):
            best.offer(task.validate(), token.vector, epoch, epoch)

        row = {"epoch": epoch, "loss": loss, "accuracy": accuracy, "probability": probabilities.mean().item(), "stage": stage + 1}
        row |= {"gradient_norm": norm if math.isfinite(norm) else None, "token_norm": token.norm(), "best_epoch": best.epoch}
        record(folder, result.rows, row | {"seconds": time.monotonic() - began}, images)
        progress.set_postfix(loss=f"{loss:.3f}", accuracy=f"{accuracy:.2f}", best=best.epoch)

        # Where a stage has nothing more to give, the next one goes on: from the best token if that draws more of the class, else anew.
        waited = epoch - max(best.epoch, stage_began)
        if stage + 1 < len(task.paths) and is_scored(config, epoch, accuracy) and waited >= config.stage_patience:
            stage, stage_began, optimizer = stage + 1, epoch, make_optimizer(config, token)
            token.load(best.vector if best.score[0] > first_accuracy + MORE else initial)

        # Stop by train accuracy, validation accuracy, patience or the number of epochs.
        result.stopped_by = stopping_rule(config, epoch, accuracy, best)
        if result.stopped_by:
            break
    progress.close()
    write_lines(folder.log, result.rows)  # empty where no update was needed
    result.last_vector = token.vector.detach().clone()
    token.load(best.vector)
    result.kept_updates, result.seconds = best.updates, time.monotonic() - start
    return result


def check_finite(epoch: int, loss: float, norm: float, scaled: bool) -> None:
    """Raises WorkError where loss or gradient norm are not finite; a scaled loss may overflow, and the scaler then skips the update."""
    if not (math.isfinite(loss) and (math.isfinite(norm) or scaled)):
        raise WorkError(f"update {epoch}: loss {loss}, gradient norm {norm}; try --mixed_precision bf16 or no, or a lower --learning_rate")


def record(folder: RunFolder, rows: list[dict], row: dict, images: torch.Tensor) -> None:
    """Log one update, and show the images (N, 3, H, W) that it learned from."""
    rows.append(row)
    write_lines(folder.log, rows)
    write_image(folder.train_images / f"epoch_{row['epoch']:03d}.png", grid(images, columns=len(images)))


def make_optimizer(config: RunConfig, token: ClassToken) -> torch.optim.AdamW:
    """AdamW over the token's vectors alone."""
    return torch.optim.AdamW(
        [token.vector], lr=config.update_learning_rate, betas=config.betas, eps=config.adam_epsilon, weight_decay=config.weight_decay
    )


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
        self.settings = sampler_settings(config)
        mode = config.gradient_mode, config.gradient_steps
        staged = parse_places(config.jump_at) if config.gradient_mode in ("jump", "skip") else [((), False)]
        self.paths = [GradientPath(*mode, places, anywhere, config.normalize_steps) for places, anywhere in staged]
        self.templates = [fill(t, token.placeholder, class_name) for t in TEMPLATES[: config.num_templates]]

    def prompts(self, number: int, first: int = 0) -> list[str]:
        """``number`` prompts, the templates in turn."""
        return [self.templates[(first + i) % len(self.templates)] for i in range(number)]

    def accumulate(self, epoch: int, scaler: torch.amp.GradScaler, stage: int = 0) -> tuple[torch.Tensor, ...]:
        """Add the gradient of the mean cross-entropy of one update's images to the token, in micro-batches.

        Args:
            epoch, stage: count from 0.

        Returns:
            images (N, 3, H, W), losses (N,), probabilities of the class (N,), right or wrong (N,), all detached. Of several
            guides the probability is the geometric mean.
        """
        seeds, parts, token = training_seeds(self.config, epoch), [], self.token
        # With fixed noises each of them keeps its prompt too.
        prompts = self.prompts(len(seeds), epoch * len(seeds) if self.config.fresh_noise else 0)
        path = self.paths[stage].drawn(random.Random(f"{self.config.seed} {epoch}"))
        weight = scaler.get_scale() / len(seeds)  # micro-batches add up to the gradient of the whole mean
        for i in range(0, len(seeds), self.config.batch_size):
            chunk = slice(i, i + self.config.batch_size)
            parts.append(token_gradients(token, prompts[chunk], seeds[chunk], self.settings, path, self.score, weight))
        by_step = [sum(gradients) for gradients in zip(*(p.gradients for p in parts), strict=True)]  # (V, width) each
        gradient = combined(by_step, path.normalize, scaler.get_scale())
        token.vector.grad = gradient if token.vector.grad is None else token.vector.grad + gradient
        losses = torch.cat([p.losses for p in parts])  # (N,)
        return torch.cat([p.images for p in parts]), losses, (-losses).exp(), torch.cat([p.right for p in parts])

    def score(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
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

    @torch.no_grad()
    def validate(self) -> tuple[float, float]:
        """Accuracy, then mean log-probability of the class, on the validation seeds with full sampling.

        A few images are lucky now and then: where they would end the training, as many more as ``confirm_size`` are drawn, and all count.

        Raises:
            WorkError: a logit is not finite.
        """
        parts, stop, seeds = [], self.config.stop_validation_accuracy, validation_seeds(self.config)
        for chunk in (seeds[: self.config.validation_size], seeds[self.config.validation_size :]):
            parts += self.score_drawn(chunk)
            losses, right = (torch.cat(p) for p in zip(*parts, strict=True))  # (V,) each
            accuracy = right.float().mean().item()
            if not 0 < stop <= accuracy:
                break
        return accuracy, -losses.mean().item()

    def score_drawn(self, seeds: list[int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Losses and verdicts of finished images, in batches."""
        size, prompts, parts = self.config.eval_batch_size, self.prompts(len(seeds)), []
        for i in range(0, len(seeds), size):
            chunk = slice(i, i + size)
            parts.append(self.score(draw(self.token, prompts[chunk], seeds[chunk], self.settings)))
        return parts
