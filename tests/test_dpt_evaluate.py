"""The figures are those of hand-made outcomes; noise is fixed and shared; the page shows what was found.

pytest tests/test_dpt_evaluate.py
"""

import json

import pytest
import torch
from PIL import Image
from test_dpt_training import TinyData, tiny_reader

from dpt.adapter import similarity
from dpt.evaluate import (
    Outcome,
    figures,
    mean_hits,
    mean_share,
    noised,
    outcomes,
    ranked_boxes,
    share,
)
from dpt.latents import Latents
from dpt.report import block_table, write_blocks, write_evaluation

BOXES = torch.tensor([[0.5, 0.5, 0.2, 0.2]] * 10)


def outcome(kind="count", right=0.5, text=0.1, picture=0.2, iou=1.0):
    hits = {name: {1: iou, 5: iou, 10: 1.0} for name in ("iou", "giou")}
    return Outcome(kind, right, text, picture, 0.9, BOXES, hits)


def rows_of(reader, number=5):
    latents = Latents(reader.models.vae)
    return [latents.row(TinyData()[i]) for i in range(number)]


# Figures.


def test_matching_is_counted_in_both_directions_and_by_kind():
    found = [outcome(), outcome(text=0.6), outcome("object", picture=0.7), outcome("object", text=0.5)]
    told = figures(found)
    # A tie is no win.
    assert told["itm"]["text"]["share"] == 0.5
    assert told["itm"]["picture"]["share"] == 0.75
    assert told["itm"]["both"]["share"] == 0.25
    assert list(told["itm_by_kind"]) == ["count", "object"]
    assert told["itm_by_kind"]["object"]["picture"]["share"] == 0.5
    json.dumps(told)


def test_intervals_hold_their_share():
    wilson = share([True] * 9 + [False])
    assert wilson["low"] == pytest.approx(0.596, abs=1e-3) and wilson["high"] == pytest.approx(
        0.982, abs=1e-3
    )
    bootstrap = mean_share([1.0] * 50 + [0.0] * 50)
    assert bootstrap["share"] == 0.5
    assert bootstrap["low"] == pytest.approx(0.40, abs=0.02) and bootstrap["high"] == pytest.approx(
        0.60, abs=0.02
    )
    assert mean_share([1.0, 1.0]) == {"share": 1, "low": 1, "high": 1, "number": 2}


