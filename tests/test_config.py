"""Options: strict values, presets, and what is refused before anything heavy is imported."""

import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest

from config import PRESETS, RunConfig, validate, with_preset
from discriminative.errors import UsageError
from run import boolean, build_parser, main

ROOT = Path(__file__).parent.parent
GOOD = replace(RunConfig(), class_index=1, train=True)


@pytest.mark.parametrize(
    ("text", "value"),
    [("True", True), ("true", True), ("1", True), ("False", False), ("false", False), ("0", False)],
)
def test_booleans_are_read_as_written(text, value):
    """With ``type=bool`` "False" would be true."""
    assert boolean(text) is value


@pytest.mark.parametrize("text", ["yes", "TRUE", "", "2", "no", "None"])
def test_other_booleans_are_refused(text, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--train", text])
    assert stopped.value.code == 2
    assert "allowed is True, true, 1, False, false or 0" in capsys.readouterr().err


def test_every_option_is_a_flag_with_a_help_line():
    text = build_parser().format_help()
    for f in fields(RunConfig):
        assert f"--{f.name} " in text
        assert f.metadata["help"]


def test_paper_preset_is_the_official_configuration():
    c = with_preset("paper", {})
    assert (c.model, c.placeholder_token, c.initializer_token, c.num_templates) == (
        "sd1.4",
        "newclas",
        "a",
        3,
    )
    assert (c.num_inference_steps, c.guidance_scale, c.images_per_update, c.seed, c.noise_pool) == (
        30,
        7.0,
        5,
        35,
        1,
    )
    assert c.update_learning_rate(1.0) == 0.00125
    assert (c.betas, c.weight_decay, c.adam_epsilon, c.max_grad_norm) == ((0.9, 0.999), 1e-2, 1e-8, 1.0)
    assert (c.start, c.max_token_norm, c.token_ema) == ("initializer", 0.0, 0.0)
    assert (c.gradient_mode, c.gradient_steps, c.choose_by) == ("last", 1, "loss")
    assert (c.max_epochs, c.stop_train_accuracy, c.patience, c.test_size) == (50, 0.7, 15, 10)


def test_a_flag_beats_the_preset():
    assert with_preset("paper", {"gradient_steps": 3}).gradient_steps == 3
    assert with_preset("paper", {"images_per_update": 8}).update_learning_rate(1.0) == pytest.approx(0.002)
    assert set(PRESETS) == {"default", "paper"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": False}, "nothing to do: add --train True"),
        ({"jump_at": "1.5"}, "--jump_at: '1.5' was given; allowed is a number from 0 to 1"),
        ({"images_per_update": 0}, "--images_per_update: 0 was given; allowed is 1 or more"),
        ({"learning_rate": 0.0}, "--learning_rate: 0.0 was given; allowed is above 0"),
        ({"learning_rate": float("nan")}, "--learning_rate: nan was given; allowed is a finite number"),
        ({"guidance_scale": -1.0}, "--guidance_scale: -1.0 was given; allowed is 0 or more"),
        ({"gradient_mode": "first"}, "--gradient_mode: 'first' was given; allowed is jump or skip or last"),
        ({"num_templates": 4}, "--num_templates: 4 was given; allowed is 1 to 3"),
        ({"placeholder_token": "New Class"}, "--placeholder_token: 'New Class' was given"),
        ({"exp_id": "../x"}, "--exp_id: '../x' was given"),
        ({"device": "tpu"}, "--device: 'tpu' was given"),
        ({"validation_size": 0}, "--validation_size: 0 was given"),
        ({"test_size": 0}, "--test_size: 0 was given"),
        ({"adam_beta1": 1.0}, "--adam_beta1: 1.0 was given"),
        ({"seed": -1}, "--seed: -1 was given"),
        ({"height": 3}, "--height: 3 was given"),
    ],
)
def test_bad_values_are_refused_by_flag(changes, message):
    with pytest.raises(UsageError) as error:
        validate(replace(GOOD, **changes))
    assert str(error.value).startswith(message)


def test_an_output_path_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="--output_path.*is a file"):
        validate(replace(GOOD, output_path=str(tmp_path / "file" / "results")))


def test_help_and_usage_errors_import_nothing_heavy():
    """Shell loops start run.py once a class: importing torch for --help would cost seconds each time."""
    code = (
        "import sys, run\n"
        "assert run.main(['--class_index', '1']) == 2\n"
        "try: run.main(['--help'])\nexcept SystemExit: pass\n"
        "print([m for m in ('torch', 'diffusers', 'transformers', 'timm', 'numpy') if m in sys.modules])"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert out.splitlines()[-1] == "[]"


def test_the_readme_lists_every_option_with_its_default_and_the_papers():
    readme = (ROOT / "README.md").read_text()
    for f in fields(RunConfig):
        default = "" if f.default is None else f"`{f.default}`"
        paper = f"`{PRESETS['paper'][f.name]}`" if f.name in PRESETS["paper"] else ""
        assert f"| `--{f.name}` | {default} | {paper} | {f.metadata['help']} |" in readme
