"""The random numbers of a training: what timm, NumPy and torch draw follows its seed."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Within the block all random numbers follow a seed; behind it they go on as before."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002 (timm draws there)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    torch.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])  # noqa: NPY002
        torch.set_rng_state(before[2])
