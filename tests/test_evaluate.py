"""Scoring: the right class by the right classifier."""

import pytest
import torch
from conftest import tiny_classifier

from config import WorkError
from evaluate import accuracies, score, verdicts


def test_accuracy_is_the_share_of_images_given_to_the_class():
    classifier = tiny_classifier()
    images = torch.rand(9, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = (classifier.logits(images).argmax(1) == 2).float().mean().item()
    right = score(classifier, 2, {"token": images, "baseline": images}, 4)
    assert accuracies(right)["accuracy_token"] == expected
    assert accuracies(None, "judge_") == {"judge_accuracy_token": None, "judge_accuracy_baseline": None}


def test_images_whose_logits_are_not_finite_are_no_verdict():
    """The most probable of NaNs would be the first class."""
    with pytest.raises(WorkError, match="not finite"):
        verdicts(tiny_classifier(), torch.full((2, 3, 16, 16), float("nan")), 2)
