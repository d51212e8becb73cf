"""The gradient is the one that each mode promises.

Against plain autograd and against finite differences, in float64.
"""

import copy
import random
from dataclasses import fields, replace

import pytest
import torch
from conftest import tiny_models

from config import RunConfig, with_preset
from discriminative.diffusion.gradients import MODES, cond_gradient, drawn, prediction_shares
from discriminative.diffusion.sampler import decode, draw_noise
from discriminative.settings import (
    GRADIENT_MODES,
    WITH_PLACES,
    GradientPath,
    SamplerSettings,
    Stage,
    parse_gradient_mode,
    parse_stages,
)
from discriminative.tokens.batch import token_gradient
from discriminative.tokens.class_token import ClassToken
from experiments.speed.footprint import LiveBytes

SETTINGS = SamplerSettings(num_inference_steps=6, guidance_scale=3.0)
PROMPTS = ["a photo of newclas cat", "a photo of newclas bat"]
SEEDS = [3, 4]
SCHEDULERS = ["PNDMScheduler", "DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"]
PATHS = [
    GradientPath("last", 1),
    GradientPath("last", 3),
    GradientPath("jump", place=0.0),
    GradientPath("jump", place=0.4),
    GradientPath("jump", place=1.0),
    GradientPath("skip", place=0.2),
    GradientPath("skip", place=0.6),
    GradientPath("skip", place=1.0),
    GradientPath("lv", 2),
]


@pytest.fixture
def float64_default():
    """transformers 4 makes the causal mask of the default type, in which the least float64 overflows."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def token_of(scheduler: str) -> ClassToken:
    token = ClassToken(tiny_models(scheduler, torch.float64), "newclas", "a")
    token.vector = torch.nn.Parameter(token.vector.double())
    return token


@pytest.fixture(params=SCHEDULERS)
def token64(request, float64_default):
    return token_of(request.param)


def losses_of(images):
    """Any smooth function of each image will do."""
    weights = torch.linspace(-1, 1, images[0].numel(), dtype=images.dtype).reshape(images[0].shape)
    return (weights * images.square()).sum((1, 2, 3))


def score(images, chunk):
    assert len(images) == len(range(*chunk.indices(len(SEEDS))))
    return losses_of(images), torch.zeros(len(images), dtype=torch.bool)


def of(token, path, weight=1.0, settings=None):
    return token_gradient(token, PROMPTS, SEEDS, settings or SETTINGS, path, score, weight)


def trajectory(token):
    """Every step, frozen, and how it ends.

    Of a step the latents before it, what the UNet saw, its prediction for the empty prompt, the scheduler
    before it, and the guided prediction.
    """
    models = token.models
    scheduler = copy.deepcopy(models.scheduler)
    scheduler.set_timesteps(SETTINGS.num_inference_steps)
    rows = []
    with torch.no_grad():
        latents = draw_noise(SEEDS, models.latent_shape(None, None)).double() * scheduler.init_noise_sigma
        cond = token.encode(PROMPTS)
        for t in scheduler.timesteps:
            before = copy.deepcopy(scheduler)
            model_input = scheduler.scale_model_input(latents, t)
            uncond = models.unet(model_input, t, token.encode(["", ""])).sample
            cond_pred = models.unet(model_input, t, cond).sample
            noise_pred = uncond + SETTINGS.guidance_scale * (cond_pred - uncond)
            rows.append((latents, model_input, uncond, before, noise_pred))
            latents = scheduler.step(noise_pred, t, latents).prev_sample
    return rows, latents, scheduler


def guided(token, model_input, t, uncond):
    cond_pred = token.models.unet(model_input, t, token.encode(PROMPTS)).sample
    return uncond + SETTINGS.guidance_scale * (cond_pred - uncond)


def place_in(path, number):
    """Index of the path's place in a list of ``number`` timesteps."""
    return round(path.place * (number - 1))


def test_the_noises_of_the_last_step_are_all_different(token, monkeypatch):
    """And none is the one that the image began from.

    torch takes the last 32 bits of a seed, so a far one may be the same.
    """
    used = []
    monkeypatch.setattr(
        "discriminative.diffusion.gradients.draw_noise",
        lambda *args: used.append(draw_noise(*args)) or used[-1],
    )
    of(token, GradientPath("lv", 3))
    assert len({noise.double().sum().item() for noise in used}) == len(used) == 4
    assert torch.equal(used[0], draw_noise(SEEDS, used[0].shape[1:]))


