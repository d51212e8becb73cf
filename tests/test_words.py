"""The words of a class: what is suggested for one that is not known, what is listed, and labels that name
nothing."""

import json

import pytest
from tiny_folders import edit_json, save_timm

from classifiers import find, read_labels
from discriminative.diffusion.models import load_tokenizer
from discriminative.errors import WorkError
from discriminative.guides.labels import match_label, says_what_it_is, suggestion
from discriminative.tokens.prompts import spelled_words
from run import main

INET = read_labels("inet")
TRAIN = ["--model", "miniature", "--class_index", "1", "--train", "--dry_run"]


@pytest.mark.parametrize(
    ("name", "first", "never"),
    [
        ("corgi", "it is a part of 264 (Pembroke, Pembroke Welsh corgi), 265 (Cardigan", "clog"),
        ("terrier", "159 (toy terrier)", "aircraft carrier"),
        ("terrier", "and 19 more, which --list_classes True --class_index 'terrier' lists", "terrace"),
        ("phone", "it is a part of 488 (cellular telephone", "throne"),
        ("dog", "it is a part of 154 (Maltese dog", "dough"),
        ("welsh  CORGI", "it is a part of 264", "nearest"),
        # Of a typing mistake the nearest, by a word of a label too.
        ("corgy", "the nearest are 264 (Pembroke", "part of"),
        ("golden retriver", "the nearest are 208 (golden retriever)", "part of"),
        ("?", "the nearest are", "part of"),
    ],
)
def test_labels_that_hold_the_word_are_suggested_first(name, first, never):
    told = suggestion(INET, name)
    assert first in told
    assert never not in told


def test_whole_words_come_before_parts_of_others():
    labels = ["xylophone", "dial_telephone", "cellular phone", "microphone stand"]
    assert suggestion(labels, "phone").startswith("it is a part of 3 (cellular phone), 1 (xylophone)")


def test_an_unknown_class_in_a_prompt_has_the_same_suggestion(capsys):
    argv = ["--model", "miniature", "--class_index", "2", "--train", "--dry_run"]
    assert main([*argv, "--prompt", "a {token:mobile}"]) == 2
    said = capsys.readouterr().err
    assert "{token:mobile} in a prompt: 'mobile' was given" in said
    assert "it is a part of" in said


@pytest.mark.parametrize(
    ("wanted", "numbers"),
    [
        ("corgi", [264, 265]),
        ("283", [283]),
        ("283,285-287", [283, 285, 286, 287]),
        ("tinca TINCA", [1]),
        ("tiger cat", [283]),
    ],
)
def test_a_list_of_classes_shows_those_that_are_named(wanted, numbers, capsys):
    assert main(["--classifier", "inet", "--list_classes", "--class_index", wanted]) == 0
    listed = [int(line.split()[0]) for line in capsys.readouterr().out.splitlines()]
    assert listed == numbers


@pytest.mark.parametrize(
    ("wanted", "told"),
    [("corgy", "the nearest are 264"), ("1001", "allowed is 1 to 1000"), ("5-2000", "allowed is 1 to 1000")],
)
def test_a_list_of_no_class_is_refused(wanted, told, capsys):
    assert main(["--classifier", "inet", "--list_classes", "--class_index", wanted]) == 2
    assert told in capsys.readouterr().err


