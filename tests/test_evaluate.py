"""Scoring: the right class by the right classifier."""

from dataclasses import replace

import pytest
import torch
from conftest import tiny_classifier

from classifiers import read_labels
from config import WorkError
from evaluate import score, share, target_of, verdicts


def test_a_label_that_stands_twice_is_scored_by_its_index():
    """ImageNet has two cranes; the first match by name is the bird, the second index the machine."""
    labels = read_labels("inet")
    assert labels[134] == labels[517] == "crane"
    guide = replace(tiny_classifier(), labels=labels)
    assert target_of(replace(guide, name="judge"), guide, 517) == 517


def test_a_judge_with_other_labels_is_matched_by_name_and_only_if_sure():
    guide = tiny_classifier()  # tiger cat, bat, cat
    judge = replace(tiny_classifier(), labels=["cat", "tiger cat", "bat", "bat"])
    assert target_of(judge, guide, 0) == 1
    assert target_of(judge, guide, 1) is None
    assert target_of(None, guide, 0) is None


def test_accuracy_is_the_share_of_images_given_to_the_class():
    classifier = tiny_classifier()
    images = torch.rand(9, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = (classifier.logits(images).argmax(1) == 2).float().mean().item()
    assert share(score(classifier, 2, images, 4)) == expected
    assert share(score(None, None, images, 4)) is None


def test_images_whose_logits_are_not_finite_are_no_verdict():
    """The most probable of NaNs would be the first class."""
    with pytest.raises(WorkError, match="not finite"):
        verdicts(tiny_classifier(), torch.full((2, 3, 16, 16), float("nan")), 2)
