"""What version 0.2.0 left on disk: a token, an evaluation and a data set are taken over where today's options
would make the same, and only there."""

import hashlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from earlier_records import DEFAULTS, RECORD_OF_0_2_0, options_of_0_2_0

from apps.earlier import GONE, read_record, upgraded
from apps.provenance import (
    changed_settings,
    dataset_options,
    is_evaluated,
    is_learned,
    read_dataset_record,
)
from config import RunConfig, with_preset
from discriminative.errors import UsageError
from discriminative.records.files import write_json
from discriminative.records.layout import RunFolder
from discriminative.tokens.dataset import check_dataset
from evaluate import templates_of

VECTORS = torch.ones(1, 4)
FINGERPRINT = hashlib.sha256(np.ones((1, 4), np.float32).tobytes()).hexdigest()
TODAY = replace(
    RunConfig(),
    class_index=2,
    train=True,
    evaluate=True,
    model="miniature",
    classifier="miniature",
    judge="miniature-judge",
)


def then(**changes) -> dict:
    """The options that 0.2.0 recorded where ``TODAY`` was asked for, some of them changed."""
    return RECORD_OF_0_2_0["config"] | changes


def write_token(folder: RunFolder, config: dict) -> None:
    """A token of 0.2.0 on disk, as far as it is asked whether it does."""
    folder.records.mkdir(parents=True, exist_ok=True)
    folder.token.touch()
    write_json(folder.config, RECORD_OF_0_2_0 | {"config": config})


# --- the token

# Option of 0.2.0: another value than its default, and whether today's defaults learn another token.
TOKEN_TABLE = {
    "class_index": (3, True),
    "train": (False, False),
    "evaluate": (True, False),
    "prompt": ("a {token}", False),
    "prompts_file": ("prompts.txt", False),
    "num_images": (9, False),
    "export_dataset": (5, False),
    "keep": ("correct", False),
    "report": (True, False),
    "report_to": ("wandb", False),
    "list_classes": (True, False),
    "dry_run": (True, False),
    "model": ("sd1.5", True),
    "revision": ("fp16", True),
    "scheduler": ("ddim", False),  # training had its own
    "classifier": ("inet", True),
    "judge": ("none", False),
    "cache_dir": ("hub", False),
    "local_files_only": (True, False),
    "device": ("cpu", False),
    "mixed_precision": ("no", True),
    "memory": ("8gb", False),
    "batch_size": (1, False),
    "decode_batch_size": (1, False),
    "eval_batch_size": (1, False),
    "gradient_checkpointing": (True, False),
    "tiny_vae": ("taesd", True),
    "compile": (True, False),
    "placeholder_token": ("otherword", True),
    "num_vectors": (2, True),
    "initializer_token": ("pet", True),
    "start": ("class", True),
    "prompt_name": ("kitty", True),
    "num_templates": (1, True),
    "num_inference_steps": (50, False),  # training had its own
    "guidance_scale": (5.0, True),
    "guidance_interval": ("0.1,0.8", True),
    "training_scheduler": ("ddim", True),
    "training_steps": (20, True),
    "height": (256, True),
    "width": (256, True),
    "gradient_mode": ("skip", True),
    "gradient_steps": (3, False),  # jump has none
    "jump_at": ("0.13", True),
    "attempt_patience": (5, True),
    "normalize_steps": (True, True),
    "learning_rate": (0.001, True),
    "relative_rate": (0.1, True),
    "fine_rate": (1.0, True),
    "adam_beta1": (0.8, True),
    "adam_beta2": (0.99, True),
    "adam_epsilon": (1e-6, True),
    "weight_decay": (0.0, True),
    "max_grad_norm": (0.0, True),
    "max_token_norm": (0.0, True),
    "token_ema": (0.5, True),
    "images_per_update": (2, True),
    "seed": (1, True),
    "reuse_trajectory": (2, True),
    "noise_pool": (1, True),
    "augment": (True, True),
    "max_epochs": (10, True),
    "patience": (5, True),
    "stop_train_accuracy": (0.7, True),
    "stop_validation_accuracy": (0.9, True),
    "enough_validation_accuracy": (0.99, True),
    "choose_by": ("loss", True),
    "validation_size": (6, True),
    "confirm_size": (6, True),
    "confirm_best": (False, True),
    "validation_guidance_end": (0.8, True),
    "validation_certainty": (0.0, True),
    "validate_every": (5, True),
    "test_size": (100, False),
    "eval_prompts": ("prompts.txt", False),
    "reference_images": ("photos", False),
    "clip_model": ("clip", False),
    "train_images_every": (5, False),
    "output_path": ("elsewhere", False),
    "exp_id": ("other", False),
    "token_path": ("token.safetensors", False),
    "export": ("a1111", False),
    "save_as_full_pipeline": (True, False),
}


