"""The six forwards of a sample: a picture and a text each, through UNet, probe point and adapter, to losses.

(i, expression) -> boxes; (i, t) -> matching, and denoising in stage 2; (i, t_hard), (i, t_random),
(i_hard, t), (i_random, t) -> matching (DPT, sections 3.2 and 3.3).
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch

from discriminative.diffusion.models import DiffusionModels
from dpt.adapter import DiscriminativeAdapter, Readout, similarity
from dpt.features import ProbePoint, extract
from dpt.latents import Row
from dpt.losses import denoising_loss, itm_losses, positive_map, rec_losses
from dpt.matcher import Target
from dpt.text import Condition, Encoded, TextSide

# Which of a sample's pictures under which of its texts.
TRUE, HARD, RANDOM, EXPRESSION = range(4)
GROUNDED = (TRUE, EXPRESSION)
RIGHT = (TRUE, TRUE)
OTHER_TEXTS = ((TRUE, HARD), (TRUE, RANDOM))
OTHER_PICTURES = ((HARD, TRUE), (RANDOM, TRUE))


@dataclass
class Reader:
    """A model with an adapter at one of its probe points.

    Args:
        models: the frozen parts; the UNet may hold a LoRA.
        condition: texts to what the UNet is told.
        side: tokens for the alignment.
        point: where the UNet is read.
        adapter: reads its features.
        autocast: makes the context in which the UNet computes.
    """

    models: DiffusionModels
    condition: Condition
    side: TextSide
    point: ProbePoint
    adapter: DiscriminativeAdapter
    autocast: Callable = nullcontext

    @property
    def device(self) -> torch.device:
        """Where all of it computes."""
        return self.models.device

    def features(self, latents, timesteps, states, with_noise: bool = False):
        """As :func:`features.extract`: features (B, C, h', w'), and with ``with_noise`` the prediction."""
        latents = latents.to(self.models.dtype)  # (B, 4, h, w)
        with self.autocast():
            return extract(self.models.unet, latents, timesteps, states, self.point, with_noise)

    def score(self, latents, timesteps, states, pooled) -> torch.Tensor:
        """How well noisy latents (B, 4, h, w) match texts, (B,) in [-1, 1], in float32."""
        features = self.features(latents, timesteps, states)  # (B, C, h', w')
        return similarity(self.adapter(features, timesteps).matching, pooled)  # (B,)

    def targets(self, rows: list[Row]) -> list[Target]:
        """The boxes of the rows' expressions.

        Raises:
            UsageError: a span is on no token.
        """
        slots = self.adapter.settings.slots
        targets = []
        for row in rows:
            text = row.grounding.expression
            positive = positive_map(row.grounding.spans, self.side.offsets(text), slots, text)  # (M, slots)
            targets.append(Target(row.grounding.boxes, positive))
        return targets


class Noised(NamedTuple):
    """The pictures of B rows at one timestep and under one noise for each row.

    Args:
        latents: (B, P, 4, h, w), P pictures: true, hard, random.
        timesteps: (B,).
        target: what the UNet is to predict of the true picture (B, 4, h, w).
    """

    latents: torch.Tensor
    timesteps: torch.Tensor
    target: torch.Tensor


def add_noise(
    scheduler, clean: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Noisy latents and what a UNet predicts of them, under the model's own schedule (DDPM, eq. 4).

    Args:
        clean: scaled latents (B, ..., 4, h, w). noise: of a shape that fits them. timesteps: (B,).

    Returns:
        of ``clean``'s shape each: latents; noise, or velocity where the model predicts it.
    """
    alpha_bar = scheduler.alphas_cumprod.to(clean)[timesteps.to(clean.device)]  # (B,)
    alpha_bar = alpha_bar.view(-1, *[1] * (clean.dim() - 1))
    noisy = alpha_bar.sqrt() * clean + (1 - alpha_bar).sqrt() * noise
    if scheduler.config.prediction_type == "v_prediction":
        return noisy, alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * clean
    return noisy, noise.expand_as(clean)


