"""Small settings of the room. No torch here: the command line reads them first."""

from dataclasses import dataclass, fields


def _check_at_least(settings, least: float, names: tuple[str, ...]) -> None:
    """Raises ValueError where a named number is smaller than the least that is allowed."""
    for name in names:
        given = getattr(settings, name)
        if not given >= least:
            raise ValueError(f"{name}: {given} was given; allowed is {least} or more")


@dataclass(frozen=True)
class AdapterSettings:
    """Sizes of the discriminative adapter. The defaults are the paper's.

    Args:
        width: of its transformer, a multiple of four and of ``heads``.
        heads: of each attention.
        feedforward: inner width of each feed-forward net.
        dropout: share of numbers left out in training, from 0 (off) to below 1.
        matching_queries: that answer whether image and text match.
        grounding_queries: that each propose one box.
        slots: tokens of an expression that a box can name; one further index means "no object".
        alignment_width: of the space that boxes and words share.

    Raises:
        ValueError: a number that cannot be.
    """

    width: int = 256
    heads: int = 8
    feedforward: int = 2048
    dropout: float = 0.1
    matching_queries: int = 10
    grounding_queries: int = 100
    slots: int = 255
    alignment_width: int = 64

    def __post_init__(self):
        _check_at_least(self, 1, tuple(f.name for f in fields(self) if f.name != "dropout"))
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout: {self.dropout} was given; allowed is 0 to below 1")
        # Sines and cosines, each along y and x.
        if self.width % 4:
            raise ValueError(f"width: {self.width} was given; allowed is a multiple of 4")
        if self.width % self.heads:
            raise ValueError(f"width: {self.width} was given; allowed is a multiple of {self.heads} heads")


# For pictures of 64x64 pixels with a few things on them. No dropout: noises are always new, and on a CPU it
# takes a third of a step.
MINIATURE_ADAPTER = AdapterSettings(
    width=128,
    heads=4,
    feedforward=512,
    dropout=0.0,
    matching_queries=8,
    grounding_queries=16,
    slots=31,
    alignment_width=32,
)


@dataclass(frozen=True)
class LossWeights:
    """Weights of the parts of the loss, by the parts' names; 0 turns a part off.

    Args:
        ce: which words of the expression each box is of.
        l1: distance of boxes.
        giou: generalised intersection over union of boxes.
        align: boxes and words in a shared space.
        i2t: the right text among three for an image.
        t2i: the right image among three for a text.
        mse: the usual denoising loss, in tuning only.

    Raises:
        ValueError: a negative weight.
    """

    ce: float = 1
    l1: float = 5
    giou: float = 2
    align: float = 1
    i2t: float = 1
    t2i: float = 1
    mse: float = 1

    def __post_init__(self):
        _check_at_least(self, 0, tuple(f.name for f in fields(self)))


@dataclass(frozen=True)
class StageSettings:
    """How long a stage learns, and from how much at once.

    Args:
        steps: updates.
        batch_size: samples at once on each process; six forwards of the UNet belong to a sample.
        accumulation: such batches in an update.
        learning_rate: of AdamW.
        timestep_power: timesteps are 1,000 u^power, u uniform in [0, 1): 1 is uniform, above 1 early ones
            (little noise) come more often.
        cosine: the learning rate falls to 0 as a cosine does; else it stays.
    """

    steps: int
    batch_size: int
    accumulation: int
    learning_rate: float
    timestep_power: float = 1
    cosine: bool = False


# The paper's.
STAGES = {
    "probe": StageSettings(steps=60_000, batch_size=48, accumulation=1, learning_rate=1e-4),
    "tune": StageSettings(steps=5_000, batch_size=8, accumulation=8, learning_rate=1e-4, cosine=True),
}
# Of --model miniature, for half an hour for both on two cores. At much noise its pictures of 64 pixels say
# nothing, so an adapter learns fastest at little.
MINIATURE_STAGES = {
    "probe": StageSettings(
        1000, batch_size=16, accumulation=1, learning_rate=5e-4, timestep_power=2, cosine=True
    ),
    "tune": StageSettings(150, batch_size=12, accumulation=1, learning_rate=5e-4, cosine=True),
}
# Matching is learned slower than boxes, whose losses are larger (docs/experiments.md).
MINIATURE_WEIGHTS = LossWeights(i2t=5, t2i=5)
PROBE = "up1"
MINIATURE_PROBE = "all-128-8"  # its blocks know different things: colours one, numbers another
MINIATURE_SAMPLES = 4_000  # scenes of a training
# "red car", as RefCOCO has it. Its tokenizer spells "the" and "leftmost" letter by letter, and a box is to
# name every token of its words: the longest would have most of the loss.
MINIATURE_WORDING = "bare"

ADAM_BETAS = (0.9, 0.999)
ADAM_EPSILON = 1e-8
WEIGHT_DECAY = 1e-2
MAX_GRAD_NORM = 1.0

LORA_RANK = 4  # and alpha, so that the scale is 1
UNET_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
TEXT_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")

CORRECTION_FACTOR = 0.5
MINIATURE_CORRECTION_FACTOR = 0.0  # no strength gains anything there: docs/dpt.md

EVALUATION_TIMESTEP = 500
MINIATURE_EVALUATION_TIMESTEP = 200
CHOICE_NOISES = 2  # under which finished pictures are scored, to keep the best
HIT_RANKS = (1, 5, 10)
HIT_OVERLAP = 0.5  # IoU, or GIoU, from which a box is found

CACHED_BYTES = 4e9  # of latents that are kept
LOADING_THREADS = 2  # that read or draw the next batch's pictures

# Parts of the loss by the names of --losses.
LOSSES = {"itm": ("i2t", "t2i"), "rec": ("ce", "l1", "giou", "align"), "mse": ("mse",)}