def test_a_token_of_todays_defaults_is_taken_over(folder):
    assert "version" not in RECORD_OF_0_2_0
    write_token(folder, then())
    assert is_learned(TODAY, folder)


def test_the_table_has_every_option_of_0_2_0():
    assert list(TOKEN_TABLE) == list(DEFAULTS)


@pytest.mark.parametrize("name", TOKEN_TABLE)
def test_a_token_is_taken_over_unless_the_table_says_that_another_one_would_be_learned(name, folder):
    value, is_another = TOKEN_TABLE[name]
    assert then()[name] != value
    write_token(folder, then(**{name: value}))
    assert is_learned(TODAY, folder) is not is_another


# Options of 0.2.0, and the same in today's terms.
SAME = [
    ({"training_scheduler": "ddim", "training_steps": 5}, {"training_sampler": "ddim@5"}),
    ({"training_scheduler": "ddim", "training_steps": 0}, {"training_sampler": "ddim"}),
    ({"training_scheduler": "same", "training_steps": 20}, {"training_sampler": "same@20"}),
    ({"training_scheduler": "same", "training_steps": 0}, {"training_sampler": "same"}),
    ({"gradient_mode": "last", "gradient_steps": 3}, {"gradient_mode": "last:3"}),
    ({"gradient_mode": "random", "gradient_steps": 5}, {"gradient_mode": "random:5"}),
    ({"gradient_mode": "lv", "gradient_steps": 4}, {"gradient_mode": "lv:4"}),
    ({"gradient_mode": "last", "gradient_steps": 1}, {"gradient_mode": "last"}),
    ({"gradient_mode": "skip", "gradient_steps": 3}, {"gradient_mode": "skip"}),
    ({"revision": "fp16"}, {"model": "miniature@fp16"}),
    ({"model": "owner/name", "revision": "a1b2c3"}, {"model": "owner/name@a1b2c3"}),
    ({"prompts_file": "prompts.txt"}, {"prompt": "@prompts.txt"}),
    ({"save_as_full_pipeline": True}, {"export": "pipeline"}),
    ({"save_as_full_pipeline": True, "export": "a1111"}, {"export": "a1111,pipeline"}),
    ({"save_as_full_pipeline": False, "export": "a1111"}, {"export": "a1111"}),
]


@pytest.mark.parametrize(("old", "new"), SAME)
def test_merged_options_are_read_in_todays_terms(old, new, folder):
    options = upgraded(then(**old))
    assert {name: options[name] for name in new} == new
    assert not set(options) & set(GONE)
    config = replace(RunConfig(), **options)
    assert config == replace(RunConfig(), **upgraded(then()) | new)
    write_token(folder, then(**old))
    assert is_learned(config, folder)


@pytest.mark.parametrize(("old", "new"), SAME)
def test_reading_a_record_in_todays_terms_leaves_it_alone(old, new):
    before = then(**old)
    config = dict(before)
    upgraded(config)
    assert config == before


@pytest.mark.parametrize(
    ("old", "wrong"),
    [
        ({"training_scheduler": "ddim", "training_steps": 5}, {"training_sampler": "ddim@6"}),
        ({"training_scheduler": "same", "training_steps": 0}, {"training_sampler": "same@30"}),
        ({"gradient_mode": "last", "gradient_steps": 3}, {"gradient_mode": "last"}),
        ({"gradient_mode": "last", "gradient_steps": 1}, {"gradient_mode": "last:3"}),
        ({"revision": "fp16"}, {"model": "miniature@main"}),
    ],
)
def test_merged_options_of_another_value_are_another_token(old, wrong, folder):
    write_token(folder, then(**old))
    assert not is_learned(replace(RunConfig(), **upgraded(then(**old)) | wrong), folder)


