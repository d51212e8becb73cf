"""What a user gets wrong: one line that names the flag, what was given and what is allowed; exit code 2;
nothing written."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_folders import edit_json, save_hf_vit, save_timm, save_tiny_vae

from discriminative.hub import MINIATURE
from run import main

MINI = ["--model", "miniature", "--device", "cpu"]
TRAIN = ["--class_index", "2", "--train", "True"]
EVALUATE = ["--class_index", "2", "--evaluate", "True"]

# Arguments, with {tmp} for a folder that ``broken`` fills, and a part of the line that they lead to.
TABLE = [
    # What to do.
    (["--class_index", "2"], "nothing to do: add --train True"),
    (
        [*MINI, "--class_index", "2", "--train", "maybe"],
        "argument --train: 'maybe' was given; allowed is True, true, 1, False, false or 0",
    ),
    ([*MINI, *TRAIN, "--preset", "fast"], "argument --preset: invalid choice: 'fast'"),
    ([*MINI, *TRAIN, "--no_such_flag", "1"], "--no_such_flag is no option"),
    ([*MINI, *TRAIN, "further"], "unrecognized arguments: further"),
    ([*MINI, *TRAIN, "--num_images", "few"], "argument --num_images: invalid int value: 'few'"),
    # The class.
    ([*MINI, "--train", "True"], "--class_index is required: a class's number or name, several, or all"),
    (
        [*MINI, "--class_index", "0", "--train", "True"],
        "--class_index: 0 was given; allowed is 1 to 44 for the classifier miniature",
    ),
    ([*MINI, "--class_index", "45", "--train", "True"], "--class_index: 45 was given; allowed is 1 to 44"),
    (
        ["--class_index", "0", "--train", "True"],
        "--class_index: 0 was given; allowed is 1 to 1000 for the classifier inet",
    ),
    (["--class_index", "1001", "--train", "True"], "--class_index: 1001 was given; allowed is 1 to 1000"),
    (["--class_index", "-3", "--train", "True"], "--class_index: -3 was given; allowed is 1 to 1000"),
    (
        ["--class_index", "abc", "--train", "True"],
        "--class_index: 'abc' was given, which is no label of the classifier inet; the nearest are",
    ),
    (
        [*MINI, "--class_index", "bat", "--train", "True"],
        "fits 1 (bat, fruit bat), 2 (bat, cricket bat); give the number",
    ),
    # Models.
    (
        ["--model", "sd9", *TRAIN],
        "--model: 'sd9' was given; allowed is sd1.4, sd1.5, sd2.1-base, miniature, a hub id",
    ),
    (["--model", "./nowhere", *TRAIN], "--model: './nowhere' was given"),
    (
        ["--model", "{tmp}/no-unet", *TRAIN],
        "no-unet' has no unet; allowed is a folder in the diffusers layout",
    ),
    (["--model", "{tmp}/no-words", "--classifier", "miniature", *TRAIN], "has no vocabulary"),
    (["--model", "{tmp}/inpainting", "--classifier", "miniature", *TRAIN], "takes 9 channels and gives 4"),
    (
        ["--model", "{tmp}/ancestral", "--classifier", "miniature", *TRAIN],
        "is a EulerAncestralDiscreteScheduler; allowed is --scheduler pndm",
    ),
    (
        ["--model", "{tmp}/sde", "--classifier", "miniature", *TRAIN],
        "of the type sde-dpmsolver++; allowed is --scheduler",
    ),
    (["--model", "{tmp}/truncated", "--classifier", "miniature", *TRAIN], "could not be loaded: "),
    (["--model", "{tmp}/no-weight", "--classifier", "miniature", *TRAIN], "1 weights are missing: "),
    ([*MINI, *TRAIN, "--tiny_vae", "{tmp}/no-unet"], "--tiny_vae: the folder "),
    (
        [*MINI, *TRAIN, "--tiny_vae", "./nowhere"],
        "--tiny_vae: './nowhere' was given; allowed is taesd, a hub id such as owner/name",
    ),
    (
        [*MINI, *TRAIN, "--tiny_vae", "{tmp}/no-unet/vae"],
        "/vae' is a AutoencoderKL; allowed is an AutoencoderTiny of diffusers",
    ),
    (
        [*MINI, *TRAIN, "--tiny_vae", "{tmp}/taesd"],
        "decodes 4 channels to 2 times the size; allowed is 4 and 4 for this model",
    ),
    ([*MINI, *TRAIN, "--scheduler", "heun"], "argument --scheduler: invalid choice: 'heun'"),
    (
        [*MINI, *TRAIN, "--training_sampler", "heun"],
        "--training_sampler: 'heun' was given; allowed is same, pndm, ddim, euler, dpmsolver++, each also",
    ),
    (
        [*MINI, *TRAIN, "--training_sampler", "ddim@1"],
        "--training_sampler: 1 steps were given; allowed is 2 to 999",
    ),
    (
        [*MINI, *TRAIN, "--training_sampler", "ddim@1000"],
        "--training_sampler: 1000 steps were given; allowed is 2 to 999",
    ),
    ([*MINI, *TRAIN, "--training_sampler", "same@-1"], "--training_sampler: 'same@-1' was given; allowed is"),
    ([*MINI, *TRAIN, "--height", "60"], "--height: 60 was given; allowed is a multiple of 16"),
    ([*MINI, *TRAIN, "--width", "60"], "--width: 60 was given; allowed is a multiple of 16"),
    (
        [*MINI, *TRAIN, "--exp_id", "eval"],
        "--exp_id: 'eval' was given; allowed is a short folder name of letters, digits, . _ and -, "
        "other than train, eval, prompt",
    ),
    (
        [*MINI, "--class_index", "all", "--train", "True", "--prompt_name", "x"],
        "--prompt_name: 'x' was given with --class_index all",
    ),
    ([*MINI, *TRAIN, "--output_path", "{tmp}/old"], "summary.csv has other columns than this version writes"),
    (
        [*MINI, *TRAIN, "--output_path", "{tmp}/set", "--export_dataset", "3"],
        "was made with another token or other options; move it",
    ),
    (
        [*MINI, *TRAIN, "--jump_at", "0@1"],
        "--jump_at: 1 steps were given; allowed is 2 to 999 for this model",
    ),
    (
        [*MINI, *TRAIN, "--jump_at", "0.2-0.1"],
        "--jump_at: '0.2-0.1' was given; allowed is a number from 0 to 1",
    ),
    (
        [*MINI, *TRAIN, "--start", "cat+"],
        "--start: 'cat+' was given; allowed is class, vocabulary, initializer",
    ),
    ([*MINI, *TRAIN, "--learning_rate", "-1"], "--learning_rate: -1.0 was given; allowed is above 0"),
    (
        [*MINI, *TRAIN, "--jump_at", "0.1,0.5"],
        "--jump_at: '0.1,0.5' was given; allowed is a number from 0 to 1",
    ),
    ([*MINI, *TRAIN, "--decode_batch_size", "0"], "--decode_batch_size: 0 was given; allowed is 1 or more"),
    (
        [*MINI, *EVALUATE, "--reference_images", "{tmp}/empty"],
        "empty' was given, which holds no picture; allowed is a folder of them",
    ),
    (
        [*MINI, *TRAIN, "--evaluate", "True", "--eval_prompts", "{tmp}/no-prompts.txt"],
        "which holds no prompt; allowed is a text file",
    ),
    (
        [*MINI, *TRAIN, "--prompt", "@{tmp}/nowhere.txt"],
        "nowhere.txt' was given, which cannot be read (",
    ),
    (
        [*MINI, *TRAIN, "--prompt", "@{tmp}/no-prompts.txt"],
        "no-prompts.txt' was given, which holds no prompt; allowed is a text file",
    ),
    (
        [*MINI, *TRAIN, "--prompt", "a {token:unicorn}"],
        "'unicorn' was given, which is no label of the classifier miniature",
    ),
    ([*MINI, *TRAIN, "--prompt", "a {token:4}"], "learn it with --class_index 4 --train True"),
    (
        [*MINI, *TRAIN, "--prompt", "a {token:bat}"],
        "fits 1 (bat, fruit bat), 2 (bat, cricket bat); give the number",
    ),
    (
        [*MINI, *TRAIN, "--evaluate", "True", "--output_path", "{tmp}/old"],
        "summary.csv has other columns than this version writes",
    ),
    (
        [*MINI, "--class_index", "2,40-45", "--train", "True"],
        "--class_index: '40-45' of '2,40-45' was given; allowed is 1 to 44",
    ),
    (
        [*MINI, "--class_index", "7-3", "--train", "True"],
        "--class_index: '7-3' was given; allowed is 1 to 44, the smaller first",
    ),
    (
        [*MINI, "--class_index", "2,3", "--train", "True", "--prompt_name", "x"],
        "--prompt_name: 'x' was given with --class_index 2,3",
    ),
    ([*MINI, "--class_index", "all", "--evaluate", "True"], "'all' was given, but there is no token below"),
    (
        [*MINI, "--class_index", "all", "--evaluate", "True", "--token_path", "x"],
        "--token_path: 'x' was given with --class_index all",
    ),
    (
        [*MINI, *EVALUATE, "--report_to", "tensorboard"],
        "--report_to: 'tensorboard' was given; allowed is none without --train True",
    ),
    (
        [*MINI, *TRAIN, "--clip_model", "x"],
        "--clip_model: 'x' was given; allowed is a value only with --evaluate True",
    ),
    (
        [*MINI, *TRAIN, "--eval_prompts", "{tmp}/no-prompts.txt"],
        "allowed is a value only with --evaluate True",
    ),
    (
        [*MINI, *TRAIN, "--evaluate", "True", "--eval_prompts", "{tmp}/others.txt"],
        "holds '{token:4}', which nothing stands for; allowed in braces are {token} and {class}",
    ),
    (
        [*MINI, "--class_index", "all", "--evaluate", "True", "--reference_images", "miniature/sprites"],
        "--reference_images: 'miniature/sprites' was given with --class_index all",
    ),
    (
        [*MINI, "--class_index", "all", "--evaluate", "True", "--reference_images", "x"],
        "--reference_images: 'x' was given with --class_index all",
    ),
    ([*MINI, *TRAIN, "--report_to", "mlflow"], "argument --report_to: invalid choice: 'mlflow'"),
    ([*MINI, *TRAIN, "--keep", "wrong"], "argument --keep: invalid choice: 'wrong'"),
    ([*MINI, *TRAIN, "--export_dataset", "-1"], "--export_dataset: -1 was given; allowed is 0 to 10000000"),
    ([*MINI, *TRAIN, "--memory", "10gb"], "argument --memory: invalid choice: '10gb'"),
    ([*MINI, *TRAIN, "--noise_pool", "-1"], "--noise_pool: -1 was given; allowed is 0 or more"),
    (
        [*MINI, *TRAIN, "--gradient_mode", "last:40"],
        "--gradient_mode: 'last:40' was given; allowed is 1 to 12 steps",
    ),
    ([*MINI, *TRAIN, "--mixed_precision", "fp16"], "--mixed_precision: 'fp16' was given on the CPU"),
    # Classifiers.
    (
        [*MINI, *TRAIN, "--classifier", "resnet"],
        "--classifier: 'resnet' was given; allowed is inet, cub, inat, miniature",
    ),
    ([*MINI, *TRAIN, "--judge", "resnet"], "--judge: 'resnet' was given; allowed is inet"),
    (
        [*MINI, *TRAIN, "--judge", "miniature"],
        "--judge: 'miniature' was given; allowed is a classifier that does not guide, or none",
    ),
    ([*MINI, *TRAIN, "--classifier", "miniature,miniature"], "allowed is each guide once"),
    (
        [*MINI, *TRAIN, "--classifier", "miniature,inet"],
        "'inet' has no label, or several, for 'bat, cricket bat' of 'miniature'",
    ),
    (
        [*MINI, *TRAIN, "--classifier", "timm:resnet999"],
        "--classifier: 'timm:resnet999' could not be loaded: timm has no model",
    ),
    ([*MINI, *TRAIN, "--classifier", "timm:coatnet_0_224"], "timm has no weights for 'coatnet_0_224'"),
    ([*MINI, *TRAIN, "--classifier", "hf:{tmp}/wrapped"], "it is a timm checkpoint; give timm:hf-hub:"),
    (
        [*MINI, *TRAIN, "--classifier", "timm:test_resnet@{tmp}/token.pt"],
        "token.pt is no safetensors file; nothing else is read",
    ),
    (
        [*MINI, *TRAIN, "--classifier", "timm:{tmp}/short-labels"],
        "head has 4 classes, but its config.json names 1 labels",
    ),
    ([*MINI, *TRAIN, "--classifier", "timm:{tmp}/small-head"], "size mismatch for fc.weight"),
    ([*MINI, *TRAIN, "--classifier", "hf:{tmp}/small-hf-head"], "classifier.weight"),
    ([*MINI, *TRAIN, "--classifier", "hf:{tmp}/no-unet"], "could not be loaded: "),
    ([*MINI, *TRAIN, "--classifier", "python:no_such_module:f"], "No module named 'no_such_module'"),
    # Words and prompts.
    (
        [*MINI, *TRAIN, "--placeholder_token", "bat"],
        "--placeholder_token: 'bat' is already a word of the vocabulary",
    ),
    (
        [*MINI, *TRAIN, "--placeholder_token", "ph"],
        "--placeholder_token: 'ph' is a part of 'photo' in the prompts",
    ),
    ([*MINI, *TRAIN, "--initializer_token", "zebra"], "--initializer_token: 'zebra' takes"),
    ([*MINI, *TRAIN, "--prompt", "bat " * 30], "takes 32 tokens; allowed are at most 24"),
    ([*MINI, *TRAIN, "--num_vectors", "20"], "tokens; allowed are at most 24"),
    ([*MINI, *TRAIN, "--num_vectors", "0"], "--num_vectors: 0 was given; allowed is 1 to 32"),
    (
        [*MINI, *TRAIN, "--exp_id", "eval.partial"],
        "--exp_id: 'eval.partial' was given; allowed is a short folder name of letters, digits, . _ and -, "
        "other than train, eval",
    ),
    ([*MINI, *TRAIN, "--prompt", "a {token:0}"], "{token:0} in a prompt: 0 was given; allowed is 1 to 44"),
    (
        [*MINI, *TRAIN, "--prompt", "a {token:9}", "--placeholder_token", "classtoken9"],
        "--placeholder_token: 'classtoken9' was given, which stands for {token:9}",
    ),
    ([*MINI, *TRAIN, "--seed", "99999999999999"], "--seed: 99999999999999 was given; allowed is 0 to 4000"),
    # Tokens on disk.
    ([*MINI, *EVALUATE], "there is no token at"),
    ([*MINI, *EVALUATE, "--token_path", "{tmp}/none.safetensors"], "--token_path: there is no token at"),
    ([*MINI, *TRAIN, "--token_path", "{tmp}/narrow.safetensors"], "--token_path: "),
    (
        [*MINI, *EVALUATE, "--token_path", "{tmp}/narrow.safetensors"],
        "the token's vector is 16 wide; the text encoder of 'miniature' takes 128",
    ),
    (
        [*MINI, *EVALUATE, "--token_path", "{tmp}/cut.safetensors"],
        "cut.safetensors: not a readable safetensors file",
    ),
    (
        [*MINI, *EVALUATE, "--token_path", "{tmp}/token.pt"],
        "token.pt: is a pickled file, which may run code when it is read",
    ),
    ([*MINI, *EVALUATE, "--token_path", "{tmp}/empty.safetensors"], "holds {'newclas': (0, 128)}"),
    ([*MINI, *EVALUATE, "--token_path", "{tmp}/xl.safetensors"], "a token of a model with two text encoders"),
    ([*MINI, *EVALUATE, "--token_path", "{tmp}/nan.safetensors"], "values that are not finite"),
    # Outputs.
    ([*MINI, *TRAIN, "--output_path", "README.md/x"], "--output_path: 'README.md/x' was given"),
]


def miniature(folder, **changes) -> None:
    """A copy of the miniature with other values in a part's configuration: ``unet={"in_channels": 9}``."""
    shutil.copytree(MINIATURE / "model", folder)
    for part, values in changes.items():
        edit_json(
            folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json"), **values
        )


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """Every damaged thing of the table."""
    tmp = tmp_path_factory.mktemp("broken")
    (tmp / "empty").mkdir()
    (tmp / "no-prompts.txt").write_text("# none\n\n")
    (tmp / "others.txt").write_text("a {token} {class} and a {token:4}\n")
    (tmp / "old").mkdir()
    (tmp / "old" / "summary.csv").write_text("class,accuracy\n")
    miniature(tmp / "no-unet")
    shutil.rmtree(tmp / "no-unet" / "unet")
    (tmp / "set" / "dataset" / "0002_bat_cricket_bat").mkdir(parents=True)
    (tmp / "set" / "dataset" / "0002_bat_cricket_bat" / "dataset.json").write_text(
        '{"token": "x", "keep": "correct"}'
    )
    save_tiny_vae(tmp / "taesd")
    miniature(tmp / "no-words")
    for name in ("tokenizer.json", "vocab.json", "merges.txt"):
        (tmp / "no-words" / "tokenizer" / name).unlink()
    miniature(tmp / "inpainting", unet={"in_channels": 9})
    miniature(tmp / "xl", unet={"addition_embed_type": "text_time"})
    miniature(tmp / "unknown")
    edit_json(tmp / "unknown" / "model_index.json", scheduler=["diffusers", "NoSuchScheduler"])
    schedulers = {"ancestral": {"_class_name": "EulerAncestralDiscreteScheduler"}}
    schedulers |= {"sde": {"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "sde-dpmsolver++"}}
    for name, values in schedulers.items():
        miniature(tmp / name, scheduler=values)
        kind = values["_class_name"]
        edit_json(tmp / name / "model_index.json", scheduler=["diffusers", kind])
    miniature(tmp / "truncated")
    unet = tmp / "truncated" / "unet" / "diffusion_pytorch_model.safetensors"
    unet.write_bytes(unet.read_bytes()[:100_000])

    miniature(tmp / "no-weight")
    text_encoder = tmp / "no-weight" / "text_encoder" / "model.safetensors"
    save_file(
        {k: v for k, v in load_file(text_encoder).items() if "final_layer_norm.bias" not in k},
        text_encoder,
        {"format": "pt"},
    )

    save_timm(tmp / "short-labels")
    edit_json(tmp / "short-labels" / "config.json", label_names=["bat"])
    save_timm(tmp / "small-head")
    edit_json(tmp / "small-head" / "config.json", label_names=["a", "b"], num_classes=2)
    save_hf_vit(tmp / "small-hf-head")
    edit_json(tmp / "small-hf-head" / "config.json", id2label={"0": "a", "1": "b"}, label2id={"a": 0, "b": 1})

    save_timm(tmp / "wrapped")
    edit_json(tmp / "wrapped" / "config.json", model_type="timm_wrapper")

    save_file({"newclas": torch.zeros(0, 128)}, tmp / "empty.safetensors")
    save_file({"newclas": torch.zeros(1, 16)}, tmp / "narrow.safetensors")
    save_file({"newclas": torch.full((1, 128), float("nan"))}, tmp / "nan.safetensors")
    save_file({"clip_l": torch.zeros(1, 128), "clip_g": torch.zeros(1, 128)}, tmp / "xl.safetensors")
    (tmp / "cut.safetensors").write_bytes((tmp / "nan.safetensors").read_bytes()[:200])
    torch.save({"newclas": torch.zeros(1, 128)}, tmp / "token.pt")
    return tmp


@pytest.mark.parametrize(
    ("argv", "message"), TABLE, ids=[f"{' '.join(a for a in row[0] if a not in MINI)[:60]}" for row in TABLE]
)
def test_wrong_usage_is_one_line_exit_code_2_and_no_file(argv, message, broken, tmp_path, capsys):
    argv = [word.replace("{tmp}", str(broken)) for word in argv]
    if "--output_path" not in argv:
        argv = [*argv, "--output_path", str(tmp_path / "r")]
    try:
        code = main(argv)
    except SystemExit as stopped:
        code = stopped.code
    said = [
        line
        for line in capsys.readouterr().err.strip().splitlines()
        if not line.startswith(("Loading", "Writing"))
    ]
    assert code == 2
    assert len(said) == 1
    assert message in said[0]
    assert not list(tmp_path.rglob("*"))


def test_a_data_set_of_another_token_is_in_the_way_of_none_that_is_not_added_to(broken, capsys):
    argv = [*MINI, *TRAIN, "--output_path", str(broken / "set"), "--dry_run"]
    assert main(argv) == 0
    assert main([*argv, "--export_dataset", "3"]) == 2
    assert "was made with another token or other options" in capsys.readouterr().err


def test_a_tracker_that_is_not_installed_is_told_before_anything_is_loaded(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main([*MINI, *TRAIN, "--report_to", "wandb", "--output_path", str(tmp_path / "r")]) == 2
    assert (
        "--report_to: 'wandb' was given; allowed is an installed package: pip install wandb"
        in capsys.readouterr().err
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_where_there_is_none_is_refused(capsys):
    assert main(["--model", "miniature", *TRAIN, "--device", "cuda"]) == 2
    assert "--device: 'cuda' was given, but this machine has no CUDA device" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--model", "nobody/no-such-model"], "'nobody/no-such-model' could not be fetched"),
        (
            ["--model", "miniature", "--tiny_vae", "taesd"],
            "--tiny_vae: 'madebyollin/taesd' could not be fetched",
        ),
        (["--model", "miniature", "--classifier", "inat"], "'inat' (vesteinn/vit-mae-inat21@"),
        (
            ["--model", "miniature", "--classifier", "timm:hf-hub:nobody/nothing"],
            "'timm:hf-hub:nobody/nothing' could not be loaded",
        ),
        (
            ["--model", "miniature", "--classifier", "hf:nobody/nothing"],
            "'hf:nobody/nothing' could not be loaded",
        ),
    ],
    ids=["model", "tiny-vae", "inat", "timm", "hf"],
)
def test_without_network_the_id_and_a_way_out_are_named(flags, named, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))  # nothing in it
    assert main([*TRAIN, *flags, "--output_path", str(tmp_path / "r")]) == 2
    said = capsys.readouterr().err
    assert named in said
    assert "there is no network and it was never fetched" in said
    assert ("--model miniature works" in said) == ("nobody/no-such-model" in flags)
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    "part", ["transformers.CLIPTextConfig.from_pretrained", "diffusers.UNet2DConditionModel.load_config"]
)
def test_a_gated_repository_tells_how_to_log_in(part, monkeypatch, tmp_path, capsys):
    """The libraries wrap the hub's own error in one of theirs."""
    from huggingface_hub.errors import GatedRepoError

    def gated(*args, **kwargs):
        try:
            raise GatedRepoError.__new__(GatedRepoError)
        except GatedRepoError as error:
            raise OSError("You are trying to access a gated repo.") from error

    monkeypatch.setattr("transformers.CLIPTextConfig.from_pretrained", lambda *args, **kwargs: None)
    monkeypatch.setattr(part, gated)
    argv = ["--model", "some/gated-model", "--classifier", "miniature", *TRAIN]
    assert main([*argv, "--output_path", str(tmp_path / "r")]) == 2
    said = capsys.readouterr().err
    assert "'some/gated-model' could not be fetched" in said
    assert "hf auth login" in said


