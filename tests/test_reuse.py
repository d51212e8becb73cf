"""What of an earlier run is taken over: which option decides the token, the evaluation, the data set."""

from dataclasses import fields, replace
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_classifier

from apps.provenance import (
    dataset_options,
    evaluation_options,
    is_evaluated,
    is_learned,
    read_dataset_record,
)
from apps.session import record_of
from config import RunConfig
from discriminative.errors import UsageError
from discriminative.guides.classifier import Guide
from discriminative.records.files import write_json
from discriminative.records.layout import RunFolder
from discriminative.settings import LearningSettings
from discriminative.tokens.dataset import Dataset, check_dataset
from discriminative.tokens.files import fingerprint
from evaluate import templates_of
from trainer import Training

VECTORS = torch.ones(1, 4)


# --- the three predicates: was what is on disk made with ``then`` good for ``now``?


def write_learned(then: RunConfig, folder: RunFolder, learning: LearningSettings | None = None) -> None:
    """What a training leaves on disk, as far as it is asked whether it does for another one."""
    folder.records.mkdir(parents=True, exist_ok=True)
    folder.token.touch()
    plan = SimpleNamespace(config=then, label="cat")
    write_json(folder.config, record_of(plan, learning or then.learning(), Training()))


def token_is_reused(then: RunConfig, now: RunConfig, folder: RunFolder) -> bool:
    """Whether a token that was learned with some options passes for one learned with others."""
    write_learned(then, folder)
    return is_learned(now, folder)


def evaluation_is_reused(then: RunConfig, now: RunConfig, folder: RunFolder) -> bool:
    """Whether an evaluation passes for one with other options; the token is the same."""
    folder.eval_images.mkdir(parents=True)
    folder.grid.touch()
    prompts = [{"template": template} for template in templates_of(then)]
    said = {"token": fingerprint(VECTORS), "options": evaluation_options(then), "prompts": prompts}
    write_json(folder.result, said)
    return is_evaluated(now, folder, VECTORS, templates_of(now))


def may_be_added_to(config: RunConfig, folder: RunFolder, vectors: torch.Tensor = VECTORS) -> bool:
    """Whether a data set on disk is added to with these options and this token."""
    try:
        check_dataset(folder.dataset, dataset_options(config, vectors), read_dataset_record)
    except UsageError:
        return False
    return True


def dataset_is_reused(then: RunConfig, now: RunConfig, folder: RunFolder) -> bool:
    """Whether a data set is added to with other options; the token is the same."""
    Dataset(folder.dataset, [Guide(tiny_classifier(), 0)], None, dataset_options(then, VECTORS))
    return may_be_added_to(now, folder)


REUSED = {"token": token_is_reused, "evaluation": evaluation_is_reused, "dataset": dataset_is_reused}

# --- what decides what, written by hand

BASE = {"class_index": 1, "export_dataset": 3}
PROMPTS_FILE = "another file of prompts"  # stands for the path of one

