"""One training: batches of real and generated pictures, timm's augmentation, AdamW, a number of steps."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from PIL import Image
from timm.data import Mixup, create_transform
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch.utils.data import DataLoader, Dataset

from apps.augment.folders import Pictures
from apps.augment.network import Network, head_of
from apps.augment.randomness import seeded
from discriminative.diffusion.memory import told_out_of_memory
from discriminative.errors import WorkError

# Without a spread of its magnitude: Pillow refuses the lowest level of its posterize.
RANDAUGMENT = "rand-m{}-inc1"
SCALE = (0.35, 1.0)  # share of a picture's area that a crop keeps
WARM_UP = 0.1  # of the steps
LOOKED_AT = 64  # pictures at once, without gradient


@dataclass(frozen=True)
class TrainingSettings:
    """How a classifier is trained; the same with generated pictures and without.

    Args:
        layers: "all", or "head" on frozen features.
        augmentation: "basic", or "strong" with RandAugment and CutMix.
        weight_decay: AdamW's; 0 turns it off.
        smoothing: of labels; 0 turns it off.
        magnitude: RandAugment's, 0 to 9.
        cutmix: share of the batches with CutMix; 0 turns it off.
        readers: processes that read pictures; 0 reads in this one. Changes no result.
    """

    steps: int
    batch_size: int
    learning_rate: float
    layers: str = "all"
    augmentation: str = "strong"
    weight_decay: float = 0.05
    smoothing: float = 0.1
    magnitude: int = 9
    cutmix: float = 0.5
    readers: int = 0


class Draws(Dataset):
    """Pictures in the order of a training, each varied as its place in the order says."""

    def __init__(self, drawn: list[tuple[Path, int]], transform: Any, seed: int):
        self.drawn = drawn
        self.transform = transform
        self.seed = seed

    def __len__(self) -> int:
        return len(self.drawn)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        path, label = self.drawn[i]
        with seeded(self.seed + i):
            return self.transform(opened(path)), label  # (3, H, W)


def opened(path: Path) -> Image.Image:
    """A picture as RGB.

    Raises:
        WorkError: it cannot be read any more.
    """
    try:
        with Image.open(path) as picture:
            return picture.convert("RGB")
    except OSError as error:
        raise WorkError(f"{path} cannot be read any more ({error})") from error


def endless(number: int, rng: torch.Generator) -> Iterator[int]:
    """Numbers from 0 below ``number``: all in a random order, then all in another, and so on."""
    while True:
        yield from torch.randperm(number, generator=rng).tolist()


def order_of(
    real: Pictures, generated: Pictures | None, share: float, settings: TrainingSettings, seed: int
) -> list[tuple[Path, int]]:
    """The pictures of all steps, (path, class from 0), batch after batch.

    Args:
        share: of each batch that is generated, rounded to whole pictures; the real ones make room for them.
    """
    rngs = [torch.Generator().manual_seed(3 * seed + i) for i in range(3)]
    number = round(share * settings.batch_size) if generated else 0
    parts = [(real, settings.batch_size - number, endless(len(real), rngs[0]))]
    if number:
        parts.append((generated, number, endless(len(generated), rngs[1])))
    drawn = []
    for _ in range(settings.steps):
        batch = []
        for pictures, size, numbers in parts:
            chosen = [next(numbers) for _ in range(size)]
            batch += [(pictures.paths[n], pictures.labels[n]) for n in chosen]
        # CutMix takes pairs by their place.
        drawn += [batch[n] for n in torch.randperm(len(batch), generator=rngs[2]).tolist()]
    return drawn


def training_transform(network: Network, settings: TrainingSettings) -> Any:
    """timm's transform of a picture for training."""
    data = {k: network.data[k] for k in ("input_size", "interpolation", "mean", "std")}
    policy = RANDAUGMENT.format(settings.magnitude) if settings.augmentation == "strong" else None
    return create_transform(**data, is_training=True, scale=SCALE, auto_augment=policy, color_jitter=None)


