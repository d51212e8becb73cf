"""Prompts: templates, the words of a token in them, and their token ids."""

import re
from pathlib import Path

import torch

from discriminative.errors import UsageError
from discriminative.hub import one_line

# The official list's first three, without articles:
# the baseline has "a" in the token's place.
TEMPLATES = (
    "A photo of {token} {class}",
    "a high resolution realistic image of {token} {class}",
    "A close-up photo of {token} {class}",
)


def fill(template: str, word: str, class_name: str) -> str:
    """A template with the class token (or the baseline's word) and the class name: "A photo of newclas
    tiger cat"."""
    return template.replace("{token}", word).replace("{class}", class_name)


def check_fields(prompt: str, flag: str, fields: tuple[str, ...] = ("{token}", "{class}")) -> None:
    """Check that a prompt has nothing in braces but what is filled in.

    Raises:
        UsageError: it has, and would be drawn with the braces in it.
    """
    rest = prompt
    for field in fields:
        rest = rest.replace(field, "")
    strange = re.search(r"\{[^{}]*\}?|\}", rest)
    if strange:
        raise UsageError(
            f"--{flag}: {prompt!r} holds {strange[0]!r}, which nothing stands for; "
            f"allowed in braces are {' and '.join(fields)}"
        )


def read_prompts(path: str, flag: str, what: str = "prompt") -> list[str]:
    """The prompts of a text file, one a line; empty lines and those that begin with # are left out.

    Args:
        what: the lines are, for the error.

    Raises:
        UsageError: it cannot be read, or holds none.
    """
    try:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        reason = one_line(error)
        raise UsageError(f"--{flag}: {path!r} was given, which cannot be read ({reason})") from error
    prompts = [line for line in lines if line and not line.startswith("#")]
    if not prompts:
        raise UsageError(
            f"--{flag}: {path!r} was given, which holds no {what}; allowed is a text file with one a line"
        )
    return prompts


def read_phrases(path: str, flag: str) -> list[str]:
    """The phrases of a text file, read as :func:`read_prompts` does.

    Raises:
        UsageError: it cannot be read, holds none, or one twice.
    """
    phrases = read_prompts(path, flag, "phrase")
    known = set()
    for phrase in phrases:
        if phrase.casefold() in known:
            raise UsageError(f"--{flag}: {path!r} holds {phrase!r} twice; allowed is each phrase once")
        known.add(phrase.casefold())
    return phrases


def vector_names(placeholder: str, number: int) -> list[str]:
    """The words of a token of several vectors, as diffusers names them: "newclas", "newclas_1",
    "newclas_2"."""
    return [placeholder] + [f"{placeholder}_{i}" for i in range(1, number)]


def check_words(tokenizer, placeholder: str, initializer: str, num_vectors: int = 1) -> None:
    """Check that the placeholder is new to the vocabulary and that the initializer is one token of it.

    Raises:
        UsageError: naming the flag.
    """
    for name in vector_names(placeholder, num_vectors):
        if is_word(tokenizer, name):
            raise UsageError(
                f"--placeholder_token: {name!r} is already a word of the vocabulary; "
                f"allowed is a new word, such as {new_word(tokenizer, num_vectors)}"
            )
    pieces = tokenizer.tokenize(initializer)
    if len(pieces) != 1:
        raise UsageError(
            f"--initializer_token: {initializer!r} takes {len(pieces)} tokens; "
            "allowed is a word of one token, such as a"
        )


def is_word(tokenizer, name: str) -> bool:
    """Whether the vocabulary has a name as one word."""
    return len(tokenizer.tokenize(name)) == 1


def new_word(tokenizer, num_vectors: int) -> str:
    """A placeholder that the vocabulary does not have, nor any of its vectors' names."""
    candidates = ("newclas", *(f"newclas{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"))
    free = (w for w in candidates if not any(is_word(tokenizer, n) for n in vector_names(w, num_vectors)))
    return next(free, "one with digits in it")


def spelled_words(tokenizer, text: str) -> list[str]:
    """The words of a text that the vocabulary spells, in ones and twos of letters, rather than knows."""
    words = re.findall(r"\w{3,}", text.lower())
    return [word for word in words if len(tokenizer.tokenize(word)) > len(word) / 2]


def check_apart(placeholder: str, prompts: list[str]) -> None:
    """Check that no word of the prompts holds the placeholder as a part: a tokenizer finds an added word
    anywhere.

    Raises:
        UsageError: one does.
    """
    lowered = placeholder.lower()
    words = {word for prompt in prompts for word in re.findall(r"\w+", prompt.lower())} - {lowered}
    clash = sorted(word for word in words if lowered in word)
    if clash:
        raise UsageError(
            f"--placeholder_token: {placeholder!r} is a part of {clash[0]!r} in the prompts; "
            "allowed is a word that is in none"
        )


def tokenize(tokenizer, prompts: list[str], *tokens: list[str]) -> torch.Tensor:
    """Prompts to token ids (B, L), padded to the text encoder's length.

    Args:
        tokens: the names of each, from :func:`vector_names`; a placeholder becomes the words of all its
            vectors.

    Raises:
        UsageError: a prompt is longer than that.
    """
    limit = tokenizer.model_max_length
    for names in tokens:
        # In any case: the tokenizer lowers it.
        word = re.compile(rf"\b{re.escape(names[0])}\b", re.IGNORECASE)
        prompts = [word.sub(" ".join(names), prompt) for prompt in prompts]
    input_ids = [tokenizer(prompt, verbose=False).input_ids for prompt in prompts]
    for prompt, ids in zip(prompts, input_ids, strict=True):
        if len(ids) > limit:
            raise UsageError(
                f"the prompt {prompt!r} takes {len(ids)} tokens; "
                f"allowed are at most {limit}, begin and end included"
            )
    padded = tokenizer(prompts, padding="max_length", max_length=limit, return_tensors="pt")
    return padded.input_ids  # (B, L)
