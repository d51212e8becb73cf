"""Seconds and memory of DPT: a step of each stage, and self-correction.

    python -m experiments.speed.dpt --out experiments/speed/results/dpt.json
    python -m experiments.speed.dpt --shapes sd1.4 --width 0.5 --out experiments/speed/results/dpt_sd14.json
    python -m experiments.speed.dpt --shapes sd1.4 --device cuda --batch_size 48

"stage 1" and "stage 2" are whole updates without the optimiser: texts, six forwards, adapter, losses and
gradient. "one by one" is stage 1 with six calls of the whole UNet, each with the pictures encoded anew.
Weights are random with ``sd1.4``, whose shapes cost what trained ones cost. Memory is the most that tensors
took at once beyond what was there before; on CUDA it is the allocator's peak.
"""

import argparse
import gc
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from discriminative.diffusion.models import DiffusionModels, load_models
from discriminative.settings import SamplerSettings
from dpt.adapter import Readout, similarity
from dpt.correct import Correction, encode_prompts, sample_corrected
from dpt.data.scenes import Miniature
from dpt.files import add_lora, new_reader
from dpt.forward import (
    GROUNDED,
    OTHER_PICTURES,
    OTHER_TEXTS,
    RIGHT,
    Reader,
    draw_noised,
    encode_texts,
    losses_of,
)
from dpt.latents import Latents, Row
from dpt.losses import itm_losses, rec_losses, total_loss
from dpt.settings import MINIATURE_ADAPTER, AdapterSettings, LossWeights
from experiments.speed import common
from experiments.speed.footprint import LiveBytes
from experiments.speed.sd_shapes import build_models

PAIRS = [GROUNDED, RIGHT, *OTHER_TEXTS, *OTHER_PICTURES]
PROMPT = "a photo of a red car above a blue umbrella"
ROW_SEED = 5


def models_of(args: argparse.Namespace, device: torch.device) -> DiffusionModels:
    """The miniature, or random weights at Stable Diffusion 1.4's shapes."""
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    if args.shapes == "miniature":
        return load_models("miniature", device, dtype)
    return build_models(args.width, device, dtype)


def rows_of(models: DiffusionModels, number: int) -> list[Row]:
    """Scenes as latents; random ones where the model's pictures are larger."""
    data = Miniature("train", number, ROW_SEED)
    if models.unet.config.sample_size == 16:
        latents = Latents(models.vae)
        return [latents.row(data[i]) for i in range(number)]
    generator = torch.Generator().manual_seed(ROW_SEED)
    shape = (2, *models.latent_shape(None, None))
    rows = []
    for i in range(number):
        sample = data[i]
        captions = (sample.caption, sample.hard_caption, sample.random_caption)
        pictures = tuple(torch.randn(shape, generator=generator).abs() for _ in captions)
        rows.append(Row(pictures, captions, sample.kind, sample.grounding))
    return rows


def step(reader: Reader, rows: list[Row], losses: tuple[str, ...], parameters: list) -> None:
    """An update's gradient."""
    noised = draw_noised(reader.models, rows, torch.Generator().manual_seed(0))
    total_loss(losses_of(reader, rows, noised, losses), LossWeights()).backward()
    for parameter in parameters:
        parameter.grad = None


def one_by_one(reader: Reader, rows: list[Row], pictures: torch.Tensor, parameters: list) -> None:
    """Stage 1's gradient by six whole forwards, one after the other, of pictures (B, 3, H, W)."""
    models = reader.models
    noised = draw_noised(models, rows, torch.Generator().manual_seed(0))
    texts = encode_texts(reader, rows)
    readouts = []
    for picture, text in PAIRS:
        with torch.no_grad():
            models.vae.encode(pictures)
            latents = noised.latents[:, picture]  # (B, 4, h, w)
            states = texts[text].states
            features, _ = reader.features(latents, noised.timesteps, states, with_noise=True)
        readouts.append(reader.adapter(features, noised.timesteps))
    tokens, mask = reader.side.tokens([row.grounding.expression for row in rows])
    tokens = reader.adapter.project_tokens(tokens.to(reader.device))  # (B, L, A)
    targets = reader.targets(rows)
    parts = rec_losses(Readout(*readouts[0]), tokens, mask, targets, len(rows))
    matched = zip(readouts[1:], PAIRS[1:], strict=True)
    scores = [similarity(readout.matching, texts[text].pooled) for readout, (_, text) in matched]
    scores = torch.stack(scores, dim=1)  # (B, 5)
    parts |= itm_losses(scores[:, 0], scores[:, 1:3], scores[:, 3:], reader.adapter.logit_scale)
    total_loss(parts, LossWeights()).backward()
    for parameter in parameters:
        parameter.grad = None


