"""Probe points: the maps that a stock UNet's blocks put out, read by hooks, alone or fused."""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress

import torch
import torch.nn.functional as F

from discriminative.diffusion.models import own_latent_size
from discriminative.errors import UsageError
from discriminative.precision import at_least_float32

LEAST_STD = 1e-6  # of a channel
ALL = re.compile(r"all-([1-9]\d*)-([1-9]\d*)")  # all-C-S


class _Reached(Exception):
    """The last map that was asked for is there: what is behind it need not run."""


def blocks(unet) -> dict[str, torch.nn.Module]:
    """The UNet's blocks by name, in the order in which they run: bottom0, ..., mid, up0, ..."""
    named = {f"bottom{i}": block for i, block in enumerate(unet.down_blocks)}
    if unet.mid_block is not None:
        named["mid"] = unet.mid_block
    return named | {f"up{i}": block for i, block in enumerate(unet.up_blocks)}


@contextmanager
def _watched(unet, names: Iterable[str], last: str | None = None) -> Iterator[dict[str, torch.Tensor]]:
    """Within the block the UNet's calls fill a dictionary with maps (B, C, h, w), by block.

    Args:
        last: the UNet's call, and with it the block, ends after this one; None: it runs to its end.
    """
    maps = {}

    def hook_of(name: str):
        def hook(module, inputs, output):
            # Down blocks also put out what their skips carry.
            maps[name] = output[0] if isinstance(output, tuple) else output  # (B, C, h, w)
            if name == last:
                raise _Reached

        return hook

    named = blocks(unet)
    handles = [named[name].register_forward_hook(hook_of(name)) for name in names]
    try:
        with suppress(_Reached):
            yield maps
    finally:
        for handle in handles:
            handle.remove()


def _first(number) -> int:
    """A configuration's number, where it may hold one a level."""
    return number[0] if isinstance(number, (list, tuple)) else number


@torch.no_grad()
def block_shapes(unet, latent_size: tuple[int, int] | None = None) -> dict[str, tuple[int, int, int]]:
    """Channels, height and width of each block's map, in the order in which the blocks run.

    They are read off a forward on the meta device, which computes nothing.

    Args:
        latent_size: height and width of the latents; None is the model's own.
    """
    height, width = latent_size or own_latent_size(unet.config)
    like = {"dtype": unet.dtype, "device": "meta"}
    latents = torch.empty(1, unet.config.in_channels, height, width, **like)  # (1, C, h, w)
    timesteps = torch.zeros(1, device="meta")  # (1,)
    cond = torch.empty(1, 1, _first(unet.config.cross_attention_dim), **like)  # (1, L, D)
    weights = {name: t.to("meta") for name, t in [*unet.named_parameters(), *unet.named_buffers()]}
    with _watched(unet, blocks(unet)) as maps:
        torch.func.functional_call(unet, weights, (latents, timesteps, cond))
    return {name: tuple(x.shape[1:]) for name, x in maps.items()}


def _unknown(name: str, shapes: dict) -> UsageError:
    return UsageError(
        f"--probe: {name!r} was given; allowed is one of {', '.join(shapes)}, some of one size joined "
        f"with _, or all-C-S such as all-256-16"
    )


def _of_two_sizes(name: str, names: list[str], shapes: dict) -> UsageError:
    given = ", ".join(f"{n} {shapes[n][1]}x{shapes[n][2]}" for n in names)
    of_size = {}
    for block, (_, *size) in shapes.items():
        of_size.setdefault(tuple(size), []).append(block)
    joinable = "; ".join("_".join(together) for together in of_size.values() if len(together) > 1)
    return UsageError(
        f"--probe: {name!r} was given, whose maps differ in size ({given}); "
        f"allowed is to join blocks out of one of: {joinable}"
    )


def _parse(name: str, shapes: dict[str, tuple[int, int, int]]) -> list[str]:
    """The blocks that a probe point's name lists."""
    if ALL.fullmatch(name):
        return list(shapes)
    names = name.split("_")
    if not set(names) <= set(shapes) or len(set(names)) < len(names):
        raise _unknown(name, shapes)
    if len({shapes[n][1:] for n in names}) > 1:
        raise _of_two_sizes(name, names, shapes)
    return names


