"""Every option of ``python -m dpt``, once: its commands, its default, its limits. No torch here."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from discriminative.command_line import at_least
from discriminative.errors import UsageError
from discriminative.seeds import MAX_SEED
from discriminative.settings import SAMPLERS
from dpt.experiment.settings import PARTS, REMEDIES, ROWS, SEEDS
from dpt.settings import (
    CORRECTION_FACTOR,
    LOSSES,
    MINIATURE_CORRECTION_FACTOR,
    MINIATURE_SAMPLES,
    MINIATURE_STAGES,
    STAGES,
    StageSettings,
)

COMMANDS = {
    "probe": "stage 1: train the adapter on a frozen UNet's features",
    "tune": "stage 2: train a LoRA of the UNet, and the adapter with it",
    "generate": "images of prompts, corrected on their way or chosen by the adapter",
    "evaluate": "matching and boxes on samples that training has not seen, with a page to look at",
    "mine": "hard negatives of COCO's captions, which --data coco needs",
    "experiment": "whether tuning makes the miniature's pictures follow their text: all arms, resumable",
}
LEARN = "probe tune"
READ = "probe tune evaluate"
DRAW = "generate evaluate"
ALL = "probe tune generate evaluate mine"


def option(
    default,
    help_text: str,
    commands: str,
    *,
    heading: str = "",
    choices: tuple | None = None,
    parse: Callable[[str], Any] | None = None,
    check: Callable[[Any], bool] | None = None,
    allowed: str = "",
) -> Any:
    """A field of :class:`Options`.

    Args:
        commands: that take it.
        heading: of the group that begins with it.
        choices: the allowed values.
        parse: from the command line's text.
        check: whether a value that is not None is allowed; ``allowed`` says what is, for the error.
    """
    metadata = {"help": help_text, "commands": commands.split(), "heading": heading, "choices": choices}
    metadata |= {"parse": parse, "check": check, "allowed": allowed}
    return field(default=default, metadata=metadata)


def names_of(known) -> dict:
    """Limits of a list with commas."""
    allowed = f"one or more of {', '.join(known)}, with commas"
    return {"check": lambda text: set(text.split(",")) <= set(known), "allowed": allowed}


def matching(pattern: str, allowed: str) -> dict:
    """Limits of a text."""
    return {"check": lambda text: re.fullmatch(pattern, text) is not None, "allowed": allowed}


def _stage_default(name: str) -> str:
    told = [f"{getattr(STAGES[s], name):g} in {s}" for s in STAGES]
    told += [f"{getattr(MINIATURE_STAGES[s], name):g} in {s} with the miniature" for s in STAGES]
    return ", ".join(told)


@dataclass(frozen=True)
class Options:
    """The options of one command; field names are the flags. None is a default that the plan resolves."""

    model: str = option(
        "sd1.4",
        "sd1.4, sd1.5, sd2.1-base, miniature, a hub id (owner/name, owner/name@revision), or a folder in "
        "the diffusers layout",
        ALL,
        heading="Model and data",
    )
    data: str | None = option(
        None,
        "miniature: rendered scenes; coco: COCO with RefCOCO. Default: miniature with that model, else coco",
        READ,
        choices=("miniature", "coco"),
    )
    coco_root: str | None = option(None, "folder of COCO 2014", READ + " mine")
    refcoco_root: str | None = option(None, "folder of MDETR's annotations of RefCOCO", READ + " mine")
    negatives: str | None = option(
        None, "file of mined negatives; default: <coco_root>/dpt_negatives.json", READ + " mine"
    )
    clip_model: str | None = option(
        None, "hub id or folder of a CLIP model that mines; default: the model's own text encoder", "mine"
    )
    samples: int | None = option(
        None,
        f"scenes to train on ({MINIATURE_SAMPLES} by default, miniature only), or samples to evaluate (600)",
        READ,
        **at_least(1),
    )
    split: str = option(
        "validation",
        "which samples to evaluate (coco has no test)",
        "evaluate",
        choices=("validation", "test"),
    )

    probe: str | None = option(
        None,
        "block to read: up1, mid, bottom0, ...; some of one size as bottom1_up0; all-C-S as all-256-16; or "
        "all: every block, one after the other, with a table. Default: up1, with the miniature all-128-8",
        "probe",
        heading="Training",
    )
    text_side: str = option(
        "pipeline",
        "what boxes are aligned to: pipeline (its text encoder), or a RoBERTa's hub id or folder, such as "
        "FacebookAI/roberta-base as in the paper",
        "probe",
    )
    losses: str = option("itm,rec,mse", "parts of the loss; mse is tune's alone", LEARN, **names_of(LOSSES))
    only_train_lora: bool = option(False, "keep the adapter as it is", "tune")
    tune_text_encoder: bool = option(False, "a LoRA on the text encoder's attention, too", "tune")
    steps: int | None = option(None, f"updates; default: {_stage_default('steps')}", LEARN, **at_least(1))
    batch_size: int | None = option(
        None,
        f"samples at once on each process; default: {_stage_default('batch_size')}",
        LEARN,
        **at_least(1),
    )
    accumulation: int | None = option(
        None, f"batches in an update; default: {_stage_default('accumulation')}", LEARN, **at_least(1)
    )
    learning_rate: float | None = option(
        None,
        "of AdamW; constant in probe, in tune and with the miniature it falls as a cosine; default: "
        f"{_stage_default('learning_rate')}",
        LEARN,
        check=lambda value: 0 < value < math.inf,
        allowed="above 0",
    )
    checkpoint_every: int = option(
        200, "updates between two checkpoints, from which the same command goes on", LEARN, **at_least(1)
    )

    prompt: str | None = option(
        None,
        "text, or @file with one a line; {token} is the token of --token_path",
        "generate",
        heading="Images",
    )
    num_images: int = option(4, "images of each prompt", "generate", **at_least(1))
    best_of: int = option(
        1,
        "pictures drawn for each image, of which the adapter keeps the one that fits best",
        "generate",
        **at_least(1),
    )
    compare: bool = option(
        False,
        "draw the first noises without LoRA, correction and choice, too, in the grid's first row",
        "generate",
    )
    token_path: str | None = option(
        None, "a class token's file, as run.py writes it (learned_embeds.safetensors)", "generate"
    )
    correction_factor: float | None = option(
        None,
        "how far latents go along the gradient of the matching score at each step; 0 is plain generation. "
        f"Default: {CORRECTION_FACTOR:g}, with the miniature {MINIATURE_CORRECTION_FACTOR:g}",
        DRAW,
        check=lambda value: 0 <= value < math.inf,
        allowed="0 or more",
    )
    correction: str = option(
        "official",
        "official: only the prediction under the prompt sees corrected latents; state: the whole step does",
        DRAW,
        choices=("official", "state"),
    )
    correction_steps: str | None = option(
        None,
        "steps that are corrected, as 0:25 (from 0, the last one left out); default: all",
        DRAW,
        **matching(r"\d+:\d+", "FIRST:STOP, such as 0:25"),
    )
    num_inference_steps: int = option(50, "denoising steps", DRAW, **at_least(2))
    guidance_scale: float = option(
        7.5, "weight of classifier-free guidance; 1 or less turns it off", DRAW, **at_least(0)
    )
    scheduler: str | None = option(
        None, "the paper has ddim; default: the model's own", DRAW, choices=tuple(SAMPLERS)
    )

    noises: int = option(
        4, "noises over which a sample's scores are averaged", "evaluate", heading="Evaluation", **at_least(1)
    )
    prompts: int | None = option(
        None,
        "prompts of each kind whose pictures are drawn, without and with LoRA and correction, and judged; 0: "
        "none. Default: 8 with the miniature's scenes, else none, as no judge is at hand",
        "evaluate",
        **at_least(0),
    )

    weights: str | None = option(
        None,
        "folder with adapter.safetensors, and a LoRA where there is one; default: what tune left below "
        "--output_path, else probe; for tune: what probe left",
        "tune generate evaluate",
        heading="Files and machine",
    )
    output_path: str = option("results/dpt", "folder of everything that is written", ALL + " experiment")
    seed: int = option(0, "of everything random", READ + " generate", **at_least(0, MAX_SEED))
    device: str = option(
        "auto",
        "auto (CUDA if there is one), cpu, cuda or cuda:N",
        ALL,
        **matching(r"auto|cpu|cuda(:\d+)?", "auto, cpu, cuda or cuda:N"),
    )
    mixed_precision: str = option(
        "auto",
        "of UNet and VAE; auto: float32 on a CPU, on CUDA fp16",
        READ + " generate",
        choices=("auto", "no", "fp16", "bf16"),
    )
    dry_run: bool = option(False, "print the resolved options and the plan, and stop", ALL + " experiment")

    parts: str | None = option(
        None,
        f"what to run of {', '.join(PARTS)}; with commas. Default: all, the most important first",
        "experiment",
        heading="Experiment",
        **names_of((*PARTS, *REMEDIES)),
    )
    seeds: str | None = option(
        None,
        "trainings to run, with commas. Default: all",
        "experiment",
        **names_of(tuple(map(str, SEEDS))),
    )
    workers: int = option(2, "processes of one thread each; 1: this one", "experiment", **at_least(1))
    rows: str | None = option(
        None,
        f"file of the finished units' rows, from which the same command goes on; default: {ROWS.name} among "
        "this program's experiments/results",
        "experiment",
    )
    table: bool = option(
        False, "print the tables of the rows that are there, draw the figures, and stop", "experiment"
    )

    @property
    def is_miniature(self) -> bool:
        """Whether the bundled model's defaults hold."""
        return self.model == "miniature"

    @property
    def factor(self) -> float:
        """Of self-correction, with the default that belongs to the model."""
        default = MINIATURE_CORRECTION_FACTOR if self.is_miniature else CORRECTION_FACTOR
        return default if self.correction_factor is None else self.correction_factor

    @property
    def data_name(self) -> str:
        """The data set."""
        return self.data or ("miniature" if self.is_miniature else "coco")

    def stage(self, command: str) -> StageSettings:
        """Steps and sizes of a stage, with the defaults that belong to the model."""
        defaults = (MINIATURE_STAGES if self.is_miniature else STAGES)[command]
        given = {f.name: getattr(self, f.name, None) for f in fields(StageSettings)}
        return StageSettings(**{k: getattr(defaults, k) if v is None else v for k, v in given.items()})