@pytest.mark.parametrize(
    ("status", "code", "advice"),
    [
        (404, "EntryNotFound", "the repository has no such file (of weights only safetensors are read)"),
        (404, "RevisionNotFound", "the repository has no such revision"),
        (404, "RepoNotFound", "there is no such repository, or it is private"),
        (403, "GatedRepo", "accept its licence on its page, then log in with `hf auth login`"),
    ],
)
def test_what_the_hub_answers_is_told_with_what_to_do(status, code, advice, monkeypatch, capsys):
    """The hub's own errors have their reason below an empty line, which would be lost with all lines but the
    first."""
    import huggingface_hub.utils
    from huggingface_hub.utils import hf_raise_for_status

    client = getattr(huggingface_hub.utils, "httpx", None)
    if client is None:
        pytest.skip("huggingface_hub 0 answers with another library")

    def answer(repository, name, **kwargs):
        request = client.Request("GET", f"https://huggingface.co/{repository}/resolve/main/{name}")
        hf_raise_for_status(client.Response(status, headers={"X-Error-Code": code}, request=request))

    monkeypatch.setattr("huggingface_hub.hf_hub_download", answer)
    assert main(["--classifier", "timm:hf-hub:nobody/nothing", "--list_classes", "True"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "nobody/nothing/resolve/main/config.json" in said
    assert advice in said
