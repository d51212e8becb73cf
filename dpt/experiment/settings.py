"""What the experiment consists of: trainings, arms, parts, prompts, by name. No torch here."""

from dataclasses import dataclass, field, replace
from pathlib import Path

from discriminative.seeds import VALIDATION_BASE
from discriminative.settings import SamplerSettings
from dpt.settings import (
    MINIATURE_PROBE,
    MINIATURE_STAGES,
    MINIATURE_WEIGHTS,
    LossWeights,
    StageSettings,
)

ROWS = Path(__file__).parents[2] / "experiments" / "results" / "dpt_experiment.jsonl"
SEEDS = (0, 1, 2)  # of trainings
CHOOSING_SEED = 0  # of the trainings by which settings are chosen

# Prompts: of each kind how many that training has shown the parts of, and how many held out.
QUOTAS = {
    "table": {"relation": (75, 75), "attribute": (75, 75), "count": (100, 0), "conjunction": (100, 0)},
    "tuning": {"relation": (15, 15), "attribute": (15, 15), "count": (20, 0), "conjunction": (20, 0)},
}
ASKED = {"relation": 1500, "attribute": 1500, "count": 140, "conjunction": 1000}  # texts to take them from
TUNING_SHARE = 4  # one fact in so many is for tuning
PROMPT_SEED = 7
PART = 50  # prompts, drawn and judged together
NOISES = 4  # pictures of a prompt
FIRST_NOISE = {"table": 0, "tuning": VALIDATION_BASE}
MOST_NOISES = 10_000  # between a picture's noise and its next candidate's

GUIDANCE = 7.5
CHEAP = SamplerSettings(12, GUIDANCE, scheduler="dpmsolver++")
COSTLY = SamplerSettings(30, GUIDANCE)  # the model's own
COSTLY_PARTS = 4
AT_ONCE = 20  # pictures

SCENES = {"train": 4000, "test": 600}
SCENE_SEED = 0
READ_NOISES = 2


# Trainings.


@dataclass(frozen=True)
class Training:
    """One training.

    Args:
        stage: "probe", "tune", "soft" for soft tokens, or "errors" for a LoRA by the UNet's own errors.
        begins_from: the training whose adapter it takes up.
        losses: which of "itm", "rec" and "mse".
        settings: its length and sizes.
        weights: of the loss's parts.
        point: where the UNet is probed.
        target: what matching aims at.
        only_lora: the adapter stays as it is.
        text_encoder: a LoRA on the text encoder, too.
        on: the training whose LoRA lies on the frozen UNet that is probed.
        kept: updates after which the LoRA is kept, too.
    """

    stage: str
    begins_from: str = ""
    losses: tuple[str, ...] = ("itm", "rec")
    settings: StageSettings = MINIATURE_STAGES["probe"]
    weights: LossWeights = MINIATURE_WEIGHTS
    point: str = MINIATURE_PROBE
    target: str = "end"
    only_lora: bool = False
    text_encoder: bool = False
    on: str = ""
    kept: tuple[int, ...] = ()


PROBE = Training("probe")
TUNE = Training("tune", "probe", ("itm", "rec", "mse"), MINIATURE_STAGES["tune"])
LONGER = replace(MINIATURE_STAGES["tune"], steps=600)
COURSE = (75, 150, 300, 450)
ERROR_WEIGHTS = (0.002, 0.01, 0.05)
FASTER = replace(MINIATURE_STAGES["tune"], learning_rate=2e-3)
LONGEST = replace(MINIATURE_STAGES["tune"], steps=2400)
# Five times the weight of all that discriminates.
HEAVIER = replace(MINIATURE_WEIGHTS, mse=0.2)
# Denoising's gradient is then of the order of matching's, which else is thousands of times as long.
BALANCED = replace(MINIATURE_WEIGHTS, mse=1000)
SOFT_TOKENS = 8  # a layer
SOFT_RATES = (5e-4, 5e-3, 2e-2)
SHORT = replace(MINIATURE_STAGES["probe"], steps=200)
BLOCKS = ("bottom0", "bottom1", "bottom2", "mid", "up0", "up1", "up2", MINIATURE_PROBE)
# Remedies whose features are asked by a fresh probe, too.
PROBED_REMEDIES = {"longest": "C longest", "longer": "C longer", "LoRA alone": "C alone"}

