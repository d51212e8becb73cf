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
from classifiers import load_classifier
from config import RunConfig
from discriminative.diffusion import gradients, sampler
from discriminative.diffusion.inspect import SD_1_4
from discriminative.diffusion.memory import choose, room
from discriminative.diffusion.models import load_models
from discriminative.diffusion.sampler import Walk
from discriminative.errors import UsageError, WorkError
from discriminative.guides.classifier import Classifier, Guide
from discriminative.precision import resolve_device, resolve_dtype
from discriminative.records.files import to_pil
from discriminative.seeds import validation_seeds
from discriminative.settings import SamplerSettings
from discriminative.tokens.class_token import ClassToken
from discriminative.tokens.dataset import Dataset
from discriminative.tokens.files import token_tensors, write_web_ui
from discriminative.tokens.objective import OVERFLOWN, Objective
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
    assert "note: 1 of 4 images overflow in half precision" in capsys.readouterr().out
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
