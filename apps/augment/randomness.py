"""The random numbers of a training: what timm, NumPy and torch draw follows its seed."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Within the block all random numbers follow a seed; behind it they go on as before."""
    of_python = random.getstate()
    of_numpy = np.random.get_state()  # noqa: NPY002 (timm draws there)
    of_torch = torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    torch.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)  # noqa: NPY002
        torch.set_rng_state(of_torch)
