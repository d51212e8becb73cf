"""What the UNet's own errors say of text and picture, and a LoRA that learns from them: the right text is to
err least. Without any adapter, in the manner of *Diffusion Classifier* (Li et al. 2023)."""

import math
from pathlib import Path

import torch
from accelerate import Accelerator

from discriminative.precision import channels_last
from dpt.files import write_lora
from dpt.forward import HARD, RANDOM, TRUE, Noised, Reader, encode_texts
from dpt.latents import Row, Stream
from dpt.losses import ranking_loss
from dpt.training import Stage, facts_of, forget_checkpoint, train
from dpt.tune import prepare

FIRST_SCALE = math.log(1000)  # about the numbers of a latent: errors are means over these
SHIFTS = (1, 2, 3)  # samples before in the batch, whose captions are also held against a picture


def errors_by_text(reader: Reader, rows: list[Row], noised: Noised) -> torch.Tensor:
    """Mean squared errors of the predicted noise of B pictures, (B, 6): under their own text, the hard and
    the random negative, and the texts of the three samples before in the batch."""
    texts = encode_texts(reader, rows)
    own = texts[TRUE].states  # (B, L, D)
    others = [own.roll(shift, dims=0) for shift in SHIFTS]
    states = torch.cat([own, texts[HARD].states, texts[RANDOM].states, *others])  # (6 * B, L, D)
    times = len(states) // len(rows)
    latents = noised.latents[:, TRUE].repeat(times, 1, 1, 1)  # (6 * B, 4, h, w)
    timesteps = noised.timesteps.repeat(times)  # (6 * B,)
    predicted = reader.models.unet(latents, timesteps, encoder_hidden_states=states).sample
    errors = (predicted - noised.target.repeat(times, 1, 1, 1)).square().flatten(1).mean(dim=1)  # (6 * B,)
    return errors.view(times, -1).T


def contrast(reader: Reader, rows: list[Row], noised: Noised, *_) -> dict[str, torch.Tensor]:
    """The losses of a batch, called as :func:`forward.losses_of` is: the right text among six, by its error,
    and that error."""
    errors = errors_by_text(reader, rows, noised)  # (B, 6)
    return {"i2t": ranking_loss(-errors, torch.tensor(FIRST_SCALE)), "mse": errors[:, 0].mean()}


def learn_lora(
    reader: Reader, stage: Stage, stream: Stream, folder: Path, accelerator: Accelerator
) -> list[dict]:
    """Train a LoRA of the UNet and write it to the folder; a row of losses for each update.

    Raises:
        UsageError: the folder has a checkpoint of another training.
        WorkError: a loss is not finite.
    """
    trained = prepare(reader, stage.seed, only_lora=True)
    facts = {"stage": "errors"} | facts_of(stage, reader, stream)
    with channels_last(reader.models):
        rows = train(stage, reader, trained, stream, folder, accelerator, facts, contrast)
    write_lora(folder, reader.models)
    forget_checkpoint(folder)
    return rows
