"""Classifiers: preprocessing, logits, labels."""

import numpy as np
import pytest
import torch
from conftest import tiny_classifier
from PIL import Image

from classifiers import CLASSIFIERS, check_class_index, check_classifier, prompt_class_name, read_labels
from config import UsageError


def test_the_users_class_283_is_imagenets_tiger_cat():
    labels = read_labels("inet")
    assert len(labels) == 1000
    assert prompt_class_name(labels[283 - 1]) == "tiger cat"
    assert prompt_class_name("n_Tiger_Cat, Felis") == "n tiger cat"


@pytest.mark.parametrize("index", [0, -3, 1001])
def test_an_index_outside_the_labels_is_refused(index):
    with pytest.raises(UsageError, match=f"--class_index: {index} was given; allowed is 1 to 1000"):
        check_class_index("inet", index, read_labels("inet"))


def test_an_unknown_classifier_is_refused_with_the_known_ones():
    with pytest.raises(UsageError) as error:
        check_classifier("judge", "resnet")
    assert all(name in str(error.value) for name in CLASSIFIERS)


def test_every_default_judge_is_in_the_table():
    assert all(source.judge is None or source.judge in CLASSIFIERS for source in CLASSIFIERS.values())


def test_preprocessing_agrees_with_pil():
    """Torch's antialiased bicubic resize and PIL's differ by rounding to 8 bits only."""
    rng = np.random.default_rng(0)
    smooth = Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)).resize((64, 48), Image.Resampling.BICUBIC)
    classifier = tiny_classifier()
    pixels = torch.from_numpy(np.array(smooth)).permute(2, 0, 1)[None] / 255  # (1, 3, 48, 64)
    ours = classifier.preprocess(pixels)[0] / 2 + 0.5  # (3, 8, 8)
    small = smooth.resize((11, 8), Image.Resampling.BICUBIC).crop((1, 0, 9, 8))
    theirs = torch.from_numpy(np.array(small)).permute(2, 0, 1) / 255
    assert (ours - theirs).abs().max() < 2.5 / 255


def test_the_gradient_with_respect_to_the_image_is_right():
    classifier = tiny_classifier(torch.float64)
    images = torch.rand(1, 3, 10, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.autograd.gradcheck(classifier.logits, (images,))
