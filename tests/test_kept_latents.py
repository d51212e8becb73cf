"""Images without a token are sampled once: what is kept gives the same bytes; nothing else passes for it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import tiny_classifier, tiny_models
from safetensors.torch import load_file, save_file
from test_session import SHORT, file_of_a_token, pipeline_of
from tiny_folders import save_sd1, save_timm

from apps.session import Session
from config import RunConfig
from discriminative.diffusion import kept as room
from discriminative.diffusion import sampler
from discriminative.diffusion.kept import KeptLatents, fingerprint, weights_fingerprint
from discriminative.guides.classifier import Guide
from discriminative.precision import bf16_without_gradient
from discriminative.records.files import write_tensors
from discriminative.records.layout import RunFolder
from discriminative.settings import SamplerSettings
from discriminative.tokens.class_token import ClassToken
from discriminative.tokens.drawing import images_of
from evaluate import evaluate

CONFIG = RunConfig(class_index=1, evaluate=True, num_inference_steps=2, test_size=5, eval_batch_size=2)
FAST = SamplerSettings(num_inference_steps=2, guidance_scale=7.0)
PLAIN = "a photo of a cat"
WITH_TOKEN = "a photo of newclas cat"
SEEDS = [3, 4]
OF_THE_MOMENT = ("environment", "seconds", "peak_memory_gb")


@pytest.fixture
def kept(token, tmp_path):
    """An empty folder of latents."""
    return KeptLatents(tmp_path / "latents", weights_fingerprint(token.models.unet))


@pytest.fixture
def walks(monkeypatch):
    """The seeds of every batch that is walked from now on."""
    seen = []

    def noted(seeds, *args):
        seen.append(seeds)
        return draw_noise(seeds, *args)

    draw_noise = sampler.draw_noise
    monkeypatch.setattr(sampler, "draw_noise", noted)
    return seen


def drawn(token, kept, prompt=PLAIN, seeds=SEEDS, settings=FAST) -> torch.Tensor:
    """Images (B, 3, H, W) of one prompt."""
    return images_of(token, [prompt] * len(seeds), seeds, settings, kept)


def files(folder: Path) -> dict[Path, bytes]:
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def evaluated(tmp_path, name: str, kept: KeptLatents | None, target: int = 0, **changes) -> RunFolder:
    """The evaluation of a class of the tiny classifier, whose name in prompts is cat."""
    folder = RunFolder(tmp_path / name, "c", "e")
    token = ClassToken(tiny_models(), "newclas", "a")
    token.vector.data.add_(target)  # each class has its own
    guides = [Guide(tiny_classifier(), target)]
    judge = Guide(tiny_classifier(), target)
    evaluate(replace(CONFIG, **changes), token, guides, judge, "cat", folder, kept=kept)
    return folder


def told(folder: RunFolder) -> tuple[dict, str, dict]:
    """An evaluation's figures without times, its rows, and its images byte for byte."""
    result = json.loads(folder.result.read_text())
    figures = {name: value for name, value in result.items() if name not in OF_THE_MOMENT}
    return figures, folder.image_rows.read_text(), files(folder.eval_images)


# --- the same images


def test_an_evaluation_is_the_same_without_a_cache_with_a_cold_and_with_a_warm_one(tmp_path, kept, walks):
    """A last batch of one seed among them."""
    without, cold, warm = (
        told(evaluated(tmp_path, name, which))
        for name, which in (("without", None), ("cold", kept), ("warm", kept))
    )
    assert without == cold == warm
    batches = [[0, 1], [2, 3], [4]]
    assert walks == batches * 5  # the third time those with the token alone


def test_two_senses_of_a_word_share_the_images_without_the_token(tmp_path, kept, walks):
    evaluated(tmp_path, "first", kept)
    walks.clear()
    shared = evaluated(tmp_path, "second", kept, target=1)
    assert len(walks) == 3
    assert told(shared) == told(evaluated(tmp_path, "alone", None, target=1))


