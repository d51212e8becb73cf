"""A sheet of picture strips: a row for each thing compared, its name on the left, columns named on top."""

from pathlib import Path

from PIL import Image, ImageDraw

GAP = 8
HEAD = 16  # pixels for the columns' names


def sheet_of(
    rows: list[tuple[str, list[Path | Image.Image | None]]], columns: tuple[str, ...] = (), left: int = 110
) -> Image.Image:
    """Strips of one size, one below the other; None leaves a place empty.

    Args:
        rows: each row's name, which may have several lines, and its strips.
        columns: names of the columns, if any.
        left: pixels for the rows' names.
    """
    opened = [[Image.open(s) if isinstance(s, Path) else s for s in strips] for _, strips in rows]
    width, height = next(strip.size for strips in opened for strip in strips if strip)
    top = HEAD if columns else 0
    size = left + len(opened[0]) * (width + GAP) - GAP, top + len(rows) * (height + GAP // 2)
    page = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(page)
    for x, name in enumerate(columns):
        draw.text((left + x * (width + GAP), 2), name, fill="black")
    for y, ((name, _), strips) in enumerate(zip(rows, opened, strict=True)):
        above = top + y * (height + GAP // 2)
        lines = name.count("\n") + 1
        draw.text((4, above + height // 2 - 6 * lines), name, fill="black")
        for x, strip in enumerate(strips):
            if strip:
                page.paste(strip, (left + x * (width + GAP), above))
    return page
