"""Which attributes a token adds: phrases scored on the pictures that an evaluation drew."""

import json
from pathlib import Path

import pytest
import torch
from conftest import tiny_tokenizer
from safetensors.torch import save_file
from scipy.stats import ttest_rel
from test_session import SHORT

from apps.session import Session
from discriminative.errors import UsageError, WorkError
from discriminative.guides.attributes import Attributes, by_clip, by_own
from discriminative.guides.similarity import TextSimilarity
from discriminative.records.insight import InsightRecord, compare_attributes
from discriminative.records.layout import RunFolder
from discriminative.records.scores import simultaneous_intervals
from run import main

CLASSES = {1: "0001_tiger_cat", 2: "0002_bat"}
OWN = """
import torch

def bright_and_red(phrases):
    assert phrases == ["bright", "red"]
    return lambda images: torch.stack([images.mean((1, 2, 3)), images[:, 0].mean((1, 2))], dim=1)

def of_one_phrase(phrases):
    return lambda images: images.mean((1, 2, 3))[:, None]

def not_finite(phrases):
    return lambda images: torch.full((len(images), len(phrases)), float("nan"))

def not_a_function(phrases):
    return "scores"

def falls(phrases):
    return lambda images: 1 / 0
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A module of one's own in the working directory, and the phrases' file."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    Path("own_scores.py").write_text(OWN)
    Path("attributes.txt").write_text("# of the colours\nbright\n\nred\n")
    return "python:own_scores:bright_and_red"


@pytest.fixture
def argv(names, own):
    """A run of class 1, whose token is there, without saying what is to be done."""
    for name in CLASSES.values():
        folder = RunFolder("r", name, "default")
        folder.records.mkdir(parents=True)
        save_file({"newclas": torch.ones(1, 16)}, folder.token)
    options = SHORT | names | {"test_size": 10, "eval_batch_size": 10, "class_index": 1, "output_path": "r"}
    options |= {"insight": "attributes.txt", "clip_model": own}
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A tiny CLIP model that takes texts of 16 tokens."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": 16}
    text |= {"eos_token_id": tokenizer.eos_token_id}
    config = CLIPConfig(
        text_config=text | small,
        vision_config={"image_size": 16, "patch_size": 8} | small,
        projection_dim=8,
    )
    folder = tmp_path_factory.mktemp("clip")
    CLIPModel(config).save_pretrained(folder)
    size = {"height": 16, "width": 16}
    pictures = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=size)
    CLIPProcessor(pictures, tokenizer).save_pretrained(folder)
    return str(folder)


def insight_of(number: int) -> dict:
    folder = RunFolder("r", CLASSES[number], "default")
    return json.loads(folder.result.read_text())["insight"]


# The figures.


def test_intervals_are_students_at_a_level_divided_by_the_number_of_phrases():
    generator = torch.Generator().manual_seed(0)
    without = torch.rand(40, 5, generator=generator)
    after = without + 0.3 * torch.randn(40, 5, generator=generator)
    found = simultaneous_intervals(after - without)
    expected = ttest_rel(after.numpy(), without.numpy()).confidence_interval(1 - 0.05 / 5)
    for k, (low, high) in enumerate(found):
        assert (low, high) == pytest.approx((expected.low[k], expected.high[k]), rel=1e-4)


def test_too_few_pairs_have_no_interval_and_say_so():
    found = compare_attributes(["red", "blue"], torch.zeros(9, 2), torch.tensor([[0.0, 1.0]] * 9))
    assert [(a.phrase, a.interval, a.is_added) for a in found] == [
        ("blue", None, False),
        ("red", None, False),
    ]
    record = InsightRecord(
        {"attributes": [a._asdict() for a in found], "phrases": 2 * [""], "pairs": 9} | OWN_SAID
    )
    assert record.line.startswith(
        "the token most 'blue' +1, without intervals: too few pairs, see --test_size"
    )


OWN_SAID = {"scorer": "python:a:b"}


def test_what_is_added_stands_first_and_what_is_taken_away_last():
    generator = torch.Generator().manual_seed(0)
    without = torch.rand(50, 3, generator=generator)
    moved = without + torch.tensor([-0.5, 0.0, 0.2]) + 0.1 * torch.randn(50, 3, generator=generator)
    found = compare_attributes(["lost", "same", "won"], without, moved)
    assert [a.phrase for a in found] == ["won", "same", "lost"]
    assert [a.is_added for a in found] == [True, False, False]
    assert [a.is_removed for a in found] == [False, False, True]
    record = InsightRecord(
        {"attributes": [a._asdict() for a in found], "phrases": 3 * [""], "pairs": 50} | OWN_SAID
    )
    assert record.line.startswith("the token adds 'won' +0.2")
    assert "; takes away 'lost' -0.5" in record.line
    assert record.line.endswith("(3 phrases scored by python:a:b on 50 pairs)")


def test_no_more_than_one_null_family_in_twenty_is_called_a_change():
    """Over 400 tables of 12 phrases that nothing changes: 5 %, and not 5 % for each phrase."""
    generator = torch.Generator().manual_seed(1)
    tables = torch.randn(400, 30, 12, generator=generator, dtype=torch.float64)
    wrong = [any(low > 0 or high < 0 for low, high in simultaneous_intervals(t)) for t in tables]
    assert sum(wrong) / len(wrong) < 0.08


# A run.


def test_a_run_says_what_the_token_adds_and_draws_nothing_for_it(argv, capsys, monkeypatch):
    assert main([*argv, "--evaluate", "--report"]) == 0
    told = insight_of(1)
    drawn = sorted(Path("r/img").rglob("*_right.png")) + sorted(Path("r/img").rglob("*_wrong.png"))
    assert len(drawn) == 20
    assert sorted(a["phrase"] for a in told["attributes"]) == ["bright", "red"]
    assert (told["pairs"], told["phrases"], told["scorer"]) == (10, ["bright", "red"], argv[-1])
    assert all(len(a["interval"]) == 2 for a in told["attributes"])
    out = capsys.readouterr().out
    assert out.count("insight: the token ") == 1
    page = Path("r/report.html").read_text()
    assert "What the token adds" in page
    assert "95% for all 2 phrases at once (Bonferroni)" in page
    # Again, with another phrase: the pictures that are there are looked at.
    monkeypatch.setattr("apps.session.load_models", lambda *args: pytest.fail("loaded a model"))
    before = {path: path.read_bytes() for path in drawn}
    Path("attributes.txt").write_text("red\n")
    assert main([*argv[:-1], "python:own_scores:of_one_phrase"]) == 0
    assert insight_of(1)["phrases"] == ["red"]
    assert {path: path.read_bytes() for path in before} == before


def test_the_score_of_a_picture_is_that_of_its_file(argv):
    from discriminative.records.files import read_image

    assert main([*argv, "--evaluate"]) == 0
    told = {a["phrase"]: a for a in insight_of(1)["attributes"]}
    for arm, key in (("baseline", "without"), ("token", "with_token")):
        files = list(Path("r/img/0001_tiger_cat/eval").glob(f"{arm}_*.png"))
        expected = sum(read_image(path).mean().item() for path in files) / len(files)
        assert told["bright"][key] == pytest.approx(expected, rel=1e-5)


def test_several_classes_are_looked_into_and_left_out_once_they_are(argv, capsys):
    argv[argv.index("--class_index") + 1] = "1,2"
    assert main([*argv, "--evaluate"]) == 0
    assert capsys.readouterr().out.count("insight: the token ") == 2
    assert {number: insight_of(number)["pairs"] for number in CLASSES} == {1: 10, 2: 10}
    assert main([*argv, "--evaluate"]) == 0
    out = capsys.readouterr().out
    assert "skipped      2   1-2   (finished before)" in out
    # Other phrases are another question.
    Path("attributes.txt").write_text("red\n")
    assert main([*argv[:-1], "python:own_scores:of_one_phrase", "--evaluate"]) == 0
    out = capsys.readouterr().out
    assert out.count("evaluated already") == 2
    assert {number: insight_of(number)["phrases"] for number in CLASSES} == {1: ["red"], 2: ["red"]}


def test_a_new_evaluation_does_not_keep_the_attributes_of_the_last_one(argv):
    assert main([*argv, "--evaluate"]) == 0
    bare = argv[: argv.index("--insight")]
    assert main([*bare, "--evaluate"]) == 0
    assert "insight" not in json.loads(RunFolder("r", CLASSES[1], "default").result.read_text())
    assert not Path("r/img/0001_tiger_cat/eval/insight").exists()


def test_a_session_tells_what_its_token_adds(names, own, tmp_path):
    session = Session(
        names["model"], names["classifier"], output_path=str(tmp_path / "s"), **SHORT | {"test_size": 10}
    )
    save_file({"newclas": torch.ones(1, 16)}, tmp_path / "t.safetensors")
    token = session.load(tmp_path / "t.safetensors", "bat")
    result = session.evaluate(token, insight="attributes.txt", clip_model=own)
    assert [set(a) for a in result["insight"]["attributes"]] == [
        {"phrase", "without", "with_token", "difference", "interval", "picture"}
    ] * 2


# What scores.


def test_phrases_are_scored_by_the_clip_models_own_cosines(clip):
    similarity = TextSimilarity(clip, torch.device("cpu"))
    images = torch.rand(3, 3, 20, 20, generator=torch.Generator().manual_seed(0))
    phrases = ["a cat", "a photo of a bat on blue"]
    found = by_clip(similarity, clip, phrases).scores(images)
    expected = torch.stack([similarity.of(images, phrase) for phrase in phrases], dim=1)
    torch.testing.assert_close(found, expected.double(), atol=1e-6, rtol=0)


def test_a_run_with_a_clip_model(argv, clip, capsys):
    Path("attributes.txt").write_text("a cat\na bat on blue\n")
    assert main([*argv[:-1], clip, "--evaluate"]) == 0
    assert {a["phrase"] for a in insight_of(1)["attributes"]} == {"a cat", "a bat on blue"}
    Path("attributes.txt").write_text("a cat\n" + "blue " * 15)
    assert main([*argv[:-1], clip]) == 2
    assert_one_line(capsys, "tokens, with begin and end; allowed are 16")


def assert_one_line(capsys, part: str) -> None:
    said = capsys.readouterr().err
    assert part in said
    assert said.count("\n") == 1


WRONG_FILES = [
    (None, "--insight: 'attributes.txt' was given, which cannot be read"),
    ("# nothing\n\n", "--insight: 'attributes.txt' was given, which holds no phrase"),
    ("red\nblue\n Red \n", "--insight: 'attributes.txt' holds 'Red' twice; allowed is each phrase once"),
]


@pytest.mark.parametrize(("content", "message"), WRONG_FILES)
def test_a_wrong_file_of_phrases_is_told_before_anything_is_loaded(
    content, message, argv, capsys, monkeypatch
):
    monkeypatch.setattr("apps.session.load_models", lambda *args: pytest.fail("loaded a model"))
    Path("attributes.txt").unlink()
    if content is not None:
        Path("attributes.txt").write_text(content)
    assert main([*argv, "--evaluate"]) == 2
    assert_one_line(capsys, message)


WRONG_SCORERS = [
    ("python:no_such_module:f", 2, "could not be loaded: No module named 'no_such_module'"),
    ("python:own_scores:nothing", 2, "the module 'own_scores' has no 'nothing'"),
    ("python:own_scores", 2, "the module 'own_scores' has no ''; allowed is python:<module>:<function>"),
    ("python:own_scores:not_a_function", 2, "it returned a str; needed is a function of images"),
    ("python:own_scores:of_one_phrase", 1, "gives scores of shape (2, 1); needed is (2, 2)"),
    ("python:own_scores:not_finite", 1, "gives scores that are not finite"),
    ("python:own_scores:falls", 1, "cannot score images: division by zero"),
    ("./nowhere", 2, "--clip_model: './nowhere' could not be loaded"),
]


@pytest.mark.parametrize(("name", "code", "message"), WRONG_SCORERS)
def test_what_cannot_score_is_told_before_anything_is_drawn(name, code, message, argv, capsys, monkeypatch):
    monkeypatch.setattr("apps.session.load_models", lambda *args: pytest.fail("loaded a model"))
    assert main([*argv[:-1], name, "--evaluate"]) == code
    assert_one_line(capsys, message)


def test_phrases_need_something_that_scores_them_and_pictures(argv, capsys):
    bare = argv[: argv.index("--clip_model")]
    assert main([*bare, "--evaluate"]) == 2
    assert_one_line(capsys, "--insight: 'attributes.txt' was given; allowed is a file only with --clip_model")
    without_phrases = [word for word in argv if word not in ("--insight", "attributes.txt")]
    assert main([*without_phrases, "--evaluate"]) == 2
    assert_one_line(capsys, "allowed is one's own function only with --insight")
    assert main(argv) == 1
    assert_one_line(capsys, "there is no evaluation at")


def test_an_evaluation_of_another_token_or_without_pictures_is_refused(argv, capsys):
    assert main([*argv, "--evaluate"]) == 0
    next(Path("r/img/0001_tiger_cat/eval").glob("token_0003_*.png")).unlink()
    capsys.readouterr()
    assert main(argv) == 1
    assert_one_line(capsys, "1 pairs of pictures are missing")
    save_file({"newclas": torch.zeros(1, 16)}, RunFolder("r", CLASSES[1], "default").token)
    assert main(argv) == 1
    assert_one_line(capsys, "is of another token; --evaluate True draws its pictures")


def test_one_scorer_raises_its_own_error_where_it_is_no_function_of_the_users():
    def falls(images):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError):
        Attributes("clip", ["a"], falls).scores(torch.rand(1, 3, 4, 4))
    with pytest.raises(WorkError):
        Attributes("python:a:b", ["a"], falls).scores(torch.rand(1, 3, 4, 4))
    with pytest.raises(UsageError, match="has no 'x'"):
        by_own("python:json:x", ["a"])
