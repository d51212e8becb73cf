"""An evaluation in a precision of its own: where it is refused, what it samples in, what it says of it."""

import json
from dataclasses import replace

import pytest
import torch
from conftest import tiny_classifier
from test_reuse import evaluation_is_reused

from apps.plan import Sources
from apps.provenance import evaluation_options
from apps.session import Session
from config import RunConfig, validate
from discriminative.errors import UsageError
from discriminative.guides.classifier import Guide
from discriminative.precision import evaluation_dtype
from discriminative.records.evaluation import EvaluationRecord
from discriminative.records.layout import RunFolder
from evaluate import evaluate

CONFIG = RunConfig(class_index=1, evaluate=True, num_inference_steps=2, test_size=10, eval_batch_size=4)
COARSE = replace(CONFIG, eval_precision="bf16")
CPU = torch.device("cpu")
CARD = torch.device("cuda:0")


@pytest.fixture
def machine(monkeypatch):
    """Sets what the processor has, and the card."""

    def make(units: bool, capability: tuple[int, int] = (8, 0)) -> None:
        monkeypatch.setattr("discriminative.precision.has_bf16_units", lambda: units)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "an old card")

    return make


@pytest.mark.parametrize(
    ("name", "device", "units", "capability", "expected"),
    [
        (None, CPU, False, (7, 5), None),
        ("bf16", CPU, True, (7, 5), torch.bfloat16),
        ("bf16", CARD, False, (8, 0), torch.bfloat16),
        ("fp16", CARD, False, (7, 5), torch.float16),
    ],
)
def test_a_device_with_units_for_it_evaluates_in_it(name, device, units, capability, expected, machine):
    machine(units, capability)
    assert evaluation_dtype(name, device, torch.float32) is expected


@pytest.mark.parametrize(
    ("name", "device", "dtype", "message"),
    [
        ("bf16", CPU, torch.float32, ", but this processor has no units for it; leave it out here"),
        ("fp16", CPU, torch.float32, " on the CPU; allowed there is bf16, or nothing"),
        ("bf16", CARD, torch.float32, ", which an old card only imitates, slowly; allowed there is fp16"),
        ("fp16", CARD, torch.float16, ", but the models are in float16; allowed is a value beside float32"),
        ("bf16", CPU, torch.bfloat16, ", but the models are in bfloat16; allowed is a value beside float32"),
    ],
)
def test_a_device_without_units_or_models_in_half_precision_refuse_it(name, device, dtype, message, machine):
    machine(False, (7, 5))
    with pytest.raises(UsageError, match=f"--eval_precision: {name!r} was given{message}"):
        evaluation_dtype(name, device, dtype)


def test_it_is_refused_before_models_load_and_without_an_evaluation(machine):
    machine(False)
    with pytest.raises(UsageError, match="this processor has no units for it"):
        Sources(replace(COARSE, model="miniature", device="cpu"))
    with pytest.raises(UsageError, match="--eval_precision: 'bf16' was given; allowed is a value only with"):
        validate(replace(COARSE, evaluate=False, train=True))


