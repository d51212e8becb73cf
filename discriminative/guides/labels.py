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


def find_class(classifier: str, labels: list[str], wanted: int | str) -> int:
    """The number, counted from 1, of a class that is given by its number or by a name.

    Args:
        wanted: a number from 1; or a label, the name of a class in prompts, or one of a label's synonyms,
            in any case.

    Raises:
        UsageError: there is no such class, with the nearest three; or the name fits several, with their
            numbers.
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
    # The nearest name of each label.
    likeness = [
        max(difflib.SequenceMatcher(None, written, n).ratio() for r in readings for n in r(label))
        for label in labels
    ]
    nearest = sorted(range(len(labels)), key=lambda i: -likeness[i])[:3]
    near = ", ".join(f"{i + 1} ({labels[i]})" for i in nearest)
    raise UsageError(
        f"--class_index: {wanted!r} was given, which is no label of the classifier {classifier}; the "
        f"nearest are {near}"
    )


def match_label(labels: list[str], target: int, others: list[str]) -> int | None:
    """Where class ``target`` of ``labels`` stands in ``others``, both from 0; None where it cannot be
    told for sure.

    Labels are compared whole, then by their names in prompts. A name may stand twice in a list (ImageNet
    has two cranes), so lists that agree from end to end are matched by index, and a doubled name
    otherwise not at all.
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
        places = {name: i for i, name in enumerate(theirs) if often[name] == 1 == there[name]}
        agree = ours == theirs
        for i, name in enumerate(ours):
            if found[i] is None:
                found[i] = i if agree else places.get(name)
    return found
