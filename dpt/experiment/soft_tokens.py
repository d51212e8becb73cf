"""Soft tokens trained contrastively, in the manner of SoftREPA (Lee et al. 2025): a rival that leaves all
weights alone.

Each cross-attention layer has a few tokens of its own before the text's states. A picture's noise is
predicted under its own text and under others, and the right text is to err least. The empty prompt of
guidance has no tokens.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers.models.attention_processor import Attention
from torch import nn

from discriminative.precision import channels_last
from discriminative.records.files import write_tensors
from dpt.experiment.own_errors import FIRST_SCALE, errors_by_text
from dpt.experiment.settings import SOFT_TOKENS
from dpt.files import check_fit, read_tensors
from dpt.forward import Noised, Reader
from dpt.latents import Row, Stream
from dpt.losses import ranking_loss
from dpt.training import Stage, facts_of, forget_checkpoint, seed_of, train

FILE = "soft_tokens.safetensors"
STREAM = 47  # of their first values
FIRST_STD = 0.02


class SoftTokens(nn.Module):
    """The tokens of all cross-attention layers of a UNet.

    Args:
        unet: a diffusers UNet2DConditionModel.
        number: of tokens a layer.

    Attributes:
        tokens: by layer (number, D).
        logit_scale: natural logarithm of the factor before the errors, a scalar.
    """

    def __init__(self, unet, number: int = SOFT_TOKENS):
        super().__init__()
        self.layers = [name for name, module in unet.named_modules() if name.endswith("attn2")]
        modules = dict(unet.named_modules())
        widths = [modules[name].to_k.in_features for name in self.layers]
        self.tokens = nn.ParameterList(nn.Parameter(torch.randn(number, d) * FIRST_STD) for d in widths)
        self.logit_scale = nn.Parameter(torch.tensor(FIRST_SCALE))

    def put_on(self, unet, empty: torch.Tensor) -> None:
        """Have the UNet's layers see their tokens; the empty prompt ``empty`` (1, L, D) has none."""
        modules = dict(unet.named_modules())
        for name, tokens in zip(self.layers, self.tokens, strict=True):
            modules[name].set_processor(WithTokens(modules[name].processor, tokens, empty))


class WithTokens:
    """An attention processor that puts tokens (P, D) before the states of all texts but the empty one."""

    def __init__(self, plain: Callable, tokens: torch.Tensor, empty: torch.Tensor):
        self.plain = plain
        self.tokens = tokens
        self.empty = empty

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Hidden states (B, N, C) under texts (B, L, D), to (B, N, C)."""
        is_told = (encoder_hidden_states != self.empty).flatten(1).any(dim=1)  # (B,)
        prefix = self.tokens.expand(len(hidden_states), -1, -1).to(encoder_hidden_states)  # (B, P, D)
        longer = torch.cat([prefix, encoder_hidden_states], dim=1)  # (B, P + L, D)
        found = self.plain(attn, hidden_states, longer, attention_mask)  # (B, N, C)
        if is_told.all():
            return found
        plain = self.plain(attn, hidden_states, encoder_hidden_states, attention_mask)  # (B, N, C)
        return torch.where(is_told[:, None, None], found, plain)


def contrast(soft: SoftTokens) -> Callable[..., dict[str, torch.Tensor]]:
    """The contrastive loss of a batch, called as :func:`forward.losses_of` is."""

    def measure(reader: Reader, rows: list[Row], noised: Noised, *_) -> dict[str, torch.Tensor]:
        return {"i2t": ranking_loss(-errors_by_text(reader, rows, noised), soft.logit_scale)}

    return measure


def new_tokens(reader: Reader, seed: int) -> SoftTokens:
    """Fresh tokens on the reader's UNet."""
    with torch.random.fork_rng():
        torch.manual_seed(seed_of(seed, 0, 0, STREAM))
        soft = SoftTokens(reader.models.unet).to(reader.device)
    soft.put_on(reader.models.unet, reader.condition.encode([""]).states)
    return soft


def learn_tokens(
    reader: Reader, stage: Stage, stream: Stream, folder: Path, accelerator: Accelerator
) -> list[dict]:
    """Train tokens and write them to the folder; a row of losses for each update."""
    soft = new_tokens(reader, stage.seed)
    trained = dict(soft.named_parameters())
    facts = {"stage": "soft", "tokens": SOFT_TOKENS} | facts_of(stage, reader, stream)
    with channels_last(reader.models):
        rows = train(stage, reader, trained, stream, folder, accelerator, facts, contrast(soft))
    tensors = {name: p.detach().cpu().contiguous() for name, p in trained.items()}
    write_tensors(folder / FILE, tensors, {"format": "pt"})
    forget_checkpoint(folder)
    return rows


@torch.no_grad()
def put_tokens(reader: Reader, folder: Path) -> None:
    """Put the tokens of a folder on the reader's UNet, frozen."""
    soft = new_tokens(reader, 0).requires_grad_(False)
    given = read_tensors(folder / FILE)
    check_fit(folder / FILE, given, dict(soft.named_parameters()), "model")
    soft.load_state_dict(given)
