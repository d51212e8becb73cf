"""Whatever folder the stock pipeline draws with: its images are the same here, bit for bit, or one line
names the field that it is refused for."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from short_runs import small_validations
from tiny_folders import edit_json, only_in_half, save_sd1, save_timm

from discriminative.diffusion.inspect import check_parts, check_sampling, read_configs, walked
from discriminative.diffusion.models import load_models
from discriminative.diffusion.schedulers import SCHEDULERS, TRAINING_SPACING
from discriminative.settings import SamplerSettings
from discriminative.tokens.class_token import ClassToken
from run import main

CPU = torch.device("cpu")
STEPS = 4
GUIDANCE = 3.0
GONE = object()  # as a value: the field is taken away
PNDM, DDIM, EULER, DPM = SCHEDULERS.values()
FILES = {"scheduler": "scheduler_config.json", "tokenizer": "tokenizer_config.json"}
SHORT = ["--device", "cpu", "--training_sampler", "dpmsolver++@3", "--max_epochs", "1", "--test_size", "2"]
SHORT += ["--num_inference_steps", "4", "--images_per_update", "2", "--num_images", "1"]


@pytest.fixture(autouse=True, scope="module")
def small():
    with small_validations(1):
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder that nothing is wrong with, and a classifier."""
    root = tmp_path_factory.mktemp("base")
    return save_sd1(root / "sd1"), save_timm(root / "timm")


@pytest.fixture
def model(base, tmp_path):
    """A copy of the folder with other values: ``model(part, field=value)``."""

    def changed(part: str, **values) -> str:
        folder = tmp_path / "model"
        shutil.copytree(base[0], folder)
        path = folder / part / FILES.get(part, "config.json")
        config = json.loads(path.read_text()) | values
        path.write_text(json.dumps({key: value for key, value in config.items() if value is not GONE}))
        if part == "scheduler" and "_class_name" in values:
            edit_json(folder / "model_index.json", scheduler=["diffusers", values["_class_name"]])
        return str(folder)

    return changed


def ours(folder: str, prompt: str, height=None, width=None) -> torch.Tensor:
    """One image (1, 3, H, W), of a model that the plan's checks have seen."""
    configs = read_configs(folder)
    check_parts(configs)
    check_sampling(configs, height, width, [("num_inference_steps", STEPS)])
    walked(configs, STEPS)
    walked(configs, STEPS, "dpmsolver++", TRAINING_SPACING)
    token = ClassToken(load_models(folder, CPU, torch.float32), "newclas", "a")
    return token.sample([prompt], [5], SamplerSettings(STEPS, GUIDANCE, height=height, width=width))


def stock(folder: str, prompt: str, **settings) -> torch.Tensor:
    """The same image by diffusers."""
    from diffusers import StableDiffusionPipeline

    loading = {name: settings.pop(name) for name in ("variant",) if name in settings}
    pipeline = StableDiffusionPipeline.from_pretrained(
        folder, safety_checker=None, torch_dtype=torch.float32, **loading
    )
    pipeline.set_progress_bar_config(disable=True)
    settings |= {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "output_type": "pt"}
    return pipeline(prompt, generator=torch.Generator().manual_seed(5), **settings).images


def refused(argv: list[str], capsys) -> str:
    """The one line of a run that is refused before the work."""
    assert main(argv) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    lines = [line for line in lines if line.startswith("run.py: ")]
    assert len(lines) == 1
    return lines[0]


BETAS = torch.linspace(0.001, 0.02, 1000).tolist()

