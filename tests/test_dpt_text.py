"""The text side: the pipeline's own states, the end token's for matching, and where tokens stand.

pytest tests/test_dpt_text.py
"""

import json

import pytest
import torch
from conftest import tiny_models, weight_hashes

from discriminative.diffusion.models import load_models
from discriminative.errors import UsageError
from dpt.text import Condition, PipelineSide, RobertaSide, piece_offsets

TEXTS = ["a red bird", "", "the cat left of the mushroom", "a red bird"]
ODD = ["A  Photo of\tthe red bird, left-most", "café 🙂 x", "", " two  cars ", "İa É"]


@pytest.fixture(scope="module")
def miniature():
    return load_models("miniature", torch.device("cpu"), torch.float32)


@pytest.fixture(scope="module")
def condition(miniature):
    return Condition(miniature.tokenizer, miniature.text_encoder)


def letters_of_bytes():
    """CLIP's letters for bytes: the printable ones for themselves, then the others from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


@pytest.fixture(scope="module")
def roberta_folder(tmp_path_factory):
    """A RoBERTa of a few thousand random weights, with dropout, and a tokenizer of single bytes and "red"."""
    from transformers import RobertaConfig, RobertaModel

    folder = tmp_path_factory.mktemp("roberta")
    words = ["<s>", "<pad>", "</s>", "<unk>", *letters_of_bytes().values(), "re", "red", "<mask>"]
    vocab = {word: i for i, word in enumerate(words)}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\nr e\nre d\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "RobertaTokenizer"}))
    config = RobertaConfig(
        vocab_size=len(vocab),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=40,
    )
    torch.manual_seed(0)
    RobertaModel(config).save_pretrained(folder)
    return folder


# What the UNet is told, and what matching aims at.


def test_states_are_those_of_the_pipeline(miniature, condition):
    encoded = condition.encode(TEXTS)
    ids = miniature.tokenizer(TEXTS, padding="max_length", max_length=24, return_tensors="pt").input_ids
    with torch.no_grad():
        states = miniature.text_encoder(ids)[0]
    assert encoded.states.shape == (4, 24, condition.width)
    assert torch.allclose(encoded.states, states, atol=1e-5)


def test_pooled_is_the_end_tokens_state_as_transformers_pools_it(miniature, condition):
    encoded = condition.encode(TEXTS)
    ids = miniature.tokenizer(TEXTS, padding="max_length", max_length=24, return_tensors="pt").input_ids
    with torch.no_grad():
        pooled = miniature.text_encoder(ids).pooler_output
    assert torch.allclose(encoded.pooled, pooled, atol=1e-5)
    ends = encoded.mask.sum(dim=1) - 1
    assert torch.equal(encoded.pooled, encoded.states[torch.arange(4), ends])


def legacy(models):
    """The text encoder as SD 1.4's configuration has it, with a wrong end token."""
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(**models.text_encoder.config.to_dict() | {"eos_token_id": 2})
    encoder = CLIPTextModel(config).eval()
    encoder.load_state_dict(models.text_encoder.state_dict())
    return encoder


def test_pooled_is_transformers_in_old_configurations_too():
    models = tiny_models()
    encoder = legacy(models)
    texts = ["a photo of cat", "blue bat"]
    ids = models.tokenizer(texts, padding="max_length", max_length=16, return_tensors="pt").input_ids
    assert torch.allclose(
        Condition(models.tokenizer, encoder).encode(texts).pooled, encoder(ids).pooler_output, atol=1e-5
    )


def test_an_added_word_is_not_taken_for_the_end_in_old_configurations():
    from discriminative.tokens.class_token import ClassToken

    models = tiny_models()
    models.text_encoder = legacy(models)
    token = ClassToken(models, "newclas", "a")
    with token.spliced():
        encoded = Condition(models.tokenizer, models.text_encoder).encode(["a newclas cat"])
    end = encoded.mask.sum() - 1
    assert torch.equal(encoded.pooled[0], encoded.states[0, end])


def test_a_class_token_stays_trainable_while_texts_are_encoded():
    from discriminative.tokens.class_token import ClassToken

    models = tiny_models()
    condition = Condition(models.tokenizer, models.text_encoder)
    token = ClassToken(models, "newclas", "a")
    with token.spliced():
        condition.encode(["a newclas cat"])
    assert token.vector.requires_grad


def test_words_as_a_target_are_all_states_between_begin_and_end(miniature):
    condition = Condition(miniature.tokenizer, miniature.text_encoder)
    condition.target = "words"
    encoded = condition.encode(["a frog", "a photo of a car"])
    assert torch.equal(encoded.pooled[0, 1:3], encoded.states[0, 1:3])
    is_word = encoded.pooled.abs().sum(dim=2) > 0
    assert is_word.sum(dim=1).tolist() == (encoded.mask.sum(dim=1) - 2).tolist()
    assert not is_word[:, 0].any()


def test_each_distinct_text_is_encoded_once(miniature, condition):
    rows = []
    handle = miniature.text_encoder.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    encoded = condition.encode(TEXTS)
    handle.remove()
    assert rows == [3]
    assert torch.equal(encoded.states[0], encoded.states[3])


def test_a_text_that_is_too_long_is_cut_before_its_end_token(condition):
    encoded = condition.encode(["x " * 60])
    assert encoded.mask.sum() == 24
    assert torch.equal(encoded.pooled, encoded.states[:, -1])


