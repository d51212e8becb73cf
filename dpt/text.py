"""The text side: what the UNet is told, what matching aims at, and the tokens that boxes are aligned to.

All encoders are frozen and in evaluation mode; no gradient flows, but to a LoRA of the text encoder's.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from discriminative.diffusion.sources import FOREIGN_ERRORS
from discriminative.errors import UsageError
from discriminative.hub import at_revision, check_keys, hub_errors, hub_or_cache, why
from dpt.data.samples import Span

TARGETS = ("end", "words")  # what matching aims at


class Encoded(NamedTuple):
    """Texts as the pipeline's text encoder has them, in float32.

    Args:
        states: ``encoder_hidden_states`` (B, L, D).
        pooled: what matching aims at: states of the end tokens (B, D), after the final LayerNorm and without
            text projection; or of all words (B, L, D), 0 elsewhere.
        mask: (B, L), 1 from the begin token to the end token, 0 at padding.
    """

    states: torch.Tensor
    pooled: torch.Tensor
    mask: torch.Tensor


class TextSide(Protocol):
    """Tokens for the contrastive alignment, and where they stand in the text."""

    width: int

    def tokens(self, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """States (B, L, T) and a mask (B, L), 1 at what is no padding."""

    def offsets(self, text: str) -> list[Span]:
        """Characters (start, end) of each token that is no padding; (0, 0) for special tokens."""


def frozen(encoder: torch.nn.Module) -> torch.nn.Module:
    """The same encoder, without gradient and in evaluation mode."""
    return encoder.requires_grad_(False).eval()


def distinct_rows(texts: list[str], encode: Callable, device: torch.device) -> list[torch.Tensor]:
    """``encode`` of each distinct text once, its tensors' rows put in the texts' order."""
    distinct = list(dict.fromkeys(texts))
    place = {text: i for i, text in enumerate(distinct)}
    rows = torch.tensor([place[text] for text in texts], device=device)  # (B,)
    return [tensor[rows] for tensor in encode(distinct)]


class Condition:
    """A pipeline's tokenizer and text encoder: texts to what its UNet is told.

    Args:
        tokenizer: a CLIPTokenizer. Texts are padded, and cut, to its ``model_max_length``.
        text_encoder: a CLIPTextModel, which is frozen here.

    Attributes:
        trains: gradient flows to the text encoder's LoRA, through the states alone: what matching aims at
            stays a target.
        target: what that is, one of ``TARGETS``: the state of the end token, or of each word.
    """

    def __init__(self, tokenizer: Any, text_encoder: Any):
        self.tokenizer = tokenizer
        self.text_encoder = frozen(text_encoder)
        self.trains = False
        self.target = TARGETS[0]

    @property
    def width(self) -> int:
        """D, of states and pooled states."""
        return self.text_encoder.config.hidden_size

    def encode(self, texts: list[str]) -> Encoded:
        """B texts, each distinct one encoded once."""
        return Encoded(*distinct_rows(texts, self._encode, self.text_encoder.device))

    def _encode(self, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        limit = self.tokenizer.model_max_length
        batch = self.tokenizer(
            texts, padding="max_length", max_length=limit, truncation=True, return_tensors="pt"
        ).to(self.text_encoder.device)
        # Padding is seen, as the pipeline has it.
        with torch.set_grad_enabled(self.trains and torch.is_grad_enabled()):
            states = self.text_encoder.eval()(batch.input_ids).last_hidden_state.float()  # (B, L, D)
        # The first end token. transformers' own pooling takes the highest id in old
        # configurations (SD 1.4), which an added word would be.
        ends = (batch.input_ids == self.tokenizer.eos_token_id).int().argmax(dim=1)  # (B,)
        pooled = states[torch.arange(len(texts), device=states.device), ends].detach()  # (B, D)
        if self.target == "words":
            places = torch.arange(limit, device=states.device)  # (L,)
            is_word = (places > 0) & (places < ends[:, None])  # (B, L), begin and end left out
            pooled = states.detach() * is_word[..., None]  # (B, L, D)
        return states, pooled, batch.attention_mask


class PipelineSide:
    """The pipeline's own text encoder as the text side of the alignment; satisfies ``TextSide``."""

    def __init__(self, condition: Condition):
        self.condition = condition

    @property
    def width(self) -> int:
        """T, of a token's state."""
        return self.condition.width

    def tokens(self, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """States (B, L, T), L the encoder's full length, and a mask (B, L), 1 at what is no padding."""
        encoded = self.condition.encode(texts)
        return encoded.states.detach(), encoded.mask

    def offsets(self, text: str) -> list[Span]:
        """Characters (start, end) of each token, begin and end included as (0, 0)."""
        tokenizer = self.condition.tokenizer
        cut = {"truncation": True, "max_length": tokenizer.model_max_length}
        if tokenizer.is_fast:
            return tokenizer(text, return_offsets_mapping=True, **cut).offset_mapping
        ids = tokenizer(text, **cut).input_ids
        pieces = [None if i in tokenizer.all_special_ids else tokenizer.convert_ids_to_tokens(i) for i in ids]
        return piece_offsets(pieces, text, tokenizer.byte_decoder)


def piece_offsets(pieces: list[str | None], text: str, byte_decoder: dict[str, int]) -> list[Span]:
    """Characters (start, end) of CLIP's word pieces, found in the text one behind the other.

    Args:
        pieces: as the vocabulary writes them ("cat</w>"); None for a special token.
        byte_decoder: the vocabulary's letters to bytes.

    Returns:
        one for each piece; (0, 0) for special tokens and pieces that the text does not hold.
    """
    # The vocabulary is of lower case, in bytes.
    letters = [letter.lower().encode() for letter in text]
    data = b"".join(letters)
    owners = [i for i, letter in enumerate(letters) for _ in letter]
    offsets = []
    cursor = 0
    for piece in pieces:
        written = (piece or "").removesuffix("</w>")
        wanted = bytes(byte_decoder[sign] for sign in written if sign in byte_decoder)
        start = data.find(wanted, cursor) if wanted else -1
        if start < 0:
            offsets.append((0, 0))
            continue
        cursor = start + len(wanted)
        offsets.append((owners[start], owners[cursor - 1] + 1))
    return offsets


class RobertaSide:
    """A frozen RoBERTa as the text side of the alignment, as in the paper; satisfies ``TextSide``.

    Args:
        source: a folder of transformers' layout, or a hub id such as FacebookAI/roberta-base, with
            ``@revision`` where one is wanted.
        device: where it computes.
        flag: that errors name.

    Raises:
        UsageError: it cannot be fetched, or the folder is damaged.
    """

    def __init__(self, source: str, device: torch.device | str = "cpu", flag: str = "text_side"):
        self.tokenizer, encoder = _load_roberta(source, flag)
        self.encoder = frozen(encoder).to(device)
        # Positions are counted from behind the padding's id.
        config = encoder.config
        self.limit = min(
            self.tokenizer.model_max_length, config.max_position_embeddings - config.pad_token_id - 1
        )

    @property
    def width(self) -> int:
        """T, of a token's state."""
        return self.encoder.config.hidden_size

    def tokens(self, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """States (B, L, T), L that of the longest text, and a mask (B, L), 1 at what is no padding."""
        states, mask = distinct_rows(texts, self._tokens, self.encoder.device)
        return states, mask

    @torch.no_grad()
    def _tokens(self, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        batch = self.tokenizer(
            texts, padding=True, truncation=True, max_length=self.limit, return_tensors="pt"
        ).to(self.encoder.device)
        output = self.encoder.eval()(batch.input_ids, attention_mask=batch.attention_mask)
        return output.last_hidden_state, batch.attention_mask  # (B, L, T), (B, L)

    def offsets(self, text: str) -> list[Span]:
        """Characters (start, end) of each token, begin and end included as (0, 0)."""
        cut = {"truncation": True, "max_length": self.limit}
        return self.tokenizer(text, return_offsets_mapping=True, **cut).offset_mapping


def _load_roberta(source: str, flag: str) -> tuple[Any, Any]:
    """Tokenizer and encoder of a RoBERTa, from safetensors, in float32."""
    from safetensors import SafetensorError
    from transformers import AutoTokenizer, RobertaModel

    place, revision = at_revision(source)
    where = {"revision": revision} if revision else {}
    try:
        with hub_or_cache(place):
            tokenizer = AutoTokenizer.from_pretrained(place, **where)
        if not tokenizer.is_fast or len(tokenizer) <= len(tokenizer.all_special_tokens):
            raise OSError("its tokenizer has no vocabulary that tells where tokens stand")
        settings = where | {"dtype": torch.float32, "use_safetensors": True, "output_loading_info": True}
        with hub_or_cache(place):
            encoder, info = RobertaModel.from_pretrained(place, add_pooling_layer=False, **settings)
        check_keys(info["missing_keys"])
    except (*FOREIGN_ERRORS, ImportError, SafetensorError, *hub_errors()) as error:
        what = "the folder could not be loaded" if Path(place).is_dir() else "it could not be fetched"
        raise UsageError(
            f"--{flag}: {source!r} was given, but {what}: {why(error)}; "
            "allowed is a folder or a hub id of a RoBERTa in safetensors"
        ) from error
    return tokenizer, encoder
