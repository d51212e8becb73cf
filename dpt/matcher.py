"""Which query answers for which box: the assignment of the least cost (DETR, Carion et al. 2020, eq. 1)."""

from typing import NamedTuple

import torch
from scipy.optimize import linear_sum_assignment
from torchvision.ops import box_convert, generalized_box_iou

from discriminative.precision import at_least_float32

# Of the three parts of a pair's cost (MDETR).
WORDS_COST = 1.0
L1_COST = 5.0
GIOU_COST = 2.0
HOPELESS = 1e6  # cost of a pair that is not a number


class Target(NamedTuple):
    """The boxes that an expression refers to.

    Args:
        boxes: (M, 4) as centre x, centre y, width, height, shares of the image in [0, 1].
        positive: (M, slots), 1 at the tokens that name the box, else 0; see ``losses.positive_map``.
    """

    boxes: torch.Tensor
    positive: torch.Tensor


def pair_costs(logits: torch.Tensor, boxes: torch.Tensor, target: Target) -> torch.Tensor:
    """Cost (Q, M) of giving each box of one image to each query, in float32 or better (MDETR, Kamath et al.
    2021).

    The probability that the query gives to the box's words, negative; the L1 distance; the generalised
    intersection over union, negative.

    Args:
        logits: (Q, slots + 1). boxes: (Q, 4), as in ``Target``.
    """
    probabilities = at_least_float32(logits).softmax(dim=-1)[:, :-1]  # (Q, slots)
    boxes = at_least_float32(boxes)  # (Q, 4)
    wanted = target.boxes.to(boxes)  # (M, 4)
    words = (probabilities[:, None] * target.positive.to(boxes)).sum(dim=-1)  # (Q, M)
    distance = (boxes[:, None] - wanted).abs().sum(dim=-1)  # (Q, M)
    corners = box_convert(boxes, "cxcywh", "xyxy")  # (Q, 4)
    giou = generalized_box_iou(corners, box_convert(wanted, "cxcywh", "xyxy"))  # (Q, M)
    return -WORDS_COST * words + L1_COST * distance - GIOU_COST * giou


@torch.no_grad()
def match(
    logits: torch.Tensor, boxes: torch.Tensor, targets: list[Target]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The best one-to-one assignment of queries to boxes, image by image.

    Args:
        logits: (B, Q, slots + 1).
        boxes: (B, Q, 4), as in ``Target``.
        targets: B of them, of M_i boxes each; M_i may be 0.

    Returns:
        for each image the queries and their boxes, (min(Q, M_i),) indices each, on the CPU.
    """
    pairs = []
    for image_logits, image_boxes, target in zip(logits, boxes, targets, strict=True):
        costs = pair_costs(image_logits, image_boxes, target).cpu()  # (Q, M)
        # An overflow shows in the loss; it should not end the run here.
        costs = costs.nan_to_num(HOPELESS, HOPELESS, -HOPELESS)
        queries, chosen = linear_sum_assignment(costs.numpy())
        pairs.append((torch.as_tensor(queries), torch.as_tensor(chosen)))  # (min(Q, M),) each
    return pairs
