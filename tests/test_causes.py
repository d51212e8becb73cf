"""What an error says is the cause of it, and what it advises can be done."""

import pytest
import torch
from conftest import tiny_tokenizer
from safetensors.torch import save_file
from tiny_folders import edit_json, save_timm

from discriminative import hub
from discriminative.errors import UsageError, WorkError
from discriminative.guides.classifier import finite
from discriminative.precision import advice_on_overflow
from discriminative.tokens.prompts import check_words
from run import main

MINI = ["--model", "miniature", "--device", "cpu"]
TRAIN = ["--class_index", "2", "--train"]


@pytest.fixture
def empty_cache(monkeypatch, tmp_path):
    """A hub that does not answer, and nothing of it on this machine."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    hub.hub_answers.cache_clear()
    yield
    hub.hub_answers.cache_clear()


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--model", "nobody/nothing", "--classifier", "miniature"], "--model: 'nobody/nothing'"),
        ([*MINI, "--classifier", "cub", "--dry_run"], "--classifier: 'cub' (vesteinn/vit-mae-cub@"),
        ([*MINI, "--classifier", "hf:nobody/nothing"], "--classifier: 'hf:nobody/nothing'"),
        ([*MINI, "--classifier", "timm:hf-hub:nobody/nothing"], "--classifier: 'timm:hf-hub:nobody/nothing'"),
        ([*MINI, "--evaluate", "--judge", "vit-mae:nobody/nothing"], "--judge: 'vit-mae:nobody/nothing'"),
        ([*MINI, "--tiny_vae", "taesd"], "--tiny_vae: 'madebyollin/taesd'"),
        ([*MINI, "--evaluate", "--clip_model", "nobody/nothing"], "--clip_model: 'nobody/nothing'"),
    ],
    ids=["model", "cub", "hf", "timm", "judge", "tiny-vae", "clip"],
)
def test_without_network_that_is_said_first_and_at_once(
    flags, named, empty_cache, monkeypatch, tmp_path, capsys
):
    """The libraries try for half a minute, and then miss a config.json."""
    waits = []
    monkeypatch.setattr("time.sleep", waits.append)  # between the tries
    assert main([*TRAIN, *flags, "--output_path", str(tmp_path / "r")]) == 2
    assert not [seconds for seconds in waits if seconds >= 1]
    said = capsys.readouterr().err.strip()
    assert said.startswith(f"run.py: error: {named}")
    assert said.count("\n") == 0
    reason = said.removeprefix(f"run.py: error: {named}").partition(": ")[2]
    assert reason.startswith("there is no network and it was never fetched to the cache")
    assert "config.json" not in said


def test_offline_by_choice_is_no_missing_network(empty_cache, monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert main([*MINI, *TRAIN, "--classifier", "hf:nobody/nothing", "--dry_run"]) == 2
    assert ": HF_HUB_OFFLINE is set and it was never fetched" in capsys.readouterr().err


def test_the_hub_is_asked_once_and_not_for_a_folder(empty_cache, monkeypatch, tmp_path):
    """A program around this one, that uses the hub too, is left as it was."""
    from huggingface_hub import constants

    asked = []
    monkeypatch.setattr("huggingface_hub.utils.get_session", lambda: asked.append(1) or NotThere())
    for place, is_offline in ((str(tmp_path), False), ("nobody/nothing", True), ("nobody/else", True)):
        with hub.hub_or_cache(place):
            assert is_offline == constants.HF_HUB_OFFLINE
        assert not constants.HF_HUB_OFFLINE
    assert asked == [1]


def test_a_hub_that_answers_again_is_found(empty_cache, capsys):
    assert main([*MINI, *TRAIN, "--classifier", "hf:nobody/nothing", "--dry_run"]) == 2
    assert hub.hub_answers.cache_info().currsize == 0


class NotThere:
    def head(self, url, timeout):
        raise OSError("Name or service not known")


def test_a_setting_that_is_not_there_is_said_to_be_missing(tmp_path, capsys):
    """A KeyError's own text is the name alone: "could not be loaded: 'num_classes'"."""
    name = save_timm(tmp_path / "c")
    edit_json(tmp_path / "c" / "config.json", pretrained_cfg={}, label_names=None, num_classes=None)
    assert hub.one_line(KeyError("num_classes")) == "there is no 'num_classes'"
    assert main([*MINI, *TRAIN, "--classifier", name, "--output_path", str(tmp_path / "r")]) == 2
    assert capsys.readouterr().err.startswith(f"run.py: error: --classifier: '{name}' could not be loaded: ")


