"""Every option of a run, once: its default, its unit, and what turns it off; with validation and presets.

The defaults are this project's own choice (see "The two presets" in the README); ``--preset paper`` sets the
hyperparameters of the official code of Discriminative Class Tokens (ICCV 2023, arXiv 2303.17155).
"""

import importlib.util
import math
import os
import re
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from discriminative.errors import UsageError
from discriminative.records.layout import NO_EXP_IDS
from discriminative.seeds import MAX_DATASET, MAX_SEED, SEED_RANGE, VALIDATION_BASE
from discriminative.settings import Stage, parse_interval, parse_stages

# Cards that --memory names; what it comes to is told in memory.py.
MEMORY = ("8gb", "12gb", "16gb", "24gb", "max")


def option(default, help_text: str, choices: tuple | None = None, parse=None):
    """A field of :class:`RunConfig` with its help line and, where it has them, its allowed values and a parser of its own."""
    return field(default=default, metadata={"help": help_text, "choices": choices, "parse": parse})


def number_or_name(text: str) -> int | str:
    """A class as the user gives it: "283" is a number, "tiger cat" a name."""
    return int(text) if re.fullmatch(r"[+-]?\d+", text.strip()) else text


@dataclass(frozen=True)
class RunConfig:
    """The options of one run; field names are the flags."""

    # What to do.
    class_index: int | str | None = option(
        None,
        "class to learn or to use: number, from 1 as in the paper (283: ImageNet's tiger cat), or name; several as in 283,285-287, or all "
        "(without --train True those that have a token): of these what was learned with the same options is not learned again; required",
        parse=number_or_name,
    )
    train: bool = option(False, "learn the class token and save it")
    evaluate: bool = option(False, "evaluate the token: the same unseen seeds with and without it")
    prompt: str | None = option(
        None,
        "generate images for this prompt; {token} and {class} are filled in, {token:283} is the token of another class",
    )
    prompts_file: str | None = option(
        None, "generate images for each line of this text file, filled in as --prompt"
    )
    num_images: int = option(4, "images to generate for each prompt")
    export_dataset: int = option(
        0,
        "bring the class's folder in <output_path>/dataset to this many images, with metadata.jsonl; 0: none",
    )
    keep: str = option(
        "all",
        "images that --export_dataset keeps: all, or those that the guide takes for the class",
        ("all", "correct"),
    )
    report: bool = option(False, "write <output_path>/report.html, of all classes evaluated there")
    report_to: str = option(
        "none",
        "where the training's figures and images go too: none, tensorboard or wandb",
        ("none", "tensorboard", "wandb"),
    )
    list_classes: bool = option(
        False, "print the classifier's classes (number, label, name in the prompts), and stop"
    )
    dry_run: bool = option(False, "print the resolved configuration and the plan, and stop")

    # Models.
    model: str = option(
        "sd1.4", "sd1.4, sd1.5, sd2.1-base, miniature, a hub id, or a local folder in the diffusers layout"
    )
    revision: str | None = option(None, "branch, tag or commit of the model on the hub")
    scheduler: str | None = option(
        None,
        "scheduler of the images that are evaluated and shown, with the model's configuration; default: the model's own; training's is "
        "--training_scheduler",
        ("pndm", "ddim", "euler", "dpmsolver++"),
    )
    classifier: str | None = option(
        None,
        "classifier that guides, or several with commas: inet, cub, inat, miniature, timm:<name>, timm:<name>@<file>, hf:<id or folder>, "
        "vit-mae:<id or folder>, python:<module>:<function>; default: the one that the model brings, else inet",
    )
    judge: str | None = option(
        None,
        "classifier that only evaluates, named as those; 'none' turns it off; default: the first guide's own judge, where that does not "
        "guide too",
    )
    cache_dir: str | None = option(
        None, "folder for what is fetched from the hub; default: the hub's usual cache"
    )
    local_files_only: bool = option(False, "ask no network: take what was fetched before")
    device: str = option("auto", "auto (CUDA if there is one), cpu, cuda or cuda:N")
    mixed_precision: str = option(
        "auto",
        "precision of UNet, VAE and classifier: auto is fp16 on CUDA; float32 on a CPU, but bf16 for what training computes without "
        "gradient, if the processor has units for it",
        ("auto", "no", "fp16", "bf16"),
    )
    memory: str = option(
        "auto",
        "what fits on a card of that size (images at once, checkpointing); auto: the memory of the device; --dry_run True prints it",
        ("auto", *MEMORY),
    )
    batch_size: int | None = option(
        None,
        "images that go through the UNet at once with gradient; default: all of an update; halved where memory runs out",
    )
    decode_batch_size: int | None = option(
        None,
        "images that go through the VAE's decoder at once, with gradient also through the classifier; default: from --memory",
    )
    eval_batch_size: int | None = option(
        None,
        "images that go through the UNet at once without gradient (validation, evaluation, --prompt); default: from --memory",
    )
    gradient_checkpointing: bool | None = option(
        None,
        "keep no activations of UNet and VAE but compute them again: less memory, more time; default: from --memory",
    )
    tiny_vae: str | None = option(
        None,
        "decode with this AutoencoderTiny in training (taesd, a hub id or a folder): less memory and time; evaluation has the VAE",
    )
    compile: bool = option(
        False,
        "compile UNet and VAE decoder (torch.compile): minutes at the start, less time an update on a GPU",
    )

    # The class token and its prompts.
    placeholder_token: str = option("newclas", "the new word; must not be one of the vocabulary")
    num_vectors: int = option(1, "vectors of the token; in prompts the one word stands for all of them")
    initializer_token: str = option(
        "a", "the word in the token's place without it: the baseline's, and a start; one token"
    )
    start: str = option(
        "class+vocabulary;class",
        "where the vector starts: class (mean of the class name's words), vocabulary (mean of all words), initializer, a word of one's "
        "own, or the mean of several (cat+pet); with semicolons: others, tried in order where one brings nothing",
    )
    prompt_name: str | None = option(
        None, "class name in the prompts; default: the label's first synonym, lower case"
    )
    num_templates: int = option(3, "prompts to train on: the first N of the templates (1 to 3)")

    # Sampling.
    num_inference_steps: int = option(
        30,
        "denoising steps of the images that are evaluated and shown, asked of their scheduler; training's are --training_steps",
    )
    guidance_scale: float = option(7.0, "weight of classifier-free guidance; 1 turns it off")
    guidance_interval: str = option(
        "0,1",
        "guidance from the first to the second of these places on the trajectory (0 the first step, 1 the last) and none outside",
    )
    training_scheduler: str = option(
        "dpmsolver++",
        "scheduler of the images that training draws, for updates and validation; same: the evaluation's",
        ("same", "pndm", "ddim", "euler", "dpmsolver++"),
    )
    training_steps: int = option(
        12, "denoising steps of the images that training draws; 0: as many as the evaluation"
    )
    height: int | None = option(None, "image height in pixels; default: the model's own")
    width: int | None = option(None, "image width in pixels; default: the model's own")

    # The gradient.
    gradient_mode: str = option(
        "jump",
        "jump: predict the clean image at chosen steps; skip: the finished image, straight to chosen steps; last: through the last steps; "
        "random: through up to that many; lv: the last step with several noises",
        ("jump", "skip", "last", "random", "lv"),
    )
    gradient_steps: int = option(
        1, "last: denoising steps with gradient, from the end; random: the most of them; lv: number of noises"
    )
    jump_at: str = option(
        "0@8;0.07@15;1@12",
        "jump, skip: where on the trajectory (0 the first step, 1 the last): 0.13; several together: 0.1,0.5,0.9; one in a range, drawn "
        "anew every update: 0.05-0.3; 0@8 on a trajectory of 8 steps; with semicolons: stages, one after the other",
    )
    attempt_patience: int = option(
        20,
        "updates without a better token (in the first stage, a clearly better one) after which the next stage is tried, or learning begins "
        "again from the next start; twice as many in the last of several stages",
    )
    normalize_steps: bool = option(
        False, "with several steps divide the gradient of each by its norm before they are added"
    )

    # The optimiser (AdamW over one vector).
    learning_rate: float | None = option(
        None,
        "step size of AdamW for each image of an update: with 5 images it steps with 5 times this; default: from --relative_rate",
    )
    relative_rate: float = option(
        0.05,
        "the step size for each image of an update over the root mean square of a word's embedding, where --learning_rate is not given",
    )
    fine_rate: float = option(
        0.4,
        "the step size is multiplied with this once the token is nearly right on the validation seeds; not with --choose_by loss",
    )
    adam_beta1: float = option(0.9, "decay of AdamW's first moment")
    adam_beta2: float = option(0.999, "decay of AdamW's second moment")
    adam_epsilon: float = option(1e-8, "added to AdamW's denominator")
    weight_decay: float = option(
        1e-2, "AdamW's decay of the token's vector, per update and learning rate; 0 turns it off"
    )
    max_grad_norm: float = option(1.0, "the gradient is clipped to this norm; 0 turns it off")
    max_token_norm: float = option(
        2.2,
        "the token is kept no longer than this many words' norms (the 0.9 quantile over the vocabulary); 0 turns it off",
    )
    token_ema: float = option(
        0.0,
        "share of the old in the running average of the token over updates, which is validated and kept; 0: no average; only with "
        "--choose_by validation",
    )
    images_per_update: int = option(5, "images whose mean loss makes one update; one update is one epoch")
    seed: int = option(
        35,
        "of training's noise; on a CPU, with as many threads and images at once, the same seed gives the same token; --prompt draws with "
        "seed, seed + 1, ...",
    )
    reuse_trajectory: int = option(
        1,
        "updates in a row that share their noises and prompts, and the steps before the first one with gradient, walked once",
    )
    noise_pool: int = option(
        0,
        "the same noises come back after this many updates (times --reuse_trajectory); 1: the same every time; 0: always new ones",
    )
    augment: bool = option(
        False, "crop, mirror, blur and disturb each image a little before the guide sees it in training"
    )

    # Stopping, and which token is kept.
    max_epochs: int = option(300, "updates at most, over all attempts")
    patience: int = option(0, "stop after this many updates without a better token; 0 turns it off")
    stop_train_accuracy: float = option(
        1.0, "stop once a larger share of an update's images is right; 1 turns it off"
    )
    stop_validation_accuracy: float = option(
        0.96, "stop once this share of the validation images counts as right; 0 turns it off"
    )
    enough_validation_accuracy: float = option(
        0.95,
        "stop rather than begin again from another start once the best token has this accuracy; 0 always begins again",
    )
    choose_by: str = option(
        "validation",
        "token to keep: best on the validation seeds; or lowest epoch loss, then without validation, further stages and starts",
        ("validation", "loss"),
    )
    validation_size: int = option(
        12, "seeds of the validation, fully sampled without gradient; used with --choose_by validation"
    )
    confirm_size: int = option(
        36, "further validation seeds, drawn as long as the token can still end the training; all drawn count"
    )
    confirm_best: bool = option(
        True, "draw the whole validation of a token above .9 that would be the best of its start"
    )
    validation_guidance_end: float = option(
        1.0, "a validation's images are drawn without guidance from this place on; 1: with it to the end"
    )
    validation_certainty: float = option(
        0.7,
        "a right image of a validation counts where the guide's probability of the class is at least this share of the median of those "
        "that are right; 0: wherever it is right",
    )
    validate_every: int = option(10, "updates between two validations")

    # Evaluation and outputs.
    test_size: int = option(10, "seeds of the evaluation, each drawn with and without the token")
    eval_prompts: str | None = option(
        None,
        "text file of further prompts to evaluate, one a line, with {token} and {class} in them; lines that begin with # are left out",
    )
    reference_images: str | None = option(
        None,
        "folder of real images of the class; the evaluation then tells Fréchet and kernel distance to them, in the judge's features",
    )
    clip_model: str | None = option(
        None,
        "hub id or folder of a CLIP model; the evaluation then tells how alike images and plain prompt are",
    )
    train_images_every: int = option(
        1, "updates between two whose images are kept in train/; 0 keeps those of validations alone"
    )
    output_path: str = option("results", "folder for tokens, records and images")
    exp_id: str = option(
        "default", "name of the experiment, a folder below the class; a preset gives its own"
    )
    token_path: str | None = option(
        None,
        "token file to evaluate or to draw with, from anywhere; default: the one learned under output_path",
    )
    export: str | None = option(
        None, "a1111: write the token once more as the web UIs read it (AUTOMATIC1111, ComfyUI)", ("a1111",)
    )
    save_as_full_pipeline: bool = option(
        False, "also write the whole pipeline with the token in it: gigabytes, not kilobytes"
    )

    @property
    def betas(self) -> tuple[float, float]:
        """AdamW's two decays."""
        return self.adam_beta1, self.adam_beta2

    def update_learning_rate(self, word_rms: float) -> float:
        """AdamW's step size: it follows the number of images of an update, as in the paper; ``word_rms`` is that of a word's embedding."""
        rate = self.relative_rate * word_rms if self.learning_rate is None else self.learning_rate
        return rate * self.images_per_update

    @property
    def training_sampler(self) -> tuple[str | None, int]:
        """Scheduler (None: the evaluation's) and denoising steps of the images that training draws."""
        scheduler = None if self.training_scheduler == "same" else self.training_scheduler
        return scheduler, self.training_steps or self.num_inference_steps

    @property
    def trains_with_tiny_vae(self) -> bool:
        """Whether a small decoder is needed; an evaluation, which has the VAE, takes less memory than an update with either."""
        return self.train and self.tiny_vae is not None

    @property
    def stages(self) -> list[Stage]:
        """The stages of learning; modes without places have one."""
        return parse_stages(self.jump_at) if self.gradient_mode in ("jump", "skip") else [Stage(())]

    @property
    def starts(self) -> list[str]:
        """The starts in the order in which they are tried."""
        return [s.strip() for s in self.start.split(";")]


