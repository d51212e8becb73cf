"""The frozen parts of a text-to-image model: tokenizer, text encoder, UNet, VAE, scheduler; from a hub id or a folder."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from config import UsageError

MINIATURE = Path(__file__).parent / "miniature" / "weights"

# Short names; anything else is a hub id or a local folder in the diffusers layout.
MODELS = {
    "sd1.4": "CompVis/stable-diffusion-v1-4",
    "miniature": str(MINIATURE / "model"),
}
# Schedulers whose steps are deterministic and count on the training schedule's own timesteps, and what the UNet may predict.
SCHEDULERS = ("PNDMScheduler", "DDIMScheduler")
PREDICTION_TYPES = ("epsilon", "v_prediction")
# The classifier that a model brings along.
BROUGHT_CLASSIFIERS = {"miniature": "miniature"}


@dataclass
class DiffusionModels:
    """The five parts that a class token needs, frozen, on one device.

    ``dtype`` is the precision of UNet and VAE. The text encoder stays in float32: it is small, and the token's gradient
    comes out of it.
    """

    tokenizer: Any
    text_encoder: Any
    unet: Any
    vae: Any
    scheduler: Any
    device: torch.device
    dtype: torch.dtype

    @property
    def vae_scale_factor(self) -> int:
        """Pixels per latent along each side (8 in SD 1.4)."""
        return _vae_scale_factor(self.vae.config)

    def image_size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """Height and width in pixels, the model's own where None is given."""
        own = self.unet.config.sample_size * self.vae_scale_factor
        return height or own, width or own

    def latent_shape(self, height: int | None, width: int | None) -> tuple[int, int, int]:
        """Shape (channels, h, w) of one image's latents."""
        h, w = self.image_size(height, width)
        return self.unet.config.in_channels, h // self.vae_scale_factor, w // self.vae_scale_factor


def _vae_scale_factor(vae_config) -> int:
    return 2 ** (len(vae_config["block_out_channels"]) - 1)


def resolve_device(name: str) -> torch.device:
    """The device for ``--device``; "auto" takes CUDA where there is one.

    Raises:
        UsageError: CUDA was asked for and there is none.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return torch.device("cuda" if count else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= count:
        found = f"{count} CUDA devices" if count else "no CUDA device"
        raise UsageError(
            f"--device: {name!r} was given, but this machine has {found}; allowed is auto or cpu{' or cuda:N' if count else ''}"
        )
    return device


def resolve_dtype(mixed_precision: str, device: torch.device) -> torch.dtype:
    """Precision of UNet, VAE and classifier: "auto" is half on CUDA and float32 on the CPU."""
    if mixed_precision == "auto":
        mixed_precision = "fp16" if device.type == "cuda" else "no"
    if mixed_precision == "fp16" and device.type == "cpu":
        raise UsageError("--mixed_precision: 'fp16' was given on the CPU; allowed there is auto, no or bf16")
    return {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[mixed_precision]


def check_model(name: str) -> None:
    """Tell a mistyped model from a hub id before anything heavy is imported.

    Raises:
        UsageError: neither a short name, nor a folder with the five parts, nor of a hub id's form.
    """
    source = MODELS.get(name, name)
    folder = Path(source)
    if folder.is_dir():
        missing = [p for p in ("model_index.json", "tokenizer", "text_encoder", "unet", "vae", "scheduler") if not (folder / p).exists()]
        if missing:
            raise UsageError(f"--model: the folder {name!r} has no {', '.join(missing)}; allowed is a folder in the diffusers layout")
    elif name not in MODELS and (source.count("/") != 1 or source.startswith((".", "/", "~"))):
        known = ", ".join(MODELS)
        raise UsageError(f"--model: {name!r} was given; allowed is {known}, a hub id such as owner/name, or an existing folder")


def is_local(name: str) -> bool:
    """Whether a model's files are at hand without the hub."""
    return Path(MODELS.get(name, name)).is_dir()


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its kind where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _part(name: str, load):
    """``load(source)`` of one part of a model, its failures told in one line."""
    from huggingface_hub.utils import httpx
    from safetensors import SafetensorError

    source = MODELS.get(name, name)
    try:
        return load(source)
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError, httpx.HTTPError) as error:
        if Path(source).is_dir():
            raise UsageError(f"--model: the folder {name!r} could not be loaded: {first_line(error)}") from error
        raise UsageError(
            f"--model: {source!r} could not be fetched (no network, or no such model in safetensors?): {first_line(error)}; "
            "a local folder or --model miniature works without network"
        ) from error


