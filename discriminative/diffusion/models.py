"""The frozen parts of a text-to-image model: tokenizer, text encoder, UNet, VAE, scheduler; from a hub id
or a folder."""

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from packaging.version import Version
from tqdm import tqdm

from discriminative.diffusion.schedulers import fresh_scheduler, load_scheduler
from discriminative.diffusion.sources import check_source, load_part
from discriminative.errors import UsageError
from discriminative.hub import check_keys
from discriminative.precision import exact_float32


@dataclass
class DiffusionModels:
    """The five parts that a class token needs, frozen, on one device.

    ``dtype`` is the precision of UNet and VAE; ``precision.py`` tells the rest. ``tiny_vae`` decodes the
    same latents as the VAE, worse and cheaper, where ``--tiny_vae`` names one.
    """

    tokenizer: Any
    text_encoder: Any
    unet: Any
    vae: Any
    scheduler: Any
    device: torch.device
    dtype: torch.dtype
    tiny_vae: Any = None
    fits: dict[str, int] = field(default_factory=dict)  # see memory.Batches; copies for other tokens share it
    is_compiled: bool = False
    # What is computed in where no gradient is wanted, set by precision.coarse_without_gradient; None: dtype.
    coarse_dtype: torch.dtype | None = field(default=None, init=False)

    @property
    def vae_scale_factor(self) -> int:
        """Pixels per latent along each side (8 in SD 1.4)."""
        return vae_scale_factor(self.vae.config)

    def compile(self) -> None:
        """Have UNet and VAE decoder compiled for the shapes that they meet."""
        # Three stages and sampling, with gradient and without.
        torch._dynamo.config.recompile_limit = 32
        for module in (self.unet, self.vae.decoder):
            module.compile(dynamic=False)
        self.is_compiled = True

    def fresh_tokenizer(self) -> Any:
        """A tokenizer of one's own, which knows no other class's word."""
        return copy.deepcopy(self.tokenizer)

    def image_size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """Height and width in pixels, the model's own where None is given."""
        return image_size(self.unet.config, self.vae.config, height, width)

    def latent_shape(self, height: int | None, width: int | None) -> tuple[int, int, int]:
        """Shape (channels, h, w) of one image's latents."""
        h, w = self.image_size(height, width)
        return self.unet.config.in_channels, h // self.vae_scale_factor, w // self.vae_scale_factor


def own_latent_size(unet_config) -> tuple[int, int] | None:
    """Height and width of a UNet's own latents, from its configuration; None where it names no size."""
    size = unet_config["sample_size"]
    if not isinstance(size, int):
        return tuple(size) if size else None
    # As the stock pipeline mends old configurations.
    if size < 64 and Version(unet_config.get("_diffusers_version", "1")) < Version("0.9.0.dev0"):
        size = 64
    return size, size


def vae_scale_factor(vae_config) -> int:
    """Pixels per latent along each side, from a VAE's configuration."""
    return 2 ** (len(vae_config["block_out_channels"]) - 1)


def image_size(unet_config, vae_config, height: int | None, width: int | None) -> tuple[int, int]:
    """Height and width of images in pixels, the model's own where None is given."""
    own = own_latent_size(unet_config)  # None only where both are given: inspect.check_sampling
    h, w = (side * vae_scale_factor(vae_config) for side in own or (0, 0))
    return height or h, width or w


def load_tokenizer(name: str) -> Any:
    """The tokenizer alone: enough to check words and prompts before any weight is loaded.

    Raises:
        UsageError: it cannot be found or fetched.
    """
    from transformers import CLIPTokenizer

    check_source(name)

    def load(source: str, **where):
        try:
            tokenizer = CLIPTokenizer.from_pretrained(source, subfolder="tokenizer", **where)
        except (TypeError, ImportError) as error:  # of transformers 4 where it finds no vocabulary
            raise OSError("its tokenizer has no vocabulary") from error
        # transformers 5 silently makes an empty one.
        if len(tokenizer) <= len(tokenizer.all_special_tokens) + 1:
            raise OSError("its tokenizer has no vocabulary")
        return tokenizer

    return load_part(name, load)


