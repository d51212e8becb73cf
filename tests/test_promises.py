"""What the documents promise, as far as it holds: the official loop's gradient, the stock pipeline's
images."""

from dataclasses import replace

import pytest
import torch
from conftest import tiny_models

from config import with_preset
from discriminative.diffusion.models import load_models
from discriminative.diffusion.sampler import draw_noise, guided_noise_pred
from discriminative.diffusion.schedulers import fresh_scheduler
from discriminative.hub import MINIATURE
from discriminative.settings import SamplerSettings
from discriminative.tokens.batch import token_gradient
from discriminative.tokens.class_token import ClassToken
from experiments.speed.reference import GRADIENT_CALLS

CPU = torch.device("cpu")
PROMPTS = ["a photo of newclas cat", "a photo of newclas bat"]
SEEDS = [3, 4]


def paper(steps: int):
    return with_preset("paper", {"num_inference_steps": steps, "class_index": 1, "train": True})


def loss_of(images: torch.Tensor, chunk: slice) -> tuple[torch.Tensor, torch.Tensor]:
    """Any smooth loss (B,) of images (B, 3, H, W); none is right."""
    return images.square().mean((1, 2, 3)), torch.zeros(len(images), dtype=torch.bool)


# --- the paper's preset


def official_gradient(token: ClassToken, settings: SamplerSettings) -> torch.Tensor:
    """The loop as the official code counts: gradient from step ``num_inference_steps - 1`` on."""
    models = token.models
    scheduler = fresh_scheduler(models.scheduler)
    scheduler.set_timesteps(settings.num_inference_steps)
    cond = token.encode(PROMPTS)  # (B, L, D)
    noise = draw_noise(SEEDS, models.latent_shape(None, None))
    latents = noise * scheduler.init_noise_sigma  # (B, C, h, w)
    for i, t in enumerate(scheduler.timesteps):
        with torch.set_grad_enabled(i >= settings.num_inference_steps - 1):
            scale = settings.guidance_scale
            noise_pred = guided_noise_pred(models.unet, latents, t, cond, token.unconditional, scale)
            latents = scheduler.step(noise_pred, t, latents).prev_sample
    images = models.vae.decode(latents / models.vae.config.scaling_factor).sample
    loss = loss_of((images / 2 + 0.5).clamp(0, 1), slice(0, 2))[0].sum()
    return torch.autograd.grad(loss, token.vector)[0]


@pytest.mark.parametrize("steps", [4, 7])
def test_the_papers_gradient_is_that_of_the_official_loop(token, steps):
    """Which differentiates the last two calls of PNDM's list, one longer than asked; the preset took one."""
    settings = paper(steps).learning()
    ours = token_gradient(token, PROMPTS, SEEDS, settings.sampler, settings.path, loss_of, 1.0).gradient
    theirs = official_gradient(token, settings.sampler)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-7)
    one = replace(settings.path, steps=1)
    alone = token_gradient(token, PROMPTS, SEEDS, settings.sampler, one, loss_of, 1.0).gradient
    assert (alone - theirs).abs().max() > 0.01 * theirs.abs().max()


def test_of_the_papers_trajectory_two_of_31_calls_have_gradient():
    settings = paper(30).learning()
    scheduler = fresh_scheduler(tiny_models().scheduler)
    scheduler.set_timesteps(settings.sampler.num_inference_steps)
    assert len(scheduler.timesteps) == 31
    assert settings.path.steps == GRADIENT_CALLS == 2


# --- the stock pipeline's images


@pytest.fixture(scope="module")
def miniature():
    return ClassToken(load_models("miniature", CPU, torch.float32), "newclas", "a")


@pytest.mark.parametrize("size", [1, 3])
def test_images_are_the_stock_pipelines_bit_for_bit_in_a_batch_of_the_same_size(miniature, size):
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(MINIATURE / "model")
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in range(size)]
    settings = {"num_inference_steps": 4, "guidance_scale": 7.0}
    prompts = ["A photo of a bat"] * size
    stock = pipeline(prompts, generator=generators, output_type="pt", **settings).images
    ours = miniature.sample(prompts, list(range(size)), SamplerSettings(**settings))
    assert torch.equal(ours, stock)


def test_in_a_batch_of_another_size_an_image_differs_by_rounding_at_most(miniature):
    settings = SamplerSettings(num_inference_steps=4, guidance_scale=7.0)
    many = miniature.sample(["A photo of a bat"] * 6, list(range(6)), settings)
    for seed in (0, 5):
        alone = miniature.sample(["A photo of a bat"], [seed], settings)[0]
        pixels = [(image * 255).round() for image in (alone, many[seed])]
        assert (pixels[0] - pixels[1]).abs().max() <= 1
