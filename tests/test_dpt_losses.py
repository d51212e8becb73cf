"""The losses and the matcher say what one works out by hand, or with loops that know nothing of them.

pytest tests/test_dpt_losses.py
"""

import math
from itertools import permutations

import pytest
import torch

from discriminative.errors import UsageError
from dpt.adapter import Readout
from dpt.losses import (
    alignment_loss,
    box_losses,
    denoising_loss,
    itm_losses,
    positive_map,
    ranking_loss,
    rec_losses,
    total_loss,
    words_loss,
)
from dpt.matcher import Target, match, pair_costs
from dpt.settings import LossWeights

SCALE = torch.tensor(math.log(1 / 0.07))


def random_readout(batch=2, queries=4, slots=5, width=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    return Readout(
        matching=torch.zeros(batch, 1, 1),
        logits=torch.randn(batch, queries, slots + 1, generator=g),
        boxes=torch.rand(batch, queries, 4, generator=g) * 0.5 + 0.2,
        alignment=unit(torch.randn(batch, queries, width, generator=g)),
    )


def random_target(boxes, slots=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    positive = torch.zeros(boxes, slots)
    for i in range(boxes):
        positive[i, torch.randperm(slots, generator=g)[: 1 + i % 2]] = 1
    return Target(torch.rand(boxes, 4, generator=g) * 0.5 + 0.2, positive)


def unit(x):
    return x / x.norm(dim=-1, keepdim=True)


# Loops that know nothing of torch.


def naive_giou(one, other):
    def corners(box):
        x, y, w, h = box
        return x - w / 2, y - h / 2, x + w / 2, y + h / 2

    ax, ay, bx, by = corners(one)
    cx, cy, dx, dy = corners(other)
    shared = max(0, min(bx, dx) - max(ax, cx)) * max(0, min(by, dy) - max(ay, cy))
    union = (bx - ax) * (by - ay) + (dx - cx) * (dy - cy) - shared
    hull = (max(bx, dx) - min(ax, cx)) * (max(by, dy) - min(ay, cy))
    return shared / union - (hull - union) / hull


def naive_softmax(row):
    powers = [math.exp(x) for x in row]
    return [p / sum(powers) for p in powers]


def naive_cost(logits, box, target, i):
    words = sum(
        m * p for m, p in zip(target.positive[i].tolist(), naive_softmax(logits.tolist())[:-1], strict=True)
    )
    wanted = target.boxes[i].tolist()
    distance = sum(abs(a - b) for a, b in zip(box.tolist(), wanted, strict=True))
    return -words + 5 * distance - 2 * naive_giou(box.tolist(), wanted)


def naive_rec(readout, tokens, mask, targets, pairs):
    """The four sums, undivided."""
    parts = dict.fromkeys(("ce", "l1", "giou", "align"), 0.0)
    for b, (queries, chosen) in enumerate(pairs):
        owner = dict(zip(queries.tolist(), chosen.tolist(), strict=True))
        number = readout.logits.shape[1]
        slots = targets[b].positive.shape[1]
        words = [k for k in range(tokens.shape[1]) if mask[b, k]]
        logits = (readout.alignment[b] @ tokens[b].T / 0.07).tolist()
        named = {q: [k for k in range(slots) if targets[b].positive[i, k]] for q, i in owner.items()}
        for q in range(number):
            p = naive_softmax(readout.logits[b, q].tolist())
            if q not in owner:
                parts["ce"] -= 0.1 * math.log(p[-1])
                continue
            box = readout.boxes[b, q].tolist()
            wanted = targets[b].boxes[owner[q]].tolist()
            parts["ce"] -= sum(math.log(p[k]) for k in named[q])
            parts["l1"] += sum(abs(x - y) for x, y in zip(box, wanted, strict=True))
            parts["giou"] += 1 - naive_giou(box, wanted)
            over = math.log(sum(math.exp(logits[q][k]) for k in words))
            parts["align"] += (over - sum(logits[q][k] for k in named[q]) / len(named[q])) / 2
        for k in {k for tokens_of in named.values() for k in tokens_of}:
            mine = [q for q in named if k in named[q]]
            over = math.log(sum(math.exp(logits[q][k]) for q in range(number)))
            parts["align"] += (over - sum(logits[q][k] for q in mine) / len(mine)) / 2
    return parts


# The matcher.


@pytest.mark.parametrize("seed", range(5))
def test_matching_is_the_best_of_all_permutations(seed):
    readout = random_readout(batch=1, queries=3, seed=seed)
    target = random_target(3, seed=seed + 50)
    costs = [
        [naive_cost(readout.logits[0, q], readout.boxes[0, q], target, i) for i in range(3)] for q in range(3)
    ]
    found = pair_costs(readout.logits[0], readout.boxes[0], target)
    assert torch.allclose(found, torch.tensor(costs), atol=1e-5)
    best = min(permutations(range(3)), key=lambda order: sum(costs[q][i] for q, i in enumerate(order)))
    [(queries, chosen)] = match(readout.logits, readout.boxes, [target])
    assert queries.tolist() == [0, 1, 2]
    assert tuple(chosen.tolist()) == best


def test_images_are_matched_apart_and_may_have_no_box():
    readout = random_readout(batch=3)
    targets = [random_target(2), random_target(0), random_target(6)]
    pairs = match(readout.logits, readout.boxes, targets)
    assert [len(queries) for queries, _ in pairs] == [2, 0, 4]
    for queries, chosen in pairs:
        assert len(set(queries.tolist())) == len(set(chosen.tolist())) == len(queries)


def test_a_readout_that_is_no_number_still_gets_a_matching():
    readout = random_readout(batch=1)
    boxes = readout.boxes.clone()
    boxes[0, 1] = torch.nan
    [(queries, _)] = match(readout.logits, boxes, [random_target(2)])
    assert 1 not in queries.tolist()


# Image-text matching.


def test_candidates_alike_cost_the_logarithm_of_their_number():
    assert ranking_loss(torch.full((4, 3), 0.3), SCALE).item() == pytest.approx(math.log(3))


def test_a_cosine_counts_by_the_exponential_of_the_learned_scale():
    scores = torch.tensor([[0.5, 0.4, 0.2]])
    expected = math.log(1 + math.exp(-0.1 / 0.07) + math.exp(-0.3 / 0.07))
    assert ranking_loss(scores, SCALE).item() == pytest.approx(expected, rel=1e-5)


def test_matching_losses_average_over_the_batch_each_with_its_own_negatives():
    right = torch.tensor([0.5, 0.1])
    other_texts = torch.tensor([[0.4, 0.2], [0.1, 0.1]])
    other_images = torch.tensor([[0.5, 0.5], [0.2, 0.0]])
    parts = itm_losses(right, other_texts, other_images, torch.tensor(0.0))

    def naive(rows):
        return sum(math.log(sum(math.exp(s - row[0]) for s in row)) for row in rows) / len(rows)

    assert parts["i2t"].item() == pytest.approx(naive([[0.5, 0.4, 0.2], [0.1, 0.1, 0.1]]), rel=1e-5)
    assert parts["t2i"].item() == pytest.approx(naive([[0.5, 0.5, 0.5], [0.1, 0.2, 0.0]]), rel=1e-5)


def test_matching_losses_train_the_scale():
    scale = SCALE.clone().requires_grad_()
    ranking_loss(torch.tensor([[0.5, 0.4, 0.2]]), scale).backward()
    assert scale.grad < 0  # the right one is ahead: a larger scale lowers the loss


# Referring expressions.


def test_words_cost_their_logarithms_and_idle_queries_a_tenth():
    logits = torch.zeros(1, 2, 4)  # three slots and "no object", all alike
    loss = words_loss(logits, torch.tensor([0]), torch.tensor([1]), torch.tensor([[1.0, 0.0, 1.0]]))
    assert loss.item() == pytest.approx(2 * math.log(4) + 0.1 * math.log(4))


def test_boxes_far_apart_cost_more_than_boxes_that_only_miss():
    one = torch.tensor([[0.125, 0.125, 0.25, 0.25]])
    parts = box_losses(one, torch.tensor([[0.875, 0.875, 0.25, 0.25]]))
    assert parts["l1"].item() == pytest.approx(1.5)
    assert parts["giou"].item() == pytest.approx(1 + (1 - 0.125))  # hull 1, union 1/8
    same = box_losses(one, one)
    assert [same["l1"].item(), same["giou"].item()] == pytest.approx([0, 0], abs=1e-6)


def test_aligned_pairs_cost_what_the_temperature_leaves():
    axes = torch.eye(2)[None]  # two queries, two tokens, each pair alike
    first = torch.tensor([0, 0])
    loss = alignment_loss(axes, axes, torch.ones(1, 2), first, torch.tensor([0, 1]), torch.eye(2))
    assert loss.item() == pytest.approx(2 * math.log(1 + math.exp(-1 / 0.07)), abs=1e-6)
    crossed = alignment_loss(axes, axes, torch.ones(1, 2), first, torch.tensor([1, 0]), torch.eye(2))
    assert crossed.item() == pytest.approx(2 * math.log(1 + math.exp(1 / 0.07)), rel=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_losses_of_expressions_are_those_of_plain_loops(seed):
    readout = random_readout(batch=3, seed=seed)
    tokens = unit(torch.randn(3, 7, 3, generator=torch.Generator().manual_seed(seed)))
    mask = torch.tensor([[1] * 7, [1] * 5 + [0] * 2, [1] * 6 + [0]])
    targets = [random_target(2, seed=seed), random_target(3, seed=seed + 1), random_target(0)]
    pairs = match(readout.logits, readout.boxes, targets)
    expected = naive_rec(readout, tokens, mask, targets, pairs)
    parts = rec_losses(readout, tokens, mask, targets, num_boxes=5)
    assert {name: part.item() for name, part in parts.items()} == pytest.approx(
        {name: value / 5 for name, value in expected.items()}, rel=1e-4
    )


def test_padding_and_what_stands_in_it_do_not_count():
    readout = random_readout(batch=1)
    targets = [random_target(2)]
    tokens = unit(torch.randn(1, 5, 3))
    short = rec_losses(readout, tokens, torch.ones(1, 5), targets, 2)["align"]
    padded = torch.cat([tokens, unit(torch.randn(1, 4, 3))], dim=1)
    mask = torch.tensor([[1] * 5 + [0] * 4])
    assert rec_losses(readout, padded, mask, targets, 2)["align"].item() == pytest.approx(short.item())


def test_slots_and_tokens_need_not_be_of_one_number():
    for tokens in (3, 9):
        words = unit(torch.randn(2, tokens, 3))
        targets = [Target(torch.full((1, 4), 0.5), torch.tensor([[1.0, 1, 0, 0, 0]]))] * 2
        parts = rec_losses(random_readout(), words, torch.ones(2, tokens), targets, 2)
        assert all(part.isfinite() for part in parts.values())


def test_losses_are_divided_by_the_number_of_boxes_but_never_by_less_than_one():
    readout = random_readout()
    tokens = unit(torch.randn(2, 5, 3))
    targets = [random_target(1), random_target(2)]
    one, two, none = (rec_losses(readout, tokens, torch.ones(2, 5), targets, n) for n in (1, 2.5, 0))
    for name in one:
        assert two[name].item() == pytest.approx(one[name].item() / 2.5)
        assert none[name].item() == one[name].item()


def test_a_batch_without_boxes_teaches_only_that_nothing_is_there():
    readout = random_readout()
    leaves = Readout(*(part.requires_grad_() for part in readout))
    parts = rec_losses(
        leaves, unit(torch.randn(2, 5, 3)), torch.ones(2, 5), [random_target(0)] * 2, num_boxes=0
    )
    sum(parts.values()).backward()
    assert [parts[name].item() for name in ("l1", "giou", "align")] == [0, 0, 0]
    assert parts["ce"] > 0
    assert leaves.logits.grad[..., -1].max() < 0


def test_gradients_are_finite_with_padding_and_reach_every_part():
    leaves = Readout(*(part.requires_grad_() for part in random_readout()))
    tokens = unit(torch.randn(2, 6, 3)).requires_grad_()
    mask = torch.tensor([[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 0]])
    parts = rec_losses(leaves, tokens, mask, [random_target(2), random_target(1)], 3)
    total_loss(parts, LossWeights()).backward()
    for part in (leaves.logits, leaves.boxes, leaves.alignment, tokens):
        assert part.grad.isfinite().all()
        assert part.grad.abs().max() > 0


def test_half_precision_and_autocast_are_brought_to_float32():
    readout = Readout(*(part.bfloat16() for part in random_readout()))
    tokens = unit(torch.randn(2, 5, 3)).bfloat16()
    targets = [random_target(1), random_target(2)]
    with torch.autocast("cpu", torch.bfloat16):
        inside = rec_losses(readout, tokens, torch.ones(2, 5), targets, 3)
        rank = ranking_loss(torch.tensor([[0.5, 0.4]]).bfloat16(), SCALE)
    outside = rec_losses(Readout(*(p.float() for p in readout)), tokens.float(), torch.ones(2, 5), targets, 3)
    assert rank.dtype == torch.float32
    for name, part in inside.items():
        assert part.dtype == torch.float32
        assert torch.equal(part, outside[name])


# The sum.


def test_the_total_is_weighted_by_name():
    parts = {name: torch.tensor(1.0) for name in ("ce", "l1", "giou", "align", "i2t", "t2i")}
    assert total_loss(parts, LossWeights()).item() == 1 + 5 + 2 + 1 + 1 + 1
    assert total_loss(parts | {"mse": torch.tensor(2.0)}, LossWeights(mse=3, l1=0)).item() == 6 + 6


def test_denoising_is_the_mean_squared_error_in_float32():
    loss = denoising_loss(torch.full((2, 4, 3, 3), 3.0).half(), torch.full((2, 4, 3, 3), 1.0).half())
    assert (loss.item(), loss.dtype) == (4, torch.float32)


# Spans.

TEXT = "the red bird"
OFFSETS = [(0, 0), (0, 3), (4, 7), (8, 10), (10, 12), (0, 0)]


@pytest.mark.parametrize(
    ("span", "tokens"),
    [((0, 12), [1, 2, 3, 4]), ((4, 12), [2, 3, 4]), ((5, 6), [2]), ((9, 11), [3, 4]), ((3, 5), [2])],
)
def test_tokens_under_a_span_are_positive_and_special_ones_never(span, tokens):
    positive = positive_map(((span,),), OFFSETS, slots=8)
    assert positive.shape == (1, 8)
    assert positive[0].nonzero().flatten().tolist() == tokens
    assert set(positive.unique().tolist()) <= {0, 1}


def test_each_box_has_its_own_spans_and_may_have_several():
    positive = positive_map((((0, 3), (8, 12)), ((4, 7),)), OFFSETS, slots=6, text=TEXT)
    assert positive.tolist() == [[0, 1, 0, 1, 1, 0], [0, 0, 1, 0, 0, 0]]


def test_tokens_behind_the_slots_are_left_out():
    assert positive_map((((0, 12),),), OFFSETS, slots=3).tolist() == [[0, 1, 1]]


@pytest.mark.parametrize("span", [(4, 13), (12, 14), (-1, 3), (5, 5), (7, 4)])
@pytest.mark.parametrize("text", [None, TEXT])
def test_a_span_outside_its_text_is_told_in_one_line(span, text):
    with pytest.raises(UsageError) as error:
        positive_map(((span,),), OFFSETS, slots=8, text=text)
    message = str(error.value)
    assert message.startswith(f"the span [{span[0]}, {span[1]}] was given for a text of 12 characters")
    assert message.endswith("allowed is 0 <= start < end <= 12")
    assert "\n" not in message


def test_a_span_on_no_token_is_told():
    with pytest.raises(UsageError, match=r"the span \[3, 4\] was given, on which no token stands"):
        positive_map((((3, 4),),), OFFSETS, slots=8, text=TEXT)
    with pytest.raises(UsageError, match="one of the text's first 2 tokens"):
        positive_map((((8, 12),),), OFFSETS, slots=2, text=TEXT)


def test_a_span_may_end_in_the_space_behind_the_last_word():
    spans = (((4, 13),),)
    assert positive_map(spans, OFFSETS, 8, text=TEXT + " ")[0].nonzero().flatten().tolist() == [2, 3, 4]
