"""Stages ``guide``, ``judge`` and ``judge2``: small timm classifiers of the world's classes, of different
families.

The guide's gradient trains tokens; the judge only ever evaluates; the second judge tells who is right
where these two part. All must know a class as the VAE and the UNet draw it, so half of what they see went
through the VAE, part of it with noise on the latents, and colours, sharpness and noise vary beyond what
renders do.
"""

from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from timm.models import save_for_hf
from torchvision.transforms.v2.functional import gaussian_blur

from discriminative.hub import MINIATURE
from miniature.scenes import CLASSES, SIZE
from miniature.training import Trainee, renders, to_tensor

# Architecture and its arguments as timm takes them, learning rate, seed, updates.
CLASSIFIERS = {
    "guide": ("resnet10t", {"channels": (32, 64, 128, 192)}, 2e-3, 2, 1200),
    "judge": ("xcit_nano_12_p8_224", {"depth": 4, "img_size": SIZE}, 1e-3, 3, 1200),
    "judge2": (
        "convnext_atto",
        {"depths": (2, 2, 2, 2), "dims": (32, 64, 96, 128), "patch_size": 2},
        2e-3,
        5,
        2400,
    ),
}
BATCH = 64
LABELLED_RENDERS = 44 * 500
LATENT_NOISE = 0.3  # greatest standard deviation of the noise on scaled latents; theirs is 1
MEAN = STD = (0.5, 0.5, 0.5)


def load_vae(work: Path, device: torch.device) -> tuple[AutoencoderKL, Path]:
    """The VAE of ``work``, frozen, or the one that ships where there is none; and the folder for what is made
    with it: beside the VAE, so that a new one makes new reconstructions."""
    built = (work / "vae").exists()
    folder = work / "vae" if built else MINIATURE / "model" / "vae"
    vae = AutoencoderKL.from_pretrained(folder, torch_dtype=torch.float32).to(device).eval()
    return vae.requires_grad_(False), folder if built else work


def kept_reconstructions(vae: AutoencoderKL, images, path: Path, device: torch.device) -> np.ndarray:
    """Reconstructions (N, 64, 64, 3) uint8 under noise of up to ``LATENT_NOISE``, made once and kept in a
    file."""
    if not path.exists():
        temporary = path.with_suffix(".tmp.npy")
        np.save(temporary, reconstructions(vae, images, LATENT_NOISE, device))
        temporary.rename(path)
    return np.load(path, mmap_mode="r")


@torch.no_grad()
def reconstructions(vae: AutoencoderKL, images, noise: float, device: torch.device) -> np.ndarray:
    """Renders through the VAE, (N, 64, 64, 3) uint8; half of them with Gaussian noise on the latents of
    up to ``noise``."""
    out = np.empty(images.shape, np.uint8)
    rng = torch.Generator().manual_seed(4)
    for start in range(0, len(images), 200):
        with torch.autocast(device.type, torch.bfloat16, enabled=noise > 0 and device.type == "cuda"):
            latents = vae.encode(
                to_tensor(images[start : start + 200], device)
            ).latent_dist.mode()  # (B, 4, 16, 16)
            sigma = (torch.rand(len(latents), 1, 1, 1, generator=rng) * 2 - 1).clamp(min=0) * noise
            disturbance = sigma * torch.randn(latents.shape, generator=rng) / vae.config.scaling_factor
            decoded = vae.decode(latents + disturbance.to(device)).sample
        pixels = ((decoded.float().clamp(-1, 1) + 1) * 127.5).round().byte()
        out[start : start + 200] = pixels.permute(0, 2, 3, 1).cpu().numpy()
    return out


