"""The options of python -m apps.augment, and their limits. No torch here: the command line comes first."""

import argparse
from dataclasses import dataclass
from pathlib import Path

from discriminative.errors import UsageError

AUGMENTATIONS = ("basic", "strong")
LAYERS = ("all", "head")
# AdamW's, where none is given: by the layers that are trained, and whether they have weights already.
LEARNING_RATES = {("all", True): 2e-4, ("all", False): 1e-3, ("head", True): 1e-3}


@dataclass(frozen=True)
class Options:
    """What the command line says; field names are the flags.

    Args:
        real: folder of real pictures to train on, a folder a class in it; ``generated``, ``val`` and
            ``test`` alike.
        val: None holds a fifth of each class of ``real`` out.
        classifier: ``timm:...``, or a timm classifier of the table in classifiers.py.
        shares: of generated pictures in a batch, which are tried; each above 0, below 1.
        learning_rate: AdamW's; None takes that of ``LEARNING_RATES``.
        seeds: pairs of trainings.
    """

    real: str
    generated: str
    test: str
    classifier: str
    val: str | None = None
    from_scratch: bool = False
    layers: str = "all"
    image_size: int | None = None
    augmentation: str = "strong"
    shares: tuple[float, ...] = (0.2, 0.5, 0.8)
    steps: int = 500
    batch_size: int = 32
    learning_rate: float | None = None
    seeds: int = 8
    device: str = "auto"
    output_path: str = "results/augment"

    @property
    def rate(self) -> float:
        """The learning rate in use."""
        return self.learning_rate or LEARNING_RATES[self.layers, not self.from_scratch]


def parse_shares(text: str) -> tuple[float, ...]:
    """ "0.2,0.5" as numbers.

    Raises:
        argparse.ArgumentTypeError: one is not.
    """
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} was given; allowed are numbers with commas") from None


LIMITS = {
    "image_size": (lambda n: n is None or n >= 8, "8 or more pixels"),
    "shares": (
        lambda shares: all(0 < s < 1 for s in shares) and len(set(shares)) == len(shares),
        "numbers above 0 and below 1 with commas, each once",
    ),
    "steps": (lambda n: n >= 1, "1 or more"),
    "batch_size": (lambda n: n >= 2 and n % 2 == 0, "an even number, as CutMix takes pairs"),
    "learning_rate": (lambda rate: rate is None or 0 < rate <= 1, "above 0, at most 1"),
    "seeds": (lambda n: 1 <= n <= 1000, "1 to 1000"),
}
FOLDERS = ("real", "generated", "val", "test")


def validate(options: Options) -> None:
    """Check what can be checked before anything heavy is imported.

    Raises:
        UsageError: naming the flag, what was given, and what is allowed.
    """
    for name, (check, allowed) in LIMITS.items():
        value = getattr(options, name)
        if not check(value):
            given = ",".join(map(str, value)) if isinstance(value, tuple) else value
            raise UsageError(f"--{name}: {given} was given; allowed is {allowed}")
    if options.layers == "head" and options.from_scratch:
        raise UsageError("--layers: 'head' was given with --from_scratch, where the other layers are random")
    if any(not round(share * options.batch_size) for share in options.shares) or any(
        round(share * options.batch_size) == options.batch_size for share in options.shares
    ):
        raise UsageError(
            f"--shares: of a batch of {options.batch_size} pictures each share has to leave one at least "
            "of either kind"
        )
    for name in FOLDERS:
        place = getattr(options, name)
        if place is not None and not Path(place).is_dir():
            raise UsageError(
                f"--{name}: {place!r} was given, which is no folder; allowed is one with a folder of "
                "pictures for each class"
            )
