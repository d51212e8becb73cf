"""The methods that claim (i) compares, their settings and candidates, and what a unit of work is."""

import json
from dataclasses import asdict, dataclass, field
from itertools import product

from miniature.scenes import CLASSES

IMAGES = 40  # that a user wants, whose drawing counts as cost
OURS = "class token"
OFFICIAL = "official settings"
AS_EVALUATED = {name: f"{name}, drawn as evaluated" for name in (OURS, OFFICIAL)}
TUNING_SEED = 35


@dataclass(frozen=True)
class Method:
    """A way to get images of a class.

    Args:
        learn: name of the function of ``rivals.py``.
        settings: its arguments.
        equal_cost: whether it may spend what the class token did.
        seeded: whether anything of it depends on the training seed.
        seeds: how many of the training seeds it has.
        images: that are measured.
        on_each: images on each background.
        seconds: that one unit takes on a core, before any row tells it.
        candidates: changes of the settings, of which the tuning classes choose one.
        tuned_as: another method, whose choice this one takes over.
    """

    learn: str
    settings: dict = field(default_factory=dict)
    equal_cost: bool = True
    seeded: bool = True
    seeds: int | None = None
    images: int = IMAGES
    on_each: int = 5
    seconds: float = 60
    candidates: tuple[dict, ...] = ()
    tuned_as: str = ""


def every(**values) -> tuple[dict, ...]:
    """All combinations of settings' values."""
    return tuple(dict(zip(values, picked, strict=True)) for picked in product(*values.values()))


def inversion(real: int, **more) -> Method:
    """Textual inversion on so many images."""
    settings = {"real": real, "rate": 5e-3, "prompt": "{token}"}
    return Method("textual_inversion", settings, seconds=90, **more)


TUNED_INVERSION = "textual inversion, 16 images"
METHODS = {
    "plain prompt": Method("plain_prompt", equal_cost=False, seeded=False, seconds=10),
    "precise phrase": Method("precise_phrase", equal_cost=False, seeded=False, seconds=10),
    OURS: Method("class_token", {"preset": "default"}, equal_cost=False, seconds=75),
    OFFICIAL: Method("class_token", {"preset": "paper"}, equal_cost=False, seeds=1, seconds=50),
    "best of k": Method("best_of_k", seconds=60),
    "textual inversion, 1 image": inversion(1, seeds=1, tuned_as=TUNED_INVERSION),
    "textual inversion, 4 images": inversion(4, seeds=1, tuned_as=TUNED_INVERSION),
    TUNED_INVERSION: inversion(
        16, candidates=every(rate=(2e-3, 5e-3, 1e-2, 2e-2), prompt=("{token}", "{token} {class}"))
    ),
    "noise optimisation": Method(
        "noise_optimisation",
        {"steps": 4, "rate": 5.0},
        images=20,
        on_each=1,
        seconds=80,
        candidates=every(steps=(1, 2, 4), rate=(5.0, 20.0, 50.0, 100.0)),
    ),
    "hard prompt": Method(
        "hard_prompt",
        {"words": 1, "rate": 0.05, "stage": 0},
        seconds=150,
        candidates=every(words=(1, 2, 3), rate=(0.05, 0.2, 0.5, 1.0)),
    ),
    "LoRA": Method(
        "reward_lora",
        {"rank": 4, "rate": 3e-3, "steps": 12},
        seconds=110,
        candidates=every(rate=(3e-3, 5e-3, 1e-2, 2e-2, 5e-2), steps=(1, 12)),
    ),
    # They wait for a class token's cost, and so for the tokens.
    AS_EVALUATED[OURS]: Method(
        "drawn_as_evaluated", {"method": OURS, "preset": "default"}, seeds=1, seconds=30
    ),
    AS_EVALUATED[OFFICIAL]: Method(
        "drawn_as_evaluated", {"method": OFFICIAL, "preset": "paper"}, seeds=1, seconds=45
    ),
}


@dataclass(frozen=True)
class Unit:
    """One method for one class and training seed; ``class_index`` is from 1."""

    method: str
    class_index: int
    seed: int
    changes: dict = field(default_factory=dict)
    budget: dict | None = None
    check: bool = False

    @property
    def settings(self) -> dict:
        """The method's, with the changes."""
        return METHODS[self.method].settings | self.changes

    @property
    def kind(self) -> str:
        """Whether its class is the rare or the common sense of its word."""
        return CLASSES[self.class_index - 1].kind

    @property
    def key(self) -> str:
        """What tells its row from others: the method as it is set today, and what it may cost."""
        return key_of(asdict(self) | {"settings": self.settings})


def key_of(row: dict) -> str:
    """The key of a row's unit."""
    names = ("method", "class_index", "seed", "settings", "budget", "check")
    return json.dumps([row[name] for name in names], sort_keys=True)
