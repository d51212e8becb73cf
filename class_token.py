"""The class token: prompts that hold it, its trainable vector (or a few), and the file that keeps it.

The vectors are spliced into the text encoder's input embeddings by a small module. The embedding table itself is neither
resized nor copied nor trained, so every other word keeps its embedding bit for bit.
"""

import hashlib
import math
import re
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from config import UsageError
from hub import one_line
from models import DiffusionModels

# The first three of the official list; "{}" takes the word in the token's place and then the class name. The baseline puts
# the initializer "a" there, so no template has an article of its own (the official third one doubles it).
TEMPLATES = ("A photo of {}", "a high resolution realistic image of {}", "A close-up photo of {}")

WHOLE_WORD = re.compile(r"[a-z]{3,}</w>")  # in CLIP's vocabulary
WEB_UI_KEY = "emb_params"  # the one tensor of an embedding file of AUTOMATIC1111 and ComfyUI


def fill(template: str, word: str, class_name: str) -> str:
    """A template with the class token (or the baseline's word) and the class name: "A photo of newclas tiger cat"."""
    return template.format(f"{word} {class_name}")


def vector_names(placeholder: str, number: int) -> list[str]:
    """The words of a token of several vectors, as diffusers names them: "newclas", "newclas_1", "newclas_2"."""
    return [placeholder] + [f"{placeholder}_{i}" for i in range(1, number)]