class ProbePoint(torch.nn.Module):
    """Where a UNet is probed: one block, some of one size whose channels are joined, or all of them (DPT,
    section 3.1).

    Names: ``bottom0``, ``mid``, ``up1``; ``bottom1_up0``; ``all-C-S``, where each map is resized to SxS,
    brought to C channels by a 1x1 convolution of its own, and all are summed. Only these convolutions are
    trainable; the other points have no parameters.

    Each channel is shifted and divided by what :meth:`standardise` found, so that all count alike to what
    learns from them: a UNet's differ in size by more than ten times, and few have mean 0.

    Args:
        unet: a diffusers UNet2DConditionModel. It is not kept.
        latent_size: height and width of the latents for ``size``; None is the model's own.

    Attributes:
        name: as given.
        blocks: the names of its blocks, in the order in which channels are joined.
        last: the one of them that runs last.
        channels: of the features.
        size: height and width of the features.

    Raises:
        UsageError: the UNet has no such point, or its maps differ in size.
    """

    def __init__(self, unet, name: str, latent_size: tuple[int, int] | None = None):
        super().__init__()
        shapes = block_shapes(unet, latent_size)
        self.name = name
        self.blocks = tuple(_parse(name, shapes))
        self.last = [block for block in shapes if block in self.blocks][-1]
        self.mixers = torch.nn.ModuleDict()
        for block in self.blocks:
            self.register_buffer(f"mean_{block}", torch.zeros(shapes[block][0], 1, 1))  # (C_i, 1, 1)
            self.register_buffer(f"std_{block}", torch.ones(shapes[block][0], 1, 1))  # (C_i, 1, 1)
        if fused := ALL.fullmatch(name):
            self.channels = int(fused[1])
            self.size = (int(fused[2]), int(fused[2]))
            for block in self.blocks:
                self.mixers[block] = torch.nn.Conv2d(shapes[block][0], self.channels, kernel_size=1)
        else:
            self.channels = sum(shapes[block][0] for block in self.blocks)
            self.size = shapes[self.last][1:]

    def forward(self, maps: dict[str, torch.Tensor]) -> torch.Tensor:
        """The blocks' maps (B, C_i, h_i, w_i) to features (B, C, h, w), in float32 or better."""
        if not self.mixers:
            return torch.cat([self._standard(block, maps[block]) for block in self.blocks], dim=1)
        features = 0
        for block, mixer in self.mixers.items():
            resized = F.interpolate(maps[block], self.size, mode="nearest")  # (B, C_i, S, S)
            features = features + mixer(self._standard(block, resized))  # (B, C, S, S)
        return features

    def _standard(self, block: str, x: torch.Tensor) -> torch.Tensor:
        """A block's map (B, C_i, h, w), each channel of mean 0 and variance 1 on what was looked at."""
        return (at_least_float32(x) - getattr(self, f"mean_{block}")) / getattr(self, f"std_{block}")

    @torch.no_grad()
    def standardise(
        self, unet, latents: torch.Tensor, timesteps: torch.Tensor, encoder_hidden_states: torch.Tensor
    ) -> None:
        """Find each channel's mean and standard deviation; arguments as of :func:`extract`."""
        maps, _ = _maps(unet, latents, timesteps, encoder_hidden_states, self, with_noise=False)
        for block in self.blocks:
            x = at_least_float32(maps[block]).transpose(0, 1).flatten(1)  # (C_i, B * h * w)
            getattr(self, f"mean_{block}").copy_(x.mean(dim=1)[:, None, None])
            getattr(self, f"std_{block}").copy_(x.std(dim=1).clamp(min=LEAST_STD)[:, None, None])


def _maps(
    unet, latents, timesteps, encoder_hidden_states, point: ProbePoint, with_noise: bool
) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
    """A point's maps (B, C_i, h_i, w_i) by block, and the prediction; as :func:`extract`."""
    cond = encoder_hidden_states.to(latents.dtype)  # (B, L, D)
    noise_pred = None
    with _watched(unet, point.blocks, last=None if with_noise else point.last) as maps:
        noise_pred = unet(latents, timesteps, encoder_hidden_states=cond).sample  # (B, 4, h, w)
    missed = [block for block in point.blocks if block not in maps]
    if missed:
        raise RuntimeError(f"the UNet ran, but no hook was called at {', '.join(missed)}; is it compiled?")
    return maps, noise_pred


def extract(
    unet,
    latents: torch.Tensor,
    timesteps: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    point: ProbePoint,
    with_noise: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Features of noisy latents under a text, at a probe point (DPT, section 3.1).

    The blocks behind the point run only where the prediction is wanted, too. Gradient flows as the caller
    has it set; the UNet keeps no hook.

    Args:
        unet: a diffusers UNet2DConditionModel, not compiled.
        latents: (B, 4, h, w), scaled for the UNet.
        timesteps: (B,) or a scalar, 0 to 999.
        encoder_hidden_states: (B, L, D) in any precision.
        with_noise: return the UNet's prediction as well.

    Returns:
        features (B, C, h', w'); with ``with_noise`` a pair, the second being the prediction (B, 4, h, w).

    Raises:
        RuntimeError: a hook was not called, as in a compiled UNet.
    """
    maps, noise_pred = _maps(unet, latents, timesteps, encoder_hidden_states, point, with_noise)
    features = point(maps)  # (B, C, h', w')
    return (features, noise_pred) if with_noise else features
