"""Classifiers from timm, Hugging Face, or one's own function: labels first, weights when they are needed."""

import importlib
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from discriminative.guides.classifier import Classifier
from discriminative.guides.preprocess import Recipe, hf_recipe, timm_recipe
from discriminative.hub import at_revision, check_keys, fetch, hub_or_cache


@dataclass(frozen=True)
class Source:
    """Where a classifier comes from.

    Args:
        kind: a key of ``LOADERS``: "timm", "hf", "vit-mae" or "python".
        place: what that loader takes: a name, hub id, folder, or module and function.
        judge: the classifier that judges by default where this one guides.
        crop_pct: share of the resized image that is kept, where timm's own is not the wanted one.
    """

    kind: str
    place: str
    judge: str | None = None
    crop_pct: float | None = None


@dataclass
class Parts:
    """What a loader found without loading weights: the labels, and how to go on."""

    labels: list[str]
    load: Callable[[], tuple[torch.nn.Module, Recipe]]


@dataclass
class TimmModel:
    """A timm model that was found, before its weights are read.

    Args:
        config: its configuration, as timm's ``pretrained_cfg``.
        model_args: further arguments of ``timm.create_model``.
        weights: finds or fetches their file; None where there are none.
    """

    architecture: str
    config: dict[str, Any]
    model_args: dict[str, Any]
    weights: Callable[[], Path] | None

    def load(self, num_classes: int) -> torch.nn.Module:
        """The model with its weights, whose head has ``num_classes``; 0 where it has no head.

        Raises:
            ValueError: a weight is missing.
        """
        import timm

        # A file: else timm falls back to pickles.
        where = {"file": str(self.weights()), "source": "", "custom_load": False}
        size = {"num_classes": num_classes}
        settings = self.model_args | size | {"pretrained_cfg": self.config | where | size}
        try:
            return timm.create_model(self.architecture, pretrained=True, pretrained_strict=True, **settings)
        except TypeError as error:
            if "pretrained_strict" not in str(error):
                raise
            raise ValueError(
                f"timm fills in missing weights of {self.architecture!r} at random and cannot be told not to"
            ) from error


def find_timm_model(place: str) -> TimmModel:
    """A registered name, ``hf-hub:<id>``, a folder as timm exports it, or ``<name>@<checkpoint file>``.

    Raises:
        ValueError: timm has no such model, or a file of another kind was named.
        FileNotFoundError: the folder has no config.json.
    """
    import timm
    from timm.models._hub import load_model_config_from_path

    name = place
    file = ""
    revision = None
    if name.startswith("hf-hub:"):
        repository, _, revision = name.removeprefix("hf-hub:").partition("@")
        folder = fetch(repository, "config.json", revision).parent
    else:
        name, _, file = name.partition("@")
        folder = Path(file).parent if file else Path(name)
    if file and not (file.endswith(".safetensors") and Path(file).is_file()):
        raise ValueError(
            f"{file} is no safetensors file; nothing else is read, since unpickling a file may run code"
        )
    if (folder / "config.json").is_file():
        config, architecture, model_args = load_model_config_from_path(folder)
        architecture = name if file else architecture
    elif folder.is_dir() and not file:
        raise FileNotFoundError(f"{folder} has no config.json")
    else:
        config = {}
        architecture = name
        model_args = {}
    if not timm.is_model(architecture):
        near = (
            ", ".join(sorted(timm.list_models(f"*{architecture.split('.')[0]}*"))[:3])
            or "timm.list_models() knows"
        )
        raise ValueError(f"timm has no model {architecture!r}; the nearest: {near}")
    config = config or timm.get_pretrained_cfg(architecture).to_dict()
    if file:
        config["num_classes"] = head_size(Path(file), config["classifier"]) - config.get("label_offset", 0)

    def weights() -> Path:
        if name.startswith("hf-hub:"):
            return fetch(repository, "model.safetensors", revision)
        if file or folder.is_dir():
            return Path(file or folder / "model.safetensors")
        return fetch(config["hf_hub_id"], "model.safetensors")

    has_weights = file or folder.is_dir() or config.get("hf_hub_id")
    return TimmModel(architecture, config, model_args, weights if has_weights else None)


def find_timm(source: Source) -> Parts:
    """A timm classifier, named as :func:`find_timm_model` takes it."""
    import timm

    found = find_timm_model(source.place)
    if not found.weights:
        raise ValueError(
            f"timm has no weights for {found.architecture!r}; allowed is a name of timm.list_pretrained(), "
            "or <name>@<file>"
        )
    labels = timm_labels(found.config)

    def load() -> tuple[torch.nn.Module, Recipe]:
        model = found.load(len(labels))
        return model, timm_recipe(timm.data.resolve_model_data_config(model), source.crop_pct)

    return Parts(labels, load)


def head_size(file: Path, head: str | tuple[str, ...]) -> int:
    """Number of classes of a checkpoint, from the shape of its last layer."""
    from safetensors import safe_open

    head = head if isinstance(head, str) else head[0]  # distilled models have two heads of one size
    with safe_open(file, "pt") as weights:
        there = list(weights.keys())
        names = [k for k in (f"{head}.bias", f"{head}.weight") if k in there]
        if not names:
            raise ValueError(
                f"{file} has no {head}.weight: it is no checkpoint of this model, or has no classifier"
            )
        return weights.get_slice(names[0]).get_shape()[0]


