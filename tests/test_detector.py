"""The bundled detector sees scenes as they are, and one label for each thing.

pytest tests/test_detector.py
"""

import json

import numpy as np
import pytest
import torch
from torchvision.ops import box_iou

from dpt.data.scenes import Miniature
from experiments.scene_judge import judge
from miniature import detector as module
from miniature.classifiers import load_vae, reconstructions
from miniature.detector import (
    LABELS,
    Seen,
    above,
    choose_threshold,
    draw_scenes,
    exact_share,
    kept_scenes,
    load_detector,
    new_model,
    nouns,
    one_each,
    plan_scene,
    smear,
    target_of,
    train,
)
from miniature.scenes import BACKGROUNDS, CLASSES, HUES, SIZE, TINTABLE, Plan, Thing, draw, plan_backdrop
from miniature.training import to_tensor

CPU = torch.device("cpu")
PAIRS = 60


@pytest.fixture(scope="module")
def detector():
    return load_detector()


@pytest.fixture(scope="module")
def pairs():
    data = Miniature("test", PAIRS, seed=1)
    return [data.story(i)[0] for i in range(PAIRS)]


def in_unit_range(images):
    return to_tensor(images, CPU) / 2 + 0.5


def frog(score, x=10, side=20):
    return Seen(Thing(32, None, (x, 10, x + side, 10 + side)), score)


# The bundled detector.


@pytest.mark.parametrize("through_vae", [False, True])
def test_captions_of_unseen_pictures_are_told_from_their_counterfactuals(detector, pairs, through_vae):
    images = np.stack([np.asarray(pair.true.image) for pair in pairs])
    if through_vae:
        images = reconstructions(load_vae(module.MINIATURE, CPU)[0], images, 0.0, CPU)
    found = judge(detector, pairs, images)
    assert np.mean([one.said == (True, False) for one in found]) >= 0.98
    assert np.mean([overlap for one in found for overlap in one.overlaps()]) > 0.8


def test_a_picture_without_anything_has_no_things(detector):
    rng = np.random.default_rng(0)
    empty = [draw(Plan(plan_backdrop(colour, rng), ()))[0] for colour in BACKGROUNDS for _ in range(4)]
    images = in_unit_range(np.stack([np.asarray(image) for image in empty]))
    assert detector.things(images) == [()] * len(images)
    assert detector.things(torch.zeros(0, 3, SIZE, SIZE)) == []


def test_smears_are_no_things(detector):
    images = in_unit_range(draw_scenes("test", 60).images)
    smeared = smear(images, torch.Generator().manual_seed(0))
    assert smeared.shape == images.shape
    assert np.mean([found == () for found in detector.things(smeared)]) >= 0.95


def test_one_thing_gets_one_label(detector):
    images, things = draw_scenes("test", 60)
    for found, wanted in zip(detector.things(in_unit_range(images)), things, strict=True):
        assert len(found) <= len(wanted) + 1
        boxes = torch.tensor([thing.box for thing in found]).view(-1, 4)
        overlaps = box_iou(boxes.float(), boxes.float()) - torch.eye(len(found))
        assert (overlaps < 0.5).all()


def test_boxes_lie_in_the_picture_and_the_most_certain_comes_first(detector):
    images, _ = draw_scenes("test", 30)
    for found in detector.seen(in_unit_range(images)):
        scores = [score for _, score in found]
        assert scores == sorted(scores, reverse=True)
        for x0, y0, x1, y1 in (thing.box for thing, _ in found):
            assert 0 <= x0 < x1 <= SIZE and 0 <= y0 < y1 <= SIZE


def test_a_picture_is_seen_alike_alone_and_among_others(detector):
    images = in_unit_range(draw_scenes("test", 6).images)
    assert detector.things(images) == [detector.things(image[None])[0] for image in images]


def test_pictures_of_another_size_are_refused(detector):
    with pytest.raises(ValueError, match=r"\(2, 3, 32, 32\) were given; needed is \(N, 3, 64, 64\)"):
        detector.things(torch.zeros(2, 3, 32, 32))


def test_the_weights_are_small_and_the_config_says_what_they_are():
    folder = module.MINIATURE / module.NAME
    config = json.loads((folder / module.CONFIG).read_text())
    assert (folder / module.WEIGHTS).stat().st_size < 6e6
    assert config["architecture"] == module.ARCHITECTURE
    assert len(config["labels"]) == len(LABELS)
    assert load_detector().threshold == config["threshold"]


# Labels and scenes.