# Option: another value than BASE's or the default, and what that decides.
TABLE = {
    # Another class has another folder, so figures and images need not say it.
    "class_index": (2, "token"),
    "train": (True, ""),
    "evaluate": (True, ""),
    "prompt": ("a cat", ""),
    "num_images": (9, ""),
    "export_dataset": (5, ""),
    "keep": ("correct", "dataset"),
    "report": (True, ""),
    "list_classes": (True, ""),
    "dry_run": (True, ""),
    "model": ("sd1.5", "token evaluation dataset"),
    "classifier": ("cub", "token evaluation dataset"),
    "judge": ("none", "evaluation dataset"),
    "device": ("cpu", ""),
    "mixed_precision": ("no", "token evaluation dataset"),
    "memory": ("8gb", ""),
    "decode_batch_size": (2, ""),
    "eval_batch_size": (2, ""),
    "gradient_checkpointing": (True, ""),
    # It decodes in training alone.
    "tiny_vae": ("taesd", "token"),
    "compile": (True, ""),
    "checkpoint_seconds": (0.0, ""),
    "classes_per_batch": (2, ""),
    "placeholder_token": ("otherword", "token evaluation dataset"),
    "num_vectors": (2, "token"),
    # The baseline's prompt has it; a data set's images have the token alone.
    "initializer_token": ("pet", "token evaluation"),
    "start": ("class", "token"),
    "prompt_name": ("kitty", "token evaluation dataset"),
    # Training has a sampler of its own: see below for where it has not.
    "num_inference_steps": (50, "evaluation dataset"),
    "guidance_scale": (5.0, "token evaluation dataset"),
    "scheduler": ("ddim", "evaluation dataset"),
    "training_sampler": ("dpmsolver++@20", "token"),
    "height": (256, "token evaluation dataset"),
    "width": (256, "token evaluation dataset"),
    # Evaluations and data sets have seeds of their own.
    "seed": (1, "token"),
    "gradient_mode": ("skip", "token"),
    "jump_at": ("0.13", "token"),
    "learning_rate": (0.001, "token"),
    "images_per_update": (2, "token"),
    "max_epochs": (10, "token"),
    "augment": (True, "token"),
    "weight_decay": (0.0, "token"),
    "max_grad_norm": (0.0, "token"),
    "max_token_norm": (0.0, "token"),
    "noise_pool": (1, "token"),
    "choose_by": ("loss", "token"),
    "stop_validation_accuracy": (0.9, "token"),
    "validate_every": (5, "token"),
    "patience": (5, "token"),
    "stop_train_accuracy": (0.7, "token"),
    "eval_precision": ("bf16", "evaluation"),
    "test_size": (100, "evaluation"),
    "eval_prompts": (PROMPTS_FILE, "evaluation"),
    "reference_images": ("photos", "evaluation"),
    "insight": ("attributes.txt", ""),
    "clip_model": ("clip", "evaluation"),
    "output_path": ("elsewhere", ""),
    "exp_id": ("other", ""),
    # What is learned is written elsewhere; which vectors a data set's images are of, their fingerprint tells.
    "token_path": ("token.safetensors", "evaluation"),
    "export": ("a1111,pipeline", ""),
    "report_to": ("wandb", ""),
    "submit": ("slurm", ""),
    "submit_jobs": (2, ""),
    "submit_settings": ("nodes=1", ""),
}
# Further values of the same options: each part of a value decides.
FURTHER = [
    ("model", "sd1.4@fp16", "token evaluation dataset"),  # a revision
    ("classifier", "inet,cub", "token evaluation dataset"),
    ("prompt", "@prompts.txt", ""),
    ("training_sampler", "ddim@12", "token"),
    ("training_sampler", "same", "token"),
    ("gradient_mode", "last:3", "token"),
    ("jump_at", "0@8;0.07@15", "token"),
    ("export", "pipeline", ""),
    ("learning_rate", 0.002, "token"),
]
# Settings of a training that are no options, and another value than the default.
CONSTANTS = {
    "validation_size": 6,
    "confirm_size": 6,
    "validation_certainty": 0.0,
    "relative_rate": 0.1,
    "fine_rate": 1.0,
    "adam_beta1": 0.8,
    "adam_beta2": 0.99,
    "adam_epsilon": 1e-6,
    "attempt_patience": 5,
    "enough_validation_accuracy": 0.99,
}


def decided(then: RunConfig, now: RunConfig, root) -> set[str]:
    """What of token, evaluation and data set is not taken over."""
    found = set()
    for what, is_reused in REUSED.items():
        if not is_reused(then, now, RunFolder(str(root / what), "0001_cat", "default")):
            found.add(what)
    return found


@pytest.mark.parametrize("name", [f.name for f in fields(RunConfig)])
def test_an_option_decides_what_the_table_says_and_nothing_else(name, tmp_path):
    assert name in TABLE, f"write into the table what --{name} decides"
    value, expected = TABLE[name]
    if value == PROMPTS_FILE:
        value = str(tmp_path / "prompts.txt")
        (tmp_path / "prompts.txt").write_text("a {token} {class} on a boat\n")
    then = replace(RunConfig(), **BASE)
    now = replace(then, **{name: value})
    assert now != then, f"the table's value of --{name} is the default"
    assert decided(then, now, tmp_path / "changed") == set(expected.split())
    assert decided(now, then, tmp_path / "changed back") == set(expected.split())
    assert decided(now, now, tmp_path / "same") == set()


@pytest.mark.parametrize(("name", "value", "expected"), FURTHER)
def test_every_part_of_a_value_decides_as_the_option_does(name, value, expected, tmp_path):
    then = replace(RunConfig(), **BASE)
    now = replace(then, **{name: value})
    assert decided(then, now, tmp_path / "changed") == set(expected.split())
    assert decided(now, then, tmp_path / "changed back") == set(expected.split())
    assert decided(now, now, tmp_path / "same") == set()


