"""One row a class and experiment in ``<output_path>/summary.csv``: what the evaluations of many runs came
to."""

import csv
from functools import lru_cache
from pathlib import Path
from typing import Any

from discriminative.errors import UsageError
from discriminative.records.evaluation import EvaluationRecord
from discriminative.records.files import write_table

COLUMNS = (
    *("class_index", "class_name", "exp_id", "model", "classifier", "judge", "test_size"),
    *(
        "guide_without",
        "guide_with",
        "guide_low",
        "guide_high",
        "judge_without",
        "judge_with",
        "judge_low",
        "judge_high",
    ),
    *("p_value", "diversity_ratio"),
    *("updates", "images", "training_seconds", "stopped_by", "evaluation_seconds"),
)
KEY = ("class_index", "class_name", "exp_id")


def path_of(output_path: str) -> Path:
    """Where the summary is."""
    return Path(output_path) / "summary.csv"


def read(output_path: str) -> list[dict[str, str]]:
    """The rows; none where there is no summary yet.

    Raises:
        UsageError: it cannot be read, or has other columns, as those of another version have, or rows
            that do not fit them.
    """
    path = path_of(output_path)
    if not path.exists():
        return []
    advice = "move it away, or give another folder"
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            rows = list(reader)
            columns = tuple(reader.fieldnames or ())
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"--output_path: {path} cannot be read ({error}); {advice}") from error
    if columns != COLUMNS:
        raise UsageError(f"--output_path: {path} has other columns than this version writes; {advice}")
    for number, row in enumerate(rows, start=1):
        if None in row or None in row.values() or not row["class_index"].isdecimal():
            raise UsageError(
                f"--output_path: row {number} of {path} does not fit its columns; mend it, {advice}"
            )
    return rows


def has_row(output_path: str, class_index: int, class_name: str, exp_id: str) -> bool:
    """Whether a class and experiment has a row.

    Raises:
        UsageError: as :func:`read`.
    """
    try:
        changed = path_of(output_path).stat().st_mtime_ns
    except FileNotFoundError:
        return False
    return (str(class_index), class_name, exp_id) in keys_of(output_path, changed)


@lru_cache(maxsize=1)
def keys_of(output_path: str, changed: int) -> set[tuple[str, ...]]:
    """The keys of all rows, read once for each time that the file was ``changed``."""
    return {tuple(row[name] for name in KEY) for row in read(output_path)}


def row_of(record: EvaluationRecord) -> dict[str, Any]:
    """An evaluation, and the training before it where it was here, as a row."""
    named = ("class_index", "class_name", "model", "classifier", "judge", "test_size")
    row = {key: record.content[key] for key in named} | {"exp_id": record.folder.exp_id}
    first = record.first
    for who in ("guide", "judge"):
        with_token = first.share("token", who)
        if with_token:
            row[f"{who}_without"] = first.share("baseline", who).accuracy
            row[f"{who}_with"] = with_token.accuracy
            row[f"{who}_low"] = with_token.low
            row[f"{who}_high"] = with_token.high
    row |= {"p_value": first.p_value, "diversity_ratio": first.diversity_ratio}
    training = record.training.get("training", {})
    row |= {key: training.get(key) for key in ("updates", "images", "stopped_by")}
    row["training_seconds"] = training.get("seconds")
    return row | {"evaluation_seconds": round(record.content["seconds"], 2)}


def remove_row(output_path: str, class_index: int, class_name: str, exp_id: str) -> None:
    """Take out the row of a class and experiment, where there is one.

    Raises:
        UsageError: the summary has other columns.
    """
    if path_of(output_path).exists():
        _change(output_path, (str(class_index), class_name, exp_id), [])


def replace_row(output_path: str, row: dict[str, Any]) -> Path:
    """Write the row in the place of the one of the same class and experiment, or as a new one; several
    processes may do so at once.

    Raises:
        UsageError: the summary has other columns.
    """
    row = {key: "" if row.get(key) is None else str(row[key]) for key in COLUMNS}
    _change(output_path, tuple(row[key] for key in KEY), [row])
    return path_of(output_path)


def _change(output_path: str, key: tuple[str, ...], new: list[dict[str, str]]) -> None:
    """Put ``new`` in the place of the rows of a class and experiment."""
    from filelock import FileLock

    path = path_of(output_path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock")):
        rows = [r for r in read(output_path) if tuple(r[name] for name in KEY) != key]
        rows = sorted([*rows, *new], key=lambda r: (int(r["class_index"]), r["exp_id"]))
        write_table(path, rows, COLUMNS)
