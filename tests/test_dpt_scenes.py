"""The miniature's data for DPT: what its captions and expressions claim is so, and its negatives are not.

pytest tests/test_dpt_scenes.py
"""

from collections import Counter

import numpy as np
import pytest
import torch

from discriminative.errors import UsageError
from discriminative.hub import MINIATURE
from dpt.data import scenes
from dpt.data.facts import (
    RELATIONS,
    Fact,
    Phrase,
    Reference,
    Scene,
    Wording,
    caption,
    held_out,
    is_false,
    is_held_out,
    is_true,
    named,
    references,
    referents,
    relates,
    shown,
    verdict,
)
from dpt.data.scenes import INDEX, KINDS, PROMPT_KINDS, Miniature, prompts
from miniature.scenes import CLASSES, HUES, PLAIN, SIZE, TINTABLE, Plan, Thing, draw, render

NUMBER = 60  # samples of each split


def story(split, combinations="any"):
    data = Miniature(split, NUMBER, combinations=combinations)
    return [data.story(index) for index in range(NUMBER)]


@pytest.fixture(scope="module")
def stories():
    return {split: story(split) for split in ("train", "test")}


@pytest.fixture(scope="module")
def every(stories):
    return [*stories["train"], *stories["test"]]


def thing(name, x, y, colour=None, side=10):
    return Thing(INDEX[name], colour, (x - side // 2, y - side // 2, x + side // 2, y + side // 2))


# The language of facts.


def test_a_count_is_exact_unless_it_is_read_as_a_lower_bound():
    frogs = Scene((thing("frog", 10, 10), thing("frog", 40, 40)))
    told = {number: Fact((Phrase("frog", number=number),)) for number in (1, 2, 3)}
    assert [verdict(told[number], frogs) for number in (1, 2, 3)] == [False, True, False]
    assert [verdict(told[number], frogs, at_least=True) for number in (1, 2, 3)] == [True, True, False]


def test_the_own_colour_of_a_sprite_proves_nothing():
    car = Scene((thing("car", 20, 20),))
    assert verdict(Fact((Phrase("car"),)), car) is True
    assert verdict(Fact((Phrase("car", "red"),)), car) is None
    assert not is_true(Fact((Phrase("car", "red"),)), car)
    assert not is_false(Fact((Phrase("car", "red"),)), car)


def test_a_diagonal_is_neither_clearly_above_nor_clearly_beside():
    upper = thing("car", 15, 15)
    assert [relates(upper, r, thing("frog", 45, 44)) for r in RELATIONS] == [None, False, None, False]
    assert [relates(upper, r, thing("frog", 45, 18)) for r in RELATIONS] == [True, False, False, False]
    assert [relates(upper, r, thing("frog", 12, 45)) for r in RELATIONS] == [False, False, True, False]


def test_a_relation_holds_between_the_things_that_the_colours_name():
    scene = Scene((thing("car", 10, 30, "red"), thing("frog", 30, 30), thing("car", 50, 30, "blue")))
    frog = Phrase("frog")
    assert is_true(Fact((Phrase("car", "red"), frog), "left of"), scene)
    assert is_false(Fact((Phrase("car", "blue"), frog), "left of"), scene)
    assert is_false(Fact((frog,), None, "red"), Scene(scene.things, "blue"))


def test_captions_are_worded_as_those_that_the_model_learned():
    two = Fact((Phrase("car", "red"), Phrase("umbrella")), "left of")
    assert caption(two, Wording("a photo of {}")) == "a photo of a red car left of an umbrella"
    assert caption(Fact(two.phrases), Wording("{}", "next to")) == "a red car next to an umbrella"
    assert caption(Fact((Phrase("cactus", number=3),), None, "gray"), Wording("{}")) == (
        "three cacti on a gray background"
    )
    three = Fact((Phrase("car", "red"), Phrase("ewe"), Phrase("frog")))
    assert caption(three, Wording("{}")) == "a red car, an ewe and a frog"


# Hard and random negatives.


def test_every_hard_negative_is_false_of_its_scene_and_true_of_its_counterfactual(every):
    for pair, _ in every:
        assert is_true(pair.true.fact, pair.true.scene), pair.true.caption
        assert is_false(pair.hard.fact, pair.true.scene), pair.hard.caption
        assert is_true(pair.hard.fact, pair.hard.scene), pair.hard.caption
        assert is_false(pair.true.fact, pair.hard.scene), pair.true.caption


def test_every_random_negative_is_false_even_where_numbers_are_lower_bounds(every):
    for pair, other in every:
        assert is_true(other.fact, other.scene)
        assert is_false(other.fact, pair.true.scene, at_least=True), other.caption
        assert is_false(pair.true.fact, other.scene, at_least=True), other.caption


def test_only_the_fact_changes_in_the_picture(every):
    for pair, _ in every:
        true = Counter(pair.true.scene.things)
        hard = Counter(pair.hard.scene.things)
        touched = np.zeros((SIZE, SIZE), bool)
        for x0, y0, x1, y1 in (t.box for t in [*(true - hard), *(hard - true)]):
            touched[y0:y1, x0:x1] = True
        differs = np.any(np.asarray(pair.true.image) != np.asarray(pair.hard.image), axis=2)
        assert differs.any(), pair.true.caption
        assert not (differs & ~touched).any(), pair.true.caption
        most = {"recolour": 1, "object": 1, "count": 1}.get(pair.kind, 2)
        assert max((true - hard).total(), (hard - true).total()) <= most, pair.kind
        assert pair.true.scene.background == pair.hard.scene.background


def test_each_kind_of_negative_changes_what_it_says(every):
    for pair, _ in every:
        true = pair.true.fact
        hard = pair.hard.fact
        colours = [sorted(str(phrase.colour) for phrase in fact.phrases) for fact in (true, hard)]
        names = [sorted(phrase.name for phrase in fact.phrases) for fact in (true, hard)]
        numbers = [[phrase.number for phrase in fact.phrases] for fact in (true, hard)]
        assert (names[0] != names[1]) == (pair.kind == "object")
        assert (colours[0] != colours[1]) == (pair.kind == "recolour")
        assert (numbers[0] != numbers[1]) == (pair.kind == "count")
        assert (true.relation != hard.relation) == (pair.kind == "invert relation")
        assert (true.phrases[::-1] == hard.phrases and true.relation == hard.relation is not None) == (
            pair.kind == "swap things"
        )
        if pair.kind == "count":
            assert abs(numbers[0][0] - numbers[1][0]) == 1


def test_all_kinds_of_negatives_come_equally_often(stories):
    for split in stories.values():
        assert Counter(pair.kind for pair, _ in split) == dict.fromkeys(KINDS, NUMBER // len(KINDS))


def test_the_words_alone_do_not_betray_a_hard_negative():
    pairs = [scenes.draw_pair("count", np.random.default_rng([5, i])) for i in range(150)]
    numbers = [Counter(getattr(p, side).fact.phrases[0].number for p in pairs) for side in ("true", "hard")]
    assert all(abs(numbers[0][n] - numbers[1][n]) < 30 for n in (1, 2, 3)), numbers
    assert min(numbers[0].values()) > 15


def test_what_is_drawn_is_seen(every):
    for pair, other in every:
        for told in (pair.true, pair.hard, other):
            assert not scenes.crowded(told.scene)
            assert not scenes.hidden(told.scene)
            assert all(t.colour != told.scene.background for t in told.scene.things)
            for x0, y0, x1, y1 in (t.box for t in told.scene.things):
                assert 0 <= x0 < x1 <= SIZE
                assert 0 <= y0 < y1 <= SIZE


def test_overlapping_boxes_and_camouflage_are_thrown_away(monkeypatch):
    assert scenes.crowded(Scene((thing("car", 20, 20), thing("frog", 25, 20)), "gray"))
    assert not scenes.crowded(Scene((thing("car", 20, 20), thing("frog", 30, 20)), "gray"))
    assert scenes.hidden(Scene((thing("ribbon bow", 20, 20),), "red"))
    assert not scenes.hidden(Scene((thing("ribbon bow", 20, 20),), "blue"))
    for check in ("crowded", "hidden"):
        with monkeypatch.context() as patch:
            patch.setattr(scenes, check, lambda scene: True)
            assert scenes._draft("object", np.random.default_rng(0)).tell() is None


def test_all_texts_fit_the_models_prompt(every):
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(MINIATURE / "model" / "tokenizer")
    texts = [told.caption for pair, other in every for told in (pair.true, pair.hard, other)]
    texts += [Miniature("test", NUMBER)[i].grounding.expression for i in range(12)]
    assert max(map(len, tokenizer(texts).input_ids)) <= tokenizer.model_max_length


# Held-out combinations.


def test_train_never_shows_a_held_out_combination(stories):
    for pair, other in stories["train"]:
        for told in (pair.true, pair.hard, other):
            assert not held_out(told.scene), told.caption
            assert not held_out(told.fact), told.caption
    assert any(held_out(pair.true.scene) for pair, _ in stories["test"])


def test_a_test_can_be_held_to_one_side_of_the_line():
    for combinations, expected in (("seen", False), ("held out", True)):
        data = Miniature("test", 12, combinations=combinations)
        assert {held_out(data.story(i)[0].true.scene) for i in range(12)} == {expected}


def test_a_fixed_share_is_held_out():
    coloured = [(name, hue) for name in TINTABLE for hue in HUES]
    assert sum(map(is_held_out, coloured)) == len(TINTABLE)
    names = [c.name for c in CLASSES]
    related = [(a, r, b) for a in names for b in names if a != b for r in ("left of", "above")]
    assert 0.08 < sum(map(is_held_out, related)) / len(related) < 0.12
    # Pinned: a token learned by one version must be tested by the same line.
    assert is_held_out(("car", "yellow"))
    assert sum(map(is_held_out, related)) == 369


def test_a_relation_and_its_inverse_are_one_combination():
    first = Fact((Phrase("car"), Phrase("frog")), "right of")
    second = Fact((Phrase("frog"), Phrase("car")), "left of")
    assert named(first) == named(second) == {("frog", "left of", "car")}
    assert shown((thing("car", 45, 30), thing("frog", 15, 30))) == {("frog", "left of", "car")}


# Referring expressions.


def test_every_expression_means_exactly_one_thing_and_its_span_names_it():
    data = Miniature("test", NUMBER)
    sorts = Counter()
    for index in range(NUMBER):
        grounding = data[index].grounding
        scene = data.story(index)[0].true.scene
        [(reference, meant)] = [
            (r, i) for r, i in references(scene) if r.text("the")[0] == grounding.expression
        ]
        assert referents(reference, scene).count(True) == 1
        assert referents(reference, scene).count(False) == len(scene.things) - 1
        sorts[reference.kind] += 1
        x, y, width, height = grounding.boxes[0].mul(SIZE).tolist()
        assert (x - width / 2, y - height / 2, x + width / 2, y + height / 2) == pytest.approx(
            scene.things[meant].box, abs=1e-3
        )
        [[(start, end)]] = grounding.spans
        assert grounding.expression[start:end].endswith(reference.phrase.noun)
    assert set(sorts) == {"name", "colour", "outermost", "relation"}, sorts


def test_an_expression_that_fits_two_things_is_none():
    scene = Scene((thing("car", 10, 30, "red"), thing("car", 50, 30, "blue"), thing("frog", 30, 30)))
    said = {reference.text("the")[0]: index for reference, index in references(scene)}
    assert "the car" not in said
    assert said["the frog"] == 2
    assert said["the red car"] == said["the leftmost car"] == said["the car left of the frog"] == 0
    assert said["the blue car"] == said["the rightmost car"] == 1
    assert "the topmost car" not in said
    assert "the frog left of the car" not in said
    assert Reference(Phrase("car"), "left of").text("bare") == ("left car", (0, 8))


def test_a_thing_of_its_own_colour_is_not_told_by_colour():
    scene = Scene((thing("car", 10, 30, "red"), thing("car", 50, 30)))
    assert "the red car" not in [reference.text("the")[0] for reference, _ in references(scene)]


# The data set.


def same(first, second):
    return first.caption == second.caption and torch.equal(first.picture.image, second.picture.image)


def test_a_sample_follows_from_its_seed_split_epoch_and_index():
    train = Miniature("train", 12)
    first = train[7]
    assert same(first, Miniature("train", 99)[7])
    assert first.grounding.expression == train[7].grounding.expression
    assert not same(first, Miniature("train", 12, seed=1)[7])
    assert not same(first, Miniature("test", 12, combinations="seen")[7])
    train.set_epoch(1)
    assert not same(first, train[7])
    train.set_epoch(0)
    assert same(first, train[7])


def test_the_epoch_leaves_validation_and_test_alone():
    for split in ("validation", "test"):
        data = Miniature(split, 3)
        before = data[2]
        data.set_epoch(5)
        assert same(before, data[2])


def test_equal_keys_are_equal_images():
    data = Miniature("train", 6)
    keys = {}
    for epoch in range(2):
        data.set_epoch(epoch)
        for index in range(6):
            sample = data[index]
            for picture in (sample.picture, sample.hard_picture, sample.random_picture):
                assert picture.key not in keys
                keys[picture.key] = picture.image
    data.set_epoch(0)
    assert torch.equal(keys[data[3].hard_picture.key], data[3].hard_picture.image)


def test_samples_have_their_kinds_in_turn_and_images_in_range():
    data = Miniature("train", 6)
    samples = [data[i] for i in range(6)]
    for sample in samples:
        pictures = (sample.picture, sample.hard_picture, sample.random_picture)
        assert all(p.image.shape == (3, SIZE, SIZE) for p in pictures)
        assert all(0 <= p.image.min() < p.image.max() <= 1 for p in pictures)
    assert [sample.kind for sample in samples] == list(KINDS)
    assert samples[2].grounding.boxes.shape == (1, 4)
    with pytest.raises(IndexError):
        data[6]


@pytest.mark.parametrize(
    ("arguments", "named_flag"),
    [
        ({"split": "val"}, "--split: 'val' was given; allowed is train, validation, test"),
        ({"samples": 0}, "--samples: 0 was given; allowed is 1 or more"),
        ({"seed": -1}, "--seed: -1 was given; allowed is 0 or more"),
        ({"wording": "a"}, "--wording: 'a' was given; allowed is the, bare"),
        ({"combinations": "held out"}, "--combinations: 'held out' was given for train"),
    ],
)
def test_a_wrong_argument_is_told_in_one_line(arguments, named_flag):
    with pytest.raises(UsageError) as error:
        Miniature(**arguments)
    assert str(error.value).startswith(named_flag)
    assert "\n" not in str(error.value)


# Prompts.


@pytest.mark.parametrize("kind", PROMPT_KINDS)
def test_prompts_are_distinct_known_to_the_model_and_carry_their_fact(kind):
    found = prompts(kind, 100, seed=0)
    assert len({prompt.text for prompt in found}) == 100
    assert found[:20] == prompts(kind, 20, seed=0)
    assert found != prompts(kind, 100, seed=1)
    for prompt in found:
        assert all(phrase.text in prompt.text for phrase in prompt.fact.phrases)
        assert prompt.held_out == held_out(prompt.fact)
        if kind == "count":
            assert prompt.fact.phrases[0].number in (2, 3)
            assert prompt.fact.phrases[0].name in PLAIN
        if kind == "attribute":
            assert len({phrase.colour for phrase in prompt.fact.phrases}) == 2
        if kind == "relation":
            assert f" {prompt.fact.relation} " in prompt.text


def test_more_prompts_than_there_are_come_again():
    assert len(prompts("count", 200, seed=0)) == 200
    with pytest.raises(UsageError, match="--prompts: 'colour' was given"):
        prompts("colour", 1, seed=0)


# The world's own pictures.


def test_a_plan_draws_the_same_picture_every_time():
    pair = scenes.draw_pair("object", np.random.default_rng(3))
    again = scenes.draw_pair("object", np.random.default_rng(3))
    assert np.array_equal(np.asarray(pair.true.image), np.asarray(again.true.image))
    rng = np.random.default_rng(4)
    plan = Plan(scenes.plan_backdrop("red", rng), (scenes.plan_thing(0, None, (30, 30), 20.0, rng),))
    first, things = draw(plan)
    second, _ = draw(plan)
    assert first.tobytes() == second.tobytes()
    assert max(things[0].box[2] - things[0].box[0], things[0].box[3] - things[0].box[1]) == 20


def test_the_miniatures_own_scenes_satisfy_their_facts():
    # The checker reads any object with things and a background.
    for index in range(30):
        scene = render("test", index, count=1)
        [shown_thing] = scene.things
        fact = Fact(
            (Phrase(CLASSES[shown_thing.class_index].name, shown_thing.colour),), None, scene.background
        )
        assert verdict(fact, scene) is True
