"""What a model's configuration files tell before any weight is loaded: sizes, and whether its parts fit the options and each other."""

from typing import NamedTuple

from discriminative.diffusion.models import vae_scale_factor
from discriminative.diffusion.schedulers import PREDICTION_TYPES, SCHEDULERS, load_scheduler
from discriminative.diffusion.sources import load_part
from discriminative.errors import UsageError
from discriminative.hub import LOCAL, Hub


def text_config(name: str, hub: Hub = LOCAL):
    """The text encoder's configuration.

    Raises:
        UsageError: it cannot be found or fetched.
    """
    from transformers import CLIPTextConfig

    return load_part(
        name,
        hub,
        lambda source, **where: CLIPTextConfig.from_pretrained(source, subfolder="text_encoder", **where),
    )


def text_width(name: str, hub: Hub = LOCAL) -> int:
    """Width of the text encoder's embeddings, from its configuration.

    Raises:
        UsageError: it cannot be found or fetched.
    """
    return text_config(name, hub).hidden_size


def unet_and_vae_config(name: str, hub: Hub = LOCAL) -> tuple[dict, dict]:
    """What the configuration files of UNet and VAE say.

    Raises:
        UsageError: they cannot be found or fetched.
    """
    from diffusers import AutoencoderKL, UNet2DConditionModel

    kinds = {"unet": UNet2DConditionModel, "vae": AutoencoderKL}
    return tuple(
        load_part(name, hub, lambda s, c=c, p=p, **where: c.load_config(s, subfolder=p, **where))
        for p, c in kinds.items()
    )


class Size(NamedTuple):
    """How large a model is, about, over SD 1.4 at 512x512, and what else is to be on a card."""

    activations: float  # of one image
    weights: float  # of UNet and VAE
    text_encoder: float = 0.492e9  # bytes, in float32, in which it always is
    others: float = 0.0  # bytes of judge, further guides and CLIP


SD_1_4 = Size(1.0, 1.0)


def relative_size(name: str, height: int | None, width: int | None, hub: Hub = LOCAL) -> Size:
    """How large a model and its images are, from its configuration files.

    Raises:
        UsageError: they cannot be found or fetched.
    """
    unet, vae = unet_and_vae_config(name, hub)
    h, w = (side / vae_scale_factor(vae) if side else unet["sample_size"] for side in (height, width))
    channels = unet["block_out_channels"][0] / 320
    return Size(h * w / (64 * 64) * channels, channels**2, text_encoder_bytes(name, hub))


def text_encoder_bytes(name: str, hub: Hub = LOCAL) -> float:
    """Bytes of the text encoder's weights in float32, from its configuration.

    Raises:
        UsageError: it cannot be found or fetched.
    """
    # By hand: the library's own count would import its models before the plan is told. tests/test_memory.py compares the two.
    text = text_config(name, hub)
    d, wide = text.hidden_size, text.intermediate_size
    layer = 4 * (d * d + d) + 2 * d * wide + wide + d + 4 * d  # attention, the two linear layers, two norms
    return 4.0 * (
        (text.vocab_size + text.max_position_embeddings) * d + text.num_hidden_layers * layer + 2 * d
    )


def check_sampling(
    name: str,
    height: int | None,
    width: int | None,
    asked_steps: list[tuple[str, int]],
    scheduler_choice: str | None = None,
    hub: Hub = LOCAL,
) -> None:
    """Check scheduler, sizes and step counts against the model's configuration files, before any weight is loaded.

    Args:
        asked_steps: flags, and the denoising steps that they ask for.

    Raises:
        UsageError: no text-to-image model; an unknown kind of scheduler; a side is not a multiple of what VAE and UNet halve
            it by; more steps than the schedule has.
    """
    unet, vae = unet_and_vae_config(name, hub)
    encoded = text_width(name, hub)
    if unet.get("addition_embed_type") or unet.get("cross_attention_dim") != encoded:
        raise UsageError(
            f"--model: the UNet of {name!r} does not take its one text encoder's output, {encoded} wide; "
            "allowed is a Stable Diffusion 1 or 2"
        )
    channels = {unet["in_channels"], unet["out_channels"], vae["latent_channels"]}
    if len(channels) > 1:
        raise UsageError(
            f"--model: the UNet of {name!r} takes {unet['in_channels']} channels and gives {unet['out_channels']}, its VAE has "
            f"{vae['latent_channels']}; allowed is a text-to-image model, where they agree"
        )
    multiple = vae_scale_factor(vae) * 2 ** (len(unet["block_out_channels"]) - 1)
    for flag, side in (("height", height), ("width", width)):
        if side is not None and side % multiple:
            raise UsageError(
                f"--{flag}: {side} was given; allowed is a multiple of {multiple} for this model"
            )
    scheduler = load_scheduler(name, scheduler_choice, hub)
    kind, prediction = type(scheduler).__name__, scheduler.config.prediction_type
    stochastic = str(scheduler.config.get("algorithm_type", "")).startswith("sde")
    if kind not in SCHEDULERS.values() or stochastic:
        kind = f"{kind} of the type {scheduler.config.algorithm_type}" if stochastic else kind
        raise UsageError(
            f"--model: the scheduler of {name!r} is a {kind}; allowed is --scheduler {' or '.join(SCHEDULERS)} instead"
        )
    if prediction not in PREDICTION_TYPES:
        raise UsageError(
            f"--model: {name!r} predicts {prediction!r}; allowed is {' or '.join(PREDICTION_TYPES)}"
        )
    most = scheduler.config.num_train_timesteps
    for flag, steps in asked_steps:
        if not 2 <= steps < most:
            raise UsageError(f"--{flag}: {steps} steps were given; allowed is 2 to {most - 1} for this model")


def check_tiny_vae(name: str, model: str, hub: Hub = LOCAL) -> None:
    """Check that a small decoder takes a model's latents, from their configuration files.

    Raises:
        UsageError: it cannot be found or fetched, or other latents are its own.
    """
    from diffusers import AutoencoderTiny

    tiny = load_part(
        name, hub, lambda source, **where: AutoencoderTiny.load_config(source, **where), "tiny_vae"
    )
    _, vae = unet_and_vae_config(model, hub)
    if tiny.get("_class_name") != "AutoencoderTiny":
        raise UsageError(
            f"--tiny_vae: {name!r} is a {tiny.get('_class_name')}; allowed is an AutoencoderTiny of diffusers"
        )
    takes = (
        tiny["latent_channels"],
        tiny["upsampling_scaling_factor"] ** (len(tiny["decoder_block_out_channels"]) - 1),
    )
    gives = vae["latent_channels"], vae_scale_factor(vae)
    if takes != gives:
        raise UsageError(
            f"--tiny_vae: {name!r} decodes {takes[0]} channels to {takes[1]} times the size; "
            f"allowed is {gives[0]} and {gives[1]} for this model"
        )
