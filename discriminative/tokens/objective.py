"""The class to learn, and how images of it are sampled and scored: one update's gradient, one validation."""

import math
import random
from dataclasses import replace
from statistics import fmean as mean
from statistics import median

import torch
import torch.nn.functional as F

from discriminative.diffusion.gradients import drawn
from discriminative.diffusion.memory import Batches
from discriminative.guides.classifier import Guide, check_most, gives
from discriminative.seeds import VALIDATION_BASE, training_seeds, turn, validation_seeds
from discriminative.settings import GradientPath, LearningSettings, SamplerSettings
from discriminative.tokens.batch import Asked, Work, alone
from discriminative.tokens.class_token import ClassToken
from discriminative.tokens.curriculum import Score
from discriminative.tokens.prompts import TEMPLATES, fill

LEAST_PROMPT_WEIGHT = 0.15  # in training, of a prompt that is always right; of one that never is 1 more
FINAL_SIZE = 36  # noises on which the kept token is compared with the word in its place
OVERFLOWN = 20.0  # loss of an image that is not finite: the class has next to no probability
FOLLOWED = 3  # noises whose images are followed over the updates


def counted(losses: list[float], right: list[bool], certainty: float) -> list[bool]:
    """Which images of a validation count.

    A blend of the class with something else often passes for the class, but not as surely as a whole one.
    How sure a guide is of whole ones differs from guide to guide, so the bar follows what it says of
    most.

    Args:
        losses: cross-entropy of the class, of each image.
        right: whether the guides give the image to the class.
        certainty: 0 to 1, share of the median probability of the right images that another right one needs.
    """
    probabilities = [math.exp(-loss) for loss in losses]
    typical = median([p for p, is_right in zip(probabilities, right, strict=True) if is_right] or [0])
    return [is_right and p >= certainty * typical for p, is_right in zip(probabilities, right, strict=True)]


