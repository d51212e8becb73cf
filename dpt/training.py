"""What both stages share: the loop, its checkpoints, and several processes.

All randomness of an update follows from seed, update and process, so a run that was killed goes on with the
same result. Several processes (``accelerate launch -m dpt probe ...``) average gradients, and the number of
boxes by which losses are divided.
"""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from safetensors import safe_open

from discriminative.errors import UsageError, WorkError
from discriminative.progress import progress
from discriminative.records.files import write_lines, write_tensors
from dpt.files import read_tensors
from dpt.forward import Reader, draw_noised, losses_of
from dpt.latents import Stream
from dpt.losses import total_loss
from dpt.settings import (
    ADAM_BETAS,
    ADAM_EPSILON,
    MAX_GRAD_NORM,
    WEIGHT_DECAY,
    LossWeights,
    StageSettings,
)

NOISE_STREAM = 37  # of timesteps, noises and dropout
CHECKPOINT = "checkpoint.safetensors"
LOG = "log.jsonl"
ADAM = {"betas": ADAM_BETAS, "eps": ADAM_EPSILON, "weight_decay": WEIGHT_DECAY}
MOMENTS = ("exp_avg", "exp_avg_sq", "step")  # of AdamW


@dataclass(frozen=True)
class Stage:
    """A training.

    Args:
        settings: its length and sizes.
        losses: which of "itm", "rec" and "mse".
        seed: of all that is random.
        checkpoint_every: updates between two checkpoints.
        weights: of the loss's parts.
    """

    settings: StageSettings
    losses: tuple[str, ...]
    seed: int
    checkpoint_every: int
    weights: LossWeights = LossWeights()

    def learning_rate(self, step: int) -> float:
        """Of one update, from 0."""
        settings = self.settings
        if not settings.cosine:
            return settings.learning_rate
        return settings.learning_rate * (1 + math.cos(math.pi * step / settings.steps)) / 2


def seed_of(seed: int, step: int, part: int, rank: int) -> int:
    """Seed of one batch of one update of one process."""
    return int(np.random.SeedSequence([NOISE_STREAM, seed, step, part, rank]).generate_state(1)[0])


def train(
    stage: Stage,
    reader: Reader,
    trained: dict[str, torch.nn.Parameter],
    stream: Stream,
    folder: Path,
    accelerator: Accelerator,
    facts: dict,
    measure: Callable[..., dict[str, torch.Tensor]] = losses_of,
    after: Callable[[int], None] | None = None,
) -> list[dict]:
    """Train to the end, from a checkpoint in the folder where there is one (DPT, section 3.3).

    Args:
        trained: parameters by name, in float32; nothing else changes.
        folder: of checkpoint and log.
        facts: that a checkpoint must share with this training, to go on: :func:`facts_of`, and more.
        measure: the parts of a batch's loss, called as :func:`losses_of` is.
        after: is told how many updates are done, after each.

    Returns:
        a row of losses for each update.

    Raises:
        UsageError: the checkpoint is of another training.
        WorkError: a loss is not finite.
    """
    parameters = list(trained.values())
    optimizer = accelerator.prepare(torch.optim.AdamW(parameters, **ADAM))
    first, rows = resume(folder, trained, optimizer, accelerator, facts)
    shown = {"initial": first, "total": stage.settings.steps, "unit": "update", "leave": False}
    shown["disable"] = not accelerator.is_main_process
    with torch.random.fork_rng(), progress(range(first, stage.settings.steps), **shown) as bar:
        for step in bar:
            # Gradient of the update's batches.
            batches = range(stream.share.accumulation)
            parts = [accumulate(stage, reader, stream, step, i, accelerator, measure) for i in batches]
            row = mean_row(parts, stage, step, accelerator)
            average_gradients(parameters, accelerator)
            norm = update(optimizer, parameters, stage, step, accelerator)
            # What is kept of it.
            rows.append(row | {"gradient_norm": norm})
            bar.set_postfix({"loss": f"{row['loss']:.3f}"})
            if (step + 1) % stage.checkpoint_every == 0 and accelerator.is_main_process:
                write_checkpoint(folder, step + 1, trained, optimizer, accelerator, rows, facts)
            if after:
                after(step + 1)
    if accelerator.is_main_process:
        write_lines(folder / LOG, rows)
    return rows


def update(optimizer, parameters: list, stage: Stage, step: int, accelerator: Accelerator) -> float | None:
    """Clip the gradient and take one step; the gradient's norm before, None where an update is left out.

    Raises:
        WorkError: the norm is not finite.
    """
    norm = float(accelerator.clip_grad_norm_(parameters, MAX_GRAD_NORM))
    is_finite = math.isfinite(norm)
    # Scaled gradients may overflow: such an update is left out.
    check_finite(["the gradient"] * (not is_finite and not accelerator.scaler), step, stage)
    for group in optimizer.param_groups:
        group["lr"] = stage.learning_rate(step)
    optimizer.step()
    optimizer.zero_grad()
    return norm if is_finite else None


def facts_of(stage: Stage, reader: Reader, stream: Stream) -> dict:
    """What decides a training's bits, beside models and data themselves, as JSON takes it."""
    told = {"losses": list(stage.losses), "seed": stage.seed, **asdict(stage.settings)}
    told |= {
        "weights": asdict(stage.weights),
        "samples": len(stream.data),
        "processes": stream.share.processes,
    }
    return told | {"precision": str(reader.models.dtype).removeprefix("torch.")}


