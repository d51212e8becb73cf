"""Probe points: the right maps of the stock UNet, no block too many, and nothing left behind on it.

pytest tests/test_dpt_features.py
"""

import copy
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from conftest import weight_hashes

from discriminative.diffusion.models import load_models
from discriminative.errors import UsageError
from dpt.features import ProbePoint, block_shapes, blocks, extract

# Channels and sizes at 64x64 latents, of SD 1.4.
SD14 = {
    "bottom0": (320, 32, 32),
    "bottom1": (640, 16, 16),
    "bottom2": (1280, 8, 8),
    "bottom3": (1280, 8, 8),
    "mid": (1280, 8, 8),
    "up0": (1280, 16, 16),
    "up1": (1280, 32, 32),
    "up2": (640, 64, 64),
    "up3": (320, 64, 64),
}
SD14_FUSED = {
    "bottom2_bottom3_mid": (3840, 8, 8),
    "bottom1_up0": (1920, 16, 16),
    "bottom0_up1": (1600, 32, 32),
    "all-256-16": (256, 16, 16),
}
MINIATURE = {
    "bottom0": (48, 8, 8),
    "bottom1": (96, 4, 4),
    "bottom2": (160, 4, 4),
    "mid": (160, 4, 4),
    "up0": (160, 8, 8),
    "up1": (96, 16, 16),
    "up2": (48, 16, 16),
    "bottom0_up0": (208, 8, 8),
    "bottom1_bottom2_mid": (416, 4, 4),
    "up2_up1": (144, 16, 16),
    "all-32-8": (32, 8, 8),
    "all-5-3": (5, 3, 3),
}


@pytest.fixture(scope="module")
def unet():
    return load_models("miniature", torch.device("cpu"), torch.float32).unet


@pytest.fixture(autouse=True, scope="module")
def shapes_read_once():
    """Many points of few UNets: their shapes are read once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dpt.features.block_shapes", cache(block_shapes))
        yield


def sd14_like(divisor: int = 1, device: str = "cpu"):
    """A UNet of SD 1.4's shape, with fewer channels."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    with torch.device(device):
        return UNet2DConditionModel(
            sample_size=64,
            block_out_channels=tuple(width // divisor for width in (320, 640, 1280, 1280)),
            norm_num_groups=32 // divisor,
            cross_attention_dim=768 // divisor,
            attention_head_dim=8,
        )


def inputs(unet, batch: int = 2, size: int | None = None):
    """Latents, timesteps and text states, seeded."""
    generator = torch.Generator().manual_seed(1)
    size = size or unet.config.sample_size
    latents = torch.randn(batch, 4, size, size, generator=generator)
    timesteps = torch.tensor([10, 500])[:batch]
    cond = torch.randn(batch, 6, unet.config.cross_attention_dim, generator=generator)
    return latents, timesteps, cond


def counted(unet):
    """Counts of each block's calls, kept by hooks before them, and the hooks."""
    counts = dict.fromkeys(blocks(unet), 0)

    def counter(name):
        def count(*_):
            counts[name] += 1

        return count

    return counts, [block.register_forward_pre_hook(counter(name)) for name, block in blocks(unet).items()]


# Where there are probe points, and of what shape.


@pytest.mark.parametrize("name", MINIATURE)
def test_features_of_the_miniature_have_the_told_shape(unet, name):
    point = ProbePoint(unet, name)
    with torch.no_grad():
        features = extract(unet, *inputs(unet), point)
    assert (point.channels, *point.size) == MINIATURE[name]
    assert features.shape == (2, *MINIATURE[name])


def test_probe_points_of_stable_diffusion_are_the_papers():
    sd = sd14_like(device="meta")
    assert block_shapes(sd) == SD14
    points = {name: ProbePoint(sd, name) for name in SD14_FUSED}
    assert {name: (p.channels, *p.size) for name, p in points.items()} == SD14_FUSED


def test_features_of_a_narrow_stable_diffusion_have_the_told_shape():
    sd = sd14_like(divisor=32)
    arguments = inputs(sd, batch=1, size=32)
    for name in [*SD14, *SD14_FUSED]:
        point = ProbePoint(sd, name, latent_size=(32, 32))
        with torch.no_grad():
            features = extract(sd, *arguments, point)
        assert features.shape == (1, point.channels, *point.size), name
        if name in SD14:
            channels, height, width = SD14[name]
            assert features.shape[1:] == (channels // 32, height // 2, width // 2)


def test_latents_of_odd_sizes_have_features_of_the_told_shape(unet):
    point = ProbePoint(unet, "up0", latent_size=(13, 10))
    with torch.no_grad():
        features = extract(unet, torch.randn(1, 4, 13, 10), torch.tensor(5), torch.randn(1, 6, 128), point)
    assert features.shape[2:] == point.size


def test_shapes_are_told_without_computing_or_moving_weights(unet):
    before = weight_hashes(unet)
    block_shapes(unet)
    assert weight_hashes(unet) == before
    assert {p.device.type for p in unet.parameters()} == {"cpu"}


# What they hold.


def test_a_map_is_the_next_blocks_input(unet):
    seen = []
    handle = unet.up_blocks[1].register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["hidden_states"]), with_kwargs=True
    )
    with torch.no_grad():
        features, _ = extract(unet, *inputs(unet), ProbePoint(unet, "up0"), with_noise=True)
    handle.remove()
    assert torch.equal(features, seen[-1])