@pytest.fixture
def sampled(token):
    """Of every call of the UNet whether it is in bfloat16, and of how many images."""
    seen = []

    def note(module, args, kwargs, output):
        seen.append((torch.is_autocast_enabled("cpu"), len(args[0]) // 2))

    token.models.unet.register_forward_hook(note, with_kwargs=True)
    return seen


def evaluated(token, config, folder, judge: bool = True) -> dict:
    other = tiny_classifier()
    other.model[1].weight.data.mul_(2.0)
    judges = Guide(other, 0) if judge else None
    evaluate(config, token, [Guide(tiny_classifier(), 0)], judges, "cat", folder)
    return json.loads(folder.result.read_text())


def test_by_default_all_is_sampled_in_the_models_precision(token, folder, sampled, machine):
    machine(True)
    result = evaluated(token, CONFIG, folder)
    assert not any(coarse for coarse, _ in sampled)
    assert "precision" not in result
    assert result["settings"]["precision"] == "torch.float32"
    assert EvaluationRecord(result).precision is None


def test_all_seeds_are_sampled_in_it_and_some_in_the_models_own(token, folder, sampled, machine):
    machine(True)
    result = evaluated(token, COARSE, folder)
    steps = 3  # PNDM's list of 2
    calls = {coarse: sum(n for is_coarse, n in sampled if is_coarse == coarse) for coarse in (True, False)}
    assert calls == {True: 2 * 10 * steps, False: 2 * 8 * steps}
    assert result["settings"]["precision"] == "torch.float32, bfloat16 without gradient"
    assert token.models.coarse_dtype is None


def test_the_record_and_a_line_say_what_it_does_to_verdicts(token, folder, machine):
    machine(True)
    exact = evaluated(token, CONFIG, folder)
    told = evaluated(token, COARSE, folder)["precision"]
    assert {name: told[name] for name in ("sampled_in", "compared_with", "seeds", "images")} == {
        "sampled_in": "bf16",
        "compared_with": "float32",
        "seeds": list(range(8)),
        "images": 16,
    }
    assert exact["prompts"][0]["arms"].keys() == {"token", "baseline"}
    for who, scale in (("guide", 0.2), ("judge", 0.4)):
        assert 0 < told[who]["log_probability_change"] < scale
        assert told[who]["log_probability_change"] <= told[who]["log_probability_largest_change"]
        assert 0 <= told[who]["verdicts_changed"] <= 16


def test_verdicts_that_change_are_counted_on_both_arms(token, folder, machine, monkeypatch):
    """Images in bfloat16 are made black, those in float32 white."""
    machine(True)

    def painted(prompts, seeds, settings):
        return torch.full((len(seeds), 3, 16, 16), 0.0 if token.models.coarse_dtype else 1.0)

    monkeypatch.setattr(token, "sample", painted)
    logits = {}
    guide = Guide(tiny_classifier(), 0)
    for name, value in (("black", 0.0), ("white", 1.0)):
        logits[name] = guide.classifier.logits(torch.full((1, 3, 16, 16), value))
    told = evaluated(token, replace(COARSE, test_size=3), folder, judge=False)["precision"]
    right = {name: bool(found.argmax(1) == 0) for name, found in logits.items()}
    own = {name: found.double().log_softmax(1)[0, 0].item() for name, found in logits.items()}
    moved = abs(own["black"] - own["white"])
    assert told["images"] == 6
    assert told["judge"] is None
    assert told["guide"] == {
        "verdicts_changed": 6 * (right["black"] != right["white"]),
        "log_probability_change": pytest.approx(moved),
        "log_probability_largest_change": pytest.approx(moved),
    }


def test_the_printed_line_names_guide_and_judge():
    one = {"verdicts_changed": 1, "log_probability_change": 0.0213, "log_probability_largest_change": 0.5}
    told = {"sampled_in": "bf16", "compared_with": "float32", "images": 16, "guide": one, "judge": None}
    line = EvaluationRecord({"precision": told}).precision
    start = "bf16 instead of float32, on 16 images: guide: verdicts changed 1"
    assert line == f"{start}, log-probability 0.021 on average, 0.5 at most"
    both = EvaluationRecord({"precision": told | {"judge": one | {"verdicts_changed": 0}}}).precision
    assert both.startswith(start)
    assert "; judge: verdicts changed 0, log-probability" in both


def test_an_evaluation_of_an_earlier_version_counts_as_one_in_the_models_precision(tmp_path, monkeypatch):
    def of_an_earlier_version(config):
        options = evaluation_options(config)
        del options["eval_precision"]
        return options

    monkeypatch.setattr("test_reuse.evaluation_options", of_an_earlier_version)
    for now, expected in ((CONFIG, True), (COARSE, False)):
        folder = RunFolder(tmp_path / str(expected), "c", "e")
        assert evaluation_is_reused(CONFIG, now, folder) is expected


def test_images_that_overflow_in_it_are_noted_with_what_helps(token, folder, machine, monkeypatch, capsys):
    machine(True)

    def overflown(prompts, seeds, settings):
        value = torch.nan if token.models.coarse_dtype and seeds == [0] else 0.5
        return torch.full((len(seeds), 3, 16, 16), value)

    monkeypatch.setattr(token, "sample", overflown)
    monkeypatch.setattr("evaluate.evaluation_dtype", lambda *args: torch.float16)
    told = evaluated(token, replace(COARSE, test_size=3, eval_batch_size=1), folder)
    assert capsys.readouterr().out.count("; --eval_precision bf16 helps, or none") == 2
    assert told["precision"]["guide"]["log_probability_largest_change"] > 1


def test_a_session_refuses_it_where_there_are_no_units_and_leaves_it_to_evaluations(machine, tmp_path):
    machine(True)
    options = {"device": "cpu", "output_path": str(tmp_path), "eval_precision": "bf16"}
    session = Session("miniature", **options)
    assert session.plan(1, train=True).config.eval_precision is None
    assert session.plan(1, train=True, evaluate=True).config.eval_precision == "bf16"
    machine(False)
    with pytest.raises(UsageError, match="this processor has no units for it"):
        Session("miniature", device="cpu").plan(1, train=True, evaluate=True, eval_precision="bf16")
