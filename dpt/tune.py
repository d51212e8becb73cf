"""Stage 2, tuning: a LoRA of the UNet learns from the adapter's losses and from denoising (DPT, section
3.3)."""

from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator

from discriminative.precision import channels_last
from dpt.files import LORA, add_lora, write_adapter, write_lora
from dpt.forward import Reader
from dpt.latents import Stream
from dpt.probe import adapter_parameters, fingerprint
from dpt.training import Stage, facts_of, forget_checkpoint, seed_of, train

LORA_STREAM = 41  # of its first values


def prepare(
    reader: Reader, seed: int, only_lora: bool = False, text_encoder: bool = False
) -> dict[str, torch.nn.Parameter]:
    """Put a fresh LoRA on the reader's models; what is trained, by name.

    Args:
        seed: of its first values.
        only_lora: the adapter stays as it is.
        text_encoder: a LoRA on the text encoder, too.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed_of(seed, 0, 0, LORA_STREAM))
        trained = dict(add_lora(reader.models, text_encoder))
    reader.condition.trains = text_encoder
    for module in (reader.adapter, reader.point):
        module.train(not only_lora).requires_grad_(not only_lora)
    return trained if only_lora else trained | adapter_parameters(reader)


def tune(
    reader: Reader,
    trained: dict[str, torch.nn.Parameter],
    stage: Stage,
    stream: Stream,
    folder: Path,
    accelerator: Accelerator,
    side: str,
    model: str,
    after: Callable[[int], None] | None = None,
) -> list[dict]:
    """Train what :func:`prepare` gave, and write LoRA and adapter to the folder.

    Args:
        side: name of the text side. model: that is tuned; both for the record.
        after: is told how many updates are done, after each.

    Returns:
        a row of losses for each update.

    Raises:
        UsageError: the folder has a checkpoint of another training.
        WorkError: a loss is not finite.
    """
    facts = {"stage": "tune", "probe": reader.point.name, "model": model, "text_side": side}
    facts |= {"only_train_lora": not any(name.startswith("adapter.") for name in trained)}
    facts |= {"tune_text_encoder": reader.condition.trains, "begun_from": fingerprint(reader.adapter)}
    facts |= facts_of(stage, reader, stream)
    reader.autocast = accelerator.autocast
    with channels_last(reader.models):
        rows = train(stage, reader, trained, stream, folder, accelerator, facts, after=after)
    reader.condition.trains = False
    for module in (reader.adapter, reader.point, reader.models.unet, reader.models.text_encoder):
        module.eval().requires_grad_(False)
    if accelerator.is_main_process:
        write_lora(folder, reader.models)
        write_adapter(folder, reader, side, model, facts | {"lora": LORA, "updates": len(rows)})
        forget_checkpoint(folder)
    accelerator.wait_for_everyone()
    return rows
