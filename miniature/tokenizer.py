"""Stage ``tokenizer``: a CLIPTokenizer whose byte-pair merges are learned from the captions, so that each
word is one token."""

import json
import re
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer

from miniature.scenes import BACKGROUNDS, CLASSES, PLURALS
from miniature.training import renders

MAX_LENGTH = 24  # tokens of a prompt, begin and end included
SPECIAL = ["<|startoftext|>", "<|endoftext|>"]


def train(work: Path, device, renders_number: int, steps: int | None) -> None:
    """Learn the merges and write ``<work>/tokenizer/`` (``device`` and ``steps`` play no part: counting
    needs neither)."""
    captions = renders(work, "train", renders_number).captions
    words = [*(c.label for c in CLASSES), *BACKGROUNDS, *(PLURALS.get(c.name, c.name + "s") for c in CLASSES)]
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.normalizer = normalizers.Lowercase()
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", "removed"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    learner.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=4096, min_frequency=1, initial_alphabet=alphabet, end_of_word_suffix="</w>"
    )
    learner.train_from_iterator([*captions, *words * 50], trainer)
    merges = [tuple(m) for m in json.loads(learner.to_str())["model"]["merges"]]
    # CLIP's layout: bytes, bytes that end a word, merges in order, the two special tokens last.
    tokens = [*alphabet, *(a + "</w>" for a in alphabet), *("".join(m) for m in merges), *SPECIAL]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_LENGTH)
    spelled = {w for text in [*captions, *words] for w in re.findall("[a-z]+", text)}
    split = sorted(w for w in spelled if len(tokenizer.tokenize(w)) > 1)
    if split:
        raise RuntimeError(f"words of the captions that take several tokens: {split}")
    tokenizer.save_pretrained(work / "tokenizer")
    print(f"tokenizer: {len(vocab)} tokens, {len(merges)} merges, longest prompt {MAX_LENGTH}")
