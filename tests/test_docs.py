"""The documents say what the program does: options, commands, links, the example."""

import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

import config
from apps.earlier import GONE
from config import validate
from experiments.options import PATH, page
from run import options_of, parse

ROOT = Path(__file__).parents[1]
DOCS = [ROOT / "README.md", ROOT / "miniature" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LOG = ("experiments.md", "CHANGELOG.md")  # tell of what was, too


def test_the_list_of_options_is_that_of_the_fields():
    assert PATH.read_text(encoding="utf-8") == page(), "run python -m experiments.options"


def test_the_readme_is_two_pages_and_names_the_two_commands():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert 10_000 <= len(readme.encode()) <= 12_500
    assert readme.index("make demo") < readme.index("make test") < 4_000


def commands(path: Path) -> list[str]:
    """The lines of code blocks that call run.py; a continued line is one."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", path.read_text(encoding="utf-8"), re.M | re.S)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [line.strip() for line in lines if line.strip().startswith("python run.py")]


@pytest.mark.parametrize("path", [p for p in DOCS if p.name not in LOG], ids=lambda p: p.name)
def test_every_command_of_a_document_is_one_that_run_py_takes(path):
    for command in commands(path):
        argv = shlex.split(command, comments=True)[2:]
        if argv and not any("<" in word for word in argv):
            given, _ = parse(argv)
            given["config"] = None  # a file of the reader's
            validate(options_of(given))


def test_the_readme_has_commands_to_check():
    assert len(commands(ROOT / "README.md")) >= 8


@pytest.mark.parametrize("path", [p for p in DOCS if p.name not in LOG], ids=lambda p: p.name)
def test_no_document_offers_a_flag_that_went(path):
    if path == PATH:
        return
    text = path.read_text(encoding="utf-8")
    assert not [name for name in GONE if re.search(rf"--{name}\b", text)]


@pytest.mark.parametrize("path", DOCS, ids=lambda p: f"{p.parent.name}-{p.name}")
def test_every_link_between_files_leads_somewhere(path):
    text = path.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(\s*([^)\s]+)\s*\)", text) if "://" not in link]
    for link in links:
        name, _, anchor = link.partition("#")
        target = (path.parent / name) if name else path
        assert target.exists(), link
        if anchor:
            titles = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.M)
            anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
            assert anchor in anchors, link


def test_the_example_runs(tmp_path, monkeypatch, capsys):
    script = ROOT / "docs" / "examples" / "learn_and_draw.py"
    assert len([line for line in script.read_text().splitlines() if line.strip()]) <= 25
    # Two updates rather than as many as the class needs.
    monkeypatch.setitem(config.PRESETS, "default", {"max_epochs": 2, "mixed_precision": "no"})
    monkeypatch.setattr(sys, "argv", ["learn_and_draw.py", str(tmp_path / "bat")])
    runpy.run_path(str(script), run_name="__main__")
    told = capsys.readouterr().out
    assert "bat, cricket bat: guide" in told
    assert "learned with 2 updates; bat, cricket bat" in told
    assert len(list((tmp_path / "bat").glob("bat_?.png"))) == 4
