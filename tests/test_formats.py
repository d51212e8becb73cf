"""Every format of model and classifier, through the command line: train, evaluate, generate on folders of
tiny random weights."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from short_runs import small_validations
from tiny_folders import (
    save_hf_convnext,
    save_hf_vit,
    save_sd1,
    save_sd2,
    save_timm,
    save_tiny_vae,
    save_vit_mae,
)

from run import main

ROOT = Path(__file__).parent.parent
SHORT = [
    *("--num_inference_steps", "3", "--training_sampler", "dpmsolver++@3", "--max_epochs", "1"),
    *("--images_per_update", "2", "--test_size", "2", "--num_images", "1"),
]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
MODELS = {"sd1": (save_sd1, 16), "sd2": (save_sd2, 24)}
CLASSIFIERS = {
    "timm": save_timm,
    "timm-file": lambda folder: save_timm(folder, None),
    "hf-vit": save_hf_vit,
    "hf-convnext": save_hf_convnext,
    "vit-mae-old": lambda folder: save_vit_mae(folder, "old"),
    "vit-mae-new": lambda folder: save_vit_mae(folder, "new"),
}


@pytest.fixture(autouse=True, scope="module")
def small():
    with small_validations(1):
        yield


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders by name, each written when it is first asked for."""
    root = tmp_path_factory.mktemp("formats")
    names = {}

    def of(name: str) -> str:
        if name not in names:
            names[name] = (MODELS[name][0] if name in MODELS else CLASSIFIERS[name])(root / name)
        return names[name]

    return of


def run(saved, out, model: str, classifier: str, *more: str, device: str = "cpu") -> dict:
    """Train, evaluate and generate; returns what ``evaluation.json`` holds."""
    argv = [
        *SHORT,
        "--device",
        device,
        "--model",
        saved(model),
        "--classifier",
        classifier,
        "--class_index",
        "tiger cat",
        "--output_path",
        str(out),
        *more,
    ]
    assert (
        main([*argv, "--train", "True", "--evaluate", "True", "--prompt", "a photo of {token} {class}"]) == 0
    )
    (records,) = (out / "pipeline_token").glob("*/default")
    (vector,) = load_file(records / "learned_embeds.safetensors").values()
    assert vector.shape == (1, MODELS[model][1])
    assert len(list((out / "img").glob("*/prompt/*/*.png"))) == 2
    return json.loads((records / "evaluation.json").read_text())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("classifier", CLASSIFIERS)
def test_a_token_is_learned_evaluated_and_drawn_with_every_classifier_format(
    saved, tmp_path, classifier, device
):
    result = run(saved, tmp_path, "sd1", saved(classifier), device=device)
    assert result["class_name"] == "tiger cat"
    assert result["class_index"] == (283 if classifier == "timm-file" else 1)
    assert result["judge"] is None


@pytest.mark.parametrize("mode", ["jump", "last"])
@pytest.mark.parametrize("scheduler", [None, "pndm", "ddim", "euler", "dpmsolver++"])
@pytest.mark.parametrize("device", DEVICES)
def test_a_token_is_learned_with_every_scheduler_on_a_model_that_predicts_velocity(
    saved, tmp_path, scheduler, mode, device
):
    choice = ["--scheduler", scheduler] if scheduler else []
    extra = ["--export", "a1111,pipeline"] if device == "cuda" else []
    result = run(
        saved, tmp_path, "sd2", saved("timm"), "--gradient_mode", mode, *choice, *extra, device=device
    )
    expected = {
        None: "DDIM",
        "pndm": "PNDM",
        "ddim": "DDIM",
        "euler": "EulerDiscrete",
        "dpmsolver++": "DPMSolverMultistep",
    }[scheduler]
    assert result["settings"]["scheduler"] == f"{expected}Scheduler"
    assert result["settings"]["height"] == 16  # the model's own


