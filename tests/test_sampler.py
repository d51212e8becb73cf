"""The gradient is the one that the modes promise: against plain autograd and against finite differences, in float64."""

import copy

import pytest
import torch
from conftest import tiny_models

from class_token import ClassToken
from sampler import GradientPath, SamplerSettings, alpha_bar_at, differentiated_from, draw, draw_noise, predict_clean, sample

SETTINGS = SamplerSettings(num_inference_steps=6, guidance_scale=3.0)
PROMPTS, SEEDS = ["a photo of newclas cat", "a photo of newclas bat"], [3, 4]


@pytest.fixture
def float64_default():
    """transformers 4 makes the causal mask of the default type, in which the least float64 overflows."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(params=["DDIMScheduler", "PNDMScheduler"])
def token64(request, float64_default):
    token = ClassToken(tiny_models(request.param, torch.float64), "newclas", "a")
    token.vector = torch.nn.Parameter(token.vector.double())
    return token


def loss_of(images):
    """Any smooth function of the images will do."""
    weights = torch.linspace(-1, 1, images.numel(), dtype=images.dtype).reshape(images.shape)
    return (weights * images.square()).sum()


def prefix(token, first):
    """Everything before step ``first``, frozen: its latents and the scheduler's state; plus the noise of every step's empty prompt."""
    models = token.models
    scheduler = copy.deepcopy(models.scheduler)
    scheduler.set_timesteps(SETTINGS.num_inference_steps)
    with torch.no_grad():
        latents = draw_noise(SEEDS, models.latent_shape(None, None)).double()
        cond = token.encode(PROMPTS)
        unconds = []
        for i, t in enumerate(scheduler.timesteps):
            if i == first:
                frozen = latents.clone(), copy.deepcopy(scheduler)
            uncond = models.unet(latents, t, token.encode(["", ""])).sample
            unconds.append(uncond)
            noise_pred = uncond + SETTINGS.guidance_scale * (models.unet(latents, t, cond).sample - uncond)
            latents = scheduler.step(noise_pred, t, latents).prev_sample
    return *frozen, unconds


def tail(token, path, latents, scheduler, unconds, first):
    """The loss as a function of the token's vector alone, written without the sampler."""
    models, scheduler = token.models, copy.deepcopy(scheduler)
    cond = token.encode(PROMPTS)
    for i, t in list(enumerate(scheduler.timesteps))[first:]:
        noise_pred = unconds[i] + SETTINGS.guidance_scale * (models.unet(latents, t, cond).sample - unconds[i])
        if path.mode == "jump":
            a = scheduler.alphas_cumprod[t].double()
            latents = (latents - (1 - a).sqrt() * noise_pred) / a.sqrt()
            break
        latents = scheduler.step(noise_pred, t, latents).prev_sample
    images = models.vae.decode(latents / models.vae.config.scaling_factor).sample
    return loss_of((images / 2 + 0.5).clamp(0, 1))


