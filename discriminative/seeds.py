"""The seeds of the five uses, which never meet.

Evaluation counts from 0, validation from half a million, measured steps from 600,000, training from a million
on, a million numbers for each ``--seed``, and data sets from behind the last of these to 2**32: torch's
generator on the CPU takes no more bits.
"""

VALIDATION_BASE = 500_000
MEASURING_BASE = 600_000
SEEDS_OF_A_LOOK = 100
SEED_RANGE = 1_000_000  # numbers for each --seed
MAX_SEED = 4000
DATASET_BASE = SEED_RANGE * (MAX_SEED + 2)
END_OF_SEEDS = 2**32
MAX_DATASET = 10_000_000  # images; seeds enough, even where most are thrown away


def turn(update: int, noise_pool: int) -> int:
    """Which noises update ``update`` (from 0) has: those of an earlier one where noises come back; 0
    never does."""
    return update % noise_pool if noise_pool else update


def training_seeds(seed: int, update: int, number: int) -> list[int]:
    """Seeds of the ``number`` images of one update, from :func:`turn`, of a training with ``--seed``."""
    first = SEED_RANGE * (1 + seed) + update * number
    return list(range(first, first + number))


def validation_seeds(number: int) -> list[int]:
    """The first ``number`` seeds on which the best token is chosen."""
    return list(range(VALIDATION_BASE, VALIDATION_BASE + number))


def measuring_seeds(look: int, number: int) -> list[int]:
    """The ``number`` seeds, at most ``SEEDS_OF_A_LOOK``, of look ``look``, from 0, for a measured step; after
    4,000 looks they come again."""
    first = MEASURING_BASE + look * SEEDS_OF_A_LOOK % (SEED_RANGE - MEASURING_BASE)
    return list(range(first, first + number))


def evaluation_seeds(number: int) -> list[int]:
    """The first ``number`` seeds of the evaluation: never training's, never validation's."""
    return list(range(number))