def test_a_tiny_vae_decodes_in_training_and_the_models_own_in_the_evaluation(saved, tmp_path, monkeypatch):
    from discriminative.diffusion import sampler

    decoders = []
    decode = sampler.decode

    def noted(models, latents, settings):
        decoders.append((torch.is_grad_enabled(), settings.tiny_vae))
        return decode(models, latents, settings)

    for module in ("sampler", "gradients"):
        monkeypatch.setattr(f"discriminative.diffusion.{module}.decode", noted)
    run(saved, tmp_path, "sd1", saved("timm"), "--tiny_vae", save_tiny_vae(tmp_path / "taesd"))
    trained = decoders.index((False, False))
    assert set(decoders[:trained]) == {(False, True), (True, True)}  # validation and updates
    assert set(decoders[trained:]) == {(False, False)}
    (records,) = tmp_path.glob("pipeline_token/*/default")
    assert json.loads((records / "config.json").read_text())["config"]["tiny_vae"] == str(tmp_path / "taesd")


def test_several_guides_and_a_judge_of_another_label_set(saved, tmp_path):
    guides = f"{saved('timm')},{saved('hf-vit')}"
    result = run(saved, tmp_path, "sd1", guides, "--judge", saved("timm-file"))
    assert result["classifier"] == guides
    assert set(result["prompts"][0]["arms"]["token"]["guides"]) == {saved("timm"), saved("hf-vit")}
    assert result["judge"] == saved("timm-file")  # its tiger cat is number 283
    assert 0 <= result["prompts"][0]["arms"]["token"]["judge"]["accuracy"] <= 1


def test_a_class_that_the_judge_lacks_is_told_as_not_judged(saved, tmp_path, capsys):
    argv = [
        *SHORT,
        "--device",
        "cpu",
        "--model",
        saved("sd1"),
        "--classifier",
        saved("timm"),
        "--judge",
        saved("timm-file"),
        "--output_path",
        str(tmp_path),
    ]
    assert main([*argv, "--class_index", "blue cat", "--train", "True", "--evaluate", "True"]) == 0
    assert "not judged: " in capsys.readouterr().out
    (result,) = tmp_path.rglob("evaluation.json")
    result = json.loads(result.read_text())
    first = result["prompts"][0]
    assert (result["judge"], first["arms"]["token"]["judge"], first["paired"]["judge"]) == (
        saved("timm-file"),
        None,
        None,
    )


OWN = """
import torch
from classifiers import Classifier, Recipe

def make():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 2))
    return Classifier("own", model, ["tiger cat", "bat"], Recipe((8, 8), (8, 8), (0.5,) * 3, (0.5,) * 3))

def bare():
    return torch.nn.Identity()

def mistaken():
    return no_such_name
"""


def test_ones_own_function_is_a_classifier(saved, tmp_path, monkeypatch, capsys):
    (tmp_path / "my_classifier.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert (
        run(saved, tmp_path / "r", "sd1", "python:my_classifier:make")["classifier"]
        == "python:my_classifier:make"
    )
    for function, message in (
        ("bare", "it returned a Identity"),
        ("none", "has no 'none'"),
        ("mistaken", "name 'no_such_name' is not defined"),
    ):
        assert (
            main(
                [
                    "--model",
                    saved("sd1"),
                    "--classifier",
                    f"python:my_classifier:{function}",
                    "--class_index",
                    "1",
                    "--train",
                    "True",
                ]
            )
            == 2
        )
        assert message in capsys.readouterr().err


def test_classes_are_listed_by_number_label_and_prompt_name(saved, capsys):
    assert main(["--classifier", saved("hf-vit"), "--list_classes", "True"]) == 0
    assert capsys.readouterr().out.splitlines()[:2] == [
        "    1  tiger cat  ->  tiger cat",
        "    2  bat  ->  bat",
    ]
    assert main(["--list_classes", "True"]) == 0  # of sd1.4's default
    assert "  283  tiger cat  ->  tiger cat" in capsys.readouterr().out.splitlines()


def test_the_hubs_own_variables_say_where_its_files_are_and_that_none_is_fetched(tmp_path):
    """They serve instead of options that this program had."""
    place = tmp_path / "home" / "hub" / "models--somebody--vit"
    save_hf_vit(place / "snapshots" / "abc")
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("abc")
    settings = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    settings |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    argv = [sys.executable, "run.py", "--classifier", "hf:somebody/vit", "--list_classes"]
    done = subprocess.run(argv, env=settings, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[:2] == ["    1  tiger cat  ->  tiger cat", "    2  bat  ->  bat"]
