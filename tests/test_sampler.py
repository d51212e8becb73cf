"""Images from embeddings and noise, each from its own seed, without a trace left behind."""

import copy
from dataclasses import replace

import pytest
import torch
from conftest import tiny_models
from tiny_folders import save_tiny_vae

from discriminative.diffusion.models import load_tiny_vae
from discriminative.diffusion.sampler import (
    Walk,
    alpha_bar_at,
    decode,
    draw_noise,
    predict_clean,
    sample,
)
from discriminative.diffusion.schedulers import SCHEDULERS, TRAINING_SPACING, fresh_scheduler
from discriminative.settings import SAMPLERS, SamplerSettings, parse_sampler
from discriminative.tokens.class_token import ClassToken
from miniature.unet import SCHEDULER

SETTINGS = SamplerSettings(num_inference_steps=6, guidance_scale=3.0)
PROMPTS = ["a photo of newclas cat", "a photo of newclas bat"]
SEEDS = [3, 4]


def test_an_image_follows_from_its_own_seed_whatever_stands_beside_it(token):
    alone = token.sample(PROMPTS[:1], SEEDS[:1], SETTINGS)
    beside = token.sample(PROMPTS, SEEDS, SETTINGS)
    torch.testing.assert_close(alone[0], beside[0], rtol=1e-4, atol=1e-5)
    assert torch.equal(draw_noise([7, 8, 9], (4, 2, 2))[1], draw_noise([8], (4, 2, 2))[0])


def test_sampling_leaves_no_state_behind(token):
    first = token.sample(PROMPTS, SEEDS, SETTINGS)
    assert torch.equal(first, token.sample(PROMPTS, SEEDS, SETTINGS))
    assert token.models.scheduler.timesteps is None or len(token.models.scheduler.timesteps) == 1000


@pytest.mark.parametrize("named", ["leading", None, "trailing"])
def test_training_stands_at_the_same_timesteps_whether_or_not_the_model_names_their_spacing(token, named):
    """Stable Diffusion 1.4's configuration names none; one that diffusers has saved again names all.

    A model's own choice stands.
    """
    import diffusers

    config = {k: v for k, v in SCHEDULER.items() if k != "timestep_spacing"} | (
        {"timestep_spacing": named} if named else {}
    )
    token.models.scheduler = diffusers.PNDMScheduler.from_config(config)
    noise = draw_noise(SEEDS, token.models.latent_shape(None, None))

    def first(**settings):
        settings = SamplerSettings(8, 7.0, **settings)
        walk = Walk(token.models, token.encode(PROMPTS), token.unconditional, noise, settings)
        return walk.timesteps[0].item()

    assert first(scheduler="dpmsolver++") == (999 if named == "trailing" else 889)
    assert first() == (999 if named == "trailing" else 876)
    # --scheduler is diffusers' own way from one kind to another.
    stock = diffusers.DPMSolverMultistepScheduler.from_config(token.models.scheduler.config)
    chosen = token.models.scheduler = fresh_scheduler(token.models.scheduler, "dpmsolver++")
    assert chosen.config.timestep_spacing == stock.config.timestep_spacing
    assert first(scheduler="dpmsolver++") == (999 if named == "trailing" else 889)


def test_without_guidance_only_the_conditional_half_runs(token):
    sizes = []
    handle = token.models.unet.register_forward_hook(lambda m, args, out: sizes.append(len(args[0])))
    token.sample(PROMPTS, SEEDS, SamplerSettings(num_inference_steps=3, guidance_scale=1.0))
    handle.remove()
    assert sizes == [2] * 4


def test_with_guidance_both_halves_run_at_every_step(token):
    sizes = []
    handle = token.models.unet.register_forward_hook(lambda m, args, out: sizes.append(len(args[0])))
    token.sample(PROMPTS, SEEDS, SamplerSettings(num_inference_steps=4, guidance_scale=3.0))
    handle.remove()
    assert sizes == [4] * 5  # PNDM makes five steps of four


def test_images_follow_from_embeddings_alone(token):
    """Of any prompts: the sampler knows no token."""
    cond = token.encode(PROMPTS)
    pictures = sample(token.models, cond, token.unconditional, SEEDS, SETTINGS)
    assert torch.equal(pictures, token.sample(PROMPTS, SEEDS, SETTINGS))
    assert not pictures.requires_grad


