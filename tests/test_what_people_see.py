"""What people look at: intervals, frames, the warning of a fooled guide, a page without foreign markup."""

import csv
import json
import re
from html.parser import HTMLParser

import pytest
import torch
from PIL import Image

from discriminative.records.evaluation import EvaluationRecord
from discriminative.records.layout import RunFolder
from discriminative.records.pictures import Shown, framed
from discriminative.records.report import write_report
from discriminative.records.summary import replace_row, row_of
from evaluate import verdict

GREEN = (0x2A, 0x9D, 0x4A)
RED = (0xC8, 0x37, 0x2D)


def seen(accuracy: float, low: float, high: float, label: str = "other") -> dict:
    """What a classifier saw of an arm."""
    return {"accuracy": accuracy, "accuracy_interval": [low, high], "predicted": [[label, 1.0]]}


def result(index: int = 2, name: str = "bat", **arms: dict) -> dict:
    """An evaluation as its file has it; no two of its figures are the same."""
    token = {
        "prompt": f"A photo of newclas {name}",
        "guide": seen(0.9, 0.81, 0.97),
        "judge": seen(0.8, 0.63, 0.88),
    }
    baseline = {
        "prompt": f"A photo of a {name}",
        "guide": seen(0.3, 0.21, 0.42),
        "judge": seen(0.2, 0.11, 0.34),
    }
    first = {
        "template": "A photo of {token} {class}",
        "paired": {"guide": {"p_value": 0.04}},
        "diversity_ratio": 0.7,
    }
    first["arms"] = {"token": token | arms.get("token", {}), "baseline": baseline | arms.get("baseline", {})}
    told = {
        "class_index": index,
        "class_name": name,
        "model": "m",
        "classifier": "g",
        "judge": "j",
        "test_size": 10,
    }
    told |= {"token_path": None, "settings": {"guidance_scale": 7.0}, "prompts": [first], "seconds": 1.5}
    return told | {"verdict": verdict(told)}


FOOLING = {"token": {"judge": seen(0.1, 0.02, 0.4)}}


def write(root, told: dict, exp_id: str = "default", pictures: bool = False) -> None:
    """Put an evaluation where a run puts it."""
    folder = RunFolder(str(root), f"{told['class_index']:04d}_class", exp_id)
    folder.records.mkdir(parents=True)
    folder.result.write_text(json.dumps(told))
    if pictures:
        folder.grid.parent.mkdir(parents=True)
        Image.new("RGB", (20, 10)).save(folder.grid)


# --- figures


def test_the_summary_has_each_interval_under_its_own_name(tmp_path):
    record = EvaluationRecord(result(), RunFolder(str(tmp_path), "c", "e"))
    path = replace_row(str(tmp_path), row_of(record))
    with path.open(newline="") as file:
        (row,) = csv.DictReader(file)
    guide = [float(row[f"guide_{name}"]) for name in ("without", "with", "low", "high")]
    judge = [float(row[f"judge_{name}"]) for name in ("without", "with", "low", "high")]
    assert guide == [0.3, 0.9, 0.81, 0.97]
    assert judge == [0.2, 0.8, 0.63, 0.88]
    assert (row["p_value"], row["diversity_ratio"], row["evaluation_seconds"]) == ("0.04", "0.7", "1.5")


def test_the_summary_of_a_class_that_nothing_judged_leaves_the_judges_cells_empty(tmp_path):
    arms = {"token": {"judge": None}, "baseline": {"judge": None}}
    record = EvaluationRecord(result(**arms), RunFolder(str(tmp_path), "c", "e"))
    path = replace_row(str(tmp_path), row_of(record))
    with path.open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert [row[f"judge_{name}"] for name in ("without", "with", "low", "high")] == [""] * 4
    assert (row["guide_low"], row["guide_high"]) == ("0.81", "0.97")


def test_the_verdict_has_each_interval_behind_its_accuracy():
    told = "bat: guide 0.30 -> 0.90 [0.81, 0.97], judge 0.20 -> 0.80 [0.63, 0.88], p=0.04, diversity 0.70x"
    assert result()["verdict"] == told


# --- frames


def frames(sheet: Image.Image, columns: int, rows: int) -> list[list[set]]:
    """The frames' colours that stand in each cell of the sheet."""
    found = []
    for row in range(rows):
        top = sheet.height * row // rows
        bottom = sheet.height * (row + 1) // rows
        found.append([])
        for column in range(columns):
            left = sheet.width * column // columns
            right = sheet.width * (column + 1) // columns
            cell = sheet.crop((left, top, right, bottom))
            colours = {colour for _, colour in cell.getcolors(1 << 24)}
            found[-1].append(colours & {GREEN, RED})
    return found


def test_frames_are_green_where_right_and_red_where_wrong():
    def shown(right: bool) -> Shown:
        return Shown(torch.zeros(3, 8, 8), right, "label" if right else "other")

    rows = {
        "without": [shown(False), shown(True), shown(False)],
        "with": [shown(True), shown(True), shown(False)],
    }
    assert frames(framed(rows), 3, 2) == [[{RED}, {GREEN}, {RED}], [{GREEN}, {GREEN}, {RED}]]


