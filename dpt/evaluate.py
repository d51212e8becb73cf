"""How well an adapter matches and finds on samples that training has not seen (DPT, section 4.2).

Matching is two-way, chance 50 %: a picture with its caption and a hard one, a caption with its picture and a
hard one. Scores are taken at one timestep, the paper's t = 500 by default, and averaged over noises that
follow from seed and sample, and that the candidates share. Boxes are ranked by 1 - p(no object).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torchvision.ops import box_convert, box_iou, generalized_box_iou

from discriminative.records.scores import CONFIDENCE, interval
from dpt.adapter import Readout, similarity
from dpt.forward import GROUNDED, HARD, RIGHT, TRUE, Noised, Reader, add_noise, encode_texts, read_pairs
from dpt.latents import Row
from dpt.settings import EVALUATION_TIMESTEP, HIT_OVERLAP, HIT_RANKS

BATCH = 16  # samples at once
NOISE_STREAM = 43
RESAMPLES = 2000  # of the bootstrap
CANDIDATES = [RIGHT, (TRUE, HARD), (HARD, TRUE)]
OVERLAPS = {"iou": box_iou, "giou": generalized_box_iou}


@dataclass(frozen=True)
class Outcome:
    """What became of one sample.

    Args:
        kind: how its hard negative differs.
        right: score of picture and caption, in [-1, 1], mean over the noises.
        hard_text: of the picture under the hard caption. hard_picture: of the hard picture under the caption.
        text_cosine: of the two captions' pooled states: near 1, the text encoder hardly tells them apart.
        boxes: the best boxes (10, 4) of the first noise as centre and size, best first.
        hits: by overlap ("iou", "giou") and rank, the share of noises whose best boxes find what is meant.
    """

    kind: str
    right: float
    hard_text: float
    hard_picture: float
    text_cosine: float
    boxes: torch.Tensor
    hits: dict[str, dict[int, float]]

    @property
    def text_is_right(self) -> bool:
        """The caption beats the hard one."""
        return self.right > self.hard_text

    @property
    def picture_is_right(self) -> bool:
        """The picture beats the hard one."""
        return self.right > self.hard_picture


def noise_of(shape: torch.Size, seed: int, index: int, number: int) -> torch.Tensor:
    """Noise of one sample (4, h, w): the ``number``-th of its own, whatever the batch."""
    entropy = [NOISE_STREAM, seed, index, number]
    seed = int(np.random.SeedSequence(entropy).generate_state(1)[0])
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def noised(reader: Reader, rows: Sequence[Row], first: int, seed: int, number: int, timestep: int) -> Noised:
    """The rows' pictures at one timestep: the posterior's mean under fixed noise.

    Args:
        first: index of the first row.
        number: which of each sample's noises.
        timestep: 0 to 999.
    """
    models = reader.models
    mean = torch.stack([torch.stack(row.latents)[:, 0] for row in rows])  # (B, 3, 4, h, w)
    noises = [noise_of(mean.shape[2:], seed, first + i, number) for i in range(len(rows))]
    timesteps = torch.full((len(rows),), timestep)  # (B,)
    clean = mean * models.vae.config.scaling_factor  # (B, 3, 4, h, w)
    latents, target = add_noise(models.scheduler, clean, torch.stack(noises)[:, None], timesteps)
    return Noised(latents.to(reader.device), timesteps.to(reader.device), target[:, TRUE])


@torch.no_grad()
def outcomes(
    reader: Reader, rows: Sequence[Row], noises: int, seed: int, timestep: int = EVALUATION_TIMESTEP
) -> Iterator[Outcome]:
    """The outcome of each row, batch by batch.

    Args:
        noises: K, over which scores are averaged.
        seed: of the noises.
        timestep: of the scores, 0 to 999.
    """
    for module in (reader.adapter, reader.point):
        module.eval()
    for first in range(0, len(rows), BATCH):
        batch = rows[first : first + BATCH]
        texts = encode_texts(reader, batch)
        cosines = torch.cosine_similarity(
            texts[TRUE].pooled.flatten(1), texts[HARD].pooled.flatten(1)
        )  # (B,)
        scores = []
        grounded = []
        for number in range(noises):
            seen = noised(reader, batch, first, seed, number, timestep)
            readout, _ = read_pairs(reader, seen, texts, [GROUNDED, *CANDIDATES], with_noise=False)
            pooled = torch.cat([texts[text].pooled for _, text in CANDIDATES])  # (3 * B, D)
            scores.append(similarity(readout.matching[len(batch) :], pooled).view(3, -1))  # (3, B)
            grounded.append(Readout(*(x[: len(batch)].float().cpu() for x in readout)))
        mean = torch.stack(scores).mean(dim=0).T.tolist()  # (B, 3)
        for i, row in enumerate(batch):
            ranked = [ranked_boxes(one.logits[i], one.boxes[i]) for one in grounded]
            hits = mean_hits(ranked, row.grounding.boxes)
            yield Outcome(row.kind, *mean[i], cosines[i].item(), ranked[0][: max(HIT_RANKS)], hits)


def ranked_boxes(logits: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    """Boxes (Q, 4) by 1 - p(no object), the most certain first; logits (Q, slots + 1)."""
    confidence = 1 - logits.softmax(dim=-1)[:, -1]  # (Q,)
    return boxes[confidence.argsort(descending=True, stable=True)]


def mean_hits(ranked: list[torch.Tensor], wanted: torch.Tensor) -> dict[str, dict[int, float]]:
    """By overlap and rank, the share of the lists of boxes (Q, 4) that find one of the wanted (M, 4)."""
    corners = box_convert(wanted, "cxcywh", "xyxy")  # (M, 4)
    hits = {}
    for name, overlap in OVERLAPS.items():
        best = [
            overlap(box_convert(boxes, "cxcywh", "xyxy"), corners).amax(dim=1) for boxes in ranked
        ]  # (Q,)
        found = torch.stack(best) >= HIT_OVERLAP  # (K, Q)
        hits[name] = {rank: found[:, :rank].any(dim=1).float().mean().item() for rank in HIT_RANKS}
    return hits


# Figures.


def share(right: Sequence[bool]) -> dict:
    """A share with Wilson's interval of 95 %."""
    low, high = interval(sum(right), len(right))
    return {"share": sum(right) / len(right), "low": low, "high": high, "number": len(right)}