def test_decoding_a_few_at_a_time_draws_the_same(token):
    whole = token.sample(PROMPTS, SEEDS, SETTINGS)
    singly = token.sample(
        PROMPTS, SEEDS, SamplerSettings(num_inference_steps=6, guidance_scale=3.0, decode_batch_size=1)
    )
    torch.testing.assert_close(singly, whole)


def test_a_tiny_vae_decodes_where_the_settings_say_so_and_lets_gradient_through(token, tmp_path):
    models = token.models
    models.tiny_vae = load_tiny_vae(save_tiny_vae(tmp_path / "taesd"), models.device, models.dtype)
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    images = decode(models, latents, replace(SETTINGS, tiny_vae=True))
    expected = models.tiny_vae.decode(latents).sample / 2 + 0.5  # of scaled latents, unlike the VAE
    assert images.shape == (2, 3, 16, 16)
    torch.testing.assert_close(images, expected.clamp(0, 1))
    assert images.sum().requires_grad
    assert not torch.equal(images, decode(models, latents, SETTINGS))


ALL = list(SCHEDULERS.values())


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_another_scheduler_draws_as_if_the_model_had_it(token, kind):
    """Of PNDM's configuration DDIM would clip the latents, were that not mended."""
    settings = SamplerSettings(num_inference_steps=6, guidance_scale=3.0, scheduler=kind)
    own = ClassToken(tiny_models(SCHEDULERS[kind]), "newclas", "a")
    own.models.scheduler = own.models.scheduler.from_config(
        own.models.scheduler.config, timestep_spacing=TRAINING_SPACING
    )
    own.load(token.vector)
    pictures = token.sample(PROMPTS, SEEDS, settings)
    assert torch.equal(pictures, own.sample(PROMPTS, SEEDS, SETTINGS))
    assert torch.equal(pictures, token.sample(PROMPTS, SEEDS, SETTINGS)) == (kind == "pndm")


@pytest.mark.parametrize("scheduler", ALL)
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_true_prediction_gives_back_the_clean_latents(scheduler, prediction_type):
    """``add_noise`` is diffusers' own idea of how much noise a step has.

    Euler's steps stand between the training timesteps.
    """
    scheduler = tiny_models(scheduler).scheduler
    scheduler.set_timesteps(6)
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, 1, 4, 8, 8, generator=generator).unbind()
    for i in (0, 2, 4):
        t = scheduler.timesteps[i]
        model_input = copy.deepcopy(scheduler).scale_model_input(
            scheduler.add_noise(clean, noise, t[None]), t
        )
        a = alpha_bar_at(scheduler, i, torch.float32)
        truth = noise if prediction_type == "epsilon" else a.sqrt() * noise - (1 - a).sqrt() * clean
        torch.testing.assert_close(
            predict_clean(model_input, truth, a, prediction_type), clean, rtol=1e-3, atol=1e-3
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_clean_prediction_keeps_the_last_noise_in_half_precision(dtype):
    """Near t = 0 half precision rounds 1 - alpha_bar to nothing."""
    alpha_bar = tiny_models("DDIMScheduler").scheduler.alphas_cumprod[1]
    latents = torch.zeros(1, 4, 2, 2, dtype=dtype)
    noise_pred = torch.ones(1, 4, 2, 2, dtype=dtype)
    exact = predict_clean(latents.double(), noise_pred.double(), alpha_bar, "epsilon")
    half = predict_clean(latents, noise_pred, alpha_bar, "epsilon")
    assert half.dtype == dtype
    torch.testing.assert_close(half.double(), exact, rtol=1e-2, atol=0)


def test_a_sampler_is_named_by_its_scheduler_and_steps():
    assert parse_sampler("dpmsolver++@12") == ("dpmsolver++", 12)
    assert parse_sampler("ddim") == ("ddim", None)
    assert parse_sampler("same@20") == (None, 20)
    assert parse_sampler("same") == (None, None)


@pytest.mark.parametrize(
    "bad", ["", "@12", "ddim@", "ddim@0", "ddim@-1", "ddim@2.5", "ddim@5@6", "heun", "DDIM"]
)
def test_what_is_no_sampler_is_refused(bad):
    with pytest.raises(ValueError):
        parse_sampler(bad)


def test_every_scheduler_can_be_named():
    assert set(SAMPLERS) == set(SCHEDULERS)
