"""The class to learn, and how images of it are drawn and scored: one update's gradient, one validation."""

import math
import random
from dataclasses import replace
from functools import partial
from statistics import fmean as mean
from statistics import median

import torch
import torch.nn.functional as F

from config import RunConfig
from discriminative.diffusion.gradients import GradientPath, Verdict, combined, token_gradients
from discriminative.diffusion.memory import Batches
from discriminative.diffusion.sampler import SamplerSettings, draw
from discriminative.guides.classifier import Guide, finite
from discriminative.guides.preprocess import augmented
from discriminative.seeds import VALIDATION_BASE, training_seeds, turn, validation_seeds
from discriminative.settings import parse_interval
from discriminative.tokens.class_token import ClassToken
from discriminative.tokens.prompts import TEMPLATES, fill

LEAST = 0.15  # weight in training of a prompt that is always right; of one that never is 1 more
FOLLOWED = 3  # noises whose images are followed over the updates


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
    """How they want images drawn in training; a solver of higher order draws nearly the same images in fewer steps.

    A small decoder, where one is named, is for training alone: what is evaluated is what a user sees.
    """
    scheduler, steps = config.training_sampler
    return replace(
        sampler_settings(config),
        scheduler=scheduler,
        num_inference_steps=steps,
        tiny_vae=bool(config.tiny_vae),
    )


def validation_settings(config: RunConfig) -> SamplerSettings:
    """How a validation's images are drawn: as training's, but without guidance once what they show is settled."""
    settings = training_settings(config)
    low, high = settings.guidance_interval
    return replace(settings, guidance_interval=(low, min(high, config.validation_guidance_end)))


def counted(losses: list[float], right: list[bool], certainty: float) -> list[bool]:
    """Which images of a validation count.

    A blend of the class with something else often passes for the class, but not as surely as a whole one. How sure a guide is of whole
    ones differs from guide to guide, so the bar follows what it says of most.

    Args:
        losses, right: cross-entropy of the class and verdict of each image.
        certainty: 0 to 1, share of the median probability of the right images that another right one needs.
    """
    probabilities = [math.exp(-loss) for loss in losses]
    least = certainty * median(
        [p for p, is_right in zip(probabilities, right, strict=True) if is_right] or [0]
    )
    return [is_right and p >= least for p, is_right in zip(probabilities, right, strict=True)]