# One row a preset. "paper" is the official code's configuration: AdamW lr 0.00025 per image of an update, five noises that
# come back every epoch, the gradient of the last step, the token with the lowest epoch loss.
PRESETS = {
    "default": {},
    "paper": {
        "gradient_mode": "last",
        "gradient_steps": 1,
        "learning_rate": 0.00025,
        "start": "initializer",
        "max_token_norm": 0.0,
        "noise_pool": 1,
        "training_scheduler": "same",
        "training_steps": 0,
        "choose_by": "loss",
        "patience": 15,
        "stop_train_accuracy": 0.7,
        "max_epochs": 50,
        "exp_id": "paper",
    },
}


# Options that say how much memory and time are taken; they change a result by rounding only.
MEMORY_OPTIONS = (
    "memory",
    "batch_size",
    "decode_batch_size",
    "eval_batch_size",
    "gradient_checkpointing",
    "compile",
)

# Options that are no hyperparameters of a token: what to do, and where things are.
NO_HYPERPARAMETERS = {
    *(
        "class_index",
        "train",
        "evaluate",
        "prompt",
        "prompts_file",
        "num_images",
        "export_dataset",
        "keep",
        "report",
        "report_to",
    ),
    *("list_classes", "dry_run", "test_size", "eval_prompts", "reference_images", "clip_model"),
    *MEMORY_OPTIONS,
    *(
        "model",
        "revision",
        "classifier",
        "judge",
        "cache_dir",
        "local_files_only",
        "device",
        "placeholder_token",
        "prompt_name",
    ),
    *("output_path", "exp_id", "token_path", "export", "save_as_full_pipeline", "train_images_every"),
}


