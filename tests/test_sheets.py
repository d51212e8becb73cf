"""Sheets of picture strips."""

from PIL import Image

from experiments.sheets import GAP, HEAD, sheet_of


def test_strips_stand_in_their_row_and_column_and_missing_ones_stay_white(tmp_path):
    strips = {name: Image.new("RGB", (20, 10), name) for name in ("red", "blue", "lime")}
    kept = tmp_path / "lime.png"
    strips["lime"].save(kept)
    page = sheet_of([("one", [None, strips["red"]]), ("two", [strips["blue"], kept])], ("x", "y"), left=40)
    second = HEAD + 10 + GAP // 2
    assert page.getpixel((45, HEAD + 5)) == (255, 255, 255)
    assert page.getpixel((40 + 20 + GAP, HEAD)) == (255, 0, 0)
    assert page.getpixel((40, second)) == (0, 0, 255)
    assert page.getpixel((40 + 20 + GAP, second)) == (0, 255, 0)
