"""Device and precision: what computes in half, what stays in float32, and how a half-precision loss is
scaled.

``models`` is a ``DiffusionModels`` throughout. Its ``dtype`` is the precision of UNet and VAE; the text
encoder stays in float32: it is small, and the token's gradient comes out of it.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from discriminative.errors import UsageError

FIRST_SCALE = 2.0**10  # of the loss in half precision
GROWS_AFTER = 20  # updates without an overflow, before the first one
GROWS_LATER = 200  # ... from then on: each growth beyond what fits costs an update

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def has_bf16_units() -> bool:
    """Whether the processor multiplies bfloat16 (AVX512-BF16, AMX); without such units it is many times
    slower than float32.

    Only x86 is asked: what bfloat16 brings on others nobody has measured here.
    """
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(unit, False) for unit in ("avx512_bf16", "amx_bf16"))


def trains_in_bf16(mixed_precision: str, device: torch.device) -> bool:
    """Whether training computes in bfloat16 what needs no gradient: by itself, on a CPU that has units
    for it."""
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
            f"--device: {name!r} was given, but this machine has {found}; allowed is auto or "
            f"cpu{' or cuda:N' if count else ''}"
        )
    return device


NO_CARD = ("no NVIDIA driver", "No CUDA GPUs", "not compiled with CUDA")


def why_no_cuda() -> str | None:
    """Why torch cannot use the graphics card that is there, say for an old driver; None where it can, or
    there is none."""
    if torch.cuda.is_available():
        return None
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return None if any(text in str(error) for text in NO_CARD) else str(error)
    return None


def resolve_dtype(mixed_precision: str, device: torch.device) -> torch.dtype:
    """Precision of UNet, VAE and classifier: "auto" is half on CUDA and float32 on the CPU."""
    if mixed_precision == "auto":
        mixed_precision = "fp16" if device.type == "cuda" else "no"
    if mixed_precision == "fp16" and device.type == "cpu":
        raise UsageError("--mixed_precision: 'fp16' was given on the CPU; allowed there is auto, no or bf16")
    if mixed_precision == "bf16":
        check_bf16_card("mixed_precision", device, "auto, fp16 or no")
    return DTYPES[mixed_precision]


def check_bf16_card(flag: str, device: torch.device, allowed: str) -> None:
    """Check that a graphics card has units for bfloat16; a CPU passes.

    Raises:
        UsageError: it has none.
    """
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        name = torch.cuda.get_device_name(device)
        raise UsageError(
            f"--{flag}: 'bf16' was given, which {name} only imitates, slowly; allowed there is {allowed}"
        )


def evaluation_dtype(name: str | None, device: torch.device, dtype: torch.dtype) -> torch.dtype | None:
    """What an evaluation samples in, for ``--eval_precision``; None is the models' own.

    Args:
        dtype: of the models.

    Raises:
        UsageError: the device has no units for it, or the models are not in float32.
    """
    if name is None:
        return None
    given = f"--eval_precision: {name!r} was given"
    if dtype != torch.float32:
        held = str(dtype).removeprefix("torch.")
        raise UsageError(f"{given}, but the models are in {held}; allowed is a value beside float32 models")
    if device.type == "cpu" and name == "fp16":
        raise UsageError(f"{given} on the CPU; allowed there is bf16, or nothing")
    if device.type == "cpu" and not has_bf16_units():
        raise UsageError(f"{given}, but this processor has no units for it; leave it out here")
    if name == "bf16":
        check_bf16_card("eval_precision", device, "fp16, or nothing")
    return DTYPES[name]


def exact_float32(dtype: torch.dtype) -> None:
    """From here on float32 is float32, where the models compute in it: convolutions too.

    cuDNN would round what they multiply to 10 bits (TF32), on Ampere and newer, and a jump's first stage
    multiplies rounding by a hundred. Of the whole process: a backward pass runs outside any block.
    """
    if dtype == torch.float32:
        torch.backends.cudnn.allow_tf32 = False


def advice_on_overflow(dtype: torch.dtype) -> str:
    """What may help where a number is not finite: half precision overflows long before the others."""
    half = dtype == torch.float16
    return f"try {'--mixed_precision no or bf16, or ' if half else ''}a lower --learning_rate"


def at_least_float32(x: torch.Tensor) -> torch.Tensor:
    """The same tensor, half precision made float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


@contextmanager
def training_precision(models, mixed_precision: str) -> Iterator[None]:
    """Within the block models compute as training has them. Images that are shown are sampled outside."""
    # bfloat16 first: its UNet keeps channels first.
    with bf16_without_gradient(models, trains_in_bf16(mixed_precision, models.device)), channels_last(models):
        yield


@contextmanager
def channels_last(models) -> Iterator[None]:
    """Within the block UNet and decoders have their channels last in memory: faster convolutions on a CPU.

    Rounding differs. A UNet that computes in bfloat16 stays as it is: its group norms are slow then. On
    CUDA, where nobody has measured it here, nothing changes.
    """
    unet = None if models.coarse_dtype else models.unet
    modules = [
        m for m in (unet, models.vae, models.tiny_vae) if m is not None and models.device.type == "cpu"
    ]
    for module in modules:
        module.to(memory_format=torch.channels_last)
    try:
        yield
    finally:
        for module in modules:
            module.to(memory_format=torch.contiguous_format)


def bf16_without_gradient(models, wanted: bool = True) -> AbstractContextManager:
    """Within the block a UNet and decoders in float32 compute in bfloat16 where no gradient is wanted.

    What gradient flows through stays in float32: guidance and the first step's prediction multiply
    rounding by a hundred.
    """
    wanted = wanted and models.dtype == torch.float32
    return coarse_without_gradient(models, torch.bfloat16 if wanted else None)


@contextmanager
def coarse_without_gradient(models, dtype: torch.dtype | None) -> Iterator[None]:
    """Within the block UNet and decoders compute in ``dtype`` where no gradient is wanted; None is their
    own."""
    models.coarse_dtype = dtype
    try:
        yield
    finally:
        models.coarse_dtype = None


def autocast(models) -> AbstractContextManager:
    """The precision of a call of UNet or decoder, by whether gradient is wanted of it."""
    if models.coarse_dtype is None or torch.is_grad_enabled():
        return nullcontext()
    return torch.autocast(models.device.type, models.coarse_dtype)


def precision_name(models) -> str:
    """What UNet and decoders compute in, for the records."""
    name = str(models.dtype).removeprefix("torch.")
    if models.coarse_dtype is None:
        return name
    return f"{name}, {str(models.coarse_dtype).removeprefix('torch.')} without gradient"


def make_scaler(models) -> torch.amp.GradScaler:
    """Scales the loss in half precision, where gradients underflow without it; idle in other precisions.

    See :func:`update_scale` for how it changes.
    """
    half = models.dtype == torch.float16
    scaler = torch.amp.GradScaler(
        models.device.type, init_scale=FIRST_SCALE, growth_interval=GROWS_AFTER, enabled=half
    )
    # Makes its state; losses are weighted in Objective.accumulate.
    scaler.scale(torch.zeros((), device=models.device))
    return scaler


def update_scale(scaler: torch.amp.GradScaler, loss_is_finite: bool) -> None:
    """The scale after an update.

    An update whose gradient overflows is skipped and the scale halved; many that do not double it again.
    One whose images overflow on their way is skipped, too, but no scale would have mended it.
    """
    before = scaler.get_scale()
    scaler.update(None if loss_is_finite else before)
    if scaler.get_scale() < before:
        scaler.set_growth_interval(GROWS_LATER)
