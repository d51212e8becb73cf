"""The command line, on the bundled miniature: what a user does, and what a user gets wrong."""

import json

import pytest
import torch
from safetensors.torch import load_file

from run import main

MINI = ["--model", "miniature"]
SHORT = ["--num_inference_steps", "4", "--max_epochs", "2", "--validation_size", "2", "--validate_every", "1", "--test_size", "3"]
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
    assert shown["config"]["learning_rate"] > 0
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
    assert "other settings than the token was learned with: guidance_scale 7.0 -> 5.0" in capsys.readouterr().out


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
    assert "try --batch_size 1 and --eval_batch_size 1" in capsys.readouterr().err


TRAIN2 = ["--class_index", "2", "--train", "True"]
BAD = [
    (["--class_index", "2"], "nothing to do: add --train True"),
    ([*MINI, "--class_index", "45", "--train", "True"], "--class_index: 45 was given; allowed is 1 to 44 for the classifier miniature"),
    ([*MINI, "--train", "True"], "--class_index: 0 was given"),
    (["--class_index", "1001", "--train", "True"], "--class_index: 1001 was given; allowed is 1 to 1000 for the classifier inet"),
    (["--class_index", "abc", "--train", "True"], "argument --class_index: invalid int value: 'abc'"),
    ([*MINI, "--class_index", "2", "--train", "maybe"], "argument --train: 'maybe' was given"),
    (["--model", "sd9", *TRAIN2], "--model: 'sd9' was given; allowed is sd1.4, miniature, a hub id"),
    (["--model", "./nowhere", *TRAIN2], "--model: './nowhere' was given"),
    ([*MINI, *TRAIN2, "--classifier", "resnet"], "--classifier: 'resnet' was given; allowed is inet"),
    ([*MINI, *TRAIN2, "--judge", "resnet"], "--judge: 'resnet' was given; allowed is inet"),
    ([*MINI, *TRAIN2, "--placeholder_token", "bat"], "--placeholder_token: 'bat' is already a word of the vocabulary"),
    ([*MINI, *TRAIN2, "--placeholder_token", "ph"], "--placeholder_token: 'ph' is a part of 'photo' in the prompts"),
    ([*MINI, *TRAIN2, "--seed", "99999999999999"], "--seed: 99999999999999 was given; allowed is 0 to 1000000000"),
    ([*MINI, *TRAIN2, "--initializer_token", "zebra"], "--initializer_token: 'zebra' takes"),
    ([*MINI, *TRAIN2, "--prompt", "bat " * 30], "takes 32 tokens; allowed are at most 24"),
    ([*MINI, "--class_index", "2", "--evaluate", "True"], "there is no token at"),
    ([*MINI, *TRAIN2, "--height", "60"], "--height: 60 was given; allowed is a multiple of 16"),
    ([*MINI, *TRAIN2, "--output_path", "README.md/x"], "--output_path: 'README.md/x' was given"),
    ([*MINI, *TRAIN2, "--gradient_steps", "40", "--gradient_mode", "last"], "--gradient_steps: 40 was given; allowed is 1 to 31"),
    ([*MINI, *TRAIN2, "--mixed_precision", "fp16", "--device", "cpu"], "--mixed_precision: 'fp16' was given on the CPU"),
    ([*MINI, *TRAIN2, "--preset", "fast"], "argument --preset: invalid choice: 'fast'"),
]


@pytest.mark.parametrize(("argv", "message"), BAD, ids=[b[1][:48] for b in BAD])
def test_wrong_usage_is_one_line_and_exit_code_2(argv, message, tmp_path, capsys):
    if "--output_path" not in argv:
        argv = [*argv, "--output_path", str(tmp_path / "r")]
    try:
        code = main(argv)
    except SystemExit as stopped:
        code = stopped.code
    said = capsys.readouterr().err.strip().splitlines()
    assert code == 2
    assert len(said) == 1
    assert message in said[0]
    assert not list(tmp_path.rglob("*.*"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_where_there_is_none_is_refused(capsys):
    assert main([*MINI, *TRAIN2, "--device", "cuda"]) == 2
    assert "--device: 'cuda' was given, but this machine has no CUDA device" in capsys.readouterr().err


def test_a_hub_model_without_network_names_the_id_and_a_way_out(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert main([*TRAIN2, "--model", "nobody/no-such-model", "--output_path", str(tmp_path / "r")]) == 2
    said = capsys.readouterr().err
    assert "'nobody/no-such-model' could not be fetched" in said
    assert "--model miniature works" in said


def test_a_model_folder_without_a_vocabulary_is_refused(tmp_path, capsys):
    """transformers 5 makes an empty tokenizer there and says nothing: every word would be unknown."""
    import shutil

    from models import MINIATURE

    shutil.copytree(MINIATURE / "model", tmp_path / "model")
    for name in ("tokenizer.json", "vocab.json", "merges.txt"):
        (tmp_path / "model" / "tokenizer" / name).unlink()
    argv = ["--model", str(tmp_path / "model"), "--classifier", "miniature", *TRAIN2, "--output_path", str(tmp_path / "r")]
    assert main(argv) == 2
    assert "has no vocabulary" in capsys.readouterr().err


def test_the_stock_pipeline_loads_the_token_and_draws_our_image_bit_for_bit(trained):
    from diffusers import StableDiffusionPipeline

    from class_token import ClassToken, read_token
    from models import MINIATURE, load_models
    from sampler import SamplerSettings, draw

    file = records(trained) / "learned_embeds.safetensors"
    pipeline = StableDiffusionPipeline.from_pretrained(MINIATURE / "model")
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_textual_inversion(str(file))
    noise = torch.randn((1, 4, 16, 16), generator=torch.Generator().manual_seed(3))
    prompt = "A photo of newclas bat"
    theirs = pipeline(prompt, num_inference_steps=4, guidance_scale=7.0, latents=noise, output_type="pt").images
    token = ClassToken(load_models("miniature", torch.device("cpu"), torch.float32), "newclas", "a")
    token.load(read_token(file)[1])
    assert torch.equal(draw(token, [prompt], [3], SamplerSettings(num_inference_steps=4, guidance_scale=7.0)), theirs)