def accumulate(
    stage: Stage,
    reader: Reader,
    stream: Stream,
    step: int,
    part: int,
    accelerator: Accelerator,
    measure: Callable[..., dict[str, torch.Tensor]] = losses_of,
) -> dict[str, torch.Tensor]:
    """Add one batch's gradient; the parts of its loss, scalars without gradient."""
    seed = seed_of(stage.seed, step, part, accelerator.process_index)
    # Dropout draws from torch's own generators.
    torch.manual_seed(seed)
    rows = stream.batch(step, part)
    generator = torch.Generator().manual_seed(seed)
    noised = draw_noised(reader.models, rows, generator, stage.settings.timestep_power)
    parts = measure(reader, rows, noised, stage.losses, partial(mean_boxes, accelerator=accelerator))
    loss = total_loss(parts, stage.weights)
    accelerator.backward(loss / stream.share.accumulation)
    return {name: value.detach().float() for name, value in {"loss": loss, **parts}.items()}


def mean_boxes(number: int, accelerator: Accelerator) -> float:
    """The number of boxes averaged over the processes, at least 1."""
    total = accelerator.reduce(torch.tensor(float(number), device=accelerator.device), "mean")
    return max(total.item(), 1.0)


def mean_row(parts: list[dict], stage: Stage, step: int, accelerator: Accelerator) -> dict:
    """The update's losses, averaged over batches and processes.

    Raises:
        WorkError: one is not finite; in all processes alike.
    """
    stacked = torch.stack([torch.stack(list(one.values())) for one in parts]).mean(dim=0)  # (parts,)
    values = accelerator.reduce(stacked, "mean").tolist()
    row = dict(zip(parts[0], values, strict=True))
    check_finite([name for name, value in row.items() if not math.isfinite(value)], step, stage)
    return {"step": step + 1} | row


def check_finite(broken: list[str], step: int, stage: Stage) -> None:
    """Raises WorkError where something is listed that is not finite."""
    if broken:
        raise WorkError(
            f"the loss is not finite at update {step + 1} ({', '.join(broken)}); try a smaller "
            f"--learning_rate than {stage.settings.learning_rate:g}, or another --mixed_precision"
        )


def average_gradients(parameters: list[torch.nn.Parameter], accelerator: Accelerator) -> None:
    """Give every process the mean of all processes' gradients."""
    if accelerator.num_processes == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = accelerator.reduce(torch.cat([g.flatten() for g in gradients]), "mean")  # (N,)
    for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


# Checkpoints.


def write_checkpoint(folder: Path, step: int, trained: dict, optimizer, accelerator, rows, facts) -> None:
    """All that a training needs to go on after ``step`` updates, in one file; and its log so far."""
    tensors = {f"weight.{name}": p.detach().cpu().contiguous() for name, p in trained.items()}
    for name, parameter in trained.items():
        state = optimizer.state.get(parameter, {})
        tensors |= {
            f"{key}.{name}": state[key].detach().cpu().contiguous() for key in MOMENTS if key in state
        }
    scaler = accelerator.scaler.state_dict() if accelerator.scaler else {}
    metadata = {"step": step, "facts": facts, "scaler": scaler}
    write_lines(folder / LOG, rows)
    write_tensors(folder / CHECKPOINT, tensors, {"training": json.dumps(metadata)})


@torch.no_grad()
def resume(folder: Path, trained: dict, optimizer, accelerator, facts: dict) -> tuple[int, list[dict]]:
    """Take over the folder's checkpoint; how many updates are done, and their rows.

    Raises:
        UsageError: it is damaged, or of another training.
    """
    path = folder / CHECKPOINT
    if not path.is_file():
        return 0, []
    tensors = read_tensors(path)
    with safe_open(path, "pt") as file:
        metadata = json.loads((file.metadata() or {}).get("training", "{}"))
    check_same(path, metadata, facts, set(trained), tensors)
    for name, parameter in trained.items():
        parameter.copy_(tensors[f"weight.{name}"])
        found = {key: tensors[f"{key}.{name}"] for key in MOMENTS if f"{key}.{name}" in tensors}
        # AdamW counts its steps on the CPU.
        if found:
            moved = {k: v if k == "step" else v.to(parameter.device) for k, v in found.items()}
            optimizer.state[parameter] = moved
    if accelerator.scaler and metadata["scaler"]:
        accelerator.scaler.load_state_dict(metadata["scaler"])
    done = metadata["step"]
    log = (folder / LOG).read_text().splitlines() if (folder / LOG).is_file() else []
    rows = [row for row in map(json.loads, log) if row["step"] <= done]
    if accelerator.is_main_process:
        print(f"goes on after {done} updates, from {path}", flush=True)
    return done, rows


def check_same(path: Path, metadata: dict, facts: dict, names: set[str], tensors: dict) -> None:
    """Raises UsageError where a checkpoint is not of the training with these facts and parameters."""
    given = metadata.get("facts", {})
    other = sorted(k for k in facts.keys() | given.keys() if facts.get(k) != given.get(k))
    if other:
        told = ", ".join(f"{k} {given.get(k)!r} there, {facts.get(k)!r} here" for k in other[:3])
        raise UsageError(
            f"--output_path: {path} is of another training ({told}); finish it with its own options, "
            "remove it, or give another folder"
        )
    missing = [name for name in names if f"weight.{name}" not in tensors]
    if missing:
        raise UsageError(f"--output_path: {path} is damaged: it lacks {sorted(missing)[0]}; remove it")


def forget_checkpoint(folder: Path) -> None:
    """Remove the checkpoint of a training that is done."""
    (folder / CHECKPOINT).unlink(missing_ok=True)
