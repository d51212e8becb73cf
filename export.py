"""A finished token in the formats of other tools: the web UIs' embedding file, and a whole diffusers pipeline."""

import copy
import os
import shutil
from pathlib import Path

import torch

from class_token import WEB_UI_KEY, ClassToken
from outputs import make_readable, write_tensors


def write_web_ui(path: Path, token: ClassToken, metadata: dict[str, str]) -> None:
    """An embedding file of AUTOMATIC1111 and ComfyUI: ``{"emb_params": (N, width)}``. Its name is the word in their prompts."""
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
    text_encoder.get_input_embeddings().weight[token.first_id : token.first_id + len(token.names)] = token.vector
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
        pipeline.save_pretrained(temporary)
        make_readable(temporary, models.tokenizer)
        if folder.exists():
            shutil.rmtree(folder)
        temporary.replace(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