def test_joined_channels_stand_in_the_order_of_the_name(unet):
    with torch.no_grad():
        one, other, both = (
            extract(unet, *inputs(unet), ProbePoint(unet, name)) for name in ("up0", "bottom0", "up0_bottom0")
        )
    assert torch.equal(both, torch.cat([one, other], dim=1))


def test_all_blocks_are_resized_projected_and_summed(unet):
    point = ProbePoint(unet, "all-7-8")
    with torch.no_grad():
        features = extract(unet, *inputs(unet), point)
        expected = 0
        for name in block_shapes(unet):
            alone = extract(unet, *inputs(unet), ProbePoint(unet, name))
            weight = point.mixers[name].weight[:, :, 0, 0]
            bias = point.mixers[name].bias
            resized = F.interpolate(alone, (8, 8), mode="nearest")
            expected = expected + torch.einsum("bihw,oi->bohw", resized, weight) + bias[:, None, None]
    assert torch.allclose(features, expected, atol=1e-4)


def test_only_the_fusion_of_all_blocks_has_parameters(unet):
    assert not list(ProbePoint(unet, "bottom1_mid").parameters())
    point = ProbePoint(unet, "all-7-8")
    assert sum(p.numel() for p in point.parameters()) == 7 * (48 + 96 + 160 + 160 + 160 + 96 + 48) + 7 * 7
    extract(unet, *inputs(unet), point).sum().backward()
    assert all(p.grad is not None for p in point.parameters())


def test_features_depend_on_the_text_from_the_first_block_that_sees_it(unet):
    latents, timesteps, cond = inputs(unet)
    with torch.no_grad():
        for name, sees in {"bottom0": False, "bottom1": True, "up1": True}.items():
            point = ProbePoint(unet, name)
            same = torch.equal(
                extract(unet, latents, timesteps, cond, point),
                extract(unet, latents, timesteps, cond.flip(1) * 2, point),
            )
            assert same is not sees, name


# What runs.


@pytest.mark.parametrize("name", ["bottom0", "bottom2", "mid", "up0", "mid_bottom1", "up2", "all-4-4"])
def test_blocks_behind_the_probe_do_not_run(unet, name):
    point = ProbePoint(unet, name)
    counts, handles = counted(unet)
    with torch.no_grad():
        extract(unet, *inputs(unet), point)
    for handle in handles:
        handle.remove()
    names = list(counts)
    needed = max(names.index(block) for block in point.blocks)
    assert counts == {block: int(i <= needed) for i, block in enumerate(names)}


def test_with_the_prediction_every_block_runs_once_and_features_are_the_same(unet):
    point = ProbePoint(unet, "up0")
    counts, handles = counted(unet)
    with torch.no_grad():
        features, noise_pred = extract(unet, *inputs(unet), point, with_noise=True)
    for handle in handles:
        handle.remove()
    assert set(counts.values()) == {1}
    with torch.no_grad():
        assert torch.equal(features, extract(unet, *inputs(unet), point))
        assert torch.equal(noise_pred, unet(*inputs(unet)).sample)


