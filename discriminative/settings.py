"""Small settings that the library takes. No torch here: the command line reads them first.

A field without a default is an option of the command line, where its default stands. One with a default is a
constant, set in Python: ``config.learning(fine_rate=1.0)``.
"""

import math
from dataclasses import MISSING, dataclass, fields, replace

from discriminative.seeds import VALIDATION_BASE


@dataclass(frozen=True)
class SamplerSettings:
    """How images are sampled.

    Args:
        num_inference_steps: steps asked of the scheduler (its own list may be longer: PNDM makes 31 of 30).
        guidance_scale: weight of classifier-free guidance; 1 or less turns it off.
        height: in pixels; None is the model's own.
        width: in pixels; None is the model's own.
        scheduler: a short name of ``schedulers.SCHEDULERS``; None is the one that the models were loaded
            with.
        decode_batch_size: images that the VAE decodes at once; None is all. Changes results by rounding only.
        tiny_vae: decode with the models' small decoder.
    """

    num_inference_steps: int
    guidance_scale: float
    height: int | None = None
    width: int | None = None
    scheduler: str | None = None
    decode_batch_size: int | None = None
    tiny_vae: bool = False

    @property
    def guidance_weight(self) -> float:
        """What guidance comes to: at most 1 is none, the prompt alone, as in diffusers."""
        return max(1.0, self.guidance_scale)


@dataclass(frozen=True)
class Stage:
    """Where on a trajectory the gradient is taken.

    Args:
        place: 0 is the first step of the scheduler's list, 1 the last; None where the gradient's mode has
            no place.
        num_inference_steps: of that trajectory; None is as many as training's images have.
    """

    place: float | None = None
    num_inference_steps: int | None = None


def parse_stages(text: str) -> tuple[Stage, ...]:
    """Stages with semicolons between them: "0.13", or "0@8;0.07@15", places on trajectories of 8 and 15
    steps.

    Raises:
        ValueError: anything else, a place outside 0 to 1, or no step.
    """
    stages = []
    for part in text.split(";"):
        place, at, steps = part.partition("@")
        stage = Stage(float(place), int(steps) if at else None)
        if not 0 <= stage.place <= 1 or (at and stage.num_inference_steps < 1):
            raise ValueError(text)
        stages.append(stage)
    return tuple(stages)


@dataclass(frozen=True)
class GradientPath:
    """Which denoising steps the gradient goes through.

    Args:
        mode: a key of ``gradients.MODES``.
        steps: "last": number of steps, from the end; "random": the most of them, how many is drawn anew every
            update; "lv": number of noises for the last step.
        place: "jump" and "skip": where on the trajectory, 0 the first step of the scheduler's list, 1 the
            last.
    """

    mode: str = "last"
    steps: int = 1
    place: float | None = None


GRADIENT_MODES = ("jump", "skip", "last", "random", "lv")
WITH_PLACES = ("jump", "skip")  # modes that --jump_at is for; the others have one stage


def parse_gradient_mode(text: str) -> GradientPath:
    """The path of "jump", "skip", "last", "last:5", "random:5" or "lv:4".

    Raises:
        ValueError: anything else.
    """
    mode, colon, steps = text.partition(":")
    if mode not in GRADIENT_MODES or (colon and (mode in WITH_PLACES or int(steps) < 1)):
        raise ValueError(text)
    return GradientPath(mode, int(steps) if colon else 1)


SAMPLERS = ("pndm", "ddim", "euler", "dpmsolver++")  # short names of schedulers whose steps are deterministic


def parse_sampler(text: str) -> tuple[str | None, int | None]:
    """Scheduler and steps of "dpmsolver++@12", "ddim", "same@20" or "same"; None is the evaluation's own.

    Raises:
        ValueError: anything else.
    """
    name, at, steps = text.partition("@")
    if name not in ("same", *SAMPLERS) or (at and int(steps) < 1):
        raise ValueError(text)
    return None if name == "same" else name, int(steps) if at else None


@dataclass(frozen=True)
class ValidationSettings:
    """How a token is scored on seeds of its own.

    Args:
        validation_size: seeds, fully sampled without gradient.
        confirm_size: further seeds, drawn as long as the token can still end the training; all drawn count.
        validation_certainty: a right image counts where the guide's probability of the class is at least
            this share of the median of those that are right; 0: wherever it is right.
        stop_validation_accuracy: share of counting images that ends training; 0 never does.
    """

    stop_validation_accuracy: float
    validation_size: int = 12
    confirm_size: int = 36
    validation_certainty: float = 0.7


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW over the token's vectors.

    Args:
        learning_rate: step size for each image of an update; None takes ``relative_rate``.
        weight_decay: of the vectors, per update and step size; 0 turns it off.
        max_grad_norm: the gradient is clipped to this norm; 0 turns it off.
        max_token_norm: the vectors are kept no longer than this many words' norms; 0 turns it off.
        relative_rate: step size for each image of an update over the root mean square of a word's embedding.
        fine_rate: the step size is multiplied with this once the token is nearly right; 1 turns it off.
        adam_beta1: decay of the first moment.
        adam_beta2: decay of the second moment.
        adam_epsilon: added to the denominator.
    """

    learning_rate: float | None
    weight_decay: float
    max_grad_norm: float
    max_token_norm: float
    relative_rate: float = 0.05
    fine_rate: float = 0.4
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8

    def rate(self, word_rms: float) -> float:
        """The learning rate in use, for each image of an update; ``word_rms`` is a word's."""
        return self.relative_rate * word_rms if self.learning_rate is None else self.learning_rate

    def step_size(self, images_per_update: int, word_rms: float) -> float:
        """AdamW's step size: it follows the number of images, as in the paper."""
        return self.rate(word_rms) * images_per_update


