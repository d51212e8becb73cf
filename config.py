"""Every option of a run, once: its default, its unit, what turns it off, its limits, and what it decides.

The defaults are this project's own choice (docs/method.md says why); ``--preset paper`` sets the
hyperparameters of the official code of Discriminative Class Tokens (ICCV 2023, arXiv 2303.17155).
"""

import importlib.util
import math
import os
import re
from collections.abc import Callable
from dataclasses import Field, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from discriminative import settings as library
from discriminative.command_line import at_least
from discriminative.errors import UsageError
from discriminative.records.layout import NO_EXP_IDS
from discriminative.seeds import MAX_DATASET, MAX_SEED, SEED_RANGE, VALIDATION_BASE

# cards that --memory names; diffusion/memory.py has what they mean
MEMORY = ("8gb", "12gb", "16gb", "24gb", "max")


def number_or_name(text: str) -> int | str:
    """A class as the user gives it: "283" is a number, "tiger cat" a name."""
    return int(text) if re.fullmatch(r"[+-]?\d+", text.strip()) else text


def readable(parse: Callable[[str], Any]) -> Callable[[str], bool]:
    """Whether ``parse`` takes a text."""

    def check(text: str) -> bool:
        try:
            parse(text)
        except ValueError:
            return False
        return True

    return check


def matching(pattern: str) -> Callable[[str], bool]:
    """Whether all of a text matches the pattern."""
    return lambda text: re.fullmatch(pattern, text) is not None


def option(
    default,
    help_text: str,
    *,
    heading: str = "",
    decides: str = "",
    more: bool = False,
    choices: tuple | None = None,
    parse: Callable[[str], Any] | None = None,
    check: Callable[[Any], bool] | None = None,
    allowed: str = "",
) -> Any:
    """A field of :class:`RunConfig`.

    Args:
        heading: of the group that begins with this option.
        decides: which of "token", "evaluation" and "dataset" are other ones where this option is another;
            "drawing": a token is drawn otherwise than it was learned, which is printed.
        more: shown by ``--help all`` only.
        choices: the allowed values.
        parse: from the command line's text; default: the field's type.
        check: whether a value that is not None is allowed.
        allowed: what is allowed, for the error.
    """
    metadata = {"help": help_text, "heading": heading, "decides": decides.split(), "more": more}
    metadata |= {"choices": choices, "parse": parse, "check": check, "allowed": allowed}
    return field(default=default, metadata=metadata)


SHARE = {"check": lambda value: 0 <= value <= 1, "allowed": "0 to 1"}
UP_TO_1 = {"check": lambda value: 0 < value <= 1, "allowed": "above 0, at most 1"}
ALL = "token evaluation dataset"


