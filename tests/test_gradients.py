"""The gradient is the one that each mode promises: against plain autograd and against finite differences, in float64."""

import copy
import random
from dataclasses import fields, replace

import pytest
import torch
from conftest import tiny_models

from config import RunConfig
from discriminative.diffusion.gradients import (
    MODES,
    GradientPath,
    combined,
    prediction_shares,
    token_gradients,
)
from discriminative.diffusion.sampler import SamplerSettings, decode, draw_noise
from discriminative.settings import Stage, parse_stages
from discriminative.tokens.class_token import ClassToken
from experiments.speed.footprint import LiveBytes

SETTINGS = SamplerSettings(num_inference_steps=6, guidance_scale=3.0)
PROMPTS, SEEDS = ["a photo of newclas cat", "a photo of newclas bat"], [3, 4]
SCHEDULERS = ["PNDMScheduler", "DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"]
PATHS = [
    GradientPath("last", 1),
    GradientPath("last", 3),
    GradientPath("jump", at=(0.0,)),
    GradientPath("jump", at=(0.4,)),
    GradientPath("jump", at=(0.2, 0.5, 1.0)),
    GradientPath("skip", at=(1.0,)),
    GradientPath("skip", at=(0.2, 0.6, 1.0)),
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


def of(token, path, weight=1.0, settings=None, kept=None):
    return token_gradients(token, PROMPTS, SEEDS, settings or SETTINGS, path, score, weight, kept)


def scale_at(i, number):
    """The guidance of a step, of ``SETTINGS`` as they are now."""
    low, high = SETTINGS.guidance_interval
    return SETTINGS.guidance_scale if low <= i / (number - 1) <= high else 1.0


def trajectory(token):
    """Every step, frozen: latents before it, what the UNet saw, its prediction for the empty prompt and the guided one, the scheduler
    before it; and how it ends."""
    models = token.models
    scheduler = copy.deepcopy(models.scheduler)
    scheduler.set_timesteps(SETTINGS.num_inference_steps)
    rows = []
    with torch.no_grad():
        latents = draw_noise(SEEDS, models.latent_shape(None, None)).double() * scheduler.init_noise_sigma
        cond = token.encode(PROMPTS)
        for i, t in enumerate(scheduler.timesteps):
            before = copy.deepcopy(scheduler)
            model_input = scheduler.scale_model_input(latents, t)
            uncond = models.unet(model_input, t, token.encode(["", ""])).sample
            scale = scale_at(i, len(scheduler.timesteps))
            noise_pred = uncond + scale * (models.unet(model_input, t, cond).sample - uncond)
            rows.append((latents, model_input, uncond, before, noise_pred))
            latents = scheduler.step(noise_pred, t, latents).prev_sample
    return rows, latents, scheduler


def guided(token, model_input, t, uncond, scale):
    return uncond + scale * (token.models.unet(model_input, t, token.encode(PROMPTS)).sample - uncond)


def test_the_noises_of_the_last_step_are_all_different(token, monkeypatch):
    """And none is the one that the image began from: torch takes the last 32 bits of a seed, so a far one may be the same."""
    used = []
    monkeypatch.setattr(
        "discriminative.diffusion.gradients.draw_noise",
        lambda *args: used.append(draw_noise(*args)) or used[-1],
    )
    token_gradients(token, PROMPTS, SEEDS, SETTINGS, GradientPath("lv", 3), score, 1.0)
    assert len({noise.double().sum().item() for noise in used}) == len(used) == 4
    assert torch.equal(used[0], draw_noise(SEEDS, used[0].shape[1:]))


def plain_loss(token, path, frozen):
    """The summed loss as a function of the token's vector alone, written without the code under test."""
    (rows, final, done), models, total = frozen, token.models, 0.0
    number = len(rows)
    a_of = [
        1 / (1 + done.sigmas[i].double() ** 2)
        if hasattr(done, "sigmas")
        else done.alphas_cumprod[done.timesteps[i]].double()
        for i in range(number)
    ]
    if path.mode == "last":
        latents, scheduler = rows[number - path.steps][0], copy.deepcopy(rows[number - path.steps][3])
        for i in range(number - path.steps, number):
            t = scheduler.timesteps[i]
            model_input = scheduler.scale_model_input(latents, t)
            uncond = models.unet(
                model_input, t, token.encode(["", ""])
            ).sample  # live: from the second step on its input is
            noise_pred = guided(token, model_input, t, uncond, scale_at(i, number))
            latents = scheduler.step(noise_pred, t, latents).prev_sample
        return losses_of(decode(models, latents, SETTINGS)).sum()
    if path.mode == "lv":
        t, a = done.timesteps[-1], a_of[-1]
        for j in range(path.steps):
            noise = draw_noise(SEEDS, final.shape[1:], j + 1).double()
            x = a.sqrt() * final + (1 - a).sqrt() * noise
            with torch.no_grad():
                uncond = models.unet(x, t, token.encode(["", ""])).sample
            clean = (
                x - (1 - a).sqrt() * guided(token, x, t, uncond, scale_at(number - 1, number))
            ) / a.sqrt()
            total = total + losses_of(decode(models, clean, SETTINGS)).sum() / path.steps
        return total
    places = path.places(number)
    if path.mode == "jump":
        for i in places:
            x, uncond = rows[i][1:3]
            clean = (
                x - (1 - a_of[i]).sqrt() * guided(token, x, done.timesteps[i], uncond, scale_at(i, number))
            ) / a_of[i].sqrt()
            total = total + losses_of(decode(models, clean, SETTINGS)).sum() / len(places)
        return total
    # skip: the scheduler is run with the chosen predictions live and every latent that the UNet sees frozen
    latents, scheduler = rows[0][0], copy.deepcopy(rows[0][3])
    for i, t in enumerate(scheduler.timesteps):
        scheduler.scale_model_input(latents, t)
        noise_pred = guided(token, rows[i][1], t, rows[i][2], scale_at(i, number))
        latents = scheduler.step(noise_pred if i in places else noise_pred.detach(), t, latents).prev_sample
    return losses_of(decode(models, latents, SETTINGS)).sum()


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_a_guidance_interval_enters_the_gradient_of_every_mode(float64_default, monkeypatch, path):
    token, whole = token_of("PNDMScheduler"), None
    for interval in ((0.0, 1.0), (0.3, 0.7)):
        monkeypatch.setitem(globals(), "SETTINGS", replace(SETTINGS, guidance_interval=interval))
        ours = combined(of(token, path).gradients, False)
        (plain,) = torch.autograd.grad(plain_loss(token, path, trajectory(token)), token.vector)
        torch.testing.assert_close(ours, plain, rtol=1e-6, atol=1e-9)
        assert whole is None or not torch.allclose(ours, whole, rtol=1e-2)
        whole = ours


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_decoding_a_few_at_a_time_changes_nothing(float64_default, path):
    token = token_of("PNDMScheduler")
    whole, singly = of(token, path), of(token, path, settings=replace(SETTINGS, decode_batch_size=1))
    torch.testing.assert_close(combined(singly.gradients, False), combined(whole.gradients, False))
    torch.testing.assert_close(singly.images, whole.images)
    torch.testing.assert_close(singly.losses, whole.losses)


@pytest.mark.parametrize("path", [*PATHS, GradientPath("lv", 3)], ids=str)
def test_another_batch_size_changes_no_noise(float64_default, path):
    """Nor, then, the gradient: that of a batch is the sum of its images'."""
    token = token_of("PNDMScheduler")
    whole = of(token, path).gradients
    singly = [
        token_gradients(token, [p], [s], SETTINGS, path, score, 1.0).gradients
        for p, s in zip(PROMPTS, SEEDS, strict=True)
    ]
    for together, *apart in zip(whole, *singly, strict=True):
        torch.testing.assert_close(together, sum(apart), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_a_kept_trajectory_is_not_walked_again_and_gives_the_same_gradient(token64, path):
    """Multistep schedulers remember the steps before, so their state is kept too."""
    kept, number = {}, len(trajectory(token64)[0])
    first, walked = of(token64, path, kept=kept), len(calls_of(token64, path))
    again = of(token64, path, kept=kept)
    torch.testing.assert_close(combined(again.gradients, False), combined(first.gradients, False))
    before = {"last": number - path.steps, "lv": number}.get(path.mode, path.places(number)[0])
    assert len(calls_of(token64, path, kept)) == walked - before


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_gradient_is_that_of_plain_autograd_and_of_finite_differences(token64, path):
    single = hasattr(token64.models.scheduler, "sigmas")  # these compute in float32 inside
    verdict, frozen = of(token64, path), trajectory(token64)
    ours = combined(verdict.gradients, False)
    assert ours.norm() > 1e-6
    (plain,) = torch.autograd.grad(plain_loss(token64, path, frozen), token64.vector)
    torch.testing.assert_close(ours, plain, rtol=1e-3 if single else 1e-6, atol=1e-5 if single else 1e-9)
    if single:
        return
    direction = torch.randn(
        token64.vector.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    start, values, h = token64.vector.detach().clone(), [], 1e-6
    for sign in (1, -1):
        with torch.no_grad():
            token64.vector.copy_(start + sign * h * direction)
            values.append(finite(token64, path, frozen))
    assert (values[0] - values[1]) / (2 * h) == pytest.approx((plain * direction).sum().item(), rel=1e-4)


def finite(token, path, frozen):
    """The loss at the token's present vector; of "skip" only the chosen predictions may follow it."""
    if path.mode != "skip":
        return plain_loss(token, path, frozen).item()
    rows, latents, done = frozen
    shares = prediction_shares(token.models.scheduler, SETTINGS.num_inference_steps)
    for i in path.places(len(rows)):
        # What the prediction was is in the final latents already; the difference enters by its share.
        now = guided(token, rows[i][1], done.timesteps[i], rows[i][2], scale_at(i, len(rows)))
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
    skip, last = (of(token, path) for path in (GradientPath("skip", at=(1.0,)), GradientPath("last", 1)))
    torch.testing.assert_close(skip.images, last.images)
    torch.testing.assert_close(skip.gradients[0], last.gradients[0], rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("path", [p for p in PATHS if p.mode in ("last", "skip")], ids=str)
def test_images_of_the_modes_that_finish_are_the_sampled_images(token, path):
    torch.testing.assert_close(
        of(token, path).images, token.sample(PROMPTS, SEEDS, SETTINGS), rtol=1e-4, atol=1e-5
    )


def calls_of(token, path, kept=None):
    """(batch, with gradient) of each UNet call."""
    calls = []
    handle = token.models.unet.register_forward_hook(
        lambda m, args, out: calls.append((len(args[0]), out.sample.requires_grad))
    )
    of(token, path, kept=kept)
    handle.remove()
    return calls


def test_gradient_does_not_reach_the_unconditional_half(token):
    # PNDM makes 7 steps of 6: six of both halves at once without gradient, then one half without and one with.
    assert calls_of(token, GradientPath("last", 1)) == [(4, False)] * 6 + [(2, False), (2, True)]


def test_jump_runs_no_step_after_its_last(token):
    assert calls_of(token, GradientPath("jump", at=(0.5,))) == [(4, False)] * 3 + [(2, False), (2, True)]


def test_several_steps_cost_one_trajectory_and_one_half_each(token):
    assert calls_of(token, GradientPath("skip", at=(0.0, 0.5, 1.0))) == [(4, False)] * 7 + [(2, True)] * 3


def test_one_graph_is_alive_at_a_time_however_many_steps(token, monkeypatch):
    """What the autograd graph keeps is freed before the next step's is made: counted by the tensors that it saves."""
    alive, most = [0], [0]

    class Counted:
        def __init__(self, tensor):
            self.tensor = tensor
            alive[0] += 1
            most[0] = max(most[0], alive[0])

        def __del__(self):
            alive[0] -= 1

    peaks = []
    for at in ((0.5,), (0.3, 0.5, 0.9), (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)):
        for mode in ("jump", "skip"):
            most[0] = alive[0] = 0
            with torch.autograd.graph.saved_tensors_hooks(Counted, lambda packed: packed.tensor):
                of(token, GradientPath(mode, at=at))
            peaks.append(most[0])
    assert max(peaks[::2]) <= 1.1 * peaks[0]
    assert max(peaks[1::2]) <= 1.1 * peaks[1]


def test_memory_hardly_grows_with_the_number_of_last_steps(token):
    """Of several steps the UNet's graph is made again, one step at a time, in the backward pass."""
    peaks = []
    for steps in (1, 2, 5):
        with LiveBytes() as live:
            of(token, GradientPath("last", steps))
        peaks.append(live.peak)
    assert max(peaks) <= 1.1 * peaks[0]


def test_normalised_steps_count_alike():
    gradients = [torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 1e-4]])]
    assert torch.equal(combined(gradients, False), torch.tensor([[3.0, 4.0001]]))
    torch.testing.assert_close(combined(gradients, True), torch.tensor([[0.6, 1.8]]))
    torch.testing.assert_close(combined(gradients, True, scale=8.0), 8 * torch.tensor([[0.6, 1.8]]))
    assert torch.equal(combined([torch.zeros(1, 2)], True), torch.zeros(1, 2))


def test_weights_of_the_losses_weigh_the_gradient(token):
    one, tenth = of(token, PATHS[6]), of(token, PATHS[6], weight=0.1)
    torch.testing.assert_close(
        combined(tenth.gradients, False) * 10, combined(one.gradients, False), rtol=1e-3, atol=1e-7
    )


def test_more_gradient_steps_than_there_are_is_an_error(token):
    with pytest.raises(ValueError, match="8 steps with gradient, but the scheduler's list has 7"):
        of(token, GradientPath("last", 8))


def test_what_is_left_to_chance_is_drawn_once_an_update():
    path, rng = GradientPath("random", 4), random.Random(0)
    drawn = [path.drawn(rng) for _ in range(200)]
    assert {p.steps for p in drawn} == {1, 2, 3, 4}
    assert {p.mode for p in drawn} == {"last"}
    span = GradientPath("jump", at=(0.1, 0.3), anywhere=True)
    places = [span.drawn(rng).at[0] for _ in range(200)]
    assert min(places) >= 0.1
    assert max(places) <= 0.3
    assert max(places) - min(places) > 0.15
    assert GradientPath("jump").drawn(rng) == GradientPath("jump")
    assert replace(span, at=(0.2, 0.2)).drawn(random.Random(1)) == GradientPath("jump", at=(0.2,))


def test_a_stage_has_one_place_or_several_or_a_range():
    assert parse_stages("0.13") == [Stage((0.13,))]
    assert parse_stages("0.1,0.5,1") == [Stage((0.1, 0.5, 1.0))]
    assert parse_stages("0.05-0.3") == [Stage((0.05, 0.3), anywhere=True)]
    assert parse_stages("0.13;0.3,0.5") == [Stage((0.13,)), Stage((0.3, 0.5))]
    assert parse_stages("0@8;0-0.5@20") == [Stage((0.0,), False, 8), Stage((0.0, 0.5), True, 20)]
    for bad in (
        "",
        "1.5",
        "0.3-0.1",
        "a",
        "0.1,",
        "-0.1",
        "0.1-0.2-0.3",
        "0.1;",
        "0.1-0.2,0.3",
        "0@",
        "0@0",
        "0@-3",
        "0@8.5",
        "@8",
        "0@8@9",
    ):
        with pytest.raises(ValueError):
            parse_stages(bad)


def test_every_mode_of_the_table_can_be_named():
    (choices,) = [f.metadata["choices"] for f in fields(RunConfig) if f.name == "gradient_mode"]
    assert set(choices) == set(MODES)
