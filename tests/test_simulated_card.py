"""The default path on a card, from the options to the files, on a simulated one."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from short_runs import small_validations
from simulated_card import CARD, OnCard, simulated_card
from test_session import file_of_a_token
from tiny_folders import save_sd1, save_timm, save_tiny_vae

from run import main


def test_the_simulated_card_keeps_the_rules_of_devices():
    with simulated_card():
        here = torch.ones(2, 3)
        there = here.to("cuda")
        assert (there.device, here.device, there.cpu().device) == (
            CARD,
            torch.device("cpu"),
            torch.device("cpu"),
        )
        assert (there * 2).device == torch.zeros(2, device=there.device).device == CARD
        assert there.sum().device == torch.stack([there, there]).device == CARD
        with pytest.raises(RuntimeError, match="same device"):
            there + here
        with pytest.raises(RuntimeError, match="same device"):
            torch.cat([there, here])
        with pytest.raises(TypeError, match="Tensor.cpu"):
            there.numpy()
        with pytest.raises(RuntimeError, match="generator"):
            torch.randn(2, device="cuda", generator=torch.Generator())
        linear = torch.nn.Linear(3, 4).to("cuda").half()
        assert {p.device for p in linear.parameters()} == {CARD}
        with pytest.raises(RuntimeError, match="same device"):
            linear(here.half())
        loss = linear(there.half()).float().square().sum()
        loss.backward()
        assert linear.weight.grad.device == CARD
        assert linear.weight.grad.dtype == torch.float16
    assert not isinstance(torch.ones(2), OnCard)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Options of a model and a classifier; device and precision are those that "auto" takes."""
    root = tmp_path_factory.mktemp("sources")
    argv = ["--model", save_sd1(root / "sd1"), "--classifier", save_timm(root / "timm"), "--class_index", "1"]
    argv += ["--num_inference_steps", "2", "--training_sampler", "dpmsolver++@2", "--images_per_update", "2"]
    return argv


def run(argv: list[str], out: Path) -> Path:
    """Run on the simulated card; returns the folder of the token."""
    with small_validations(1), simulated_card():
        assert main([*argv, "--output_path", str(out)]) == 0
    (records,) = (out / "pipeline_token").glob("*/default")
    return records


def test_a_token_is_learned_and_drawn_with_on_a_card(sources, tmp_path, capsys):
    records = run(
        [*sources, "--train", "--max_epochs", "1", "--prompt", "a {token}", "--num_images", "1"], tmp_path
    )
    assert "on cuda in float16" in capsys.readouterr().out
    (vector,) = load_file(records / "learned_embeds.safetensors").values()
    assert vector.dtype == torch.float32
    assert vector.isfinite().all()
    (row,) = [json.loads(line) for line in (records / "log.jsonl").read_text().splitlines()]
    assert row["gradient_norm"] > 0
    assert len(list((tmp_path / "img").glob("*/prompt/*/*.png"))) == 2


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["jump", "skip", "last:2", "lv"])
def test_every_mode_learns_on_a_card(sources, tmp_path, mode):
    records = run([*sources, "--train", "--max_epochs", "1", "--gradient_mode", mode], tmp_path)
    assert (records / "learned_embeds.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_every_precision_learns_on_a_card(sources, tmp_path, precision):
    records = run([*sources, "--train", "--max_epochs", "1", "--mixed_precision", precision], tmp_path)
    assert (records / "learned_embeds.safetensors").exists()


@pytest.mark.slow
def test_all_that_is_done_with_a_token_is_done_on_a_card(sources, tmp_path):
    argv = [*sources, "--judge", save_timm(tmp_path / "judge"), "--max_epochs", "2", "--test_size", "2"]
    argv += ["--train", "--evaluate", "--export", "a1111,pipeline", "--export_dataset", "1"]
    argv += ["--tiny_vae", save_tiny_vae(tmp_path / "taesd"), "--memory", "8gb"]
    records = run(argv, tmp_path / "r")
    result = json.loads((records / "evaluation.json").read_text())
    assert result["settings"]["precision"] == "torch.float16"
    assert (records / "pipeline" / "model_index.json").exists()


@pytest.mark.parametrize("precision", [(), ("--mixed_precision", "no", "--eval_precision", "fp16")])
def test_an_evaluation_on_a_card_is_the_same_from_kept_latents(precision, sources, tmp_path, capsys):
    token = file_of_a_token(tmp_path / "token.safetensors")
    argv = [*sources, "--evaluate", "--token_path", str(token), "--test_size", "3", *precision]
    out = tmp_path / "r"
    told = []
    for _ in range(2):
        result = json.loads((run(argv, out) / "evaluation.json").read_text())
        told.append((result["prompts"], result["settings"], result.get("precision")))
    assert told[0] == told[1]
    assert ("fp16 instead of float32, on 6 images" in capsys.readouterr().out) == bool(precision)
    assert len(list(out.glob("cache/latents/*/*.safetensors"))) == (2 if precision else 1)
