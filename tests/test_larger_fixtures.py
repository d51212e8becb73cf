"""What small, square and lone fixtures cannot show: more than ten labels, unlike sides, several chunks."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import SHORT_TRAINING, learning, tiny_classifier
from PIL import Image
from tiny_folders import VIT, save_models, save_processor, save_sd1, save_timm

from apps.session import Session
from classifiers import load_classifier, read_labels
from config import RunConfig
from discriminative.diffusion.inspect import check_sampling, read_configs, relative_size
from discriminative.errors import UsageError
from discriminative.guides import preprocess
from discriminative.guides.classifier import Guide
from discriminative.guides.loaders import hf_labels, timm_labels
from discriminative.guides.preprocess import Recipe, augmented, hf_recipe, timm_recipe
from discriminative.records.files import grid
from discriminative.records.pictures import Shown, framed, upright
from discriminative.seeds import training_seeds
from discriminative.tokens.dataset import Dataset
from discriminative.tokens.objective import Objective
from evaluate import evaluate

IDLE = torch.amp.GradScaler("cpu", enabled=False)
CPU = torch.device("cpu")
TWELVE = [
    f"name {letter}" for letter in "lkjihgfedcba"
]  # by class; sorted as texts they would be another order
AS_TEXT = sorted(range(12), key=str)  # 0, 1, 10, 11, 2, ...
HEIGHT = 16
WIDTH = 32
SMALL = RunConfig(class_index=1, num_inference_steps=2, height=HEIGHT, width=WIDTH, eval_batch_size=2)


# --- more than ten labels


@pytest.mark.parametrize("kind", ["hf", "vit-mae"])
def test_twelve_labels_of_a_hugging_face_folder_come_in_the_order_of_its_logits(kind, tmp_path):
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    ViTForImageClassification(ViTConfig(**VIT, id2label=dict(enumerate(TWELVE)))).save_pretrained(tmp_path)
    save_processor(tmp_path, "ViTImageProcessor", size={"height": 32, "width": 32})
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["id2label"] = {str(i): TWELVE[i] for i in AS_TEXT}
    path.write_text(json.dumps(config))
    assert read_labels(f"{kind}:{tmp_path}") == TWELVE
    classifier = load_classifier(f"{kind}:{tmp_path}", CPU, torch.float32)
    assert classifier.labels == TWELVE
    assert classifier.logits(torch.rand(1, 3, 32, 32)).shape == (1, 12)


def test_class_numbers_of_a_configuration_are_sorted_as_numbers():
    scrambled = {i: TWELVE[i] for i in AS_TEXT}
    assert hf_labels(SimpleNamespace(id2label=scrambled)) == TWELVE


@pytest.mark.parametrize("kind", [str, int])
def test_twelve_labels_of_a_timm_configuration_come_in_the_order_of_its_logits(kind):
    names = {kind(i): TWELVE[i] for i in AS_TEXT}
    assert timm_labels({"label_names": names, "num_classes": 12}) == TWELVE


# --- height is not width


def test_height_comes_first_in_latents_and_pixels(models):
    """The tiny model's own images are 16 pixels high and wide, and its latents half of that."""
    assert models.latent_shape(16, 32) == (4, 8, 16)
    assert models.latent_shape(None, 32) == (4, 8, 16)
    assert models.latent_shape(32, None) == (4, 16, 8)
    assert models.image_size(16, 32) == (16, 32)
    assert models.image_size(32, None) == (32, 16)


def test_memory_goes_by_both_sides(models, tmp_path):
    save_models(tmp_path, models)
    configs = read_configs(str(tmp_path))
    square = relative_size(configs, 16, 16).activations
    for height, width in ((16, 32), (32, 16), (None, 32), (32, None)):
        assert relative_size(configs, height, width).activations == pytest.approx(2 * square)
    assert relative_size(configs, 32, 32).activations == pytest.approx(4 * square)


@pytest.mark.parametrize(("height", "width", "flag"), [(18, 32, "--height: 18"), (16, 34, "--width: 34")])
def test_a_side_that_does_not_fit_is_told_by_its_own_flag(models, tmp_path, height, width, flag):
    save_models(tmp_path, models)
    with pytest.raises(UsageError, match=flag):
        check_sampling(read_configs(str(tmp_path)), height, width, [])