# Part, and fields that the stock pipeline reads.
DRAWN = [
    ("unet", {"sample_size": [8, 12]}),
    ("unet", {"sample_size": 8, "_diffusers_version": "0.6.0"}),  # diffusers takes 64
    ("unet", {"sample_size": [8, 8], "_diffusers_version": "0.6.0"}),  # ... and here does not
    ("unet", {"cross_attention_dim": [16, 16], "flip_sin_to_cos": False, "center_input_sample": True}),
    ("unet", {"in_channels": GONE, "out_channels": GONE, "conv_in_kernel": GONE, "class_embed_type": GONE}),
    ("vae", {"scaling_factor": GONE, "latent_channels": GONE, "out_channels": GONE}),
    ("vae", {"scaling_factor": 0.4, "shift_factor": 0.3, "latents_mean": [1] * 4, "force_upcast": False}),
    ("text_encoder", {"hidden_act": "gelu", "dtype": "float16", "attention_dropout": 0.5}),
    ("text_encoder", {"eos_token_id": 2, "bos_token_id": 0, "pad_token_id": 1, "projection_dim": 3}),
    ("tokenizer", {"pad_token": "a", "model_max_length": 12}),
    ("tokenizer", {"padding_side": "left"}),
    ("scheduler", {"steps_offset": 0}),
    ("scheduler", {"skip_prk_steps": False}),
    ("scheduler", {"set_alpha_to_one": True, "timestep_spacing": "trailing"}),
    ("scheduler", {"timestep_spacing": GONE, "prediction_type": GONE, "skip_prk_steps": GONE}),
    ("scheduler", {"trained_betas": BETAS, "timestep_spacing": "linspace"}),
    ("scheduler", {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"}),
    ("scheduler", {"beta_schedule": GONE, "beta_start": GONE, "num_train_timesteps": 500}),
    ("scheduler", {"_class_name": DDIM, "clip_sample": True, "set_alpha_to_one": False}),
    ("scheduler", {"_class_name": DDIM, "clip_sample": GONE}),
    (
        "scheduler",
        {
            "_class_name": DDIM,
            "rescale_betas_zero_snr": True,
            "prediction_type": "v_prediction",
            "timestep_spacing": "trailing",
        },
    ),
    ("scheduler", {"_class_name": EULER, "use_karras_sigmas": True}),
    ("scheduler", {"_class_name": EULER, "use_exponential_sigmas": True, "final_sigmas_type": "sigma_min"}),
    ("scheduler", {"_class_name": EULER, "use_beta_sigmas": True, "steps_offset": 0}),
    (
        "scheduler",
        {"_class_name": EULER, "timestep_type": "continuous", "prediction_type": "v_prediction"}
        | {"use_karras_sigmas": True, "sigma_min": 0.002, "sigma_max": 80.0},
    ),
    ("scheduler", {"_class_name": EULER, "interpolation_type": "log_linear"}),
    ("scheduler", {"_class_name": DPM, "solver_type": "heun", "lower_order_final": False}),
    ("scheduler", {"_class_name": DPM, "algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}),
    ("scheduler", {"_class_name": DPM, "euler_at_final": True, "use_lu_lambdas": True}),
    ("scheduler", {"_class_name": DPM, "solver_order": 3, "lambda_min_clipped": -5.1}),
]


def name_of(case) -> str | None:
    if isinstance(case, dict):
        return " ".join(f"{key}={'-' if value is GONE else str(value)[:20]}" for key, value in case.items())
    return None


@pytest.mark.parametrize(("part", "values"), DRAWN, ids=name_of)
def test_what_the_stock_pipeline_reads_is_read(part, values, model):
    folder = model(part, **values)
    assert torch.equal(ours(folder, "a photo of cat"), stock(folder, "a photo of cat"))


@pytest.mark.parametrize(("part", "values"), [DRAWN[0], DRAWN[-10], DRAWN[-6], DRAWN[-3]], ids=name_of)
def test_a_token_is_learned_whatever_the_folder_is_drawn_with(part, values, model, base, tmp_path):
    argv = [*SHORT, "--model", model(part, **values), "--classifier", base[1], "--class_index", "1"]
    assert main([*argv, "--train", "--output_path", str(tmp_path / "r")]) == 0


@pytest.mark.parametrize("mode", ["jump", "last:2"])
@pytest.mark.parametrize("skips", [True, False])
def test_a_token_is_learned_along_runge_kutta_steps(mode, skips, model, base, tmp_path):
    argv = [
        "--model",
        model("scheduler", skip_prk_steps=skips),
        "--classifier",
        base[1],
        "--class_index",
        "1",
    ]
    argv += [*SHORT, "--training_sampler", "same", "--gradient_mode", mode, "--train"]
    assert main([*argv, "--output_path", str(tmp_path / "r")]) == 0


# Part, fields, and what the line says.
REFUSED = [
    ("unet", {"sample_size": None}, "--height: nothing was given, and the UNet of"),
    ("unet", {"sample_size": GONE}, "has no sample_size"),
    (
        "unet",
        {"time_cond_proj_dim": 256},
        "the unet of {model} has time_cond_proj_dim 256, so it is distilled",
    ),
    (
        "unet",
        {"class_embed_type": "timestep"},
        "has class_embed_type 'timestep', so it takes an input beside",
    ),
    ("unet", {"num_class_embeds": 7}, "has num_class_embeds 7, so it takes an input beside"),
    ("unet", {"addition_embed_type": "text_time"}, "has addition_embed_type 'text_time', so it takes"),
    ("unet", {"encoder_hid_dim": 16, "encoder_hid_dim_type": "text_proj"}, "has encoder_hid_dim 16"),
    ("unet", {"encoder_hid_dim_type": "ip_image_proj"}, "has encoder_hid_dim_type 'ip_image_proj'"),
    (
        "unet",
        {"quantization_config": {"load_in_4bit": True}},
        "has quantization_config {'load_in_4bit': True}",
    ),
    ("unet", {"cross_attention_dim": [16, 32]}, "does not take its one text encoder's output, 16 wide"),
    ("vae", {"out_channels": 4}, "the vae of {model} has out_channels 4, so it gives no RGB images"),
    ("vae", {"latent_channels": 16}, "its VAE has 16"),
    ("text_encoder", {"use_attention_mask": True}, "has use_attention_mask True, so it masks the padding"),
    ("text_encoder", {"vocab_size": 20}, "words, its text encoder 20; allowed is the tokenizer"),
    ("tokenizer", {"model_max_length": 77}, "has 77 tokens a prompt (model_max_length), its text encoder 16"),
    ("tokenizer", {"model_max_length": GONE}, "tokens a prompt (model_max_length), its text encoder 16"),
    ("scheduler", {"prediction_type": "sample"}, "predicts 'sample'; allowed is epsilon or v_prediction"),
    ("scheduler", {"timestep_spacing": "uneven"}, "makes no PNDMScheduler of 4 steps: "),
    ("scheduler", {"beta_schedule": "bent"}, "could not be loaded: bent is not implemented"),
    ("scheduler", {"_class_name": DDIM, "thresholding": True}, "has thresholding True, so it clips latents"),
    (
        "scheduler",
        {"_class_name": DDIM, "rescale_betas_zero_snr": True},
        "the scheduler of {model} has rescale_betas_zero_snr True, so it divides by a signal of zero",
    ),
    ("scheduler", {"_class_name": DPM, "use_flow_sigmas": True}, "has use_flow_sigmas True"),
    ("scheduler", {"_class_name": DPM, "variance_type": "learned"}, "has variance_type 'learned'"),
    ("scheduler", {"_class_name": DPM, "algorithm_type": "dpmsolver"}, "could not be loaded: "),
    (
        "scheduler",
        {"_class_name": "EDMEulerScheduler"},
        "is a EDMEulerScheduler; allowed is --scheduler pndm or ddim",
    ),
    ("scheduler", {"_class_name": "NoSuchScheduler"}, "has no attribute NoSuchScheduler"),
]


@pytest.mark.parametrize(("part", "values", "said"), REFUSED, ids=name_of)
def test_what_is_not_read_is_refused_by_name(part, values, said, model, base, tmp_path, capsys):
    folder = model(part, **values)
    argv = [*SHORT, "--model", folder, "--classifier", base[1], "--class_index", "1", "--train"]
    line = refused([*argv, "--output_path", str(tmp_path / "r")], capsys)
    assert said.replace("{model}", repr(folder)) in line
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("part", "kind"),
    [
        ("tokenizer", "XLMRobertaTokenizer"),
        ("text_encoder", "CLIPTextModelWithProjection"),
        ("text_encoder", "T5EncoderModel"),
        ("unet", "UNetFlatConditionModel"),
        ("vae", "AutoencoderTiny"),
        ("vae", "AsymmetricAutoencoderKL"),
        ("vae", None),
    ],
)
def test_a_part_of_another_class_is_refused_by_name(part, kind, model, base, tmp_path, capsys):
    folder = model("unet")
    edit_json(tmp_path / "model" / "model_index.json", **{part: ["diffusers", kind]})
    argv = [*SHORT, "--model", folder, "--classifier", base[1], "--class_index", "1", "--train"]
    assert f"the {part} of {folder!r} is a {kind}; allowed is a " in refused(argv, capsys)


def test_a_pipeline_of_other_parts_is_refused_in_python(base):
    from diffusers import AutoencoderTiny, StableDiffusionPipeline

    from apps.session import Session
    from discriminative.errors import UsageError

    pipeline = StableDiffusionPipeline.from_pretrained(base[0], safety_checker=None)
    pipeline.vae = AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8, 8), decoder_block_out_channels=(8,) * 4
    )
    with pytest.raises(UsageError, match="is a AutoencoderTiny; allowed is a AutoencoderKL"):
        Session(pipeline, classifier=base[1]).learn(1)


def test_a_unet_without_a_size_draws_the_size_that_is_given(model):
    folder = model("unet", sample_size=None)
    sides = {"height": 24, "width": 32}
    assert torch.equal(ours(folder, "a bat", **sides), stock(folder, "a bat", **sides))


# Of every scheduler that Stable Diffusion is saved with.
OTHERS = {
    "DDPMScheduler": {},
    "LMSDiscreteScheduler": {},
    "HeunDiscreteScheduler": {},
    "EulerAncestralDiscreteScheduler": {},
    "DPMSolverSinglestepScheduler": {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"},
    "DPMSolverMultistepScheduler": {"algorithm_type": "sde-dpmsolver++"},
    "KDPM2DiscreteScheduler": {},
    "DEISMultistepScheduler": {"algorithm_type": "deis", "solver_type": "logrho"},
    "UniPCMultistepScheduler": {"solver_type": "bh2"},
    "LCMScheduler": {},
}


@pytest.mark.parametrize("kind", OTHERS)
def test_a_scheduler_that_is_refused_is_replaced_as_the_line_says(kind, model, base, capsys):
    values = {"skip_prk_steps": GONE, "set_alpha_to_one": GONE, "_class_name": kind} | OTHERS[kind]
    folder = model("scheduler", **values)
    argv = ["--model", folder, "--classifier", base[1], "--class_index", "1", "--train"]
    assert "allowed is --scheduler pndm or ddim or euler or dpmsolver++ instead" in refused(argv, capsys)
    for choice in SCHEDULERS:
        configs = read_configs(folder, choice)
        check_parts(configs)
        assert len(walked(configs, STEPS).timesteps) >= STEPS
        walked(configs, STEPS, "dpmsolver++", TRAINING_SPACING)


@pytest.mark.parametrize("kind", ["DEISMultistepScheduler", "UniPCMultistepScheduler"])
def test_a_token_is_learned_with_a_scheduler_instead_of_the_models(kind, model, base, tmp_path):
    values = {"_class_name": kind} | OTHERS[kind]
    argv = ["--model", model("scheduler", **values), "--classifier", base[1], "--class_index", "1", "--train"]
    assert main([*SHORT, *argv, "--scheduler", "ddim", "--output_path", str(tmp_path / "r")]) == 0


@pytest.mark.parametrize("choice", [None, "ddim"])
def test_a_scheduler_without_a_noise_schedule_gets_no_advice_that_fails(choice, model, base, capsys):
    folder = model("scheduler")
    kind = "FlowMatchEulerDiscreteScheduler"
    config = {"_class_name": kind, "num_train_timesteps": 1000}
    Path(folder, "scheduler", "scheduler_config.json").write_text(json.dumps(config))
    edit_json(Path(folder, "model_index.json"), scheduler=["diffusers", kind])
    argv = ["--model", folder, "--classifier", base[1], "--class_index", "1", "--train"]
    line = refused([*argv, *(["--scheduler", choice] if choice else [])], capsys)
    said = (
        "FlowMatchEulerDiscreteScheduler has no beta_schedule"
        if choice
        else "allowed is a Stable Diffusion 1 or 2"
    )
    assert said in line


def test_a_tokenizer_of_more_words_than_embeddings_is_refused(model, base, capsys):
    from transformers import CLIPTokenizer

    folder = model("tokenizer")
    tokenizer = CLIPTokenizer.from_pretrained(f"{folder}/tokenizer")
    words = len(tokenizer)
    tokenizer.add_tokens(["zebra", "okapi"])
    tokenizer.save_pretrained(f"{folder}/tokenizer")
    argv = ["--model", folder, "--classifier", base[1], "--class_index", "1", "--train"]
    assert f"has {words + 2} words, its text encoder {words}; allowed is" in refused(argv, capsys)


@pytest.mark.parametrize("parts", [("unet",), ("unet", "vae", "text_encoder")])
def test_weights_in_half_precision_alone_are_taken_and_told(parts, model, base, tmp_path, capsys):
    folder = model("unet")
    only_in_half(folder, parts)
    image = ours(folder, "a blue cat")
    assert capsys.readouterr().out.count("has its weights in half precision only") == len(parts)
    if len(parts) == 3:
        assert torch.equal(image, stock(folder, "a blue cat", variant="fp16"))
    argv = [*SHORT, "--model", folder, "--classifier", base[1], "--class_index", "1", "--train"]
    assert main([*argv, "--output_path", str(tmp_path / "r")]) == 0


def test_weights_that_are_not_there_are_refused(model, base, tmp_path, capsys):
    folder = model("unet")
    (tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    argv = [*SHORT, "--model", folder, "--classifier", base[1], "--class_index", "1", "--train"]
    assert "no file named diffusion_pytorch_model.safetensors" in refused(argv, capsys)