@dataclass(frozen=True)
class RunConfig:
    """The options of one run; field names are the flags."""

    class_index: int | str | None = option(
        None,
        "class to learn or to use, required: its number, from 1 as in the paper (283: ImageNet's tiger "
        "cat), or its name; several as in 283,285-287, all, or @file (numbers, ranges or names, one a line): "
        "what is done already is left out, and several processes share the classes",
        heading="What to do",
        decides="token",
        parse=number_or_name,
    )
    train: bool = option(False, "learn the class token and save it")
    evaluate: bool = option(False, "evaluate the token: the same unseen seeds with and without it")
    prompt: str | None = option(
        None,
        "generate images for this prompt, or for each line of a text file with @file, a folder each; "
        "{token} and {class} are filled in, {token:283} is the token of another class",
    )
    num_images: int = option(4, "images to generate for each prompt", **at_least(1, MAX_DATASET))
    export_dataset: int = option(
        0,
        "bring the class's folder in <output_path>/dataset to this many images, with metadata.jsonl; 0: none",
        **at_least(0, MAX_DATASET),
    )
    keep: str = option(
        "all",
        "images that --export_dataset keeps: all, or those that the guide gives to the class",
        decides="dataset",
        choices=("all", "correct"),
    )
    insight: str | None = option(
        None,
        "text file of phrases, one a line, such as on a blue background: --clip_model scores them on the "
        "evaluation's pictures, and the report shows which of them the token adds",
    )
    report: bool = option(False, "write <output_path>/report.html, of all classes evaluated there")
    list_classes: bool = option(
        False,
        "print the classifier's classes (number, label, name in prompts), and stop; with --class_index "
        "those that it names or is a part of",
    )
    dry_run: bool = option(False, "print the resolved configuration and the plan, and stop")

    model: str = option(
        "sd1.4",
        "sd1.4, sd1.5, sd2.1-base, miniature, a hub id (owner/name, owner/name@revision), or a folder in "
        "the diffusers "
        "layout",
        heading="Models",
        decides=ALL,
    )
    classifier: str | None = option(
        None,
        "classifier that guides, or several with commas: inet, cub, inat, miniature, timm:<name>, "
        "timm:<name>@<file>, hf:<id or folder>, vit-mae:<id or folder>, python:<module>:<function>; "
        "default: the one "
        "that the model brings, else inet",
        decides=ALL,
    )
    judge: str | None = option(
        None,
        "classifier that only evaluates, named as those; none turns it off; default: the first guide's "
        "own judge, if "
        "that does not guide too",
        decides="evaluation dataset",
    )
    device: str = option(
        "auto",
        "auto (CUDA if there is one), cpu, cuda or cuda:N",
        check=matching(r"auto|cpu|cuda(:\d+)?"),
        allowed="auto, cpu, cuda or cuda:N",
    )
    mixed_precision: str = option(
        "auto",
        "precision of UNet, VAE and classifier; auto: fp16 on CUDA, float32 on a CPU, where training "
        "computes in bf16 "
        "what needs no gradient if the processor has units for it",
        decides=ALL,
        choices=("auto", "no", "fp16", "bf16"),
    )
    memory: str = option(
        "auto",
        "what fits on a card of that size; auto: the memory of the device; --dry_run prints what it means",
        choices=("auto", *MEMORY),
    )
    decode_batch_size: int | None = option(
        None,
        "images through the VAE's decoder at once, with gradient also through the classifier; default: "
        "from --memory",
        more=True,
        **at_least(1),
    )
    eval_batch_size: int | None = option(
        None,
        "images through the UNet at once without gradient (validation, evaluation, --prompt); default: "
        "from --memory",
        more=True,
        **at_least(1),
    )
    gradient_checkpointing: bool | None = option(
        None,
        "compute activations of UNet and VAE again rather than keep them: less memory, more time; "
        "default: from "
        "--memory",
        more=True,
    )
    tiny_vae: str | None = option(
        None,
        "decode with this AutoencoderTiny in training (taesd, a hub id or a folder): less memory and "
        "time; evaluation "
        "has the VAE",
        more=True,
        decides="token",
    )
    compile: bool = option(
        False,
        "compile UNet and VAE decoder (torch.compile): minutes at the start, less time an update on a GPU",
        more=True,
    )

    classes_per_batch: int = option(
        1,
        "of several classes, learn this many side by side in one batch, which fills a large GPU",
        more=True,
        **at_least(1, 64),
    )

    placeholder_token: str = option(
        "newclas",
        "the new word; must not be one of the vocabulary",
        heading="The class token and its prompts",
        more=True,
        decides=ALL,
        check=matching(r"[a-z0-9_]+"),
        allowed="lower-case letters, digits and _",
    )
    num_vectors: int = option(
        1,
        "vectors of the token; in prompts the one word stands for all of them",
        decides="token",
        **at_least(1, 32),
    )
    initializer_token: str = option(
        "a",
        "the word in the token's place without it: the baseline's, and a start; one token",
        more=True,
        decides="token evaluation drawing",
    )
    start: str = option(
        "class+vocabulary;class",
        "where the vector starts: class (mean of the class name's words), vocabulary (mean of all words), "
        "initializer, "
        "a word, or the mean of several (cat+pet); with semicolons: others, tried in order where one does "
        "not help",
        more=True,
        decides="token",
        check=matching(r"\s*\w+(\+\w+)*\s*(;\s*\w+(\+\w+)*\s*)*"),
        allowed="class, vocabulary, initializer, a word, or several as in cat+pet",
    )
    prompt_name: str | None = option(
        None,
        "class name in the prompts; default: the label's first synonym, lower case",
        decides=ALL + " drawing",
        check=lambda name: not set("{}") & set(name),
        allowed="a name without braces",
    )

    num_inference_steps: int = option(
        30,
        "denoising steps of the images that are evaluated and shown",
        heading="Sampling",
        decides=ALL + " drawing",
        **at_least(1),
    )
    guidance_scale: float = option(
        7.0,
        "weight of classifier-free guidance; 1 or less turns it off",
        decides=ALL + " drawing",
        **at_least(0),
    )
    scheduler: str | None = option(
        None,
        "scheduler of the images that are evaluated and shown; default: the model's own",
        decides=ALL + " drawing",
        choices=library.SAMPLERS,
    )
    training_sampler: str = option(
        "dpmsolver++@12",
        "scheduler and denoising steps of the images that training samples; same: the evaluation's",
        decides="token",
        check=readable(library.parse_sampler),
        allowed=f"same, {', '.join(library.SAMPLERS)}, each also with its steps, as in ddim@20",
    )
    height: int | None = option(
        None, "image height in pixels; default: the model's own", decides=ALL + " drawing", **at_least(8)
    )
    width: int | None = option(
        None, "image width in pixels; default: the model's own", decides=ALL + " drawing", **at_least(8)
    )
    seed: int = option(
        35,
        "of training's noise: on a CPU the same seed gives the same token; --prompt samples with seed, "
        "seed + 1, ...",
        decides="token",
        **at_least(0, MAX_SEED),
    )

    gradient_mode: str = option(
        "jump",
        "jump: predict the clean image at the steps of --jump_at; skip: the finished image, straight to "
        "those steps; "
        "last, last:K: through the last K steps; random:K: through up to K; lv:K: the last step with K "
        "noises",
        heading="Learning",
        decides="token",
        check=readable(library.parse_gradient_mode),
        allowed="jump, skip, last, random or lv, the last three also with a number, as in last:5",
    )
    jump_at: str = option(
        "0@8;0.07@15;1@12",
        "jump, skip: where on the trajectory (0 the first step, 1 the last), 0@8 on one of 8 steps; with "
        "semicolons: "
        "stages, one after the other",
        more=True,
        decides="token",
        check=readable(library.parse_stages),
        allowed="a number from 0 to 1, also with @8 for 8 steps, stages with semicolons between them",
    )
    learning_rate: float | None = option(
        None,
        "AdamW's step size for each image of an update; default: 0.05 of a word embedding's root mean square",
        decides="token",
        **UP_TO_1,
    )
    images_per_update: int = option(
        5,
        "images whose mean loss makes one update; one update is one epoch",
        decides="token",
        **at_least(1),
    )
    max_epochs: int = option(300, "updates at most, over all attempts", decides="token", **at_least(1))
    augment: bool = option(
        False,
        "crop, mirror, blur and disturb each image a little before the guide sees it in training",
        decides="token",
    )
    weight_decay: float = option(
        1e-2,
        "AdamW's decay of the token's vector, per update and step size; 0 turns it off",
        more=True,
        decides="token",
        **at_least(0),
    )
    max_grad_norm: float = option(
        1.0,
        "the gradient is clipped to this norm; 0 turns it off",
        more=True,
        decides="token",
        **at_least(0),
    )
    max_token_norm: float = option(
        2.2,
        "the token is kept no longer than this many words' norms (the 0.9 quantile over the vocabulary); "
        "0 turns it off",
        more=True,
        decides="token",
        **at_least(0),
    )
    noise_pool: int = option(
        0,
        "the same noises come back after this many updates; 1: the same every time; 0: always new ones",
        more=True,
        decides="token",
        **at_least(0),
    )
    choose_by: str = option(
        "validation",
        "token to keep: best on the validation seeds; or lowest epoch loss, then without validation, "
        "further stages "
        "and starts",
        more=True,
        decides="token",
        choices=("validation", "loss"),
    )
    stop_validation_accuracy: float = option(
        0.96,
        "stop once this share of the validation images counts as right; 0 turns it off",
        decides="token",
        **SHARE,
    )
    validate_every: int = option(
        10, "updates between two validations", more=True, decides="token", **at_least(1)
    )
    patience: int = option(
        0,
        "stop after this many updates without a better token; 0 turns it off",
        more=True,
        decides="token",
        **at_least(0),
    )
    stop_train_accuracy: float = option(
        1.0,
        "stop once a larger share of an update's images is right; 1 turns it off",
        more=True,
        decides="token",
        **SHARE,
    )

    test_size: int = option(
        10,
        "seeds of the evaluation, each sampled with and without the token",
        heading="Evaluation",
        decides="evaluation",
        **at_least(1, VALIDATION_BASE),
    )
    eval_prompts: str | None = option(
        None,
        "text file of further prompts to evaluate, one a line, with {token} and {class} in them; lines "
        "that begin "
        "with # are left out",
        decides="evaluation",
    )
    reference_images: str | None = option(
        None,
        "folder of real images of the class, to which the evaluation measures Fréchet and kernel "
        "distance, in the "
        "judge's features",
        decides="evaluation",
    )
    clip_model: str | None = option(
        None,
        "hub id or folder of a CLIP model; the evaluation then measures how alike images and plain prompt "
        "are, and --insight scores its phrases; there also python:<module>:<function>",
        decides="evaluation",
    )

    eval_precision: str | None = option(
        None,
        "sample the evaluation in it, with models in float32: bf16 on a CPU that has units for it, bf16 or "
        "fp16 on a GPU; it says what that does to verdicts; default: the models' own, the stock pipeline's "
        "images",
        more=True,
        decides="evaluation",
        choices=("bf16", "fp16"),
    )

    output_path: str = option("results", "folder for tokens, records and images", heading="Outputs")
    exp_id: str = option(
        "default",
        "name of the experiment, a folder below the class; a preset gives its own",
        check=lambda name: re.fullmatch(r"\w[\w.-]{0,99}", name) is not None and name not in NO_EXP_IDS,
        allowed=f"a short folder name of letters, digits, . _ and -, other than {', '.join(NO_EXP_IDS)}",
    )
    checkpoint_seconds: float = option(
        30.0,
        "seconds between two writings of a training's state, from which the same command goes on where it "
        "was killed; 0: after every update",
        more=True,
        **at_least(0),
    )
    token_path: str | None = option(
        None,
        "token file to evaluate or to generate with, from anywhere; default: the one learned under "
        "--output_path",
        decides="evaluation",
    )
    export: str | None = option(
        None,
        "a1111: the token as the web UIs read it (AUTOMATIC1111, ComfyUI); pipeline: the whole pipeline "
        "with the token "
        "in it, gigabytes; or both with a comma",
        check=matching(r"(a1111|pipeline)(,(a1111|pipeline))*"),
        allowed="a1111, pipeline or both with a comma",
    )
    report_to: str = option(
        "none",
        "where the training's figures and images go too",
        choices=("none", "tensorboard", "wandb"),
    )

    submit: str | None = option(
        None,
        "hand the run to a cluster by submitit: slurm; or to processes of this machine: local, or debug in "
        "this one; --dry_run prints Slurm's script",
        heading="Cluster",
        choices=("slurm", "local", "debug"),
    )
    submit_jobs: int = option(
        1, "jobs that share the classes, in Slurm an array", more=True, **at_least(1, 1000)
    )
    submit_settings: str | None = option(
        None,
        "submitit's settings of a job, name=value with commas: slurm_partition=gpu,gpus_per_node=1,"
        "timeout_min=1440; a job that is preempted or out of time goes on by itself",
        more=True,
        check=matching(r"\w+=.+"),
        allowed="name=value, several with commas",
    )

    @property
    def trains_with_tiny_vae(self) -> bool:
        """Whether a small decoder is needed; an evaluation, which has the VAE, takes less memory than an
        update."""
        return self.train and self.tiny_vae is not None

    @property
    def clip_name(self) -> str | None:
        """The CLIP model; one's own function for ``--insight`` is none."""
        return None if (self.clip_model or "").startswith("python:") else self.clip_model

    @property
    def exports(self) -> list[str]:
        """The formats of ``--export``."""
        return self.export.split(",") if self.export else []

    @property
    def sampler(self) -> library.SamplerSettings:
        """How images are evaluated and shown."""
        return library.SamplerSettings(
            self.num_inference_steps,
            self.guidance_scale,
            self.height,
            self.width,
            decode_batch_size=self.decode_batch_size,
        )

    @property
    def training_steps(self) -> int:
        """Denoising steps of the images that training samples."""
        return library.parse_sampler(self.training_sampler)[1] or self.num_inference_steps

    @property
    def training_scheduler(self) -> str | None:
        """Their scheduler; None is the evaluation's."""
        return library.parse_sampler(self.training_sampler)[0]

    @property
    def path(self) -> library.GradientPath:
        """The gradient's mode."""
        return library.parse_gradient_mode(self.gradient_mode)

    @property
    def stages(self) -> tuple[library.Stage, ...]:
        """The stages of learning; modes without places have one."""
        return (
            library.parse_stages(self.jump_at)
            if self.path.mode in library.WITH_PLACES
            else (library.Stage(),)
        )

    def learning(self, **constants) -> library.LearningSettings:
        """What the trainer takes; ``constants`` are those of its settings that are no options.

        Raises:
            TypeError: there is no such constant.
        """
        training = replace(
            self.sampler,
            scheduler=self.training_scheduler,
            num_inference_steps=self.training_steps,
            tiny_vae=self.tiny_vae is not None,
        )
        settings = library.LearningSettings(
            sampler=training,
            stages=self.stages,
            path=self.path,
            validation=self.part(library.ValidationSettings),
            optimizer=self.part(library.OptimizerSettings),
            curriculum=self.part(library.CurriculumSettings),
            starts=tuple(start.strip() for start in self.start.split(";")),
            choose_by=self.choose_by,
            images_per_update=self.images_per_update,
            seed=self.seed,
            noise_pool=self.noise_pool,
            augment=self.augment,
            mixed_precision=self.mixed_precision,
            eval_batch_size=self.eval_batch_size,
        )
        return settings.with_constants(**constants)

    def part(self, kind: type) -> Any:
        """Settings of the library, those that are named as options taken from them."""
        options = {f.name for f in fields(self)}
        return kind(**{f.name: getattr(self, f.name) for f in fields(kind) if f.name in options})


