"""What a small change to the library could break without any test's notice, as ``make mutants`` found."""

import math
import sys
from pathlib import Path

import pytest
import torch
from conftest import learning, tiny_classifier, tiny_models
from huggingface_hub import errors
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import load_file, save_file
from tiny_folders import edit_json, save_timm

from discriminative.command_line import at_least
from discriminative.diffusion.memory import peak_bytes
from discriminative.diffusion.models import models_of, own_latent_size
from discriminative.diffusion.sampler import Walk
from discriminative.guides import loaders
from discriminative.guides.preprocess import Recipe, augmented
from discriminative.hub import check_keys, hub_advice
from discriminative.records.files import GAP, write_text
from discriminative.records.pictures import Shown, framed, lines_of, upright
from discriminative.records.report import PICTURE_WIDTH, embedded
from discriminative.records.tracking import PROJECT, Tracker
from discriminative.settings import GradientPath, SamplerSettings
from discriminative.tokens.batch import token_gradient
from discriminative.tokens.files import make_readable
from discriminative.tokens.objective import Objective

# --- options


@pytest.mark.parametrize(("high", "allowed"), [(math.inf, "2 or more"), (7, "2 to 7")])
def test_limits_are_told_and_both_allowed(high, allowed):
    limits = at_least(2, high)
    assert limits["allowed"] == allowed
    assert [limits["check"](value) for value in (1, 2, 7)] == [False, True, True]


# --- guides


def test_a_recipe_says_which_interpolations_there_are():
    with pytest.raises(ValueError, match="interpolation 'lanczos'; allowed is bicubic, bilinear, nearest"):
        Recipe((8, 8), (8, 8), (0.5,) * 3, (0.5,) * 3, "lanczos")


def test_about_half_of_varied_images_are_mirrored():
    ramp = torch.linspace(0, 1, 32).expand(1, 3, 32, 32)
    rises = [
        bool(image[..., 16:].mean() > 0.5) for image in augmented(ramp.repeat(40, 1, 1, 1), list(range(40)))
    ]
    assert 10 < sum(rises) < 30


def test_weights_come_from_the_revision_that_was_asked_for(tmp_path, monkeypatch):
    save_timm(tmp_path)
    asked = []

    def fetch(repository, name, revision=None):
        asked.append((repository, name, revision))
        return tmp_path / name

    monkeypatch.setattr(loaders, "fetch", fetch)
    loaders.find_timm(loaders.Source("timm", "hf-hub:some/model@v2")).load()
    assert asked == [("some/model", name, "v2") for name in ("config.json", "model.safetensors")]