def load_tokenizer(name: str) -> Any:
    """The tokenizer alone: enough to check words and prompts before any weight is loaded.

    Raises:
        UsageError: it cannot be found or fetched.
    """
    from transformers import CLIPTokenizer

    check_model(name)

    def load(source: str):
        tokenizer = CLIPTokenizer.from_pretrained(source, subfolder="tokenizer")
        # transformers 5 makes an empty tokenizer where it finds no vocabulary, and says nothing.
        if len(tokenizer) <= len(tokenizer.all_special_tokens) + 1:
            raise OSError("its tokenizer has no vocabulary")
        return tokenizer

    return _part(name, load)


def load_scheduler(name: str) -> Any:
    """The model's own scheduler, of the class that its index names.

    Raises:
        UsageError: it cannot be found or fetched.
    """
    import diffusers

    def load(source: str):
        index = diffusers.DiffusionPipeline.load_config(source)
        return getattr(diffusers, index["scheduler"][1]).from_pretrained(source, subfolder="scheduler")

    return _part(name, load)


def check_sampling(name: str, height: int | None, width: int | None, num_inference_steps: int, gradient_steps: int) -> None:
    """Check scheduler, sizes and step counts against the model's configuration files, before any weight is loaded.

    Raises:
        UsageError: no text-to-image model; an unknown kind of scheduler; a side is not a multiple of what VAE and UNet halve
            it by; more steps than the schedule or its list has.
    """
    from diffusers import AutoencoderKL, UNet2DConditionModel

    unet, vae = (
        _part(name, lambda s, c=c, p=p: c.load_config(s, subfolder=p)) for c, p in ((UNet2DConditionModel, "unet"), (AutoencoderKL, "vae"))
    )
    channels = {unet["in_channels"], unet["out_channels"], vae["latent_channels"]}
    if len(channels) > 1:
        raise UsageError(
            f"--model: the UNet of {name!r} takes {unet['in_channels']} channels and gives {unet['out_channels']}, its VAE has "
            f"{vae['latent_channels']}; allowed is a text-to-image model, where they agree"
        )
    multiple = _vae_scale_factor(vae) * 2 ** (len(unet["block_out_channels"]) - 1)
    for flag, side in (("height", height), ("width", width)):
        if side is not None and side % multiple:
            raise UsageError(f"--{flag}: {side} was given; allowed is a multiple of {multiple} for this model")
    scheduler = load_scheduler(name)
    kind, prediction = type(scheduler).__name__, scheduler.config.prediction_type
    if kind not in SCHEDULERS or prediction not in PREDICTION_TYPES:
        known = f"{' or '.join(SCHEDULERS)} that predicts {' or '.join(PREDICTION_TYPES)}"
        raise UsageError(f"--model: the scheduler of {name!r} is a {kind} that predicts {prediction!r}; allowed is a {known}")
    most = scheduler.config.num_train_timesteps
    if not 2 <= num_inference_steps < most:
        raise UsageError(f"--num_inference_steps: {num_inference_steps} was given; allowed is 2 to {most - 1} for this model")
    scheduler.set_timesteps(num_inference_steps)
    if gradient_steps > len(scheduler.timesteps):
        raise UsageError(
            f"--gradient_steps: {gradient_steps} was given; allowed is 1 to {len(scheduler.timesteps)}, the scheduler's own list"
        )


def load_models(name: str, device: torch.device, dtype: torch.dtype, gradient_checkpointing: bool = False) -> DiffusionModels:
    """Load the five parts, each once and from safetensors, frozen and in evaluation mode.

    Args:
        dtype: precision of UNet and VAE.
        gradient_checkpointing: of UNet and VAE, in the steps with gradient.

    Raises:
        UsageError: the hub cannot be reached, or has no such model; or the folder is damaged.
    """
    import diffusers
    from transformers import CLIPTextModel

    tokenizer, scheduler = load_tokenizer(name), load_scheduler(name)

    def load(source: str) -> tuple:
        safe = {"use_safetensors": True}
        text_encoder = CLIPTextModel.from_pretrained(source, subfolder="text_encoder", dtype=torch.float32, **safe)
        unet = diffusers.UNet2DConditionModel.from_pretrained(source, subfolder="unet", torch_dtype=dtype, **safe)
        vae = diffusers.AutoencoderKL.from_pretrained(source, subfolder="vae", torch_dtype=dtype, **safe)
        return text_encoder, unet, vae

    text_encoder, unet, vae = _part(name, load)
    for module in (text_encoder, unet, vae):
        module.requires_grad_(False).eval().to(device)
    if gradient_checkpointing:
        unet.enable_gradient_checkpointing()
        vae.enable_gradient_checkpointing()
    return DiffusionModels(tokenizer, text_encoder, unet, vae, scheduler, device, dtype)
