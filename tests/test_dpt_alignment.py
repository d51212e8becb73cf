"""A picture's alignment follows from its fact and the detected things alone; prompts are the clusters.

pytest tests/test_dpt_alignment.py
"""

import json

import pytest
import torch

from dpt.alignment import MEASURES, Alignment, align, alignment_figures, alignments
from dpt.data.facts import Fact, Phrase, Scene
from dpt.data.scenes import INDEX, PROMPT_KINDS, Prompt, prompts
from miniature.scenes import Thing

RED_CAR = Phrase("car", "red")
BLUE_OCTOPUS = Phrase("octopus", "blue")


def thing(name, x=32, y=32, colour=None, side=10):
    return Thing(INDEX[name], colour, (x - side // 2, y - side // 2, x + side // 2, y + side // 2))


def scene(*things):
    return Scene(things)


def judged(full, kind="presence", name="frog"):
    fact = Fact((Phrase(name),))
    return Prompt(f"a {name}", fact, kind), Alignment(full, full, None, None, full)


# One picture.


def test_a_picture_that_shows_all_of_its_caption_scores_one_in_all_that_it_claims():
    both = Fact((RED_CAR, BLUE_OCTOPUS), "left of")
    shown = align(both, scene(thing("car", 15, colour="red"), thing("octopus", 45, colour="blue")))
    assert shown == Alignment(1, 1, 1, 1, 1)
    assert align(Fact((Phrase("frog"),)), scene(thing("frog"))) == Alignment(1, 1, None, None, 1)


def test_an_empty_picture_shows_nothing():
    assert align(Fact((RED_CAR, BLUE_OCTOPUS), "above"), scene()) == Alignment(0, 0, 0, 0, 0)


def test_swapped_colours_break_the_binding_alone():
    swapped = scene(thing("car", colour="blue"), thing("octopus", 50, colour="red"))
    assert align(Fact((RED_CAR, BLUE_OCTOPUS)), swapped) == Alignment(1, 1, 0, None, 0)


def test_binding_is_a_share_of_the_phrases_with_a_colour():
    half = scene(thing("car", colour="red"), thing("octopus", 50, colour="red"), thing("frog", 10))
    assert align(Fact((RED_CAR, BLUE_OCTOPUS, Phrase("frog"))), half).binding == 0.5


def test_an_untinted_sprite_has_its_own_colour_where_it_has_one():
    """A picture of a red car is right, whether or not the renderer would have tinted it."""
    assert align(Fact((RED_CAR,)), scene(thing("car"))) == Alignment(1, 1, 1, None, 1)
    blue = align(Fact((Phrase("car", "blue"),)), scene(thing("car")))
    assert (blue.presence, blue.binding, blue.full) == (1, 0, 0)
    # The rocket is of several colours.
    rocket = align(Fact((Phrase("rocket", "red"),)), scene(thing("rocket")))
    assert (rocket.presence, rocket.binding, rocket.full) == (1, 0, 0)


def test_one_thing_too_many_breaks_the_count_and_not_the_presence():
    frogs = Fact((Phrase("frog", number=2),))
    three = scene(*(thing("frog", x) for x in (10, 30, 50)))
    assert align(frogs, three) == Alignment(1, 0, None, None, 0)
    assert align(frogs, Scene(three.things[:2])) == Alignment(1, 1, None, None, 1)
    assert align(frogs, Scene(three.things[:1])) == Alignment(1, 0, None, None, 0)


def test_twins_in_two_colours_count_together():
    twins = Fact((RED_CAR, Phrase("car", "blue")))
    shown = align(twins, scene(thing("car", 10, colour="red"), thing("car", 50, colour="blue")))
    assert shown == Alignment(1, 1, 1, None, 1)
    alike = align(twins, scene(thing("car", 10, colour="red"), thing("car", 50, colour="red")))
    assert alike == Alignment(1, 1, 0.5, None, 0)


def test_things_that_no_phrase_names_change_nothing():
    assert align(Fact((Phrase("frog"),)), scene(thing("frog"), thing("car", 50))).full == 1


def test_a_relation_holds_only_where_it_is_clear_and_between_the_things_named():
    told = Fact((Phrase("frog"), Phrase("car")), "left of")
    frog = thing("frog", 15, 15)
    assert align(told, scene(frog, thing("car", 45, 18))).relation == 1
    assert align(told, scene(thing("car", 5, 18), frog)).relation == 0
    assert align(told, scene(frog, thing("car", 45, 45))).relation == 0
    assert align(told, scene(frog, thing("penguin", 45, 18))).relation == 0
    blue = Phrase("car", "blue")  # an untinted car is red
    assert align(Fact((Phrase("frog"), blue), "left of"), scene(frog, thing("car", 45, 18))).relation == 0


def test_a_detector_sees_each_picture_once_and_prompts_keep_their_order():
    class Frogs:
        def things(self, images):
            return [(thing("frog"),) if image.any() else () for image in images]

    told = [Prompt("a frog", Fact((Phrase("frog"),)), "presence")] * 2
    images = torch.stack([torch.zeros(3, 64, 64), torch.ones(3, 64, 64)])  # (2, 3, 64, 64)
    assert [alignment.full for _, alignment in alignments(Frogs(), told, images)] == [0, 1]
    with pytest.raises(ValueError):
        alignments(Frogs(), told[:1], images)


# Figures.


def test_a_prompt_counts_once_however_many_pictures_it_has():
    told = alignment_figures([judged(1.0)] * 9 + [judged(0.0, name="car")])
    full = told["all"]["full"]
    assert (told["all"]["prompts"], told["all"]["pictures"]) == (2, 10)
    assert (full["share"], full["number"]) == (0.5, 2)
    # Of two prompts nothing is certain, however many pictures.
    assert (full["low"], full["high"]) == (0, 1)


def test_pictures_of_one_prompt_are_averaged_first():
    assert alignment_figures([judged(1.0), judged(0.0)])["all"]["full"]["share"] == 0.5


def test_figures_tell_kinds_and_held_out_prompts_apart():
    every = [prompt for kind in PROMPT_KINDS for prompt in prompts(kind, 30, seed=0)]
    assert any(prompt.held_out for prompt in every)
    told = alignment_figures(
        [(prompt, align(prompt.fact, scene())) for prompt in every if prompt.held_out]
        + [(prompt, Alignment(1, 1, None, None, 1)) for prompt in every if not prompt.held_out]
    )
    assert list(told["by_kind"]) and set(told["by_kind"]) == set(PROMPT_KINDS)
    assert told["by_held_out"]["held out"]["full"]["share"] == 0
    assert told["by_held_out"]["seen"]["full"]["share"] == 1
    sides = told["by_held_out"].values()
    assert sum(side["prompts"] for side in sides) == told["all"]["prompts"] == 120
    json.dumps(told)


def test_a_measure_that_no_prompt_claims_is_none():
    told = alignment_figures([judged(1.0)])
    assert told["all"]["binding"] is None and told["all"]["relation"] is None
    assert set(MEASURES) <= set(told["all"])
    assert "held out" not in told["by_held_out"]
