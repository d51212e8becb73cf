"""Models of Stable Diffusion 1.4's own shapes with random weights, which cost what trained ones cost.

The configuration is the official one of CompVis/stable-diffusion-v1-4 (PNDM, 512x512), the guide ViT-L/16
at 224 pixels; ``width`` scales the channels of UNet and VAE, for machines that could not hold them.
"""

from contextlib import contextmanager

import torch

from discriminative.diffusion.models import DiffusionModels
from discriminative.guides.classifier import Classifier, Guide
from discriminative.guides.preprocess import Recipe
from discriminative.hub import MINIATURE

TEXT = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
}


@contextmanager
def making(device: torch.device, dtype: torch.dtype):
    """Within the block modules are made on ``device`` with weights of ``dtype``."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(before)


def build_models(
    width: float, device: torch.device, dtype: torch.dtype, checkpointed: tuple[str, ...] = ()
) -> DiffusionModels:
    """SD 1.4 with random weights; channels of UNet and VAE times ``width``, in multiples of 32 (their
    norms' groups)."""
    from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    from miniature.unet import SCHEDULER

    torch.manual_seed(0)

    def channels(*full: int) -> tuple[int, ...]:
        return tuple(max(32, round(c * width / 32) * 32) for c in full)

    # The real vocabulary cannot be had offline; ids of a small one index the full-size table just as well.
    tokenizer = CLIPTokenizer.from_pretrained(MINIATURE / "model" / "tokenizer", model_max_length=77)
    with making(device, torch.float32):
        text_encoder = CLIPTextModel(
            CLIPTextConfig(**TEXT, max_position_embeddings=77, eos_token_id=tokenizer.eos_token_id)
        )
    with making(device, dtype):
        unet = UNet2DConditionModel(
            sample_size=64,
            block_out_channels=channels(320, 640, 1280, 1280),
            cross_attention_dim=768,
            attention_head_dim=8,
        )
        vae = AutoencoderKL(
            block_out_channels=channels(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            sample_size=512,
            scaling_factor=0.18215,
        )
    for module in (text_encoder, unet, vae):
        module.requires_grad_(False).eval()
    for name, module in {"unet": unet, "vae": vae}.items():
        if name in checkpointed:
            module.enable_gradient_checkpointing()
    return DiffusionModels(tokenizer, text_encoder, unet, vae, PNDMScheduler(**SCHEDULER), device, dtype)


def build_guide(width: float, device: torch.device, dtype: torch.dtype) -> Guide:
    """ViT-L/16 with random weights and the preprocessing of the paper's guide; ViT-Ti/16 at reduced width."""
    import timm

    with making(device, torch.float32):  # in half precision timm's initialisation makes outliers
        model = timm.create_model(
            "vit_large_patch16_224" if width == 1 else "vit_tiny_patch16_224", pretrained=False
        )
    model = model.requires_grad_(False).eval().to(dtype)
    recipe = Recipe((256, 256), (224, 224), (0.5,) * 3, (0.5,) * 3)
    return Guide(Classifier("random", model, [str(i) for i in range(1000)], recipe), 282)