class Task:
    """The class to learn, and how its images are drawn and scored.

    Args:
        class_name: the name of the class in the prompts.
    """

    def __init__(self, config: RunConfig, token: ClassToken, guides: list[Guide], class_name: str):
        self.config, self.token, self.guides = config, token, guides
        self.images = 0  # that were drawn
        self.first_images = torch.empty(0)  # (FOLLOWED, 3, H, W) of the last validation
        self.batches, self.eval_batches = Batches(config.batch_size), Batches(config.eval_batch_size)
        self.kept_for, self.kept = (
            (),
            {},
        )  # the steps without gradient of the last update, where the next one shares them
        self.wrong = {}  # share of wrong images in the last validation, by prompt
        self.settings, self.validation_settings = training_settings(config), validation_settings(config)
        # Each stage's gradients, and the trajectory that they are taken on.
        self.stages = [
            (
                GradientPath(
                    config.gradient_mode,
                    config.gradient_steps,
                    stage.places,
                    stage.anywhere,
                    config.normalize_steps,
                ),
                replace(
                    self.settings,
                    num_inference_steps=stage.num_inference_steps or self.settings.num_inference_steps,
                ),
            )
            for stage in config.stages
        ]
        self.templates = [fill(t, token.placeholder, class_name) for t in TEMPLATES[: config.num_templates]]
        # The evaluation's prompt is the first one, which is also the hardest: most of the validation is of it.
        self.validation_prompts = [self.templates[i] for i in (0, 0, 1, 0, 0, 2) if i < len(self.templates)]

    def turn(self, epoch: int) -> int:
        """Which noises update ``epoch`` has."""
        return turn(epoch // self.config.reuse_trajectory, self.config.noise_pool)

    def prompts(self, epoch: int) -> list[str]:
        """The prompts of one update: more of those that the last validation found wrong, without which the templates in turn."""
        number, templates = self.config.images_per_update, self.templates
        if self.wrong:
            return random.Random(f"{self.config.seed} {self.turn(epoch)} prompts").choices(
                templates, [self.wrong[t] + LEAST for t in templates], k=number
            )
        first = self.turn(epoch) * number
        return [templates[(first + i) % len(templates)] for i in range(number)]

    def accumulate(
        self, epoch: int, scaler: torch.amp.GradScaler, stage: int = 0
    ) -> tuple[torch.Tensor, ...]:
        """Add the gradient of the mean cross-entropy of one update's images to the token, in micro-batches.

        Args:
            epoch, stage: count from 0.

        Returns:
            images (N, 3, H, W), losses (N,), probabilities of the class (N,), right or wrong (N,), all detached. Of several
            guides the probability is the geometric mean.
        """
        seeds, token = (
            training_seeds(self.config.seed, self.turn(epoch), self.config.images_per_update),
            self.token,
        )
        prompts = self.prompts(epoch)
        path, settings = self.stages[stage]
        path = path.drawn(random.Random(f"{self.config.seed} {epoch}"))
        if self.kept_for != (stage, prompts, seeds):
            self.kept_for, self.kept = (stage, prompts, seeds), {}
        weight = scaler.get_scale() / len(seeds)  # micro-batches add up to the gradient of the whole mean

        def batch(chunk: slice) -> Verdict:
            score = partial(self.score_augmented, seeds[chunk]) if self.config.augment else self.score
            # In half precision an image may overflow now and then; its loss is NaN, and the scaler skips the update.
            score = partial(score, may_overflow=scaler.is_enabled())
            kept = (
                self.kept.setdefault((chunk.start, chunk.stop), {})
                if self.config.reuse_trajectory > 1
                else None
            )
            return token_gradients(token, prompts[chunk], seeds[chunk], settings, path, score, weight, kept)

        parts = self.batches.over(len(seeds), batch)
        self.images += len(seeds)
        by_step = [
            sum(gradients) for gradients in zip(*(p.gradients for p in parts), strict=True)
        ]  # (V, width) each
        gradient = combined(by_step, path.normalize, scaler.get_scale())
        token.vector.grad = gradient if token.vector.grad is None else token.vector.grad + gradient
        losses = torch.cat([p.losses for p in parts])  # (N,)
        return (
            torch.cat([p.images for p in parts]),
            losses,
            (-losses).exp(),
            torch.cat([p.right for p in parts]),
        )

    def score(
        self, images: torch.Tensor, chunk: slice | None = None, may_overflow: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cross-entropy of the class (B,), mean over the guides, and whether every guide says it (B,), of images (B, 3, H, W).

        Raises:
            WorkError: a logit is not finite, and may not be.
        """
        losses, right = [], []
        for guide in self.guides:
            logits = guide.classifier.logits(images)  # (B, K)
            logits = logits if may_overflow else finite(logits)
            target = torch.full((len(logits),), guide.target, device=logits.device)
            losses.append(F.cross_entropy(logits, target, reduction="none"))  # (B,)
            right.append(logits.argmax(1) == target)  # (B,)
        return torch.stack(losses).mean(0), torch.stack(right).all(0)

    def score_augmented(
        self, seeds: list[int], images: torch.Tensor, chunk: slice, may_overflow: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The score of images (B, 3, H, W) that are varied as the seeds of this part of the batch say."""
        return self.score(augmented(images, seeds[chunk]), chunk, may_overflow)

    @torch.no_grad()
    def validate(self, beats: float = math.inf) -> tuple[float, float]:
        """Share of images that count, then mean log-probability of the class, on the validation seeds with full sampling.

        A few images are lucky now and then: as long as the token can still end the training, one more ``validation_size`` after the
        other is drawn, up to ``confirm_size`` more, and all are counted anew: the bar moves with the images that are there.

        Args:
            beats: go on, too, as long as the share so far is above this; ``-math.inf`` draws them all.

        Raises:
            WorkError: a logit is not finite.
        """
        config, seeds, drawn = (
            self.config,
            validation_seeds(self.config.validation_size + self.config.confirm_size),
            [],
        )
        for i in range(0, len(seeds), config.validation_size):
            drawn += self.score_drawn(seeds[i : i + config.validation_size])
            _, losses, right = zip(*drawn, strict=True)
            counts = counted(losses, right, config.validation_certainty)
            reachable, accuracy = (len(seeds) - counts.count(False)) / len(seeds), mean(counts)
            if not (accuracy > beats or 0 < config.stop_validation_accuracy <= reachable):
                break
        verdicts = {t: [right for prompt, _, right in drawn if prompt == t] for t in self.templates}
        of_all = mean(
            [right for _, _, right in drawn]
        )  # for a prompt that so small a validation does not have
        self.wrong = {t: 1 - (mean(found) if found else of_all) for t, found in verdicts.items()}
        return accuracy, -mean(losses)

    def score_drawn(self, seeds: list[int]) -> list[tuple[str, float, bool]]:
        """Prompt, loss and verdict of finished images, drawn in batches."""
        prompts = [
            self.validation_prompts[(seed - VALIDATION_BASE) % len(self.validation_prompts)] for seed in seeds
        ]

        def batch(chunk: slice) -> list[tuple[str, float, bool]]:
            images = draw(self.token, prompts[chunk], seeds[chunk], self.validation_settings)  # (B, 3, H, W)
            if seeds[chunk.start] == VALIDATION_BASE:
                self.first_images = images[:FOLLOWED]
            losses, right = self.score(images)  # (B,) each
            return list(zip(prompts[chunk], losses.tolist(), right.tolist(), strict=True))

        self.images += len(seeds)
        return [row for part in self.eval_batches.over(len(seeds), batch) for row in part]
