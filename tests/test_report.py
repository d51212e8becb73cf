"""The page of all results: what is in it, and that a browser shows it."""

import json
import shutil

import pytest
from PIL import Image

from discriminative.errors import UsageError, WorkError
from discriminative.records.evaluation import EvaluationRecord
from discriminative.records.layout import RunFolder
from discriminative.records.report import write_report
from discriminative.records.summary import COLUMNS, read, remove_row, replace_row, row_of


def result(index: int, name: str, share: float, exp_id: str = "default") -> dict:
    """An evaluation, as ``evaluate`` writes it."""

    def arm(accuracy: float) -> dict:
        seen = {"accuracy": accuracy, "accuracy_interval": [max(0, accuracy - 0.1), min(1, accuracy + 0.1)]}
        seen |= {"predicted": [["<b>other</b>", 0.6], [name, 0.4]]}
        return {"prompt": f"A photo of a {name}", "guide": seen, "judge": seen, "diversity": 1.0}

    first = {"template": "A photo of {token} {class}", "arms": {"token": arm(share), "baseline": arm(0.1)}}
    first |= {"paired": {"guide": {"p_value": 1e-9}}, "diversity_ratio": 0.9}
    told = {
        "class_index": index,
        "class_name": name,
        "classifier": "g",
        "judge": "j",
        "model": "m",
        "token_path": None,
        "test_size": 10,
    }
    return told | {
        "settings": {"guidance_scale": 7.0},
        "prompts": [first],
        "verdict": f"{name}: guide",
        "seconds": 1.0,
        "exp_id": exp_id,
    }


@pytest.fixture
def results(tmp_path):
    """Three evaluations on disk, with pictures."""
    for index, name, share in ((2, "bat", 0.5), (10, "<i>cat</i>", 0.9), (1, "apple", 0.7)):
        folder = RunFolder(str(tmp_path), f"{index:04d}", "default")
        folder.records.mkdir(parents=True)
        folder.result.write_text(json.dumps(result(index, name, share)))
        for picture in (folder.grid, folder.evolution):
            picture.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (1200, 300), "green").save(picture)
    return tmp_path


def test_the_page_stands_alone_and_escapes_labels(results):
    page = write_report(results).read_text()
    assert "http" not in page
    assert "<i>cat" not in page
    assert "<b>other" not in page
    assert page.count("data:image/jpeg") == 6
    assert page.index("1 apple") < page.index("2 bat") < page.index("10 &lt;i&gt;cat")


def test_there_is_nothing_to_report_or_it_is_of_another_version(tmp_path, results):
    with pytest.raises(WorkError, match="there is no evaluation below"):
        write_report(tmp_path / "nowhere")
    broken = results / "pipeline_token" / "0002" / "default" / "evaluation.json"
    broken.write_text('{"accuracy_token": 1}')
    with pytest.raises(WorkError, match="was written by another version"):
        write_report(results)
    for text in ("", "[1]"):
        broken.write_text(text)
        with pytest.raises(WorkError, match="0002/default/evaluation.json: .* remove or mend it"):
            write_report(results)


def test_labels_are_no_formulas(results):
    folder = RunFolder(str(results), "0003", "default")
    folder.records.mkdir(parents=True)
    folder.result.write_text(json.dumps(result(3, "coin, $_$", 0.5)))
    assert "coin, $_$" in write_report(results).read_text()


def test_rows_of_the_summary_are_replaced_by_class_and_experiment(tmp_path):
    folder = RunFolder(str(tmp_path), "c", "e")
    for index, name, share, exp_id in (
        (10, "cat", 0.1, "a"),
        (2, "bat", 0.2, "a"),
        (10, "cat", 0.3, "b"),
        (10, "cat", 0.4, "a"),
    ):
        folder.exp_id = exp_id
        record = EvaluationRecord(result(index, name, share, exp_id), folder)
        replace_row(str(tmp_path), row_of(record))
    rows = read(str(tmp_path))
    assert [(r["class_index"], r["exp_id"], r["guide_with"]) for r in rows] == [
        ("2", "a", "0.2"),
        ("10", "a", "0.4"),
        ("10", "b", "0.3"),
    ]
    assert tuple(rows[0]) == COLUMNS
    remove_row(str(tmp_path), 10, "cat", "b")
    remove_row(str(tmp_path), 7, "cat", "b")  # which is not there
    assert [(r["class_index"], r["exp_id"]) for r in read(str(tmp_path))] == [("2", "a"), ("10", "a")]
    assert rows[0]["judge"] == "j"
    (tmp_path / "summary.csv").write_text("class,accuracy\n1,0.5\n")
    with pytest.raises(UsageError, match="has other columns than this version writes; move it away"):
        replace_row(str(tmp_path), rows[0])
    assert (tmp_path / "summary.csv").read_text() == "class,accuracy\n1,0.5\n"


@pytest.mark.parametrize(
    ("written", "said"),
    [
        (b"x,y\n", "row 1 of .*summary.csv does not fit its columns"),
        (b"1" + b"," * 40 + b"\n", "row 1 of .*summary.csv does not fit its columns"),
        ("1,Käse\n".encode("latin-1"), "summary.csv cannot be read"),
    ],
)
def test_a_summary_that_somebody_edited_badly_is_one_line(tmp_path, written, said):
    (tmp_path / "summary.csv").write_bytes(",".join(COLUMNS).encode() + b"\n" + written)
    with pytest.raises(UsageError, match=said):
        read(str(tmp_path))


def test_a_training_of_which_little_is_known_has_a_row(tmp_path):
    folder = RunFolder(str(tmp_path), "c", "e")
    folder.records.mkdir(parents=True)
    folder.config.write_text(json.dumps({"config": {}, "training": {"updates": 3}}))
    replace_row(str(tmp_path), row_of(EvaluationRecord(result(2, "bat", 0.5), folder)))
    (row,) = read(str(tmp_path))
    assert (row["updates"], row["images"], row["training_seconds"]) == ("3", "", "")


@pytest.mark.browser
def test_the_page_works_in_a_browser(results):
    """It sorts by numbers, every picture loads, and nothing is complained of."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not chromium:
        pytest.skip("there is no Chromium on this machine")
    complaints = []
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on(
            "request",
            lambda request: request.url.startswith(("file:", "data:")) or complaints.append(request.url),
        )
        page.goto(write_report(results).as_uri())

        def column(number: int) -> list[str]:
            return [
                cell.inner_text()
                for cell in page.query_selector_all(f"table.sortable tbody td:nth-child({number})")
            ]

        assert column(1) == ["1 apple", "2 bat", "10 <i>cat</i>"]
        page.click("table.sortable th:nth-child(4) button")
        assert [text.split()[0] for text in column(4)] == ["0.50", "0.70", "0.90"]
        page.click("table.sortable th:nth-child(4) button")
        assert [text.split()[0] for text in column(4)] == ["0.90", "0.70", "0.50"]
        page.click("table.sortable th:nth-child(1) button")
        assert column(1) == ["1 apple", "2 bat", "10 <i>cat</i>"]
        page.eval_on_selector_all("details", "all => all.forEach(one => one.open = true)")
        sizes = page.eval_on_selector_all("img", "all => all.map(one => one.complete && one.naturalWidth)")
        assert len(sizes) == 7
        assert min(sizes) >= 600
        browser.close()
    assert complaints == []