class SplicedEmbedding(torch.nn.Module):
    """An embedding table with a few more words, whose vectors live outside the table.

    Args:
        table: the text encoder's own embedding, frozen, or one that knows another token already.
        first_id: id of the first new word, beyond the table; the others follow.
        vectors: (N, width), float32; gradients reach them and nothing else.
    """

    def __init__(self, table: torch.nn.Module, first_id: int, vectors: torch.Tensor):
        super().__init__()
        self.table, self.first_id, self.vectors = table, first_id, vectors

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Token ids (B, L) to embeddings (B, L, width)."""
        new = (input_ids >= self.first_id) & (input_ids < self.first_id + len(self.vectors))  # (B, L)
        words = self.table(input_ids.masked_fill(new, 0))  # (B, L, width)
        for i, vector in enumerate(self.vectors):
            words = torch.where((input_ids == self.first_id + i).unsqueeze(-1), vector.to(words.dtype), words)
        return words


class ClassToken:
    """A placeholder word and its vectors (N, width), the only parameter that is ever trained; N is 1 in the paper.

    Args:
        models: the frozen parts; their tokenizer learns the placeholder as a word beyond the embedding table.
        placeholder: the new word; in prompts it stands for all of its vectors.
        initializer: a word of one token whose embedding each vector starts from.
        num_vectors: N.

    Raises:
        UsageError: the placeholder is a word already, or the initializer is not one token.
    """

    def __init__(self, models: DiffusionModels, placeholder: str, initializer: str, num_vectors: int = 1):
        check_words(models.tokenizer, placeholder, initializer, num_vectors)
        self.models, self.placeholder, self.names = models, placeholder, vector_names(placeholder, num_vectors)
        self.initializer = initializer
        models.tokenizer.add_tokens(self.names)
        self.first_id = models.tokenizer.convert_tokens_to_ids(placeholder)
        self.vector = torch.nn.Parameter(self.word_mean(initializer).repeat(num_vectors, 1))  # (N, width)
        self.others: list[tuple[list[str], int, torch.Tensor]] = []  # names, first id and vectors of tokens that prompts may hold too

    def join(self, placeholder: str, vectors: torch.Tensor) -> None:
        """Let prompts hold another token beside this one.

        Args:
            vectors: (M, width), which nothing trains.

        Raises:
            UsageError: the placeholder is a word already.
        """
        check_words(self.models.tokenizer, placeholder, self.initializer, len(vectors))
        names = vector_names(placeholder, len(vectors))
        self.models.tokenizer.add_tokens(names)
        first_id = self.models.tokenizer.convert_tokens_to_ids(placeholder)
        self.others.append((names, first_id, vectors.to(self.models.device, torch.float32)))

    @contextmanager
    def spliced(self):
        """Within the block the text encoder knows the placeholder; afterwards it is as it was."""
        encoder = self.models.text_encoder
        table = words = encoder.get_input_embeddings()
        for first_id, vectors in [*((first_id, vectors) for _, first_id, vectors in self.others), (self.first_id, self.vector)]:
            words = SplicedEmbedding(words, first_id, vectors)
        encoder.set_input_embeddings(words)
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
        input_ids = tokenize(self.models.tokenizer, distinct, self.names, *(o[0] for o in self.others)).to(self.models.device)  # (D, L)
        with self.spliced():
            hidden = self.models.text_encoder(input_ids).last_hidden_state  # (D, L, width)
        rows = torch.tensor([distinct.index(p) for p in prompts], device=hidden.device)
        return hidden[rows].to(self.models.dtype)  # (B, L, width)

    @cached_property
    def unconditional(self) -> torch.Tensor:
        """``encoder_hidden_states`` of the empty prompt (1, L, D); the same for the whole run, as no token is in it."""
        with torch.no_grad():
            return self.encode([""])

    @property
    def table(self) -> torch.Tensor:
        """The vocabulary's embeddings (V, width), float32."""
        return self.models.text_encoder.get_input_embeddings().weight.detach().float()

    @cached_property
    def word_norm(self) -> float:
        """Norm of a word's embedding: the 0.9 quantile over the vocabulary, as pieces that no caption holds are shorter."""
        return self.table.norm(dim=1).quantile(0.9).item()

    @property
    def word_rms(self) -> float:
        """Root mean square of the numbers of a word's embedding."""
        return self.word_norm / math.sqrt(self.vector.shape[1])

    def word_mean(self, words: str) -> torch.Tensor:
        """Mean embedding (1, width) of the tokens of words."""
        return self.table[self.models.tokenizer(words, add_special_tokens=False).input_ids].mean(0, keepdim=True)

    @property
    def vocabulary_mean(self) -> torch.Tensor:
        """Mean embedding (1, width) of the vocabulary's whole words."""
        # Sorted, as a tokenizer's vocabulary comes in any order, and so would the last bits of its mean.
        whole = sorted(i for word, i in self.models.tokenizer.get_vocab().items() if WHOLE_WORD.fullmatch(word) and i < self.first_id)
        return self.table[whole].mean(0, keepdim=True)

    def start_vector(self, start: str, class_name: str) -> torch.Tensor:
        """A vector (N, width) to start learning from.

        Args:
            start: "class", the mean of the class name's words; "vocabulary", the mean of all whole words; "initializer"; a word of
                one's own; or several of these, joined by "+", whose mean it is.
            class_name: the name of the class in the prompts.
        """
        named = {"initializer": self.initializer, "class": class_name}
        parts = [self.vocabulary_mean if part == "vocabulary" else self.word_mean(named.get(part, part)) for part in start.split("+")]
        return torch.stack(parts).mean(0).repeat(len(self.vector), 1)

    def norm(self) -> float:
        """Norm of the token's vectors over a word's, root mean square; 1 is a word like others."""
        return self.vector.detach().square().sum(1).mean().sqrt().item() / self.word_norm

    @torch.no_grad()
    def bound(self, limit: float) -> None:
        """Shorten each vector that is longer than ``limit`` words; 0 bounds nothing."""
        if limit:
            norms = self.vector.norm(dim=1, keepdim=True)  # (N, 1)
            self.vector.mul_((limit * self.word_norm / norms).clamp(max=1))

    @torch.no_grad()
    def load(self, vector: torch.Tensor) -> None:
        """Take over vectors (N, width), or one (width,).

        Raises:
            UsageError: they are of another number or width.
        """
        if vector.shape[-1] != self.vector.shape[1] or vector.numel() != self.vector.numel():
            raise UsageError(f"the token's vector has shape {tuple(vector.shape)}; this text encoder takes {tuple(self.vector.shape)}")
        self.vector.copy_(vector.reshape(self.vector.shape))


