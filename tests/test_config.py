"""Options: strict values, presets, and what is refused before anything heavy is imported."""

import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest

from config import PRESETS, RunConfig, validate, with_preset
from discriminative.errors import UsageError
from discriminative.settings import GradientPath, Stage
from discriminative.tokens.prompts import TEMPLATES
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
    assert (c.model, c.placeholder_token, c.initializer_token) == ("sd1.4", "newclas", "a")
    assert TEMPLATES == (
        "A photo of {token} {class}",
        "a high resolution realistic image of {token} {class}",
        "A close-up photo of {token} {class}",
    )
    assert (c.num_inference_steps, c.guidance_scale, c.images_per_update) == (30, 7.0, 5)
    assert (c.seed, c.noise_pool) == (35, 1)
    settings = c.learning()
    optimizer = settings.optimizer
    assert optimizer.step_size(settings.images_per_update, 1.0) == 0.00125
    assert (optimizer.adam_beta1, optimizer.adam_beta2) == (0.9, 0.999)
    assert (optimizer.adam_epsilon, optimizer.weight_decay, optimizer.max_grad_norm) == (1e-8, 1e-2, 1.0)
    assert (settings.starts, optimizer.max_token_norm) == (("initializer",), 0.0)
    assert settings.path == GradientPath("last", 2)
    assert settings.stages == (Stage(),)
    assert settings.choose_by == "loss"
    # Training samples as the evaluation does: the model's own scheduler and as many steps.
    assert settings.sampler == c.sampler
    assert (settings.sampler.scheduler, settings.sampler.num_inference_steps) == (None, 30)
    curriculum = settings.curriculum
    assert (curriculum.max_epochs, curriculum.stop_train_accuracy, curriculum.patience) == (50, 0.7, 15)
    assert c.test_size == 10


def step_size(config: RunConfig) -> float:
    """AdamW's, where the root mean square of a word's embedding is 1."""
    return config.learning().optimizer.step_size(config.images_per_update, 1.0)


def test_a_flag_beats_the_preset():
    assert with_preset("paper", {"gradient_mode": "last:3"}).learning().path.steps == 3
    assert step_size(with_preset("paper", {"images_per_update": 8})) == pytest.approx(0.002)
    assert step_size(with_preset("default", {"images_per_update": 8})) == pytest.approx(0.05 * 8)
    assert set(PRESETS) == {"default", "paper"}


@pytest.mark.parametrize(
    ("text", "scheduler", "steps"),
    [
        ("dpmsolver++@12", "dpmsolver++", 12),
        ("ddim@5", "ddim", 5),
        ("ddim", "ddim", 30),
        ("same@20", None, 20),
        ("same", None, 30),
    ],
)
def test_the_sampler_of_training_is_one_option(text, scheduler, steps):
    config = replace(GOOD, training_sampler=text)
    validate(config)
    assert (config.training_scheduler, config.training_steps) == (scheduler, steps)
    sampler = config.learning().sampler
    assert (sampler.scheduler, sampler.num_inference_steps) == (scheduler, steps)


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("jump", GradientPath("jump")),
        ("last", GradientPath("last")),
        ("last:3", GradientPath("last", 3)),
        ("random:5", GradientPath("random", 5)),
        ("lv:4", GradientPath("lv", 4)),
    ],
)
def test_the_gradients_mode_and_steps_are_one_option(text, path):
    config = replace(GOOD, gradient_mode=text)
    validate(config)
    assert config.learning().path == path