@pytest.mark.parametrize(
    ("size", "resized"),
    [
        ((20, 30), (10, 16)),  # 16 of 30 columns' worth is more than 8 of 20 rows'
        ((20, 60), (8, 24)),
        ((30, 20), (24, 16)),
        ((8, 16), (8, 16)),
    ],
)
def test_an_image_covers_a_recipe_that_is_wider_than_high(size, resized):
    recipe = Recipe((8, 16), (6, 12), (0.0,) * 3, (1.0,) * 3)
    assert recipe.resized(*size) == resized
    assert recipe(torch.rand(1, 3, *size)).shape == (1, 3, 6, 12)
    assert replace(recipe, squash=True, crop=None)(torch.rand(1, 3, *size)).shape == (1, 3, 8, 16)


def test_a_crop_takes_the_middle_rows_and_the_middle_columns():
    rows = torch.arange(6.0).view(6, 1).expand(6, 10)
    columns = torch.arange(10.0).view(1, 10).expand(6, 10)
    image = torch.stack([rows, columns, rows])[None]
    cut = Recipe(None, (2, 4), (0.0,) * 3, (1.0,) * 3)(image)[0]
    assert cut[0, :, 0].tolist() == [2, 3]
    assert cut[1, 0].tolist() == [3, 4, 5, 6]


def test_recipes_of_both_libraries_have_height_first():
    from transformers import CLIPImageProcessor, ViTImageProcessor

    data = {"input_size": (3, 8, 16), "crop_pct": 0.5, "mean": (0.5,) * 3, "std": (0.5,) * 3}
    recipe = timm_recipe(data | {"interpolation": "bicubic"})
    assert (recipe.resize, recipe.crop) == ((16, 32), (8, 16))
    recipe = hf_recipe(ViTImageProcessor(size={"height": 8, "width": 16}))
    assert (recipe.resize, recipe.squash) == ((8, 16), True)
    size = {"height": 24, "width": 36}
    recipe = hf_recipe(CLIPImageProcessor(size={"shortest_edge": 40}, crop_size=size))
    assert (recipe.resize, recipe.crop) == ((40, 40), (24, 36))


def test_an_augmentation_cuts_a_part_of_the_same_shape_from_within_the_image(monkeypatch):
    cuts = []
    resized_crop = preprocess.resized_crop

    def noted(image, top, left, height, width, size, **settings):
        cuts.append((top, left, height, width, tuple(size)))
        return resized_crop(image, top, left, height, width, size, **settings)

    monkeypatch.setattr(preprocess, "resized_crop", noted)
    images = torch.rand(40, 3, 50, 100, generator=torch.Generator().manual_seed(0))
    assert augmented(images, list(range(40))).shape == images.shape
    for top, left, height, width, size in cuts:
        assert size == (50, 100)
        assert abs(2 * height - width) <= 1.5
        assert 0 <= top <= 50 - height
        assert 0 <= left <= 100 - width
    assert max(left for _, left, *_ in cuts) > max(top for top, *_ in cuts)


def colours(*names: str) -> torch.Tensor:
    """Images (B, 3, 16, 32) of one colour each."""
    values = {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1)}
    return torch.stack(
        [torch.tensor(values[n]).float().view(3, 1, 1).expand(3, HEIGHT, WIDTH) for n in names]
    )


def test_a_grid_of_wide_images_has_each_in_its_place():
    sheet = grid(colours("red", "green", "blue"), columns=2)
    assert sheet.size == (2 * WIDTH + 2, 2 * HEIGHT + 2)
    assert sheet.getpixel((WIDTH - 1, HEIGHT - 1)) == (255, 0, 0)
    assert sheet.getpixel((WIDTH + 2, HEIGHT - 1)) == (0, 255, 0)
    assert sheet.getpixel((WIDTH - 1, HEIGHT + 2)) == (0, 0, 255)
    assert sheet.getpixel((WIDTH, HEIGHT)) == (255, 255, 255)
    assert sheet.getpixel((WIDTH + 2, HEIGHT + 2)) == (255, 255, 255)


def test_a_strip_of_wide_images_is_set_upright_whole():
    column = upright(grid(colours("red", "green", "blue"), columns=3), columns=3, number=2)
    assert column.size == (WIDTH, 2 * HEIGHT + 2)
    assert column.getpixel((WIDTH - 1, 0)) == (255, 0, 0)
    assert column.getpixel((WIDTH - 1, HEIGHT + 2)) == (0, 255, 0)


