"""The frozen parts of a text-to-image model: tokenizer, text encoder, UNet, VAE, scheduler; from a hub id or a folder."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from discriminative.diffusion.schedulers import load_scheduler
from discriminative.diffusion.sources import check_source, load_part
from discriminative.hub import LOCAL, Hub, check_keys


@dataclass
class DiffusionModels:
    """The five parts that a class token needs, frozen, on one device.

    ``dtype`` is the precision of UNet and VAE, but for what :meth:`bf16_without_gradient` covers. The text encoder stays in
    float32: it is small, and the token's gradient comes out of it. ``tiny_vae`` decodes the same latents as the VAE, worse and
    cheaper, where ``--tiny_vae`` names one.
    """

    tokenizer: Any
    text_encoder: Any
    unet: Any
    vae: Any
    scheduler: Any
    device: torch.device
    dtype: torch.dtype
    tiny_vae: Any = None
    coarse: bool = field(default=False, init=False)  # within bf16_without_gradient

    @property
    def vae_scale_factor(self) -> int:
        """Pixels per latent along each side (8 in SD 1.4)."""
        return vae_scale_factor(self.vae.config)

    @contextmanager
    def channels_last(self) -> Iterator[None]:
        """Within the block UNet and decoders have their channels last in memory: faster convolutions on a CPU, other rounding. A UNet
        that computes in bfloat16 (:meth:`bf16_without_gradient` comes first) stays as it is: its group norms are slow then.

        Images that are shown or measured are drawn outside, as the stock pipeline draws them. On CUDA, where nobody has measured
        it here, nothing changes.
        """
        unet = None if self.coarse else self.unet
        modules = [m for m in (unet, self.vae, self.tiny_vae) if m is not None and self.device.type == "cpu"]
        for module in modules:
            module.to(memory_format=torch.channels_last)
        try:
            yield
        finally:
            for module in modules:
                module.to(memory_format=torch.contiguous_format)

    @contextmanager
    def bf16_without_gradient(self, wanted: bool = True) -> Iterator[None]:
        """Within the block a UNet and decoders in float32 compute in bfloat16 where no gradient is wanted (:func:`trains_in_bf16`).

        What gradient flows through stays in float32: guidance and the first step's prediction multiply rounding by a hundred.
        """
        self.coarse = wanted and self.dtype == torch.float32
        try:
            yield
        finally:
            self.coarse = False

    @property
    def precision(self) -> str:
        """What UNet and decoders compute in, for the records."""
        return str(self.dtype).removeprefix("torch.") + (", bfloat16 without gradient" if self.coarse else "")

    def autocast(self) -> AbstractContextManager:
        """The precision of a call of UNet or decoder, by whether gradient is wanted of it."""
        return (
            torch.autocast("cpu", torch.bfloat16)
            if self.coarse and not torch.is_grad_enabled()
            else nullcontext()
        )

    def compile(self) -> None:
        """Have UNet and VAE decoder compiled for the shapes that they meet."""
        # A default run meets more than the usual number of shapes: three stages and drawing, with gradient and without.
        torch._dynamo.config.recompile_limit = 32
        for module in (self.unet, self.vae.decoder, *([self.tiny_vae.decoder] if self.tiny_vae else ())):
            module.compile(dynamic=False)

    def image_size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """Height and width in pixels, the model's own where None is given."""
        own = self.unet.config.sample_size * self.vae_scale_factor
        return height or own, width or own

    def latent_shape(self, height: int | None, width: int | None) -> tuple[int, int, int]:
        """Shape (channels, h, w) of one image's latents."""
        h, w = self.image_size(height, width)
        return self.unet.config.in_channels, h // self.vae_scale_factor, w // self.vae_scale_factor


def vae_scale_factor(vae_config) -> int:
    """Pixels per latent along each side, from a VAE's configuration."""
    return 2 ** (len(vae_config["block_out_channels"]) - 1)


def load_tokenizer(name: str, hub: Hub = LOCAL) -> Any:
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
        # transformers 5 makes an empty tokenizer then, and says nothing.
        if len(tokenizer) <= len(tokenizer.all_special_tokens) + 1:
            raise OSError("its tokenizer has no vocabulary")
        return tokenizer

    return load_part(name, hub, load)


def load_tiny_vae(name: str, device: torch.device, dtype: torch.dtype, hub: Hub = LOCAL) -> Any:
    """A small decoder, frozen.

    Args:
        name: a short name of ``TINY_VAES``, a hub id or a folder.

    Raises:
        UsageError: it cannot be fetched, or the folder is damaged.
    """
    from diffusers import AutoencoderTiny

    def load(source: str, **where):
        settings = where | {"torch_dtype": dtype, "use_safetensors": True, "output_loading_info": True}
        module, info = AutoencoderTiny.from_pretrained(source, **settings)
        check_keys(info["missing_keys"])
        return module

    return load_part(name, hub, load, "tiny_vae").requires_grad_(False).eval().to(device)


def load_models(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    checkpointed: tuple[str, ...] = (),
    scheduler_choice: str | None = None,
    hub: Hub = LOCAL,
) -> DiffusionModels:
    """Load the five parts, each once and from safetensors, frozen and in evaluation mode.

    Args:
        dtype: precision of UNet and VAE.
        checkpointed: which of "unet" and "vae" compute their activations again in the backward pass rather than keep them.
        scheduler_choice: a short name of ``SCHEDULERS``; None is the model's own.

    Raises:
        UsageError: the hub cannot be reached, or has no such model; or the folder is damaged.
    """
    import diffusers
    from transformers import CLIPTextModel

    tokenizer, scheduler = load_tokenizer(name, hub), load_scheduler(name, scheduler_choice, hub)

    parts = {
        "text_encoder": (CLIPTextModel, {"dtype": torch.float32}),
        "unet": (diffusers.UNet2DConditionModel, {"torch_dtype": dtype}),
        "vae": (diffusers.AutoencoderKL, {"torch_dtype": dtype}),
    }

    def load(source: str, **where) -> list:
        loaded = []
        for subfolder, (kind, precision) in parts.items():
            settings = where | precision | {"use_safetensors": True, "output_loading_info": True}
            module, info = kind.from_pretrained(source, subfolder=subfolder, **settings)
            check_keys(
                info["missing_keys"]
            )  # both libraries fill them in at random; what they do not use is old buffers
            loaded.append(module)
        return loaded

    text_encoder, unet, vae = load_part(name, hub, load)
    for module in (text_encoder, unet, vae):
        module.requires_grad_(False).eval().to(device)
    for part, module in {"unet": unet, "vae": vae}.items():
        if part in checkpointed:
            module.enable_gradient_checkpointing()
    return DiffusionModels(tokenizer, text_encoder, unet, vae, scheduler, device, dtype)