def mixer(classes: int, settings: TrainingSettings) -> Mixup:
    """Smooths labels, and with strong augmentation mixes pictures by CutMix."""
    share = settings.cutmix if settings.augmentation == "strong" else 0.0
    return Mixup(
        mixup_alpha=0.0,
        cutmix_alpha=1.0 if share else 0.0,
        prob=share,
        label_smoothing=settings.smoothing,
        num_classes=classes,
    )


def prepare_layers(model: torch.nn.Module, layers: str) -> None:
    """Put a model in its state of training: all layers learn, or the head alone and nothing else moves."""
    if layers == "all":
        model.train()
        return
    model.eval().requires_grad_(False)
    for parameter in head_of(model):
        parameter.requires_grad_(True)


def accelerated(device: torch.device) -> Accelerator:
    """accelerate on a device, in mixed precision on a card."""
    if device.type == "cpu":
        return Accelerator(cpu=True)
    return Accelerator(mixed_precision="bf16" if torch.cuda.is_bf16_supported(False) else "fp16")


def train(
    network: Network,
    classes: int,
    real: Pictures,
    settings: TrainingSettings,
    seed: int,
    device: torch.device,
    generated: Pictures | None = None,
    share: float = 0.0,
) -> torch.nn.Module:
    """Train a classifier; on a CPU the same arguments give the same weights.

    Args:
        classes: K.
        share: of each batch that is generated; 0 trains on real pictures alone, by as many steps.

    Returns:
        the model, in evaluation mode: logits (B, K) of pictures that the network's transform prepared.

    Raises:
        WorkError: a loss is not finite, a picture cannot be read, or memory is short.
    """
    drawn = order_of(real, generated, share, settings, seed)
    transform = training_transform(network, settings)
    # Each draw has a seed of its own; those of two trainings never meet.
    loader = DataLoader(
        Draws(drawn, transform, seed * 2**32),
        batch_size=settings.batch_size,
        num_workers=settings.readers,
    )
    with seeded(seed), told_out_of_memory(device, "try a lower --batch_size"):
        model = network.new(classes, seed).to(memory_format=torch.channels_last)
        prepare_layers(model, settings.layers)
        return steps_of(model, loader, mixer(classes, settings), settings, accelerated(device))


def steps_of(
    model: torch.nn.Module,
    loader: DataLoader,
    mix: Mixup,
    settings: TrainingSettings,
    accelerator: Accelerator,
) -> torch.nn.Module:
    """The steps of a training: AdamW with a cosine schedule."""
    optimizer = create_optimizer_v2(
        model, opt="adamw", lr=settings.learning_rate, weight_decay=settings.weight_decay
    )
    warm_up = max(1, round(WARM_UP * settings.steps))
    schedule = CosineLRScheduler(optimizer, settings.steps, warmup_t=warm_up, t_in_epochs=False)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    total = torch.zeros((), device=accelerator.device)
    for step, (images, labels) in enumerate(loader):
        schedule.step_update(step + 1)
        images, targets = mix(images, labels)  # (B, 3, h, w), (B, K)
        logits = model(images.to(memory_format=torch.channels_last))  # (B, K)
        loss = F.cross_entropy(logits, targets)
        optimizer.zero_grad()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        total += loss.detach()
    model = accelerator.unwrap_model(model, keep_fp32_wrapper=False).eval()
    accelerator.free_memory()
    if not total.isfinite():
        raise WorkError("a loss was not finite; try a lower --learning_rate")
    return model


@torch.no_grad()
def logits_of(
    network: Network, model: torch.nn.Module, paths: list[Path], device: torch.device, readers: int = 0
) -> torch.Tensor:
    """Logits (N, K), float32 on the CPU, of pictures."""
    transform = create_transform(**network.data, is_training=False)
    drawn = [(path, 0) for path in paths]
    loader = DataLoader(Draws(drawn, transform, 0), batch_size=LOOKED_AT, num_workers=readers)
    with told_out_of_memory(device, "try a smaller --image_size"):
        found = [model(images.to(device)).float().cpu() for images, _ in loader]
    return torch.cat(found)
