"""``python -m apps.augment``: with generated pictures and without, paired; bad folders in one line.

pytest tests/test_augment.py
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from apps.augment.__main__ import main
from apps.augment.folders import Pictures, match
from apps.augment.result import paired_difference
from apps.augment.training import TrainingSettings, order_of
from discriminative.errors import UsageError

COLOURS = {"red_apple": (200, 20, 20), "green_apple": (20, 200, 20), "plum": (90, 20, 160)}
SMALL = ["--classifier", "timm:test_efficientnet", "--from_scratch", "--image_size", "32", "--device", "cpu"]
SMALL += ["--steps", "4", "--batch_size", "4"]


def paint(folder: Path, number: int, colour=(128, 128, 128), size: int = 24, first: int = 0) -> None:
    """Noisy pictures of a colour, none like another."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(first, first + number):
        rng = np.random.default_rng([i, *colour])
        pixels = np.clip(rng.normal(colour, 25, (size, size, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:03d}.png")


@pytest.fixture
def folders(tmp_path):
    """Real, test and generated pictures of three classes; the generated ones as --export_dataset has them."""
    for i, (name, colour) in enumerate(COLOURS.items()):
        paint(tmp_path / "real" / name, 3, colour)
        paint(tmp_path / "test" / name, 2, colour, first=100)
        folder = tmp_path / "generated" / f"{i + 31:04d}_{name}"
        paint(folder, 2, colour, first=200)
        row = {"file_name": "200.png", "label": name.replace("_", " "), "guide": "right"}
        (folder / "metadata.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "generated" / ".ipynb_checkpoints").mkdir()
    return tmp_path


def arguments(folders: Path, *more: str) -> list[str]:
    """The folders as options, and further ones."""
    named = [word for name in ("real", "generated", "test") for word in (f"--{name}", str(folders / name))]
    return [*named, *SMALL, "--output_path", str(folders / "out"), *more]


def refused(capsys, argv: list[str], code: int = 2) -> str:
    """What is said where the program refuses: one line."""
    try:
        got = main(argv)
    except SystemExit as ended:
        got = ended.code
    err = capsys.readouterr().err.strip()
    assert got == code, err
    assert len(err.splitlines()) == 1, err
    assert "Traceback" not in err
    return err


# The whole way.


def test_a_data_set_of_export_dataset_works_as_it_is_and_a_report_is_written(folders, capsys):
    assert main(arguments(folders, "--seeds", "2", "--shares", "0.25,0.5")) == 0
    out = capsys.readouterr().out
    assert "3 classes; 9 real pictures, 6 generated, 6 of the test, 3 to choose the share on" in out
    record = json.loads((folders / "out" / "report.json").read_text())
    assert len(record["without"]) == len(record["with"]) == 2
    pairs = [b - a for a, b in zip(record["without"], record["with"], strict=True)]
    assert record["difference"]["mean"] == pytest.approx(sum(pairs) / 2)
    assert [row["class"] for row in record["by_class"]]
    page = (folders / "out" / "report.html").read_text()
    assert "Where it helps and where it hurts" in page
    assert page.count("data:image/") >= 7  # the figure, and two strips a class


def test_more_seeds_go_on_with_those_that_are_done(folders, capsys):
    assert main(arguments(folders, "--seeds", "1", "--shares", "0.5")) == 0
    rows = (folders / "out" / "rows.jsonl").read_text()
    capsys.readouterr()
    assert main(arguments(folders, "--seeds", "2", "--shares", "0.5")) == 0
    out = capsys.readouterr().out
    assert (folders / "out" / "rows.jsonl").read_text().startswith(rows)
    assert "pair seed 0" not in out
    assert out.count("pair seed 1") == 2


def test_the_same_command_gives_the_same_figures(folders):
    for name in ("a", "b"):
        assert (
            main(arguments(folders, "--seeds", "1", "--shares", "0.5", "--output_path", str(folders / name)))
            == 0
        )
    first, second = (
        [json.loads(line) for line in (folders / name / "rows.jsonl").read_text().splitlines()]
        for name in "ab"
    )
    assert [r["predicted"] for r in first] == [r["predicted"] for r in second]


def test_a_linear_head_on_frozen_features_leaves_the_features_alone(folders, tmp_path):
    from tiny_folders import save_timm

    from apps.augment.network import head_of, load_network
    from apps.augment.options import Options
    from apps.augment.training import train

    name = save_timm(tmp_path / "timm")
    options = Options("r", "g", "t", name, layers="head", image_size=32)
    network = load_network(options)
    real = Pictures()
    real.add(sorted((folders / "real" / "plum").glob("*.png")), 0)
    settings = TrainingSettings(2, 4, 0.1, layers="head")
    before = network.new(2, 0)
    model = train(network, 2, real, settings, 0, torch.device("cpu"))
    heads = {id(p) for p in head_of(model)}
    for (key, new), old in zip(
        model.state_dict(keep_vars=True).items(), before.state_dict().values(), strict=True
    ):
        assert torch.equal(new, old) != (id(new) in heads), key


# What is drawn.


def test_a_share_of_each_batch_is_generated_and_the_number_of_pictures_is_the_same():
    real = Pictures([Path(f"r{i}") for i in range(3)], [0, 1, 2])
    generated = Pictures([Path(f"g{i}") for i in range(5)], [0, 1, 2, 0, 1])
    settings = TrainingSettings(6, 8, 0.1)
    alone = order_of(real, None, 0.0, settings, 1)
    mixed = order_of(real, generated, 0.25, settings, 1)
    assert len(alone) == len(mixed) == 48
    for start in range(0, 48, 8):
        assert sum(path.name.startswith("g") for path, _ in mixed[start : start + 8]) == 2
    assert all(label == {**dict(zip(real.paths, real.labels, strict=True))}[path] for path, label in alone)


def test_every_real_picture_comes_before_one_comes_again():
    real = Pictures([Path(str(i)) for i in range(5)], [0] * 5)
    drawn = [path for path, _ in order_of(real, None, 0.0, TrainingSettings(5, 2, 0.1), 3)]
    assert len(set(drawn[:4])) == 4
    assert [drawn.count(path) for path in real.paths] == [2] * 5


# Folder names.


@pytest.mark.parametrize(
    ("classes", "folder", "label", "expected"),
    [
        (["cat", "dog"], "dog", "", 1),
        (["Tiger_cat", "dog"], "0283_tiger_cat", "", 0),
        (["n02123159", "dog"], "0283_tiger_cat", "tiger cat", 0),
        (["001.Black_footed_Albatross", "dog"], "0001_black_footed_albatross", "", 0),
        (["computer mouse", "field mouse"], "0004_mouse_computer_mouse", "mouse, computer mouse", 0),
        (["mouse", "keyboard"], "0004_mouse_computer_mouse", "mouse, computer mouse", 0),
    ],
)
def test_generated_folders_are_matched_by_name(tmp_path, classes, folder, label, expected):
    (tmp_path / folder).mkdir()
    if label:
        (tmp_path / folder / "metadata.jsonl").write_text(json.dumps({"label": label}) + "\n")
    assert match(classes, str(tmp_path), [folder]) == {folder: expected}


def test_two_folders_of_one_word_are_not_guessed_between(tmp_path):
    for folder, label in (("a", "mouse, field mouse"), ("b", "mouse, computer mouse")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "metadata.jsonl").write_text(json.dumps({"label": label}) + "\n")
    with pytest.raises(
        UsageError, match="'a', 'b' .* fit no class folder of --real, or not one alone .*'mouse'"
    ):
        match(["mouse", "keyboard"], str(tmp_path), ["a", "b"])


# Bad input.


def break_folders(folders: Path, case: str) -> None:
    """One thing that is wrong with the folders."""
    if case == "empty":
        (folders / "real" / "pear").mkdir()
    if case == "extra in test":
        paint(folders / "test" / "pear", 1)
    if case == "extra in real":
        paint(folders / "real" / "pear", 2)
    if case == "unknown generated":
        paint(folders / "generated" / "0099_pear", 1)
    if case == "damaged":
        (folders / "generated" / "0031_red_apple" / "200.png").write_bytes(b"\x89PNG no picture")
    if case == "one picture":
        for path in sorted((folders / "real" / "plum").glob("*.png"))[1:]:
            path.unlink()
    if case == "no classes":
        for path in (folders / "test").rglob("*.png"):
            path.unlink()
        for path in (folders / "test").iterdir():
            path.rmdir()


@pytest.mark.parametrize(
    ("case", "more", "expected"),
    [
        ("", ("--real", "nowhere"), "--real: 'nowhere' was given, which is no folder"),
        ("", ("--classifier", "timm:nothing_of_timm"), "timm has no model 'nothing_of_timm'"),
        ("", ("--classifier", "hf:some/model"), "what is trained here is timm:<name>, or inet, miniature"),
        ("", ("--steps", "0"), "--steps: 0 was given; allowed is 1 or more"),
        ("", ("--shares", "0.5,1"), "--shares: 0.5,1.0 was given; allowed is numbers above 0 and below 1"),
        ("", ("--shares", "half"), "'half' was given; allowed are numbers with commas"),
        ("", ("--shares", "0.01"), "of a batch of 4 pictures each share has to leave one"),
        ("", ("--batch_size", "5"), "an even number"),
        ("", ("--layers", "head"), "--layers: 'head' was given with --from_scratch"),
        ("empty", (), "--real: 'pear' of"),
        ("extra in test", (), "--test has 'pear', which --real lacks"),
        ("extra in real", (), "--real has 'pear', which --test lacks"),
        ("unknown generated", (), "'0099_pear' of"),
        ("damaged", (), "0031_red_apple/200.png is no readable picture"),
        ("one picture", (), "--real: 'plum' has 1 picture, too few to hold one out"),
        ("no classes", (), "which holds no folder"),
    ],
)
def test_what_is_wrong_is_one_line(folders, capsys, case, more, expected):
    break_folders(folders, case)
    assert expected in refused(capsys, arguments(folders, *more))


def test_a_name_without_weights_is_refused_unless_from_scratch(folders, capsys):
    argv = arguments(folders, "--classifier", "timm:vit_small_patch16_18x2_224")
    argv.remove("--from_scratch")
    said = refused(capsys, argv)
    assert "timm has no weights for 'vit_small_patch16_18x2_224'" in said
    assert "--from_scratch" in said


def test_another_command_does_not_mix_its_trainings_with_those_that_are_there(folders, capsys):
    assert main(arguments(folders, "--seeds", "1", "--shares", "0.5")) == 0
    capsys.readouterr()
    said = refused(capsys, arguments(folders, "--seeds", "1", "--shares", "0.5", "--learning_rate", "0.1"))
    assert "holds trainings of other options (learning_rate None)" in said
    paint(folders / "generated" / "0031_red_apple", 1, first=900)
    assert "of other pictures" in refused(capsys, arguments(folders, "--seeds", "1", "--shares", "0.5"))


def test_pictures_of_the_test_among_the_others_are_told(folders, capsys):
    source = next((folders / "test" / "plum").glob("*.png"))
    (folders / "generated" / "0033_plum" / "x.png").write_bytes(source.read_bytes())
    assert main(arguments(folders, "--seeds", "1", "--shares", "0.5")) == 0
    assert "note: 1 of the test's pictures are in --generated too" in capsys.readouterr().out


def test_a_class_without_generated_pictures_is_told_and_trained(folders, capsys):
    for path in (folders / "generated" / "0033_plum").iterdir():
        path.unlink()
    (folders / "generated" / "0033_plum").rmdir()
    assert main(arguments(folders, "--seeds", "1", "--shares", "0.5")) == 0
    assert "note: no generated pictures of 'plum'" in capsys.readouterr().out


# Figures.


def test_the_interval_is_students_of_the_differences():
    found = paired_difference([0.1, 0.2, 0.3, 0.2])
    assert found.mean == pytest.approx(0.2)
    # t(3, .975) = 3.182, standard error .0816 / 2
    assert found.low == pytest.approx(0.2 - 3.182 * 0.08165 / 2, abs=1e-3)
    assert found.verdict == "gains"
    assert paired_difference([0.1]).verdict == "open"
    assert paired_difference([-0.1, -0.1]).verdict == "loses"


@pytest.mark.slow
def test_help_answers_at_once_and_imports_no_torch():
    code = (
        "import sys; from apps.augment.__main__ import build_parser as b; b(); print('torch' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"
