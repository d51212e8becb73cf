"""Classifiers that cannot guide or judge: told in one line before any work, whatever is the matter.

    pytest tests/test_classifiers_that_cannot.py

A run with one of them ended in a traceback, in "0 updates, 1.00 -> 1.00", or, as the judge, only after the
training.
"""

import pytest
import torch
from conftest import tiny_classifier, tiny_models
from tiny_folders import LABELS, edit_json, save_hf_vit, save_processor, save_timm

from apps.session import Session
from classifiers import read_labels
from discriminative.errors import UsageError
from discriminative.guides.classifier import Classifier
from discriminative.guides.preprocess import Recipe
from run import main

MINI = ["--model", "miniature", "--device", "cpu", "--class_index", "1"]

# Of 64x64 pixels, each a model (B, 3, 64, 64) -> (B, 2), or not quite.
MODULE = """
import numpy
import torch
from torch import nn
from classifiers import Classifier, Recipe

linear = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64 * 64, 2))


class Scorer(nn.Module):
    def __init__(self, score):
        super().__init__()
        self.score = score
        self.net = linear

    def forward(self, x):
        return self.score(x)


def classifier(score, labels=("tiger", "bat")):
    recipe = Recipe(None, None, (0.5,) * 3, (0.5,) * 3)
    return Classifier("mine", Scorer(score), list(labels), recipe)


def fine(): return classifier(linear)
def detached(): return classifier(lambda x: linear(x).detach())
def without_grad(): return classifier(torch.no_grad()(linear))
def numpy_inside(): return classifier(lambda x: torch.from_numpy(numpy.asarray(x.detach()[:, :2, 0, 0])))
def rounded(): return classifier(lambda x: linear(x.round() * 1))
def constant(): return classifier(lambda x: linear[1].bias.expand(len(x), 2).clone().requires_grad_())
def probabilities(): return classifier(lambda x: linear(x).softmax(1))
def one_logit(): return classifier(lambda x: linear(x)[:, :1], ["tiger"])
def three_labels(): return classifier(linear, ["tiger", "bat", "cat"])
def nothing(): return classifier(linear, [])
def as_tuple(): return classifier(lambda x: (linear(x), None))
def not_finite(): return classifier(lambda x: linear(x) * float("nan"))
def other_size(): return classifier(lambda x: linear(x[..., :32]))
def index_error(): return classifier(lambda x: [linear(x)][1])
def divides(): return 1 / 0
"""

# A function of the module, and what is said of it as a guide; as a judge, or None where it can be one.
TABLE = [
    ("detached", "no gradient of its logits reaches the image", None),
    ("without_grad", "no gradient of its logits reaches the image", None),
    ("numpy_inside", "no gradient of its logits reaches the image", None),
    ("rounded", "no gradient of its logits reaches the image", None),
    ("constant", "no gradient of its logits reaches the image", None),
    ("probabilities", "it gives probabilities; allowed are logits", "it gives probabilities"),
    ("one_logit", "has 1 label, as a regression has", "has 1 label, as a regression has"),
    ("nothing", "has 0 label", "has 0 label"),
    ("three_labels", "for 2 images and 3 labels", "for 2 images and 3 labels"),
    ("as_tuple", "cannot guide images of 64x64: ", "cannot judge images of 64x64: "),
    ("not_finite", "its logits are not finite", "its logits are not finite"),
    ("other_size", "cannot guide images of 64x64: ", "cannot judge images of 64x64: "),
    ("index_error", "cannot guide images of 64x64: list index out of range", "list index out of range"),
    ("divides", "could not be loaded: division by zero", "could not be loaded: division by zero"),
]


@pytest.fixture(scope="module")
def module(tmp_path_factory):
    """The name of a module of classifiers, below the working directory."""
    folder = tmp_path_factory.mktemp("modules")
    (folder / "classifiers_that_cannot.py").write_text(MODULE)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield "python:classifiers_that_cannot"


def refused(argv: list[str], output, capsys) -> str:
    """The one line of a run that is refused before anything is written."""
    assert main([*MINI, *argv, "--output_path", str(output)]) == 2
    said = capsys.readouterr().err.strip()
    assert said.count("\n") == 0
    assert not output.exists()
    return said


@pytest.mark.parametrize(("name", "said", "_"), TABLE, ids=[row[0] for row in TABLE])
def test_a_guide_that_cannot_guide_is_told_before_the_training(name, said, _, module, tmp_path, capsys):
    line = refused(["--train", "--classifier", f"{module}:{name}"], tmp_path / "r", capsys)
    assert line.startswith(f"run.py: error: --classifier: '{module}:{name}' ")
    assert said in line


@pytest.mark.parametrize(
    ("name", "said"), [(name, said) for name, _, said in TABLE if said], ids=[r[0] for r in TABLE if r[2]]
)
def test_a_judge_that_cannot_judge_is_told_before_the_training(name, said, module, tmp_path, capsys):
    argv = ["--train", "--evaluate", "--classifier", f"{module}:fine", "--judge", f"{module}:{name}"]
    line = refused(argv, tmp_path / "r", capsys)
    assert line.startswith(f"run.py: error: --judge: '{module}:{name}' ")
    assert said in line


def test_a_scorer_without_gradient_may_judge(module):
    from importlib import import_module

    scorer = import_module(module.removeprefix("python:")).detached()
    scorer.check(64, 64, guides=False)
    with pytest.raises(ValueError, match="no gradient"):
        scorer.check(64, 64, guides=True)