def test_the_table_has_no_option_that_is_gone():
    assert set(TABLE) <= {f.name for f in fields(RunConfig)}


@pytest.mark.parametrize(
    ("without", "name", "value", "decides_token"),
    [
        ({"training_sampler": "dpmsolver++"}, "num_inference_steps", 50, True),
        ({"training_sampler": "same@12"}, "scheduler", "ddim", True),
        ({"training_sampler": "dpmsolver++"}, "scheduler", "ddim", False),
        ({"training_sampler": "same@12"}, "num_inference_steps", 50, False),
        ({"training_sampler": "same"}, "num_inference_steps", 50, True),
        ({"training_sampler": "same"}, "scheduler", "ddim", True),
    ],
)
def test_sampling_decides_the_token_where_training_has_no_sampler_of_its_own(
    without, name, value, decides_token, tmp_path
):
    then = replace(RunConfig(), **BASE, **without)
    found = decided(then, replace(then, **{name: value}), tmp_path)
    assert found == {"evaluation", "dataset"} | ({"token"} if decides_token else set())


# --- constants


@pytest.mark.parametrize("name", CONSTANTS)
def test_a_training_with_another_constant_is_not_the_defaults_token(name, folder):
    config = replace(RunConfig(), **BASE)
    other = config.learning(**{name: CONSTANTS[name]})
    assert other != config.learning(), f"the table's value of {name} is the default"
    write_learned(config, folder)
    assert is_learned(config, folder)
    assert not is_learned(config, folder, other)
    write_learned(config, folder, other)
    assert not is_learned(config, folder)
    assert not is_learned(config, folder, config.learning())
    assert is_learned(config, folder, config.learning(**{name: CONSTANTS[name]}))


def test_the_table_has_every_constant_of_a_training():
    assert set(CONSTANTS) == set(RunConfig().learning().constants)


def test_how_many_images_go_through_the_models_at_once_is_no_other_training(folder):
    config = replace(RunConfig(), **BASE)
    write_learned(config, folder, config.learning(batch_size=1))
    assert is_learned(config, folder)


def test_with_another_constant_an_option_decides_as_before(folder):
    config = replace(RunConfig(), **BASE)
    write_learned(config, folder, config.learning(fine_rate=1.0))
    other = replace(config, seed=1)
    assert not is_learned(other, folder, other.learning(fine_rate=1.0))
    other = replace(config, test_size=50)
    assert is_learned(other, folder, other.learning(fine_rate=1.0))


# --- the token itself, and what options name


def test_another_token_decides_evaluation_and_data_set(tmp_path):
    config = replace(RunConfig(), **BASE)
    folder = RunFolder(str(tmp_path), "0001_cat", "default")
    assert evaluation_is_reused(config, config, folder)
    assert dataset_is_reused(config, config, folder)
    other = VECTORS + 1e-6
    assert not is_evaluated(config, folder, other, templates_of(config))
    assert not may_be_added_to(config, folder, other)


def test_a_token_that_is_yet_to_be_learned_is_not_that_of_the_data_set(tmp_path):
    config = replace(RunConfig(), **BASE)
    folder = RunFolder(str(tmp_path), "0001_cat", "default")
    assert dataset_is_reused(config, config, folder)
    assert not may_be_added_to(config, folder, None)


def test_another_text_in_the_same_file_of_prompts_decides_the_evaluation(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("a {token} {class} on a boat\n")
    config = replace(RunConfig(), **BASE, eval_prompts=str(file))
    folder = RunFolder(str(tmp_path), "0001_cat", "default")
    assert evaluation_is_reused(config, config, folder)
    file.write_text("a {token} {class} in a box\n")
    assert not is_evaluated(config, folder, VECTORS, templates_of(config))


@pytest.mark.parametrize("what", ["token", "config"])
def test_without_its_file_or_its_record_no_token_is_taken_over(what, folder):
    config = replace(RunConfig(), **BASE)
    write_learned(config, folder)
    getattr(folder, what).unlink()
    assert not is_learned(config, folder)


@pytest.mark.parametrize("what", ["result", "grid", "eval_images"])
def test_without_its_figures_or_pictures_no_evaluation_is_taken_over(what, folder):
    config = replace(RunConfig(), **BASE)
    assert evaluation_is_reused(config, config, folder)
    path = getattr(folder, what)
    path.rmdir() if path.is_dir() else path.unlink()
    assert not is_evaluated(config, folder, VECTORS, templates_of(config))
