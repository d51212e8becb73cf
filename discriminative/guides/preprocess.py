"""How a classifier wants its images: resize, centre crop, normalise; on batches of tensors,
differentiable."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms.v2.functional import gaussian_blur, hflip, resized_crop

from discriminative.precision import at_least_float32

INTERPOLATIONS = ("bicubic", "bilinear", "nearest")
PIL_INTERPOLATIONS = {
    0: "nearest",
    2: "bilinear",
    3: "bicubic",
}  # PIL's numbers, which Hugging Face's configurations hold

PROBE_TOLERANCE = 0.05  # mean difference of normalised pixels; rounding to 8 bits makes about 0.01


def augmented(images: torch.Tensor, seeds: list[int]) -> torch.Tensor:
    """Images (B, 3, H, W) in [0, 1], each varied as its seed says; differentiable.

    A crop of .8 to 1 of the area, resized back; mirrored or not; blurred by up to 1/64 of the height
    (standard deviation); noise of up to .05: what changes nothing of a picture's content, but much of the
    fine patterns that please one classifier alone.
    """
    out = []
    for image, seed in zip(images, seeds, strict=True):
        rng = torch.Generator().manual_seed(seed)
        area, top, left, mirrored, sigma, noise = torch.rand(6, generator=rng).tolist()
        height, width = image.shape[-2:]
        h, w = (round(side * math.sqrt(0.8 + 0.2 * area)) for side in (height, width))
        y = round(top * (height - h))
        x = round(left * (width - w))
        varied = resized_crop(image, y, x, h, w, [height, width], antialias=True)  # (3, H, W)
        varied = hflip(varied) if mirrored < 0.5 else varied
        sigma = max(sigma * height / 64, 1e-3)
        varied = gaussian_blur(varied, [2 * math.ceil(2 * sigma) + 1] * 2, [sigma])
        disturbance = torch.randn(image.shape, generator=rng).to(image)
        out.append((varied + 0.05 * noise * disturbance).clamp(0, 1))
    return torch.stack(out)


@dataclass(frozen=True)
class Recipe:
    """A classifier's preprocessing.

    Args:
        resize: (height, width) in pixels that the image is to cover, its aspect kept; None does not resize.
        squash: resize to exactly that, aspect or not.
        crop: (height, width) of the centre crop; None does not crop.
        rounds: of an odd margin half is rounded to the nearest, even where two are, as torchvision does;
            else down, as Hugging Face.
        interpolation: "bicubic", "bilinear" (both with antialiasing) or "nearest".
        mean, std: of the normalisation of values in [0, 1], three each.

    Raises:
        ValueError: another interpolation.
    """

    resize: tuple[int, int] | None
    crop: tuple[int, int] | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    squash: bool = False
    rounds: bool = False

    def __post_init__(self):
        if self.interpolation not in INTERPOLATIONS:
            raise ValueError(f"interpolation {self.interpolation!r}; allowed is {', '.join(INTERPOLATIONS)}")

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """Height and width that an image of that size is resized to."""
        if self.resize is None or self.squash:
            return self.resize or (height, width)
        h, w = self.resize
        return (h, width * h // height) if h * width >= w * height else (height * w // width, w)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Preprocess.

        Args:
            images: (B, 3, H, W) in [0, 1].

        Returns:
            (B, 3, h, w), normalised, in float32 or better.
        """
        images = at_least_float32(images)
        size = self.resized(*images.shape[-2:])
        if size != tuple(images.shape[-2:]):
            smooth = {} if self.interpolation == "nearest" else {"antialias": True, "align_corners": False}
            images = F.interpolate(images, size=size, mode=self.interpolation, **smooth)
        h, w = self.crop or size
        top, left = (round(m / 2) if self.rounds else m // 2 for m in (size[0] - h, size[1] - w))
        images = images[..., top : top + h, left : left + w]  # (B, 3, h, w)
        mean, std = (images.new_tensor(v).view(1, 3, 1, 1) for v in (self.mean, self.std))
        return (images - mean) / std


def timm_recipe(data: dict[str, Any], crop_pct: float | None = None) -> Recipe:
    """The recipe that ``timm.data.resolve_model_data_config`` tells.

    Args:
        crop_pct: share of the resized image that is kept, where timm's is not the wanted one.

    Raises:
        ValueError: timm would crop or interpolate in a way that is not known here.
    """
    crop_mode = data.get("crop_mode", "center")
    if crop_mode not in ("center", "squash") or data["interpolation"] not in INTERPOLATIONS:
        given = f"crop mode {crop_mode!r}, interpolation {data['interpolation']!r}"
        raise ValueError(
            f"its preprocessing has {given}; allowed is center or squash, and {', '.join(INTERPOLATIONS)}"
        )
    crop = tuple(data["input_size"][1:])
    resize = tuple(int(side / (crop_pct or data["crop_pct"])) for side in crop)
    return Recipe(
        resize,
        crop,
        tuple(data["mean"]),
        tuple(data["std"]),
        data["interpolation"],
        crop_mode == "squash",
        rounds=True,
    )


def hf_recipe(processor: Any) -> Recipe:
    """The recipe of a Hugging Face image processor.

    Raises:
        ValueError: it does something that is not known here, told by comparing on a picture.
    """
    recipe = read_hf(processor)
    row = np.linspace(0, 1, 160)
    picture = np.stack(
        [np.outer(row[:120], row), np.outer(1 - row[:120], row), np.outer(row[:120], 1 - row)], axis=2
    )  # (120, 160, 3)
    picture = (picture * 255).round().astype(np.uint8)
    theirs = processor(Image.fromarray(picture), return_tensors="pt")["pixel_values"]  # (1, 3, h, w)
    ours = recipe(torch.from_numpy(picture).permute(2, 0, 1)[None] / 255)  # (1, 3, h, w)
    if ours.shape != theirs.shape or (ours - theirs).abs().mean() > PROBE_TOLERANCE:
        raise ValueError(
            f"its {type(processor).__name__} does more than to resize, crop, rescale and normalise; "
            "allowed is one that does not"
        )
    return recipe


def read_hf(processor: Any) -> Recipe:
    """What a Hugging Face image processor's settings say.

    Raises:
        ValueError: they say something that is not known here.
    """

    def side(size: Any, key: str) -> int | None:
        return size.get(key) if isinstance(size, dict) else getattr(size, key, None)

    def sides(size: Any) -> tuple[int, int]:
        return (
            side(size, "height") or side(size, "shortest_edge"),
            side(size, "width") or side(size, "shortest_edge"),
        )

    scale = processor.rescale_factor * 255 if getattr(processor, "do_rescale", True) else 255
    odd = [n for n in ("do_pad", "rescale_offset") if getattr(processor, n, None)]
    if (
        odd
        or abs(scale - 1) > 1e-3
        or (processor.do_resize and int(processor.resample) not in PIL_INTERPOLATIONS)
    ):
        what = ", ".join(odd) or f"rescale_factor {processor.rescale_factor}, resample {processor.resample}"
        raise ValueError(
            f"its image processor has {what}; allowed is to resize (0, 2 or 3), crop, rescale to [0, 1] "
            "and normalise"
        )
    resize = sides(processor.size) if processor.do_resize else None
    squash = bool(resize and side(processor.size, "height"))
    crop = sides(processor.crop_size) if getattr(processor, "do_center_crop", None) else None
    crop_pct = getattr(processor, "crop_pct", None)
    if (
        resize and crop_pct and not squash
    ):  # ConvNeXt's: below 384 pixels resize larger and crop, from there on squash
        small = resize[0] < 384
        resize, crop, squash = (
            (tuple(int(n / crop_pct) for n in resize), resize, False) if small else (resize, crop, True)
        )
    mean, std = (
        (processor.image_mean, processor.image_std)
        if getattr(processor, "do_normalize", False)
        else ((0.0,) * 3, (1.0,) * 3)
    )
    return Recipe(
        resize,
        crop,
        tuple(mean),
        tuple(std),
        PIL_INTERPOLATIONS[int(processor.resample)] if resize else "bicubic",
        squash,
    )
