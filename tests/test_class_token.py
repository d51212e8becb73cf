"""The splice: one vector, and nothing else of the text encoder changes."""

import pytest
import torch
from conftest import weight_hashes
from safetensors.torch import save_file

from discriminative.errors import UsageError
from discriminative.records.files import write_tensors
from discriminative.tokens.class_token import ClassToken
from discriminative.tokens.files import read_token, token_tensors


def encode_plainly(models, prompt):
    ids = models.tokenizer(prompt, padding="max_length", return_tensors="pt").input_ids
    return models.text_encoder(ids).last_hidden_state


def test_initial_token_reads_as_its_initializer(models, token):
    torch.testing.assert_close(
        token.encode(["a photo of newclas cat"]), encode_plainly(models, "a photo of a cat"), rtol=0, atol=0
    )


def test_spliced_word_reads_as_a_row_of_a_resized_table(models, token):
    with torch.no_grad():
        token.vector.normal_()
    ours = token.encode(["newclas cat"])
    with torch.no_grad():
        models.text_encoder.resize_token_embeddings(len(models.tokenizer))
        models.text_encoder.get_input_embeddings().weight[token.first_id] = token.vector[0]
    torch.testing.assert_close(ours, encode_plainly(models, "newclas cat"), rtol=0, atol=0)


def test_gradient_reaches_the_vector_and_no_weight(models, token):
    token.encode(["a photo of newclas cat"]).square().sum().backward()
    assert token.vector.grad.abs().sum() > 0
    assert all(p.grad is None for p in models.text_encoder.parameters())


def test_text_encoder_is_as_before_after_the_splice(models, token):
    table = models.text_encoder.get_input_embeddings()
    before = weight_hashes(models.text_encoder)
    with pytest.raises(RuntimeError, match="inside"), token.spliced():
        assert models.text_encoder.get_input_embeddings() is not table
        raise RuntimeError("inside")
    assert models.text_encoder.get_input_embeddings() is table
    assert weight_hashes(models.text_encoder) == before


def test_prompts_without_the_placeholder_do_not_see_the_vector(token):
    before = token.encode(["a photo of cat"])
    with torch.no_grad():
        token.vector.fill_(100.0)
    assert torch.equal(before, token.encode(["a photo of cat"]))


def test_each_distinct_prompt_is_encoded_once(models, token):
    sizes = []
    handle = models.text_encoder.register_forward_hook(
        lambda m, args, kwargs, out: sizes.append(len(out[0])), with_kwargs=True
    )
    hidden = token.encode(["a cat", "a bat", "a cat"])
    handle.remove()
    assert sizes == [2]
    assert torch.equal(hidden[0], hidden[2])


def test_token_survives_its_file(tmp_path, models, token):
    with torch.no_grad():
        token.vector.normal_()
    write_tensors(tmp_path / "x" / "learned_embeds.safetensors", token_tensors(token), {"class_name": "cat"})
    placeholder, vector = read_token(tmp_path / "x" / "learned_embeds.safetensors")
    assert placeholder == "newclas"
    assert torch.equal(vector, token.vector)
    assert [p.name for p in (tmp_path / "x").iterdir()] == ["learned_embeds.safetensors"]


def test_a_file_whose_first_byte_is_that_of_a_pickle_is_read(tmp_path):
    """A safetensors file begins with the length of its header, any multiple of 8.

    128 reads as a pickle's mark.
    """
    for padding in range(256):
        path = tmp_path / "t.safetensors"
        save_file({"newclas": torch.ones(1, 4)}, path, {"note": "x" * padding})
        if path.read_bytes()[0] == 0x80:
            break
    assert path.read_bytes()[0] == 0x80
    assert read_token(path)[1].shape == (1, 4)


def test_bad_words_are_refused_by_flag(models):
    with pytest.raises(UsageError, match="--placeholder_token: 'cat' is already a word"):
        ClassToken(models, "cat", "a")
    with pytest.raises(UsageError, match="--initializer_token: 'xyz' takes 3 tokens"):
        ClassToken(models, "newclas", "xyz")


def test_long_prompt_is_refused_with_its_length(token):
    with pytest.raises(UsageError, match="takes 22 tokens; allowed are at most 16"):
        token.encode(["cat " * 20])


def test_bad_token_files_are_refused(tmp_path, token):
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(b"no tensors here")
    with pytest.raises(UsageError, match="not a readable safetensors file"):
        read_token(damaged)
    save_file({"a": torch.zeros(1), "b": torch.zeros(1)}, tmp_path / "two.safetensors")
    with pytest.raises(UsageError, match="one vector"):
        read_token(tmp_path / "two.safetensors")
    with pytest.raises(UsageError, match=r"shape \(1, 8\); this text encoder takes \(1, 16\)"):
        token.load(torch.zeros(1, 8))


def test_a_start_is_a_word_the_mean_of_words_or_of_all_whole_words(token):
    tokenizer = token.models.tokenizer
    table = token.table
    tiger, cat = (table[tokenizer.convert_tokens_to_ids(f"{w}</w>")] for w in ("tiger", "cat"))
    assert torch.equal(token.start_vector("initializer", "tiger cat"), token.vector)
    assert torch.equal(token.start_vector("cat", "bat")[0], cat)
    torch.testing.assert_close(token.start_vector("class", "tiger cat")[0], (tiger + cat) / 2)
    torch.testing.assert_close(token.start_vector("tiger+cat", "bat")[0], (tiger + cat) / 2)
    whole = [
        i for w, i in tokenizer.get_vocab().items() if w.endswith("</w>") and w[:-4].isalpha() and len(w) > 6
    ]
    torch.testing.assert_close(token.start_vector("vocabulary", "bat")[0], table[whole].mean(0))
    assert len(token.table) > len(whole) > 1


def test_a_token_of_several_vectors_that_takes_over_one_is_one_word(models):
    """It reads as the plain prompt then, to the bit; and takes over several again."""
    token = ClassToken(models, "newclas", "a", 2)
    several = torch.randn(2, token.vector.shape[1])
    token.load(token.word_mean("a"))
    assert token.names == ["newclas"]
    plain = encode_plainly(models, "photo of a cat")
    torch.testing.assert_close(token.encode(["photo of newclas cat"]), plain, rtol=0, atol=0)
    token.load(several)
    assert token.names == ["newclas", "newclas_1"]
    assert torch.equal(token.vector, several)
    with pytest.raises(UsageError, match=r"shape \(3, 16\); this text encoder takes \(2, 16\)"):
        token.load(torch.zeros(3, token.vector.shape[1]))


def test_of_several_vectors_the_first_starts_as_the_article(models):
    start = ClassToken(models, "newclas", "a", 3).start_vector("class", "cat")
    one = ClassToken(models, "single", "a")
    words = [one.start_vector(word, "cat") for word in ("initializer", "cat", "cat")]
    assert torch.equal(start, torch.cat(words))