def load_weights(kind: Any, source: str, **settings) -> Any:
    """A module with its weights from safetensors; where there are only those in half precision, from them.

    Args:
        kind: a model's class of diffusers or transformers.

    Raises:
        OSError: there are none.
        ValueError: one is missing.
    """
    settings = settings | {"use_safetensors": True, "output_loading_info": True}
    try:
        module, info = kind.from_pretrained(source, **settings)
    except OSError as error:
        if "file named" not in str(error):  # so both libraries say that a file is missing
            raise
        try:
            module, info = kind.from_pretrained(source, variant="fp16", **settings)
        except OSError:
            raise error from None
        place = "/".join([source, settings.get("subfolder", "")]).rstrip("/")
        tqdm.write(f"note: {place} has its weights in half precision only (fp16.safetensors); they are taken")
    # Both libraries fill them in at random; what they do not use is old buffers.
    check_keys(info["missing_keys"])
    return module


def load_tiny_vae(name: str, device: torch.device, dtype: torch.dtype) -> Any:
    """A small decoder, frozen.

    Args:
        name: a short name of ``TINY_VAES``, a hub id or a folder.

    Raises:
        UsageError: it cannot be fetched, or the folder is damaged.
    """
    from diffusers import AutoencoderTiny

    def load(source: str, **where):
        return load_weights(AutoencoderTiny, source, **where, torch_dtype=dtype)

    return load_part(name, load, "tiny_vae").requires_grad_(False).eval().to(device)


def load_models(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    checkpointed: tuple[str, ...] = (),
    scheduler_choice: str | None = None,
) -> DiffusionModels:
    """Load the five parts, each once and from safetensors, frozen and in evaluation mode.

    Args:
        dtype: precision of UNet and VAE.
        checkpointed: which of "unet" and "vae" compute their activations again in the backward pass
            rather than keep them.
        scheduler_choice: a short name of ``SCHEDULERS``; None is the model's own.

    Raises:
        UsageError: the hub cannot be reached, or has no such model; or the folder is damaged.
    """
    import diffusers
    from transformers import CLIPTextModel

    tokenizer = load_tokenizer(name)
    scheduler = load_scheduler(name, scheduler_choice)

    parts = {
        "text_encoder": (CLIPTextModel, {"dtype": torch.float32}),
        "unet": (diffusers.UNet2DConditionModel, {"torch_dtype": dtype}),
        "vae": (diffusers.AutoencoderKL, {"torch_dtype": dtype}),
    }

    def load(source: str, **where) -> list:
        loaded = []
        for subfolder, (kind, precision) in parts.items():
            loaded.append(load_weights(kind, source, subfolder=subfolder, **where, **precision))
        return loaded

    text_encoder, unet, vae = load_part(name, load)
    for module in (text_encoder, unet, vae):
        module.requires_grad_(False).eval().to(device)
    exact_float32(dtype)
    for part, module in {"unet": unet, "vae": vae}.items():
        if part in checkpointed:
            module.enable_gradient_checkpointing()
    return DiffusionModels(tokenizer, text_encoder, unet, vae, scheduler, device, dtype)


def models_of(pipeline: Any, scheduler_choice: str | None = None) -> DiffusionModels:
    """The parts of a Stable Diffusion pipeline of diffusers, frozen and in evaluation mode.

    They are shared, but for a text encoder in half precision, of which a copy in float32 is made.

    Args:
        scheduler_choice: a short name of ``SCHEDULERS``; None is the pipeline's own.

    Raises:
        UsageError: the pipeline has not the parts of Stable Diffusion 1 or 2.
    """
    parts = ("tokenizer", "text_encoder", "unet", "vae", "scheduler")
    missing = [part for part in parts if getattr(pipeline, part, None) is None]
    if missing or getattr(pipeline, "text_encoder_2", None) is not None:
        kind = type(pipeline).__name__
        raise UsageError(
            f"model: a {kind} was given; allowed is a Stable Diffusion 1 or 2 pipeline, or a name"
        )
    tokenizer, text_encoder, unet, vae, scheduler = (getattr(pipeline, part) for part in parts)
    if text_encoder.dtype != torch.float32:
        text_encoder = copy.deepcopy(text_encoder).float()
    for module in (text_encoder, unet, vae):
        module.requires_grad_(False).eval()
    exact_float32(unet.dtype)
    scheduler = fresh_scheduler(scheduler, scheduler_choice)
    return DiffusionModels(tokenizer, text_encoder, unet, vae, scheduler, unet.device, unet.dtype)
