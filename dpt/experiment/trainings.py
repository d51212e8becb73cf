"""The experiment's trainings, carried out into folders of their own, and models put together from them."""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from accelerate import Accelerator

from discriminative.diffusion.models import DiffusionModels, load_models
from discriminative.errors import UsageError
from discriminative.records.files import read_json, write_json
from dpt.experiment.own_errors import learn_lora
from dpt.experiment.scenes import data_of, kept_rows
from dpt.experiment.settings import TRAININGS, Training, seed_of_model
from dpt.experiment.soft_tokens import learn_tokens, put_tokens
from dpt.files import LORA, load_lora, new_reader, read_adapter, write_lora
from dpt.forward import Reader
from dpt.latents import Latents, Share, Stream
from dpt.probe import probe
from dpt.settings import MINIATURE_ADAPTER, MINIATURE_PROBE
from dpt.training import Stage
from dpt.tune import prepare, tune

DONE = "done.json"
CHECKPOINT_EVERY = 100
SIDE = "pipeline"
MODEL = "miniature"


def folder_of(root: Path, name: str, seed: int) -> Path:
    """Where a training writes."""
    return root / "trainings" / name / str(seed)


def is_done(root: Path, name: str, seed: int) -> bool:
    """Whether a training is finished.

    Raises:
        UsageError: it is, with other settings than today's.
    """
    path = folder_of(root, name, seed) / DONE
    if not path.is_file():
        return False
    if read_json(path)["training"] != as_json(TRAININGS[name]):
        raise UsageError(f"--output_path: {path.parent} was trained with other settings; remove it")
    return True


def as_json(training: Training) -> dict:
    """A training's settings as JSON gives them back."""
    told = asdict(training)
    return {name: list(value) if isinstance(value, tuple) else value for name, value in told.items()}


def load_miniature() -> DiffusionModels:
    """The model, frozen, in float32 on the CPU."""
    return load_models(MODEL, torch.device("cpu"), torch.float32)


@dataclass(frozen=True)
class Job:
    """A training about to be carried out.

    Args:
        root: folder of the experiment.
        seed: of all that is random.
        folder: of what it writes.
        models: the miniature, which it may change.
        stage: its length, losses and sizes.
        stream: its batches.
    """

    root: Path
    training: Training
    seed: int
    folder: Path
    models: DiffusionModels
    stage: Stage
    stream: Stream
    accelerator: Accelerator


def carry_out(root: Path, name: str, seed: int) -> dict:
    """Train to the end; what the row says of it."""
    training = TRAININGS[name]
    folder = folder_of(root, name, seed)
    models = load_miniature()
    settings = training.settings
    stage = Stage(settings, training.losses, seed, CHECKPOINT_EVERY, training.weights)
    share = Share(settings.batch_size, settings.accumulation)
    accelerator = Accelerator(cpu=True, mixed_precision="no")
    with Stream(data_of("train"), Latents(models.vae), share, seed) as stream:
        stream.rows.update(enumerate(kept_rows(root, "train")))
        job = Job(root, training, seed, folder, models, stage, stream, accelerator)
        rows = STAGES[training.stage](job)
    write_json(folder / DONE, {"training": as_json(training), "updates": len(rows)})
    return {"updates": len(rows), "losses": last_losses(rows)}


def last_losses(rows: list[dict]) -> dict:
    """The mean of each loss over the last tenth of the updates."""
    last = rows[-max(1, len(rows) // 10) :]
    names = [name for name in rows[0] if name != "step"]
    return {name: round(sum(row[name] for row in last) / len(last), 4) for name in names}


def run_probe(job: Job) -> list[dict]:
    """Stage 1, on the base or on a tuned model."""
    with torch.random.fork_rng():
        torch.manual_seed(job.seed)
        reader = new_reader(job.models, job.training.point, MINIATURE_ADAPTER, SIDE)
    reader.condition.target = job.training.target
    if job.training.on:
        load_lora(folder_of(job.root, job.training.on, seed_of_model(job.seed)) / LORA, job.models)
    return probe(reader, job.stage, job.stream, job.folder, job.accelerator, SIDE, MODEL)


def run_tune(job: Job) -> list[dict]:
    """Stage 2."""
    training = job.training
    reader = read_adapter(folder_of(job.root, training.begins_from, job.seed), job.models)
    trained = prepare(reader, job.seed, training.only_lora, training.text_encoder)

    def after(updates: int) -> None:
        if updates in training.kept:
            write_lora(kept_at(job.folder, updates), job.models)

    return tune(reader, trained, job.stage, job.stream, job.folder, job.accelerator, SIDE, MODEL, after)


def run_soft(job: Job) -> list[dict]:
    """Soft tokens."""
    reader = new_reader(job.models, MINIATURE_PROBE, MINIATURE_ADAPTER, SIDE)
    return learn_tokens(reader, job.stage, job.stream, job.folder, job.accelerator)


def run_errors(job: Job) -> list[dict]:
    """A LoRA by the UNet's own errors."""
    reader = new_reader(job.models, MINIATURE_PROBE, MINIATURE_ADAPTER, SIDE)
    return learn_lora(reader, job.stage, job.stream, job.folder, job.accelerator)


STAGES = {"probe": run_probe, "tune": run_tune, "soft": run_soft, "errors": run_errors}


def kept_at(folder: Path, updates: int) -> Path:
    """Where the LoRA after so many updates is kept."""
    return folder / f"after-{updates:04d}"


def reader_of(root: Path, training: str, adapter: str, seed: int, updates: int | None = None) -> Reader:
    """The model with what a training made of it, and the adapter of one; empty names are the base, and an
    adapter that nobody reads.

    Args:
        updates: the LoRA as it was then; None: at the end.
    """
    models = load_miniature()
    if adapter:
        reader = read_adapter(folder_of(root, adapter, seed), models)
    else:
        reader = new_reader(models, MINIATURE_PROBE, MINIATURE_ADAPTER, SIDE)
    if training:
        spec = TRAININGS[training]
        seed = seed_of_model(seed) if spec.stage == "probe" else seed
        folder = folder_of(root, spec.on or training, seed)
        if spec.stage == "soft":
            put_tokens(reader, folder)
        else:
            load_lora((kept_at(folder, updates) if updates else folder) / LORA, models)
    for module in (reader.adapter, reader.point):
        module.eval().requires_grad_(False)
    return reader
