"""``--insight``: which attributes a token adds to the pictures that its evaluation drew. Nothing is drawn."""

import re
import shutil
from pathlib import Path
from typing import Any

import torch

from apps.plan import Plan
from discriminative.errors import WorkError
from discriminative.guides.attributes import AT_ONCE, Attributes
from discriminative.records.files import read_json, replace_folder, write_json
from discriminative.records.insight import (
    ARMS,
    WITH_PICTURES,
    Attribute,
    Pair,
    compare_attributes,
    correction,
    draw_change,
    find_pairs,
    read_pictures,
)
from discriminative.tokens.files import fingerprint
from discriminative.tokens.prompts import read_phrases

FOLDER = "insight"  # of the pictures, below the evaluation's


def is_looked_into(plan: Plan) -> bool:
    """Whether the evaluation on disk has the attributes of this token, these phrases and this scorer."""
    if plan.vectors is None or not plan.folder.result.exists():
        return False
    config = plan.config
    result = read_json(plan.folder.result)
    told = result.get("insight") or {}
    asked = {"phrases": read_phrases(config.insight, "insight"), "scorer": config.clip_model}
    return result.get("token") == fingerprint(plan.vectors) and asked.items() <= told.items()


def look_into(plan: Plan, token: str, attributes: Attributes) -> dict[str, Any]:
    """Score the evaluation's pictures, and write what the token adds to ``evaluation.json``.

    Args:
        token: its fingerprint.

    Returns:
        what ``evaluation.json`` holds as "insight".

    Raises:
        WorkError: there is no evaluation of this token, or its pictures are gone; the scoring failed.
    """
    folder = plan.folder
    result, pairs = evaluated(plan, token)
    scores = {arm: scores_of([getattr(pair, arm) for pair in pairs], attributes) for arm in ARMS}
    found = compare_attributes(attributes.phrases, *scores.values())
    folder.check_claim()
    pictures = draw_changes(folder.eval_images / FOLDER, found, attributes.phrases, pairs, scores)
    told = {
        "scorer": attributes.name,
        "file": plan.config.insight,
        "phrases": attributes.phrases,
        "template": result["prompts"][0]["template"],
        "pairs": len(pairs),
        "intervals": correction(len(found)),
        "attributes": [a._replace(picture=pictures.get(a.phrase))._asdict() for a in found],
    }
    write_json(folder.result, result | {"insight": told})
    return told


def scores_of(paths: list[Path], attributes: Attributes) -> torch.Tensor:
    """Scores (N, K) of pictures, some of which are in memory at a time."""
    parts = [paths[i : i + AT_ONCE] for i in range(0, len(paths), AT_ONCE)]
    return torch.cat([attributes.scores(read_pictures(part)) for part in parts])


def evaluated(plan: Plan, token: str) -> tuple[dict[str, Any], list[Pair]]:
    """The evaluation of a token, and the pictures of its first prompt.

    Raises:
        WorkError: there is none of this token, or a picture is missing.
    """
    folder = plan.folder
    advice = "; --evaluate True draws its pictures"
    if not folder.result.exists():
        raise WorkError(f"--insight: there is no evaluation at {folder.result}{advice}")
    result = read_json(folder.result)
    if result.get("token") != token:
        raise WorkError(f"--insight: {folder.result} is of another token{advice}")
    pairs = find_pairs(folder.eval_images, result["seeds"])
    if len(pairs) < len(result["seeds"]):
        missing = len(result["seeds"]) - len(pairs)
        raise WorkError(f"--insight: {missing} pairs of pictures are missing in {folder.eval_images}{advice}")
    return result, pairs


def draw_changes(
    place: Path,
    found: list[Attribute],
    phrases: list[str],
    pairs: list[Pair],
    scores: dict[str, torch.Tensor],
) -> dict[str, str]:
    """Draw the pairs that the most added attributes change most, in place of an earlier insight's.

    Args:
        place: the folder. scores: (N, K) of each arm, in the phrases' order.

    Returns:
        phrase -> its picture, below the evaluation's images.
    """
    unfinished = place.with_name(f"{place.name}.partial")
    shutil.rmtree(unfinished, ignore_errors=True)
    pictures = {}
    for number, attribute in enumerate([a for a in found if a.difference > 0][:WITH_PICTURES], start=1):
        words = re.sub(r"[^a-z0-9]+", "_", attribute.phrase.lower()).strip("_")[:60]
        name = f"{number:02d}_{words}.png"
        column = phrases.index(attribute.phrase)
        of_phrase = torch.stack([scores[arm][:, column] for arm in ARMS], dim=1)  # (N, 2)
        draw_change(unfinished / name, attribute.phrase, pairs, of_phrase)
        pictures[attribute.phrase] = f"{place.name}/{name}"
    if pictures:
        replace_folder(unfinished, place)
    else:
        shutil.rmtree(place, ignore_errors=True)  # of an earlier insight
    return pictures
