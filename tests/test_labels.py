"""Class names: in prompts, by the user's words, and across two label lists."""

import pytest

from classifiers import read_labels
from discriminative.errors import UsageError
from discriminative.guides.labels import find_class, match_label, prompt_class_name

CUB = ["001.Black_footed_Albatross", "002.Laysan_Albatross", "014.Indigo_Bunting"]
THRUSH = "03111_Animalia_Chordata_Aves_Passeriformes_Turdidae_Turdus_migratorius"


@pytest.mark.parametrize(
    ("label", "name"),
    [
        ("tiger cat", "tiger cat"),
        ("Tiger_Cat, Felis", "tiger cat"),
        ("001.Black_footed_Albatross", "black footed albatross"),
        (THRUSH, "turdus migratorius"),
        (THRUSH.removeprefix("03111_"), "turdus migratorius"),
        ("n02123159 tiger cat", "tiger cat"),
        ("Black_throated_Blue_Warbler", "black throated blue warbler"),
        ("three-toed sloth, ai, Bradypus tridactylus", "three-toed sloth"),
    ],
)
def test_the_prompts_name_is_plain_words(label, name):
    assert prompt_class_name(label) == name


def test_the_users_class_283_is_imagenets_tiger_cat():
    labels = read_labels("inet")
    assert len(labels) == 1000
    assert find_class("inet", labels, "tiger cat") == find_class("inet", labels, "Tiger_Cat") == 283
    assert prompt_class_name(labels[283 - 1]) == "tiger cat"


def test_a_class_is_found_by_label_name_or_synonym():
    assert find_class("cub", CUB, "014.Indigo_Bunting") == 3
    assert find_class("cub", CUB, "indigo bunting") == 3
    assert find_class("inet", read_labels("inet"), "Tinca tinca") == 1


@pytest.mark.parametrize("index", [0, -3, 1001])
def test_an_index_outside_the_labels_is_refused(index):
    with pytest.raises(UsageError, match=f"--class_index: {index} was given; allowed is 1 to 1000"):
        find_class("inet", read_labels("inet"), index)


def test_an_unknown_name_tells_the_nearest_three():
    with pytest.raises(
        UsageError, match=r"'tigre cat' was given, which is no label .* nearest are 283 \(tiger cat\), "
    ):
        find_class("inet", read_labels("inet"), "tigre cat")
    with pytest.raises(UsageError, match=r"nearest are 3 \(014.Indigo_Bunting\), [12] .*, [12] "):
        find_class("cub", CUB, "indgo bunting")


def test_a_name_of_several_classes_is_refused_with_their_numbers():
    with pytest.raises(
        UsageError, match=r"'crane' was given, which fits 135 \(crane\), 518 \(crane\); give the number"
    ):
        find_class("inet", read_labels("inet"), "crane")


def test_a_label_that_stands_twice_is_matched_by_its_index_where_the_lists_agree():
    """ImageNet has two cranes; the first match by name would be the bird for both."""
    labels = read_labels("inet")
    assert labels[134] == labels[517] == "crane"
    assert match_label(labels, 517, list(labels)) == 517
    assert match_label(labels, 517, labels[::-1]) is None


def test_lists_of_different_spelling_are_matched_by_name():
    others = ["cat", "n02123159 tiger_cat, Felis", "bat", "Bat"]
    assert match_label(["tiger cat", "bat", "dog"], 0, others) == 1
    assert match_label(["tiger cat", "bat", "dog"], 1, others) == 2  # whole labels agree
    assert match_label(["tiger cat", "BAT", "dog"], 1, others) is None  # two bats by name
    assert match_label(["tiger cat", "bat", "dog"], 2, others) is None
