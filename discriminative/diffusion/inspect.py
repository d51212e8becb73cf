"""What a model's configuration files say before any weight is loaded: sizes, and whether its parts fit."""

from dataclasses import dataclass
from typing import Any, NamedTuple

from discriminative.diffusion.models import DiffusionModels, load_tokenizer, vae_scale_factor
from discriminative.diffusion.schedulers import PREDICTION_TYPES, SCHEDULERS, load_scheduler
from discriminative.diffusion.sources import load_part
from discriminative.errors import UsageError


@dataclass
class ModelConfigs:
    """A model's small files.

    Args:
        name: for errors.
        unet: configuration of the UNet.
        vae: of the VAE.
        text_encoder: of the text encoder, a ``CLIPTextConfig``.
        tokenizer: a copy that may learn words.
        scheduler: of the images that are shown.
    """

    name: str
    unet: Any
    vae: Any
    text_encoder: Any
    tokenizer: Any
    scheduler: Any

    @property
    def width(self) -> int:
        """Width of the text encoder's embeddings."""
        return self.text_encoder.hidden_size


def read_configs(name: str, scheduler: str | None = None) -> ModelConfigs:
    """The configuration files of a model, a short name, hub id or folder.

    Args:
        scheduler: a short name of ``SCHEDULERS``; None is the model's own.

    Raises:
        UsageError: they cannot be found or fetched.
    """
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig

    def config(kind, part: str) -> dict:
        return load_part(name, lambda source, **where: kind.load_config(source, subfolder=part, **where))

    text_encoder = load_part(
        name,
        lambda source, **where: CLIPTextConfig.from_pretrained(source, subfolder="text_encoder", **where),
    )
    unet = config(UNet2DConditionModel, "unet")
    vae = config(AutoencoderKL, "vae")
    return ModelConfigs(name, unet, vae, text_encoder, load_tokenizer(name), load_scheduler(name, scheduler))


def configs_of(models: DiffusionModels, name: str) -> ModelConfigs:
    """The configurations of models that are loaded; ``name`` is for errors."""
    return ModelConfigs(
        name,
        dict(models.unet.config),
        dict(models.vae.config),
        models.text_encoder.config,
        models.fresh_tokenizer(),
        models.scheduler,
    )


class Size(NamedTuple):
    """How large a model is, about, over SD 1.4 at 512x512, and what else is to be on a card."""

    activations: float  # of one image
    weights: float  # of UNet and VAE
    text_encoder: float = 0.492e9  # bytes, in float32, in which it always is
    others: float = 0.0  # bytes of judge, further guides and CLIP


SD_1_4 = Size(1.0, 1.0)


def relative_size(configs: ModelConfigs, height: int | None, width: int | None) -> Size:
    """How large a model and its images of ``height`` and ``width`` pixels (None: its own) are."""
    factor = vae_scale_factor(configs.vae)
    h, w = (side / factor if side else configs.unet["sample_size"] for side in (height, width))
    channels = configs.unet["block_out_channels"][0] / 320
    return Size(h * w / (64 * 64) * channels, channels**2, text_encoder_bytes(configs.text_encoder))


def text_encoder_bytes(text) -> float:
    """Bytes of the text encoder's weights in float32, from its configuration."""
    # By hand: the library's count imports its models (compared in test_memory).
    d = text.hidden_size
    wide = text.intermediate_size
    layer = 4 * (d * d + d) + 2 * d * wide + wide + d + 4 * d  # attention, the two linear layers, two norms
    embeddings = (text.vocab_size + text.max_position_embeddings) * d
    return 4.0 * (embeddings + text.num_hidden_layers * layer + 2 * d)


def check_parts(configs: ModelConfigs) -> None:
    """Check that a model's parts fit each other.

    Raises:
        UsageError: no text-to-image model with one text encoder, or a kind of scheduler that is not known.
    """
    unet = configs.unet
    if unet.get("addition_embed_type") or unet.get("cross_attention_dim") != configs.width:
        raise UsageError(
            f"--model: the UNet of {configs.name!r} does not take its one text encoder's output, "
            f"{configs.width} wide; allowed is a Stable Diffusion 1 or 2"
        )
    channels = {unet["in_channels"], unet["out_channels"], configs.vae["latent_channels"]}
    if len(channels) > 1:
        raise UsageError(
            f"--model: the UNet of {configs.name!r} takes {unet['in_channels']} channels and gives "
            f"{unet['out_channels']}, its VAE has {configs.vae['latent_channels']}; "
            "allowed is a text-to-image model, where they agree"
        )
    check_scheduler(configs.name, configs.scheduler)


def check_scheduler(name: str, scheduler) -> None:
    """Check that a scheduler is deterministic, and of a known kind and prediction.

    Raises:
        UsageError: it is not.
    """
    kind = type(scheduler).__name__
    prediction = scheduler.config.prediction_type
    stochastic = str(scheduler.config.get("algorithm_type", "")).startswith("sde")
    if kind not in SCHEDULERS.values() or stochastic:
        kind = f"{kind} of the type {scheduler.config.algorithm_type}" if stochastic else kind
        allowed = f"--scheduler {' or '.join(SCHEDULERS)} instead"
        raise UsageError(f"--model: the scheduler of {name!r} is a {kind}; allowed is {allowed}")
    if prediction not in PREDICTION_TYPES:
        allowed = " or ".join(PREDICTION_TYPES)
        raise UsageError(f"--model: {name!r} predicts {prediction!r}; allowed is {allowed}")


def check_sampling(
    configs: ModelConfigs, height: int | None, width: int | None, asked_steps: list[tuple[str, int]]
) -> None:
    """Check sizes and step counts against a model's configurations.

    Args:
        height: in pixels; None is the model's own, as for ``width``.
        asked_steps: flags, and the denoising steps that they ask for.

    Raises:
        UsageError: a side is not a multiple of what VAE and UNet halve it by; more steps than the
            schedule has.
    """
    multiple = vae_scale_factor(configs.vae) * 2 ** (len(configs.unet["block_out_channels"]) - 1)
    for flag, side in (("height", height), ("width", width)):
        if side is not None and side % multiple:
            raise UsageError(
                f"--{flag}: {side} was given; allowed is a multiple of {multiple} for this model"
            )
    most = configs.scheduler.config.num_train_timesteps
    for flag, steps in asked_steps:
        if not 2 <= steps < most:
            raise UsageError(f"--{flag}: {steps} steps were given; allowed is 2 to {most - 1} for this model")


def check_tiny_vae(name: str, configs: ModelConfigs) -> None:
    """Check that a small decoder takes a model's latents, from their configuration files.

    Raises:
        UsageError: it cannot be found or fetched, or other latents are its own.
    """
    from diffusers import AutoencoderTiny

    tiny = load_part(name, lambda source, **where: AutoencoderTiny.load_config(source, **where), "tiny_vae")
    kind = tiny.get("_class_name")
    if kind != "AutoencoderTiny":
        raise UsageError(f"--tiny_vae: {name!r} is a {kind}; allowed is an AutoencoderTiny of diffusers")
    halvings = len(tiny["decoder_block_out_channels"]) - 1
    takes = tiny["latent_channels"], tiny["upsampling_scaling_factor"] ** halvings
    gives = configs.vae["latent_channels"], vae_scale_factor(configs.vae)
    if takes != gives:
        raise UsageError(
            f"--tiny_vae: {name!r} decodes {takes[0]} channels to {takes[1]} times the size; "
            f"allowed is {gives[0]} and {gives[1]} for this model"
        )
