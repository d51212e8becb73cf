"""What a model's configuration files say before any weight is loaded: sizes, and whether its parts fit."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from discriminative.diffusion.models import DiffusionModels, load_tokenizer, own_latent_size, vae_scale_factor
from discriminative.diffusion.schedulers import (
    PREDICTION_TYPES,
    SCHEDULERS,
    fresh_scheduler,
    load_scheduler,
)
from discriminative.diffusion.sources import FOREIGN_ERRORS, load_part
from discriminative.errors import UsageError
from discriminative.hub import one_line

# The classes of Stable Diffusion 1 and 2, as model_index.json names them.
KINDS = {
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
    "text_encoder": ("CLIPTextModel",),
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL",),
}


class Bar(NamedTuple):
    """A value of a configuration's field that nothing here can draw or learn with."""

    field: str
    why: str
    bars: Callable[[Any, Mapping], bool] = lambda value, config: value not in (None, False)


NO_INPUT = "takes an input beside text and time"
QUANTIZED = Bar("quantization_config", "is quantized, and no gradient would flow")
# By part. All other fields work as in the stock pipeline.
BARRED = {
    "unet": (
        *(Bar(field, NO_INPUT) for field in ("addition_embed_type", "class_embed_type", "num_class_embeds")),
        *(Bar(field, NO_INPUT) for field in ("encoder_hid_dim", "encoder_hid_dim_type")),
        Bar("time_cond_proj_dim", "is distilled: the guidance is an input"),
        QUANTIZED,
    ),
    "vae": (Bar("out_channels", "gives no RGB images", lambda value, config: value != 3), QUANTIZED),
    "text_encoder": (Bar("use_attention_mask", "masks the padding, as no CLIP does"), QUANTIZED),
    "scheduler": (
        Bar("thresholding", "clips latents, which is for models of pixels"),
        Bar("use_flow_sigmas", "is for a model of flows"),
        Bar("variance_type", "expects a variance beside the prediction"),
        Bar(
            "rescale_betas_zero_snr",
            "divides by a signal of zero",
            lambda value, config: value and config["prediction_type"] == "epsilon",
        ),
    ),
}


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
        UsageError: they cannot be found or fetched, or a part is of a class that is not Stable Diffusion's.
    """
    from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig

    def config(kind, part: str) -> dict:
        given = load_part(name, lambda source, **where: kind.load_config(source, subfolder=part, **where))
        parameters = inspect.signature(kind.__init__).parameters.values()
        return {p.name: p.default for p in parameters if p.default is not p.empty} | dict(given)

    text_encoder = load_part(
        name,
        lambda source, **where: CLIPTextConfig.from_pretrained(source, subfolder="text_encoder", **where),
    )
    unet = config(UNet2DConditionModel, "unet")
    vae = config(AutoencoderKL, "vae")
    index = load_part(name, lambda source, **where: DiffusionPipeline.load_config(source, **where))
    check_kinds(name, {part: (index.get(part) or (None, None))[1] for part in KINDS})
    tokenizer = load_tokenizer(name)
    return ModelConfigs(name, unet, vae, text_encoder, tokenizer, load_scheduler(name, scheduler))


def configs_of(models: DiffusionModels, name: str) -> ModelConfigs:
    """The configurations of models that are loaded; ``name`` is for errors.

    Raises:
        UsageError: a part is of a class that is not Stable Diffusion's.
    """
    parts = {part: getattr(models, part) for part in KINDS}
    # torch.compile wraps modules.
    kinds = {part: type(getattr(module, "_orig_mod", module)).__name__ for part, module in parts.items()}
    check_kinds(name, kinds)
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
    own = own_latent_size(configs.unet) or (0, 0)
    h = height / factor if height else own[0]
    w = width / factor if width else own[1]
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


def check_kinds(name: str, kinds: dict[str, str]) -> None:
    """Check that the parts of a model, by their classes, are Stable Diffusion's.

    Raises:
        UsageError: one is not.
    """
    for part, kind in kinds.items():
        if kind not in KINDS[part]:
            raise UsageError(
                f"--model: the {part} of {name!r} is a {kind}; allowed is a {KINDS[part][0]}, as "
                "Stable Diffusion 1 and 2 have"
            )


def check_parts(configs: ModelConfigs) -> None:
    """Check that a model's parts fit each other.

    Raises:
        UsageError: no text-to-image model with one text encoder, or a kind of scheduler that is not known.
    """
    unet = configs.unet
    text_encoder = configs.text_encoder.to_dict()
    for part, config in {"unet": unet, "vae": configs.vae, "text_encoder": text_encoder}.items():
        check_fields(configs.name, part, config)
    widths = unet["cross_attention_dim"]
    if {*(widths if isinstance(widths, list | tuple) else [widths])} != {configs.width}:
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
    check_tokenizer(configs)
    check_scheduler(configs.name, configs.scheduler)


def check_fields(name: str, part: str, config: Mapping) -> None:
    """Check that a part's configuration has no value that is barred.

    Raises:
        UsageError: it has one.
    """
    for field, why, bars in BARRED[part]:
        value = config.get(field)
        if field in config and bars(value, config):
            raise UsageError(
                f"--model: the {part} of {name!r} has {field} {value!r}, so it {why}; "
                "allowed is a Stable Diffusion 1 or 2"
            )


def check_tokenizer(configs: ModelConfigs) -> None:
    """Check that the text encoder takes what the tokenizer gives.

    Raises:
        UsageError: the tokenizer has more words, or longer prompts.
    """
    text = configs.text_encoder
    words = 1 + max(configs.tokenizer.get_vocab().values())
    length = configs.tokenizer.model_max_length
    for found, most, what in (
        (words, text.vocab_size, "words"),
        (length, text.max_position_embeddings, "tokens a prompt (model_max_length)"),
    ):
        if found > most:
            raise UsageError(
                f"--model: the tokenizer of {configs.name!r} has {found} {what}, its text encoder {most}; "
                "allowed is the tokenizer that the text encoder was trained with"
            )


def check_scheduler(name: str, scheduler) -> None:
    """Check that a scheduler is deterministic, and of a known kind and prediction.

    Raises:
        UsageError: it is not.
    """
    kind = type(scheduler).__name__
    prediction = scheduler.config.get("prediction_type")
    stochastic = str(scheduler.config.get("algorithm_type", "")).startswith("sde")
    if kind not in SCHEDULERS.values() or stochastic:
        kind = f"{kind} of the type {scheduler.config.algorithm_type}" if stochastic else kind
        instead = f"--scheduler {' or '.join(SCHEDULERS)} instead"
        allowed = instead if "beta_schedule" in scheduler.config else "a Stable Diffusion 1 or 2"
        raise UsageError(f"--model: the scheduler of {name!r} is a {kind}; allowed is {allowed}")
    if prediction not in PREDICTION_TYPES:
        allowed = " or ".join(PREDICTION_TYPES)
        raise UsageError(f"--model: {name!r} predicts {prediction!r}; allowed is {allowed}")
    check_fields(name, "scheduler", scheduler.config)


def check_sampling(
    configs: ModelConfigs, height: int | None, width: int | None, asked_steps: list[tuple[str, int]]
) -> None:
    """Check sizes and step counts against a model's configurations.

    Args:
        height: in pixels; None is the model's own, as for ``width``.
        asked_steps: flags, and the denoising steps that they ask for.

    Raises:
        UsageError: a side is not a multiple of what VAE and UNet halve it by, or is not known; more steps
            than the schedule has.
    """
    multiple = vae_scale_factor(configs.vae) * 2 ** (len(configs.unet["block_out_channels"]) - 1)
    own = own_latent_size(configs.unet)
    for flag, side in (("height", height), ("width", width)):
        if side is None and own is None:
            raise UsageError(
                f"--{flag}: nothing was given, and the UNet of {configs.name!r} has no sample_size; "
                f"needed is a multiple of {multiple}"
            )
        if side is not None and side % multiple:
            raise UsageError(
                f"--{flag}: {side} was given; allowed is a multiple of {multiple} for this model"
            )
    most = configs.scheduler.config.num_train_timesteps
    for flag, steps in asked_steps:
        if not 2 <= steps < most:
            raise UsageError(f"--{flag}: {steps} steps were given; allowed is 2 to {most - 1} for this model")


def walked(configs: ModelConfigs, steps: int, choice: str | None = None, spacing: str = "") -> Any:
    """A scheduler of a model's configuration, see ``fresh_scheduler``, that has set out its timesteps.

    Raises:
        UsageError: the configuration does not allow it.
    """
    try:
        scheduler = fresh_scheduler(configs.scheduler, choice, spacing)
        scheduler.set_timesteps(steps)
    except (*FOREIGN_ERRORS, IndexError) as error:
        kind = type(configs.scheduler).__name__
        wanted = f"{choice or kind} of {steps} steps"
        raise UsageError(
            f"--model: the {kind} of {configs.name!r} makes no {wanted}: {one_line(error)}; "
            "allowed are more steps, or another --scheduler or --training_sampler"
        ) from error
    return scheduler


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