def test_a_list_of_all_is_every_class(capsys):
    assert main(["--classifier", "inet", "--list_classes", "--class_index", "all"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1000


@pytest.mark.parametrize(
    "label", ["LABEL_0", "7", "n02123159", "?", "", "___", "class 12", "012.", ", second synonym"]
)
def test_a_label_that_names_nothing_is_told_until_a_name_is_given(label, tmp_path, capsys):
    """It stood silently in every prompt: "A photo of newclas label 0"."""
    save_timm(tmp_path / "c")
    edit_json(tmp_path / "c" / "config.json", label_names=[label, "bat", "cat", "dog"])
    argv = [*TRAIN, "--classifier", f"timm:{tmp_path / 'c'}", "--output_path", str(tmp_path / "r")]
    assert main(argv) == 2
    said = capsys.readouterr().err
    assert f"--prompt_name: nothing was given, and the label {label!r}" in said
    assert said.count("\n") == 1
    assert main([*argv, "--prompt_name", "fruit bat"]) == 0
    assert "A photo of newclas fruit bat" in capsys.readouterr().out


@pytest.mark.parametrize("label", ["747-400", "3d printer", "label maker", "n 95 mask", "001.Auk", "虎"])
def test_a_label_with_a_word_or_a_model_number_names_its_class(label):
    assert says_what_it_is(label)


def test_labels_without_names_are_marked_in_the_list(tmp_path, capsys):
    name = save_timm(tmp_path)
    edit_json(tmp_path / "config.json", label_names=["LABEL_0", "LABEL_1", "cat", "dog"])
    find.cache_clear()
    assert main(["--classifier", name, "--list_classes"]) == 0
    first, _, third, _ = capsys.readouterr().out.splitlines()
    assert first.endswith("->  (needs --prompt_name)")
    assert third.endswith("->  cat")


def test_labels_without_names_are_no_common_class_of_two_classifiers():
    assert match_label(["LABEL_0", "LABEL_1", "cat"], 0, ["LABEL_1", "LABEL_0"]) is None
    assert match_label(["LABEL_0", "LABEL_1", "cat"], 2, ["cat", "LABEL_0"]) == 0
    assert match_label(["LABEL_0", "LABEL_1"], 0, ["LABEL_0", "LABEL_1"]) == 0


def test_a_label_that_is_too_long_for_a_prompt_is_not_blamed_on_another_flag(tmp_path, capsys):
    name = save_timm(tmp_path / "c")
    edit_json(tmp_path / "c" / "config.json", label_names=["bat " * 30, "bat", "cat", "dog"])
    argv = [*TRAIN, "--classifier", name, "--output_path", str(tmp_path / "r")]
    assert main(argv) == 2
    said = capsys.readouterr().err
    assert "tokens; allowed are at most 24" in said
    assert "give a shorter --prompt or --prompt_name" in said
    assert main([*argv, "--prompt_name", "bat"]) == 0


@pytest.mark.parametrize(
    ("classifier", "wanted", "spelled"),
    [
        ("inet", "tench", "'tench'"),
        ("inet", "tiger cat", ""),
        ("inet", "axolotl", "'axolotl'"),
        ("miniature", "2", ""),
    ],
)
def test_a_class_that_the_model_has_no_word_for_is_noted(classifier, wanted, spelled, tmp_path, capsys):
    """The miniature knows a few dozen words, and a class of ImageNet was planned without a remark."""
    argv = ["--model", "miniature", "--classifier", classifier, "--class_index", wanted]
    assert main([*argv, "--train", "--dry_run", "--output_path", str(tmp_path / "r")]) == 0
    notes = json.loads(capsys.readouterr().out)["plan"]["notes"]
    assert bool(notes) == bool(spelled)
    assert not notes or notes[0].startswith(f"miniature spells {spelled} letter by letter")


def test_the_miniature_knows_the_words_of_its_own_classes():
    tokenizer = load_tokenizer("miniature")
    assert not [label for label in read_labels("miniature") if spelled_words(tokenizer, label)]


def test_a_note_of_a_strange_word_stands_in_a_run_too(monkeypatch, tmp_path, capsys):
    def stop(session, plan):
        raise WorkError("far enough")

    monkeypatch.setattr("apps.session.Session.token", stop)
    argv = ["--model", "miniature", "--class_index", "2", "--train", "--prompt_name", "axolotl"]
    assert main([*argv, "--output_path", str(tmp_path / "r")]) == 1
    assert "note: miniature spells 'axolotl' letter by letter" in capsys.readouterr().out