def test_a_frame_has_the_shape_of_its_image():
    sheet = np.asarray(framed({"": [Shown(image, True, "") for image in colours("red", "red")]}))
    framing = (sheet == (0x2A, 0x9D, 0x4A)).all(2)  # (H, W)
    high = framing.any(1).sum()
    wide = framing[:, : sheet.shape[1] // 2].any(0).sum()
    assert wide == pytest.approx(2 * high, abs=2)


def test_an_evaluation_draws_wide_images(token, folder, guides):
    result = evaluate(replace(SMALL, evaluate=True, test_size=2), token, guides, None, "cat", folder)
    assert (result["settings"]["height"], result["settings"]["width"]) == (HEIGHT, WIDTH)
    pictures = list(folder.eval_images.glob("*.png"))
    assert len(pictures) == 4
    for path in pictures:
        with Image.open(path) as picture:
            assert picture.size == (WIDTH, HEIGHT)


def test_prompts_and_data_sets_are_drawn_wide(tmp_path):
    session = Session(
        save_sd1(tmp_path / "sd1"),
        save_timm(tmp_path / "timm"),
        num_inference_steps=2,
        height=HEIGHT,
        width=WIDTH,
        device="cpu",
        output_path=str(tmp_path / "results"),
    )
    token = torch.ones(1, 16)
    plan = session.plan(1, token, prompt="a {token} cat", num_images=1, export_dataset=1)
    session.generate(plan, session.token(plan))
    session.fill_dataset(plan, session.token(plan))
    (of_prompt,) = plan.folder.prompt_images.glob("*/0*.png")
    for path in (of_prompt, plan.folder.dataset / "000000.png"):
        with Image.open(path) as picture:
            assert picture.size == (WIDTH, HEIGHT)


def test_a_data_set_is_drawn_as_wide_as_its_sampler_says(token, folder, guides):
    Dataset(folder.dataset, guides, None, {}).fill(token, "cat", 1, SMALL.sampler, batch_size=2)
    with Image.open(folder.dataset / "000000.png") as picture:
        assert picture.size == (WIDTH, HEIGHT)


@pytest.mark.parametrize("mode", ["jump", "skip", "last", "lv"])
def test_training_sees_wide_images(token, guides, mode):
    sizes = {"height": HEIGHT, "width": WIDTH}
    settings = learning(**sizes, images_per_update=2, augment=True, gradient_mode=mode)
    objective = Objective(settings, token, guides, "cat")
    images, *_ = objective.accumulate(0, IDLE)
    assert images.shape == (2, 3, HEIGHT, WIDTH)
    assert token.vector.grad.abs().sum() > 0
    objective.validate()
    assert objective.first_images.shape[1:] == (3, HEIGHT, WIDTH)


# --- more than one chunk of the decoder


def seen_in_training(token, monkeypatch, **changes):
    """What an update with augmentation drew, what the guide saw of it, its losses and its gradient."""
    classifier = tiny_classifier()
    seen = []
    logits = type(classifier).logits
    noted = lambda self, images: seen.append(images.detach().clone()) or logits(self, images)  # noqa: E731
    monkeypatch.setattr(type(classifier), "logits", noted)
    token.vector.grad = None
    settings = learning(augment=True, jump_at="0.5", **changes)
    objective = Objective(settings, token, [Guide(classifier, 0)], "cat")
    images, losses, *_ = objective.accumulate(0, IDLE)
    monkeypatch.undo()
    return images, torch.cat(seen), losses, token.vector.grad.clone()


@pytest.mark.parametrize("sizes", [(None, None), (None, 1), (None, 3), (3, 2), (1, 1)])
def test_each_image_is_augmented_by_its_own_seed_however_many_are_decoded_at_once(token, monkeypatch, sizes):
    """Four images: as many micro-batches and chunks of the decoder as the two sizes say."""
    batch_size, decode_batch_size = sizes
    changes = {"batch_size": batch_size, "decode_batch_size": decode_batch_size}
    images, seen, *_ = seen_in_training(token, monkeypatch, **changes)
    assert len(seen) == 4
    seeds = training_seeds(SHORT_TRAINING.seed, 0, 4)
    torch.testing.assert_close(seen, augmented(images, seeds), rtol=0, atol=0)


@pytest.mark.parametrize("decode_batch_size", [1, 2, 3])
def test_losses_and_gradient_of_augmented_images_are_the_same_in_chunks(
    token, monkeypatch, decode_batch_size
):
    _, _, losses, gradient = seen_in_training(token, monkeypatch)
    _, _, in_chunks, gradient_in_chunks = seen_in_training(
        token, monkeypatch, decode_batch_size=decode_batch_size
    )
    assert len(set(losses.tolist())) == 4
    torch.testing.assert_close(in_chunks, losses, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradient_in_chunks, gradient, rtol=1e-3, atol=1e-7)