def test_extraction_leaves_the_unet_bit_identical_and_without_hooks(unet):
    before = weight_hashes(unet)
    for with_noise in (False, True):
        extract(unet, *inputs(unet), ProbePoint(unet, "up1"), with_noise)
    assert weight_hashes(unet) == before
    assert not any(module._forward_hooks for module in unet.modules())


def test_hooks_go_even_where_the_unet_fails(unet):
    latents, timesteps, cond = inputs(unet)
    with pytest.raises(RuntimeError):
        extract(unet, latents, timesteps, cond[..., :3], ProbePoint(unet, "up1"))
    assert not any(module._forward_hooks for module in unet.modules())


def test_a_hook_that_is_never_called_is_told(unet):
    class Deaf:
        down_blocks = unet.down_blocks
        mid_block = unet.mid_block
        up_blocks = unet.up_blocks

        def __call__(self, latents, *_, **__):
            return type("Output", (), {"sample": latents})

    with pytest.raises(RuntimeError, match="no hook was called at up1"):
        extract(Deaf(), *inputs(unet), ProbePoint(unet, "up1"))


# Gradients.


def gradients(unet, name, with_noise=False):
    """Gradients of a sum of squared features for latents and text."""
    latents, timesteps, cond = inputs(unet)
    latents.requires_grad_()
    cond.requires_grad_()
    features = extract(unet, latents, timesteps, cond, ProbePoint(unet, name), with_noise)
    features = features[0] if with_noise else features
    return torch.autograd.grad(features.square().sum(), (latents, cond))


def test_gradient_flows_to_latents_and_text_through_the_early_exit(unet):
    early = gradients(unet, "up0")
    whole = gradients(unet, "up0", with_noise=True)
    for one, other in zip(early, whole, strict=True):
        assert one.abs().amin(dim=(1, 2)).max() > 0
        assert torch.equal(one, other)


def test_gradient_checkpointing_changes_no_gradient(unet):
    plain = gradients(unet, "up1")
    unet.enable_gradient_checkpointing()
    unet.train()
    try:
        again = gradients(unet, "up1")
    finally:
        unet.disable_gradient_checkpointing()
        unet.eval()
    for one, other in zip(plain, again, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-6)


def test_weights_behind_the_probe_get_no_gradient():
    sd = sd14_like(divisor=32)
    extract(sd, *inputs(sd, batch=1, size=16), ProbePoint(sd, "up0")).sum().backward()
    reached = {name: any(p.grad is not None for p in b.parameters()) for name, b in blocks(sd).items()}
    assert reached == {name: name not in ("up1", "up2", "up3") for name in SD14}


def test_half_precision_latents_take_a_text_in_float32_and_features_are_float32(unet):
    half = copy.deepcopy(unet).to(torch.bfloat16)
    latents, timesteps, cond = inputs(unet)
    with torch.no_grad():
        features = extract(half, latents.bfloat16(), timesteps, cond, ProbePoint(half, "mid"))
    assert features.dtype == torch.float32


# What is refused.


@pytest.mark.parametrize("name", ["up3", "", "mid_", "mid_mid", "all", "all-0-8", "all-8", "UP1", "mid-up0"])
def test_an_unknown_probe_point_is_told_with_those_that_there_are(unet, name):
    with pytest.raises(UsageError) as error:
        ProbePoint(unet, name)
    message = str(error.value)
    assert message.startswith(f"--probe: {name!r} was given; allowed is one of bottom0, bottom1,")
    assert "up0, up1, up2, some of one size" in message
    assert "\n" not in message


def test_maps_of_two_sizes_are_not_joined_and_those_that_can_be_are_listed(unet):
    with pytest.raises(UsageError) as error:
        ProbePoint(unet, "bottom0_mid")
    assert str(error.value) == (
        "--probe: 'bottom0_mid' was given, whose maps differ in size (bottom0 8x8, mid 4x4); allowed is to "
        "join blocks out of one of: bottom0_up0; bottom1_bottom2_mid; up1_up2"
    )
