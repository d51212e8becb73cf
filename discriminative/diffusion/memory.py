"""What fits in a device's memory: how many images go through the models at once, and what is computed
twice rather than kept.

No setting changes a result by more than rounding.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from tqdm import tqdm

from discriminative.diffusion.inspect import SD_1_4, Size
from discriminative.errors import WorkError
from discriminative.hub import one_line

T = TypeVar("T")


@dataclass(frozen=True)
class Setting:
    """What ``--memory`` stands for.

    Args:
        decode_batch_size: images through the VAE's decoder at once, and with gradient through the guides;
            None is all. At 512x512 the decoder's graph is the largest of all, and one image keeps a GPU
            busy.
        eval_batch_size: images through the UNet at once without gradient.
        checkpointed: models whose activations are computed again in the backward pass rather than kept.
        needs: bytes of weights and tensors at the peak of an update of five images of SD 1.4, 512x512,
            half precision, guided by ViT-L/16, as ``python -m experiments.speed.footprint`` counts them;
            ``needs_with_tiny_vae``: where ``--tiny_vae taesd`` decodes.
    """

    decode_batch_size: int | None
    eval_batch_size: int
    checkpointed: tuple[str, ...]
    needs: float
    needs_with_tiny_vae: float


SETTINGS = {
    "8gb": Setting(1, 4, ("unet", "vae"), 5.364e9, 4.728e9),
    "12gb": Setting(1, 8, ("unet",), 7.419e9, 4.728e9),
    "16gb": Setting(1, 12, (), 10.857e9, 8.166e9),
    "24gb": Setting(3, 12, (), 17.021e9, 8.942e9),
    "max": Setting(None, 12, (), 23.191e9, 9.725e9),
}
WEIGHTS = (
    2.987e9  # bytes of SD 1.4's (the text encoder in float32) and the guide's, in half precision, of those
)
CLASSIFIER = 0.608e9  # bytes of ViT-L/16 in half precision: what any further classifier is taken for
CLIP = 1.7e9  # bytes of CLIP ViT-L/14 in float32: what any CLIP model is taken for
# Bytes, a guess: context, workspaces, gaps.
CUDA_OVERHEAD = 1.2e9
OUT_OF_MEMORY = (
    "out of memory",
    "ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED",  # cuBLAS found no room for its workspace
    "can't allocate memory",
)
# What cuDNN says where memory is short, and elsewhere: fewer images at once may do.
PERHAPS_MEMORY = ("unable to find an engine", "CUDNN_STATUS_NOT_SUPPORTED")
# What else CUDA and its libraries fail with: memory may be short then, or something else.
DEVICE_FAULTS = ("CUDA error", "CUDA driver", "CUBLAS_STATUS_", "CUDNN_STATUS_", "unable to find an engine")
SHARES = {"cuda": 0.95, "cpu": 0.5}  # of the device's memory that "auto" takes; a CPU's is not a run's alone


def estimate(
    setting: Setting, size: Size, device: torch.device, dtype: torch.dtype, tiny_vae: bool = False
) -> float:
    """Bytes that an update of five images takes, about, where no option overrides the setting."""
    needs = setting.needs_with_tiny_vae if tiny_vae else setting.needs
    counted = (WEIGHTS - SD_1_4.text_encoder) * size.weights + (needs - WEIGHTS) * size.activations
    return (
        counted * dtype.itemsize / 2
        + size.text_encoder
        + (CUDA_OVERHEAD + size.others if device.type == "cuda" else 0)
    )


def room(device: torch.device) -> float:
    """Bytes that a run may take of the device, or of the machine for a CPU; of a card no more than others
    have left."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return min(free, SHARES["cuda"] * total)
    import psutil

    return SHARES["cpu"] * psutil.virtual_memory().total


def peak_bytes(device: torch.device) -> int:
    """The most memory that tensors have had since it was reset (CUDA), or that the process ever had."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    # Bytes on a Mac, kilobytes elsewhere.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def choose(size: Size, device: torch.device, dtype: torch.dtype, tiny_vae: bool = False) -> str:
    """Name of the roomiest setting that fits the device; of the smallest where none does."""
    most = room(device)
    fitting = [
        name for name, setting in SETTINGS.items() if estimate(setting, size, device, dtype, tiny_vae) <= most
    ]
    return fitting[-1] if fitting else next(iter(SETTINGS))


def checkpointed(memory: str, chosen: bool | None = None) -> tuple[str, ...]:
    """The models whose activations are computed again: those of the setting, or all or none where that
    was chosen."""
    if chosen is None:
        return SETTINGS[memory].checkpointed
    return ("unet", "vae") if chosen else ()


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether it was memory that failed: torch says so by the error's kind, CUDA's libraries by their
    texts alone."""
    return isinstance(error, torch.OutOfMemoryError) or says(error, OUT_OF_MEMORY)


def says(error: Exception, texts: tuple[str, ...]) -> bool:
    """Whether an error's text holds one of these."""
    return any(text in str(error) for text in texts)


@contextmanager
def told_out_of_memory(device: torch.device, advice: str) -> Iterator[None]:
    """Raises WorkError, with the cause and what to try, where the block runs out of a device's memory, or
    the device fails otherwise."""
    try:
        yield
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise WorkError(f"out of memory on {device} ({one_line(error)}); {advice}") from error
        if not says(error, DEVICE_FAULTS):
            raise
        raise WorkError(
            f"{device} failed ({one_line(error)}); where its memory is short, {advice}; else try --device cpu"
        ) from error


class Batches:
    """Work on a number of images in batches, smaller ones from where memory has run out.

    Args:
        size: of a batch; None is all at once.
        fits: what is known of the sizes that fit, by the kind of work; is added to, for whoever shares it.
        kind: of the work.
    """

    def __init__(self, size: int | None, fits: dict[str, int] | None = None, kind: str = ""):
        self.asked = size
        self.fits = {} if fits is None else fits
        self.kind = kind

    @property
    def size(self) -> int | None:
        """Of a batch, as far as is known now."""
        return min(filter(None, (self.asked, self.fits.get(self.kind))), default=None)

    def over(self, number: int, work: Callable[[slice], T]) -> list[T]:
        """What ``work`` makes of each slice of ``number`` images.

        Raises:
            RuntimeError: not even one image fits; or whatever else fails.
        """
        done = []
        first = 0
        while first < number:
            part = slice(first, min(first + (self.size or number), number))
            try:
                done.append(work(part))
                first = part.stop
            except RuntimeError as error:
                is_memory = is_out_of_memory(error)
                if part.stop - first == 1 or not (is_memory or says(error, PERHAPS_MEMORY)):
                    raise
                failed = "do not fit in memory" if is_memory else f"fail ({one_line(error)})"
                self.fits[self.kind] = (part.stop - first) // 2
                tqdm.write(f"note: {part.stop - first} images at once {failed}; going on with {self.size}")
            if first < part.stop:
                torch.cuda.empty_cache()  # only here is the failed batch gone: the exception held its tensors
        return done
