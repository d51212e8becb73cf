"""A LoRA that the stock pipeline loads and draws alike, and what is refused of files that do not fit.

pytest tests/test_dpt_files.py
"""

import json
import os

import pytest
import torch
from conftest import tiny_models
from safetensors.torch import load_file, save_file
from test_dpt_training import TINY, prepare, tiny_reader
from tiny_folders import save_models, save_sd2

from discriminative.diffusion.models import load_models
from discriminative.errors import UsageError
from dpt.adapter import DiscriminativeAdapter
from dpt.files import (
    ADAPTER,
    LORA,
    RECORD,
    load_lora,
    lora_parameters,
    read_adapter,
    write_adapter,
    write_lora,
)

CPU = torch.device("cpu")
PROMPT = "a photo of tiger cat"


def stirred(reader, text_encoder):
    """A LoRA that does something, as after training."""
    prepare(reader, 0, text_encoder=text_encoder)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in lora_parameters(reader.models).values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    for model in (reader.models.unet, reader.models.text_encoder):
        model.requires_grad_(False).eval()
    return reader


def stock(folder, lora=None):
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    if lora:
        pipeline.load_lora_weights(str(lora))
    generator = torch.Generator().manual_seed(11)
    drawn = pipeline(PROMPT, num_inference_steps=3, guidance_scale=5.0, generator=generator, output_type="np")
    return torch.from_numpy(drawn.images)


def ours(models):
    """The same with the models that the LoRA is on: the stock pipeline around them."""
    from diffusers import StableDiffusionPipeline

    parts = {n: getattr(models, n) for n in ("tokenizer", "text_encoder", "unet", "vae", "scheduler")}
    extra = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    pipeline = StableDiffusionPipeline(**parts, **extra)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(11)
    drawn = pipeline(PROMPT, num_inference_steps=3, guidance_scale=5.0, generator=generator, output_type="np")
    return torch.from_numpy(drawn.images)


@pytest.mark.parametrize("text_encoder", [False, True])
def test_the_stock_pipeline_loads_the_lora_and_draws_the_same(tmp_path, text_encoder):
    save_models(tmp_path / "model", tiny_models("DDIMScheduler"))
    reader = stirred(tiny_reader(), text_encoder)
    write_lora(tmp_path / "lora", reader.models)
    expected = ours(reader.models)
    found = stock(tmp_path / "model", tmp_path / "lora")
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert (stock(tmp_path / "model") - expected).abs().max() > 1e-2
    assert (
        any(name.startswith("text_encoder.") for name in load_file(tmp_path / "lora" / LORA)) == text_encoder
    )


@pytest.mark.parametrize("text_encoder", [False, True])
def test_a_lora_survives_its_file(tmp_path, text_encoder):
    reader = stirred(tiny_reader(), text_encoder)
    write_lora(tmp_path, reader.models)
    models = tiny_models("DDIMScheduler")
    load_lora(tmp_path / LORA, models)
    kept, found = lora_parameters(reader.models), lora_parameters(models)
    assert kept.keys() == found.keys() == load_file(tmp_path / LORA).keys()
    assert all(torch.equal(kept[name], found[name]) for name in kept)
    assert not any(p.requires_grad for p in found.values())
    assert [p.name for p in tmp_path.iterdir()] == [LORA]
    # The paper's rank, and a scale of 1.
    assert {t.shape[0] for name, t in kept.items() if "lora_A" in name} == {4}
    assert {(c.r, c.lora_alpha) for m in (models.unet,) for c in m.peft_config.values()} == {(4, 4)}


def test_the_papers_models_have_the_papers_lora():
    """Of SD 1.4, from its configuration alone."""
    from diffusers import UNet2DConditionModel

    from dpt.settings import LORA_RANK, UNET_TARGETS

    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8)
    from peft import LoraConfig

    unet.add_adapter(LoraConfig(r=LORA_RANK, lora_alpha=LORA_RANK, target_modules=list(UNET_TARGETS)))
    assert sum(p.numel() for n, p in unet.named_parameters() if "lora_" in n) == 797_184


# What does not fit.


@pytest.fixture
def adapter_folder(tmp_path):
    folder = tmp_path / "adapter"
    write_adapter(folder, tiny_reader(), "pipeline", "tiny", {})
    return folder


def refused(folder, models=None):
    with pytest.raises(UsageError) as raised:
        read_adapter(folder, models or tiny_models())
    assert "\n" not in str(raised.value)
    return str(raised.value)


def change_record(folder, **changes):
    path = folder / RECORD
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_an_adapter_of_another_width_is_refused_before_its_weights_are_read(tmp_path, adapter_folder):
    models = load_models(save_sd2(tmp_path / "sd2"), CPU, torch.float32)
    assert "text_width 16, this model 24" in refused(adapter_folder, models)
    change_record(adapter_folder, channels=320)
    assert "channels 320, this model 16 at up0" in refused(adapter_folder)


def test_an_adapter_whose_weights_are_not_its_records_is_refused(adapter_folder):
    other = DiscriminativeAdapter(TINY, channels=16, text_width=16, token_width=8)
    tensors = load_file(adapter_folder / ADAPTER)
    tensors |= {f"adapter.{n}": t.contiguous() for n, t in other.state_dict().items()}
    save_file(tensors, adapter_folder / ADAPTER)
    assert "of another shape: adapter.token_projection.weight" in refused(adapter_folder)


def test_a_pickled_adapter_is_never_opened(adapter_folder, tmp_path):
    class Trap:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "sprung"),))

    torch.save({"adapter.logit_scale": Trap()}, adapter_folder / ADAPTER)
    assert "not a readable safetensors file" in refused(adapter_folder)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_refused(adapter_folder, value):
    tensors = load_file(adapter_folder / ADAPTER)
    tensors["adapter.logit_scale"].fill_(value)
    save_file(tensors, adapter_folder / ADAPTER)
    assert "not finite in adapter.logit_scale" in refused(adapter_folder)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"probe": "up7"}, "'up7' was given; allowed is one of bottom0"),
        ({"adapter": {}}, "is no record of an adapter"),
        ({"adapter": "x"}, "is no record of an adapter"),
        ({"channels": "many"}, "is no record of an adapter"),
    ],
)
def test_a_record_that_is_wrong_is_told_in_one_line(adapter_folder, changes, told):
    change_record(adapter_folder, **changes)
    assert told in refused(adapter_folder)


def test_what_is_missing_is_named(adapter_folder, tmp_path):
    assert "train one with python -m dpt probe" in refused(tmp_path / "nothing")
    (adapter_folder / ADAPTER).unlink()
    assert f"{ADAPTER} is missing" in refused(adapter_folder)
    (adapter_folder / RECORD).write_text("{")
    assert "is no record of an adapter" in refused(adapter_folder)


def test_a_lora_of_another_model_is_refused(tmp_path):
    reader = stirred(tiny_reader(), False)
    write_lora(tmp_path, reader.models)
    models = load_models(save_sd2(tmp_path / "sd2"), CPU, torch.float32)
    with pytest.raises(UsageError, match="is of another model: .* of another shape") as raised:
        load_lora(tmp_path / LORA, models)
    assert "\n" not in str(raised.value)
    tensors = load_file(tmp_path / LORA)
    tensors.popitem()
    save_file(tensors, tmp_path / LORA)
    with pytest.raises(UsageError, match="1 weights are missing"):
        load_lora(tmp_path / LORA, tiny_models())