def test_boxes_are_ranked_by_how_little_they_are_no_object():
    logits = torch.tensor([[0.0, 0.0, 3.0], [5.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    boxes = torch.arange(12.0).view(3, 4)
    assert ranked_boxes(logits, boxes)[:, 0].tolist() == [4.0, 8.0, 0.0]


def test_hits_are_of_iou_and_of_giou_at_their_ranks():
    wanted = torch.tensor([[0.5, 0.5, 0.4, 0.4]])
    miss = [0.1, 0.1, 0.1, 0.1]
    # Shifted by a third of its width: IoU is exactly .5, GIoU is, too, as the hull is the union.
    shifted = [0.5 + 0.4 / 3 - 1e-4, 0.5, 0.4, 0.4]
    # Along both axes IoU stays above .5, GIoU falls below.
    corner = [0.57, 0.57, 0.4, 0.4]
    first = torch.tensor([miss, shifted, miss, miss, miss, miss])
    second = torch.tensor([corner] + [miss] * 5)
    hits = mean_hits([first, second], wanted)
    assert hits["iou"] == {1: 0.5, 5: 1.0, 10: 1.0}
    assert hits["giou"] == {1: 0.0, 5: 0.5, 10: 0.5}


def test_one_of_several_wanted_boxes_is_enough():
    wanted = torch.tensor([[0.2, 0.2, 0.2, 0.2], [0.8, 0.8, 0.2, 0.2]])
    assert mean_hits([wanted[1:]], wanted)["iou"][1] == 1


# Noise.


def test_noise_is_fixed_shared_by_a_samples_pictures_and_independent_of_the_batch():
    reader = tiny_reader()
    rows = rows_of(reader)
    one = noised(reader, rows, 0, seed=0, number=0, timestep=500)
    scaling = reader.models.vae.config.scaling_factor
    alpha_bar = reader.models.scheduler.alphas_cumprod[500]
    clean = torch.stack([torch.stack(row.latents)[:, 0] for row in rows]) * scaling
    noise = (one.latents - alpha_bar.sqrt() * clean) / (1 - alpha_bar).sqrt()
    torch.testing.assert_close(noise[:, 0], noise[:, 1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(noise[:, 0], noise[:, 2], rtol=1e-4, atol=1e-4)
    assert (noise[0, 0] - noise[1, 0]).abs().max() > 0.1
    assert torch.equal(noised(reader, rows[3:], 3, 0, 0, 500).latents, one.latents[3:])
    for seed, number in ((0, 1), (1, 0)):
        assert not torch.equal(noised(reader, rows, 0, seed, number, 500).latents, one.latents)
    assert one.timesteps.tolist() == [500] * 5


def test_scores_are_means_over_noises_of_what_one_computes_singly():
    reader = tiny_reader()
    rows = rows_of(reader, 3)
    found = list(outcomes(reader, rows, noises=2, seed=0))
    for i, (row, got) in enumerate(zip(rows, found, strict=True)):
        expected = []
        for number in range(2):
            seen = noised(reader, [row], i, 0, number, 500)
            for picture, text in ((0, 0), (0, 1), (1, 0)):
                encoded = reader.condition.encode([row.captions[text]])
                features = reader.features(seen.latents[:, picture], seen.timesteps, encoded.states)
                matching = reader.adapter(features, seen.timesteps).matching
                expected.append(similarity(matching, encoded.pooled).item())
        means = [sum(expected[c::3]) / 2 for c in range(3)]
        assert [got.right, got.hard_text, got.hard_picture] == pytest.approx(means, abs=1e-5)
    assert list(outcomes(reader, rows, 2, 0))[1].right == found[1].right
    assert list(outcomes(reader, rows, 2, 0, timestep=200))[1].right != found[1].right


# The page.


def test_an_evaluation_is_written_with_pictures_to_look_at(tmp_path):
    data = TinyData()
    found = [outcome(), outcome(text=0.6, iou=0.0), outcome("object <b>")]
    record = {"model": "tiny", "figures": figures(found)}
    path = write_evaluation(tmp_path, record, found, data, {})
    page = path.read_text()
    assert page.count("<img") == 4
    assert "object &lt;b&gt;" in page and "object <b>" not in page
    assert json.loads((tmp_path / "evaluation.json").read_text())["figures"]["itm"]["text"]["number"] == 3
    with Image.open(tmp_path / "boxes_right.png") as sheet:
        colours = {colour for _, colour in sheet.convert("RGB").getcolors(1 << 20)}
    assert {(0x2A, 0x9D, 0x4A), (0x1D, 0x6F, 0xD1)} <= colours


def test_pictures_of_an_earlier_evaluation_do_not_stay(tmp_path):
    for found in ([outcome(iou=0.0)], [outcome()]):
        write_evaluation(tmp_path, {"figures": figures(found)}, found, TinyData(), {})
    assert {p.name for p in tmp_path.glob("boxes*")} == {"boxes_right.png"}


def test_blocks_are_compared_in_a_table_and_a_figure(tmp_path):
    blocks = {"bottom0": figures([outcome(), outcome(text=0.6)]), "mid": figures([outcome()])}
    lines = block_table(blocks).splitlines()
    assert [line.split()[0] for line in lines] == ["block", "bottom0", "mid"]
    assert lines[1].split()[1:] == ["0.500", "1.000", "1.000"]
    with Image.open(write_blocks(tmp_path, {}, blocks)) as picture:
        assert picture.width >= 1200
    assert set(json.loads((tmp_path / "blocks.json").read_text())["blocks"]) == set(blocks)