def test_a_frame_surrounds_the_image_on_all_four_sides():
    sheet = framed({"": [Shown(torch.zeros(3, 8, 8), True, ""), Shown(torch.zeros(3, 8, 8), False, "")]})
    pixels = sheet.load()
    green = [(x, y) for x in range(sheet.width) for y in range(sheet.height) if pixels[x, y] == GREEN]
    left = min(x for x, _ in green)
    right = max(x for x, _ in green)
    top = min(y for _, y in green)
    bottom = max(y for _, y in green)
    assert right - left == bottom - top
    middle_x = (left + right) // 2
    middle_y = (top + bottom) // 2
    for at in ((left, middle_y), (right, middle_y), (middle_x, top), (middle_x, bottom)):
        assert pixels[at] == GREEN
    assert pixels[middle_x, middle_y] == (0, 0, 0)


# --- the report


class Page(HTMLParser):
    """A page as a browser takes it: tags, attributes, and what can be read."""

    def __init__(self, text: str):
        super().__init__()
        self.tags = []
        self.attributes = []
        self.texts = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self) -> str:
        return "".join(self.texts)


def page_of(root) -> Page:
    return Page(write_report(root).read_text(encoding="utf-8"))


def test_the_page_warns_of_the_token_that_fools_the_guide_and_of_no_other(tmp_path):
    write(tmp_path, result(2, "bat"))
    write(tmp_path, result(7, "crane", **FOOLING))
    warning = re.search(
        r"Tokens that fool the guide:</strong>([^<]*)</p>", write_report(tmp_path).read_text()
    )
    assert warning[1].strip() == "7 crane"


def test_the_page_warns_of_nothing_where_no_token_fools_the_guide(tmp_path):
    write(tmp_path, result(2, "bat"))
    assert "fool" not in page_of(tmp_path).text


def test_the_table_has_each_figure_with_its_interval_in_its_own_column(tmp_path):
    write(tmp_path, result())
    text = write_report(tmp_path).read_text()
    (row,) = re.findall(r"<tr>(.*?)</tr>", text[text.index("<tbody>") : text.index("</tbody>")])
    cells = [re.sub(r"<[^>]+>", "", cell) for cell in re.findall(r"<td.*?</td>", row)]
    heads = re.findall(r'<button type="button">(.*?)</button>', text)
    told = dict(zip(heads, cells, strict=True))
    assert told["class"] == "2 bat"
    assert told["guide, without"] == "0.30 0.21–0.42"
    assert told["guide, with"] == "0.90 0.81–0.97"
    assert told["judge, without"] == "0.20 0.11–0.34"
    assert told["judge, with"] == "0.80 0.63–0.88"
    assert (told["p"], told["diversity"]) == ("0.04", "0.70")


def test_the_plot_has_each_interval_around_its_own_accuracy(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    drawn = {}
    errorbar = Axes.errorbar

    def noted(self, x, y, **settings):
        drawn[settings["label"]] = [
            round(n, 9) for n in (x[0], settings["xerr"][0][0], settings["xerr"][1][0])
        ]
        return errorbar(self, x, y, **settings)

    monkeypatch.setattr(Axes, "errorbar", noted)
    write(tmp_path, result())
    write_report(tmp_path)
    assert drawn == {"with the token, guide": [0.9, 0.09, 0.07], "with the token, judge": [0.8, 0.17, 0.08]}


EVIL = """<b>{token}</b> {class} <script>alert("1")</script> & 'x'"""


@pytest.fixture
def evil(tmp_path):
    """An evaluation in which every text that comes from outside would be markup."""
    name = 'bat" onload="x<i>'
    told = result(
        2, name, baseline={"guide": seen(0.3, 0.21, 0.42, "<u>label</u>"), "prompt": f"<s>a</s> {name}"}
    )
    other = json.loads(json.dumps(told["prompts"][0])) | {"template": EVIL}
    told["prompts"].append(other)
    told |= {"model": "<em>model</em>", "verdict": f"{name}: fools the guide <q>"}
    write(tmp_path, told, 'a"><h6>exp', pictures=True)
    return tmp_path


def test_what_comes_from_outside_is_read_as_it_was_written(evil):
    page = page_of(evil)
    for text in (
        EVIL,
        'bat" onload="x<i>',
        "<h6>exp",
        "<u>label</u>",
        "<s>a</s>",
        "<em>model</em>",
        "guide <q>",
    ):
        assert text in page.text


def test_nothing_from_outside_becomes_a_tag_or_an_attribute(evil):
    page = page_of(evil)
    assert page.tags.count("script") == 1  # the page's own
    assert not {"b", "i", "u", "s", "em", "q", "h6"} & set(page.tags)
    assert "onload" not in dict(page.attributes)
    texts = [value for key, value in page.attributes if key == "alt"]
    assert 'bat" onload="x<i> without and with the token' in texts


def test_links_of_the_table_lead_to_their_sections(evil):
    page = page_of(evil)
    places = [value for key, value in page.attributes if key == "id"]
    links = [
        value.removeprefix("#") for key, value in page.attributes if key == "href" and value.startswith("#")
    ]
    assert links == places == ['0002_class-a"><h6>exp']


def test_each_further_prompt_is_told_with_its_accuracies_before_and_after(tmp_path):
    told = result()
    told["prompts"].append(told["prompts"][0] | {"template": "a {token} {class} on a boat"})
    write(tmp_path, told)
    assert "a {token} {class} on a boat: guide 0.30 → 0.90" in page_of(tmp_path).text