TRAININGS = {
    "probe": PROBE,
    "denoising": replace(TUNE, losses=("mse",), only_lora=True),
    "tuned": TUNE,
    "probe without REC": replace(PROBE, losses=("itm",)),
    "tuned without REC": replace(TUNE, begins_from="probe without REC", losses=("itm", "mse")),
    "probe without ITM": replace(PROBE, losses=("rec",)),
    "tuned without ITM": replace(TUNE, begins_from="probe without ITM", losses=("rec", "mse")),
    # The same scenes, updates and forwards of the UNet as in "tuned".
    **{
        f"soft tokens {rate:g}": Training(
            "soft",
            losses=("itm",),
            settings=replace(TUNE.settings, learning_rate=rate),
            weights=LossWeights(),
        )
        for rate in SOFT_RATES
    },
    "fresh probe of tuned": replace(PROBE, on="tuned"),
    "fresh probe of denoising": replace(PROBE, on="denoising"),
    **{f"fresh probe of {name}": replace(PROBE, on=name) for name in PROBED_REMEDIES},
    "text encoder": replace(TUNE, text_encoder=True),
    "text encoder, denoising": replace(TUNE, losses=("mse",), only_lora=True, text_encoder=True),
    "probe of words": replace(PROBE, target="words"),
    "words": replace(TUNE, begins_from="probe of words"),
    "probe at up0": replace(PROBE, point="up0"),
    "at up0": replace(TUNE, begins_from="probe at up0"),
    "heavier": replace(TUNE, weights=HEAVIER),
    "longer": replace(TUNE, settings=LONGER, kept=COURSE),
    "longer, denoising": replace(TUNE, settings=LONGER, losses=("mse",), only_lora=True, kept=COURSE),
    "balanced": replace(TUNE, settings=LONGER, weights=BALANCED),
    "LoRA alone": replace(TUNE, settings=LONGER, only_lora=True),
    "longest": replace(TUNE, settings=LONGEST),
    "longest, denoising": replace(TUNE, settings=LONGEST, losses=("mse",), only_lora=True),
    # The same scenes, updates and forwards of the UNet as in "tuned".
    **{
        f"own errors {weight:g}": Training(
            "errors",
            losses=("itm", "mse"),
            settings=TUNE.settings,
            weights=LossWeights(i2t=weight),
            only_lora=True,
        )
        for weight in ERROR_WEIGHTS
    },
    "faster": replace(TUNE, settings=FASTER),
    "faster, denoising": replace(TUNE, settings=FASTER, losses=("mse",), only_lora=True),
    **{f"block {name}": replace(PROBE, losses=("itm",), settings=SHORT, point=name) for name in BLOCKS},
}


# Arms.


@dataclass(frozen=True)
class Arm:
    """Pictures that come about in one way.

    Args:
        told: in words.
        way: "plain", "corrected", "best" of some by a score, or "noise" that was optimised.
        training: whose LoRA or soft tokens the model has; none where empty.
        adapter: the training whose adapter corrects, scores or is asked; none where empty.
        choices: settings of which the best on the tuning prompts is taken.
        sampler: of the pictures.
        parts: of the table's prompts.
        seeds: how many trainings, of ``SEEDS``; 0: no training plays a part.
    """

    told: str
    way: str = "plain"
    training: str = ""
    adapter: str = ""
    choices: tuple[dict, ...] = field(default=({},))
    sampler: SamplerSettings = CHEAP
    parts: int = 10
    seeds: int = len(SEEDS)