def validate(command: str, options: Options) -> None:
    """Check the values that need no file.

    Raises:
        UsageError: naming the flag, what was given and what is allowed.
    """
    for f in fields(Options):
        value = getattr(options, f.name)
        check = f.metadata["check"]
        if command in f.metadata["commands"] and value is not None and check and not check(value):
            raise UsageError(f"--{f.name}: {value!r} was given; allowed is {f.metadata['allowed']}")
    if command == "mine" or (command in READ.split() and options.data_name == "coco"):
        for name in ("coco_root", "refcoco_root"):
            if getattr(options, name) is None:
                raise UsageError(f"--{name}: nothing was given; needed is a folder, see dpt/README.md")
    if command == "probe" and not set(options.losses.split(",")) & {"itm", "rec"}:
        raise UsageError(f"--losses: {options.losses!r} was given; allowed in probe is itm, rec or both")
    if command == "generate":
        check_generate(options)
    if command in DRAW.split():
        check_correction(options)
    if command == "evaluate" and options.data_name == "coco":
        if options.split == "test":
            raise UsageError("--split: 'test' was given; allowed for coco is validation")
        if options.prompts:
            raise UsageError(
                f"--prompts: {options.prompts} was given; allowed for coco is 0: it has no judge"
            )


def check_generate(options: Options) -> None:
    """Raises UsageError where prompt and token do not go together."""
    if not options.prompt:
        raise UsageError("--prompt: nothing was given; needed is a text or @file")
    if "{token}" in options.prompt and not options.token_path:
        raise UsageError("--token_path: nothing was given; needed is the file of {token} in the prompt")
    if options.token_path and not Path(options.token_path).is_file():
        raise UsageError(f"--token_path: there is no token at {options.token_path}")


def check_correction(options: Options) -> None:
    """Raises UsageError where it is told how to correct, and nothing would be; or no step is left."""
    if options.correction_steps:
        first, stop = map(int, options.correction_steps.split(":"))
        if not first < stop:
            raise UsageError(
                f"--correction_steps: {options.correction_steps!r} was given; allowed is FIRST < STOP"
            )
    if options.correction_factor is None and not options.factor:
        for name, plain in (("correction", "official"), ("correction_steps", None)):
            given = getattr(options, name)
            if given != plain:
                raise UsageError(
                    f"--{name}: {given!r} was given; with {options.model} it needs --correction_factor, "
                    "which is 0 there by default"
                )
