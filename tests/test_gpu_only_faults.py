"""What would show on a graphics card alone: the precision of each part, and a card that others use too."""

import math
from contextlib import contextmanager
from itertools import count

import pytest
import torch
from conftest import learning, tiny_classifier, tiny_models
from safetensors.torch import load_file
from short_runs import small_validations
from tiny_folders import save_sd1, save_timm

from apps.plan import Sources
from apps.work import tell_device
from classifiers import load_classifier
from config import RunConfig
from discriminative.diffusion import gradients, sampler
from discriminative.diffusion.inspect import SD_1_4
from discriminative.diffusion.memory import Batches, choose, room, told_out_of_memory
from discriminative.diffusion.models import load_models
from discriminative.diffusion.sampler import Walk
from discriminative.errors import UsageError, WorkError
from discriminative.guides.classifier import Classifier, Guide
from discriminative.precision import GROWS_AFTER, resolve_device, resolve_dtype, update_scale
from discriminative.records.files import to_pil
from discriminative.seeds import validation_seeds
from discriminative.settings import SamplerSettings
from discriminative.tokens.class_token import ClassToken
from discriminative.tokens.dataset import Dataset
from discriminative.tokens.files import token_tensors, write_web_ui
from discriminative.tokens.objective import OVERFLOWN, Objective
from discriminative.tokens.prompts import check_apart, tokenize
from evaluate import Arm
from run import main

CPU = torch.device("cpu")
CUDA = torch.device("cuda")
HALVES = [torch.float16, torch.bfloat16]
GB = 1e9


# --- precision


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model's folder in float32, and a classifier's."""
    root = tmp_path_factory.mktemp("saved")
    return {"model": save_sd1(root / "sd1"), "classifier": save_timm(root / "timm")}


def precisions(module) -> set[torch.dtype]:
    return {p.dtype for p in module.parameters()}


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
def test_the_text_encoder_is_in_float32_whatever_the_other_parts_are_in(saved, dtype):
    models = load_models(saved["model"], CPU, dtype)
    assert precisions(models.text_encoder) == {torch.float32}
    assert precisions(models.unet) == precisions(models.vae) == {dtype}
    assert models.dtype == dtype


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_the_tokens_vector_and_files_are_in_float32_and_what_the_unet_gets_is_not(saved, tmp_path, dtype):
    token = ClassToken(load_models(saved["model"], CPU, dtype), "newclas", "a", 2)
    assert token.vector.dtype == torch.float32
    token.load(torch.full((2, 16), 1 + 2.0**-20))  # which no half precision holds
    assert token.encode(["a newclas cat"]).dtype == dtype
    write_web_ui(tmp_path / "newclas.safetensors", token, {})
    (written,) = load_file(tmp_path / "newclas.safetensors").values()
    for vectors in (written, token_tensors(token)["newclas"]):
        assert vectors.dtype == torch.float32
        assert (vectors == 1 + 2.0**-20).all()


def test_an_update_in_half_precision_leaves_a_gradient_in_float32(saved):
    models = load_models(saved["model"], CPU, torch.bfloat16)
    token = ClassToken(models, "newclas", "a")
    guide = Guide(load_classifier(saved["classifier"], CPU, torch.bfloat16), 0)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    images, losses, *_ = Objective(learning(), token, [guide], "cat").accumulate(0, scaler)
    assert token.vector.grad.dtype == torch.float32
    assert token.vector.grad.isfinite().all()
    assert token.vector.grad.abs().sum() > 0
    assert losses.dtype == torch.float32
    assert token.sample(["a cat"], [0], SamplerSettings(2, guidance_scale=7.0)).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_classifier_computes_in_half_precision_and_tells_float32(saved, dtype):
    classifier = load_classifier(saved["classifier"], CPU, dtype)
    assert precisions(classifier.model) == {dtype}
    seen = []
    classifier.model.register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    logits, features = classifier.look(torch.rand(2, 3, 40, 40))
    assert seen == [dtype]
    assert (logits.dtype, features.dtype) == (torch.float32, torch.float32)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("scheduler", ["PNDMScheduler", "DDIMScheduler"])
def test_the_noise_of_the_last_step_is_not_rounded_away_in_half_precision(scheduler, dtype):
    """The share of noise is .0017 there: as 1 less a share of signal in half precision it is far off."""
    models = tiny_models(scheduler, dtype)
    token = ClassToken(models, "newclas", "a")
    noise = torch.zeros(1, *models.latent_shape(None, None))
    settings = SamplerSettings(20, guidance_scale=7.0)
    walk = Walk(models, token.encode(["a"]), token.unconditional, noise, settings)
    last = len(walk.timesteps) - 1
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    signal = (1 - betas).cumprod(0)[walk.timesteps[last]].item()
    clean = walk.clean(last, noise.to(dtype), torch.ones_like(noise).to(dtype))
    expected = -(((1 - signal) / signal) ** 0.5)
    assert clean.dtype == dtype
    assert clean.float().mean().item() == pytest.approx(expected, rel=0.01)


def test_further_noises_of_the_last_step_have_the_right_share_in_half_precision(saved, monkeypatch):
    asked = []
    alpha_bar_at = gradients.alpha_bar_at
    noted = lambda scheduler, i, dtype: asked.append(dtype) or alpha_bar_at(scheduler, i, dtype)  # noqa: E731
    monkeypatch.setattr(gradients, "alpha_bar_at", noted)
    token = ClassToken(load_models(saved["model"], CPU, torch.bfloat16), "newclas", "a")
    guide = Guide(load_classifier(saved["classifier"], CPU, torch.bfloat16), 0)
    config = RunConfig(gradient_mode="lv", training_sampler="dpmsolver++@3", images_per_update=1)
    objective = Objective(config.learning(), token, [guide], "cat")
    objective.accumulate(0, torch.amp.GradScaler("cpu", enabled=False))
    assert asked == [torch.float32]


@pytest.mark.parametrize(("dtype", "rounded"), [(torch.float32, False), (torch.float16, True)])
def test_float32_is_not_rounded_in_convolutions(saved, monkeypatch, dtype, rounded):
    """cuDNN's default is TF32, 10 bits."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    load_models(saved["model"], CPU, dtype)
    assert torch.backends.cudnn.allow_tf32 == rounded
    assert not torch.backends.cuda.matmul.allow_tf32