class Objective:
    """What is asked of the token.

    Args:
        class_name: the name of the class in the prompts.
        work: does what is asked of the models; None does it at once, for this token alone.
    """

    def __init__(
        self,
        settings: LearningSettings,
        token: ClassToken,
        guides: list[Guide],
        class_name: str,
        work: Work | None = None,
    ):
        self.settings = settings
        self.token = token
        self.guides = guides
        self.work = work or alone
        self.images = 0  # sampled so far
        self.first_batches = []  # (B, 3, H, W) each, of the last validation's first images
        self.batches = Batches(settings.batch_size, token.models.fits, "update")
        self.eval_batches = Batches(settings.eval_batch_size, token.models.fits, "sample")
        self.wrong = {}  # share of wrong images in the last validation, by prompt
        self.stages = [self.of_stage(stage) for stage in settings.stages]
        self.templates = [fill(template, token.placeholder, class_name) for template in TEMPLATES]
        # Mostly the evaluation's prompt, the hardest.
        self.validation_prompts = [self.templates[i] for i in (0, 0, 1, 0, 0, 2)]

    def of_stage(self, stage) -> tuple[GradientPath, SamplerSettings]:
        """A stage's gradient, and the trajectory that it is taken on."""
        sampler = self.settings.sampler
        steps = stage.num_inference_steps or sampler.num_inference_steps
        return replace(self.settings.path, place=stage.place), replace(sampler, num_inference_steps=steps)

    def turn(self, epoch: int) -> int:
        """Which noises update ``epoch`` (from 0) has."""
        return turn(epoch, self.settings.noise_pool)

    def prompts(self, epoch: int) -> list[str]:
        """The prompts of one update: the templates in turn, or more of those that the last validation
        found wrong."""
        number = self.settings.images_per_update
        if self.wrong:
            weights = [self.wrong[template] + LEAST_PROMPT_WEIGHT for template in self.templates]
            rng = random.Random(f"{self.settings.seed} {self.turn(epoch)} prompts")
            return rng.choices(self.templates, weights, k=number)
        first = self.turn(epoch) * number
        return [self.templates[(first + i) % len(self.templates)] for i in range(number)]

    def accumulate(
        self, epoch: int, scaler: torch.amp.GradScaler, stage: int = 0
    ) -> tuple[torch.Tensor, ...]:
        """Add the gradient of the mean cross-entropy of one update's images to the token, in micro-batches.

        Args:
            epoch: from 0.
            stage: from 0.

        Returns:
            images (N, 3, H, W), losses (N,), probabilities of the class (N,), right or wrong (N,), all
            detached. Of several guides the probability is the geometric mean.
        """
        token = self.token
        seeds = training_seeds(self.settings.seed, self.turn(epoch), self.settings.images_per_update)
        prompts = self.prompts(epoch)
        path, sampler = self.stages[stage]
        path = drawn(path, random.Random(f"{self.settings.seed} {epoch}"))
        weight = scaler.get_scale() / len(seeds)  # micro-batches add up to the gradient of the whole mean
        asked = Asked(token, self.class_loss, prompts, seeds, sampler, self.batches, path, weight)
        parts = self.work(replace(asked, varied=self.settings.augment))
        self.images += len(seeds)
        gradient = sum(part.gradient for part in parts)  # (V, width)
        token.vector.grad = gradient if token.vector.grad is None else token.vector.grad + gradient
        losses = torch.cat([part.losses for part in parts])  # (N,)
        images = torch.cat([part.images for part in parts])  # (N, 3, H, W)
        return images, losses, (-losses).exp(), torch.cat([part.right for part in parts])

    def class_loss(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cross-entropy of the class (B,), mean over the guides, and whether every guide says it (B,).

        A loss may be not finite, as an image in half precision may be.

        Args:
            images: (B, 3, H, W) in [0, 1].
        """
        losses = []
        right = []
        for guide in self.guides:
            logits = guide.classifier.logits(images)  # (B, K)
            target = torch.full((len(logits),), guide.target, device=logits.device)
            losses.append(F.cross_entropy(logits, target, reduction="none"))  # (B,)
            right.append(gives(logits, guide.target))  # (B,)
        return torch.stack(losses).mean(0), torch.stack(right).all(0)

    @torch.no_grad()
    def validate(self, beats: float = math.inf) -> Score:
        """Share of images that count, and the class's log-probabilities, on the validation seeds.

        A few images are lucky now and then: as long as the token can still end the training, one more
        ``validation_size`` after the other is sampled, up to ``confirm_size`` more, and all are counted
        anew: the bar moves with the images that are there.

        Args:
            beats: go on, too, as long as the share so far is above this.

        Raises:
            WorkError: most images are not finite.
        """
        settings = self.settings.validation
        seeds = validation_seeds(settings.validation_size + settings.confirm_size)
        rows = []
        for i in range(0, len(seeds), settings.validation_size):
            rows += self.score_seeds(seeds[i : i + settings.validation_size])
            _, losses, right = zip(*rows, strict=True)
            counts = counted(losses, right, settings.validation_certainty)
            accuracy = mean(counts)
            reachable = (len(seeds) - counts.count(False)) / len(seeds)
            if not (accuracy > beats or 0 < settings.stop_validation_accuracy <= reachable):
                break
        verdicts = {t: [right for prompt, _, right in rows if prompt == t] for t in self.templates}
        of_all = mean(
            [right for _, _, right in rows]
        )  # for a prompt that so small a validation does not have
        self.wrong = {t: 1 - (mean(found) if found else of_all) for t, found in verdicts.items()}
        return Score(accuracy, tuple(-loss for loss in losses))

    @property
    def first_images(self) -> torch.Tensor:
        """Of the last validation those (FOLLOWED, 3, H, W) that are followed; none before any."""
        return self.first_batches[0][:FOLLOWED] if self.first_batches else torch.empty(0)

    @torch.no_grad()
    def sureness(self) -> float:
        """Probability, 0 to 1, that the guide gives to what it sees in an image of the last validation, the
        median; of several guides that of the least sure. 0 before any validation."""
        if not self.first_batches:
            return 0.0
        sure = [
            torch.cat([guide.classifier.logits(images).softmax(1).amax(1) for images in self.first_batches])
            for guide in self.guides
        ]  # (N,) each
        return min(of_guide.median().item() for of_guide in sure)

    @torch.no_grad()
    def compare(self, vector: torch.Tensor, other: torch.Tensor) -> list[float]:
        """How much more log-probability the class has with the first of two tokens, by image.

        The noises are new ones, on which nothing was chosen. The token is left as the first.

        Args:
            vector: (N, width).
            other: (M, width), with M of 1 to N.
        """
        settings = self.settings.validation
        drawn = settings.validation_size + settings.confirm_size
        seeds = validation_seeds(drawn + FINAL_SIZE)[drawn:]
        before = self.log_probabilities(other, seeds)
        after = self.log_probabilities(vector, seeds)
        return [new - old for new, old in zip(after, before, strict=True)]

    @torch.no_grad()
    def log_probabilities(self, vector: torch.Tensor, seeds: list[int]) -> list[float]:
        """Of the class, image by image, with the token as ``vector`` (N, width), which it stays."""
        self.token.load(vector)
        return [-loss for _, loss, _ in self.score_seeds(seeds)]

    def score_seeds(self, seeds: list[int]) -> list[tuple[str, float, bool]]:
        """Prompt, loss and verdict of finished images of validation seeds, sampled in batches.

        An image that is not finite is wrong.

        Raises:
            WorkError: most are not.
        """
        prompts = [
            self.validation_prompts[(seed - VALIDATION_BASE) % len(self.validation_prompts)] for seed in seeds
        ]

        self.images += len(seeds)
        sampler = self.settings.sampler
        parts = self.work(Asked(self.token, self.class_loss, prompts, seeds, sampler, self.eval_batches))
        if seeds[0] == VALIDATION_BASE:
            self.first_batches = [part.images for part in parts]
        rows = [row for part in parts for row in zip(part.losses.tolist(), part.right.tolist(), strict=True)]
        check_most(len(rows), sum(math.isfinite(loss) for loss, _ in rows), self.token.models.dtype)
        rows = [(loss if math.isfinite(loss) else OVERFLOWN, right) for loss, right in rows]
        return [(prompt, *row) for prompt, row in zip(prompts, rows, strict=True)]
