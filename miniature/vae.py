"""Stage ``vae``: the AutoencoderKL of the miniature, 64x64x3 pixels to 16x16x4 latents."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL

from miniature.training import Trainee, renders, to_tensor

CONFIG = {
    "block_out_channels": (24, 48, 64),
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 8,
    "mid_block_add_attention": False,
    "sample_size": 64,
}
STEPS = 3000
BATCH = 16
LR = 2e-3
KL_WEIGHT = 1e-6


def psnr(vae: AutoencoderKL, images) -> float:
    """Mean over images of the peak signal-to-noise ratio in dB of the 8-bit reconstruction; images (B,
    64, 64, 3) uint8."""
    ratios = []
    for start in range(0, len(images), 50):
        pixels = to_tensor(images[start : start + 50], vae.device)  # (B, 3, 64, 64)
        decoded = vae.decode(vae.encode(pixels).latent_dist.mode()).sample.clamp(-1, 1)
        error = ((decoded - pixels) * 127.5).round().square().mean(dim=(1, 2, 3))  # (B,)
        ratios.append(10 * torch.log10(255**2 / error))
    return torch.cat(ratios).mean().item()


def train(work: Path, device: torch.device, renders_number: int, steps: int | None) -> None:
    """Train on scene renders; writes ``<work>/vae/`` with the latents' scale in its config."""
    torch.manual_seed(0)
    images = renders(work, "train", renders_number).images
    held_out = renders(work, "validation", 500).images
    trainee = Trainee({"vae": AutoencoderKL(**CONFIG).to(device)}, work, "vae", [(steps or STEPS, LR)])
    trainee.resume()
    vae = trainee.modules["vae"]
    average = trainee.average["vae"]
    while trainee.step < trainee.steps:
        rng = torch.Generator().manual_seed(trainee.step)
        pick = torch.randint(len(images), (BATCH,), generator=rng).sort().values.numpy()
        pixels = to_tensor(images[pick], device)  # (B, 3, 64, 64)
        with torch.autocast(device.type, torch.bfloat16):
            posterior = vae.encode(pixels).latent_dist
            decoded = vae.decode(posterior.sample()).sample.float()  # (B, 3, 64, 64)
        # Squared error is what PSNR counts; a little absolute error keeps outlines from going soft.
        loss = (decoded - pixels).square().mean() + 0.1 * (decoded - pixels).abs().mean()
        trainee.update(loss + KL_WEIGHT * posterior.kl().mean())
        if trainee.step % 250 == 0 or trainee.step == trainee.steps:
            with torch.no_grad():
                trainee.log(
                    f"step {trainee.step}/{trainee.steps} loss {loss.item():.4f} PSNR "
                    f"{psnr(average, held_out):.2f} dB"
                )
            trainee.save()
    with torch.no_grad():
        latents = average.encode(to_tensor(held_out, device)).latent_dist.mode()  # (500, 4, 16, 16)
    # Stable Diffusion's convention: scaled latents have unit variance.
    average.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    average.save_pretrained(work / "vae")
    trainee.log(
        f"scaling factor {average.config.scaling_factor}, latent means {latents.mean(dim=(0, 2, 3)).tolist()}"
    )