def test_where_training_sampled_as_the_evaluation_its_steps_and_scheduler_decide(folder):
    write_token(folder, then(training_scheduler="same", training_steps=0, num_inference_steps=50))
    config = replace(TODAY, training_sampler="same", num_inference_steps=50)
    assert is_learned(config, folder)
    assert not is_learned(replace(config, num_inference_steps=30), folder)
    assert not is_learned(replace(config, scheduler="ddim"), folder)


def test_the_papers_token_of_before_is_learned_anew_unless_one_step_is_asked_for(folder):
    """The preset took the last step alone, the official loop the last two."""
    paper = {
        "gradient_mode": "last",
        "gradient_steps": 1,
        "learning_rate": 0.00025,
        "start": "initializer",
        "max_token_norm": 0.0,
        "noise_pool": 1,
        "training_scheduler": "same",
        "training_steps": 0,
        "choose_by": "loss",
        "patience": 15,
        "stop_train_accuracy": 0.7,
        "max_epochs": 50,
        "exp_id": "paper",
    }
    write_token(folder, then(**paper))
    given = {"class_index": 2, "model": "miniature", "classifier": "miniature"}
    assert is_learned(with_preset("paper", given | {"gradient_mode": "last"}), folder)
    assert not is_learned(with_preset("paper", given), folder)
    assert not is_learned(with_preset("default", given), folder)


def test_constants_that_were_options_are_those_of_a_training_today(folder):
    write_token(folder, then(fine_rate=0.25, validation_size=6))
    assert is_learned(TODAY, folder, TODAY.learning(fine_rate=0.25, validation_size=6))
    assert not is_learned(TODAY, folder, TODAY.learning(fine_rate=0.25))
    _, constants = read_record(RECORD_OF_0_2_0)
    assert constants == RunConfig().learning().constants


@pytest.mark.parametrize("name", ["enough_validation_accuracy", "confirm_best", "validation_certainty"])
def test_an_option_that_is_younger_than_the_token_was_off_when_it_was_learned(name, folder):
    config = then()
    del config[name]
    write_token(folder, config)
    assert not is_learned(TODAY, folder)


def test_a_token_that_is_older_than_a_constant_is_one_that_was_learned_without(folder):
    config = then()
    del config["validation_certainty"]
    write_token(folder, config)
    assert is_learned(TODAY, folder, TODAY.learning(validation_certainty=0.0))


def test_how_a_token_was_drawn_when_it_was_learned_is_told(folder):
    drawing = replace(TODAY, train=False)
    write_token(folder, then())
    assert changed_settings(drawing, folder) == []
    write_token(folder, then(guidance_scale=5.0, num_inference_steps=50))
    assert sorted(changed_settings(drawing, folder)) == [
        "guidance_scale 5.0 -> 7.0",
        "num_inference_steps 50 -> 30",
    ]
    write_token(folder, then(revision="fp16"))
    assert changed_settings(drawing, folder) == ["model miniature@fp16 -> miniature"]


# --- the evaluation

# What ``options`` of an ``evaluation.json`` held in 0.2.0, and another value of each.
EVALUATION_TABLE = {
    "model": "sd1.5",
    "revision": "fp16",
    "classifier": "inet",
    "judge": "none",
    "mixed_precision": "no",
    "scheduler": "ddim",
    "num_inference_steps": 50,
    "guidance_scale": 5.0,
    "guidance_interval": "0.1,0.8",
    "height": 256,
    "width": 256,
    "placeholder_token": "otherword",
    "initializer_token": "pet",
    "prompt_name": "kitty",
    "test_size": 100,
    "eval_prompts": "prompts.txt",
    "reference_images": "photos",
    "clip_model": "clip",
    "token_path": "token.safetensors",
}


def write_evaluation(folder: RunFolder, **changes) -> None:
    """An evaluation of 0.2.0 on disk, as far as it is asked whether it does."""
    assert set(changes) <= set(EVALUATION_TABLE)
    options = {name: then(**changes)[name] for name in EVALUATION_TABLE}
    folder.eval_images.mkdir(parents=True, exist_ok=True)
    folder.grid.touch()
    template = "A photo of {token} {class}"
    said = {"class_index": 2, "token": FINGERPRINT, "options": options, "prompts": [{"template": template}]}
    write_json(folder.result, said)


def evaluation_is_taken_over(config: RunConfig, folder: RunFolder) -> bool:
    return is_evaluated(config, folder, VECTORS, templates_of(replace(config, eval_prompts=None)))