# --- what a card is and what it has


@pytest.fixture
def card(monkeypatch):
    """Make believe that there is a card with so much free and so much in all."""

    def of(free: float, total: float) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (int(free * GB), int(total * GB)))

    return of


def sources_of(**options) -> Sources:
    """The sources of a run of SD 1.4 with one guide, of which a dry run fetches nothing."""
    return Sources(RunConfig(dry_run=True, **options))


def test_no_more_of_a_card_is_taken_than_others_have_left(card):
    card(free=6, total=24)
    assert room(CUDA) == 6 * GB


def test_of_an_empty_card_a_share_is_taken(card):
    card(free=24, total=24)
    assert room(CUDA) == pytest.approx(0.95 * 24 * GB)


@pytest.mark.parametrize(
    ("free", "total", "expected"),
    [
        (79, 80, "max"),
        (9, 80, "12gb"),  # 8.6 are needed for 12gb, 12.1 for 16gb
        (13, 80, "16gb"),
        (2, 80, "8gb"),  # the smallest, where none fits
        (24.9, 25, "24gb"),  # 24.4 are needed for max, and a share of 25 is 23.8
    ],
)
def test_auto_goes_by_what_is_free(card, free, total, expected):
    card(free, total)
    assert choose(SD_1_4, CUDA, torch.float16) == expected
    sources = sources_of()
    assert (sources.device, sources.dtype) == (CUDA, torch.float16)
    assert sources.memory["memory"] == expected


def test_what_the_user_names_is_not_changed_by_what_is_free(card):
    card(free=2, total=80)
    assert sources_of(memory="24gb").memory["memory"] == "24gb"