# A row a preset; "paper" is the official code's.
PRESETS = {
    "default": {},
    "paper": {
        "gradient_mode": "last:2",  # it counts 30 of PNDM's list of 31
        "learning_rate": 0.00025,
        "start": "initializer",
        "max_token_norm": 0.0,
        "noise_pool": 1,
        "training_sampler": "same",
        "choose_by": "loss",
        "patience": 15,
        "stop_train_accuracy": 0.7,
        "max_epochs": 50,
        "exp_id": "paper",
    },
}


def with_preset(preset: str, given: dict) -> RunConfig:
    """The defaults, then the preset's values, then what the user gave (``given``: field name -> value)."""
    return replace(RunConfig(), **(PRESETS[preset] | given))


def deciding(what: str) -> tuple[str, ...]:
    """The options that decide "token", "evaluation" or "dataset", or that "drawing" takes note of."""
    return tuple(f.name for f in fields(RunConfig) if what in f.metadata["decides"])


def refuse(flag: str, given, allowed: str) -> UsageError:
    """The error of a value that is not allowed."""
    return UsageError(f"--{flag}: {given!r} was given; allowed is {allowed}")


def validate(config: RunConfig) -> None:
    """Check everything that can be told without reading a file of a model.

    Raises:
        UsageError: names the flag, what was given and what is allowed.
    """
    check_values(config)
    draws = config.prompt or config.export_dataset
    is_of_a_class = config.train or config.evaluate or draws or config.export or config.insight
    if not (is_of_a_class or config.list_classes or config.report):
        raise UsageError(
            'nothing to do: add --train True, --evaluate True, both, or --prompt "a photo of {token} {class}"'
        )
    if is_of_a_class and config.class_index is None:
        raise UsageError(
            "--class_index is required: a class's number or name, several, or all; --list_classes True "
            "lists them"
        )
    check_together(config)


