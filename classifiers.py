"""Classifiers from anywhere, one interface: differentiable preprocessing, logits, labels.

Named ones stand in one table; beyond it any of timm, of Hugging Face, or one's own function.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from discriminative.diffusion.memory import is_out_of_memory
from discriminative.errors import UsageError
from discriminative.guides.classifier import Classifier
from discriminative.guides.labels import match_label
from discriminative.guides.loaders import LOADERS, Parts, Source
from discriminative.guides.preprocess import Recipe
from discriminative.hub import MINIATURE, why

__all__ = ["CLASSIFIERS", "Classifier", "Recipe", "load_classifier", "read_labels"]

# The paper's guides ("inet" with other weights: docs/method.md), and the miniature's.
CLASSIFIERS = {
    # The paper resizes to 256, timm's own recipe to 248.
    "inet": Source(
        "timm",
        "vit_large_patch16_224.augreg_in21k_ft_in1k",
        "timm:convnext_base.fb_in22k_ft_in1k",
        crop_pct=224 / 256,
    ),
    # At commits that have the weights as safetensors.
    "cub": Source("vit-mae", "vesteinn/vit-mae-cub@716f7d5658539bc3e0ff2bfe77b13388613bd085"),
    "inat": Source(
        "vit-mae",
        "vesteinn/vit-mae-inat21@2930c8717d670e3d453ed0e1f7982dac5df1d0bd",
        judge="timm:hf-hub:timm/convnext_large_mlp.laion2b_ft_augreg_inat21",
    ),
    "miniature": Source("timm", str(MINIATURE / "guide"), "miniature-judge"),
    "miniature-judge": Source("timm", str(MINIATURE / "judge")),
    "miniature-judge2": Source(
        "timm", str(MINIATURE / "judge2")
    ),  # tells who is right where the other two part
}


def parse_source(flag: str, name: str) -> Source:
    """The source that a classifier's name stands for: one of the table, or ``<kind>:<place>``.

    Raises:
        UsageError: neither.
    """
    kind, _, place = name.partition(":")
    if name in CLASSIFIERS:
        return CLASSIFIERS[name]
    if kind not in LOADERS or not place:
        raise UsageError(
            f"--{flag}: {name!r} was given; allowed is {', '.join(CLASSIFIERS)}, timm:<name>, "
            "timm:<name>@<file>, hf:<id or folder>, "
            "vit-mae:<id or folder> or python:<module>:<function>"
        )
    return Source(kind, place)


def targets_of(guides: dict[str, list[str]], target: int) -> list[int]:
    """Each guide's index, from 0, of class ``target`` of the first one; ``guides`` maps names to labels.

    Raises:
        UsageError: a guide does not know the class.
    """
    (first, labels), *others = guides.items()
    targets = [target]
    for name, theirs in others:
        found = match_label(labels, target, theirs)
        if found is None:
            raise UsageError(
                f"--classifier: {name!r} has no label, or several, for {labels[target]!r} of {first!r}; "
                "allowed are guides that share it"
            )
        targets.append(found)
    return targets


def explained(flag: str, name: str, what: str, work: Callable[[], Any]) -> Any:
    """``work()``, its failures told in one line that names the flag and the classifier.

    Args:
        what: of the classifier, if it fails: "could not be loaded".

    Raises:
        UsageError: it failed.
    """
    try:
        return work()
    # Libraries and one's own module may raise anything.
    except Exception as error:
        if isinstance(error, RuntimeError) and is_out_of_memory(error):
            raise
        shown = f"{name!r} ({CLASSIFIERS[name].place})" if name in CLASSIFIERS else repr(name)
        way_out = "; --judge none evaluates without one" if flag == "judge" else ""
        raise UsageError(f"--{flag}: {shown} {what}: {why(error)}{way_out}") from error


@cache
def find(flag: str, name: str) -> Parts:
    """A classifier's labels, and how to load it; fetches a configuration file at most.

    Raises:
        UsageError: unknown, or it can neither be found nor fetched.
    """
    source = parse_source(flag, name)
    return explained(flag, name, "could not be loaded", lambda: LOADERS[source.kind](source))


def read_labels(name: str, flag: str = "classifier") -> list[str]:
    """A classifier's labels in the order of its logits, without loading its weights.

    Raises:
        UsageError: unknown, or it can neither be found nor fetched.
    """
    return find(flag, name).labels


def check_labels(labels: list[str], name: str, flag: str = "classifier") -> None:
    """Check that a classifier has classes to choose from.

    Raises:
        UsageError: it has one, or none.
    """
    if len(labels) < 2:
        raise UsageError(
            f"--{flag}: {name!r} has {len(labels)} label, as a regression has, or one logit for yes and no; "
            "allowed is a classifier of two classes or more"
        )


def load_classifier(
    name: str, device: torch.device, dtype: torch.dtype, flag: str = "classifier"
) -> Classifier:
    """Load a classifier, frozen.

    Args:
        flag: the option to blame in an error.

    Raises:
        UsageError: unknown, or it can neither be found nor fetched; or its weights do not fit it.
    """
    parts = find(flag, name)
    model, recipe = explained(flag, name, "could not be loaded", parts.load)
    return Classifier(name, model.requires_grad_(False).eval().to(device, dtype), parts.labels, recipe)


def check_classifier(classifier: Classifier, height: int, width: int, guides: bool, flag: str) -> None:
    """Have a classifier see a batch of ``height`` x ``width`` pixels before any work.

    Args:
        guides: whether the gradient of its scores is to reach the images.
        flag: the option to blame in an error.

    Raises:
        UsageError: it cannot score them, or passes no gradient.
    """
    what = f"cannot {'guide' if guides else 'judge'} images of {height}x{width}"
    explained(flag, classifier.name, what, lambda: classifier.check(height, width, guides))


# The classifier that a model brings along.
BROUGHT_CLASSIFIERS = {"miniature": "miniature"}
