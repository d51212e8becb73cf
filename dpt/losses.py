"""The losses of DPT: image-text matching, referring expressions, and their sum; all in float32 or better.

Matching is from DPT (section 3.3), referring expressions from MDETR (Kamath et al. 2021, section 2.2).
"""

import torch
import torch.nn.functional as F
from torchvision.ops import box_convert, generalized_box_iou

from discriminative.errors import UsageError
from discriminative.precision import at_least_float32
from dpt.adapter import Readout
from dpt.data.samples import Span
from dpt.matcher import Target, match
from dpt.settings import LossWeights

NO_OBJECT_WEIGHT = 0.1  # of a query without a box
ALIGNMENT_TEMPERATURE = 0.07


def positive_map(
    spans: tuple[tuple[Span, ...], ...], offsets: list[Span], slots: int, text: str | None = None
) -> torch.Tensor:
    """The tokens that name each box, from characters: (M, slots), 1 where token and span overlap, else 0.

    Args:
        spans: of each box the pieces of the text that name it, as characters (start, end).
        offsets: of each token its characters (start, end); (0, 0) where it has none.
        slots: tokens that count; those behind are left out.
        text: that the spans point into; None: it ends where its last token does.

    Raises:
        UsageError: a span is outside the text, or on no token.
    """
    length = max((end for _, end in offsets), default=0) if text is None else len(text)
    positive = torch.zeros(len(spans), slots)  # (M, slots)
    for box, pieces in enumerate(spans):
        for start, end in pieces:
            if not 0 <= start < end <= length:
                raise UsageError(
                    f"the span [{start}, {end}] was given for a text of {length} characters{_quoted(text)}; "
                    f"allowed is 0 <= start < end <= {length}"
                )
            named = [k for k, (a, b) in enumerate(offsets[:slots]) if a < end and b > start]
            if not named:
                raise UsageError(
                    f"the span [{start}, {end}] was given, on which no token stands{_quoted(text)}; "
                    f"allowed is a span with one of the text's first {min(slots, len(offsets))} tokens"
                )
            positive[box, named] = 1
    return positive


def _quoted(text: str | None) -> str:
    return "" if text is None else f" ({text!r})"


