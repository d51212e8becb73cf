"""The class token: prompts that hold it, its trainable vector (or a few), and the file that keeps it.

The vectors are spliced into the text encoder's input embeddings by a small module. The embedding table
itself is neither resized nor copied nor trained, so every other word keeps its embedding bit for bit.
"""

import math
import re
from contextlib import contextmanager
from functools import cached_property

import torch

from discriminative.diffusion.models import DiffusionModels
from discriminative.diffusion.sampler import SamplerSettings, sample
from discriminative.errors import UsageError
from discriminative.tokens.prompts import check_words, tokenize, vector_names

WHOLE_WORD = re.compile(r"[a-z]{3,}</w>")  # in CLIP's vocabulary


class SplicedEmbedding(torch.nn.Module):
    """An embedding table with a few more words, whose vectors live outside the table.

    Args:
        table: the text encoder's own embedding, frozen, or one that knows another token already.
        first_id: id of the first new word, beyond the table; the others follow.
        vectors: (N, width), float32; gradients reach them and nothing else.
    """

    def __init__(self, table: torch.nn.Module, first_id: int, vectors: torch.Tensor):
        super().__init__()
        self.table = table
        self.first_id = first_id
        self.vectors = vectors

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Token ids (B, L) to embeddings (B, L, width)."""
        new = (input_ids >= self.first_id) & (input_ids < self.first_id + len(self.vectors))  # (B, L)
        words = self.table(input_ids.masked_fill(new, 0))  # (B, L, width)
        for i, vector in enumerate(self.vectors):
            words = torch.where((input_ids == self.first_id + i).unsqueeze(-1), vector.to(words.dtype), words)
        return words


class ClassToken:
    """A placeholder word and its vectors (N, width), the only parameter that is ever trained; N is 1 in
    the paper.

    Args:
        models: the frozen parts; their tokenizer learns the placeholder as a word beyond the embedding table.
        placeholder: the new word; in prompts it stands for all of its vectors.
        initializer: a word of one token whose embedding each vector starts from.
        num_vectors: N at most; a token that is loaded may have fewer.

    Raises:
        UsageError: the placeholder is a word already, or the initializer is not one token.
    """

    def __init__(self, models: DiffusionModels, placeholder: str, initializer: str, num_vectors: int = 1):
        check_words(models.tokenizer, placeholder, initializer, num_vectors)
        self.models = models
        self.placeholder = placeholder
        self.num_vectors = num_vectors
        self.initializer = initializer
        models.tokenizer.add_tokens(vector_names(placeholder, num_vectors))
        self.first_id = models.tokenizer.convert_tokens_to_ids(placeholder)
        self.vector = torch.nn.Parameter(self.word_mean(initializer).repeat(num_vectors, 1))  # (N, width)
        self.others: list[
            tuple[list[str], int, torch.Tensor]
        ] = []  # names, first id and vectors of tokens that prompts may hold too

    @property
    def names(self) -> list[str]:
        """The words that the placeholder stands for, one for each vector."""
        return vector_names(self.placeholder, len(self.vector))

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
        for first_id, vectors in [
            *((first_id, vectors) for _, first_id, vectors in self.others),
            (self.first_id, self.vector),
        ]:
            words = SplicedEmbedding(words, first_id, vectors)
        encoder.set_input_embeddings(words)
        try:
            yield
        finally:
            encoder.set_input_embeddings(table)

    def encode(self, prompts: list[str]) -> torch.Tensor:
        """Prompts to ``encoder_hidden_states`` (B, L, width), padded as the pipeline pads; each distinct
        prompt is encoded once.

        Raises:
            UsageError: a prompt is longer than the text encoder takes.
        """
        distinct = list(dict.fromkeys(prompts))
        input_ids = tokenize(self.models.tokenizer, distinct, self.names, *(o[0] for o in self.others)).to(
            self.models.device
        )  # (D, L)
        with self.spliced():
            hidden = self.models.text_encoder(input_ids).last_hidden_state  # (D, L, width)
        rows = torch.tensor([distinct.index(p) for p in prompts], device=hidden.device)
        return hidden[rows].to(self.models.dtype)  # (B, L, width)

    def stands_in(self, prompts: list[str]) -> bool:
        """Whether this token, or another that was joined, is in one of the prompts."""
        names = [self.names, *(names for names, _, _ in self.others)]
        new = self.models.tokenizer.convert_tokens_to_ids([word for words in names for word in words])
        input_ids = tokenize(self.models.tokenizer, list(dict.fromkeys(prompts)), *names)  # (D, L)
        return bool(torch.isin(input_ids, torch.tensor(new)).any())

    @cached_property
    def unconditional(self) -> torch.Tensor:
        """``encoder_hidden_states`` of the empty prompt (1, L, D); the same for the whole run, as no
        token is in it."""
        with torch.no_grad():
            return self.encode([""])

    @torch.no_grad()
    def sample(self, prompts: list[str], seeds: list[int], settings: SamplerSettings) -> torch.Tensor:
        """Images (B, 3, H, W) in [0, 1] of prompts, with or without the token, each from its own seed."""
        return sample(self.models, self.encode(prompts), self.unconditional, seeds, settings)

    @property
    def table(self) -> torch.Tensor:
        """The vocabulary's embeddings (V, width), float32."""
        return self.models.text_encoder.get_input_embeddings().weight.detach().float()

    @cached_property
    def word_norm(self) -> float:
        """Norm of a word's embedding: the 0.9 quantile over the vocabulary, as pieces that no caption
        holds are shorter."""
        return self.table.norm(dim=1).quantile(0.9).item()

    @property
    def word_rms(self) -> float:
        """Root mean square of the numbers of a word's embedding."""
        return self.word_norm / math.sqrt(self.vector.shape[1])

    def word_mean(self, words: str) -> torch.Tensor:
        """Mean embedding (1, width) of the tokens of words."""
        return self.table[self.models.tokenizer(words, add_special_tokens=False).input_ids].mean(
            0, keepdim=True
        )

    @property
    def vocabulary_mean(self) -> torch.Tensor:
        """Mean embedding (1, width) of the vocabulary's whole words."""
        # Sorted: the mean's last bits follow the order.
        whole = sorted(
            i
            for word, i in self.models.tokenizer.get_vocab().items()
            if WHOLE_WORD.fullmatch(word) and i < self.first_id
        )
        return self.table[whole].mean(0, keepdim=True)

    def start_vector(self, start: str, class_name: str) -> torch.Tensor:
        """Vectors (N, width) to start learning from. Of several the first is the initializer's: what follows
        the article "a" can be what an adjective is.

        Args:
            start: "class", the mean of the class name's words; "vocabulary", the mean of all whole words;
                "initializer"; a word of one's own; or several of these, joined by "+", whose mean it is.
            class_name: the name of the class in the prompts.
        """
        named = {"initializer": self.initializer, "class": class_name}
        parts = [
            self.vocabulary_mean if part == "vocabulary" else self.word_mean(named.get(part, part))
            for part in start.split("+")
        ]
        vectors = torch.stack(parts).mean(0).repeat(len(self.vector), 1)  # (N, width)
        if len(vectors) > 1:
            vectors[:1] = self.word_mean(self.initializer)
        return vectors

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
        """Take over vectors (M, width), or one (width,): the token is M words then, at most N.

        Raises:
            UsageError: they are more, or of another width.
        """
        rows = vector.reshape(-1, vector.shape[-1])  # (M, width)
        if rows.shape[1] != self.vector.shape[1] or len(rows) > self.num_vectors:
            raise UsageError(
                f"the token's vector has shape {tuple(vector.shape)}; this text encoder takes "
                f"{(self.num_vectors, self.vector.shape[1])}"
            )
        if len(rows) != len(self.vector):  # an optimizer's parameter keeps its shape
            self.vector = torch.nn.Parameter(self.vector.new_empty(rows.shape))
        self.vector.copy_(rows)