@pytest.mark.parametrize(
    ("given", "expected"), [("auto", torch.float16), ("no", torch.float32), ("fp16", torch.float16)]
)
def test_auto_is_half_precision_on_a_card(given, expected):
    assert resolve_dtype(given, CUDA) == expected


def test_bf16_is_refused_on_a_card_that_only_imitates_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "an old card")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    assert resolve_dtype("bf16", CUDA) == torch.bfloat16
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    with pytest.raises(UsageError, match="an old card only imitates"):
        resolve_dtype("bf16", CUDA)


def test_a_card_that_is_not_there_is_refused_and_auto_takes_one_that_is(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("auto") == CUDA
    assert resolve_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(UsageError, match="2 CUDA devices"):
        resolve_device("cuda:2")


# --- an image that is not finite


@contextmanager
def overflowing(*which: int):
    """Every classifier's logits are not finite for the images of these numbers, counted over all calls."""
    logits = Classifier.logits
    seen = count()

    def broken(self, images):
        lost = torch.tensor([next(seen) in which for _ in images])
        return logits(self, images).masked_fill(lost.unsqueeze(1), float("nan"))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Classifier, "logits", broken)
        yield


def test_an_image_of_a_validation_that_is_not_finite_is_wrong(token, guides):
    objective = Objective(learning(validation_size=4), token, guides, "cat")
    seeds = validation_seeds(4)
    whole = objective.score_seeds(seeds)
    with overflowing(1):
        rows = objective.score_seeds(seeds)
    assert rows[1][1:] == (OVERFLOWN, False)
    assert [rows[i] for i in (0, 2, 3)] == [whole[i] for i in (0, 2, 3)]
    with overflowing(0, 1, 3), pytest.raises(WorkError, match="3 of 4 images' logits are not finite; try"):
        objective.score_seeds(seeds)


def test_an_update_never_counts_an_image_that_is_not_finite_as_right(token, guides):
    """The most probable of NaNs is the first class, here the one that is asked for."""
    with overflowing(0):
        _, right = Objective(learning(), token, guides, "cat").class_loss(torch.rand(2, 3, 16, 16))
    assert not right[0]


@pytest.mark.parametrize("target", [0, 2])
def test_an_image_of_an_evaluation_that_is_not_finite_is_wrong(target):
    arm = Arm("a cat", [Guide(tiny_classifier(), target)], Guide(tiny_classifier(), target))
    images = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    images[2] = float("nan")
    right = arm.look(images)
    assert not right[2]
    assert not arm.right[2]
    assert arm.shown[2].label == "not finite"
    assert arm.features.shape[0] == 3
    for figures in (arm.figures(None)["guide"], arm.figures(None)["judge"]):
        assert sum(share for _, share in figures["predicted"]) == 0.75
        assert all(math.isfinite(figures[name]) for name in ("probability", "log_probability", "rank"))
    assert to_pil(images[2]).getextrema() == ((0, 0),) * 3


def test_an_evaluation_outlives_an_image_and_says_so(saved, tmp_path, monkeypatch, capsys):
    """Half precision's decoder overflows now and then."""
    decode = sampler.decode
    calls = count()

    def broken(models, latents, settings):
        images = decode(models, latents, settings)
        return images * float("nan") if next(calls) == 1 else images

    argv = ["--model", saved["model"], "--classifier", saved["classifier"], "--class_index", "1"]
    argv += [
        "--device",
        "cpu",
        "--num_inference_steps",
        "3",
        "--output_path",
        str(tmp_path),
        "--test_size",
        "4",
    ]
    argv += ["--max_epochs", "1", "--images_per_update", "2", "--training_sampler", "dpmsolver++@3"]
    with small_validations(1):
        assert main([*argv, "--train"]) == 0
    monkeypatch.setattr(sampler, "decode", broken)
    argv += ["--evaluate", "--decode_batch_size", "1", "--eval_batch_size", "4", "--mixed_precision", "no"]
    assert main(argv) == 0
    assert "note: 1 of 4 images are not finite" in capsys.readouterr().out
    (record,) = tmp_path.glob("pipeline_token/*/default/evaluation.json")
    assert "NaN" not in record.read_text()
    assert (
        len(list(tmp_path.glob("img/*/eval/token_0001_wrong.png")))
        + len(list(tmp_path.glob("img/*/eval/baseline_*.png")))
        >= 4
    )


