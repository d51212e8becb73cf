"""Self-correction: 0 is plain generation, a little of it raises the score, and a class token goes with it.

pytest tests/test_dpt_correct.py
"""

import pytest
import torch
from conftest import tiny_models
from test_dpt_training import TINY, batches_through, prepare, tiny_reader

from discriminative.diffusion.sampler import Walk, sample
from discriminative.errors import UsageError
from discriminative.settings import SamplerSettings
from discriminative.tokens.class_token import ClassToken
from dpt.correct import Correction, corrected_step, encode_prompts, sample_corrected, score_gradient
from dpt.files import new_reader

PROMPTS = ["a photo of tiger", "a blue cat"]
SEEDS = [7, 8]
SETTINGS = SamplerSettings(num_inference_steps=4, guidance_scale=5.0)


def reader_of(scheduler="DDIMScheduler", point="up0"):
    torch.manual_seed(5)
    reader = new_reader(tiny_models(scheduler), point, TINY, "pipeline")
    for module in (reader.adapter, reader.point):
        module.eval().requires_grad_(False)
    return reader


def drawn(reader, correction, settings=SETTINGS, token=None, prompts=PROMPTS):
    with torch.no_grad():
        told = encode_prompts(reader, prompts, token)
    return sample_corrected(reader, told, SEEDS, settings, correction)


def plain(reader, settings=SETTINGS):
    with torch.no_grad():
        told = encode_prompts(reader, PROMPTS)
    return sample(reader.models, told.cond, told.uncond, SEEDS, settings)


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "PNDMScheduler"])
@pytest.mark.parametrize("mode", ["official", "state"])
def test_factor_0_is_plain_generation_bit_for_bit(scheduler, mode):
    reader = reader_of(scheduler)
    images, scores = drawn(reader, Correction(0.0, mode))
    assert torch.equal(images, plain(reader))
    assert scores == {}


@pytest.mark.parametrize("mode", ["official", "state"])
@pytest.mark.parametrize("scheduler", [None, "pndm", "euler", "dpmsolver++"])
def test_as_factor_goes_to_0_the_images_go_to_plain_ones(mode, scheduler):
    """A tiny factor takes the corrected path, which must not differ from the plain one by itself."""
    settings = SamplerSettings(4, 5.0, scheduler=scheduler)
    reader = reader_of()
    images, scores = drawn(reader, Correction(1e-12, mode), settings)
    assert len(scores) >= 4
    torch.testing.assert_close(images, plain(reader, settings), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["official", "state"])
def test_a_real_factor_changes_the_images_and_the_modes_differ(mode):
    reader = reader_of()
    images, _ = drawn(reader, Correction(50.0, mode))
    assert (images - plain(reader)).abs().max() > 1e-3
    other, _ = drawn(reader, Correction(50.0, "state" if mode == "official" else "official"))
    assert (images - other).abs().max() > 1e-4


@pytest.mark.parametrize("mode", ["official", "state"])
def test_one_step_is_the_papers_formula(mode):
    reader = reader_of()
    with torch.no_grad():
        told = encode_prompts(reader, PROMPTS)
    z = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    walk = Walk(reader.models, told.cond, told.uncond, z, SETTINGS)
    t = walk.timesteps[1]
    moved = z + 20.0 * score_gradient(reader, z, t, told)[1]
    with torch.no_grad():
        found, _ = corrected_step(reader, walk, 1, z, told, Correction(20.0, mode))
        start = z if mode == "official" else moved
        uncond = told.uncond.expand(2, -1, -1)
        without = reader.models.unet(start, t, encoder_hidden_states=uncond).sample
        under = reader.models.unet(moved, t, encoder_hidden_states=told.cond).sample
        noise_pred = without + 5.0 * (under - without)
        expected = walk.scheduler.step(noise_pred, t, start).prev_sample
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (moved - z).abs().max() > 1e-2


def test_steps_outside_the_range_are_plain():
    reader = reader_of()
    images, scores = drawn(reader, Correction(50.0, "official", first=1, stop=3))
    assert list(scores) == [1, 2]
    assert torch.equal(drawn(reader, Correction(50.0, "official", first=9))[0], plain(reader))
    assert not torch.equal(images, plain(reader))