@pytest.mark.parametrize("value", ["1", "true", "YES", "On"])
def test_every_spelling_that_the_hub_takes_for_offline_is_told_as_such(value, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", value)
    assert hub_advice(errors.LocalEntryNotFoundError("x")).startswith("HF_HUB_OFFLINE is set")


def test_weights_of_a_timm_name_come_from_its_repository(monkeypatch):
    class Asked(Exception):
        pass

    def fetch(*names):
        raise Asked(*names)

    monkeypatch.setattr(loaders, "fetch", fetch)
    parts = loaders.find_timm(loaders.Source("timm", "resnet18.a1_in1k"))
    with pytest.raises(Asked) as error:
        parts.load()
    assert error.value.args == ("timm/resnet18.a1_in1k", "model.safetensors")


def test_a_checkpoints_name_counts_more_than_the_folder_beside_it(tmp_path):
    save_timm(tmp_path)
    edit_json(tmp_path / "config.json", architecture="resnet18")
    file = tmp_path / "model.safetensors"
    model, _ = loaders.find_timm(loaders.Source("timm", f"test_resnet@{file}")).load()
    assert {k: v.shape for k, v in model.state_dict().items()} == {
        k: v.shape for k, v in load_file(file).items()
    }


@pytest.mark.parametrize(
    ("dtype", "hint"), [(torch.float32, ""), (torch.float16, "; try --mixed_precision no")]
)
def test_half_precision_is_blamed_only_where_it_is_used(dtype, hint):
    classifier = tiny_classifier(dtype)
    classifier.model[1].weight.fill_(float("nan"))
    with pytest.raises(ValueError) as error:
        classifier.check(16, 16, guides=False)
    assert str(error.value).removeprefix("its logits are not finite")[: len(hint) or None] == hint


def test_a_weight_of_another_shape_is_told_by_its_name_alone():
    with pytest.raises(ValueError, match="^1 weights are of another shape: head.weight$"):
        check_keys(mismatched=[("head.weight", (3, 8), (5, 8))])


# --- diffusion


def test_latents_may_be_wider_than_tall():
    assert own_latent_size({"sample_size": [8, 12]}) == (8, 12)


def test_a_pipeline_in_float32_computes_in_float32(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    models_of(tiny_models())
    assert not torch.backends.cudnn.allow_tf32


def test_the_parts_of_a_pipeline_are_frozen():
    pipeline = tiny_models()
    pipeline.unet.requires_grad_(True)
    models = models_of(pipeline)
    assert not [p for p in models.unet.parameters() if p.requires_grad]


def test_a_walk_begins_in_the_models_precision():
    models = tiny_models(dtype=torch.bfloat16)
    cond = torch.zeros(1, 16, 16, dtype=torch.bfloat16)
    walk = Walk(models, cond, cond, torch.zeros(1, 4, 8, 8), SamplerSettings(4, 7.5))
    assert walk.start.dtype == torch.bfloat16


@pytest.mark.parametrize(("platform", "unit"), [("darwin", 1), ("linux", 1024)])
def test_the_peak_of_a_process_is_in_bytes_everywhere(platform, unit, monkeypatch):
    import resource

    class Usage:
        ru_maxrss = 5000

    monkeypatch.setattr(resource, "getrusage", lambda who: Usage)
    monkeypatch.setattr(sys, "platform", platform)
    assert peak_bytes(torch.device("cpu")) == 5000 * unit


@pytest.mark.parametrize(("steps", "is_recomputed"), [(1, False), (2, True)])
def test_no_graph_of_several_steps_is_kept(steps, is_recomputed, token, guides, monkeypatch):
    run = Walk.run
    seen = []

    def watched(self, *args):
        seen.append(self.recompute)
        return run(self, *args)

    monkeypatch.setattr(Walk, "run", watched)
    objective = Objective(learning(), token, guides, "cat")
    settings = SamplerSettings(4, 3.0)
    token_gradient(
        token,
        ["a newclas cat"],
        [0],
        settings,
        GradientPath("last", steps),
        lambda x, _: objective.class_loss(x),
        1.0,
    )
    assert seen[-1] is is_recomputed


# --- tokens


def test_what_fits_is_known_of_updates_and_of_samples_apart(token, guides):
    objective = Objective(learning(), token, guides, "cat")
    assert (objective.batches.kind, objective.eval_batches.kind) == ("update", "sample")
    assert objective.batches.fits is objective.eval_batches.fits is token.models.fits


def test_an_objective_counts_every_image_that_it_samples(token, guides):
    objective = Objective(learning(validation_size=3, confirm_size=0), token, guides, "cat")
    assert objective.images == 0
    objective.validate()
    assert objective.images == 3


def test_a_tokenizer_that_wrote_its_own_files_needs_no_help(tmp_path):
    """That of transformers 4 has no backend."""
    path = tmp_path / "text_encoder" / "model.safetensors"
    path.parent.mkdir()
    save_file({"embeddings": torch.ones(1)}, path)
    make_readable(tmp_path, object())
    assert list(load_file(path)) == ["text_model.embeddings"]


# --- records


@pytest.mark.parametrize("width", [60, 80, 100, 120, 140])
def test_lines_break_between_words_where_words_fit(width):
    draw = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    text = "great white heron great white shark"
    lines = lines_of(draw, text, ImageFont.load_default(18), width)
    assert len(lines) > 1
    assert " ".join(lines) == text


def test_images_of_a_strip_stand_one_above_the_other_on_white():
    strip = Image.new("RGB", (2 * 8 + GAP, 8), "black")
    found = upright(strip, 2, 2)
    assert found.size == (8, 16 + GAP)
    assert [found.getpixel((4, y)) for y in (0, 7, 8, 7 + GAP, 8 + GAP)] == [
        (0, 0, 0),
        (0, 0, 0),
        (255, 255, 255),
        (255, 255, 255),
        (0, 0, 0),
    ]


def test_a_new_training_leaves_nothing_of_what_was_made_of_the_last(folder):
    stale = (folder.eval_images, folder.train_images, folder.web_ui, folder.pipeline)
    for path in stale:
        (path / "deep").mkdir(parents=True)
    folder.unfinished_records.mkdir(parents=True)
    folder.unfinished.log.touch()
    folder.take_training()
    assert not [path for path in (*stale, folder.unfinished_records) if path.exists()]


def test_texts_are_utf8_whatever_the_locale(tmp_path, monkeypatch):
    write = Path.write_text
    encodings = []

    def watched(self, text, encoding=None):
        encodings.append(encoding)
        return write(self, text, encoding=encoding)

    monkeypatch.setattr(Path, "write_text", watched)
    write_text(tmp_path / "labels.txt", "Schäferhund")
    assert encodings == ["utf-8"]


def test_a_sheet_of_images_is_white_where_none_is():
    sheet = framed({"cats": [Shown(torch.zeros(3, 8, 8), True, "cat")]})
    assert sheet.getpixel((0, 0)) == sheet.getpixel((sheet.width - 1, sheet.height - 1)) == (255, 255, 255)


def test_a_picture_in_the_report_is_four_times_the_pages_width_at_most():
    picture = Image.new("RGB", (10, 6 * PICTURE_WIDTH))
    assert embedded(picture).startswith("data:image/jpeg;base64,")
    assert picture.height == 4 * PICTURE_WIDTH


class Recorder:
    """Stands for accelerate's: keeps what it is told."""

    name = "wandb"

    def __init__(self, **settings):
        self.settings = settings
        self.trackers = [self]

    def init_trackers(self, project, options, more):
        self.began = (project, options, more)

    def log(self, numbers, step):
        self.logged = (numbers, step)

    def log_images(self, images, step, **layout):
        self.images = (images["images"], step, layout)


@pytest.fixture
def tracker(tmp_path, monkeypatch):
    monkeypatch.setattr("accelerate.Accelerator", Recorder)
    return Tracker("wandb", tmp_path, "0001_bat/default", {"seed": 3, "prompts": ["a"], "train": True})


def test_wandb_is_told_the_runs_name_and_folder(tracker, tmp_path):
    project, options, more = tracker.accelerator.began
    assert project == PROJECT
    assert options == {"seed": 3, "prompts": "['a']", "train": True}
    assert more == {"wandb": {"name": "0001_bat/default", "dir": tmp_path}}


def test_a_tracker_is_told_numbers_alone_and_pixels_of_a_byte(tracker):
    row = {"epoch": 4, "loss": 0.5, "right": 2, "prompt": "a photo", "kept": True, "judge": None}
    tracker.log(row, torch.full((2, 3, 1, 1), 0.5))
    assert tracker.accelerator.logged == ({"loss": 0.5, "right": 2}, 4)
    pixels, step, layout = tracker.accelerator.images
    assert (pixels.shape, pixels.max(), step, layout) == ((2, 1, 1, 3), 128, 4, {})