def test_full_batches_of_another_number_of_seeds_are_shared(tmp_path, kept, walks):
    """A shorter batch is another one: rounding differs with what is sampled together."""
    evaluated(tmp_path, "five", kept)
    walks.clear()
    seven = evaluated(tmp_path, "seven", kept, test_size=7)
    with_token = [[0, 1], [2, 3], [4, 5], [6]]
    assert walks == [*with_token, [4, 5], [6]]
    assert told(seven) == told(evaluated(tmp_path, "alone", None, test_size=7))


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    """A tiny model and a tiny classifier, as arguments of a session."""
    root = tmp_path_factory.mktemp("saved")
    return save_sd1(root / "sd1"), save_timm(root / "timm")


def test_runs_share_them_below_the_outputs_between_classes_and_experiments(names, tmp_path, monkeypatch):
    taken = []
    monkeypatch.setattr("apps.session.weights_fingerprint", lambda unet: taken.append(unet) or "of the UNet")
    options = SHORT | {"output_path": str(tmp_path / "r"), "prompt_name": "cat"}
    folder = tmp_path / "r" / "cache" / "latents"
    session = Session(*names, **options)
    for number, exp_id in ((1, "default"), (2, "default"), (1, "again")):
        learned = session.load(file_of_a_token(tmp_path / "token.safetensors"), number)
        session.evaluate(learned, exp_id=exp_id)
        assert len(files(folder)) == 2  # seeds, one at a time
    assert len(taken) == 1


def test_a_pipeline_from_elsewhere_keeps_nothing(names, tmp_path):
    """Adapters, hooks and attention of its own are no weights."""
    session = Session(pipeline_of(), names[1], **SHORT | {"output_path": str(tmp_path / "r")})
    session.evaluate(session.load(file_of_a_token(tmp_path / "token.safetensors"), 1))
    assert not (tmp_path / "r" / "cache").exists()


# --- what is sampled anew


def test_a_prompt_with_a_token_is_never_kept(token, kept):
    token.join("classtoken7", torch.ones(1, 16))
    for prompt in (WITH_TOKEN, "a NEWCLAS cat", "a photo of classtoken7"):
        assert torch.equal(drawn(token, kept, prompt), drawn(token, None, prompt))
    assert not kept.folder.exists()
    drawn(token, kept)
    assert len(files(kept.folder)) == 1


OTHERS = {
    "prompt": {"prompt": "a photo of a bat"},
    "seeds": {"seeds": [3, 5]},
    "order": {"seeds": [4, 3]},
    "seeds at once": {"seeds": [3]},
    "steps": {"settings": replace(FAST, num_inference_steps=3)},
    "guidance": {"settings": replace(FAST, guidance_scale=5.0)},
    "scheduler": {"settings": replace(FAST, scheduler="ddim")},
    "size": {"settings": replace(FAST, height=32)},
}


@pytest.mark.parametrize("what", OTHERS)
def test_what_is_asked_for_otherwise_is_sampled_anew(what, token, kept, walks):
    drawn(token, kept)
    for _ in range(2):
        found = drawn(token, kept, **OTHERS[what])
    assert len(walks) == 2
    assert torch.equal(found, drawn(token, None, **OTHERS[what]))


def test_other_weights_or_another_configuration_are_sampled_anew(token, kept, walks):
    drawn(token, kept)
    unet = token.models.unet
    seen = {kept.unet}
    unet.conv_in.weight.data[0, 0, 0, 0] += 1e-6
    seen.add(weights_fingerprint(unet))
    unet.register_to_config(act_fn="gelu")
    seen.add(weights_fingerprint(unet))
    assert len(seen) == 3
    for fingerprinted in seen:
        drawn(token, KeptLatents(kept.folder, fingerprinted))
    assert len(walks) == 3


def test_a_unet_from_another_folder_has_the_same_fingerprint(token, kept, tmp_path):
    token.models.unet.save_pretrained(tmp_path / "unet")
    moved = type(token.models.unet).from_pretrained(tmp_path / "unet")
    assert weights_fingerprint(moved) == kept.unet
    assert weights_fingerprint(moved.to(memory_format=torch.channels_last)) == kept.unet


def test_other_weights_of_the_text_encoder_are_sampled_anew(token, kept, walks):
    drawn(token, kept)
    token.models.text_encoder.get_input_embeddings().weight.data += 1e-3
    drawn(token, kept)
    assert len(walks) == 2