def test_labels_cover_all_classes_and_tints():
    assert len(LABELS) == len(set(LABELS)) == len(CLASSES) + len(TINTABLE) * len(HUES)
    assert {index for index, _ in LABELS} == set(range(len(CLASSES)))
    tinted = {CLASSES[index].name for index, tint in LABELS if tint}
    assert tinted == set(TINTABLE)


def test_training_scenes_hold_every_label_twins_and_nothing():
    every = [plan_scene("train", i).placements for i in range(3000)]
    shown = {(p.class_index, p.colour) for placements in every for p in placements}
    assert shown == set(LABELS)
    assert {len(placements) for placements in every} == {0, 1, 2, 3}
    several = [placements for placements in every if len(placements) == 3]
    alike = [placements for placements in several if len({p.class_index for p in placements}) == 1]
    assert 0.15 < len(alike) / len(several) < 0.35
    assert any(len({p.colour for p in placements}) == 3 for placements in alike)
    assert any(len({p.colour for p in placements}) == 1 for placements in alike)


def test_splits_draw_from_their_own_streams():
    assert plan_scene("train", 3) == plan_scene("train", 3)
    assert len({plan_scene(split, 3).backdrop for split in ("train", "validation", "test")}) == 3


def test_kept_scenes_are_those_that_were_drawn(tmp_path):
    fresh = draw_scenes("train", 5)
    for _ in range(2):
        kept = kept_scenes(tmp_path, 5)
        assert np.array_equal(kept.images, fresh.images)
        assert kept.things == fresh.things


def test_a_mirrored_picture_has_mirrored_boxes():
    right = (Thing(LABELS[3][0], LABELS[3][1], (40, 10, 60, 30)),)
    assert target_of(right, False)["boxes"].tolist() == [[40, 10, 60, 30]]
    assert target_of(right, True)["boxes"].tolist() == [[4, 10, 24, 30]]
    assert target_of(right, True)["labels"].tolist() == [3]
    assert target_of((), True)["boxes"].shape == (0, 4)


# Which detections count.


def test_of_two_labels_for_one_place_the_more_certain_stays():
    boxes = torch.tensor([[10.0, 10, 30, 30], [11, 10, 30, 31], [40, 40, 60, 60]])
    found = one_each(boxes, torch.tensor([0.4, 0.9, 0.5]), torch.tensor([0, 1, 2]))
    assert [(thing.class_index, thing.colour) for thing, _ in found] == [LABELS[1], LABELS[2]]
    assert found[0].thing.box == (11, 10, 30, 31)


def test_the_threshold_is_the_highest_that_costs_no_scene():
    truth = [(frog(1).thing,), (), (frog(1).thing, frog(1, 40).thing)]
    found = [[frog(0.7), frog(0.3, 40)], [frog(0.2)], [frog(0.9), frog(0.6, 40)]]
    assert exact_share(found, truth, 0.25) == 2 / 3
    assert choose_threshold(found, truth) == 0.6
    assert above(found[0], 0.5) == (frog(0.7).thing,)


def test_exactness_heeds_classes_tints_and_numbers():
    car = Thing(43, "red", (0, 0, 9, 9))
    assert nouns([car]) == nouns([Thing(43, "red", (50, 50, 60, 60))])
    assert nouns([car]) != nouns([Thing(43, None, (0, 0, 9, 9))])
    assert nouns([car]) != nouns([car, car])


# Training.


def test_training_leaves_a_detector_that_loads_and_goes_on_from_its_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SCENES", 8)
    monkeypatch.setattr(module, "HELD_OUT_SCENES", 4)
    monkeypatch.setattr(module, "BATCH", 2)
    small = module.ARCHITECTURE | {"channels": [8, 8, 8, 8], "width": 32, "convolutions": 1}
    monkeypatch.setattr(module, "ARCHITECTURE", small)
    train(tmp_path, CPU, 2)
    first = load_detector(tmp_path / "detector")
    assert isinstance(first.things(torch.zeros(1, 3, SIZE, SIZE))[0], tuple)
    (tmp_path / "detector").rename(tmp_path / "first")
    train(tmp_path, CPU, 2)
    assert "resumed at step 2 of 2" in (tmp_path / "detector.log").read_text()
    again = load_detector(tmp_path / "detector").model.state_dict()
    assert all(torch.equal(value, again[name]) for name, value in first.model.state_dict().items())


def test_every_parameter_learns():
    model = new_model("resnet18d", [8, 8, 8, 8], 32, 1).train()
    images, things = draw_scenes("train", 4)
    losses = model(list(in_unit_range(images)), [target_of(some, False) for some in things])
    sum(losses.values()).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
