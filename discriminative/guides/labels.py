"""Labels of classifiers as strings: the name in a prompt, a class by its number or name, and one class in
two label lists."""

import difflib
import re
from collections import Counter
from functools import lru_cache

from discriminative.errors import UsageError

# "001." (CUB), "03111_" (iNaturalist), "n02123159 " (WordNet).
PREFIX = re.compile(r"^(\d+[._]|n\d{8}[ _])")
TAXONOMY_LEVELS = 7  # kingdom, phylum, class, order, family, genus, species
# "LABEL_0", "7", "n02123159" and "?" say of no class what it is.
NAMELESS = re.compile(r"((label|class|n)?[\W_]*\d+)?\W*")
SUGGESTED = 5  # labels that hold a word, in an error


def prompt_class_name(label: str) -> str:
    """The name of a class in prompts: first synonym, lower case, underscores as spaces, no number in front.

    "tiger_cat, Felis" -> "tiger cat"; "001.Black_footed_Albatross" -> "black footed albatross"; of
    iNaturalist's taxonomy the last two levels,
    "03111_Animalia_Chordata_Aves_Passeriformes_Turdidae_Turdus_migratorius" -> "turdus migratorius".
    """
    name = PREFIX.sub("", label.split(",")[0].strip())
    levels = name.split("_")
    if len(levels) >= TAXONOMY_LEVELS and " " not in name:
        levels = levels[-2:]
    return " ".join(" ".join(levels).lower().split())


def says_what_it_is(label: str) -> bool:
    """Whether a prompt can take the label for its class: "tiger cat", but not "LABEL_0"."""
    return not NAMELESS.fullmatch(prompt_class_name(label))


def find_class(classifier: str, labels: list[str], wanted: int | str) -> int:
    """The number, counted from 1, of a class that is given by its number or by a name.

    Args:
        wanted: a number from 1; or a label, the name of a class in prompts, or one of a label's synonyms,
            in any case.

    Raises:
        UsageError: there is no such class, with those that hold the name or are nearest; or the name fits
            several, with their numbers.
    """
    if isinstance(wanted, int):
        if not 1 <= wanted <= len(labels):
            raise UsageError(
                f"--class_index: {wanted} was given; allowed is 1 to {len(labels)} for the classifier "
                f"{classifier}, or a name"
            )
        return wanted
    written = wanted.strip().lower()
    text = written if "," in wanted else prompt_class_name(wanted)
    # A label beats a prompt's name, which beats a synonym.
    readings = (
        lambda label: [label.lower()],
        lambda label: [prompt_class_name(label)],
        lambda label: [prompt_class_name(part) for part in label.split(",")],
    )
    for reading in readings:
        found = [i for i, label in enumerate(labels, start=1) if {written, text} & set(reading(label))]
        if len(found) == 1:
            return found[0]
        if found:
            several = ", ".join(f"{i} ({labels[i - 1]})" for i in found[:5])
            raise UsageError(f"--class_index: {wanted!r} was given, which fits {several}; give the number")
    raise UsageError(
        f"--class_index: {wanted!r} was given, which is no label of the classifier {classifier}; "
        f"{suggestion(labels, wanted)}"
    )


def words_of(text: str) -> list[str]:
    """The words of a label or a name, in lower case: letters and digits alone."""
    return re.findall(r"[^\W_]+", text.lower())


def classes_with(labels: list[str], name: str) -> list[int]:
    """The numbers, counted from 1, of the classes whose labels hold every word of ``name``.

    Whole words come before parts of others: "phone" finds "cellular phone", then "xylophone".
    """
    wanted = words_of(name)
    whole = []
    parts = []
    for number, label in enumerate(labels, start=1):
        words = words_of(label)
        if wanted and set(wanted) <= set(words):
            whole.append(number)
        elif wanted and all(word in " ".join(words) for word in wanted):
            parts.append(number)
    return whole + parts


def suggestion(labels: list[str], name: str) -> str:
    """What could be meant by a name that is none: the labels that hold it, or else the nearest three."""
    holding = classes_with(labels, name)
    numbers = holding[:SUGGESTED] or nearest_classes(labels, name)
    told = ", ".join(f"{number} ({labels[number - 1]})" for number in numbers)
    if not holding:
        return f"the nearest are {told}"
    more = len(holding) - len(numbers)
    rest = f" and {more} more, which --list_classes True --class_index {name!r} lists" if more else ""
    return f"it is a part of {told}{rest}"


def nearest_classes(labels: list[str], name: str, number: int = 3) -> list[int]:
    """The numbers, counted from 1, of the classes that are spelled most like ``name``, in whole or in a
    word."""
    matcher = difflib.SequenceMatcher(None, b=name.strip().lower())

    def likeness(label: str) -> float:
        readings = {label.lower(), *(prompt_class_name(part) for part in label.split(",")), *words_of(label)}
        ratios = []
        for reading in readings:
            matcher.set_seq1(reading)
            ratios.append(matcher.ratio())
        return max(ratios)

    ranked = sorted(enumerate(labels, start=1), key=lambda row: -likeness(row[1]))
    return [i for i, _ in ranked[:number]]


def match_label(labels: list[str], target: int, others: list[str]) -> int | None:
    """Where class ``target`` of ``labels`` stands in ``others``, both from 0; None where it cannot be
    told for sure.

    Labels are compared whole, then by their names in prompts. A name may stand twice in a list (ImageNet
    has two cranes), so lists that agree from end to end are matched by index, and a doubled name
    otherwise not at all; no more is "LABEL_0", which says of no class what it is.
    """
    return match_labels(tuple(labels), tuple(others))[target]


@lru_cache(maxsize=16)  # a run over all classes asks once a class
def match_labels(labels: tuple[str, ...], others: tuple[str, ...]) -> list[int | None]:
    """What :func:`match_label` says of every class of ``labels``, in time that grows with the lists'
    lengths."""
    found: list[int | None] = [None] * len(labels)
    for reading in (str, prompt_class_name):
        ours = [reading(label) for label in labels]
        theirs = [reading(label) for label in others]
        often = Counter(ours)
        there = Counter(theirs)
        places = {
            name: i
            for i, name in enumerate(theirs)
            if often[name] == 1 == there[name] and says_what_it_is(name)
        }
        agree = ours == theirs
        for i, name in enumerate(ours):
            if found[i] is None:
                found[i] = i if agree else places.get(name)
    return found
