"""Output where there is no terminal, or one that knows few characters, or nobody who reads on."""

import io
import os
import sys

import pytest
import torch
from conftest import learned
from PIL import Image, ImageDraw, ImageFont

from discriminative import progress as room
from discriminative.command_line import READER_LEFT
from discriminative.progress import Lines, progress
from discriminative.records.pictures import LINES, Shown, framed, wrapped
from dpt.__main__ import main as dpt
from run import main

MINI = ["--model", "miniature", "--device", "cpu"]


class Clock:
    """Every look is ten seconds later."""

    def __init__(self):
        self.now = 0.0

    def monotonic(self) -> float:
        self.now += 10
        return self.now


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.setattr(room, "time", Clock())


# --- without a terminal


def test_without_a_terminal_there_is_a_plain_line_every_half_minute_with_the_time_left(clock, capsys):
    for _ in progress(range(10), desc="learning 'cat'", unit="update"):
        pass
    said = capsys.readouterr().err
    assert "\r" not in said
    lines = said.splitlines()
    assert lines[0] == "learning 'cat': 3 of 10 updates, 00:30 so far, 01:10 left at most"
    assert [line.split(" of")[0].rsplit(" ", 1)[1] for line in lines] == ["3", "6", "9"]
    assert len(set(lines)) == len(lines)


def test_what_is_over_soon_says_nothing_of_its_progress(capsys):
    for _ in progress(range(100), desc="x"):
        pass
    with progress(total=3, desc="y", unit="image", leave=False) as bar:
        bar.update(3)
    assert capsys.readouterr().err == ""


def test_a_line_counts_what_was_done_before_and_has_the_figures(clock, capsys):
    bar = Lines(range(100, 200), "x", total=200, initial=100)
    for _ in range(3):
        bar.set_postfix({"loss": "0.52"})
        bar.update()
    assert capsys.readouterr().err == "x: 103 of 200 steps, 00:30 so far, 16:10 left at most, loss 0.52\n"


def test_a_training_without_a_terminal_writes_no_carriage_return(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(room, "EVERY", 0.0)
    learned(tmp_path)
    said = [line for line in capsys.readouterr().err.splitlines(True) if "learning" in line]
    assert said and not any("\r" in line for line in said)
    assert len(set(said)) == len(said)


def test_on_a_terminal_there_is_a_bar(monkeypatch):
    monkeypatch.setattr("sys.stderr", type("Terminal", (io.StringIO,), {"isatty": lambda self: True})())
    assert not isinstance(progress(range(3)), Lines)


# --- characters


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp437"])
@pytest.mark.parametrize("argv", [["--help", "all"], [*MINI, "--train", "--class_index", "Käse ☃"]])
def test_what_the_terminal_cannot_show_is_replaced(encoding, argv, monkeypatch):
    streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2)]
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])
    assert main(argv) == (0 if "--help" in argv else 2)
    for stream in streams:
        stream.flush()
    said = b"".join(stream.buffer.getvalue() for stream in streams).decode(encoding)
    assert "distance" in said if "--help" in argv else "no label of the classifier" in said


def test_so_it_is_for_the_second_method(monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stderr", out)
    assert dpt(["generate", "--prömpt", "x"]) == 2
    out.flush()
    assert b"pr?mpt" in out.buffer.getvalue()


# --- a reader that leaves


@pytest.mark.parametrize(
    ("command", "argv"),
    [
        (main, ["--help", "all"]),
        (main, [*MINI, "--list_classes"]),
        (main, ["--version"]),
        (main, [*MINI, "--class_index", "all", "--train", "--dry_run"]),
        (dpt, []),
    ],
    ids=["help", "classes", "version", "dry run", "dpt"],
)
def test_a_reader_that_leaves_ends_the_run_without_a_message(command, argv, monkeypatch, capsys):
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as out:
        monkeypatch.setattr(sys, "stdout", out)
        assert command(argv) in (0, READER_LEFT)  # argparse itself drops what its help cannot write
        out.flush()  # as at exit: goes nowhere, without an error
    assert capsys.readouterr().err == ""


# --- captions of grids


def drawing() -> tuple[ImageDraw.ImageDraw, ImageFont.FreeTypeFont]:
    return ImageDraw.Draw(Image.new("RGB", (1, 1))), ImageFont.load_default(18)


SPECIES = "05500_Animalia_Arthropoda_Insecta_Lepidoptera_Nymphalidae_Danaus_"
ALIKE = [
    ("phone, dial phone", "phone, mobile phone"),
    (SPECIES + "plexippus", SPECIES + "gilippus"),
    ("great white shark, white shark, man-eater, Carcharodon", "great white heron, heron, Egretta"),
    ("x" * 200 + "a", "x" * 200 + "b"),
]


@pytest.mark.parametrize("labels", ALIKE, ids=lambda pair: pair[0][:20])
def test_captions_keep_what_tells_labels_apart(labels):
    """Eight in a row have 138 pixels each."""
    draw, font = drawing()
    found = [wrapped(draw, label, font, 138) for label in labels]
    assert found[0] != found[1]
    for lines in found:
        assert len(lines) <= LINES
        assert all(draw.textlength(line, font) <= 138 for line in lines)


def test_a_caption_that_fits_is_as_it_was():
    draw, font = drawing()
    assert wrapped(draw, "tiger  cat", font, 138) == ["tiger cat"]
    assert wrapped(draw, "", font, 138) == [""]


def test_a_grid_has_room_for_the_longest_caption():
    def sheet(label: str) -> Image.Image:
        return framed({"title": [Shown(torch.zeros(3, 8, 8), True, label)] * 8})

    assert sheet("phone, dial phone").height > sheet("phone").height
    assert sheet("phone, dial phone").tobytes() != sheet("phone, mobile phone").tobytes()