def check_words(tokenizer, placeholder: str, initializer: str, num_vectors: int = 1) -> None:
    """Check that the placeholder is new to the vocabulary and that the initializer is one token of it.

    Raises:
        UsageError: naming the flag.
    """
    for name in vector_names(placeholder, num_vectors):
        if len(tokenizer.tokenize(name)) == 1:
            raise UsageError(f"--placeholder_token: {name!r} is already a word of the vocabulary; allowed is a new word, such as newclas")
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


def tokenize(tokenizer, prompts: list[str], *tokens: list[str]) -> torch.Tensor:
    """Prompts to token ids (B, L), padded to the text encoder's length; a placeholder becomes the words of all its vectors.

    Args:
        tokens: the names of each, from :func:`vector_names`; words of the tokenizer.

    Raises:
        UsageError: a prompt is longer than that.
    """
    limit = tokenizer.model_max_length
    for names in tokens:
        prompts = [re.sub(rf"\b{names[0]}\b", " ".join(names), p) for p in prompts]
    input_ids = [tokenizer(p, verbose=False).input_ids for p in prompts]
    for prompt, ids in zip(prompts, input_ids, strict=True):
        if len(ids) > limit:
            raise UsageError(f"--prompt: {prompt!r} takes {len(ids)} tokens; allowed are at most {limit}, begin and end included")
    return tokenizer(prompts, padding="max_length", max_length=limit, return_tensors="pt").input_ids


def token_tensors(token: ClassToken) -> dict[str, torch.Tensor]:
    """What the token's file holds: ``{placeholder: (N, width) float32}``, the format of diffusers' textual inversion."""
    return {token.placeholder: token.vector.detach().cpu().clone()}


def read_origin(path: Path) -> dict[str, str]:
    """What a token file says of its origin ("model", "classifier", ...); empty where it says nothing or is no token file."""
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError):
        return {}


def fingerprint(vectors: torch.Tensor) -> str:
    """A token's vectors (N, width) as a short text that no others have."""
    return hashlib.sha256(vectors.detach().float().cpu().numpy().tobytes()).hexdigest()


def read_token(path: Path) -> tuple[str, torch.Tensor]:
    """Placeholder and vectors (N, width), float32, of a token file: diffusers' textual inversion, or ``emb_params`` of the web UIs.

    The placeholder of the latter is the file's name, as it is for the programs that read it.

    Raises:
        UsageError: the file is no safetensors file or does not hold exactly one token.
    """
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        start = path.open("rb").read(2) if path.is_file() else b""
        if start == b"PK" or start[:1] == b"\x80":  # what torch.save writes, and wrote long ago
            raise UsageError(f"{path}: is a pickled file, which may run code when it is read; allowed is a safetensors file") from error
        raise UsageError(f"{path}: not a readable safetensors file ({one_line(error)})") from error
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if {"clip_l", "clip_g"} & set(tensors):
        raise UsageError(f"{path}: holds {shapes}, a token of a model with two text encoders; allowed is one of a Stable Diffusion 1 or 2")
    if len(tensors) != 1 or any(len(shape) not in (1, 2) or 0 in shape for shape in shapes.values()):
        raise UsageError(f"{path}: holds {shapes}; a class token's file holds one vector, or several of one width, under its placeholder")
    ((name, vector),) = tensors.items()
    vector = vector.float().reshape(-1, vector.shape[-1])  # (N, width)
    if not vector.isfinite().all():
        raise UsageError(f"{path}: its vector has values that are not finite")
    return path.stem if name == WEB_UI_KEY else name, vector
