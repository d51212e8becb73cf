"""The discriminative adapter: a small DETR on a UNet's features, which matches texts and finds what they
name (DPT, section 3.2)."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from torch import nn

from discriminative.precision import at_least_float32
from dpt.settings import AdapterSettings

POSITION_TEMPERATURE = 10000
FIRST_LOGIT_SCALE = math.log(1 / 0.07)  # as in CLIP


class Readout(NamedTuple):
    """What the adapter reads out of the features.

    Args:
        matching: (B, Qm, D), to be compared with the pooled text; not normalised.
        logits: (B, Qg, slots + 1), which token each box is of; the last index is "no object".
        boxes: (B, Qg, 4) as centre x, centre y, width, height, shares of the image in [0, 1].
        alignment: (B, Qg, A), boxes in the space that they share with words, of norm 1.
    """

    matching: torch.Tensor
    logits: torch.Tensor
    boxes: torch.Tensor
    alignment: torch.Tensor


def sine_position(height: int, width: int, channels: int) -> torch.Tensor:
    """Two-dimensional sine position (h * w, channels): one half of the channels for y, then one for x
    (DETR, Carion et al. 2020, appendix A.4).

    Args:
        channels: a multiple of four.
    """
    half = channels // 2
    pair = torch.arange(half) // 2  # (half,)
    wavelengths = POSITION_TEMPERATURE ** (2 * pair / half)  # (half,)

    def along(length: int) -> torch.Tensor:
        coordinates = torch.arange(1, length + 1) / length * 2 * math.pi  # (length,)
        angles = coordinates[:, None] / wavelengths  # (length, half)
        return torch.stack([angles[:, 0::2].sin(), angles[:, 1::2].cos()], dim=2).flatten(1)  # (length, half)

    y = along(height)[:, None].expand(-1, width, -1)  # (h, w, half)
    x = along(width)[None].expand(height, -1, -1)  # (h, w, half)
    return torch.cat([y, x], dim=2).flatten(0, 1)  # (h * w, channels)


def mlp(*widths: int) -> nn.Sequential:
    """Linear layers with ReLU between them."""
    layers = []
    for i in range(len(widths) - 1):
        layers += [nn.Linear(widths[i], widths[i + 1]), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class _Attention(nn.Module):
    """Attention with residual and LayerNorm behind it (post-norm)."""

    def __init__(self, settings: AdapterSettings):
        super().__init__()
        d = settings.width
        self.attention = nn.MultiheadAttention(d, settings.heads, settings.dropout, batch_first=True)
        self.dropout = nn.Dropout(settings.dropout)
        self.norm = nn.LayerNorm(d)

    def forward(self, x, query, key, value) -> torch.Tensor:
        """All (B, N or M, d); the result is of x's shape (B, N, d)."""
        attended = self.attention(query, key, value, need_weights=False)[0]  # (B, N, d)
        return self.norm(x + self.dropout(attended))