def check_values(config: RunConfig) -> None:
    """Check every option by itself.

    Raises:
        UsageError: a value is not allowed, or the folder of outputs cannot be written.
    """
    for f in fields(config):
        check_value(f, getattr(config, f.name))
    check_writable(config.output_path)


def check_value(f: Field, value) -> None:
    """Check one option by its field's metadata.

    Raises:
        UsageError: the value is not allowed.
    """
    if value is None:
        return
    choices = f.metadata["choices"]
    if choices and value not in choices:
        raise refuse(f.name, value, " or ".join(choices))
    if isinstance(value, str) and not value.strip():
        raise refuse(f.name, value, "a text that is not empty; without the option it has its default")
    if isinstance(value, float) and not math.isfinite(value):
        raise refuse(f.name, value, "a finite number")
    check = f.metadata["check"]
    if check and not check(value):
        raise refuse(f.name, value, f.metadata["allowed"])


def check_together(config: RunConfig) -> None:
    """Check options that do nothing without another one, or are at odds with it.

    Raises:
        UsageError: one is.
    """
    for name in ("eval_prompts", "reference_images", "eval_precision"):
        if getattr(config, name) and not config.evaluate:
            raise refuse(name, getattr(config, name), "a value only with --evaluate True")
    check_scorer(config)
    if config.report_to != "none":
        if not config.train:
            raise refuse("report_to", config.report_to, "none without --train True")
        if importlib.util.find_spec(config.report_to) is None:
            raise refuse(
                "report_to", config.report_to, f"an installed package: pip install {config.report_to}"
            )
    if not config.submit:
        for name, off in (("submit_jobs", 1), ("submit_settings", None)):
            if getattr(config, name) != off:
                raise refuse(name, getattr(config, name), "a value only with --submit")
    if config.train and config.token_path:
        raise refuse("token_path", config.token_path, "a file only without --train True")
    if config.max_epochs * config.images_per_update > SEED_RANGE:
        raise refuse("max_epochs", config.max_epochs, f"at most {SEED_RANGE} images in all")


def check_scorer(config: RunConfig) -> None:
    """Check that ``--insight`` has something that scores, and that what is named has something to score.

    Raises:
        UsageError: it has not.
    """
    if config.insight and not config.clip_model:
        needed = "a file only with --clip_model, which scores the phrases: a hub id, a folder, or "
        raise refuse("insight", config.insight, f"{needed}python:<module>:<function>")
    if config.clip_model and not (config.evaluate or config.insight):
        raise refuse("clip_model", config.clip_model, "a value only with --evaluate True or --insight")
    if config.clip_model != config.clip_name and not config.insight:
        raise refuse("clip_model", config.clip_model, "one's own function only with --insight")


def check_writable(output_path: str) -> None:
    """Check that the folder can be written, or made.

    Raises:
        UsageError: it cannot.
    """
    given = f"--output_path: {output_path!r} was given"
    try:
        path = Path(output_path).absolute()
        existing = next(p for p in (path, *path.parents) if p.exists())
    except OSError as error:
        raise UsageError(f"{given}, which cannot be reached ({error.strerror})") from error
    if not existing.is_dir():
        raise UsageError(f"{given}, but {existing} is a file; allowed is a folder that can be written")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UsageError(f"{given}, but {existing} cannot be written; allowed is a folder that can be")