@dataclass(frozen=True)
class CurriculumSettings:
    """When training goes on to another stage or start, and when it ends.

    Args:
        max_epochs: updates at most, over all attempts.
        patience: updates without a better token that end training; 0 turns it off.
        stop_train_accuracy: a larger share of right images in an update ends training; 1 turns it off.
        stop_validation_accuracy: share of counting validation images that ends training; 0 turns it off.
        validate_every: updates between two validations.
        attempt_patience: updates without a better token after which the next stage has its turn.
        enough_validation_accuracy: no other start is tried once the best token has this accuracy; 0
            always tries. Above ``curriculum.NEARLY_RIGHT_ACCURACY``, from where a best token's whole
            validation is drawn.
    """

    max_epochs: int
    patience: int
    stop_train_accuracy: float
    stop_validation_accuracy: float
    validate_every: int
    attempt_patience: float = 20
    enough_validation_accuracy: float = 0.95


@dataclass(frozen=True)
class LearningSettings:
    """All that a training takes.

    Args:
        sampler: of the images that training samples, for updates and for validations.
        stages: where gradients are taken, one stage after the other.
        path: the gradient's mode; each stage gives it its place.
        starts: where the vector starts; the next is tried where one brings nothing.
        choose_by: "validation" keeps the best token on the validation seeds, "loss" the lowest epoch loss.
        images_per_update: images whose mean loss makes one update.
        seed: of training's noise.
        noise_pool: the same noises come back after this many updates; 0: always new ones.
        augment: vary each image a little before the guide sees it in training.
        mixed_precision: "auto" computes in bfloat16 what needs no gradient, on a CPU with units for it.
        eval_batch_size: images through the UNet at once without gradient.
        batch_size: the same with gradient; None is all of an update. Halved where memory runs out.
    """

    sampler: SamplerSettings
    stages: tuple[Stage, ...]
    path: GradientPath
    validation: ValidationSettings
    optimizer: OptimizerSettings
    curriculum: CurriculumSettings
    starts: tuple[str, ...]
    choose_by: str
    images_per_update: int
    seed: int
    noise_pool: int
    augment: bool
    mixed_precision: str
    eval_batch_size: int | None
    batch_size: int | None = None

    @property
    def constants(self) -> dict[str, float]:
        """The settings of its parts that are no options: those with a default."""
        parts = (self.validation, self.optimizer, self.curriculum)
        return {
            f.name: getattr(part, f.name) for part in parts for f in fields(part) if f.default is not MISSING
        }

    def with_constants(self, **constants) -> "LearningSettings":
        """The same with some constants changed, by their names: of this, or of one of its parts.

        Raises:
            TypeError: no part has such a setting.
            ValueError: a value is not allowed.
        """
        parts = {name: getattr(self, name) for name in ("validation", "optimizer", "curriculum")}
        own = {name: value for name, value in constants.items() if name in {f.name for f in fields(self)}}
        known = set(own)
        for name, part in parts.items():
            given = {f.name: constants[f.name] for f in fields(part) if f.name in constants}
            parts[name] = replace(part, **given)
            known |= set(given)
        if set(constants) - known:
            raise TypeError(f"no setting of a training is called {', '.join(sorted(set(constants) - known))}")
        for name, (low, high) in CONSTANT_LIMITS.items():
            if name in constants and not low <= constants[name] <= high:
                raise ValueError(f"{name}: {constants[name]} was given; allowed is {low:g} to {high:g}")
        return replace(self, **parts, **own)


TINY = 1e-12  # the least that stands for above 0
CONSTANT_LIMITS = {
    "relative_rate": (TINY, math.inf),
    "fine_rate": (TINY, math.inf),
    "adam_epsilon": (TINY, math.inf),
    "adam_beta1": (0, 1 - TINY),
    "adam_beta2": (0, 1 - TINY),
    "validation_certainty": (0, 1),
    "enough_validation_accuracy": (0, 1),
    "attempt_patience": (1, math.inf),
    "validation_size": (1, VALIDATION_BASE),
    "confirm_size": (0, VALIDATION_BASE),
}
NEVER = math.inf  # updates of patience that never end
