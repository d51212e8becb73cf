"""What of an earlier run is taken over: which option decides the token, the evaluation, the data set."""

from dataclasses import asdict, fields, replace
from types import SimpleNamespace

import pytest
import torch

from class_token import fingerprint
from config import RunConfig, UsageError
from evaluate import templates_of
from generate import FORMAT, RECORD, check_dataset, options_of
from outputs import RunFolder, write_json
from provenance import evaluation_options, is_evaluated, is_learned

VECTORS = torch.ones(1, 4)


# --- the three predicates: was what is on disk made with ``then`` good for ``now``?


def token_is_reused(then: RunConfig, now: RunConfig, folder: RunFolder) -> bool:
    """Whether a token that was learned with some options passes for one learned with others."""
    folder.records.mkdir(parents=True)
    folder.token.touch()
    write_json(folder.config, {"config": asdict(then)})
    return is_learned(now, folder)


def evaluation_is_reused(then: RunConfig, now: RunConfig, folder: RunFolder) -> bool:
    """Whether an evaluation passes for one with other options; the token is the same."""
    folder.eval_images.mkdir(parents=True)
    folder.grid.touch()
    prompts = [{"template": template} for template in templates_of(then)]
    said = {"token": fingerprint(VECTORS), "options": evaluation_options(then), "prompts": prompts}
    write_json(folder.result, said)
    return is_evaluated(SimpleNamespace(folder=folder, saved=VECTORS, config=now))


def dataset_is_reused(then: RunConfig, now: RunConfig, folder: RunFolder) -> bool:
    """Whether a data set is added to with other options; the token is the same."""
    write_json(folder.dataset / RECORD, {"format": FORMAT, "token": fingerprint(VECTORS)} | options_of(then))
    try:
        check_dataset(now, folder, VECTORS)
    except UsageError:
        return False
    return True


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
    "prompts_file": ("prompts.txt", ""),
    "num_images": (9, ""),
    "export_dataset": (5, ""),
    "keep": ("correct", "dataset"),
    "report": (True, ""),
    "report_to": ("wandb", ""),
    "list_classes": (True, ""),
    "dry_run": (True, ""),
    "model": ("sd1.5", "token evaluation dataset"),
    "revision": ("fp16", "token evaluation dataset"),
    "scheduler": ("ddim", "evaluation dataset"),
    "classifier": ("cub", "token evaluation dataset"),
    "judge": ("none", "evaluation dataset"),
    "cache_dir": ("cache", ""),
    "local_files_only": (True, ""),
    "device": ("cpu", ""),
    "mixed_precision": ("no", "token evaluation dataset"),
    "memory": ("8gb", ""),
    "batch_size": (2, ""),
    "decode_batch_size": (2, ""),
    "eval_batch_size": (2, ""),
    "gradient_checkpointing": (True, ""),
    "tiny_vae": ("taesd", "token"),
    "compile": (True, ""),
    "placeholder_token": ("otherword", "token evaluation dataset"),
    "num_vectors": (2, "token"),
    # The baseline's prompt has it; a data set's images have the token alone.
    "initializer_token": ("pet", "token evaluation"),
    "start": ("class", "token"),
    "prompt_name": ("kitty", "token evaluation dataset"),
    # The evaluation has training's first prompt, however many there are.
    "num_templates": (2, "token dataset"),
    # Training has a sampler of its own: see below for where it has not.
    "num_inference_steps": (50, "evaluation dataset"),
    "guidance_scale": (5.0, "token evaluation dataset"),
    "guidance_interval": ("0.1,0.8", "token evaluation dataset"),
    "training_scheduler": ("ddim", "token"),
    "training_steps": (20, "token"),
    "height": (256, "token evaluation dataset"),
    "width": (256, "token evaluation dataset"),
    "gradient_mode": ("skip", "token"),
    "gradient_steps": (2, "token"),
    "jump_at": ("0.13", "token"),
    "attempt_patience": (5, "token"),
    "normalize_steps": (True, "token"),
    "learning_rate": (0.001, "token"),
    "relative_rate": (0.1, "token"),
    "fine_rate": (0.2, "token"),
    "adam_beta1": (0.8, "token"),
    "adam_beta2": (0.99, "token"),
    "adam_epsilon": (1e-6, "token"),
    "weight_decay": (0.0, "token"),
    "max_grad_norm": (0.0, "token"),
    "max_token_norm": (0.0, "token"),
    "token_ema": (0.5, "token"),
    "images_per_update": (2, "token"),
    # Evaluations and data sets have seeds of their own.
    "seed": (1, "token"),
    "reuse_trajectory": (2, "token"),
    "noise_pool": (1, "token"),
    "augment": (True, "token"),
    "max_epochs": (10, "token"),
    "patience": (5, "token"),
    "stop_train_accuracy": (0.7, "token"),
    "stop_validation_accuracy": (0.9, "token"),
    "enough_validation_accuracy": (0.9, "token"),
    "choose_by": ("loss", "token"),
    "validation_size": (6, "token"),
    "confirm_size": (6, "token"),
    "confirm_best": (False, "token"),
    "validation_guidance_end": (0.5, "token"),
    "validation_certainty": (0.0, "token"),
    "validate_every": (5, "token"),
    "test_size": (100, "evaluation"),
    "eval_prompts": (PROMPTS_FILE, "evaluation"),
    "reference_images": ("photos", "evaluation"),
    "clip_model": ("clip", "evaluation"),
    "train_images_every": (0, ""),
    "output_path": ("elsewhere", ""),
    "exp_id": ("other", ""),
    # What is learned is written elsewhere; which vectors a data set's images are of, their fingerprint tells.
    "token_path": ("token.safetensors", "evaluation"),
    "export": ("a1111", ""),
    "save_as_full_pipeline": (True, ""),
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
    assert decided(now, now, tmp_path / "same") == set()


def test_the_table_has_no_option_that_is_gone():
    assert set(TABLE) <= {f.name for f in fields(RunConfig)}


@pytest.mark.parametrize(
    ("without", "name", "value", "decides_token"),
    [
        ({"training_steps": 0}, "num_inference_steps", 50, True),
        ({"training_scheduler": "same"}, "scheduler", "ddim", True),
        ({"training_steps": 0}, "scheduler", "ddim", False),
        ({"training_scheduler": "same"}, "num_inference_steps", 50, False),
    ],
)
def test_sampling_decides_the_token_where_training_has_no_sampler_of_its_own(
    without, name, value, decides_token, tmp_path
):
    then = replace(RunConfig(), **BASE, **without)
    found = decided(then, replace(then, **{name: value}), tmp_path)
    assert found == {"evaluation", "dataset"} | ({"token"} if decides_token else set())


def test_another_token_decides_evaluation_and_data_set(tmp_path):
    config = replace(RunConfig(), **BASE)
    folder = RunFolder(str(tmp_path), "0001_cat", "default")
    assert evaluation_is_reused(config, config, folder)
    assert dataset_is_reused(config, config, folder)
    other = VECTORS + 1e-6
    assert not is_evaluated(SimpleNamespace(folder=folder, saved=other, config=config))
    with pytest.raises(UsageError):
        check_dataset(config, folder, other)


def test_another_text_in_the_same_file_of_prompts_decides_the_evaluation(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("a {token} {class} on a boat\n")
    config = replace(RunConfig(), **BASE, eval_prompts=str(file))
    folder = RunFolder(str(tmp_path), "0001_cat", "default")
    assert evaluation_is_reused(config, config, folder)
    file.write_text("a {token} {class} in a box\n")
    assert not is_evaluated(SimpleNamespace(folder=folder, saved=VECTORS, config=config))