def test_a_data_set_throws_an_image_away_that_is_not_finite(tmp_path):
    dataset = Dataset(tmp_path / "set", [Guide(tiny_classifier(), 0)], None, {})
    images = torch.rand(3, 3, 16, 16)
    images[1] = float("nan")
    seeds = dataset.next_seeds(3)
    dataset.add(dict.fromkeys(seeds, "a cat"), only_correct=False, images=images, seeds=seeds)
    assert [row["seed"] for row in dataset.rows] == [seeds[0], seeds[2]]
    assert dataset.thrown[0]["guide"] == "wrong"


# --- what CUDA says when it fails


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (
            "CUDA out of memory. Tried to allocate 2.50 GiB.",
            "out of memory on cpu (CUDA out of memory. Tried",
        ),
        (
            "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
            "out of memory on cpu (CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling",
        ),
        ("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate", "out of memory on cpu (CUBLAS_STATUS_ALLOC"),
        (
            "GET was unable to find an engine to execute this computation",
            "cpu failed (GET was unable to find an engine to execute this computation); where its memory is",
        ),
        ("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED", "cpu failed (cuDNN error: CUDNN_STATUS_NOT_SUPPORTED);"),
        ("CUDA error: no kernel image is available\nCUDA kernel errors", "cpu failed (CUDA error: no kernel"),
    ],
)
def test_what_a_card_fails_with_is_told_with_its_cause(said, expected, saved, tmp_path, monkeypatch, capsys):
    def fails(*args, **kwargs):
        raise RuntimeError(said)

    monkeypatch.setattr("apps.session.train", fails)
    argv = ["--model", saved["model"], "--classifier", saved["classifier"], "--class_index", "1", "--train"]
    assert main([*argv, "--device", "cpu", "--output_path", str(tmp_path)]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("run.py: ")]
    assert line.startswith(f"run.py: failed: {expected}")
    assert "--memory 8gb" in line


def test_a_fault_of_the_program_is_no_fault_of_the_card():
    with pytest.raises(RuntimeError, match="mat1 and mat2"), told_out_of_memory(CPU, "advice"):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")


def test_fewer_images_are_tried_where_memory_may_be_short_and_the_cause_is_told(capsys):
    def fails(part):
        if part.stop - part.start > 2:
            raise RuntimeError("GET was unable to find an engine to execute this computation")
        return part.start

    assert Batches(4).over(4, fails) == [0, 2]
    said = "note: 4 images at once fail (GET was unable to find an engine to execute this computation); going"
    assert said in capsys.readouterr().out


def holding(number: int, monkeypatch) -> list[int]:
    """Make believe that so many images fit in memory at once; returns the sizes that are tried."""
    tried = []
    sample = ClassToken.sample

    def full(self, prompts, seeds, settings):
        tried.append(len(seeds))
        if len(seeds) > number:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return sample(self, prompts, seeds, settings)

    monkeypatch.setattr(ClassToken, "sample", full)
    return tried


def test_what_fits_is_found_out_once_a_run(saved, tmp_path, monkeypatch):
    """Not with each prompt, arm, class and batch of a data set."""
    argv = ["--model", saved["model"], "--classifier", saved["classifier"], "--device", "cpu", "--train"]
    argv += ["--num_inference_steps", "2", "--max_epochs", "1", "--training_sampler", "dpmsolver++@3"]
    argv += ["--class_index", "1,2", "--output_path", str(tmp_path), "--eval_batch_size", "4", "--evaluate"]
    argv += [
        "--test_size",
        "8",
        "--prompt",
        "a {token} {class}",
        "--num_images",
        "8",
        "--export_dataset",
        "8",
    ]
    tried = holding(1, monkeypatch)
    with small_validations(4):
        assert main(argv) == 0
    assert [size for size in tried if size > 1] == [4, 2]


