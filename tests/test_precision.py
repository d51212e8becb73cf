"""What training computes in bfloat16 on a CPU that has units for it, and what it never does."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import SHORT_TRAINING

from models import has_bf16_units, trains_in_bf16
from sampler import draw
from task import sampler_settings
from trainer import train

CONFIG = replace(SHORT_TRAINING, mixed_precision="auto", max_epochs=1)
CPU = torch.device("cpu")


@pytest.fixture
def units(monkeypatch):
    """A processor that multiplies bfloat16."""
    monkeypatch.setattr("models.has_bf16_units", lambda: True)


@pytest.fixture
def calls(token):
    """By part, of every call whether it is in bfloat16 and whether with gradient."""
    seen = {"unet": [], "decoder": []}
    for name, module in (("unet", token.models.unet), ("decoder", token.models.vae.decoder)):
        module.register_forward_hook(lambda *_, name=name: seen[name].append((torch.is_autocast_enabled("cpu"), torch.is_grad_enabled())))
    return seen


def test_the_units_are_those_that_the_system_names():
    path = Path("/proc/cpuinfo")
    flags = next((line.split() for line in path.read_text().splitlines() if line.startswith("flags")), None) if path.exists() else None
    if flags is None:
        pytest.skip("no flags of an x86 processor")
    assert has_bf16_units() == any(unit in flags for unit in ("avx512_bf16", "amx_bf16"))


def test_only_auto_on_a_cpu_with_units_trains_in_bf16(monkeypatch, units):
    assert trains_in_bf16("auto", CPU)
    assert not trains_in_bf16("no", CPU)
    assert not trains_in_bf16("auto", torch.device("cuda"))
    monkeypatch.setattr("models.has_bf16_units", lambda: False)
    assert not trains_in_bf16("auto", CPU)


@pytest.mark.parametrize("mode", ["jump", "skip", "last", "lv"])
def test_an_update_walks_in_bf16_and_differentiates_in_float32(mode, units, token, guides, folder, calls):
    """Guidance and the first step's prediction multiply rounding."""
    path = {"gradient_mode": mode, "jump_at": "0.5"}
    told = train(replace(CONFIG, choose_by="loss", **path), token, guides, "cat", folder)
    assert told.precision == "float32, bfloat16 without gradient"
    assert (True, False) in calls["unet"]
    assert (False, True) in calls["unet"]
    assert (True, True) not in calls["unet"]
    assert set(calls["decoder"]) == {(False, True)}


def test_a_validation_is_drawn_in_bf16(units, token, guides, folder, calls):
    train(replace(CONFIG, validate_every=1, jump_at="0@8"), token, guides, "cat", folder)
    assert (True, False) in calls["unet"]
    assert set(calls["decoder"]) == {(False, True), (True, False)}


def test_without_auto_everything_is_float32(units, token, guides, folder, calls):
    told = train(replace(CONFIG, mixed_precision="no", jump_at="0.5"), token, guides, "cat", folder)
    assert told.precision == "float32"
    assert not any(in_bf16 for in_bf16, _ in calls["unet"] + calls["decoder"])


@pytest.mark.parametrize("fails", [False, True])
def test_what_is_shown_after_a_training_is_float32(fails, units, token, guides, folder, calls):
    """The stock pipeline's images, bit for bit; after a training that failed too."""
    settings = sampler_settings(CONFIG)
    before = draw(token, ["cat"], [5], settings)  # (1, 3, H, W)
    handle = token.models.vae.decoder.register_forward_hook(lambda *_: 1 / 0 if fails else None)
    if fails:
        with pytest.raises(ZeroDivisionError):
            train(CONFIG, token, guides, "cat", folder)
    else:
        train(CONFIG, token, guides, "cat", folder)
    handle.remove()
    assert torch.equal(before, draw(token, ["cat"], [5], settings))
    assert calls["unet"][-1] == calls["decoder"][-1] == (False, False)


def test_a_unet_in_bf16_keeps_its_channels_first(token):
    """Group norms in bfloat16 are slow with the channels last; the decoder, which has gradient too, is not."""

    def are_last() -> list[bool]:
        weights = (token.models.unet.conv_in.weight, token.models.vae.decoder.conv_in.weight)
        return [w.is_contiguous(memory_format=torch.channels_last) for w in weights]

    for wanted, expected in ((True, [False, True]), (False, [True, True])):
        with token.models.bf16_without_gradient(wanted), token.models.channels_last():
            assert are_last() == expected
    assert are_last() == [False, False]


def test_bf16_draws_the_same_images_but_for_rounding(token):
    settings = sampler_settings(CONFIG)
    exact = draw(token, ["cat"] * 2, [5, 6], settings)  # (2, 3, H, W)
    with token.models.bf16_without_gradient(True):
        coarse = draw(token, ["cat"] * 2, [5, 6], settings)  # (2, 3, H, W)
    assert coarse.dtype == torch.float32
    assert 0 < (coarse - exact).abs().mean() < 0.02