def uniform(low: float, high: float, pixels: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """A number for each image, (B, 1, 1, 1)."""
    return (torch.rand(len(pixels), 1, 1, 1, generator=rng) * (high - low) + low).to(pixels.device)


def retouch(pixels: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """Vary saturation, contrast, brightness and sharpness of images (B, 3, 64, 64) in [-1, 1]; hues stay."""
    gray = pixels.mean(dim=1, keepdim=True)
    # Guidance exaggerates saturation.
    out = gray + (pixels - gray) * uniform(0.7, 1.5, pixels, rng)
    out = out * uniform(0.75, 1.25, pixels, rng) + uniform(-0.15, 0.15, pixels, rng)
    blurred = gaussian_blur(out, [5, 5], [torch.rand((), generator=rng).item() + 0.3])
    return torch.where(uniform(0, 1, pixels, rng) < 0.3, blurred, out)  # (B, 3, 64, 64)


def augment(pixels: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """Vary contrast, brightness, saturation, sharpness, place and noise of images (B, 3, 64, 64) in
    [-1, 1]."""
    out = retouch(pixels, rng)
    noise = torch.randn(out.shape, generator=rng).to(pixels.device)
    shift = torch.randint(-4, 5, (2,), generator=rng).tolist()
    out = F.pad(out, (4, 4, 4, 4), mode="replicate")[
        ..., 4 + shift[0] : 68 + shift[0], 4 + shift[1] : 68 + shift[1]
    ]
    return (out + noise * uniform(-0.1, 0.12, pixels, rng).clamp(min=0)).clamp(-1, 1)  # (B, 3, 64, 64)


@torch.no_grad()
def accuracy(model: torch.nn.Module, images, labels, device: torch.device) -> float:
    """Share of images (N, 64, 64, 3) uint8 whose top class is the label."""
    model.eval()
    right = [
        (
            model(to_tensor(images[i : i + 200], device)).argmax(1).cpu()
            == torch.as_tensor(labels[i : i + 200])
        ).float()
        for i in range(0, len(images), 200)
    ]
    return torch.cat(right).mean().item()


def train(name: str, work: Path, device: torch.device, steps: int | None) -> None:
    """Train one of the classifiers; writes ``<work>/<name>/`` in timm's hub layout.

    Where ``work`` has no VAE it takes the one that ships.
    """
    architecture, model_args, lr, seed, updates = CLASSIFIERS[name]
    torch.manual_seed(seed)
    images, *_, labels = renders(work, "train", LABELLED_RENDERS, labelled=True)
    held_out, *_, held_labels = renders(work, "validation", 44 * 20, labelled=True)
    vae, beside = load_vae(work, device)
    sources = (images, kept_reconstructions(vae, images, beside / "reconstructed.npy", device))
    held_decoded = reconstructions(vae, held_out, 0.0, device)
    model = timm.create_model(architecture, num_classes=len(CLASSES), **model_args).to(device)
    trainee = Trainee({name: model}, work, name, [(steps or updates, lr)])
    trainee.resume()
    while trainee.step < trainee.steps:
        rng = torch.Generator().manual_seed(1000 * seed + trainee.step)
        pick = torch.randint(len(images), (BATCH,), generator=rng).numpy()
        through_vae = torch.rand(BATCH, generator=rng).numpy() < 0.5
        batch = np.where(through_vae[:, None, None, None], sources[1][pick], sources[0][pick])
        model.train()
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = model(augment(to_tensor(batch, device), rng)).float()  # (B, 44)
        loss = F.cross_entropy(logits, torch.as_tensor(labels[pick]).to(device), label_smoothing=0.05)
        trainee.update(loss)
        if trainee.step % 200 == 0 or trainee.step == trainee.steps:
            clean, decoded = (
                accuracy(trainee.average[name], x, held_labels, device) for x in (held_out, held_decoded)
            )
            trainee.log(
                f"step {trainee.step}/{trainee.steps} loss {loss.item():.3f} renders {clean:.4f} "
                f"reconstructions {decoded:.4f}"
            )
            trainee.save()
    data_config = {
        "input_size": (3, SIZE, SIZE),
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "mean": MEAN,
        "std": STD,
    }
    labels_config = {"label_names": [c.label for c in CLASSES]}
    finished = trainee.average[name].half()
    save_for_hf(
        finished,
        work / name,
        labels_config,
        model_args=model_args,
        safe_serialization=True,
        data_config=data_config,
    )
