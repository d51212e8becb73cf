"""Folders in the real formats with random weights at small sizes, written by the libraries' own
``save_pretrained``."""

import json
import re
from pathlib import Path

import torch
from conftest import tiny_models
from safetensors.torch import load_file, save_file

LABELS = ["tiger cat", "bat", "blue cat", "tiger"]
ID2LABEL = dict(enumerate(LABELS))
VIT = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 32,
    "patch_size": 8,
}


def save_sd1(folder: Path) -> str:
    """Stable Diffusion 1: PNDM, predicts noise."""
    save_models(folder, tiny_models())
    return str(folder)


def save_sd2(folder: Path) -> str:
    """Stable Diffusion 2: DDIM, predicts velocity; a wider text encoder with gelu, linear projections,
    heads by level."""
    from diffusers import DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    models = tiny_models("DDIMScheduler")
    config = models.text_encoder.config.to_dict() | {
        "hidden_size": 24,
        "hidden_act": "gelu",
        "projection_dim": 8,
    }
    models.text_encoder = CLIPTextModel(CLIPTextConfig(**config))
    unet = dict(models.unet.config) | {
        "cross_attention_dim": 24,
        "attention_head_dim": (2, 4),
        "use_linear_projection": True,
    }
    models.unet = UNet2DConditionModel(**{k: v for k, v in unet.items() if not k.startswith("_")})
    models.scheduler = DDIMScheduler.from_config(models.scheduler.config, prediction_type="v_prediction")
    save_models(folder, models)
    return str(folder)


def save_tiny_vae(folder: Path, halvings: int = 1) -> str:
    """A small decoder of latents with four channels, to twice their size for each halving of the encoder."""
    from diffusers import AutoencoderTiny

    torch.manual_seed(5)
    channels, blocks = (8,) * (halvings + 1), (1,) * (halvings + 1)
    sizes = {f"{side}_block_out_channels": channels for side in ("encoder", "decoder")}
    sizes |= {f"num_{side}_blocks": blocks for side in ("encoder", "decoder")}
    AutoencoderTiny(**sizes).save_pretrained(folder)
    return str(folder)


def save_models(folder: Path, models) -> None:
    from diffusers import StableDiffusionPipeline

    parts = {n: getattr(models, n) for n in ("tokenizer", "text_encoder", "unet", "vae", "scheduler")}
    pipeline = StableDiffusionPipeline(
        **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    pipeline.save_pretrained(folder)


def save_timm(folder: Path, labels: list[str] | None = LABELS, architecture: str = "test_resnet") -> str:
    """A timm checkpoint as timm exports it; without labels the file alone, with ImageNet's 1000 classes."""
    import timm
    from timm.models._hub import save_for_hf

    torch.manual_seed(2)
    model = timm.create_model(architecture, num_classes=len(labels) if labels else 1000)
    save_for_hf(model, folder, {"label_names": labels}, safe_serialization=True)
    if labels:
        return f"timm:{folder}"
    (folder / "config.json").unlink()
    return f"timm:{architecture}@{folder / 'model.safetensors'}"


def save_hf_vit(folder: Path) -> str:
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(3)
    ViTForImageClassification(ViTConfig(**VIT, id2label=ID2LABEL)).save_pretrained(folder)
    save_processor(folder, "ViTImageProcessor", size={"height": 32, "width": 32})
    return f"hf:{folder}"


def save_hf_convnext(folder: Path) -> str:
    from transformers import ConvNextConfig, ConvNextForImageClassification

    torch.manual_seed(4)
    sizes = {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]}
    ConvNextForImageClassification(ConvNextConfig(**sizes, id2label=ID2LABEL)).save_pretrained(folder)
    save_processor(folder, "ConvNextImageProcessor", size={"shortest_edge": 32}, crop_pct=0.875)
    return f"hf:{folder}"


def save_processor(folder: Path, name: str, **settings) -> None:
    import transformers

    getattr(transformers, name)(**settings).save_pretrained(folder)


# What transformers 4 calls a ViT's weights (left), and 5 (right).
OLD_TO_NEW = {
    r"\.encoder\.layer\.": ".layers.",
    r"\.attention\.attention\.query\.": ".attention.q_proj.",
    r"\.attention\.attention\.key\.": ".attention.k_proj.",
    r"\.attention\.attention\.value\.": ".attention.v_proj.",
    r"\.attention\.output\.dense\.": ".attention.o_proj.",
    r"\.intermediate\.dense\.": ".mlp.fc1.",
    r"\.output\.dense\.": ".mlp.fc2.",
}


def save_vit_mae(folder: Path, names: str) -> str:
    """The paper's kind of checkpoint, with the weights' names of transformers 4 ("old") or 5 ("new")."""
    save_hf_vit(folder)
    weights = load_file(folder / "model.safetensors")
    new = {}
    for key, value in weights.items():
        for old, replacement in OLD_TO_NEW.items():
            key = re.sub(old, replacement, key)
        new[key] = value
    if names == "old":
        new = {to_old(key): value for key, value in new.items()}
    save_file(new, folder / "model.safetensors", {"format": "pt"})
    return f"vit-mae:{folder}"


def to_old(key: str) -> str:
    for old, replacement in OLD_TO_NEW.items():
        key = key.replace(replacement, old.replace("\\", ""))
    return key


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def only_in_half(folder: str, parts: tuple[str, ...]) -> None:
    """Rewrite the weights of a model's parts as its half precision variant, the only one then."""
    for part in parts:
        (path,) = Path(folder, part).glob("*.safetensors")
        half = {name: tensor.half() for name, tensor in load_file(path).items()}
        save_file(half, path.with_suffix(".fp16.safetensors"), {"format": "pt"})
        path.unlink()