def timm_labels(config: dict[str, Any]) -> list[str]:
    """The labels of a timm configuration, or ImageNet's where it names none and their number is that of
    one of its lists."""
    from timm.data import ImageNetInfo, infer_imagenet_subset

    if config.get("label_names"):
        names = config["label_names"]
        descriptions = config.get("label_descriptions") or {}
        names = [names[k] for k in sorted(names, key=int)] if isinstance(names, dict) else list(names)
        if len(names) != config["num_classes"]:
            raise ValueError(
                f"its head has {config['num_classes']} classes, but its config.json names {len(names)} labels"
            )
        names = [str(n) for n in names]
        # Only WordNet's numbers need their descriptions.
        return [descriptions.get(n, n) if re.fullmatch(r"n\d{8}", n) else n for n in names]
    subset = infer_imagenet_subset(config)
    if not subset:
        raise ValueError(
            f"it has {config['num_classes']} classes without names; put a config.json with label_names "
            "beside the weights"
        )
    return ImageNetInfo(subset).label_descriptions()


class HFLogits(torch.nn.Module):
    """A Hugging Face classifier as images (B, 3, h, w) to logits (B, K)."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Logits (B, K)."""
        return self.model(pixel_values=pixel_values).logits


def find_hf(source: Source) -> Parts:
    """Any ``AutoModelForImageClassification``, from the hub or a folder."""
    from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification

    place, revision = at_revision(source.place)
    with hub_or_cache(place):
        config = AutoConfig.from_pretrained(place, revision=revision)
    if config.model_type == "timm_wrapper":
        raise ValueError(f"it is a timm checkpoint; give timm:hf-hub:{place}, or timm:{place} for a folder")

    @hub_or_cache(place)
    def load() -> tuple[torch.nn.Module, Recipe]:
        strictly = {
            "use_safetensors": True,
            "output_loading_info": True,
            "ignore_mismatched_sizes": True,
        }  # check_keys does not
        model, info = AutoModelForImageClassification.from_pretrained(
            place, config=config, dtype=torch.float32, **strictly, revision=revision
        )
        check_keys(info["missing_keys"], info["unexpected_keys"], info["mismatched_keys"])
        return HFLogits(model), hf_recipe(AutoImageProcessor.from_pretrained(place, revision=revision))

    return Parts(hf_labels(config), load)


# What a head of another kind is for, by the configuration's "problem_type".
OTHER_HEADS = {
    "regression": "gives quantities rather than classes",
    "multi_label_classification": "says yes or no to each label by itself (multi-label)",
}


def hf_labels(config: Any) -> list[str]:
    """The labels of a Hugging Face configuration, in the logits' order.

    Raises:
        ValueError: its head is not one that chooses one label.
    """
    other = OTHER_HEADS.get(getattr(config, "problem_type", None))
    if other:
        raise ValueError(f"its head {other}; allowed is one that chooses one of its labels (softmax)")
    return [str(config.id2label[i]) for i in sorted(config.id2label)]


# A ViT's weights: transformers 4 -> 5.
VIT_NAMES = (
    (r"\bencoder\.layer\.", "layers."),
    (r"\battention\.attention\.(query|key|value)\b", lambda m: f"attention.{m[1][0]}_proj"),
    (r"\battention\.output\.dense\b", "attention.o_proj"),
    (r"\bintermediate\.dense\b", "mlp.fc1"),
    (r"\boutput\.dense\b", "mlp.fc2"),
)


def vit_name(key: str) -> str:
    """A ViT's weight by transformers 5's name, whichever of the two it has."""
    for pattern, new in VIT_NAMES:
        key = re.sub(pattern, new, key)
    return key


def find_vit_mae(source: Source) -> Parts:
    """A Hugging Face ViT that pools as the paper's ``vit-mae`` checkpoints do.

    The patch tokens of the last block, without the class token, are averaged; then comes the final
    LayerNorm, then the head.
    """
    from safetensors.torch import load_file
    from transformers import AutoImageProcessor, ViTConfig, ViTForImageClassification

    place, revision = at_revision(source.place)
    with hub_or_cache(place):
        config = ViTConfig.from_pretrained(place, revision=revision)

    @hub_or_cache(place)
    def load() -> tuple[torch.nn.Module, Recipe]:
        folder = Path(place)
        weights = (
            folder / "model.safetensors" if folder.is_dir() else fetch(place, "model.safetensors", revision)
        )
        model = ViTForImageClassification(config)
        ours = model.state_dict()
        theirs = {vit_name(k): v for k, v in load_file(weights).items()}
        check_keys({vit_name(k) for k in ours} - set(theirs), set(theirs) - {vit_name(k) for k in ours})
        check_keys((), (), [k for k in ours if theirs[vit_name(k)].shape != ours[k].shape])
        model.load_state_dict({k: theirs[vit_name(k)] for k in ours})
        # (B, L, D) -> (B, 1, D): the head takes the average.
        model.vit.layernorm.register_forward_pre_hook(lambda _, args: (args[0][:, 1:].mean(1, keepdim=True),))
        return HFLogits(model), hf_recipe(AutoImageProcessor.from_pretrained(place, revision=revision))

    return Parts(hf_labels(config), load)


def own_function(place: str) -> Callable:
    """The function of ``<module>:<function>``, found from the working directory.

    Raises:
        ValueError: the module has no such function.
        Exception: whatever the import raises.
    """
    module, _, function = place.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    make = getattr(importlib.import_module(module), function, None) if function else None
    if make is None:
        raise ValueError(f"the module {module!r} has no {function!r}; allowed is python:<module>:<function>")
    return make


def find_python(source: Source) -> Parts:
    """One's own: ``<module>:<function>``; the function returns a :class:`Classifier`."""
    made = own_function(source.place)()
    if not isinstance(made, Classifier):
        raise ValueError(f"it returned a {type(made).__name__}; allowed is a classifiers.Classifier")
    return Parts(made.labels, lambda: (made.model, made.recipe))


LOADERS = {"timm": find_timm, "hf": find_hf, "vit-mae": find_vit_mae, "python": find_python}
