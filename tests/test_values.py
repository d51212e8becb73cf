"""Values that would silently mean something else: guidance of at most 1, fields that nothing fills in, empty
texts; and prompts, of which none throws another's images away."""

import json
from dataclasses import replace

import pytest
import torch
from conftest import tiny_models

from config import RunConfig, validate
from discriminative.errors import UsageError
from discriminative.settings import GradientPath, SamplerSettings
from discriminative.tokens.batch import token_gradient
from discriminative.tokens.class_token import ClassToken
from discriminative.tokens.drawing import draw_to_folder
from discriminative.tokens.prompts import check_fields
from run import main

MINI = ["--model", "miniature", "--device", "cpu", "--class_index", "2", "--train"]
FAST = SamplerSettings(num_inference_steps=2, guidance_scale=7.0)


# --- guidance


def brightness(images: torch.Tensor, chunk: slice) -> tuple[torch.Tensor, torch.Tensor]:
    """A loss (B,) of images (B, 3, H, W); none is right."""
    return images.sum((1, 2, 3)), torch.zeros(len(images), dtype=torch.bool)


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0])
def test_guidance_of_at_most_1_is_none_and_the_prompt_is_still_drawn(token, scale):
    """A scale of 0 drew without the prompt."""
    images = [
        token.sample(["a photo of cat"], [3], replace(FAST, guidance_scale=s)) for s in (scale, 1.0, 1.5)
    ]
    assert torch.equal(images[0], images[1])
    assert not torch.equal(images[0], images[2])


@pytest.mark.parametrize("scale", [0.0, 0.5])
def test_the_stock_pipeline_draws_the_same_without_guidance(scale):
    from diffusers import StableDiffusionPipeline

    token = ClassToken(tiny_models(), "newclas", "a")
    models = token.models
    names = ("tokenizer", "text_encoder", "unet", "vae", "scheduler")
    parts = {name: getattr(models, name) for name in names}
    pipeline = StableDiffusionPipeline(
        **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    stock = pipeline(
        "a photo of cat", num_inference_steps=2, guidance_scale=scale, generator=generator, output_type="pt"
    )
    ours = token.sample(["a photo of cat"], [3], replace(FAST, guidance_scale=scale))
    assert torch.equal(ours, stock.images)


def test_the_skipped_gradient_follows_what_guidance_comes_to(token):
    """Its share was multiplied with the scale itself: 0 gave no gradient at all."""

    def gradient(scale: float) -> torch.Tensor:
        settings = replace(FAST, guidance_scale=scale)
        path = GradientPath("skip", place=0.5)
        return token_gradient(token, ["a newclas cat"], [3], settings, path, brightness, 1.0).gradient

    gradients = [gradient(scale) for scale in (0.0, 1.0)]
    assert torch.equal(*gradients)
    assert gradients[0].abs().sum() > 0


# --- what is filled in


@pytest.mark.parametrize(
    "prompt", ["a {klass}", "a {tokn} {class}", "a {Token}", "a { token }", "a {}", "a {token", "a token}"]
)
def test_what_nothing_stands_for_is_refused_in_prompts(prompt, capsys, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text(f"a {{token}} {{class}}\n{prompt}\n")
    out = ["--output_path", str(tmp_path / "r")]
    for flags in (
        ["--prompt", prompt],
        ["--prompt", f"@{file}"],
        ["--evaluate", "--eval_prompts", str(file)],
    ):
        assert main([*MINI, *flags, *out]) == 2
        said = capsys.readouterr().err.strip()
        assert said.count("\n") == 0
        assert f"{prompt!r} holds" in said
        assert "allowed in braces are {token} and {class}" in said
    assert not (tmp_path / "r").exists()


def test_what_is_filled_in_is_allowed():
    check_fields("a {token} {class}, {class}", "prompt")


def test_braces_in_a_class_name_are_refused():
    with pytest.raises(UsageError, match="--prompt_name: '{class}' was given; allowed is a name without"):
        validate(RunConfig(class_index=2, train=True, prompt_name="{class}"))


@pytest.mark.parametrize("name", ["prompt", "prompt_name", "classifier", "judge", "token_path", "clip_model"])
def test_an_empty_text_is_no_way_to_ask_for_the_default(name):
    with pytest.raises(UsageError, match=f"--{name}: ' ' was given; allowed is a text that is not empty"):
        validate(replace(RunConfig(class_index=2, train=True), **{name: " "}))


@pytest.mark.parametrize("rate", [1e9, 1.1, 0.0, float("inf")])
def test_a_learning_rate_beyond_any_embedding_is_refused(rate):
    with pytest.raises(UsageError, match="--learning_rate: .* was given; allowed is"):
        validate(RunConfig(class_index=2, train=True, learning_rate=rate))


# --- prompts


def drawn(token, root, prompt="a newclas cat", seeds=(3, 4), settings=FAST, **said):
    return draw_to_folder(root, token, prompt, list(seeds), settings, None, {"tokens": {}} | said)


def test_no_drawing_throws_another_away(token, tmp_path):
    """Another prompt, another seed, other settings, another token, a prompt of the same words."""
    others = [
        {},
        {"prompt": "a newclas bat"},
        {"prompt": "A newclas: cat"},
        {"seeds": (5,)},
        {"settings": replace(FAST, guidance_scale=5.0)},
        {"tokens": {"newclas": "another"}},
    ]
    folders = [drawn(token, tmp_path, **changes) for changes in others]
    assert len(set(folders)) == len(others)
    assert len(list(tmp_path.glob("*/0*.png"))) == 2 * len(others) - 1
    assert drawn(token, tmp_path) == folders[0]  # the same once more


def test_a_drawing_says_what_it_was_drawn_with(token, tmp_path):
    folder = drawn(token, tmp_path, model="m", tokens={"newclas": "abc"})
    record = json.loads((folder / "prompt.json").read_text())
    assert (record["prompt"], record["seeds"], record["model"]) == ("a newclas cat", [3, 4], "m")
    assert record["tokens"] == {"newclas": "abc"}
    assert record["settings"]["guidance_scale"] == 7.0
    assert record["settings"]["num_inference_steps"] == 2
    assert record["settings"]["scheduler"] == "PNDMScheduler"
    assert record["environment"]["versions"]["torch"]


def test_a_prompt_without_a_letter_has_a_folder_all_the_same(token, tmp_path):
    assert drawn(token, tmp_path, prompt="!").parent == tmp_path
    assert len(drawn(token, tmp_path, prompt="!").name) == 8
