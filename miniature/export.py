"""Stage ``export``: the folder that ships, in the layout that ``StableDiffusionPipeline.from_pretrained``
loads, in fp16."""

import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from discriminative.records.files import follow_umask
from discriminative.tokens.files import make_readable
from miniature.classifiers import CLASSIFIERS
from miniature.detector import NAME as DETECTOR
from miniature.unet import SCHEDULER


def export(work: Path, out: Path) -> None:
    """Gather the stages' results: ``<out>/model`` (a pipeline), and the classifiers (timm folders) and the
    detector beside it."""
    parts = ("vae", "text_encoder", "tokenizer", "calibrated_unet", *CLASSIFIERS, DETECTOR)
    missing = [name for name in parts if not (work / name).exists()]
    if missing:
        raise SystemExit(f"export: {work} has no {', '.join(missing)}; run those stages first")
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(work / "vae").half(),
        text_encoder=CLIPTextModel.from_pretrained(work / "text_encoder").half(),
        tokenizer=CLIPTokenizer.from_pretrained(work / "tokenizer"),
        unet=UNet2DConditionModel.from_pretrained(work / "calibrated_unet").half(),
        scheduler=PNDMScheduler(**SCHEDULER),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    temporary = out.with_name(out.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    pipeline.save_pretrained(temporary / "model")
    make_readable(temporary / "model", pipeline.tokenizer)
    # The files hold halves to be small; what loads them is to compute in float32 unless it asks otherwise.
    config_path = temporary / "model" / "text_encoder" / "config.json"
    config = json.loads(config_path.read_text())
    config_path.write_text(json.dumps(config | {"dtype": "float32"}, indent=2, sort_keys=True) + "\n")
    for name in (*CLASSIFIERS, DETECTOR):
        shutil.copytree(work / name, temporary / name)
    follow_umask(temporary)
    shutil.rmtree(out, ignore_errors=True)
    temporary.rename(out)
    total = sum(f.stat().st_size for f in out.rglob("*.safetensors"))
    print(f"{out}: {total / 1e6:.1f} MB of weights, torch {torch.__version__}")