@pytest.mark.parametrize("t", [20, 500, 980])
def test_a_small_step_along_the_gradient_raises_each_score_at_fixed_t(t):
    reader = reader_of()
    with torch.no_grad():
        told = encode_prompts(reader, PROMPTS)
    z = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    before, gradient = score_gradient(reader, z, t, told)
    after, _ = score_gradient(reader, z + 0.05 * gradient / gradient.norm(), t, told)
    assert (after > before).all()
    # First order: the rise is what the gradient foretells.
    foretold = 0.05 * gradient.flatten(1).square().sum(1) / gradient.norm()
    torch.testing.assert_close(after - before, foretold, rtol=0.3, atol=1e-5)


def test_the_score_is_read_at_the_probe_and_leaves_no_gradient_behind():
    reader = reader_of(point="mid")
    behind = batches_through(reader.models.unet.up_blocks[0])
    with torch.no_grad():
        told = encode_prompts(reader, PROMPTS)
    score, gradient = score_gradient(reader, torch.randn(2, 4, 8, 8), 500, told)
    assert behind == []
    assert not score.requires_grad and not gradient.requires_grad
    everything = (reader.models.unet, reader.adapter, reader.models.text_encoder)
    assert all(p.grad is None for m in everything for p in m.parameters())


def test_dropout_is_off_while_images_are_corrected():
    reader = reader_of()
    assert torch.equal(drawn(reader, Correction(50.0))[0], drawn(reader, Correction(50.0))[0])


def test_each_images_bits_follow_from_its_own_seed():
    reader = reader_of()
    both = drawn(reader, Correction(5.0))[0]
    with torch.no_grad():
        told = encode_prompts(reader, PROMPTS[1:])
    alone = sample_corrected(reader, told, SEEDS[1:], SETTINGS, Correction(5.0))[0]
    torch.testing.assert_close(both[1:], alone, rtol=1e-4, atol=1e-5)


# With a class token of the main program.


@pytest.mark.parametrize("vectors", [1, 2])
def test_a_class_token_is_spliced_into_states_and_pooled(vectors):
    reader = reader_of()
    token = ClassToken(reader.models, "newclas", "a", vectors)
    with torch.no_grad():
        token.vector.copy_(torch.randn(token.vector.shape, generator=torch.Generator().manual_seed(3)))
        prompts = ["a photo of newclas cat"]
        told = encode_prompts(reader, prompts, token)
        assert torch.equal(told.cond, token.encode(prompts))
        assert torch.equal(told.uncond, token.unconditional)
        # The pooled state stands where the prompt ends, behind all of the token's words.
        end = 1 + 3 + vectors + 1
        assert torch.equal(told.pooled, told.cond[:, end])
        token.vector.zero_()
        assert not torch.equal(encode_prompts(reader, prompts, token).pooled, told.pooled)


def test_factor_0_with_a_class_token_is_the_main_programs_image_bit_for_bit():
    reader = reader_of()
    token = ClassToken(reader.models, "newclas", "a")
    prompts = ["a photo of newclas cat"] * 2
    images, _ = drawn(reader, Correction(0.0), token=token, prompts=prompts)
    assert torch.equal(images, token.sample(prompts, SEEDS, SETTINGS))
    corrected, _ = drawn(reader, Correction(50.0), token=token, prompts=prompts)
    assert not torch.equal(images, corrected)


def test_a_prompt_that_is_too_long_is_refused():
    with pytest.raises(UsageError, match="takes 22 tokens"):
        encode_prompts(reader_of(), ["cat " * 20])


def test_correction_works_with_a_lora_in_the_unet():
    reader = tiny_reader()
    lora = prepare(reader, 0)
    with torch.no_grad():
        for name, parameter in lora.items():
            if name.startswith("unet.") and "lora_B" in name:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(len(name)))
    for module in (reader.adapter, reader.models.unet):
        module.eval().requires_grad_(False)
    images, _ = drawn(reader, Correction(0.0))
    assert torch.equal(images, plain(reader))
    assert not torch.equal(drawn(reader, Correction(5.0))[0], images)