def plain_loss(token, path, frozen):
    """The summed loss as a function of the token's vector alone, written without the code under test."""
    rows, final, done = frozen
    models = token.models
    number = len(rows)
    a_of = [
        1 / (1 + done.sigmas[i].double() ** 2)
        if hasattr(done, "sigmas")
        else done.alphas_cumprod[done.timesteps[i]].double()
        for i in range(number)
    ]
    if path.mode == "last":
        latents = rows[number - path.steps][0]
        scheduler = copy.deepcopy(rows[number - path.steps][3])
        for t in scheduler.timesteps[number - path.steps :]:
            model_input = scheduler.scale_model_input(latents, t)
            # Live: from the second step on its input is.
            uncond = models.unet(model_input, t, token.encode(["", ""])).sample
            latents = scheduler.step(guided(token, model_input, t, uncond), t, latents).prev_sample
        return losses_of(decode(models, latents, SETTINGS)).sum()
    if path.mode == "lv":
        t = done.timesteps[-1]
        a = a_of[-1]
        total = 0.0
        for j in range(path.steps):
            noise = draw_noise(SEEDS, final.shape[1:], j + 1).double()
            x = a.sqrt() * final + (1 - a).sqrt() * noise
            with torch.no_grad():
                uncond = models.unet(x, t, token.encode(["", ""])).sample
            clean = (x - (1 - a).sqrt() * guided(token, x, t, uncond)) / a.sqrt()
            total = total + losses_of(decode(models, clean, SETTINGS)).sum() / path.steps
        return total
    i = place_in(path, number)
    if path.mode == "jump":
        x, uncond = rows[i][1:3]
        noise_pred = guided(token, x, done.timesteps[i], uncond)
        clean = (x - (1 - a_of[i]).sqrt() * noise_pred) / a_of[i].sqrt()
        return losses_of(decode(models, clean, SETTINGS)).sum()
    # skip: the scheduler is run with the chosen prediction live and every latent that the UNet sees frozen
    latents = rows[0][0]
    scheduler = copy.deepcopy(rows[0][3])
    for j, t in enumerate(scheduler.timesteps):
        scheduler.scale_model_input(latents, t)
        noise_pred = guided(token, rows[j][1], t, rows[j][2])
        latents = scheduler.step(noise_pred if i == j else noise_pred.detach(), t, latents).prev_sample
    return losses_of(decode(models, latents, SETTINGS)).sum()


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_decoding_a_few_at_a_time_changes_nothing(float64_default, path):
    token = token_of("PNDMScheduler")
    whole = of(token, path)
    singly = of(token, path, settings=replace(SETTINGS, decode_batch_size=1))
    torch.testing.assert_close(singly.gradient, whole.gradient)
    torch.testing.assert_close(singly.images, whole.images)
    torch.testing.assert_close(singly.losses, whole.losses)
    assert torch.equal(singly.right, whole.right)


