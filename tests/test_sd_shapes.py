"""One update at Stable Diffusion 1.4's shapes, with random weights."""

from dataclasses import replace

import pytest
import torch

from benchmarks.sd_shapes import build_models, measure
from config import RunConfig

CONFIG = replace(
    RunConfig(), class_index=283, train=True, keep="loss", batch_size=1, images_per_update=2, num_inference_steps=3, training_steps=3
)


def test_full_width_has_the_parameter_counts_of_sd_1_4():
    """859,520,964 in the UNet, 83,653,863 in the VAE and 123,060,480 in the text encoder."""
    models = build_models(1.0, torch.device("meta"), torch.float32)
    counts = [sum(p.numel() for p in m.parameters()) for m in (models.unet, models.vae, models.text_encoder)]
    assert counts == [859_520_964, 83_653_863, 123_060_480]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["jump", "last"])
def test_one_update_at_reduced_width_moves_the_token_on_a_cpu(mode):
    result = measure(replace(CONFIG, gradient_mode=mode, device="cpu", images_per_update=1), width=0.1, updates=1)
    assert result["moved"]


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["jump", "last"])
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_updates_at_full_width_move_the_token_on_cuda(mode, precision):
    result = measure(replace(CONFIG, gradient_mode=mode, mixed_precision=precision, device="cuda"), width=1.0, updates=2)
    assert result["moved"]
    assert all(0 < row["gradient_norm"] < float("inf") for row in result["updates"])
