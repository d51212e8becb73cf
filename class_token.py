"""The class token: prompts that hold it, its one trainable vector, and the file that keeps it.

The vector is spliced into the text encoder's input embeddings by a small module. The embedding table itself is neither
resized nor copied nor trained, so every other word keeps its embedding bit for bit.
"""

import re
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from config import UsageError
from models import DiffusionModels, first_line

# The first three of the official list; "{}" takes the word in the token's place and then the class name. The baseline puts
# the initializer "a" there, so no template has an article of its own (the official third one doubles it).
TEMPLATES = ("A photo of {}", "a high resolution realistic image of {}", "A close-up photo of {}")


def fill(template: str, word: str, class_name: str) -> str:
    """A template with the class token (or the baseline's word) and the class name: "A photo of newclas tiger cat"."""
    return template.format(f"{word} {class_name}")


class SplicedEmbedding(torch.nn.Module):
    """An embedding table with one more word, whose vector lives outside the table.

    Args:
        table: the text encoder's own embedding, frozen.
        token_id: id of the new word, beyond the table.
        vector: (1, width), float32; gradients reach it and nothing else.
    """

    def __init__(self, table: torch.nn.Embedding, token_id: int, vector: torch.Tensor):
        super().__init__()
        self.table, self.token_id, self.vector = table, token_id, vector

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Token ids (B, L) to embeddings (B, L, width)."""
        here = (input_ids == self.token_id).unsqueeze(-1)  # (B, L, 1)
        words = self.table(input_ids.masked_fill(here.squeeze(-1), 0))  # (B, L, width)
        return torch.where(here, self.vector.to(words.dtype), words)


class ClassToken:
    """A placeholder word and its vector, the only parameter that is ever trained.

    Args:
        models: the frozen parts; their tokenizer learns the placeholder as a word beyond the embedding table.
        placeholder: the new word.
        initializer: a word of one token whose embedding the vector starts from.

    Raises:
        UsageError: the placeholder is a word already, or the initializer is not one token.
    """

    def __init__(self, models: DiffusionModels, placeholder: str, initializer: str):
        check_words(models.tokenizer, placeholder, initializer)
        self.models, self.placeholder = models, placeholder
        table = models.text_encoder.get_input_embeddings()
        start = models.tokenizer(initializer, add_special_tokens=False).input_ids[0]
        models.tokenizer.add_tokens([placeholder])
        self.token_id = models.tokenizer.convert_tokens_to_ids(placeholder)
        self.vector = torch.nn.Parameter(table.weight[start : start + 1].detach().float().clone())  # (1, width)

    @contextmanager
    def spliced(self):
        """Within the block the text encoder knows the placeholder; afterwards it is as it was."""
        encoder = self.models.text_encoder
        table = encoder.get_input_embeddings()
        encoder.set_input_embeddings(SplicedEmbedding(table, self.token_id, self.vector))
        try:
            yield
        finally:
            encoder.set_input_embeddings(table)

    def encode(self, prompts: list[str]) -> torch.Tensor:
        """Prompts to ``encoder_hidden_states`` (B, L, width), padded as the pipeline pads; each distinct prompt is encoded once.

        Raises:
            UsageError: a prompt is longer than the text encoder takes.
        """
        distinct = list(dict.fromkeys(prompts))
        input_ids = tokenize(self.models.tokenizer, distinct).to(self.models.device)  # (D, L)
        with self.spliced():
            hidden = self.models.text_encoder(input_ids).last_hidden_state  # (D, L, width)
        rows = torch.tensor([distinct.index(p) for p in prompts], device=hidden.device)
        return hidden[rows].to(self.models.dtype)  # (B, L, width)

    @cached_property
    def unconditional(self) -> torch.Tensor:
        """``encoder_hidden_states`` of the empty prompt (1, L, D); the same for the whole run, as no token is in it."""
        with torch.no_grad():
            return self.encode([""])

    @torch.no_grad()
    def load(self, vector: torch.Tensor) -> None:
        """Take over a vector (1, width) or (width,).

        Raises:
            UsageError: it is of another width.
        """
        width = self.vector.shape[1]
        if vector.numel() != width:
            raise UsageError(f"the token's vector has shape {tuple(vector.shape)}; this text encoder takes (1, {width})")
        self.vector.copy_(vector.reshape(1, width))


def check_words(tokenizer, placeholder: str, initializer: str) -> None:
    """Check that the placeholder is new to the vocabulary and that the initializer is one token of it.

    Raises:
        UsageError: naming the flag.
    """
    pieces = tokenizer.tokenize(placeholder)
    if len(pieces) == 1:
        raise UsageError(
            f"--placeholder_token: {placeholder!r} is already a word of the vocabulary; allowed is a new word, such as newclas"
        )
    pieces = tokenizer.tokenize(initializer)
    if len(pieces) != 1:
        raise UsageError(f"--initializer_token: {initializer!r} takes {len(pieces)} tokens; allowed is a word of one token, such as a")


def check_apart(placeholder: str, prompts: list[str]) -> None:
    """Check that no word of the prompts holds the placeholder as a part: a tokenizer finds an added word anywhere.

    Raises:
        UsageError: one does.
    """
    words = {w for p in prompts for w in re.findall(r"\w+", p.lower())} - {placeholder}
    clash = sorted(w for w in words if placeholder in w)
    if clash:
        raise UsageError(
            f"--placeholder_token: {placeholder!r} is a part of {clash[0]!r} in the prompts; allowed is a word that is in none"
        )


def tokenize(tokenizer, prompts: list[str]) -> torch.Tensor:
    """Prompts to token ids (B, L), padded to the text encoder's length.

    Raises:
        UsageError: a prompt is longer than that.
    """
    limit = tokenizer.model_max_length
    input_ids = [tokenizer(p, verbose=False).input_ids for p in prompts]
    for prompt, ids in zip(prompts, input_ids, strict=True):
        if len(ids) > limit:
            raise UsageError(f"--prompt: {prompt!r} takes {len(ids)} tokens; allowed are at most {limit}, begin and end included")
    return tokenizer(prompts, padding="max_length", max_length=limit, return_tensors="pt").input_ids


def token_tensors(token: ClassToken) -> dict[str, torch.Tensor]:
    """What the token's file holds: ``{placeholder: (1, width) float32}``, the format of diffusers' textual inversion."""
    return {token.placeholder: token.vector.detach().cpu().clone()}


def read_origin(path: Path) -> dict[str, str]:
    """What a token file says of its origin ("model", "classifier", ...); empty where it says nothing or is no token file."""
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError):
        return {}


def read_token(path: Path) -> tuple[str, torch.Tensor]:
    """Placeholder and vector of a token file.

    Raises:
        UsageError: the file is no safetensors file or does not hold exactly one vector.
    """
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise UsageError(f"{path}: not a readable safetensors file ({first_line(error)})") from error
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if len(tensors) != 1 or any(len(shape) not in (1, 2) for shape in shapes.values()):
        raise UsageError(f"{path}: holds {shapes}; a class token's file holds one vector under its placeholder")
    ((placeholder, vector),) = tensors.items()
    return placeholder, vector.float()
