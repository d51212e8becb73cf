"""Figures of a set of images, from what classifiers make of them: shares with intervals, paired tests,
distances of features."""

import math
import warnings

import torch

CONFIDENCE = 0.95
PERMUTATIONS = 9999  # of signs; all of them where there are no more
MIN_PAIRS = 10  # from where on a mean difference has an interval
KERNEL_SUBSET = 50  # images of each side in a subset of the kernel distance


def interval(right: int, number: int) -> tuple[float, float]:
    """Wilson's interval of 95 % of a share, as of other images of the same kind."""
    from scipy.stats import binomtest

    found = binomtest(right, number).proportion_ci(CONFIDENCE, method="wilson")
    return float(found.low), float(found.high)


def mcnemar(only_first: int, only_second: int) -> float:
    """Two-sided exact p-value of McNemar's test: how likely so uneven a split of the pairs that differ
    is, where none is better.

    Args:
        only_first, only_second: pairs in which only the one or only the other is right.
    """
    from scipy.stats import binomtest

    differ = only_first + only_second
    return float(binomtest(only_first, differ).pvalue) if differ else 1.0


def paired(with_token: torch.Tensor, without: torch.Tensor) -> dict[str, float]:
    """With the token against without, on the same seeds, from which of their images are right, (N,) each."""
    only_with = int((with_token & ~without).sum())
    only_without = int((without & ~with_token).sum())
    difference = (only_with - only_without) / len(without)
    return {
        "difference": difference,
        "only_with": only_with,
        "only_without": only_without,
        "p_value": mcnemar(only_with, only_without),
    }


def paired_log_probabilities(with_token: torch.Tensor, without: torch.Tensor) -> dict[str, float]:
    """With the token against without, on the same seeds, from the class's log-probabilities, (N,) each.

    They move long before a verdict does. The p-value is two-sided, of the mean difference's sign: each pair's
    is turned round at random (every way where there are at most ``PERMUTATIONS``), as nothing would change
    if the token did nothing. One pair says nothing: 1.
    """
    from scipy.stats import permutation_test

    if len(with_token) == 1:
        difference = (with_token - without).item()
        return {"log_probability_difference": difference, "log_probability_p_value": 1.0}

    def mean_difference(x, y, axis):
        return (x - y).mean(axis=axis)

    both = (with_token.double().numpy(), without.double().numpy())
    found = permutation_test(
        both, mean_difference, permutation_type="samples", n_resamples=PERMUTATIONS, vectorized=True, rng=0
    )
    return {
        "log_probability_difference": float(found.statistic),
        "log_probability_p_value": float(found.pvalue),
    }


def simultaneous_intervals(differences: torch.Tensor) -> list[tuple[float, float] | None]:
    """Intervals of the mean paired differences (N, K), which hold all K at once with 95 %.

    Student's t, each at a level of 1 - .05 / K (Bonferroni). None for all of fewer than ``MIN_PAIRS`` pairs.
    """
    from scipy.stats import t

    pairs, number = differences.shape
    if pairs < MIN_PAIRS:
        return [None] * number
    means = differences.mean(0)  # (K,)
    errors = differences.std(0) / pairs**0.5  # (K,)
    width = float(t.ppf(1 - (1 - CONFIDENCE) / (2 * number), pairs - 1))
    ends = torch.stack([means - width * errors, means + width * errors], dim=1)  # (K, 2)
    return [tuple(pair) for pair in ends.tolist()]


def ranks(logits: torch.Tensor, target: int) -> torch.Tensor:
    """The class's place among the labels by logits (N, K), (N,); 1 is the most probable."""
    return 1 + (logits > logits[:, target : target + 1]).sum(1)


def spread(features: torch.Tensor) -> float | None:
    """Mean cosine distance of features (N, D) from each other; None where there are fewer than two."""
    if len(features) < 2:
        return None
    unit = torch.nn.functional.normalize(features.double(), dim=1)
    return (1 - (unit @ unit.T)[~torch.eye(len(unit), dtype=torch.bool)]).mean().item()


class GivenFeatures(torch.nn.Module):
    """For torchmetrics, which asks a module for features: they are there already."""

    def __init__(self, width: int):
        super().__init__()
        self.num_features = width

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """The features (N, D) themselves."""
        return features


def distances(features: torch.Tensor, reference: torch.Tensor) -> dict[str, float | None]:
    """Fréchet distance (Heusel et al. 2017) and kernel distance (Bińkowski et al. 2018) of features (N,
    D) to reference ones (M, D).

    The space is the caller's, so figures compare with others of the same space and the same numbers of
    images only. None where there are fewer than two images on a side.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import KernelInceptionDistance

    fewest = min(len(features), len(reference))
    if fewest < 2:
        return {"frechet_distance": None, "kernel_distance": None}
    given = GivenFeatures(features.shape[1])
    found = {}
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.filterwarnings("ignore", message=".*large memory footprint")
        torch.manual_seed(0)  # the kernel distance draws its subsets
        metrics = {
            "frechet_distance": FrechetInceptionDistance(feature=given),
            "kernel_distance": KernelInceptionDistance(feature=given, subset_size=min(KERNEL_SUBSET, fewest)),
        }
        for name, metric in metrics.items():
            metric.update(reference.double(), real=True)
            metric.update(features.double(), real=False)
            value = metric.compute()
            found[name] = float(value[0] if isinstance(value, tuple) else value)
    return {name: value if math.isfinite(value) else None for name, value in found.items()}
