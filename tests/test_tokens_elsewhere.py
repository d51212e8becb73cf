"""A token in other tools: diffusers' stock pipeline, the web UIs' file, a whole pipeline; and tokens that
come from elsewhere."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from short_runs import small_validations

from discriminative.diffusion.models import load_models
from discriminative.diffusion.schedulers import SCHEDULERS
from discriminative.hub import MINIATURE
from discriminative.settings import SamplerSettings
from discriminative.tokens.class_token import ClassToken
from discriminative.tokens.files import read_token
from run import main

CPU = torch.device("cpu")
MINI = [
    "--model",
    "miniature",
    "--device",
    "cpu",
    "--class_index",
    "2",
    "--num_inference_steps",
    "4",
    "--training_sampler",
    "dpmsolver++@4",
    "--max_epochs",
    "1",
]
QUICK = [*MINI, "--images_per_update", "1", "--test_size", "2"]
PROMPT = "A photo of newclas bat"
NOISE = torch.randn((1, 4, 16, 16), generator=torch.Generator().manual_seed(3))


@pytest.fixture(autouse=True, scope="module")
def small():
    with small_validations(1):
        yield


@pytest.fixture(scope="module", params=[(1, 1), (3, 3), (3, 1)], ids=["one", "three", "three_in_vain"])
def learned(request, tmp_path_factory):
    """A token of one vector, one of three, and one that of three is left where nothing is gained, with
    everything that can be written beside it."""
    out = tmp_path_factory.mktemp("results")
    number, left = request.param
    extra = ["--num_vectors", str(number), "--export", "a1111,pipeline"]
    extra += ["--choose_by", "loss" if number == left else "validation"]  # the loss asks for no gain
    assert main([*QUICK, "--train", "True", "--evaluate", "True", "--output_path", str(out), *extra]) == 0
    (records,) = (out / "pipeline_token").glob("*/default")
    assert len(read_token(records / "learned_embeds.safetensors")[1]) == left
    return records


def ours(records, scheduler=None) -> torch.Tensor:
    """Our own image of the token on disk."""
    vector = read_token(records / "learned_embeds.safetensors")[1]
    models = load_models("miniature", CPU, torch.float32, scheduler_choice=scheduler)
    token = ClassToken(models, "newclas", "a", len(vector))
    token.load(vector)
    return token.sample([PROMPT], [3], SamplerSettings(num_inference_steps=4, guidance_scale=7.0))


def stock(folder):
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def theirs(pipeline) -> torch.Tensor:
    return pipeline(PROMPT, num_inference_steps=4, guidance_scale=7.0, latents=NOISE, output_type="pt").images


@pytest.mark.parametrize("scheduler", [None, *SCHEDULERS])
def test_the_stock_pipeline_loads_the_token_and_draws_our_image_bit_for_bit(learned, scheduler):
    import diffusers

    pipeline = stock(MINIATURE / "model")
    if scheduler:
        kind = getattr(diffusers, SCHEDULERS[scheduler])
        clip = {"clip_sample": False} if scheduler == "ddim" else {}  # its default would clip latents
        pipeline.scheduler = kind.from_config(pipeline.scheduler.config, **clip)
    pipeline.load_textual_inversion(str(learned / "learned_embeds.safetensors"))
    assert torch.equal(ours(learned, scheduler), theirs(pipeline))


def test_the_stock_pipeline_draws_the_evaluations_images(learned):
    pipeline = stock(MINIATURE / "model")
    pipeline.load_textual_inversion(str(learned / "learned_embeds.safetensors"))
    noises = [torch.randn((1, 4, 16, 16), generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    folder = learned.parents[2] / "img" / learned.parent.name / "eval"
    for arm, prompt in (("token", PROMPT), ("baseline", "A photo of a bat")):
        images = pipeline(
            [prompt] * 2,
            num_inference_steps=4,
            guidance_scale=7.0,
            latents=torch.cat(noises),
            output_type="pt",
        ).images
        for path, image in zip(sorted(folder.glob(f"{arm}_*.png")), images, strict=True):
            seen = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)  # (3, 64, 64)
            assert torch.equal(seen, (image * 255).round().byte())


def test_the_file_of_the_web_uis_holds_the_same_vectors_under_their_key(learned):
    path = learned / "a1111" / "newclas.safetensors"  # the file's name is the word in their prompts
    vectors = load_file(learned / "learned_embeds.safetensors")["newclas"]
    tensors = load_file(path)
    assert list(tensors) == ["emb_params"]
    assert torch.equal(tensors["emb_params"], vectors)
    placeholder, read = read_token(path)
    assert placeholder == "newclas"
    assert torch.equal(read, vectors)


def test_the_whole_pipeline_draws_our_image_without_loading_a_token(learned):
    assert torch.equal(ours(learned), theirs(stock(learned / "pipeline")))
    assert not list(learned.glob(".*"))


def test_the_whole_pipeline_has_weights_and_words_in_files_that_every_version_reads(learned):
    """transformers 5 writes names that 4 takes for missing weights, and would draw with a random text
    encoder. And no vocab.json."""
    for folder in (learned / "pipeline", MINIATURE / "model"):
        assert all(
            name.startswith("text_model.")
            for name in load_file(folder / "text_encoder" / "model.safetensors")
        )
    for file in ("vocab.json", "merges.txt"):
        bundled, whole = (
            folder / "tokenizer" / file for folder in (MINIATURE / "model", learned / "pipeline")
        )
        assert whole.read_text().split() == bundled.read_text().split()


def test_the_file_says_where_it_comes_from(learned):
    for path in (learned / "learned_embeds.safetensors", learned / "a1111" / "newclas.safetensors"):
        with safe_open(path, "pt") as file:
            said = file.metadata()
        assert (said["class_index"], said["class_name"], said["prompt_name"]) == (
            "2",
            "bat, cricket bat",
            "bat",
        )
        assert (said["model"], said["classifier"], said["placeholder"]) == (
            "miniature",
            "miniature",
            "newclas",
        )
        assert json.loads(said["hyperparameters"])["num_inference_steps"] == 4
        assert said["version"]
        # Whoever gets the file need not know the owner's folders.
        assert "output_path" not in said["hyperparameters"]


def test_a_token_on_disk_is_exported_without_training(learned, tmp_path):
    path = learned / "learned_embeds.safetensors"
    assert main([*MINI, "--token_path", str(path), "--export", "a1111", "--output_path", str(tmp_path)]) == 0
    (exported,) = tmp_path.rglob("a1111/newclas.safetensors")
    assert torch.equal(load_file(exported)["emb_params"], load_file(path)["newclas"])


@pytest.mark.parametrize("file", ["learned_embeds.safetensors", "a1111/newclas.safetensors"])
def test_a_token_from_elsewhere_is_evaluated_as_if_learned_here(learned, tmp_path, file):
    argv = [*QUICK, "--evaluate", "True", "--output_path", str(tmp_path), "--token_path", str(learned / file)]
    assert main(argv) == 0
    (result,) = tmp_path.rglob("evaluation.json")
    here = json.loads((learned / "evaluation.json").read_text())
    there = json.loads(result.read_text())
    assert there["options"] == here["options"] | {"token_path": str(learned / file)}
    measured = {"seconds": 0, "peak_memory_gb": 0, "options": None, "environment": {}}
    assert there | measured == here | measured | {"token_path": str(learned / file)}


def test_a_token_of_another_classifier_from_elsewhere_is_told(learned, tmp_path, capsys):
    path = learned / "learned_embeds.safetensors"
    argv = [
        *MINI,
        "--classifier",
        "miniature-judge",
        "--token_path",
        str(path),
        "--export",
        "a1111",
        "--output_path",
        str(tmp_path),
    ]
    assert main(argv) == 0
    assert (
        f"--classifier: 'miniature-judge' was given, but {path} was learned with 'miniature'"
        in capsys.readouterr().out
    )


def test_a_token_from_elsewhere_does_not_replace_records_of_one_learned_here(learned, tmp_path, capsys):
    save_file({"other": torch.zeros(1, 128)}, tmp_path / "t.safetensors")
    argv = [
        *QUICK,
        "--evaluate",
        "True",
        "--output_path",
        str(learned.parents[2]),
        "--token_path",
        str(tmp_path / "t.safetensors"),
    ]
    assert main(argv) == 2
    assert "a token of this class and experiment is there; give another --exp_id" in capsys.readouterr().err
    assert main([*argv, "--exp_id", "other"]) == 0