def with_preset(preset: str, given: dict) -> RunConfig:
    """The defaults, then the preset's values, then what the user gave (``given``: field name -> value)."""
    return replace(RunConfig(), **(PRESETS[preset] | given))


def _need(holds: bool, flag: str, given, allowed: str) -> None:
    if not holds:
        raise UsageError(f"--{flag}: {given!r} was given; allowed is {allowed}")


POSITIVE = (
    "images_per_update",
    "batch_size",
    "decode_batch_size",
    "eval_batch_size",
    "reuse_trajectory",
    "max_epochs",
    "validate_every",
    "test_size",
    "num_images",
    "num_inference_steps",
    "gradient_steps",
    "num_vectors",
    "attempt_patience",
)
NOT_NEGATIVE = (
    *("training_steps", "patience", "noise_pool", "confirm_size", "export_dataset", "train_images_every"),
    *("weight_decay", "max_grad_norm", "max_token_norm", "guidance_scale"),
)
SHARES = (
    *("stop_train_accuracy", "stop_validation_accuracy", "enough_validation_accuracy"),
    *("validation_certainty", "validation_guidance_end"),
)


def validate(config: RunConfig) -> None:
    """Check everything that can be told without loading a weight.

    Raises:
        UsageError: names the flag, what was given and what is allowed.
    """
    for f in fields(config):
        value, choices = getattr(config, f.name), f.metadata["choices"]
        _need(choices is None or value is None or value in choices, f.name, value, " or ".join(choices or ()))
        _need(not isinstance(value, float) or math.isfinite(value), f.name, value, "a finite number")
    exports = config.export or config.save_as_full_pipeline
    draws = config.prompt or config.prompts_file or config.export_dataset
    is_of_a_class = config.train or config.evaluate or draws or exports
    if not (is_of_a_class or config.list_classes or config.report):
        raise UsageError(
            'nothing to do: add --train True, --evaluate True, both, or --prompt "a photo of {token} {class}"'
        )
    if is_of_a_class and config.class_index is None:
        raise UsageError(
            "--class_index is required: a class's number or name, several, or all; --list_classes True lists them"
        )
    _check_together(config)
    for name in POSITIVE:
        value = getattr(config, name)
        _need(value is None or value >= 1, name, value, "1 or more")
    for name in NOT_NEGATIVE:
        _need(getattr(config, name) >= 0, name, getattr(config, name), "0 or more")
    for name in SHARES:
        _need(0 <= getattr(config, name) <= 1, name, getattr(config, name), "0 to 1")
    _check_places(config)
    for name in ("height", "width"):
        value = getattr(config, name)
        _need(value is None or value >= 8, name, value, "8 or more")
    for name in ("adam_beta1", "adam_beta2", "token_ema"):
        _need(0 <= getattr(config, name) < 1, name, getattr(config, name), "0 or more, below 1")
    for name in ("adam_epsilon", "learning_rate", "relative_rate", "fine_rate"):
        value = getattr(config, name)
        _need(value is None or value > 0, name, value, "above 0")
    for start in config.starts:
        allowed = "class, vocabulary, initializer, a word, or several as in cat+pet"
        _need(re.fullmatch(r"\w+(\+\w+)*", start) is not None, "start", config.start, allowed)
    _need(config.num_vectors <= 32, "num_vectors", config.num_vectors, "1 to 32")
    _need(1 <= config.num_templates <= 3, "num_templates", config.num_templates, "1 to 3")
    _need(0 <= config.seed <= MAX_SEED, "seed", config.seed, f"0 to {MAX_SEED}")
    _need(
        config.export_dataset <= MAX_DATASET,
        "export_dataset",
        config.export_dataset,
        f"at most {MAX_DATASET}",
    )
    for name in ("test_size", "validation_size", "confirm_size"):
        _need(
            getattr(config, name) <= VALIDATION_BASE,
            name,
            getattr(config, name),
            f"at most {VALIDATION_BASE}",
        )
    _need(
        config.max_epochs * config.images_per_update <= SEED_RANGE,
        "max_epochs",
        config.max_epochs,
        f"at most {SEED_RANGE} images in all",
    )
    _need(
        config.choose_by != "validation" or config.validation_size >= 1,
        "validation_size",
        config.validation_size,
        "1 or more with --choose_by validation",
    )
    _need(
        re.fullmatch(r"[a-z0-9_]+", config.placeholder_token) is not None,
        "placeholder_token",
        config.placeholder_token,
        "lower-case letters, digits and _",
    )
    _need(
        re.fullmatch(r"\w[\w.-]{0,99}", config.exp_id) is not None,
        "exp_id",
        config.exp_id,
        "a short folder name of letters, digits, . _ and -",
    )
    _need(
        config.exp_id not in NO_EXP_IDS, "exp_id", config.exp_id, f"another name than {', '.join(NO_EXP_IDS)}"
    )
    _need(
        re.fullmatch(r"auto|cpu|cuda(:\d+)?", config.device) is not None,
        "device",
        config.device,
        "auto, cpu, cuda or cuda:N",
    )
    _check_writable(config.output_path)