def test_an_update_does_not_know_what_fits_without_gradient(token):
    token.models.fits["sample"] = 1
    assert Batches(None, token.models.fits, "update").size is None
    assert Batches(8, token.models.fits, "sample").size == 1
    assert Batches(1, {"sample": 4}, "sample").size == 1


# --- the scale of the loss


def test_a_scale_that_found_its_ceiling_grows_seldom():
    """Else one update in 21 is lost."""
    lost = []
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=GROWS_AFTER)
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    scaler.scale(torch.zeros(()))
    for epoch in range(400):
        parameter.grad = torch.tensor([math.inf if scaler.get_scale() > 2.0**12 else 1.0])
        scaler.unscale_(optimizer)
        if not parameter.grad.isfinite():
            lost.append(epoch)
        scaler.step(optimizer)
        update_scale(scaler, loss_is_finite=True)
    assert len(lost) == 2
    assert lost[1] - lost[0] > 100


def test_an_image_that_overflows_leaves_scale_and_interval():
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=GROWS_AFTER)
    scaler.scale(torch.zeros(()))
    update_scale(scaler, loss_is_finite=False)
    assert (scaler.get_scale(), scaler.get_growth_interval()) == (8.0, GROWS_AFTER)


# --- the token's word in capitals


@pytest.mark.parametrize("word", ["newclas", "Newclas", "NEWCLAS"])
@pytest.mark.parametrize("placeholder", ["newclas", "NewClas"])
def test_every_vector_is_used_however_the_word_is_written(models, word, placeholder):
    token = ClassToken(models, placeholder, "a", 3)
    ids = tokenize(models.tokenizer, [f"a photo of {word} cat"], token.names)[0].tolist()
    assert [i for i in ids if i >= token.first_id] == [token.first_id + i for i in range(3)]


@pytest.mark.parametrize("placeholder", ["photo", "PHO", "Pho"])
def test_a_word_that_is_part_of_another_is_refused_however_it_is_written(placeholder):
    with pytest.raises(UsageError, match="is a part of 'photos'"):
        check_apart(placeholder, ["Photos of a cat"])
    check_apart(placeholder, [f"{placeholder} of a cat"])


# --- a run on the CPU that was not meant to be there

OLD = "The NVIDIA driver on your system is too old (found version 11040)."


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (RuntimeError(OLD), OLD),
        (RuntimeError("Unexpected error from cudaGetDeviceCount(). Error 804"), "Error 804"),
        (RuntimeError("Found no NVIDIA driver on your system."), None),
        (RuntimeError("No CUDA GPUs are available"), None),
        (AssertionError("Torch not compiled with CUDA enabled"), None),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_card_that_torch_cannot_use_is_told(error, told, saved, tmp_path, monkeypatch, capsys):
    def init():
        raise error

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", init)
    tell_device(sources := sources_of(model=saved["model"], classifier=saved["classifier"]))
    said = capsys.readouterr().out
    assert ("note: on the CPU, as torch cannot use the graphics card: " in said) == bool(told)
    assert (told or "") in said
    assert sources.device == CPU
    tell_device(sources_of(model=saved["model"], classifier=saved["classifier"], device="cpu"))
    assert capsys.readouterr().out == ""


def test_stable_diffusion_on_a_cpu_says_what_that_means(saved, capsys):
    tell_device(sources_of(device="cpu"))
    assert "note: on a CPU an update of a model of this size takes minutes" in capsys.readouterr().out
    tell_device(sources_of(device="cpu", model=saved["model"], classifier=saved["classifier"]))
    tell_device(sources_of(device="cpu", model="miniature"))
    assert capsys.readouterr().out == ""
