"""Stage ``unet``: UNet and text encoder of the miniature, trained together on latents and captions."""

from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from discriminative.records.files import write_tensors
from miniature.training import Trainee, renders, to_tensor

# SD 1.4's own scheduler configuration.
SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "skip_prk_steps": True,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
TEXT_WIDTH = 128
TEXT = {
    "hidden_size": TEXT_WIDTH,
    "intermediate_size": 4 * TEXT_WIDTH,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "projection_dim": TEXT_WIDTH,
    "hidden_act": "quick_gelu",
}
UNET = {
    "sample_size": 16,
    "block_out_channels": (48, 96, 160),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": TEXT_WIDTH,
    "attention_head_dim": 4,  # diffusers reads it as the number of heads, here as in SD 1.4
    "norm_num_groups": 16,
}
BATCH = 48
# Rounds of training, in each of which the learning rate is held and then lowered: updates at its end, the
# rate, weights of the
# loss, share of captions replaced by "". After the first round images were sharp, but often of the other
# sense: what the
# noisiest steps decide, so the second gives those more weight. The third shows more of the empty caption.
ROUNDS = ((6000, 1e-3, "min_snr", 0.1), (11000, 1e-3, "debiased", 0.1), (12600, 5e-4, "debiased", 0.25))
SNR_CAP = 5.0
WEIGHT_FLOOR = 0.05
WEIGHT_CAP = 8.0
EMBEDDING_RMS = 0.0145  # of the words' embeddings; SD 1.4's is about 0.014


def _text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer), max_position_embeddings=tokenizer.model_max_length, **TEXT, **ids
        )
    )


