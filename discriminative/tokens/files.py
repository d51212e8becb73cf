"""A finished token in the formats of other tools: the web UIs' embedding file, and a whole diffusers
pipeline."""

import copy
import hashlib
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from discriminative.errors import UsageError
from discriminative.hub import one_line
from discriminative.records.files import (
    follow_umask,
    replace_folder,
    told_what_cannot_be_written,
    write_tensors,
)
from discriminative.tokens.class_token import ClassToken


def write_web_ui(path: Path, token: ClassToken, metadata: dict[str, str]) -> None:
    """An embedding file of AUTOMATIC1111 and ComfyUI: ``{"emb_params": (N, width)}``. Its name is the
    word in their prompts."""
    write_tensors(path, {WEB_UI_KEY: token.vector.detach().cpu().clone()}, metadata)


@torch.no_grad()
def write_pipeline(folder: Path, token: ClassToken) -> None:
    """The whole pipeline as a folder in the diffusers layout, the token's vectors in its embedding table.

    The folder appears when it is complete; one that is there is replaced.
    """
    from diffusers import StableDiffusionPipeline

    models = token.models
    text_encoder = copy.deepcopy(models.text_encoder)
    rows = text_encoder.get_input_embeddings().weight.shape[0]
    text_encoder.resize_token_embeddings(max(rows, len(models.tokenizer)), mean_resizing=False)
    text_encoder.get_input_embeddings().weight[token.first_id : token.first_id + len(token.names)] = (
        token.vector
    )
    pipeline = StableDiffusionPipeline(
        vae=models.vae,
        text_encoder=text_encoder.to(models.dtype),
        tokenizer=models.tokenizer,
        unet=models.unet,
        scheduler=models.scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        with told_what_cannot_be_written(folder):
            pipeline.save_pretrained(temporary)
            make_readable(temporary, models.tokenizer)
            follow_umask(temporary)
            replace_folder(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


WEB_UI_KEY = "emb_params"  # the one tensor of an embedding file of AUTOMATIC1111 and ComfyUI


def token_tensors(token: ClassToken) -> dict[str, torch.Tensor]:
    """What the token's file holds: ``{placeholder: (N, width) float32}``, the format of diffusers'
    textual inversion."""
    return {token.placeholder: token.vector.detach().cpu().clone()}


def read_origin(path: Path) -> dict[str, str]:
    """What a token file says of its origin ("model", "classifier", ...); empty where it says nothing or
    is no token file."""
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError):
        return {}


def fingerprint(vectors: torch.Tensor) -> str:
    """A token's vectors (N, width) as a short text that no others have."""
    return hashlib.sha256(vectors.detach().float().cpu().numpy().tobytes()).hexdigest()


def read_token(path: Path) -> tuple[str, torch.Tensor]:
    """Placeholder and vectors (N, width), float32, of a token file: diffusers' textual inversion, or
    ``emb_params`` of the web UIs.

    The placeholder of the latter is the file's name, as it is for the programs that read it.

    Raises:
        UsageError: the file is no safetensors file or does not hold exactly one token.
    """
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        start = path.open("rb").read(2) if path.is_file() else b""
        if start == b"PK" or start[:1] == b"\x80":  # what torch.save writes, and wrote long ago
            raise UsageError(
                f"{path}: is a pickled file, which may run code when it is read; allowed is a safetensors "
                "file"
            ) from error
        raise UsageError(f"{path}: not a readable safetensors file ({one_line(error)})") from error
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if {"clip_l", "clip_g"} & set(tensors):
        raise UsageError(
            f"{path}: holds {shapes}, a token of a model with two text encoders; allowed is one of a "
            "Stable Diffusion 1 or 2"
        )
    if len(tensors) != 1 or any(len(shape) not in (1, 2) or 0 in shape for shape in shapes.values()):
        raise UsageError(
            f"{path}: holds {shapes}; a class token's file holds one vector, or several of one width, "
            "under its placeholder"
        )
    ((name, vector),) = tensors.items()
    vector = vector.float().reshape(-1, vector.shape[-1])  # (N, width)
    if not vector.isfinite().all():
        raise UsageError(f"{path}: its vector has values that are not finite")
    return path.stem if name == WEB_UI_KEY else name, vector


def make_readable(pipeline: Path, tokenizer: Any) -> None:
    """Let transformers 4, too, read the text encoder and tokenizer of a pipeline's folder that
    transformers 5 wrote.

    5 writes names of weights that 4 takes for missing, and no vocabulary but that in tokenizer.json,
    which 4's CLIPTokenizer does not read. 5 reads either.
    """
    path = pipeline / "text_encoder" / "model.safetensors"
    tensors = load_file(path)
    write_tensors(
        path, {f"text_model.{k.removeprefix('text_model.')}": v for k, v in tensors.items()}, {"format": "pt"}
    )
    backend = getattr(
        tokenizer, "backend_tokenizer", None
    )  # transformers 4's CLIPTokenizer has none, and writes the files itself
    if backend:
        backend.model.save(str(pipeline / "tokenizer"))