def test_frozen_encoders_never_train():
    models = tiny_models()
    models.text_encoder.requires_grad_(True)
    condition = Condition(models.tokenizer, models.text_encoder)
    models.text_encoder.train()
    encoded = condition.encode(["a cat"])
    assert not any(module.training for module in models.text_encoder.modules())
    assert not any(p.requires_grad for p in models.text_encoder.parameters())
    assert not encoded.states.requires_grad


def test_a_half_precision_encoder_gives_float32():
    models = tiny_models()
    encoded = Condition(models.tokenizer, models.text_encoder.bfloat16()).encode(["a cat"])
    assert (encoded.states.dtype, encoded.pooled.dtype) == (torch.float32, torch.float32)


# The pipeline's own side of the alignment.


def test_the_pipelines_side_has_its_states_and_a_mask_of_its_tokens(condition):
    side = PipelineSide(condition)
    states, mask = side.tokens(TEXTS)
    assert side.width == states.shape[2] == 128
    assert torch.equal(states, condition.encode(TEXTS).states)
    assert mask.sum(dim=1).tolist() == [len(side.offsets(text)) for text in TEXTS]


def test_offsets_stand_at_the_tokens_places(miniature, condition):
    text = "a red bird left of the cat"
    offsets = PipelineSide(condition).offsets(text)
    pieces = miniature.tokenizer.convert_ids_to_tokens(miniature.tokenizer(text).input_ids)
    assert offsets[0] == offsets[-1] == (0, 0)
    for piece, (start, end) in list(zip(pieces, offsets, strict=True))[1:-1]:
        assert text[start:end] == piece.removesuffix("</w>")


@pytest.mark.parametrize("text", ODD)
def test_pieces_are_found_where_a_fast_tokenizer_has_them(miniature, text):
    tokenizer = miniature.tokenizer
    found = tokenizer(text, return_offsets_mapping=True)
    pieces = [
        None if i in tokenizer.all_special_ids else tokenizer.convert_ids_to_tokens(i)
        for i in found.input_ids
    ]
    decoder = {letter: byte for byte, letter in letters_of_bytes().items()}
    assert piece_offsets(pieces, text, decoder) == [tuple(pair) for pair in found.offset_mapping]


def test_a_slow_tokenizer_has_offsets_too(miniature):
    class Slow:
        is_fast = False
        byte_decoder = {letter: byte for byte, letter in letters_of_bytes().items()}

        def __getattr__(self, name):
            return getattr(miniature.tokenizer, name)

        def __call__(self, *args, **kwargs):
            assert "return_offsets_mapping" not in kwargs
            return miniature.tokenizer(*args, **kwargs)

    text = "The red bird"
    fast = PipelineSide(Condition(miniature.tokenizer, miniature.text_encoder)).offsets(text)
    slow = PipelineSide(Condition(Slow(), miniature.text_encoder)).offsets(text)
    assert slow == [tuple(pair) for pair in fast]


def test_a_piece_that_the_text_does_not_hold_has_no_place():
    decoder = {letter: byte for byte, letter in letters_of_bytes().items()}
    assert piece_offsets([None, "dog</w>", "cat</w>"], "a cat", decoder) == [(0, 0), (0, 0), (2, 5)]


# RoBERTa.


def test_robertas_side_has_states_a_mask_and_offsets(roberta_folder):
    side = RobertaSide(str(roberta_folder))
    states, mask = side.tokens(["a red bird", "red", "a red bird"])
    assert states.shape == (3, mask.shape[1], side.width)
    assert torch.equal(states[0], states[2])
    assert mask.sum(dim=1).tolist() == [len(side.offsets("a red bird")), len(side.offsets("red"))] + [
        len(side.offsets("a red bird"))
    ]
    assert side.offsets("a red") == [(0, 0), (0, 1), (2, 2), (2, 5), (0, 0)]


def test_padding_changes_no_state_of_roberta(roberta_folder):
    side = RobertaSide(str(roberta_folder))
    alone, _ = side.tokens(["red"])
    beside, mask = side.tokens(["red", "a much longer text"])
    assert torch.allclose(alone[0], beside[0, mask[0] == 1], atol=1e-5)


def test_roberta_is_frozen_and_without_dropout(roberta_folder):
    side = RobertaSide(str(roberta_folder))
    before = weight_hashes(side.encoder)
    side.encoder.train()
    once = side.tokens(["a red bird"])[0]
    assert torch.equal(once, side.tokens(["a red bird"])[0])
    assert not any(p.requires_grad for p in side.encoder.parameters())
    assert weight_hashes(side.encoder) == before


def test_a_text_longer_than_roberta_takes_is_cut(roberta_folder):
    side = RobertaSide(str(roberta_folder))
    states, mask = side.tokens(["x" * 100])
    assert states.shape[1] == mask.sum() == len(side.offsets("x" * 100)) == 38


def test_a_damaged_roberta_is_told_in_one_line(roberta_folder, tmp_path):
    import shutil

    folder = tmp_path / "damaged"
    shutil.copytree(roberta_folder, folder)
    (folder / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(UsageError) as error:
        RobertaSide(str(folder), flag="alignment_text")
    message = str(error.value)
    assert message.startswith(
        f"--alignment_text: {str(folder)!r} was given, but the folder could not be loaded"
    )
    assert message.endswith("allowed is a folder or a hub id of a RoBERTa in safetensors")
    assert "\n" not in message


def test_a_folder_without_a_roberta_is_told(tmp_path):
    with pytest.raises(UsageError, match="--text_side: "):
        RobertaSide(str(tmp_path))