def test_a_constant_of_the_training_is_set_in_python_and_a_misspelled_one_is_told():
    settings = RunConfig().learning(fine_rate=0.25, validation_size=3)
    assert (settings.optimizer.fine_rate, settings.validation.validation_size) == (0.25, 3)
    assert settings.constants == RunConfig().learning().constants | {"fine_rate": 0.25, "validation_size": 3}
    with pytest.raises(TypeError, match="no setting of a training is called fine_rat"):
        RunConfig().learning(fine_rat=0.25)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": False}, "nothing to do: add --train True"),
        ({"jump_at": "1.5"}, "--jump_at: '1.5' was given; allowed is a number from 0 to 1"),
        ({"images_per_update": 0}, "--images_per_update: 0 was given; allowed is 1 or more"),
        ({"learning_rate": 0.0}, "--learning_rate: 0.0 was given; allowed is above 0"),
        ({"learning_rate": float("nan")}, "--learning_rate: nan was given; allowed is a finite number"),
        ({"guidance_scale": -1.0}, "--guidance_scale: -1.0 was given; allowed is 0 or more"),
        ({"gradient_mode": "first"}, "--gradient_mode: 'first' was given; allowed is jump, skip, last"),
        ({"gradient_mode": "last:0"}, "--gradient_mode: 'last:0' was given; allowed is jump, skip, last"),
        ({"gradient_mode": "jump:2"}, "--gradient_mode: 'jump:2' was given; allowed is jump, skip, last"),
        ({"training_sampler": "heun"}, "--training_sampler: 'heun' was given; allowed is same, pndm"),
        ({"training_sampler": "ddim@0"}, "--training_sampler: 'ddim@0' was given; allowed is same, pndm"),
        ({"training_sampler": "ddim@"}, "--training_sampler: 'ddim@' was given; allowed is same, pndm"),
        ({"jump_at": "0.1,0.2"}, "--jump_at: '0.1,0.2' was given; allowed is a number from 0 to 1"),
        ({"jump_at": "0.5@0"}, "--jump_at: '0.5@0' was given; allowed is a number from 0 to 1"),
        ({"jump_at": "nan"}, "--jump_at: 'nan' was given; allowed is a number from 0 to 1"),
        ({"export": "onnx"}, "--export: 'onnx' was given; allowed is a1111, pipeline or both"),
        ({"keep": "wrong"}, "--keep: 'wrong' was given; allowed is all or correct"),
        ({"scheduler": "heun"}, "--scheduler: 'heun' was given; allowed is pndm or ddim"),
        ({"weight_decay": -0.1}, "--weight_decay: -0.1 was given; allowed is 0 or more"),
        ({"stop_validation_accuracy": 1.1}, "--stop_validation_accuracy: 1.1 was given; allowed is 0 to 1"),
        ({"placeholder_token": "New Class"}, "--placeholder_token: 'New Class' was given"),
        ({"exp_id": "../x"}, "--exp_id: '../x' was given"),
        ({"device": "tpu"}, "--device: 'tpu' was given"),
        ({"validate_every": 0}, "--validate_every: 0 was given"),
        ({"test_size": 0}, "--test_size: 0 was given"),
        ({"seed": -1}, "--seed: -1 was given"),
        ({"height": 3}, "--height: 3 was given"),
    ],
)
def test_bad_values_are_refused_by_flag(changes, message):
    with pytest.raises(UsageError) as error:
        validate(replace(GOOD, **changes))
    assert str(error.value).startswith(message)


# The smallest and the largest value of each option that has limits; None is no limit.
LIMITS = {
    "num_images": (1, None),
    "export_dataset": (0, 10_000_000),
    "decode_batch_size": (1, None),
    "eval_batch_size": (1, None),
    "num_vectors": (1, 32),
    "num_inference_steps": (1, None),
    "guidance_scale": (0.0, None),
    "height": (8, None),
    "width": (8, None),
    "seed": (0, 4000),
    "images_per_update": (1, None),
    "max_epochs": (1, None),
    "weight_decay": (0.0, None),
    "max_grad_norm": (0.0, None),
    "max_token_norm": (0.0, None),
    "noise_pool": (0, None),
    "stop_validation_accuracy": (0.0, 1.0),
    "validate_every": (1, None),
    "patience": (0, None),
    "stop_train_accuracy": (0.0, 1.0),
    "test_size": (1, 500_000),
    "submit_jobs": (1, 1000),
    "checkpoint_seconds": (0.0, None),
    "classes_per_batch": (1, 64),
}


@pytest.mark.parametrize("name", LIMITS)
def test_an_option_is_allowed_up_to_its_limits_and_refused_beyond(name):
    low, high = LIMITS[name]
    good = replace(GOOD, submit="local") if name.startswith("submit_") else GOOD
    beyond = 0.01 if isinstance(low, float) else 1
    for edge, outside in ((low, low - beyond), (high, (high or 0) + beyond)):
        if edge is None:
            continue
        validate(replace(good, **{name: edge}))
        with pytest.raises(UsageError, match=f"^--{name}: {outside} was given; allowed is "):
            validate(replace(good, **{name: outside}))


def test_every_option_that_is_a_number_has_limits():
    numbers = {f.name for f in fields(RunConfig) if f.type in (int, float, int | None, float | None)}
    assert numbers == set(LIMITS) | {"learning_rate"}  # which is above 0, in the table of bad values


def test_an_output_path_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="--output_path.*is a file"):
        validate(replace(GOOD, output_path=str(tmp_path / "file" / "results")))


def test_help_and_usage_errors_import_nothing_heavy():
    """Shell loops start run.py once a class: importing torch for --help would cost seconds each time."""
    code = (
        "import sys, run\n"
        "assert run.main(['--class_index', '1']) == 2\n"
        "assert run.main(['--help']) == run.main(['--help', 'all']) == 0\n"
        "print([m for m in ('torch', 'diffusers', 'transformers', 'timm', 'numpy') if m in sys.modules])"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert out.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("relative_rate", -1.0),
        ("relative_rate", 0.0),
        ("fine_rate", float("nan")),
        ("adam_epsilon", 0.0),
        ("adam_beta1", 1.0),
        ("adam_beta2", -0.1),
        ("validation_certainty", 1.1),
        ("enough_validation_accuracy", 2.0),
        ("attempt_patience", 0),
        ("validation_size", 0),
        ("confirm_size", 500_001),
    ],
)
def test_a_constant_outside_its_limits_is_refused(name, value):
    """In Python they are set by name; seeds of too large a validation would be training's."""
    with pytest.raises(ValueError, match=f"{name}: .* was given; allowed is"):
        RunConfig().learning(**{name: value})