def draw_noised(
    models: DiffusionModels, rows: list[Row], generator: torch.Generator, timestep_power: float = 1
) -> Noised:
    """The rows' pictures as training sees them: one timestep and one noise for each row.

    Args:
        generator: on the CPU, from which all of it comes.
        timestep_power: as in ``StageSettings``; 1 is t ~ U{0..999}, the paper's.
    """
    posterior = torch.stack([torch.stack(row.latents) for row in rows])  # (B, 3, 2, 4, h, w)
    mean = posterior[:, :, 0]  # (B, 3, 4, h, w)
    std = posterior[:, :, 1]  # (B, 3, 4, h, w)
    last = models.scheduler.config.num_train_timesteps
    shares = torch.rand(len(rows), generator=generator, dtype=torch.float64) ** timestep_power  # (B,)
    timesteps = (last * shares).long()  # (B,)
    clean = mean + std * torch.randn(mean.shape, generator=generator)  # (B, 3, 4, h, w)
    clean = clean * models.vae.config.scaling_factor
    noise = torch.randn(mean[:, :1].shape, generator=generator)  # (B, 1, 4, h, w)
    noisy, target = add_noise(models.scheduler, clean, noise, timesteps)  # (B, 3, 4, h, w) each
    device = models.device
    return Noised(noisy.to(device), timesteps.to(device), target[:, TRUE].to(device))


def encode_texts(reader: Reader, rows: list[Row]) -> list[Encoded]:
    """The rows' texts encoded: B true captions, B hard, B random, B expressions."""
    texts = [row.captions[i] for i in (TRUE, HARD, RANDOM) for row in rows]
    encoded = reader.condition.encode(texts + [row.grounding.expression for row in rows])
    return [Encoded(*parts) for parts in zip(*(x.split(len(rows)) for x in encoded), strict=True)]


def read_pairs(
    reader: Reader, noised: Noised, texts: list[Encoded], pairs: list[tuple[int, int]], with_noise: bool
) -> tuple[Readout, torch.Tensor | None]:
    """Pictures under texts, all pairs in one batch.

    Args:
        pairs: P of them: index of picture, index of text.
        with_noise: predict the noise of RIGHT, which goes through the whole UNet; the others stop at the
            probe point.

    Returns:
        the readout of (P * B) forwards, pair after pair; the prediction (B, 4, h, w).
    """
    number = len(noised.latents)
    early = [pair for pair in pairs if not (with_noise and pair == RIGHT)]
    features = {}
    noise_pred = None
    if early:
        latents = torch.cat([noised.latents[:, picture] for picture, _ in early])  # (E * B, 4, h, w)
        states = torch.cat([texts[text].states for _, text in early])  # (E * B, L, D)
        timesteps = noised.timesteps.repeat(len(early))  # (E * B,)
        found = reader.features(latents, timesteps, states)  # (E * B, C, h', w')
        features = dict(zip(early, found.split(number), strict=True))
    if with_noise:
        latents = noised.latents[:, TRUE]  # (B, 4, h, w)
        whole = reader.features(latents, noised.timesteps, texts[TRUE].states, with_noise=True)
        features[RIGHT], noise_pred = whole
    if not pairs:
        return None, noise_pred
    stacked = torch.cat([features[pair] for pair in pairs])  # (P * B, C, h', w')
    return reader.adapter(stacked, noised.timesteps.repeat(len(pairs))), noise_pred


def losses_of(
    reader: Reader,
    rows: list[Row],
    noised: Noised,
    losses: tuple[str, ...],
    boxes_of: Callable[[int], float] = float,
) -> dict[str, torch.Tensor]:
    """The parts of the loss of B samples, by their names in ``LossWeights``; scalars.

    Args:
        losses: which of "itm", "rec" and "mse".
        boxes_of: the number of boxes that counts, from this process's own: their mean over processes.
    """
    texts = encode_texts(reader, rows)
    matched = [RIGHT, *OTHER_TEXTS, *OTHER_PICTURES] if "itm" in losses else []
    pairs = [GROUNDED] * ("rec" in losses) + matched
    readout, noise_pred = read_pairs(reader, noised, texts, pairs, "mse" in losses)
    parts = {}
    if "rec" in losses:
        grounded = Readout(*(x[: len(rows)] for x in readout))
        tokens, mask = reader.side.tokens([row.grounding.expression for row in rows])  # (B, L, T), (B, L)
        targets = reader.targets(rows)
        number = boxes_of(sum(len(target.boxes) for target in targets))
        tokens = reader.adapter.project_tokens(tokens.to(reader.device))  # (B, L, A)
        parts |= rec_losses(grounded, tokens, mask, targets, number)
    if "itm" in losses:
        pooled = torch.cat([texts[text].pooled for _, text in matched])  # (5 * B, D)
        scores = similarity(readout.matching[-len(pooled) :], pooled).view(5, -1).T  # (B, 5)
        parts |= itm_losses(scores[:, 0], scores[:, 1:3], scores[:, 3:], reader.adapter.logit_scale)
    if "mse" in losses:
        parts["mse"] = denoising_loss(noise_pred, noised.target)
    return parts