# --- words


@pytest.mark.parametrize(
    ("added", "given", "advised"),
    [
        (["newclas"], "newclas", "newclasa"),
        (["newclas", "newclasa"], "newclas", "newclasb"),
        (["newclas_1"], "bat", "newclasa"),
        ([], "bat", "newclas"),
    ],
)
def test_an_advised_placeholder_is_one_that_is_taken(added, given, advised):
    """ "'newclas' is already a word of the vocabulary; allowed is a new word, such as newclas"."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(added)
    with pytest.raises(UsageError) as error:
        check_words(tokenizer, given, "a", num_vectors=2)
    assert f"--placeholder_token: {given!r} is already a word of the vocabulary" in str(error.value)
    assert str(error.value).endswith(f"such as {advised}")
    check_words(tokenizer, advised, "a", num_vectors=2)


# --- numbers


def test_precision_is_advised_only_where_it_is_half():
    assert advice_on_overflow(torch.float32) == advice_on_overflow(torch.bfloat16)
    assert "--mixed_precision" not in advice_on_overflow(torch.float32)
    assert "--learning_rate" in advice_on_overflow(torch.float32)
    assert "--mixed_precision no or bf16" in advice_on_overflow(torch.float16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_logits_that_are_not_finite_have_the_advice_of_their_precision(dtype):
    with pytest.raises(WorkError) as error:
        finite(torch.full((1, 2), float("nan")), dtype)
    assert str(error.value).endswith(advice_on_overflow(dtype))


def test_steps_that_are_too_large_are_not_blamed_on_the_precision(tmp_path, capsys):
    argv = [*MINI, *TRAIN, "--mixed_precision", "no", "--learning_rate", "1", "--max_token_norm", "0"]
    argv += ["--images_per_update", "1", "--max_epochs", "8", "--preset", "paper"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trainer.set_step_size", lambda settings, optimizer, *_: rate(optimizer, 1e30))
        assert main([*argv, "--output_path", str(tmp_path / "r")]) == 1
    said = capsys.readouterr().err
    assert "try a lower --learning_rate" in said
    assert "--mixed_precision" not in said


def rate(optimizer, value: float) -> None:
    optimizer.param_groups[0]["lr"] = value


# --- tokens


def token_at(output, folder: str, exp_id: str, **said: str) -> None:
    place = output / "pipeline_token" / folder / exp_id
    place.mkdir(parents=True)
    save_file({"newclas": torch.zeros(1, 128)}, place / "learned_embeds.safetensors", said)


def refused(argv: list[str], output, capsys) -> str:
    assert main([*MINI, *argv, "--output_path", str(output)]) == 2
    said = capsys.readouterr().err.strip()
    assert said.count("\n") == 0
    return said


@pytest.mark.parametrize(
    "work", [["--evaluate"], ["--prompt", "a {token}"], ["--export", "a1111"], ["--export_dataset", "3"]]
)
def test_a_token_that_is_missing_is_not_blamed_on_train(work, tmp_path, capsys):
    said = refused(["--class_index", "2", *work], tmp_path, capsys)
    assert said.startswith("run.py: error: there is no token at ")
    assert "learn it with --class_index 2 --train True" in said
    assert "there is no token at" in said
    assert "; there is " not in said


def test_tokens_of_another_model_or_class_in_the_folder_are_named(tmp_path, capsys):
    token_at(tmp_path, "0283_tiger_cat", "default", model="sd1.5", classifier="inet")
    said = refused(["--class_index", "2", "--evaluate"], tmp_path, capsys)
    assert said.endswith("; there is 0283_tiger_cat of --exp_id default --model sd1.5 --classifier inet")


def test_of_the_class_other_experiments_are_named_with_their_models(tmp_path, capsys):
    for exp_id in ("a", "b", "c", "d"):
        token_at(tmp_path, "0002_bat_cricket_bat", exp_id, model="sd1.5")
    token_at(tmp_path, "0283_tiger_cat", "default")
    said = refused(["--class_index", "2", "--evaluate"], tmp_path, capsys)
    assert (
        "there is 0002_bat_cricket_bat of --exp_id a --model sd1.5, 0002_bat_cricket_bat of --exp_id b"
        in said
    )
    assert said.endswith(" and 1 more")
    assert "tiger" not in said
