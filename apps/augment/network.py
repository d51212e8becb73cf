"""The classifier that is trained: any of timm's, with its weights or without, and a new head."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import timm
import torch

from apps.augment.options import Options
from apps.augment.randomness import seeded
from classifiers import CLASSIFIERS, explained, parse_source
from discriminative.errors import UsageError
from discriminative.guides.loaders import TimmModel, find_timm_model


@dataclass
class Network:
    """A network that can be made anew for every training.

    Args:
        make: the model for so many classes, its new weights by torch's random numbers.
        data: its preprocessing, as timm's ``resolve_model_data_config``.
    """

    make: Callable[[int], torch.nn.Module]
    data: dict[str, Any]

    def new(self, classes: int, seed: int) -> torch.nn.Module:
        """A model that depends on the seed alone."""
        with seeded(seed):
            return self.make(classes)


def with_new_head(model: torch.nn.Module) -> Callable[[int], torch.nn.Module]:
    """Makes copies of a model, each with a new head."""

    def make(classes: int) -> torch.nn.Module:
        copy = deepcopy(model)
        copy.reset_classifier(classes)
        return copy

    return make


def head_of(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """The parameters of a timm model's head; distilled models have two."""
    heads = model.get_classifier()
    heads = heads if isinstance(heads, tuple) else (heads,)
    return [parameter for head in heads for parameter in head.parameters()]


def data_of(model: torch.nn.Module, image_size: int | None) -> dict[str, Any]:
    """A model's preprocessing; small pictures are not resized to be cropped."""
    args = {"img_size": image_size, "crop_pct": 1.0} if image_size else {}
    return timm.data.resolve_model_data_config(model, args=args)


def size_arguments(found: TimmModel, image_size: int | None) -> dict[str, Any]:
    """What ``timm.create_model`` needs for another image size: transformers have it built in."""
    return {"img_size": image_size} if image_size and found.config.get("fixed_input_size") else {}


def load_network(options: Options) -> Network:
    """The network that the options name.

    Raises:
        UsageError: it is unknown, cannot be fetched, or cannot take pictures of that size.
    """
    name = options.classifier
    source = parse_source("classifier", name)
    if source.kind != "timm":
        named = ", ".join(key for key, its in CLASSIFIERS.items() if its.kind == "timm")
        raise UsageError(f"--classifier: {name!r} was given; what is trained here is timm:<name>, or {named}")
    network = explained("classifier", name, "could not be loaded", lambda: network_of(source.place, options))
    side = network.data["input_size"][-1]

    def try_it() -> None:
        model = network.new(2, 0).eval()
        with torch.no_grad():
            model(torch.zeros(2, *network.data["input_size"]))
        if not head_of(model):
            raise ValueError("timm knows no head of it")

    explained("classifier", name, f"cannot be trained on pictures of {side} pixels", try_it)
    return network


def network_of(place: str, options: Options) -> Network:
    """The network of a timm name, id or folder.

    Raises:
        ValueError: there is none, or it has no weights.
    """
    found = find_timm_model(place)
    size = size_arguments(found, options.image_size)
    if options.from_scratch:

        def make(classes: int) -> torch.nn.Module:
            return timm.create_model(found.architecture, num_classes=classes, **found.model_args | size)

        return Network(make, data_of(make(2), options.image_size))
    if not found.weights:
        raise ValueError(
            f"timm has no weights for {found.architecture!r}; allowed is a name of timm.list_pretrained(), "
            "<name>@<file>, or --from_scratch"
        )
    found.model_args |= size
    model = found.load(found.config["num_classes"])
    return Network(with_new_head(model), data_of(model, options.image_size))