def test_an_evaluation_of_the_same_options_is_taken_over(folder):
    write_evaluation(folder)
    assert evaluation_is_taken_over(TODAY, folder)
    assert not is_evaluated(TODAY, folder, VECTORS + 1e-6, templates_of(TODAY))


@pytest.mark.parametrize("name", EVALUATION_TABLE)
def test_an_evaluation_of_another_option_is_not(name, folder):
    write_evaluation(folder, **{name: EVALUATION_TABLE[name]})
    assert not evaluation_is_taken_over(TODAY, folder)


@pytest.mark.parametrize("name", [n for n in EVALUATION_TABLE if n not in GONE])
def test_an_evaluation_of_an_option_that_is_asked_for_again_is_taken_over(name, folder):
    value = EVALUATION_TABLE[name]
    write_evaluation(folder, **{name: value})
    assert evaluation_is_taken_over(replace(TODAY, **{name: value}), folder)


def test_an_evaluation_of_a_revision_is_that_of_the_model_at_it(folder):
    write_evaluation(folder, revision="fp16")
    assert evaluation_is_taken_over(replace(TODAY, model="miniature@fp16"), folder)


def test_an_evaluation_that_does_not_say_its_options_is_not_taken_over(folder):
    write_evaluation(folder)
    said = {"token": FINGERPRINT, "prompts": [{"template": "A photo of {token} {class}"}]}
    write_json(folder.result, said)
    assert not evaluation_is_taken_over(TODAY, folder)


# --- the data set

# What a ``dataset.json`` held in 0.2.0 beside its format and token, and another value of each.
DATASET_TABLE = {
    "num_inference_steps": 50,
    "guidance_scale": 5.0,
    "height": 256,
    "width": 256,
    "scheduler": "ddim",
    "model": "sd1.5",
    "revision": "fp16",
    "mixed_precision": "no",
    "guidance_interval": "0.1,0.8",
    "classifier": "inet",
    "judge": "none",
    "placeholder_token": "otherword",
    "prompt_name": "kitty",
    "num_templates": 1,
    "keep": "correct",
}


def write_dataset(folder: RunFolder, form: int = 2, **changes) -> None:
    """The record of a data set of 0.2.0."""
    assert set(changes) <= set(DATASET_TABLE)
    options = {name: then(**changes)[name] for name in DATASET_TABLE}
    record = {"format": form, "token": FINGERPRINT, "tiny_vae": False} | options
    write_json(folder.dataset / "dataset.json", record)


def may_be_added_to(config: RunConfig, folder: RunFolder, vectors: torch.Tensor | None = VECTORS) -> bool:
    try:
        check_dataset(folder.dataset, dataset_options(config, vectors), read_dataset_record)
    except UsageError as error:
        assert "was made with another token or other options" in str(error)
        return False
    return True


def test_a_data_set_of_the_same_options_is_added_to(folder):
    write_dataset(folder)
    assert may_be_added_to(TODAY, folder)
    assert not may_be_added_to(TODAY, folder, VECTORS + 1e-6)
    assert not may_be_added_to(TODAY, folder, None)


def test_a_data_set_whose_rows_are_of_another_format_is_not(folder):
    write_dataset(folder, form=1)
    assert not may_be_added_to(TODAY, folder)


@pytest.mark.parametrize("name", DATASET_TABLE)
def test_a_data_set_of_another_option_is_not(name, folder):
    write_dataset(folder, **{name: DATASET_TABLE[name]})
    assert not may_be_added_to(TODAY, folder)


@pytest.mark.parametrize("name", [n for n in DATASET_TABLE if n not in GONE])
def test_a_data_set_of_an_option_that_is_asked_for_again_is_added_to(name, folder):
    value = DATASET_TABLE[name]
    write_dataset(folder, **{name: value})
    assert may_be_added_to(replace(TODAY, **{name: value}), folder)


def test_a_data_set_of_a_revision_is_that_of_the_model_at_it(folder):
    write_dataset(folder, revision="fp16")
    assert may_be_added_to(replace(TODAY, model="miniature@fp16"), folder)


# --- the options' list


def test_every_option_that_went_has_the_value_at_which_it_did_nothing():
    """Those that today's options have are read in their terms; the others are left out at their default."""
    options = upgraded(options_of_0_2_0())
    assert not set(options) & set(GONE)
    assert replace(RunConfig(), **options) == RunConfig()
