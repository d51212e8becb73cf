"""What training computes in bfloat16 on a CPU that has units for it, and what it never does.

And half precision's scaled loss.
"""

import math
from pathlib import Path

import pytest
import torch
from conftest import SHORT_TRAINING, learned, learning, tiny_models

from discriminative.errors import WorkError
from discriminative.guides.classifier import Classifier
from discriminative.precision import (
    bf16_without_gradient,
    channels_last,
    has_bf16_units,
    make_scaler,
    precision_name,
    training_precision,
    trains_in_bf16,
)
from discriminative.records.layout import RunFolder
from trainer import train

ONE_UPDATE = {"mixed_precision": "auto", "max_epochs": 1}
CPU = torch.device("cpu")


@pytest.fixture
def units(monkeypatch):
    """A processor that multiplies bfloat16."""
    monkeypatch.setattr("discriminative.precision.has_bf16_units", lambda: True)


@pytest.fixture
def calls(token):
    """By part, of every call whether it is in bfloat16 and whether with gradient."""
    seen = {"unet": [], "decoder": []}
    for name, module in (("unet", token.models.unet), ("decoder", token.models.vae.decoder)):
        module.register_forward_hook(
            lambda *_, name=name: seen[name].append(
                (torch.is_autocast_enabled("cpu"), torch.is_grad_enabled())
            )
        )
    return seen


def test_the_units_are_those_that_the_system_names():
    path = Path("/proc/cpuinfo")
    flags = (
        next((line.split() for line in path.read_text().splitlines() if line.startswith("flags")), None)
        if path.exists()
        else None
    )
    if flags is None:
        pytest.skip("no flags of an x86 processor")
    assert has_bf16_units() == any(unit in flags for unit in ("avx512_bf16", "amx_bf16"))


def test_only_auto_on_a_cpu_with_units_trains_in_bf16(monkeypatch, units):
    assert trains_in_bf16("auto", CPU)
    assert not trains_in_bf16("no", CPU)
    assert not trains_in_bf16("auto", torch.device("cuda"))
    monkeypatch.setattr("discriminative.precision.has_bf16_units", lambda: False)
    assert not trains_in_bf16("auto", CPU)


@pytest.mark.parametrize("mode", ["jump", "skip", "last", "lv"])
def test_an_update_walks_in_bf16_and_differentiates_in_float32(mode, units, token, guides, folder, calls):
    """Guidance and the first step's prediction multiply rounding."""
    path = {"gradient_mode": mode, "jump_at": "0.5"}
    told = train(learning(choose_by="loss", **path, **ONE_UPDATE), token, guides, "cat", folder)
    assert told.precision == "float32, bfloat16 without gradient"
    assert (True, False) in calls["unet"]
    assert (False, True) in calls["unet"]
    assert (True, True) not in calls["unet"]
    assert set(calls["decoder"]) == {(False, True)}


def test_a_validation_is_drawn_in_bf16(units, token, guides, folder, calls):
    train(learning(validate_every=1, jump_at="0@8", **ONE_UPDATE), token, guides, "cat", folder)
    assert (True, False) in calls["unet"]
    assert set(calls["decoder"]) == {(False, True), (True, False)}


def test_without_auto_everything_is_float32(units, token, guides, folder, calls):
    told = train(learning(mixed_precision="no", max_epochs=1, jump_at="0.5"), token, guides, "cat", folder)
    assert told.precision == "float32"
    assert not any(in_bf16 for in_bf16, _ in calls["unet"] + calls["decoder"])


@pytest.mark.parametrize("fails", [False, True])
def test_what_is_shown_after_a_training_is_float32(fails, units, token, guides, folder, calls):
    """The stock pipeline's images, bit for bit; after a training that failed too."""
    settings = SHORT_TRAINING.sampler
    before = token.sample(["cat"], [5], settings)  # (1, 3, H, W)
    handle = token.models.vae.decoder.register_forward_hook(lambda *_: 1 / 0 if fails else None)
    if fails:
        with pytest.raises(ZeroDivisionError):
            train(learning(**ONE_UPDATE), token, guides, "cat", folder)
    else:
        train(learning(**ONE_UPDATE), token, guides, "cat", folder)
    handle.remove()
    assert torch.equal(before, token.sample(["cat"], [5], settings))
    assert calls["unet"][-1] == calls["decoder"][-1] == (False, False)


def test_a_unet_in_bf16_keeps_its_channels_first(token):
    """Group norms in bfloat16 are slow with the channels last; the decoder, with gradient too, is not."""

    def are_last() -> list[bool]:
        weights = (token.models.unet.conv_in.weight, token.models.vae.decoder.conv_in.weight)
        return [w.is_contiguous(memory_format=torch.channels_last) for w in weights]

    for wanted, expected in ((True, [False, True]), (False, [True, True])):
        with bf16_without_gradient(token.models, wanted), channels_last(token.models):
            assert are_last() == expected
    assert are_last() == [False, False]


