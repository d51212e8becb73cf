"""Named classifiers: differentiable preprocessing, logits and labels; in one table."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from config import UsageError, WorkError
from models import MINIATURE, first_line


@dataclass(frozen=True)
class Source:
    """Where a classifier comes from: a name that timm loads, its default judge, and a crop where timm's is not the wanted one."""

    timm_name: str
    judge: str | None
    crop_pct: float | None = None


CLASSIFIERS = {
    # ViT-L/16, ImageNet-21k then 1k: the paper's; judged by a ConvNeXt, another family.
    # The paper's recipe resizes to 256 and crops 224; timm's own would resize to 248.
    "inet": Source("vit_large_patch16_224.augreg_in21k_ft_in1k", "inet-judge", crop_pct=224 / 256),
    "inet-judge": Source("convnext_base.fb_in22k_ft_in1k", None),
    "miniature": Source(f"local-dir:{MINIATURE / 'guide'}", "miniature-judge"),
    "miniature-judge": Source(f"local-dir:{MINIATURE / 'judge'}", None),
}


def check_classifier(flag: str, name: str) -> None:
    """Raises UsageError where ``name`` is not in the table."""
    if name not in CLASSIFIERS:
        raise UsageError(f"--{flag}: {name!r} was given; allowed is {', '.join(CLASSIFIERS)}")


def read_labels(name: str) -> list[str]:
    """A classifier's labels in the order of its logits, without loading its weights.

    Raises:
        UsageError: its folder cannot be read.
    """
    timm_name = CLASSIFIERS[name].timm_name
    if not timm_name.startswith("local-dir:"):
        from timm.data import ImageNetInfo

        info = ImageNetInfo()
        return [info.index_to_description(i) for i in range(info.num_classes())]
    path = Path(timm_name.removeprefix("local-dir:")) / "config.json"
    try:
        return json.loads(path.read_text())["label_names"]
    except OSError as error:
        raise UsageError(f"--classifier: {name!r} needs {path}, which cannot be read ({error.strerror})") from error


def check_class_index(name: str, class_index: int, labels: list[str]) -> None:
    """Raises UsageError where the index, counted from 1, is outside the labels."""
    if not 1 <= class_index <= len(labels):
        raise UsageError(f"--class_index: {class_index} was given; allowed is 1 to {len(labels)} for the classifier {name}")


def prompt_class_name(label: str) -> str:
    """The label's first synonym, lower case, underscores as spaces: "tiger_cat, Felis" -> "tiger cat"."""
    return label.split(",")[0].strip().lower().replace("_", " ")


@dataclass
class Classifier:
    """A frozen classifier of images in [0, 1].

    Args:
        model: logits (B, K) of preprocessed images.
        labels: K names, in the logits' order.
        input_size: (height, width) in pixels that the model takes. crop_pct: share of the resized image that is kept.
        mean, std: of its normalisation, three values each.
    """

    name: str
    model: torch.nn.Module
    labels: list[str]
    input_size: tuple[int, int]
    crop_pct: float
    interpolation: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def preprocess(self, images: torch.Tensor) -> torch.Tensor:
        """The classifier's own recipe, differentiable: resize the shorter side, centre crop, normalise.

        Args:
            images: (B, 3, H, W) in [0, 1].

        Returns:
            (B, 3, h, w), normalised, in float32 or better.
        """
        images, (h, w) = _at_least_float32(images), self.input_size
        scale = math.floor(max(h, w) / self.crop_pct) / min(images.shape[-2:])
        size = [max(s, round(n * scale)) for n, s in zip(images.shape[-2:], (h, w), strict=True)]
        if size != list(images.shape[-2:]):
            images = F.interpolate(images, size=size, mode=self.interpolation, antialias=True, align_corners=False)
        top, left = (size[0] - h) // 2, (size[1] - w) // 2
        images = images[..., top : top + h, left : left + w]  # (B, 3, h, w)
        mean, std = (images.new_tensor(v).view(1, 3, 1, 1) for v in (self.mean, self.std))
        return (images - mean) / std

    def logits(self, images: torch.Tensor) -> torch.Tensor:
        """Logits (B, K), float32, of images (B, 3, H, W) in [0, 1]; differentiable."""
        dtype = next(self.model.parameters()).dtype
        return _at_least_float32(self.model(self.preprocess(images).to(dtype)))


def finite(logits: torch.Tensor) -> torch.Tensor:
    """The same logits, once it is sure that they can be compared.

    Raises:
        WorkError: some are not finite (the most probable of NaNs would be the first class).
    """
    if not logits.isfinite().all():
        raise WorkError("an image's logits are not finite; try --mixed_precision bf16 or no")
    return logits


def _at_least_float32(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def load_classifier(name: str, device: torch.device, dtype: torch.dtype, flag: str = "classifier") -> Classifier:
    """Load a classifier of the table, frozen.

    Args:
        flag: the option to blame in an error.

    Raises:
        UsageError: unknown, or it can neither be found nor fetched.
    """
    check_classifier(flag, name)
    import timm
    from huggingface_hub.utils import httpx
    from safetensors import SafetensorError

    labels, source = read_labels(name), CLASSIFIERS[name]
    timm_name = source.timm_name
    try:
        model = timm.create_model(timm_name, pretrained=True)
    except (OSError, RuntimeError, ValueError, KeyError, SafetensorError, httpx.HTTPError) as error:
        where = "loaded" if timm_name.startswith("local-dir:") else "fetched (no network?)"
        raise UsageError(f"--{flag}: {name!r} ({timm_name}) could not be {where}: {first_line(error)}") from error
    data = timm.data.resolve_model_data_config(model)
    return Classifier(
        name,
        model.requires_grad_(False).eval().to(device, dtype),
        labels,
        tuple(data["input_size"][1:]),
        source.crop_pct or data["crop_pct"],
        data["interpolation"],
        tuple(data["mean"]),
        tuple(data["std"]),
    )