def test_another_precision_or_a_compiled_model_is_sampled_anew(token, kept, walks):
    exact = drawn(token, kept)
    with bf16_without_gradient(token.models):
        assert not torch.equal(drawn(token, kept), exact)
    token.models.is_compiled = True
    drawn(token, kept)
    assert len(walks) == 3


@pytest.mark.parametrize(
    ("name", "other"),
    [("VERSION", "0"), ("FORMAT", 0), ("versions", lambda: {"torch": "1", "diffusers": "1"})],
)
def test_another_version_is_sampled_anew(name, other, token, kept, walks, monkeypatch):
    drawn(token, kept)
    monkeypatch.setattr(room, name, other)
    drawn(token, kept)
    assert len(walks) == 2


def test_another_machine_or_number_of_threads_is_sampled_anew(token, kept, walks, monkeypatch):
    """Both change the last bits."""
    drawn(token, kept)
    threads = torch.get_num_threads()
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads + 1)
    drawn(token, kept)
    monkeypatch.setattr(room, "device_name", lambda device: "another")
    drawn(token, kept)
    assert len(walks) == 3


# --- files that cannot be trusted, and folders that cannot be written


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def one_bit_changed(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-50] ^= 1
    path.write_bytes(content)


def without_a_record(path: Path) -> None:
    save_file(load_file(path), path)


def of_another_shape(path: Path) -> None:
    rewritten(path, load_file(path)["latents"][:1])


def of_another_name(path: Path) -> None:
    save_file({"other": torch.zeros(1)}, path)


def of_another_origin(path: Path) -> None:
    rewritten(path, load_file(path)["latents"] + 1, origin="{}")


def rewritten(path: Path, latents: torch.Tensor, **said: str) -> None:
    """Other latents in a file that says that they are whole."""
    with room.safe_open(path, "pt") as file:
        metadata = file.metadata()
    write_tensors(path, {"latents": latents}, metadata | {"sha256": fingerprint(latents)} | said)


DAMAGES = [emptied, cut, one_bit_changed, without_a_record, of_another_shape, of_another_name]
DAMAGES += [of_another_origin]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_or_foreign_file_is_noted_and_replaced(damage, token, kept, walks, capsys):
    before = drawn(token, kept)
    (path,) = kept.folder.rglob("*.safetensors")
    damage(path)
    assert torch.equal(drawn(token, kept), before)
    note = capsys.readouterr().out
    told = "cannot be read, or is not as it was written; its images are sampled anew"
    assert note == f"note: {path} {told}\n"
    assert torch.equal(drawn(token, kept), before)
    assert len(walks) == 2
    assert not capsys.readouterr().out


@pytest.mark.parametrize("closed", ["pathlib.Path.exists", "discriminative.diffusion.kept.safe_open"])
def test_a_file_that_may_not_be_read_is_sampled_anew(closed, token, kept, walks, monkeypatch, capsys):
    before = drawn(token, kept)

    def refuse(*args):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(closed, refuse)
    assert torch.equal(drawn(token, kept), before)
    assert "cannot be read" in capsys.readouterr().out
    assert len(walks) == 2


def test_a_folder_that_cannot_be_written_is_noted_once_and_loses_nothing(tmp_path, kept, capsys):
    kept.folder.write_text("no folder")
    assert told(evaluated(tmp_path, "kept", kept)) == told(evaluated(tmp_path, "without", None))
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    assert len(notes) == 1
    assert notes[0].endswith("images without the token are not kept for other classes and runs")
    assert "cannot be written (Not a directory)" in notes[0]


def test_a_disk_that_is_full_is_noted_and_leaves_no_part_of_a_file(token, kept, capsys, monkeypatch):
    def full(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("discriminative.records.files.save_file", full)
    for _ in range(2):
        assert torch.equal(drawn(token, kept), drawn(token, None))
    assert capsys.readouterr().out.count("No space left on device") == 1
    assert files(kept.folder) == {}


@pytest.mark.parametrize(
    ("part", "shape"), [("finished_latents", (2, 4, 8, 8)), ("decode_in_parts", (2, 3, 16, 16))]
)
def test_images_that_are_not_finite_are_not_kept(part, shape, token, kept, monkeypatch):
    monkeypatch.setattr(room, part, lambda *args: torch.full(shape, torch.nan))
    assert not drawn(token, kept).isfinite().any()
    assert not kept.folder.exists()