def mean_share(values: Sequence[float]) -> dict:
    """A mean of shares with a bootstrap interval of 95 % over samples."""
    values = np.asarray(values)  # (N,)
    rng = np.random.default_rng(0)
    means = values[rng.integers(len(values), size=(RESAMPLES, len(values)))].mean(axis=1)  # (RESAMPLES,)
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return {"share": values.mean().item(), "low": low.item(), "high": high.item(), "number": len(values)}


def matching_figures(found: Sequence[Outcome]) -> dict:
    """Both directions of matching, and how alike the captions are to the text encoder."""
    return {
        "text": share([o.text_is_right for o in found]),
        "picture": share([o.picture_is_right for o in found]),
        "both": share([o.text_is_right and o.picture_is_right for o in found]),
        "text_cosine": float(np.mean([o.text_cosine for o in found])),
    }


def figures(found: Sequence[Outcome]) -> dict:
    """All figures of an evaluation, as JSON takes them: matching, by kind of negative, and boxes."""
    kinds = {kind: [o for o in found if o.kind == kind] for kind in dict.fromkeys(o.kind for o in found)}
    return {
        "itm": matching_figures(found),
        "itm_by_kind": {kind: matching_figures(some) for kind, some in kinds.items()},
        "rec": {
            f"hit@{rank}_{name}": mean_share([o.hits[name][rank] for o in found])
            for name in OVERLAPS
            for rank in HIT_RANKS
        },
    }