def _check_together(config: RunConfig) -> None:
    """Options that do nothing without another one, or are at odds with it."""
    for name in ("eval_prompts", "reference_images", "clip_model"):
        value = getattr(config, name)
        _need(config.evaluate or not value, name, value, "a value only with --evaluate True")
    _need(
        config.train or config.report_to == "none", "report_to", config.report_to, "none without --train True"
    )
    _need(
        config.report_to == "none" or importlib.util.find_spec(config.report_to) is not None,
        "report_to",
        config.report_to,
        f"an installed package: pip install {config.report_to}",
    )
    _need(
        config.choose_by == "validation" or not config.token_ema,
        "token_ema",
        config.token_ema,
        "0 with --choose_by loss",
    )
    _need(
        not (config.train and config.token_path),
        "token_path",
        config.token_path,
        "a file only without --train True",
    )


def _check_places(config: RunConfig) -> None:
    """Options that name places on a trajectory."""
    try:
        parse_stages(config.jump_at)
    except ValueError:
        allowed = "a number from 0 to 1, several with commas, a range such as 0.05-0.3, each with @8 for 8 steps, stages with semicolons"
        raise UsageError(f"--jump_at: {config.jump_at!r} was given; allowed is {allowed}") from None
    try:
        parse_interval(config.guidance_interval)
    except ValueError:
        raise UsageError(
            f"--guidance_interval: {config.guidance_interval!r} was given; allowed are two numbers from 0 to 1, as in 0.1,0.8"
        ) from None


def _check_writable(output_path: str) -> None:
    try:
        path = Path(output_path).absolute()
        existing = next(p for p in (path, *path.parents) if p.exists())
    except OSError as error:
        raise UsageError(
            f"--output_path: {output_path!r} was given, which cannot be reached ({error.strerror})"
        ) from error
    if not existing.is_dir():
        raise UsageError(
            f"--output_path: {output_path!r} was given, but {existing} is a file; allowed is a folder that can be written"
        )
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UsageError(
            f"--output_path: {output_path!r} was given, but {existing} cannot be written; allowed is a folder that can be"
        )
