"""Finished latents on disk: images that no token decides are sampled once, and decoded again."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from discriminative import VERSION
from discriminative.diffusion.models import DiffusionModels
from discriminative.diffusion.sampler import decode_in_parts, finished_latents
from discriminative.diffusion.schedulers import TRAINING_SPACING, fresh_scheduler
from discriminative.errors import WorkError
from discriminative.precision import precision_name
from discriminative.records.environment import device_name, versions
from discriminative.records.files import write_tensors
from discriminative.settings import SamplerSettings

FORMAT = 1  # of the files and of what their names are made of
NAME = "latents"  # of the one tensor in a file
LIBRARIES = ("torch", "diffusers")  # whose versions change an image's last bits


class KeptLatents:
    """A folder of finished latents, a file a batch, named by a hash of all that they depend on.

    A batch is kept and read as a whole, because on a CPU rounding depends on which images are sampled
    together. So images are the same bit for bit, whether they were kept or not. The first 96 seeds of 100
    and of 200 stand in the same batches of 12 and are shared; a batch of other seeds is sampled anew.

    Several processes and machines may share the folder. A file is written beside its name and renamed. One
    that is damaged, or says something else than was asked for, is noted and replaced. Where nothing can be
    written, that is noted once, and nothing is kept from then on. Images that are not finite are not kept.

    Args:
        folder: where they are kept; made with the first file.
        unet: the UNet's :func:`weights_fingerprint`.
    """

    def __init__(self, folder: Path, unet: str):
        self.folder = folder
        self.unet = unet
        self.is_writable = True

    @torch.no_grad()
    def sample(
        self,
        models: DiffusionModels,
        cond: torch.Tensor,
        uncond: torch.Tensor,
        seeds: list[int],
        settings: SamplerSettings,
    ) -> torch.Tensor:
        """What :func:`sampler.sample` gives, images (B, 3, H, W), from kept latents where they are there."""
        shape = (len(seeds), *models.latent_shape(settings.height, settings.width))
        origin = self.origin(models, cond, uncond, seeds, settings)
        said = json.dumps(origin, sort_keys=True, default=str)
        name = hashlib.sha256(said.encode()).hexdigest()
        path = self.folder / name[:2] / f"{name}.safetensors"
        kept = self.read(path, said, shape)
        if kept is not None:
            return decode_in_parts(models, kept.to(models.device), settings)
        latents = finished_latents(models, cond, uncond, seeds, settings).contiguous()  # (B, C, h, w)
        images = decode_in_parts(models, latents, settings)
        if latents.isfinite().all() and images.isfinite().all():
            self.write(path, latents.cpu(), said)
        return images

    def origin(
        self,
        models: DiffusionModels,
        cond: torch.Tensor,
        uncond: torch.Tensor,
        seeds: list[int],
        settings: SamplerSettings,
    ) -> dict[str, Any]:
        """All that a batch's latents depend on.

        Prompts are there as what the text encoder made of them, so its weights and the tokenizer's are, too.
        """
        scheduler = fresh_scheduler(models.scheduler, settings.scheduler, spacing=TRAINING_SPACING)
        return {
            "format": FORMAT,
            "versions": {"discriminative": VERSION} | {name: versions()[name] for name in LIBRARIES},
            "device": arithmetic(models.device),
            "precision": precision_name(models),
            "compiled": models.is_compiled,
            "unet": self.unet,
            "scheduler": type(scheduler).__name__,
            "scheduler_config": public(scheduler.config),
            "num_inference_steps": settings.num_inference_steps,
            "guidance_weight": settings.guidance_weight,
            "latent_shape": models.latent_shape(settings.height, settings.width),
            "prompts": fingerprint(cond),
            "empty_prompt": fingerprint(uncond),
            "seeds": seeds,
        }

    def read(self, path: Path, said: str, shape: tuple[int, ...]) -> torch.Tensor | None:
        """The latents (B, C, h, w) of a file on the CPU; None where there is none that can be trusted.

        Args:
            said: the origin that it must name.
        """
        try:
            if not path.exists():
                return None
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                latents = file.get_tensor(NAME).clone()
        except (SafetensorError, OSError):
            metadata = {}
            latents = torch.empty(0)
        is_whole = metadata.get("sha256") == fingerprint(latents) and latents.shape == shape
        if is_whole and metadata.get("origin") == said:
            return latents
        tqdm.write(f"note: {path} cannot be read, or is not as it was written; its images are sampled anew")
        return None

    def write(self, path: Path, latents: torch.Tensor, said: str) -> None:
        """Keep latents (B, C, h, w); a disk that refuses is noted, once."""
        if not self.is_writable:
            return
        try:
            write_tensors(path, {NAME: latents}, {"origin": said, "sha256": fingerprint(latents)})
        except WorkError as error:
            self.is_writable = False
            tqdm.write(f"note: {error}; images without the token are not kept for other classes and runs")


def arithmetic(device: torch.device) -> list:
    """What decides a device's rounding: its name, of a CPU also the instructions and threads in use."""
    if device.type != "cpu":
        return [device_name(device)]
    return [device_name(device), torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()]


def public(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration of diffusers without its own notes, such as the folder that it came from."""
    return {name: value for name, value in config.items() if not name.startswith("_")}


def fingerprint(tensor: torch.Tensor) -> str:
    """A hash of a tensor's shape, type and bits."""
    found = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    found.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def weights_fingerprint(module: Any) -> str:
    """A hash of a frozen module of diffusers: its configuration and all its weights.

    SD 1.4's UNet has 1.7 GB in half precision, some seconds; so it is taken once.
    """
    found = hashlib.sha256(json.dumps(public(module.config), sort_keys=True, default=str).encode())
    for name, tensor in module.state_dict().items():
        found.update(f"{name} {fingerprint(tensor)}".encode())
    return found.hexdigest()
