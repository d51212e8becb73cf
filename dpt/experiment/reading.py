"""What an adapter tells apart on test scenes, as a row; and why tuning may come to nothing."""

from pathlib import Path

import numpy as np
import torch

from discriminative.progress import progress
from dpt.data.scenes import KINDS
from dpt.evaluate import outcomes
from dpt.experiment.scenes import kept_rows
from dpt.experiment.settings import READ_NOISES, SCENE_SEED, TRAININGS
from dpt.experiment.trainings import folder_of, load_miniature, reader_of
from dpt.files import read_adapter
from dpt.forward import HARD, TRUE, Reader, draw_noised, encode_texts, losses_of
from dpt.latents import Row
from dpt.losses import total_loss
from dpt.settings import (
    HIT_RANKS,
    LOSSES,
    MINIATURE_EVALUATION_TIMESTEP,
    MINIATURE_STAGES,
    MINIATURE_WEIGHTS,
)
from dpt.training import seed_of
from dpt.tune import prepare

GRADIENT_BATCHES = 8


def read(root: Path, name: str, seed: int, noises: int = READ_NOISES) -> dict:
    """Matching and boxes of a training's adapter on the model that it belongs to, a digit a scene."""
    training = TRAININGS[name]
    is_base = training.stage == "probe" and not training.on
    reader = reader_of(root, "" if is_base else name, name, seed)
    rows = kept_rows(root, "test")
    waiting = outcomes(reader, rows, noises, SCENE_SEED, MINIATURE_EVALUATION_TIMESTEP)
    found = list(progress(waiting, "read", len(rows), unit="scene", leave=False))
    told = {
        "text": "".join(str(int(o.text_is_right)) for o in found),
        "picture": "".join(str(int(o.picture_is_right)) for o in found),
    }
    hits = {rank: [round(noises * o.hits["iou"][rank]) for o in found] for rank in HIT_RANKS}
    return told | {f"hit@{rank}": "".join(map(str, some)) for rank, some in hits.items()} | {"noises": noises}


def why(root: Path, seed: int) -> dict:
    """How alike hard negatives are to the text encoder, and how the losses pull at a fresh LoRA."""
    reader = read_adapter(folder_of(root, "probe", seed), load_miniature())
    rows = kept_rows(root, "test")
    return {"cosines": cosines(reader, rows)} | gradients(reader, rows, seed)


@torch.no_grad()
def cosines(reader: Reader, rows: list[Row]) -> dict:
    """By target of matching and kind of negative: the mean cosine of a caption and its hard negative."""
    found = {}
    for target in ("end", "words"):
        reader.condition.target = target
        texts = encode_texts(reader, rows)
        alike = torch.cosine_similarity(texts[TRUE].pooled.flatten(1), texts[HARD].pooled.flatten(1))
        by_kind = {kind: alike[[row.kind == kind for row in rows]] for kind in KINDS}
        found[target] = {kind: round(some.mean().item(), 4) for kind, some in by_kind.items()}
    reader.condition.target = "end"
    return found


def gradients(reader: Reader, rows: list[Row], seed: int) -> dict:
    """The norm of each loss's gradient by a fresh LoRA, weighted as in stage 2, and their cosines with that
    of denoising; means over a few batches."""
    trained = prepare(reader, seed, only_lora=True)
    settings = MINIATURE_STAGES["tune"]
    norms = {name: [] for name in LOSSES}
    alike = {name: [] for name in LOSSES if name != "mse"}
    for i in range(GRADIENT_BATCHES):
        batch = rows[i * settings.batch_size : (i + 1) * settings.batch_size]
        by_loss = {name: gradient(reader, trained, batch, name, seed_of(seed, i, 0, 0)) for name in LOSSES}
        for name, vector in by_loss.items():
            norms[name].append(vector.norm().item())
        for name, some in alike.items():
            some.append(torch.cosine_similarity(by_loss[name], by_loss["mse"], dim=0).item())
    told = {"gradient_norms": norms, "cosines_with_mse": alike}
    return {key: {n: round(float(np.mean(v)), 5) for n, v in values.items()} for key, values in told.items()}


def gradient(reader: Reader, trained: dict, rows: list[Row], loss: str, seed: int) -> torch.Tensor:
    """One loss's gradient by the LoRA, flat."""
    noised = draw_noised(reader.models, rows, torch.Generator().manual_seed(seed))
    total = total_loss(losses_of(reader, rows, noised, (loss,)), MINIATURE_WEIGHTS)
    found = torch.autograd.grad(total, list(trained.values()), allow_unused=True)
    zeros = [torch.zeros_like(p) if g is None else g for p, g in zip(trained.values(), found, strict=True)]
    return torch.cat([g.flatten() for g in zeros])
