"""The rows of experiments: one JSON line for each unit that is done. So a run goes on where it broke off."""

import json
from pathlib import Path

from discriminative.errors import WorkError


def read(out: Path) -> list[dict]:
    """The finished rows; none where there is no file. A last line that was cut off is left out.

    Raises:
        WorkError: another line is no JSON.
    """
    text = out.read_text() if out.exists() else ""
    rows = []
    for number, line in enumerate(text[: text.rfind("\n") + 1].splitlines(), start=1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            raise WorkError(f"{out}, line {number}: is no JSON; allowed is a row on each line") from None
    return rows


def add(out: Path, row: dict) -> None:
    """Append a finished row, in the place of a last line that was cut off."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("a+b") as file:
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        file.write(json.dumps(row).encode() + b"\n")