@pytest.mark.parametrize("flag", ["classifier", "judge"])
def test_a_processor_of_another_size_than_its_model_is_told(flag, tmp_path, capsys):
    name = save_hf_vit(tmp_path / "vit")
    save_processor(tmp_path / "vit", "ViTImageProcessor", size={"height": 48, "width": 48})
    line = refused(["--train", "--evaluate", f"--{flag}", name], tmp_path / "r", capsys)
    assert f"--{flag}: '{name}' cannot {'guide' if flag == 'classifier' else 'judge'} images of 64x64" in line
    assert "48" in line
    assert ("--judge none evaluates without one" in line) == (flag == "judge")


@pytest.mark.parametrize(
    ("kind", "changes", "said"),
    [
        (
            "hf",
            {"problem_type": "multi_label_classification"},
            "yes or no to each label by itself (multi-label)",
        ),
        ("hf", {"problem_type": "regression"}, "its head gives quantities rather than classes"),
        ("vit-mae", {"problem_type": "multi_label_classification"}, "(multi-label)"),
        ("hf", {"id2label": {"0": "bat"}, "label2id": {"bat": 0}}, "has 1 label, as a regression has"),
        (
            "vit-mae",
            {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}},
            "has 1 label, as a regression",
        ),
    ],
)
@pytest.mark.parametrize("flag", ["classifier", "judge"])
def test_a_head_that_chooses_no_label_is_told_from_its_configuration(
    kind, changes, said, flag, tmp_path, capsys
):
    """One logit alone ended with "0 updates, 1.00 -> 1.00" and exit code 0."""
    save_hf_vit(tmp_path / "vit")
    edit_json(tmp_path / "vit" / "config.json", **changes)
    argv = ["--train", "--evaluate", "--dry_run", f"--{flag}", f"{kind}:{tmp_path / 'vit'}"]
    assert said in refused(argv, tmp_path / "r", capsys)


def test_a_softmax_head_that_says_so_is_taken(tmp_path):
    name = save_hf_vit(tmp_path)
    edit_json(tmp_path / "config.json", problem_type="single_label_classification")
    assert read_labels(name) == LABELS


@pytest.mark.parametrize("kind", ["hf", "vit-mae", "timm"])
def test_labels_that_are_numbers_are_taken_as_texts(kind, tmp_path, capsys):
    """They ended in an AttributeError; "A photo of a 3" needs a name."""
    if kind == "timm":
        save_timm(tmp_path / "c")
        edit_json(tmp_path / "c" / "config.json", label_names=[3, 1, 4, 2])
    else:
        save_hf_vit(tmp_path / "c")
        numbers = {"0": 3, "1": 1, "2": 4, "3": 2}
        edit_json(tmp_path / "c" / "config.json", id2label=numbers, label2id={})
    name = f"{kind}:{tmp_path / 'c'}"
    assert read_labels(name) == ["3", "1", "4", "2"]
    argv = ["--train", "--dry_run", "--classifier", name]
    assert "--prompt_name: nothing was given, and the label '3'" in refused(argv, tmp_path / "r", capsys)
    assert main([*MINI, *argv, "--prompt_name", "bat", "--output_path", str(tmp_path / "r")]) == 0


def test_labels_of_ones_own_may_be_numbers():
    assert Classifier("mine", torch.nn.Identity(), range(3), Recipe(None, None, (0,), (1,))).labels == list(
        "012"
    )


def test_in_python_a_guide_is_seen_to_guide_before_it_does(tmp_path):
    """A pipeline of one's own, and a classifier that is there already."""
    from diffusers import StableDiffusionPipeline

    models = tiny_models()
    parts = {n: getattr(models, n) for n in ("tokenizer", "text_encoder", "unet", "vae", "scheduler")}
    pipeline = StableDiffusionPipeline(
        **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    classifier = tiny_classifier()
    classifier.model = torch.nn.Sequential(torch.nn.Threshold(9, 0), *classifier.model)  # 0 below 9
    session = Session(
        pipeline, classifier, "none", output_path=str(tmp_path / "r"), placeholder_token="newclas"
    )
    with pytest.raises(UsageError, match="--classifier: 'tiny' cannot guide images of 16x16: no gradient"):
        session.learn("tiger cat", num_inference_steps=4, training_sampler="same")
    assert not (tmp_path / "r" / "pipeline_token").exists()


def test_a_check_draws_nothing_from_the_programs_random_numbers(classifier):
    before = torch.get_rng_state()
    classifier.check(16, 16, guides=True)
    assert torch.equal(before, torch.get_rng_state())


def test_each_classifier_is_checked_once_for_what_it_does(module, monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr("apps.session.check_classifier", lambda *asked: seen.append(asked[1:]))
    session = Session("miniature", f"{module}:fine", "none", output_path=str(tmp_path))
    train = session.plan("tiger", train=True)
    for _ in range(2):
        session.guides(train)
        session.guides(session.plan("tiger", vectors=torch.zeros(1, 128), evaluate=True))
    assert seen == [(64, 64, True, "classifier"), (64, 64, False, "classifier")]


def test_out_of_memory_is_no_fault_of_the_classifier(classifier, monkeypatch):
    from classifiers import check_classifier

    def no_room(images):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(classifier, "logits", no_room)
    with pytest.raises(torch.OutOfMemoryError):
        check_classifier(classifier, 16, 16, True, "classifier")