@pytest.mark.parametrize("path", [*PATHS, GradientPath("lv", 3)], ids=str)
def test_another_batch_size_changes_no_noise(float64_default, path):
    """Nor, then, the gradient: that of a batch is the sum of its images'."""
    token = token_of("PNDMScheduler")
    singly = [
        token_gradient(token, [prompt], [seed], SETTINGS, path, score, 1.0).gradient
        for prompt, seed in zip(PROMPTS, SEEDS, strict=True)
    ]
    torch.testing.assert_close(of(token, path).gradient, sum(singly), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_the_embeddings_have_the_gradient_that_reaches_the_token(float64_default, path):
    """For those who bring prompts of their own: nothing below knows a token."""
    token = token_of("PNDMScheduler")
    whole = of(token, path)
    cond = token.encode(PROMPTS)  # (B, L, D)
    scored = cond_gradient(token.models, cond, token.unconditional, SEEDS, SETTINGS, path, score, 1.0)
    assert scored.gradient.shape == cond.shape
    (gradient,) = torch.autograd.grad((cond * scored.gradient).sum(), token.vector)
    torch.testing.assert_close(gradient, whole.gradient)
    assert torch.equal(scored.images, whole.images)
    assert torch.equal(scored.losses, whole.losses)
    assert not any(t.requires_grad for t in (scored.images, scored.losses, scored.gradient))


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_gradient_is_that_of_plain_autograd_and_of_finite_differences(token64, path):
    single = hasattr(token64.models.scheduler, "sigmas")  # these compute in float32 inside
    frozen = trajectory(token64)
    ours = of(token64, path).gradient
    assert ours.norm() > 1e-6
    (plain,) = torch.autograd.grad(plain_loss(token64, path, frozen), token64.vector)
    torch.testing.assert_close(ours, plain, rtol=1e-3 if single else 1e-6, atol=1e-5 if single else 1e-9)
    if single:
        return
    direction = torch.randn(
        token64.vector.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    start = token64.vector.detach().clone()
    values = []
    h = 1e-6
    for sign in (1, -1):
        with torch.no_grad():
            token64.vector.copy_(start + sign * h * direction)
            values.append(finite(token64, path, frozen))
    assert (values[0] - values[1]) / (2 * h) == pytest.approx((plain * direction).sum().item(), rel=1e-4)


def finite(token, path, frozen):
    """The loss at the token's present vector; of "skip" only the chosen prediction may follow it."""
    if path.mode != "skip":
        return plain_loss(token, path, frozen).item()
    rows, latents, done = frozen
    shares = prediction_shares(token.models.scheduler, SETTINGS.num_inference_steps)
    i = place_in(path, len(rows))
    # What the prediction was is in the final latents already; the difference enters by its share.
    now = guided(token, rows[i][1], done.timesteps[i], rows[i][2])
    latents = latents + shares[i] * (now - rows[i][4])
    return losses_of(decode(token.models, latents, SETTINGS)).sum().item()


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_shares_of_the_predictions_are_those_of_plain_autograd(scheduler):
    """The scheduler's own steps, differentiated."""
    scheduler = tiny_models(scheduler).scheduler
    shares = prediction_shares(scheduler, 6)
    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(6)
    predictions = torch.randn(
        len(scheduler.timesteps), generator=torch.Generator().manual_seed(0)
    ).requires_grad_()
    latents = torch.ones(())
    for i, t in enumerate(scheduler.timesteps):
        scheduler.scale_model_input(latents, t)
        latents = scheduler.step(predictions[i], t, latents).prev_sample
    latents.backward()
    torch.testing.assert_close(shares, predictions.grad, rtol=1e-3, atol=1e-5)


def test_skip_with_the_last_step_alone_is_the_papers_gradient(token):
    skip = of(token, GradientPath("skip", place=1.0))
    last = of(token, GradientPath("last", 1))
    torch.testing.assert_close(skip.images, last.images)
    torch.testing.assert_close(skip.gradient, last.gradient, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("path", [p for p in PATHS if p.mode in ("last", "skip")], ids=str)
def test_images_of_the_modes_that_finish_are_the_sampled_images(token, path):
    torch.testing.assert_close(
        of(token, path).images, token.sample(PROMPTS, SEEDS, SETTINGS), rtol=1e-4, atol=1e-5
    )


def calls_of(token, path):
    """(batch, with gradient) of each UNet call."""
    calls = []
    handle = token.models.unet.register_forward_hook(
        lambda m, args, out: calls.append((len(args[0]), out.sample.requires_grad))
    )
    of(token, path)
    handle.remove()
    return calls


def test_gradient_does_not_reach_the_unconditional_half(token):
    # PNDM makes 7 steps of 6: six of both halves at once without gradient, then one half without, one with.
    assert calls_of(token, GradientPath("last", 1)) == [(4, False)] * 6 + [(2, False), (2, True)]


def test_jump_runs_no_step_after_its_place(token):
    assert calls_of(token, GradientPath("jump", place=0.5)) == [(4, False)] * 3 + [(2, False), (2, True)]


@pytest.mark.parametrize("place", [0.0, 0.5, 1.0])
def test_skip_costs_one_trajectory_and_one_half_wherever_its_place_is(token, place):
    assert calls_of(token, GradientPath("skip", place=place)) == [(4, False)] * 7 + [(2, True)]


def test_one_graph_is_alive_at_a_time_however_many_noises_and_wherever_the_place_is(token):
    """What the autograd graph keeps is freed before the next noise's is made.

    Counted by the tensors that it saves.
    """
    alive = [0]
    most = [0]

    class Counted:
        def __init__(self, tensor):
            self.tensor = tensor
            alive[0] += 1
            most[0] = max(most[0], alive[0])

        def __del__(self):
            alive[0] -= 1

    def peak(path):
        most[0] = alive[0] = 0
        with torch.autograd.graph.saved_tensors_hooks(Counted, lambda packed: packed.tensor):
            of(token, path)
        return most[0]

    of_jump = [peak(GradientPath("jump", place=place)) for place in (0.5, 0.0, 1.0)]
    of_skip = [peak(GradientPath("skip", place=place)) for place in (0.5, 0.0, 1.0)]
    of_noises = [peak(GradientPath("lv", number)) for number in (1, 3, 6)]
    for peaks in (of_jump, of_skip, of_noises):
        assert max(peaks) <= 1.1 * peaks[0]


def test_memory_hardly_grows_with_the_number_of_last_steps(token):
    """Of several steps the UNet's graph is made again, one step at a time, in the backward pass."""
    peaks = []
    for steps in (1, 2, 5):
        with LiveBytes() as live:
            of(token, GradientPath("last", steps))
        peaks.append(live.peak)
    assert max(peaks) <= 1.1 * peaks[0]


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_weights_of_the_losses_weigh_the_gradient(token, path):
    one = of(token, path)
    tenth = of(token, path, weight=0.1)
    torch.testing.assert_close(tenth.gradient * 10, one.gradient, rtol=1e-3, atol=1e-7)
    assert torch.equal(tenth.losses, one.losses)


def test_of_several_noises_the_losses_are_averaged_and_all_have_to_be_right(token):
    """The images are those of the last noise."""
    found = []

    def of_each_noise(images, chunk):
        found.append((images.detach(), losses_of(images)))
        return found[-1][1], torch.tensor([True, len(found) != 2])

    path = GradientPath("lv", 3)
    scored = token_gradient(token, PROMPTS, SEEDS, SETTINGS, path, of_each_noise, 1.0)
    assert len(found) == 3
    torch.testing.assert_close(scored.losses, torch.stack([losses.detach() for _, losses in found]).mean(0))
    assert torch.equal(scored.images, found[-1][0])
    assert scored.right.tolist() == [True, False]


def test_more_gradient_steps_than_there_are_is_an_error(token):
    with pytest.raises(ValueError, match="8 steps with gradient, but the scheduler's list has 7"):
        of(token, GradientPath("last", 8))


def test_what_is_left_to_chance_is_drawn_once_an_update():
    path = GradientPath("random", 4)
    rng = random.Random(0)
    paths = [drawn(path, rng) for _ in range(200)]
    assert {p.steps for p in paths} == {1, 2, 3, 4}
    assert {p.mode for p in paths} == {"last"}
    for settled in (GradientPath("jump", place=0.2), GradientPath("last", 3), GradientPath("lv", 2)):
        assert drawn(settled, rng) == settled


def test_a_stage_has_one_place_and_may_have_a_trajectory_of_its_own():
    assert parse_stages("0.13") == (Stage(0.13),)
    assert parse_stages("0.13;0.3") == (Stage(0.13), Stage(0.3))
    assert parse_stages("0@8;0.07@15;1") == (Stage(0.0, 8), Stage(0.07, 15), Stage(1.0))


@pytest.mark.parametrize(
    "bad",
    [
        "",
        "1.5",
        "a",
        "nan",
        "-0.1",
        "0.1;",
        "0@",
        "0@0",
        "0@-3",
        "0@8.5",
        "@8",
        "0@8@9",
        "0.1,",
        "0.1,0.5",  # several places together and ranges were allowed once
        "0.3-0.1",
        "0.05-0.3",
        "0.1-0.2-0.3",
        "0.1-0.2,0.3",
    ],
)
def test_what_is_no_stage_is_refused(bad):
    with pytest.raises(ValueError):
        parse_stages(bad)


def test_a_mode_may_have_a_number_of_steps_or_noises():
    assert parse_gradient_mode("last") == GradientPath("last", 1)
    assert parse_gradient_mode("last:5") == GradientPath("last", 5)
    assert parse_gradient_mode("random:4") == GradientPath("random", 4)
    assert parse_gradient_mode("lv:2") == GradientPath("lv", 2)
    assert RunConfig(gradient_mode="last:3").path == GradientPath("last", 3)


@pytest.mark.parametrize(
    "bad", ["", "first", "last:", "last:0", "last:-1", "last:a", "last:1.5", "jump:3", "skip:1"]
)
def test_what_is_no_mode_is_refused(bad):
    with pytest.raises(ValueError):
        parse_gradient_mode(bad)


def test_every_mode_of_the_table_can_be_named():
    (field,) = [f for f in fields(RunConfig) if f.name == "gradient_mode"]
    assert set(GRADIENT_MODES) == set(MODES)
    for mode in MODES:
        assert parse_gradient_mode(mode).mode == mode
        assert field.metadata["check"](mode)
        assert mode in field.metadata["allowed"]
    assert not field.metadata["check"]("first")


def test_only_modes_with_places_have_the_stages_of_jump_at():
    for mode in MODES:
        stages = RunConfig(gradient_mode=mode, jump_at="0@8;0.5").stages
        assert stages == ((Stage(0.0, 8), Stage(0.5)) if mode in WITH_PLACES else (Stage(),))
    assert with_preset("paper", {}).stages == (Stage(),)
