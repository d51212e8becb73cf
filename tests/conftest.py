"""Tiny fakes: a Stable Diffusion of a few thousand random weights, of the same classes as the real one."""

import json
import tempfile
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from config import RunConfig
from discriminative.settings import LearningSettings

SHORT_TRAINING = RunConfig(
    class_index=1,
    train=True,
    mixed_precision="no",  # the same on every processor
    num_inference_steps=4,
    training_sampler="dpmsolver++@4",
    max_epochs=3,
    images_per_update=4,
    validate_every=2,
)
WORDS = [
    "a",
    "photo",
    "of",
    "tiger",
    "cat",
    "bat",
    "high",
    "resolution",
    "realistic",
    "image",
    "close",
    "-",
    "up",
    "on",
    "blue",
]


def tiny_tokenizer():
    """A CLIPTokenizer whose words are each one token."""
    from transformers import CLIPTokenizer

    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)] + ["-"]
    vocab, merges = {}, []
    for token in [*letters, *(x + "</w>" for x in letters)]:
        vocab[token] = len(vocab)
    for word in WORDS:
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:
            merge = (pieces[0], pieces[1])
            pieces[:2] = ["".join(merge)]
            if merge not in merges:
                merges.append(merge)
                vocab.setdefault(pieces[0], len(vocab))
    for special in ("<|startoftext|>", "<|endoftext|>"):
        vocab[special] = len(vocab)
    with tempfile.TemporaryDirectory() as folder:  # transformers 4 and 5 agree on files, not on arguments
        (Path(folder) / "vocab.json").write_text(json.dumps(vocab))
        (Path(folder) / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
        return CLIPTokenizer.from_pretrained(folder, model_max_length=16)


def tiny_models(scheduler: str = "PNDMScheduler", dtype=torch.float32):
    """All five parts with random weights, frozen; images are 16x16 from latents 8x8."""
    import diffusers
    from transformers import CLIPTextConfig, CLIPTextModel

    from discriminative.diffusion.models import DiffusionModels
    from miniature.unet import SCHEDULER

    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=16,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=tokenizer.bos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        mid_block_add_attention=False,
        scaling_factor=0.9,
    )
    clip = {"clip_sample": False} if scheduler == "DDIMScheduler" else {}
    scheduler = getattr(diffusers, scheduler).from_config(SCHEDULER, **clip)
    for module in (text_encoder, unet, vae):
        module.requires_grad_(False).eval().to(dtype)
    return DiffusionModels(tokenizer, text_encoder, unet, vae, scheduler, torch.device("cpu"), dtype)


def tiny_classifier(dtype=torch.float32):
    """A linear classifier of three labels over 8x8 pixels."""
    from discriminative.guides.classifier import Classifier
    from discriminative.guides.preprocess import Recipe

    torch.manual_seed(1)
    model = (
        torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, 3)).to(dtype).requires_grad_(False)
    )
    return Classifier(
        "tiny", model, ["tiger cat", "bat", "cat"], Recipe((8, 8), (8, 8), (0.5,) * 3, (0.5,) * 3)
    )


def learning(**changes) -> LearningSettings:
    """A short training with some options of ``RunConfig``, or constants by their names, changed."""
    options = {f.name for f in fields(RunConfig)}
    constants = {name: value for name, value in changes.items() if name not in options}
    config = replace(SHORT_TRAINING, **{name: changes[name] for name in changes if name in options})
    return config.learning(**{"validation_size": 3} | constants)


def learned(tmp_path, **changes):
    """A fresh tiny model after training; returns token and training. For ``changes`` see ``learning``."""
    from discriminative.guides.classifier import Guide
    from discriminative.records.layout import RunFolder
    from discriminative.tokens.class_token import ClassToken
    from trainer import train

    token = ClassToken(tiny_models(), "newclas", "a")
    guides = [Guide(tiny_classifier(), 0)]
    folder = RunFolder(str(tmp_path), "c", "e")
    return token, train(learning(**changes), token, guides, "tiger cat", folder)


@pytest.fixture(autouse=True, scope="module")
def few_final_noises(request):
    """A kept token is compared on few noises, and a step is measured on few: tests train hundreds of times.
    Their own tests have all."""
    with pytest.MonkeyPatch.context() as patch:
        if request.module.__name__ != "test_measured":
            patch.setattr("discriminative.tokens.measured.HALVINGS", ((1, 2), (2, 1)))
            patch.setattr("discriminative.tokens.curriculum.POOLED_UPDATES", 2)
        if request.module.__name__ not in ("test_objective", "test_trainer"):
            patch.setattr("discriminative.tokens.objective.FINAL_SIZE", 4)
        yield


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    """A tiny model and a tiny classifier on disk, as options."""
    from tiny_folders import save_sd1, save_timm

    root = tmp_path_factory.mktemp("saved")
    return {"model": save_sd1(root / "sd1"), "classifier": save_timm(root / "timm")}


@pytest.fixture
def models():
    return tiny_models()


@pytest.fixture
def token(models):
    from discriminative.tokens.class_token import ClassToken

    return ClassToken(models, "newclas", "a")


@pytest.fixture
def classifier():
    return tiny_classifier()


@pytest.fixture
def guides(classifier):
    from discriminative.guides.classifier import Guide

    return [Guide(classifier, 0)]


@pytest.fixture
def folder(tmp_path):
    from discriminative.records.layout import RunFolder

    return RunFolder(str(tmp_path), "0001_tiger_cat", "default")


def weight_hashes(*modules) -> list[int]:
    """A hash of every parameter and buffer, bit for bit."""
    tensors = [t for m in modules for t in m.state_dict().values()]
    return [hash(t.detach().cpu().contiguous().numpy().tobytes()) for t in tensors]