OFFICIAL = tuple({"factor": factor, "mode": "official"} for factor in (0.5, 2.0, 5.0, 15.0))
CORRECTIONS = OFFICIAL + tuple({"factor": factor, "mode": "state"} for factor in (2.0, 5.0, 15.0))
# Steps of the prediction that is scored, and length of the gradient's step.
STEPS_AND_RATES = ((1, 5.0), (1, 20.0), (1, 80.0), (2, 20.0))
OPTIMISED = tuple({"steps": steps, "rate": rate} for steps, rate in STEPS_AND_RATES)
SOFT = tuple({"training": f"soft tokens {rate:g}"} for rate in SOFT_RATES)
OWN_ERRORS = tuple({"training": f"own errors {weight:g}"} for weight in ERROR_WEIGHTS)

ARMS = {
    "A": Arm("base", seeds=0),
    "B": Arm("LoRA, denoising alone", training="denoising"),
    "C": Arm("DPT", training="tuned"),
    "D": Arm("DPT with self-correction", "corrected", "tuned", "tuned", CORRECTIONS),
    "E": Arm("base with stage 1 and self-correction", "corrected", adapter="probe", choices=OFFICIAL),
    "H": Arm("base, best by the adapter", "best", adapter="probe"),
    "I": Arm("base, best by a classifier", "best", seeds=0),
    "J": Arm("soft tokens, contrastive", choices=SOFT),
    "K": Arm("base, noise optimised by the adapter", "noise", adapter="probe", choices=OPTIMISED),
    "F": Arm("DPT without REC", training="tuned without REC"),
    "G": Arm("DPT without ITM", training="tuned without ITM"),
    "A30": Arm("base, 30 steps of the model's own sampler", sampler=COSTLY, parts=COSTLY_PARTS, seeds=0),
}
# What is tried where C brings nothing, each beside C and the control that is trained alike; one seed.
REMEDIES = {
    "C text": Arm("DPT, LoRA on the text encoder too", training="text encoder", seeds=1),
    "B text": Arm("its control", training="text encoder, denoising", seeds=1),
    "C words": Arm("DPT, matching aims at all words' states", training="words", seeds=1),
    "C up0": Arm("DPT, probed at up0", training="at up0", seeds=1),
    "C heavier": Arm("DPT, discriminative losses weigh five times", training="heavier", seeds=1),
    "C longer": Arm("DPT, four times stage 2", training="longer", seeds=1),
    "B longer": Arm("its control", training="longer, denoising", seeds=1),
    "C balanced": Arm("DPT, four times stage 2, denoising weighs 1000", training="balanced", seeds=1),
    "C alone": Arm("DPT, four times stage 2, adapter frozen", training="LoRA alone", seeds=1),
    "C longest": Arm("DPT, sixteen times stage 2", training="longest", seeds=1),
    "B longest": Arm("its control", training="longest, denoising", seeds=1),
    "C faster": Arm("DPT, four times the rate", training="faster", seeds=1),
    "B faster": Arm("its control", training="faster, denoising", seeds=1),
    "C errors": Arm("no adapter: the right text is to err least", choices=OWN_ERRORS, seeds=1),
}
ALL_ARMS = ARMS | REMEDIES
CONTROL = {
    "C text": "B text",
    "C words": "B",
    "C up0": "B",
    "C heavier": "B",
    "C longer": "B longer",
    "C balanced": "B longer",
    "C alone": "B longer",
    "C longest": "B longest",
    "C faster": "B faster",
    "C errors": "B",
}

# A fresh probe of a tuned model has the seed of the next training, so it is not the one that tuned.
FRESH = {
    "probe": "base",
    "fresh probe of denoising": "B",
    "fresh probe of tuned": "C",
    **{f"fresh probe of {name}": told for name, told in PROBED_REMEDIES.items()},
}
THAT_TUNED = {"tuned": "C, the adapter that tuned it", "longest": "C longest, the adapter that tuned it"}


def seed_of_model(seed: int) -> int:
    """The seed of the tuned model that a fresh probe reads: another than the probe's own, so that it is not
    the one with which the model was tuned."""
    return SEEDS[(SEEDS.index(seed) - 1) % len(SEEDS)]


# What a run is made of, the most important first.
PARTS = (*ARMS, "probes", "why", "remedies", "course", "blocks")