class _FeedForward(nn.Module):
    """Feed-forward net with residual and LayerNorm behind it (post-norm)."""

    def __init__(self, settings: AdapterSettings):
        super().__init__()
        d = settings.width
        self.wide = nn.Linear(d, settings.feedforward)
        self.narrow = nn.Linear(settings.feedforward, d)
        self.inner_dropout = nn.Dropout(settings.dropout)
        self.dropout = nn.Dropout(settings.dropout)
        self.norm = nn.LayerNorm(d)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, N, d) to (B, N, d)."""
        inner = self.inner_dropout(F.relu(self.wide(x)))  # (B, N, feedforward)
        return self.norm(x + self.dropout(self.narrow(inner)))


class _Encoder(nn.Module):
    """One layer of self-attention over the features' places."""

    def __init__(self, settings: AdapterSettings):
        super().__init__()
        self.attend = _Attention(settings)
        self.feed = _FeedForward(settings)

    def forward(self, x: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """Places (B, h * w, d) and their position, of the same shape."""
        placed = x + position  # (B, h * w, d)
        return self.feed(self.attend(x, placed, placed, x))


class _Decoder(nn.Module):
    """One layer in which the queries look at each other and at the features; a LayerNorm at the end."""

    def __init__(self, settings: AdapterSettings):
        super().__init__()
        self.attend_queries = _Attention(settings)
        self.attend_features = _Attention(settings)
        self.feed = _FeedForward(settings)
        self.norm = nn.LayerNorm(settings.width)

    def forward(self, queries: torch.Tensor, memory: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """Queries (B, Q, d), features and their position (B, h * w, d), to (B, Q, d)."""
        x = torch.zeros_like(queries)  # (B, Q, d)
        x = self.attend_queries(x, x + queries, x + queries, x)
        x = self.attend_features(x, x + queries, memory + position, memory)
        return self.norm(self.feed(x))


class DiscriminativeAdapter(nn.Module):
    """Reads out of a UNet's features whether a text matches, and where its things are (DPT, section 3.2).

    All parameters are float32. The matrices of the transformer start Xavier-uniform, the scale of the
    matching logits at 1 / 0.07.

    Args:
        settings: its sizes.
        channels: C of the features.
        text_width: D of the pooled text, which the matching head aims at.
        token_width: T of the token states, to which boxes are aligned.

    Attributes:
        logit_scale: natural logarithm of the factor before the matching losses' softmax, a scalar.
    """

    def __init__(self, settings: AdapterSettings, channels: int, text_width: int, token_width: int):
        super().__init__()
        d = settings.width
        self.settings = settings
        self.input_projection = nn.Conv2d(channels, d, kernel_size=1)
        self.timestep_sinusoid = Timesteps(d, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.timestep_mlp = TimestepEmbedding(d, 4 * d, act_fn="silu", out_dim=d)
        self.encoder = _Encoder(settings)
        self.decoder = _Decoder(settings)
        self.queries = nn.Embedding(settings.matching_queries + settings.grounding_queries, d)
        self.matching_head = mlp(d, d, text_width)
        self.logit_scale = nn.Parameter(torch.tensor(FIRST_LOGIT_SCALE))
        self.class_head = nn.Linear(d, settings.slots + 1)
        self.box_head = mlp(d, d, d, 4)
        self.query_projection = nn.Linear(d, settings.alignment_width)
        self.token_projection = nn.Linear(token_width, settings.alignment_width)
        for parameter in (*self.encoder.parameters(), *self.decoder.parameters()):
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)

    def forward(self, features: torch.Tensor, timesteps: torch.Tensor) -> Readout:
        """The readout of features (B, C, h, w), in any precision, at timesteps (B,), or one for all."""
        queries = self.decode(features, timesteps)  # (B, Q, d)
        number = self.settings.matching_queries
        matching = queries[:, :number]  # (B, Qm, d)
        grounding = queries[:, number:]  # (B, Qg, d)
        return Readout(
            matching=self.matching_head(matching),  # (B, Qm, D)
            logits=self.class_head(grounding),  # (B, Qg, slots + 1)
            boxes=self.box_head(grounding).sigmoid(),  # (B, Qg, 4)
            alignment=_unit(self.query_projection(grounding)),  # (B, Qg, A)
        )

    def decode(self, features: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """The queries after the transformer (B, Q, d)."""
        batch, _, height, width = features.shape
        features = features.to(self.input_projection.weight.dtype)  # (B, C, h, w)
        x = self.input_projection(features).flatten(2).transpose(1, 2)  # (B, h * w, d)

        # Where and when: for queries and keys, never for values.
        position = sine_position(height, width, self.settings.width).to(x)  # (h * w, d)
        timesteps = torch.as_tensor(timesteps, device=x.device).expand(batch)  # (B,)
        time = self.timestep_mlp(self.timestep_sinusoid(timesteps).to(x))  # (B, d)
        position = position + time[:, None]  # (B, h * w, d)

        memory = self.encoder(x, position)  # (B, h * w, d)
        queries = self.queries.weight.expand(batch, -1, -1)  # (B, Q, d)
        return self.decoder(queries, memory, position)  # (B, Q, d)

    def project_tokens(self, tokens: torch.Tensor) -> torch.Tensor:
        """Token states (B, L, T) in the space that they share with boxes (B, L, A), of norm 1."""
        return _unit(self.token_projection(tokens.to(self.token_projection.weight.dtype)))


def _unit(x: torch.Tensor) -> torch.Tensor:
    """Vectors (..., A) of norm 1, in float32 or better."""
    return F.normalize(at_least_float32(x), dim=-1)


def similarity(matching: torch.Tensor, pooled: torch.Tensor) -> torch.Tensor:
    """How well text and image match (B,), in [-1, 1]: the best query's cosine with the pooled text, or the
    mean over words of the best query's cosine with each.

    In float32 or better, under autocast, too.

    Args:
        matching: (B, Qm, D).
        pooled: (B, D); or words (B, L, D), 0 where there is none.
    """
    # A matrix product would be halved under autocast.
    if pooled.dim() == 3:
        cosines = (_unit(matching)[:, :, None] * _unit(pooled)[:, None]).sum(dim=-1)  # (B, Qm, L)
        best = cosines.amax(dim=1)  # (B, L)
        is_word = pooled.abs().amax(dim=2) > 0  # (B, L)
        return (best * is_word).sum(dim=1) / is_word.sum(dim=1).clamp(min=1)  # (B,)
    cosines = (_unit(matching) * _unit(pooled)[:, None]).sum(dim=-1)  # (B, Qm)
    return cosines.amax(dim=1)  # (B,)
