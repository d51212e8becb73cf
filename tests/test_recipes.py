"""The differentiable preprocessing is the libraries' own, up to PIL's rounding to 8 bits."""

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from tiny_folders import save_hf_convnext, save_hf_vit

from classifiers import load_classifier
from discriminative.guides.preprocess import Recipe, augmented, hf_recipe, timm_recipe
from miniature.scenes import CLASSES, render

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pictures():
    """500 renders of the miniature's world, enlarged to 160x120 so that there is something to resize and
    to crop."""
    scenes = [render("test", 3_000_000 + i, count=1, class_index=i % len(CLASSES)).image for i in range(500)]
    return [picture.resize((160, 120), Image.Resampling.BICUBIC) for picture in scenes]


def to_batch(pictures) -> torch.Tensor:
    """Pictures as (B, 3, H, W) in [0, 1]."""
    return torch.from_numpy(np.stack([np.asarray(p) for p in pictures])).permute(0, 3, 1, 2) / 255


@pytest.mark.parametrize("name", ["miniature", "miniature-judge"])
def test_verdicts_and_logits_are_those_of_timms_own_preprocessing(name, pictures):
    """Logits within 0.35, 0.02 in the mean, where they span about 20; the most probable class equal on 99
    % at least."""
    classifier = load_classifier(name, CPU, torch.float32)
    transform = timm.data.create_transform(
        **timm.data.resolve_model_data_config(classifier.model), is_training=False
    )
    with torch.no_grad():
        theirs = classifier.model(torch.stack([transform(p) for p in pictures]))  # (500, 44)
        ours = classifier.logits(to_batch(pictures))  # (500, 44)
    assert (ours.argmax(1) == theirs.argmax(1)).float().mean() >= 0.99
    assert (ours - theirs).abs().mean() < 0.02
    assert (ours - theirs).abs().max() < 0.35


@pytest.mark.parametrize("crop_mode", ["center", "squash"])
@pytest.mark.parametrize("crop_pct", [0.875, 0.95, 0.93, 1.0])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_pixels_are_those_of_timms_transform(pictures, crop_mode, crop_pct, interpolation):
    """48 of 51 pixels, as 224 of 235, leave a margin of one and a half, which torchvision rounds to two."""
    data = {"input_size": (3, 48, 48), "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.2)}
    data |= {"crop_mode": crop_mode, "crop_pct": crop_pct, "interpolation": interpolation}
    transform, few = timm.data.create_transform(**data, is_training=False), pictures[:8]
    theirs = torch.stack([transform(p) for p in few])
    assert (timm_recipe(data)(to_batch(few)) - theirs).abs().mean() < 0.005


@pytest.mark.parametrize("save", [save_hf_vit, save_hf_convnext])
def test_pixels_are_those_of_the_hugging_face_processor(pictures, save, tmp_path):
    from transformers import AutoImageProcessor

    save(tmp_path)
    processor, few = AutoImageProcessor.from_pretrained(tmp_path), pictures[:8]
    theirs = processor(few, return_tensors="pt").pixel_values
    ours = hf_recipe(processor)(to_batch(few))
    assert ours.shape == theirs.shape == (8, 3, 32, 32)
    assert (ours - theirs).abs().mean() < 0.01


def test_convnext_from_384_pixels_on_is_squashed():
    from transformers import ConvNextImageProcessor

    recipe = hf_recipe(ConvNextImageProcessor(size={"shortest_edge": 384}))
    assert (recipe.resize, recipe.squash, recipe.crop) == ((384, 384), True, None)


@pytest.mark.parametrize(
    "name",
    [
        "MobileViTImageProcessor",
        "LevitImageProcessor",
        "EfficientNetImageProcessor",
        "PerceiverImageProcessor",
    ],
)
def test_a_processor_that_does_more_is_refused_by_what_it_does(name):
    """These flip the channels, resize by a rule of their own, normalise twice, crop by a rule of their
    own."""
    import transformers

    with pytest.raises(ValueError, match="does more than to resize|rescale"):
        hf_recipe(getattr(transformers, name)())


@pytest.mark.parametrize(
    "name", ["DeiTImageProcessor", "CLIPImageProcessor", "MobileNetV2ImageProcessor", "BeitImageProcessor"]
)
def test_usual_processors_pass(name):
    import transformers

    assert hf_recipe(getattr(transformers, name)()).resize


def test_a_portrait_and_a_landscape_cover_the_square():
    recipe = Recipe((8, 8), (8, 8), (0.0,) * 3, (1.0,) * 3)
    assert recipe.resized(12, 16) == (8, 10)
    assert recipe.resized(16, 12) == (10, 8)
    assert recipe(torch.rand(1, 3, 16, 12)).shape == (1, 3, 8, 8)


def test_unknown_preprocessing_is_refused():
    from transformers import ViTImageProcessor

    with pytest.raises(ValueError, match="interpolation 'lanczos'"):
        timm_recipe(
            {
                "input_size": (3, 8, 8),
                "crop_pct": 1.0,
                "mean": (0,) * 3,
                "std": (1,) * 3,
                "interpolation": "lanczos",
            }
        )
    with pytest.raises(ValueError, match="rescale_factor 0.5"):
        hf_recipe(ViTImageProcessor(rescale_factor=0.5))


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_the_gradient_with_respect_to_the_image_is_right(interpolation):
    recipe = Recipe((9, 9), (8, 8), (0.4, 0.5, 0.6), (0.2, 0.3, 0.2), interpolation)
    images = torch.rand(
        1, 3, 10, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    ).requires_grad_()
    assert torch.autograd.gradcheck(recipe, (images,))


def test_augmented_images_follow_from_their_seeds_and_keep_what_they_show():
    scenes = [render("validation", i, count=1) for i in range(40)]
    images = torch.stack([torch.from_numpy(np.array(s.image)).permute(2, 0, 1) / 255 for s in scenes])
    seeds = list(range(40))
    varied = augmented(images, seeds)
    assert varied.shape == images.shape
    assert 0 <= varied.min() <= varied.max() <= 1
    torch.testing.assert_close(varied[5:7], augmented(images[5:7], seeds[5:7]))
    same = augmented(images[:1].repeat(3, 1, 1, 1), [1, 2, 3])
    assert min((same[i] - same[j]).abs().mean() for i, j in ((0, 1), (0, 2), (1, 2))) > 0.01
    guide = load_classifier("miniature", torch.device("cpu"), torch.float32)
    right = torch.tensor([s.things[0].class_index for s in scenes])
    assert (guide.logits(varied).argmax(1) == right).float().mean() >= 0.95


def test_the_gradient_through_augmentation_is_right():
    image = (
        torch.rand(1, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 0.6 + 0.2
    )
    assert torch.autograd.gradcheck(lambda x: augmented(x, [4]), image.requires_grad_())
