"""One update at Stable Diffusion 1.4's own shapes, with random weights: seconds and peak memory.

    python benchmarks/sd_shapes.py                       # full width on CUDA, a fifth of it on the CPU
    python benchmarks/sd_shapes.py --batch_size 1 --gradient_mode last

Random weights cost what trained ones cost. The configuration is the official one of CompVis/stable-diffusion-v1-4
(scheduler PNDM, 512x512), the guide ViT-L/16 at 224 pixels; ``--width`` scales the channels of UNet and VAE.
"""

import argparse
import datetime
import platform
import resource
import sys
import tempfile
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

from class_token import ClassToken
from classifiers import Classifier, Guide
from config import RunConfig
from models import MINIATURE, DiffusionModels, resolve_device, resolve_dtype
from outputs import RunFolder, write_json
from recipes import Recipe
from trainer import train

TEXT = {"vocab_size": 49408, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}


def build_models(width: float, device: torch.device, dtype: torch.dtype, checkpointing: bool = True) -> DiffusionModels:
    """SD 1.4 with random weights; channels of UNet and VAE times ``width``, in multiples of 32 (their norms' groups)."""
    from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    from miniature.unet import SCHEDULER

    torch.manual_seed(0)

    def channels(*full: int) -> tuple[int, ...]:
        return tuple(max(32, round(c * width / 32) * 32) for c in full)

    # The real vocabulary cannot be had offline; ids of a small one index the full-size table just as well.
    tokenizer = CLIPTokenizer.from_pretrained(MINIATURE / "model" / "tokenizer", model_max_length=77)
    text_encoder = CLIPTextModel(CLIPTextConfig(**TEXT, max_position_embeddings=77, eos_token_id=tokenizer.eos_token_id))
    with torch.device(device):
        unet = UNet2DConditionModel(
            sample_size=64, block_out_channels=channels(320, 640, 1280, 1280), cross_attention_dim=768, attention_head_dim=8
        )
        vae = AutoencoderKL(
            block_out_channels=channels(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            sample_size=512,
            scaling_factor=0.18215,
        )
    for module in (text_encoder.to(device), unet.to(dtype), vae.to(dtype)):
        module.requires_grad_(False).eval()
    if checkpointing:
        unet.enable_gradient_checkpointing()
        vae.enable_gradient_checkpointing()
    return DiffusionModels(tokenizer, text_encoder, unet, vae, PNDMScheduler(**SCHEDULER), device, dtype)


def build_guide(width: float, device: torch.device, dtype: torch.dtype) -> Guide:
    """ViT-L/16 with random weights and the preprocessing of the paper's guide; ViT-Ti/16 at reduced width."""
    import timm

    model = timm.create_model("vit_large_patch16_224" if width == 1 else "vit_tiny_patch16_224", pretrained=False)
    model = model.requires_grad_(False).eval().to(device, dtype)
    recipe = Recipe((256, 256), (224, 224), (0.5,) * 3, (0.5,) * 3)
    return Guide(Classifier("random", model, [str(i) for i in range(1000)], recipe), 282)


def measure(config: RunConfig, width: float, updates: int) -> dict:
    """Train for ``updates`` and time the last one."""
    device = resolve_device(config.device)
    dtype = resolve_dtype(config.mixed_precision, device)
    token = ClassToken(
        build_models(width, device, dtype, config.gradient_checkpointing), config.placeholder_token, config.initializer_token
    )
    guide, start = build_guide(width, device, dtype), token.vector.detach().clone()
    parameters = {n: sum(p.numel() for p in getattr(token.models, n).parameters()) for n in ("text_encoder", "unet", "vae")}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as folder:
        training = train(replace(config, max_epochs=updates), token, [guide], "tiger cat", RunFolder(folder, "c", "e"))
    cuda = device.type == "cuda"
    peak = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "hardware": torch.cuda.get_device_name() if cuda else f"{platform.machine()}, {torch.get_num_threads()} threads",
        "versions": {name: version(name) for name in ("torch", "diffusers", "transformers", "timm")},
        "width": width,
        "parameters": parameters,
        "config": asdict(config),
        "updates": training.rows,
        "moved": not torch.equal(start, training.last_vector),
        "seconds_last_update": training.rows[-1]["seconds"],
        "peak_gb": peak / 1e9,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=float, default=1.0 if torch.cuda.is_available() else 0.2)
    parser.add_argument("--gradient_mode", default="jump", choices=("jump", "last"))
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--images_per_update", type=int, default=5 if torch.cuda.is_available() else 1)
    parser.add_argument("--mixed_precision", default="auto", choices=("auto", "no", "fp16", "bf16"))
    parser.add_argument("--updates", type=int, default=2)
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    args = parser.parse_args()
    config = replace(
        RunConfig(),
        class_index=283,
        train=True,
        keep="loss",  # validation would time full sampling, not an update
        gradient_mode=args.gradient_mode,
        batch_size=args.batch_size,
        images_per_update=args.images_per_update,
        mixed_precision=args.mixed_precision,
    )
    result = measure(config, args.width, args.updates)
    if args.out:
        write_json(args.out, result)
    print(f"{result['hardware']}: width {args.width}, {args.gradient_mode}, {args.images_per_update} images, batch {args.batch_size}:")
    print(f"last update {result['seconds_last_update']:.1f} s, peak memory {result['peak_gb']:.1f} GB, token moved: {result['moved']}")


if __name__ == "__main__":
    main()
