"""Stage 1, probing: an adapter learns to match and to find on the features of a frozen UNet (DPT, section
3.2)."""

import hashlib
from pathlib import Path

import torch
from accelerate import Accelerator

from discriminative.errors import WorkError
from discriminative.precision import channels_last
from dpt.files import write_adapter
from dpt.forward import TRUE, Reader, draw_noised
from dpt.latents import Row, Stream
from dpt.training import Stage, facts_of, forget_checkpoint, seed_of, train


def fingerprint(module: torch.nn.Module) -> str:
    """A hash of all parameters and buffers, bit for bit."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def adapter_parameters(reader: Reader) -> dict[str, torch.nn.Parameter]:
    """Parameters of adapter and probe point by their names in a file."""
    found = {f"adapter.{name}": p for name, p in reader.adapter.named_parameters()}
    return found | {f"point.{name}": p for name, p in reader.point.named_parameters()}


@torch.no_grad()
def standardise(reader: Reader, stage: Stage, rows: list[Row], accelerator: Accelerator) -> None:
    """Let the probe point look at these rows' pictures, noised as training noises them."""
    generator = torch.Generator().manual_seed(seed_of(stage.seed, 0, 0, accelerator.process_index))
    noised = draw_noised(reader.models, rows, generator, stage.settings.timestep_power)
    texts = reader.condition.encode([row.captions[TRUE] for row in rows])
    latents = noised.latents[:, TRUE].to(reader.models.dtype)  # (B, 4, h, w)
    with reader.autocast():
        reader.point.standardise(reader.models.unet, latents, noised.timesteps, texts.states)
    # Processes look at other rows.
    for buffer in reader.point.buffers():
        buffer.copy_(accelerator.reduce(buffer, "mean"))


def probe(
    reader: Reader,
    stage: Stage,
    stream: Stream,
    folder: Path,
    accelerator: Accelerator,
    side: str,
    model: str,
) -> list[dict]:
    """Train the reader's adapter and write it to the folder.

    Args:
        side: name of the text side. model: that is read; both for the record.

    Returns:
        a row of losses for each update.

    Raises:
        UsageError: the folder has a checkpoint of another training.
        WorkError: a loss is not finite, or the UNet has changed.
    """
    before = fingerprint(reader.models.unet)
    for module in (reader.adapter, reader.point):
        module.train().requires_grad_(True)
    facts = {"stage": "probe", "probe": reader.point.name, "model": model, "text_side": side}
    facts |= facts_of(stage, reader, stream)
    with channels_last(reader.models):
        # A checkpoint does not hold it; the same rows give the same.
        standardise(reader, stage, stream.batch(0), accelerator)
        rows = train(stage, reader, adapter_parameters(reader), stream, folder, accelerator, facts)
    for module in (reader.adapter, reader.point):
        module.eval().requires_grad_(False)
    if fingerprint(reader.models.unet) != before:
        raise WorkError("the UNet changed in stage 1, which must leave it as it is; nothing was written")
    if accelerator.is_main_process:
        write_adapter(folder, reader, side, model, facts | {"unet_sha256": before, "updates": len(rows)})
        forget_checkpoint(folder)
    accelerator.wait_for_everyone()
    return rows