def test_bf16_draws_the_same_images_but_for_rounding(token):
    settings = SHORT_TRAINING.sampler
    exact = token.sample(["cat"] * 2, [5, 6], settings)  # (2, 3, H, W)
    with bf16_without_gradient(token.models):
        coarse = token.sample(["cat"] * 2, [5, 6], settings)  # (2, 3, H, W)
    assert coarse.dtype == torch.float32
    assert 0 < (coarse - exact).abs().mean() < 0.02


@pytest.mark.parametrize("fails", [False, True])
def test_a_trainings_precision_is_its_own_and_goes_with_it(fails, units, token):
    """Its order is channels after bfloat16: such a UNet keeps its channels first."""
    models = token.models

    def state() -> tuple[str, bool, bool]:
        weights = (models.unet.conv_in.weight, models.vae.decoder.conv_in.weight)
        return precision_name(models), *(w.is_contiguous(memory_format=torch.channels_last) for w in weights)

    before = state()
    assert before == ("float32", False, False)
    inside = []
    for mixed_precision in ("auto", "no"):
        try:
            with training_precision(models, mixed_precision):
                inside.append(state())
                if fails:
                    raise ZeroDivisionError
        except ZeroDivisionError:
            assert fails
        assert state() == before
    assert inside == [("float32, bfloat16 without gradient", False, True), ("float32", True, True)]


def test_models_in_half_precision_stay_in_it(token):
    """bfloat16 is for models in float32 alone."""
    token.models.dtype = torch.float16
    with bf16_without_gradient(token.models):
        assert precision_name(token.models) == "float16"


def scaled(scale: float = 2.0**10):
    """Half precision's scaler, on a CPU in float32."""

    def make(models):
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=20)
        scaler.scale(torch.zeros(()))
        return scaler

    return make


def test_a_scaled_loss_gives_the_same_token(tmp_path, monkeypatch):
    """Powers of two are exact. The scaler makes its state only where it is asked to scale something."""
    assert not make_scaler(tiny_models()).is_enabled()
    _, plain = learned(tmp_path, choose_by="loss")
    monkeypatch.setattr("trainer.make_scaler", scaled())
    _, training = learned(tmp_path, choose_by="loss")
    torch.testing.assert_close(training.last_vector, plain.last_vector)
    half = tiny_models()
    half.dtype = torch.float16
    monkeypatch.undo()
    assert make_scaler(half).get_scale() == 2.0**10
    make_scaler(half).unscale_(
        torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
    )  # would fail without its state


@pytest.mark.parametrize("choose_by", ["loss", "validation"])
def test_an_update_that_overflows_is_skipped_and_learning_goes_on(tmp_path, monkeypatch, choose_by):
    monkeypatch.setattr("trainer.make_scaler", scaled())
    logits = Classifier.logits
    calls = []

    def overflows(self, images):
        calls.append(images)
        return logits(self, images) * (
            math.nan if images.requires_grad and sum(i.requires_grad for i in calls) == 2 else 1.0
        )

    monkeypatch.setattr(Classifier, "logits", overflows)
    token, training = learned(
        tmp_path, choose_by=choose_by, max_epochs=4, batch_size=4, stop_validation_accuracy=0.0
    )
    lost = [row["epoch"] for row in training.rows if row["loss"] is None]
    assert lost == [2]
    norms = [row["token_norm"] for row in training.rows]
    assert norms[1] == norms[0] != norms[2]
    assert token.vector.isfinite().all()
    assert "NaN" not in RunFolder(str(tmp_path), "c", "e").log.read_text()


def test_images_that_overflow_now_and_then_do_not_wear_the_scale_out(tmp_path, monkeypatch):
    """A gradient that overflows is the scale's fault, and halves it.

    A loss that is not finite before any gradient is not.
    """
    logits = Classifier.logits
    calls = []
    scales = []

    def overflows(self, images):
        calls.append(images)
        return logits(self, images) * (math.nan if len(calls) % 4 == 0 else 1.0)

    monkeypatch.setattr(
        "trainer.make_scaler", lambda models: scales.append(scaled(4.0)(models)) or scales[-1]
    )
    monkeypatch.setattr(Classifier, "logits", overflows)
    _, training = learned(tmp_path, choose_by="loss", max_epochs=17, batch_size=4, stop_train_accuracy=1.0)
    assert [row["epoch"] for row in training.rows if row["loss"] is None] == [4, 8, 12, 16]
    assert scales[0].get_scale() == 4.0


def test_overflows_without_end_are_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr("trainer.make_scaler", scaled(4.0))
    monkeypatch.setattr(Classifier, "logits", lambda self, images: images.flatten(1)[:, :3] * math.nan)
    with pytest.raises(
        WorkError, match="update 33: loss nan, gradient norm nan; try a lower --learning_rate"
    ):
        learned(tmp_path, choose_by="loss", max_epochs=49)
    with pytest.raises(WorkError, match="none of 2 updates had a finite loss; try a lower --learning_rate"):
        learned(tmp_path, choose_by="loss", max_epochs=2)