def most_bytes(work: Callable[[], object], device: torch.device) -> int:
    """The most bytes that ``work`` holds at once."""
    gc.collect()
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    with LiveBytes() as live:
        work()
    return live.peak


def training(args: argparse.Namespace, models: DiffusionModels) -> dict:
    """Both stages' steps, and stage 1 one by one, in turns."""
    device = models.device
    reader = new_reader(models, args.probe, adapter_of(args), "pipeline")
    for module in (reader.adapter, reader.point):
        module.train()
    adapter = [*reader.adapter.parameters(), *reader.point.parameters()]
    rows = rows_of(models, args.batch_size)
    size = models.unet.config.sample_size * models.vae_scale_factor
    pictures = torch.zeros(len(rows), 3, size, size, device=device, dtype=models.dtype)  # (B, 3, H, W)
    cases = {
        "stage 1": partial(step, reader, rows, ("itm", "rec"), adapter),
        "one by one": partial(one_by_one, reader, rows, pictures, adapter),
    }
    found = common.alternating(cases, args.rounds, device)
    held = {"stage 1": most_bytes(cases["stage 1"], device)}
    trained = [*adapter, *add_lora(models).values()]
    second = partial(step, reader, rows, ("itm", "rec", "mse"), trained)
    found |= common.alternating({"stage 2": second}, args.rounds, device)
    held["stage 2"] = most_bytes(second, device)
    return {
        "seconds": common.medians(found),
        "one_by_one_over_stage_1": common.ratios(found, "one by one", "stage 1"),
        "bytes": held,
    }


def correcting(args: argparse.Namespace, models: DiffusionModels) -> dict:
    """Images with self-correction and without, in turns, each in its fastest way."""
    reader = new_reader(models, args.probe, adapter_of(args), "pipeline")
    for module in (reader.adapter, reader.point):
        module.eval().requires_grad_(False)
    with torch.no_grad():
        told = encode_prompts(reader, [PROMPT] * args.images)
    settings = SamplerSettings(args.num_inference_steps, 7.5)
    seeds = list(range(args.images))
    cases = {
        name: partial(sample_corrected, reader, told, seeds, settings, Correction(factor))
        for name, factor in (("plain", 0.0), ("corrected", 0.5))
    }
    found = common.alternating(cases, args.rounds, models.device)
    return {
        "seconds": common.medians(found),
        "corrected_over_plain": common.ratios(found, "corrected", "plain"),
        "bytes": {name: most_bytes(work, models.device) for name, work in cases.items()},
    }


def adapter_of(args: argparse.Namespace) -> AdapterSettings:
    """Sizes of the adapter."""
    return MINIATURE_ADAPTER if args.shapes == "miniature" else AdapterSettings()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", choices=("miniature", "sd1.4"), default="miniature")
    parser.add_argument("--width", type=float, default=1.0, help="share of sd1.4's channels")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--probe", default="up1")
    parser.add_argument("--batch_size", type=int, help="samples of a step; default: 24, with sd1.4 1")
    parser.add_argument("--images", type=int, help="drawn at once; default: 4, with sd1.4 1")
    parser.add_argument("--num_inference_steps", type=int, help="default: 50, with sd1.4 2")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    args = parser.parse_args()
    small = args.shapes == "miniature"
    for name, here in (("batch_size", (24, 1)), ("images", (4, 1)), ("num_inference_steps", (50, 2))):
        if getattr(args, name) is None:
            setattr(args, name, here[0] if small else here[1])
    device = torch.device(args.device)
    models = models_of(args, device)
    told = {name: getattr(args, name) for name in ("shapes", "width", "probe", "batch_size", "images")}
    told["num_inference_steps"] = args.num_inference_steps
    found = {"correction": correcting(args, models), "training": training(args, models)}
    common.finish(common.environment(device) | told | found, args.out)


if __name__ == "__main__":
    main()
