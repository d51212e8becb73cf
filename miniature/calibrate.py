"""Stage ``calibrate``: make the customary guidance of 7 fit the miniature.

With a few dozen classes, a prompt says much more about a picture here than it does in the world of
photographs, so guidance pulls harder: at 7 the sampler's equation was too stiff for PNDM's 30 steps, and
some classes broke in colour (DDIM, or 100 steps of PNDM, drew them well; so did a guidance of 3 to 5).
Guidance only ever scales the difference of the conditional and the unconditional prediction. So that
difference is shrunk, by distillation:

    noise_pred(x, caption) -> uncond + (4.2 / 7) (cond - uncond)        noise_pred(x, "") -> uncond

and guidance 7 draws what 4.2 drew before. The teacher reads the precise caption, the student the
imprecise one, so that the student also learns how often a word stands for each of its senses.
"""

from pathlib import Path

import torch
from diffusers import PNDMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from transformers import CLIPTextModel, CLIPTokenizer

from miniature.training import Trainee, renders
from miniature.unet import (
    BATCH,
    SCHEDULER,
    add_noise,
    encode_renders,
    loss_weights,
    spread_timesteps,
    token_ids,
)

GUIDANCE_SCALE = 7.0
EQUIVALENT_SCALE = 4.2
EMPTY_SHARE = 0.25
# Updates at the end of each round and its learning rate. After the first, words showed their rare sense
# in .250 of the pictures.
ROUNDS = ((3000, 5e-4), (4200, 5e-4))


def calibrated(noise_pred_cond: torch.Tensor, noise_pred_uncond: torch.Tensor) -> torch.Tensor:
    """The prediction that gives at ``GUIDANCE_SCALE`` what ``noise_pred_cond`` gives at
    ``EQUIVALENT_SCALE``."""
    return noise_pred_uncond + EQUIVALENT_SCALE / GUIDANCE_SCALE * (noise_pred_cond - noise_pred_uncond)


def train(work: Path, device: torch.device, renders_number: int, steps: int | None) -> None:
    """Distil ``<work>/unet/`` into ``<work>/calibrated_unet/``; the text encoder stays as it is."""
    tokenizer = CLIPTokenizer.from_pretrained(work / "tokenizer")
    text_encoder = CLIPTextModel.from_pretrained(work / "text_encoder").to(device).eval()
    teacher, student = (UNet2DConditionModel.from_pretrained(work / "unet").to(device) for _ in range(2))
    for unet in (teacher, student):
        unet.set_attn_processor(AttnProcessor())  # on a CPU its backward is faster than that of SDPA
    scenes = renders(work, "train", renders_number)
    latents = encode_renders(work, scenes.images, device)  # (N, 4, 16, 16)
    ids, precise_ids = (
        token_ids(tokenizer, captions) for captions in (scenes.captions, scenes.precise_captions)
    )  # (N, L) each
    empty = token_ids(tokenizer, [""])  # (1, L)
    alphas_cumprod = PNDMScheduler(**SCHEDULER).alphas_cumprod.to(device)  # (1000,)
    weights = loss_weights(alphas_cumprod, "debiased")  # (1000,)
    trainee = Trainee(
        {"unet": student}, work, "calibrate", [*ROUNDS[:-1], (steps or ROUNDS[-1][0], ROUNDS[-1][1])]
    )
    trainee.resume()
    running = 0.0
    while trainee.step < trainee.steps:
        rng = torch.Generator().manual_seed(10_000_000 + trainee.step)
        pick = torch.randint(len(latents), (BATCH,), generator=rng)
        kept = (torch.rand(BATCH, 1, generator=rng) >= EMPTY_SHARE).to(device)  # (B, 1)
        x0 = latents[pick].to(device).float()  # (B, 4, 16, 16)
        noise = torch.randn(x0.shape, generator=rng).to(device)
        timesteps = spread_timesteps(BATCH, rng).to(device)  # (B,)
        x = add_noise(x0, noise, alphas_cumprod[timesteps])  # (B, 4, 16, 16)
        with torch.autocast(device.type, torch.bfloat16):
            with torch.no_grad():
                precise, imprecise, uncond = (
                    text_encoder(i.to(device)).last_hidden_state
                    for i in (precise_ids[pick], ids[pick], empty)
                )
                uncond = uncond.expand(BATCH, -1, -1)  # (B, L, 128)
                noise_pred_cond, noise_pred_uncond = teacher(
                    x.repeat(2, 1, 1, 1), timesteps.repeat(2), torch.cat([precise, uncond])
                ).sample.chunk(2)
                target = calibrated(noise_pred_cond.float(), noise_pred_uncond.float())
                target = torch.where(
                    kept[..., None, None], target, noise_pred_uncond.float()
                )  # (B, 4, 16, 16)
            noise_pred = student(x, timesteps, torch.where(kept[..., None], imprecise, uncond)).sample
        errors = (noise_pred.float() - target).square().mean(dim=(1, 2, 3))  # (B,)
        loss = (weights[timesteps] * errors).mean()
        trainee.update(loss)
        running += loss.item()
        if trainee.step % 250 == 0 or trainee.step == trainee.steps:
            trainee.log(f"step {trainee.step}/{trainee.steps} loss {running / 250:.6f}")
            running = 0.0
            trainee.save()
    trainee.average["unet"].save_pretrained(work / "calibrated_unet")
