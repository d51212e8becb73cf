"""What is left behind: files that are whole or as they were, and models that an export does not touch."""

from pathlib import Path

import diffusers
import pytest
import torch
from conftest import tiny_classifier, tiny_models, weight_hashes

from discriminative.errors import WorkError
from discriminative.records import files
from discriminative.records.files import write_image, write_json, write_lines, write_tensors, write_text
from discriminative.tokens.class_token import ClassToken
from discriminative.tokens.files import write_pipeline


class Picture:
    """Writes half of itself, looks around, and goes on or breaks off."""

    def __init__(self, look, breaks_off: bool):
        self.look = look
        self.breaks_off = breaks_off

    def save(self, path, *args, **settings):
        Path(path).write_bytes(b"half")
        self.look()
        if self.breaks_off:
            raise OSError("no space left")
        Path(path).write_bytes(b"half and half")


@pytest.fixture(params=["image", "tensors", "text", "json", "lines"])
def written(request, monkeypatch):
    """Each writer, above a library or a system that writes in two halves, with ``look`` in between."""

    def write(path: Path, look, breaks_off: bool) -> None:
        picture = Picture(look, breaks_off)
        monkeypatch.setattr(files, "save_file", lambda tensors, path, metadata: picture.save(path))
        monkeypatch.setattr(Path, "write_text", lambda self, *args, **settings: picture.save(self))
        calls = {
            "image": lambda: write_image(path, picture),
            "tensors": lambda: write_tensors(path, {"newclas": torch.zeros(1, 4)}, {}),
            "text": lambda: write_text(path, "text"),
            "json": lambda: write_json(path, {"a": 1}),
            "lines": lambda: write_lines(path, [{"a": 1}]),
        }
        calls[request.param]()

    return write


def test_a_write_that_breaks_off_leaves_the_old_file_and_nothing_else(written, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(WorkError, match="no space left"):
        written(path, lambda: None, breaks_off=True)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_first_write_that_breaks_off_leaves_no_file_at_all(written, tmp_path):
    with pytest.raises(WorkError, match="no space left"):
        written(tmp_path / "folder" / "file", lambda: None, breaks_off=True)
    assert list((tmp_path / "folder").iterdir()) == []


def test_a_write_that_is_killed_leaves_the_old_file_and_nothing_else(written, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def killed():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        written(path, killed, breaks_off=False)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_whoever_reads_during_a_write_finds_the_old_file_whole(written, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    found = []
    written(path, lambda: found.append(path.read_bytes()), breaks_off=False)
    assert found == [b"old"]
    assert path.read_bytes() == b"half and half"
    assert list(tmp_path.iterdir()) == [path]


def test_whoever_has_opened_the_old_file_reads_it_to_its_end(written, tmp_path):
    """The new file takes its place by name alone: a copy onto it would show half of either."""
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with path.open("rb") as file:
        written(path, lambda: None, breaks_off=False)
        assert file.read() == b"old"


def test_whoever_reads_during_a_first_write_finds_no_file(written, tmp_path):
    path = tmp_path / "file"
    found = []
    written(path, lambda: found.append(path.exists()), breaks_off=False)
    assert found == [False]
    assert path.read_bytes() == b"half and half"


# --- the export of a whole pipeline


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def token(request):
    """A token of two vectors that no vocabulary holds; the text encoder is in float32 beside any UNet."""
    models = tiny_models(dtype=request.param)
    models.text_encoder.float()
    token = ClassToken(models, "newclas", "a", 2)
    token.load(torch.arange(32.0).reshape(2, 16) / 32)
    return token


def state_of(token) -> dict:
    """All of the live models that an export might change."""
    models = token.models
    embeddings = models.text_encoder.get_input_embeddings()
    return {
        "text encoder": id(models.text_encoder),
        "table": id(embeddings),
        "words": tuple(embeddings.weight.shape),
        "vocabulary": models.text_encoder.config.vocab_size,
        "tokenizer": len(models.tokenizer),
        "weights": weight_hashes(models.text_encoder),
        "others": [str(p.dtype) for m in (models.unet, models.vae) for p in m.parameters()],
        "precision": {p.dtype for p in models.text_encoder.parameters()},
        "frozen": {p.requires_grad for p in models.text_encoder.parameters()},
        "vectors": token.vector.tolist(),
        "trainable": token.vector.requires_grad,
    }


def test_an_export_leaves_the_live_models_as_they_were(token, tmp_path):
    before = state_of(token)
    encoded = token.encode(["a photo of newclas cat"])
    write_pipeline(tmp_path / "pipeline", token)
    assert state_of(token) == before
    assert torch.equal(token.encode(["a photo of newclas cat"]), encoded)
    token.encode(["newclas"]).float().sum().backward()
    assert token.vector.grad.abs().sum() > 0


def test_an_exported_table_has_the_old_words_and_behind_them_the_vectors(token, tmp_path):
    table = token.table.clone()
    write_pipeline(tmp_path / "pipeline", token)
    written = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "pipeline", safety_checker=None)
    words = written.text_encoder.get_input_embeddings().weight.detach()
    rounded = token.models.dtype  # a whole pipeline has one precision
    assert torch.equal(words[: len(table)], table.to(rounded).float())
    assert torch.equal(words[token.first_id : token.first_id + 2], token.vector.detach().to(rounded).float())
    assert written.tokenizer.convert_tokens_to_ids("newclas_1") == token.first_id + 1


def test_an_export_that_breaks_off_leaves_the_last_one_and_no_other_folder(token, tmp_path, monkeypatch):
    folder = tmp_path / "pipeline"
    write_pipeline(folder, token)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    def full(self, path):
        Path(path).mkdir()
        (Path(path) / "half.safetensors").write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(diffusers.StableDiffusionPipeline, "save_pretrained", full)
    with pytest.raises(WorkError, match="no space left"):
        write_pipeline(folder, token)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert list(tmp_path.iterdir()) == [folder]


def test_a_classifier_that_fails_keeps_no_hook():
    classifier = tiny_classifier()
    with pytest.raises(RuntimeError):
        classifier.look(torch.zeros(1, 4, 9, 9))
    assert not any(m._forward_pre_hooks for m in classifier.model.modules())