PATHS = [GradientPath("last", 1), GradientPath("last", 3), GradientPath("jump", jump_at=0.0), GradientPath("jump", jump_at=0.4)]


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_gradient_is_that_of_plain_autograd_and_of_finite_differences(token64, path):
    loss_of(draw(token64, PROMPTS, SEEDS, SETTINGS, path)).backward()
    ours = token64.vector.grad.clone()
    assert ours.norm() > 1e-6
    number = 7 if type(token64.models.scheduler).__name__ == "PNDMScheduler" else 6
    first = differentiated_from(path, number)
    frozen = (*prefix(token64, first), first)

    (plain,) = torch.autograd.grad(tail(token64, path, *frozen), token64.vector)
    torch.testing.assert_close(ours, plain, rtol=1e-7, atol=1e-10)

    direction = torch.randn(token64.vector.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    start, values, h = token64.vector.detach().clone(), [], 1e-6
    for sign in (1, -1):
        with torch.no_grad():
            token64.vector.copy_(start + sign * h * direction)
            values.append(tail(token64, path, *frozen).item())
    measured = (values[0] - values[1]) / (2 * h)
    assert measured == pytest.approx((ours * direction).sum().item(), rel=1e-4)


@pytest.mark.parametrize("path", PATHS[:2], ids=str)
def test_images_with_gradient_are_the_images_without(token64, path):
    with_gradient = draw(token64, PROMPTS, SEEDS, SETTINGS, path)
    torch.testing.assert_close(with_gradient.detach(), draw(token64, PROMPTS, SEEDS, SETTINGS), rtol=1e-9, atol=1e-9)


def test_gradient_does_not_reach_the_unconditional_half(token):
    models, calls = token.models, []
    handle = models.unet.register_forward_hook(lambda m, args, out: calls.append((len(args[0]), out.sample.requires_grad)))
    draw(token, PROMPTS, SEEDS, SETTINGS, GradientPath("last", 1))
    handle.remove()
    # PNDM makes 7 steps of 6: six of both halves at once without gradient, then one half without and one with.
    assert calls == [(4, False)] * 6 + [(2, False), (2, True)]


def test_jump_runs_no_step_after_its_own(token):
    calls = []
    handle = token.models.unet.register_forward_hook(lambda m, args, out: calls.append(out.sample.requires_grad))
    draw(token, PROMPTS, SEEDS, SETTINGS, GradientPath("jump", jump_at=0.5))
    handle.remove()
    assert calls == [False] * 4 + [True]


def test_an_image_follows_from_its_own_seed_whatever_stands_beside_it(token):
    alone = draw(token, PROMPTS[:1], SEEDS[:1], SETTINGS)
    beside = draw(token, PROMPTS, SEEDS, SETTINGS)
    torch.testing.assert_close(alone[0], beside[0], rtol=1e-4, atol=1e-5)
    assert torch.equal(draw_noise([7, 8, 9], (4, 2, 2))[1], draw_noise([8], (4, 2, 2))[0])


def test_sampling_leaves_no_state_behind(token):
    first = draw(token, PROMPTS, SEEDS, SETTINGS)
    assert torch.equal(first, draw(token, PROMPTS, SEEDS, SETTINGS))
    assert token.models.scheduler.timesteps is None or len(token.models.scheduler.timesteps) == 1000


def test_without_guidance_only_the_conditional_half_runs(token):
    sizes = []
    handle = token.models.unet.register_forward_hook(lambda m, args, out: sizes.append(len(args[0])))
    draw(token, PROMPTS, SEEDS, SamplerSettings(num_inference_steps=3, guidance_scale=1.0))
    handle.remove()
    assert sizes == [2] * 4


def test_more_gradient_steps_than_there_are_is_an_error(token):
    noise = draw_noise(SEEDS, token.models.latent_shape(None, None))
    with pytest.raises(ValueError, match="8 steps with gradient, but the scheduler's list has 7"):
        sample(token.models, token.encode(PROMPTS), token.unconditional, noise, SETTINGS, GradientPath("last", 8))


ALL = ["PNDMScheduler", "DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"]


@pytest.mark.parametrize("scheduler", ALL)
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_true_prediction_gives_back_the_clean_latents(scheduler, prediction_type):
    """``add_noise`` is diffusers' own idea of how much noise a step has; Euler's steps stand between the training timesteps."""
    scheduler = tiny_models(scheduler).scheduler
    scheduler.set_timesteps(6)
    clean, noise = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).unbind()
    for i in (0, 2, 4):
        t = scheduler.timesteps[i]
        model_input = copy.deepcopy(scheduler).scale_model_input(scheduler.add_noise(clean, noise, t[None]), t)
        a = alpha_bar_at(scheduler, i, torch.float32)
        truth = noise if prediction_type == "epsilon" else a.sqrt() * noise - (1 - a).sqrt() * clean
        torch.testing.assert_close(predict_clean(model_input, truth, a, prediction_type), clean, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("scheduler", ALL)
def test_the_jump_gradient_is_right_with_every_scheduler(scheduler, float64_default):
    token = ClassToken(tiny_models(scheduler, torch.float64), "newclas", "a")
    token.vector = torch.nn.Parameter(token.vector.double())
    path, h = GradientPath("jump", jump_at=0.0), 1e-6
    loss_of(draw(token, PROMPTS, SEEDS, SETTINGS, path)).backward()
    direction = torch.randn(token.vector.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    start, values = token.vector.detach().clone(), []
    for sign in (1, -1):
        with torch.no_grad():
            token.vector.copy_(start + sign * h * direction)
        values.append(loss_of(draw(token, PROMPTS, SEEDS, SETTINGS, path)).item())
    assert (values[0] - values[1]) / (2 * h) == pytest.approx((token.vector.grad * direction).sum().item(), rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_clean_prediction_keeps_the_last_noise_in_half_precision(dtype):
    """Near t = 0 half precision rounds 1 - alpha_bar to nothing."""
    alpha_bar = tiny_models("DDIMScheduler").scheduler.alphas_cumprod[1]
    latents, noise_pred = torch.zeros(1, 4, 2, 2, dtype=dtype), torch.ones(1, 4, 2, 2, dtype=dtype)
    exact = predict_clean(latents.double(), noise_pred.double(), alpha_bar, "epsilon")
    half = predict_clean(latents, noise_pred, alpha_bar, "epsilon")
    assert half.dtype == dtype
    torch.testing.assert_close(half.double(), exact, rtol=1e-2, atol=0)
