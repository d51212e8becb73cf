"""The command line, on the bundled miniature: what a user does, and what a user gets wrong."""

import json

import pytest
import torch
from safetensors.torch import load_file

from run import main

MINI = ["--model", "miniature"]
SHORT = [
    "--num_inference_steps",
    "4",
    "--training_steps",
    "4",
    "--max_epochs",
    "2",
    "--validation_size",
    "2",
    "--validate_every",
    "1",
    "--test_size",
    "3",
]
QUICK = [*MINI, "--device", "cpu", *SHORT]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """One short run of class 2, learned and evaluated."""
    out = tmp_path_factory.mktemp("results")
    assert main([*QUICK, "--class_index", "2", "--train", "True", "--evaluate", "True", "--output_path", str(out)]) == 0
    return out


def records(out):
    (folder,) = (out / "pipeline_token").glob("*/default")
    return folder


def test_a_run_leaves_token_configuration_log_and_evaluation(trained):
    folder = records(trained)
    assert folder.parent.name == "0002_bat_cricket_bat"
    assert {p.name for p in folder.iterdir()} == {"learned_embeds.safetensors", "config.json", "log.jsonl", "evaluation.json"}
    assert {k: v.shape for k, v in load_file(folder / "learned_embeds.safetensors").items()} == {"newclas": (1, 128)}
    config = json.loads((folder / "config.json").read_text())
    assert config["config"]["class_index"] == 2
    assert config["training"]["stopped_by"] in ("max_epochs", "validation_accuracy")


def test_evaluation_holds_what_it_promises(trained):
    result = json.loads((records(trained) / "evaluation.json").read_text())
    assert result["class_name"] == "bat, cricket bat"
    assert (result["prompt_token"], result["prompt_baseline"]) == ("A photo of newclas bat", "A photo of a bat")
    assert result["seeds"] == [0, 1, 2]
    assert result["judge"] == "miniature-judge"
    for key in ("accuracy_token", "accuracy_baseline", "judge_accuracy_token", "judge_accuracy_baseline"):
        assert 0 <= result[key] <= 1
    assert result["settings"]["scheduler"] == "PNDMScheduler"
    assert (result["settings"]["height"], result["settings"]["num_inference_steps"]) == (64, 4)


def test_images_are_written_for_both_arms(trained):
    names = sorted(p.name for p in (trained / "img" / "0002_bat_cricket_bat" / "eval").iterdir())
    assert len(names) == 7
    assert names[-1] == "without_and_with.png"
    assert [n.rsplit("_", 1)[0] for n in names[:6]] == [f"{arm}_{seed:04d}" for arm in ("baseline", "token") for seed in range(3)]


def test_a_token_on_disk_can_be_evaluated_again_with_the_same_result(trained):
    before = json.loads((records(trained) / "evaluation.json").read_text())
    assert main([*QUICK, "--class_index", "2", "--evaluate", "True", "--output_path", str(trained)]) == 0
    assert json.loads((records(trained) / "evaluation.json").read_text()) == before


def test_a_prompt_is_drawn_with_the_token(trained, capsys):
    prompt = "a painting of a {token} {class} on a blue background"
    assert main([*QUICK, "--class_index", "2", "--prompt", prompt, "--num_images", "2", "--output_path", str(trained)]) == 0
    folder = trained / "img" / "0002_bat_cricket_bat" / "prompt"
    assert {p.name for p in folder.iterdir()} == {"0035.png", "0036.png", "grid.png", "prompt.json"}
    assert "a painting of a newclas bat on a blue background" in capsys.readouterr().out


def test_dry_run_prints_the_plan_and_writes_nothing(tmp_path, capsys):
    assert main([*MINI, "--class_index", "2", "--train", "True", "--dry_run", "True", "--output_path", str(tmp_path / "r")]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["config"]["relative_rate"] > 0
    assert shown["plan"]["classifier"] == "miniature"
    assert shown["plan"]["prompts"][0] == "A photo of newclas bat"
    assert not (tmp_path / "r").exists()


def test_a_dry_run_refuses_what_the_run_would(capsys):
    assert main([*MINI, "--class_index", "2", "--train", "True", "--dry_run", "True", "--height", "60"]) == 2
    assert "--height: 60 was given" in capsys.readouterr().err


def test_a_token_of_another_model_is_neither_overwritten_nor_evaluated(trained, tmp_path, capsys):
    import shutil

    from models import MINIATURE

    shutil.copytree(MINIATURE / "model", tmp_path / "model")
    other = ["--model", str(tmp_path / "model"), "--classifier", "miniature", "--class_index", "2", "--output_path", str(trained)]
    before = (records(trained) / "learned_embeds.safetensors").read_bytes()
    for todo in ("--train", "--evaluate"):
        assert main([*other, *SHORT, todo, "True"]) == 2
        assert "was learned with 'miniature'; give that, or another --exp_id" in capsys.readouterr().err
    assert (records(trained) / "learned_embeds.safetensors").read_bytes() == before


def test_settings_other_than_the_tokens_own_are_told(trained, capsys):
    argv = [*QUICK, "--class_index", "2", "--prompt", "{token} {class}", "--num_images", "1", "--output_path", str(trained)]
    assert main([*argv, "--guidance_scale", "5"]) == 0
    assert "not as the token was learned: guidance_scale 7.0 -> 5.0" in capsys.readouterr().out


def test_an_inpainting_model_is_refused_before_it_is_loaded(tmp_path, capsys):
    import shutil

    from models import MINIATURE

    shutil.copytree(MINIATURE / "model", tmp_path / "model")
    config = tmp_path / "model" / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"in_channels": 9}))
    model = ["--model", str(tmp_path / "model"), "--classifier", "miniature"]
    assert main([*model, "--class_index", "2", "--train", "True", "--output_path", str(tmp_path / "r")]) == 2
    assert "takes 9 channels and gives 4" in capsys.readouterr().err


def test_running_out_of_memory_is_one_line_that_names_the_flags(monkeypatch, tmp_path, capsys):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("trainer.train", full)
    assert main([*QUICK, "--class_index", "2", "--train", "True", "--output_path", str(tmp_path)]) == 1
    assert "try --memory 8gb, or a smaller --height and --width" in capsys.readouterr().err