def ranking_loss(scores: torch.Tensor, logit_scale: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of candidates' similarities (B, K), the first being right; a scalar, the batch's mean.

    Args:
        scores: cosines in [-1, 1].
        logit_scale: natural logarithm of their factor, a scalar.
    """
    logits = at_least_float32(logit_scale).exp() * at_least_float32(scores)  # (B, K)
    return -logits.log_softmax(dim=1)[:, 0].mean()


def itm_losses(
    right: torch.Tensor, other_texts: torch.Tensor, other_images: torch.Tensor, logit_scale: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Image-text matching: the right text for an image (i2t), the right image for a text (t2i); scalars.

    Args:
        right: similarities of image and caption (B,).
        other_texts: of the image and texts that are false of it (B, K), each under its own text.
        other_images: of the caption and images that it is false of (B, K).
        logit_scale: natural logarithm of the cosines' factor, a scalar.
    """
    return {
        "i2t": ranking_loss(torch.cat([right[:, None], other_texts], dim=1), logit_scale),
        "t2i": ranking_loss(torch.cat([right[:, None], other_images], dim=1), logit_scale),
    }


def rec_losses(
    readout: Readout,
    tokens: torch.Tensor,
    mask: torch.Tensor,
    targets: list[Target],
    num_boxes: float,
) -> dict[str, torch.Tensor]:
    """Referring expressions: words (ce), boxes (l1, giou) and alignment (align) of the matched queries.

    Args:
        readout: of B images under their expressions.
        tokens: the expressions' tokens (B, L, A), from ``DiscriminativeAdapter.project_tokens``.
        mask: (B, L), nonzero at what is no padding.
        targets: B of them.
        num_boxes: boxes of the batch, averaged over the processes; less than 1 counts as 1.

    Returns:
        scalars, each a sum over the batch divided by ``num_boxes``.
    """
    device = readout.logits.device
    # Half precision would come in by matrix products.
    with torch.autocast(device.type, enabled=False):
        pairs = match(readout.logits, readout.boxes, targets)
        image = torch.cat([torch.full_like(queries, i) for i, (queries, _) in enumerate(pairs)])
        image = image.to(device)  # (N,)
        query = torch.cat([queries for queries, _ in pairs]).to(device)  # (N,)
        matched = [(t.boxes.cpu()[m], t.positive.cpu()[m]) for t, (_, m) in zip(targets, pairs, strict=True)]
        boxes = torch.cat([boxes for boxes, _ in matched]).to(device)  # (N, 4)
        positive = torch.cat([positive for _, positive in matched]).to(device)  # (N, slots)
        parts = {
            "ce": words_loss(readout.logits, image, query, positive),
            **box_losses(readout.boxes[image, query], boxes),
            "align": alignment_loss(readout.alignment, tokens, mask, image, query, positive),
        }
    return {name: part / max(num_boxes, 1) for name, part in parts.items()}


def words_loss(
    logits: torch.Tensor, image: torch.Tensor, query: torch.Tensor, positive: torch.Tensor
) -> torch.Tensor:
    """Cross-entropy of the words of matched queries, and of "no object" for the others; a scalar, a sum.

    Args:
        logits: (B, Q, slots + 1).
        image: of the N matched queries (N,). query: their indices (N,).
        positive: their tokens (N, slots).
    """
    log_p = at_least_float32(logits).log_softmax(dim=-1)  # (B, Q, slots + 1)
    words = -(positive.to(log_p) * log_p[image, query, :-1]).sum()
    unmatched = torch.ones_like(log_p[..., -1])  # (B, Q)
    unmatched[image, query] = 0
    return words - NO_OBJECT_WEIGHT * (unmatched * log_p[..., -1]).sum()


def box_losses(boxes: torch.Tensor, wanted: torch.Tensor) -> dict[str, torch.Tensor]:
    """L1 distance and 1 - generalised IoU of matched boxes (N, 4), centre and size; scalars, sums."""
    boxes = at_least_float32(boxes)  # (N, 4)
    wanted = wanted.to(boxes)  # (N, 4)
    corners = box_convert(boxes, "cxcywh", "xyxy")  # (N, 4)
    wanted_corners = box_convert(wanted, "cxcywh", "xyxy")  # (N, 4)
    giou = generalized_box_iou(corners, wanted_corners).diagonal()  # (N,)
    return {"l1": (boxes - wanted).abs().sum(), "giou": (1 - giou).sum()}


def alignment_loss(
    alignment: torch.Tensor,
    tokens: torch.Tensor,
    mask: torch.Tensor,
    image: torch.Tensor,
    query: torch.Tensor,
    positive: torch.Tensor,
) -> torch.Tensor:
    """Contrastive alignment of queries and tokens (MDETR, eqs. 1 and 2); a scalar, half the sum of both ways.

    Args:
        alignment: queries (B, Q, A), of norm 1.
        tokens: (B, L, A), of norm 1. mask: (B, L), nonzero at what is no padding.
        image: of the N matched queries (N,). query: their indices (N,).
        positive: their tokens (N, slots).
    """
    tokens = at_least_float32(tokens)  # (B, L, A)
    logits = at_least_float32(alignment) @ tokens.transpose(1, 2) / ALIGNMENT_TEMPERATURE  # (B, Q, L)
    belongs = torch.zeros_like(logits)  # (B, Q, L)
    shared = min(positive.shape[1], logits.shape[2])
    belongs[image, query, :shared] = positive[:, :shared].to(logits)

    padding = (mask == 0)[:, None]  # (B, 1, L)
    over_tokens = logits.masked_fill(padding, -torch.inf).logsumexp(dim=2)  # (B, Q)
    over_queries = logits.logsumexp(dim=1)  # (B, L)
    query_losses = over_tokens - _mean_where(logits, belongs, dim=2)  # (B, Q)
    token_losses = over_queries - _mean_where(logits, belongs, dim=1)  # (B, L)
    return (query_losses[belongs.any(dim=2)].sum() + token_losses[belongs.any(dim=1)].sum()) / 2


def _mean_where(x: torch.Tensor, ones: torch.Tensor, dim: int) -> torch.Tensor:
    """Means along a dimension of what is marked by ones; 0 where nothing is."""
    return (x * ones).sum(dim) / ones.sum(dim).clamp(min=1)


def denoising_loss(predicted: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean squared error (mse) of the UNet's prediction (B, 4, h, w), a scalar."""
    return F.mse_loss(at_least_float32(predicted), at_least_float32(target))


def total_loss(parts: dict[str, torch.Tensor], weights: LossWeights) -> torch.Tensor:
    """The weighted sum of the parts that are there, by their names in ``LossWeights``; a scalar.

    Raises:
        AttributeError: a part of another name.
    """
    return sum(getattr(weights, name) * part for name, part in parts.items())