def token_ids(tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    """Captions to padded token ids (B, max_length)."""
    return tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids


@torch.no_grad()
def encode_renders(work: Path, images, device: torch.device) -> torch.Tensor:
    """All renders' scaled latents (N, 4, 16, 16), float16, on the CPU; kept beside the VAE, since a new
    one makes new latents."""
    cache = work / "vae" / f"latents-{len(images)}.safetensors"
    if cache.exists():
        return load_file(cache)["latents"]
    vae = AutoencoderKL.from_pretrained(work / "vae").to(device).eval()
    latents = []
    for start in range(0, len(images), 250):
        with torch.autocast(device.type, torch.bfloat16):
            mean = vae.encode(to_tensor(images[start : start + 250], device)).latent_dist.mode()
        latents.append((mean.float() * vae.config.scaling_factor).half().cpu().contiguous())
    latents = torch.cat(latents).contiguous()
    write_tensors(cache, {"latents": latents}, {})
    return latents


def spread_timesteps(number: int, rng: torch.Generator) -> torch.Tensor:
    """One timestep from each of ``number`` equal slices of the schedule (number,): the loss varies less
    than with free ones."""
    return ((torch.arange(number) + torch.rand(number, generator=rng)) * 1000 / number).long()


def add_noise(x0: torch.Tensor, noise: torch.Tensor, alphas_cumprod: torch.Tensor) -> torch.Tensor:
    """Noised latents (B, 4, 16, 16); ``alphas_cumprod`` (B,) of their timesteps (Ho et al. 2020, eq. 4)."""
    a = alphas_cumprod.view(-1, 1, 1, 1)
    return a.sqrt() * x0 + (1 - a).sqrt() * noise


def loss_weights(alphas_cumprod: torch.Tensor, kind: str) -> torch.Tensor:
    """Weights of the epsilon loss for each timestep (T,).

    Args:
        kind: "min_snr" (Hang et al. 2023, section 3.4) or "debiased" (Yu et al. 2023: 1 / sqrt(SNR)),
            which weighs the noisiest steps more. Floor and cap keep the first and the last timesteps from
            vanishing or ruling.
    """
    snr = alphas_cumprod / (1 - alphas_cumprod)  # (T,)
    weights = {"min_snr": snr.clamp(max=SNR_CAP) / snr, "debiased": snr.rsqrt()}[kind]
    return weights.clamp(WEIGHT_FLOOR, WEIGHT_CAP)


def rescale_embeddings(text_encoder: CLIPTextModel, rows: torch.Tensor, rms: float) -> float:
    """Scale the embedding tables so that ``rows`` of the token table have the given root mean square;
    outputs stay the same.

    CLIP is a pre-norm transformer: what enters each layer norm may be scaled by a common factor if every
    branch that adds to the stream is scaled alike, and the norms' epsilon by its square. Returns the
    factor.
    """
    table = text_encoder.get_input_embeddings().weight
    factor = rms / table[rows].square().mean().sqrt().item()
    with torch.no_grad():
        for name, p in text_encoder.named_parameters():
            if "embedding" in name or "out_proj" in name or ".fc2." in name:
                p.mul_(factor)
    text_encoder.config.layer_norm_eps *= factor**2
    for module in text_encoder.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps *= factor**2
    return factor


def train(work: Path, device: torch.device, renders_number: int, steps: int | None) -> None:
    """Train on encoded renders; writes ``<work>/unet/`` and ``<work>/text_encoder/``."""
    torch.manual_seed(1)
    tokenizer = CLIPTokenizer.from_pretrained(work / "tokenizer")
    scenes = renders(work, "train", renders_number)
    latents = encode_renders(work, scenes.images, device)  # (N, 4, 16, 16)
    # (N, L), (1, L)
    ids = token_ids(tokenizer, scenes.captions)
    empty = token_ids(tokenizer, [""])
    unet = UNet2DConditionModel(**UNET).to(device)
    text_encoder = _text_encoder(tokenizer).to(device)
    unet.set_attn_processor(AttnProcessor())  # on a CPU its backward is faster than that of SDPA
    alphas_cumprod = PNDMScheduler(**SCHEDULER).alphas_cumprod.to(device)  # (1000,)
    rounds = [*(r[:2] for r in ROUNDS[:-1]), (steps or ROUNDS[-1][0], ROUNDS[-1][1])]
    trainee = Trainee({"unet": unet, "text_encoder": text_encoder}, work, "unet", rounds)
    trainee.resume()
    trainee.log(f"{len(latents)} latents, standard deviation {latents.float().std():.3f}")
    running = 0.0
    while trainee.step < trainee.steps:
        rng = torch.Generator().manual_seed(trainee.step)
        pick = torch.randint(len(latents), (BATCH,), generator=rng)
        *_, weighting, empty_share = ROUNDS[trainee.round]
        kept = torch.rand(BATCH, 1, generator=rng) >= empty_share
        input_ids = torch.where(kept, ids[pick], empty).to(device)  # (B, L)
        x0 = latents[pick].to(device).float()  # (B, 4, 16, 16)
        noise = torch.randn(x0.shape, generator=rng).to(device)
        timesteps = spread_timesteps(BATCH, rng).to(device)  # (B,)
        with torch.autocast(device.type, torch.bfloat16):
            encoder_hidden_states = text_encoder(input_ids).last_hidden_state  # (B, L, 128)
            noise_pred = unet(
                add_noise(x0, noise, alphas_cumprod[timesteps]), timesteps, encoder_hidden_states
            ).sample
        weights = loss_weights(alphas_cumprod, weighting)  # (1000,)
        errors = F.mse_loss(noise_pred.float(), noise, reduction="none").mean(dim=(1, 2, 3))  # (B,)
        loss = (weights[timesteps] * errors).mean()
        trainee.update(loss)
        running += loss.item()
        if trainee.step % 250 == 0 or trainee.step == trainee.steps:
            trainee.log(f"step {trainee.step}/{trainee.steps} loss {running / 250:.4f}")
            running = 0.0
            trainee.save()
    average = trainee.average["text_encoder"]
    factor = rescale_embeddings(average, ids.unique(), EMBEDDING_RMS)
    trainee.log(f"word embeddings scaled by {factor:.4f} to a root mean square of {EMBEDDING_RMS}")
    average.save_pretrained(work / "text_encoder")
    trainee.average["unet"].save_pretrained(work / "unet")
