"""The command line: flags as people write them, what is told of those that went, help, and a run again."""

import json
import subprocess
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest
import yaml
from earlier_records import RECORD_OF_0_2_0, options_of_0_2_0

from apps.earlier import GONE
from apps.session import record_of
from config import RunConfig
from discriminative import VERSION
from run import OWN_FLAGS, main, options_of, parse
from trainer import Training

ROOT = Path(__file__).parents[1]
HEADINGS = [
    "Help and presets:",
    "What to do:",
    "Models:",
    "The class token and its prompts:",
    "Sampling:",
    "Learning:",
    "Evaluation:",
    "Outputs:",
    "Cluster:",
]


def given(*argv: str) -> dict:
    """The options that were given, without the command line's own flags."""
    found, _ = parse(list(argv))
    return {name: value for name, value in found.items() if name not in OWN_FLAGS}


def refused(capsys, *argv: str) -> str:
    """The one line with which a command is refused, without a traceback and before anything is done."""
    try:
        code = main(list(argv))
    except SystemExit as stopped:  # argparse's own
        code = stopped.code
    told = capsys.readouterr()
    assert code == 2
    assert told.out == ""
    assert told.err.count("\n") == 1
    assert told.err.startswith("run.py: error: ")
    return told.err.removeprefix("run.py: error: ").rstrip("\n")


def planned(capsys, tmp_path, *argv: str) -> dict:
    """The options that a dry run of the miniature model resolves; nothing is written."""
    before = sorted(tmp_path.rglob("*"))
    capsys.readouterr()
    where = ["--model", "miniature", "--output_path", str(tmp_path / "results")]
    assert main([*argv, *where, "--dry_run"]) == 0
    assert sorted(tmp_path.rglob("*")) == before
    return json.loads(capsys.readouterr().out)["config"]


# --- flags as people write them


@pytest.mark.parametrize("name", [f.name for f in fields(RunConfig) if f.type is bool])
def test_a_flag_alone_is_true_and_false_stays_false(name):
    assert given(f"--{name}") == {name: True}
    for text in ("True", "true", "1"):
        assert given(f"--{name}", text) == {name: True}
    for text in ("False", "false", "0"):
        assert given(f"--{name}", text) == {name: False}
        assert given(f"--{name}={text}") == {name: False}


def test_a_flag_alone_does_not_take_the_next_one_for_its_value():
    assert given("--train", "--evaluate", "--class_index", "2") == {
        "train": True,
        "evaluate": True,
        "class_index": 2,
    }


def test_training_is_planned_with_the_flag_alone_and_not_with_false(capsys, tmp_path):
    config = planned(capsys, tmp_path, "--class_index", "2", "--train")
    assert config["train"] is True
    assert refused(capsys, "--class_index", "2", "--train", "False").startswith("nothing to do")


def test_a_text_option_without_its_value_is_refused(capsys):
    assert refused(capsys, "--class_index", "--train") == "argument --class_index: expected one argument"


@pytest.mark.parametrize(
    "argv",
    [("--class_index", "2"), ("--class-index", "2"), ("--class_index=2",), ("--class-index=2",)],
)
def test_dashes_in_a_flag_count_as_underscores(argv, capsys, tmp_path):
    assert given(*argv) == {"class_index": 2}
    assert planned(capsys, tmp_path, *argv, "--train")["class_index"] == 2


@pytest.mark.parametrize("field", [f for f in fields(RunConfig) if "_" in f.name], ids=lambda f: f.name)
def test_every_flag_may_be_written_with_dashes(field):
    name = field.name
    has_value = field.default is not None and type(field.default) is not bool
    value = str(field.default) if has_value else (field.metadata["choices"] or ["1"])[0]
    dashed = f"--{name.replace('_', '-')}"
    assert given(dashed, value) == given(f"--{name}", value) == given(f"{dashed}={value}")
    assert set(given(dashed, value)) == {name}


def test_dashes_and_equals_signs_in_a_value_stay():
    assert given("--prompt=a close-up={token}") == {"prompt": "a close-up={token}"}
    assert given("--exp-id", "my-run") == {"exp_id": "my-run"}
    assert given("--prompt=--a-b") == {"prompt": "--a-b"}


@pytest.mark.parametrize(
    ("flag", "nearest"),
    [
        ("--class_idx", "--class_index"),
        ("--trian", "--train"),
        ("--clas-index=2", "--class_index"),
        ("--evaluation", "--evaluate"),
        ("--prompts", "--prompt"),
        ("--num_image", "--num_images"),
        ("--learningrate", "--learning_rate"),
        ("--guidance", "--guidance_scale"),
        ("--presets", "--preset"),
        ("--conf", "--config"),
        ("--versoin", "--version"),
    ],
)
def test_a_misspelled_flag_names_the_nearest(flag, nearest, capsys):
    told = refused(capsys, flag, "2", "--class_index", "2", "--train")
    written = flag.partition("=")[0].replace("clas-index", "clas_index")
    assert told == f"{written} is no option; the nearest is {nearest}"


def test_a_flag_that_is_like_no_other_is_told_where_all_are(capsys):
    assert refused(capsys, "--xyzzy", "--train") == "--xyzzy is no option; --help all lists them"


def test_a_flag_is_not_shortened(capsys):
    """A record of the command would mean something else once another flag begins so."""
    assert refused(capsys, "--class", "2", "--train") == "--class is no option; the nearest is --class_index"


# --- flags that went


@pytest.mark.parametrize("name", GONE)
def test_a_flag_that_went_is_answered_with_what_serves_instead(name, capsys):
    told = refused(capsys, f"--{name}", "1", "--class_index", "2", "--train")
    assert told == f"--{name} is no option any more: {GONE[name].instead}"
    assert refused(capsys, f"--{name.replace('_', '-')}=1", "--class_index", "2", "--train") == told


def test_every_option_of_version_0_2_0_is_an_option_or_is_told_of():
    today = {f.name for f in fields(RunConfig)}
    assert set(options_of_0_2_0()) <= today | set(GONE)
    assert not today & set(GONE)


@pytest.mark.parametrize(
    ("name", "instead"),
    [
        ("training_steps", "--training_sampler"),
        ("training_scheduler", "--training_sampler"),
        ("gradient_steps", "--gradient_mode"),
        ("revision", "--model"),
        ("prompts_file", "--prompt"),
        ("save_as_full_pipeline", "--export"),
        ("batch_size", "--memory"),
        ("cache_dir", "HF_HOME"),
        ("local_files_only", "HF_HUB_OFFLINE=1"),
        ("fine_rate", "config.learning(fine_rate=...)"),
        ("token_ema", "docs/experiments.md"),
        ("confirm_best", "always"),
    ],
)
def test_what_serves_instead_is_there(name, instead, capsys):
    assert instead in refused(capsys, f"--{name}", "1")
    if instead.startswith("--"):
        assert instead[2:] in {f.name for f in fields(RunConfig)}


# --- version, help, and no flag at all


def test_the_version_is_printed(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"{VERSION}\n"


def test_without_a_flag_it_is_shown_how_to_begin_the_miniature_first(capsys):
    assert main([]) == 2
    told = capsys.readouterr()
    assert told.err == ""
    commands = [line.strip() for line in told.out.splitlines() if line.startswith("  python run.py")]
    assert commands[0] == "python run.py --model miniature --class_index 2 --train --evaluate"
    assert told.out.index("--model miniature") < told.out.index("Stable Diffusion 1.4")
    assert "--help all" in told.out


def test_as_a_script_it_shows_how_to_begin_without_a_traceback():
    done = subprocess.run(
        [sys.executable, "run.py"], cwd=ROOT, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 2
    assert "--model miniature --class_index 2 --train --evaluate" in done.stdout
    assert done.stderr == ""


def shown(capsys, *argv: str) -> tuple[list[str], list[str]]:
    """Options of a run, and headings, that the help shows, in its order."""
    assert main(list(argv)) == 0
    lines = capsys.readouterr().out.splitlines()
    names = [line.split()[0].rstrip(",") for line in lines if line.startswith("  --")]
    headings = [line for line in lines if line.endswith(":") and not line.startswith(" ")]
    return [name[2:] for name in names if name[2:] not in OWN_FLAGS], headings


@pytest.mark.parametrize("argv", [("--help",), ("-h",), ("--help", "main")])
def test_the_help_shows_42_options_under_headings(argv, capsys):
    names, headings = shown(capsys, *argv)
    assert names == [f.name for f in fields(RunConfig) if not f.metadata["more"]]
    assert len(names) == 42
    assert headings == HEADINGS


def test_the_whole_help_shows_all_64_options_under_headings(capsys):
    names, headings = shown(capsys, "--help", "all")
    assert names == [f.name for f in fields(RunConfig)]
    assert len(names) == 64
    assert headings == HEADINGS


def test_the_help_says_how_to_see_every_option(capsys):
    main(["--help"])
    assert "--help all has every option" in " ".join(capsys.readouterr().out.split())


def test_help_of_something_else_is_refused(capsys):
    assert refused(capsys, "--help", "most").startswith("argument --help/-h: invalid choice: 'most'")


# --- a run again: --config


@pytest.fixture
def record(tmp_path):
    """Writes the ``config.json`` of a training of this version; gives its path."""

    def write(**options) -> str:
        config = replace(RunConfig(), class_index=2, train=True, **options)
        plan = type("Plan", (), {"config": config, "label": "bat"})
        path = tmp_path / "config.json"
        path.write_text(json.dumps(record_of(plan, config.learning(), Training()), indent=2))
        return str(path)

    return write


def written(tmp_path, name: str, content) -> str:
    """A JSON file, or one of YAML."""
    path = tmp_path / name
    path.write_text(json.dumps(content) if name.endswith("json") else yaml.safe_dump(content))
    return str(path)


def test_a_runs_record_is_run_again_with_all_its_options(record, capsys, tmp_path):
    options = {
        "seed": 7,
        "learning_rate": 0.002,
        "gradient_mode": "last:3",
        "training_sampler": "ddim@5",
        "guidance_scale": 4.0,
        "augment": True,
        "exp_id": "seventh",
    }
    path = record(**options)
    found = planned(capsys, tmp_path, "--config", path)
    assert {name: found[name] for name in options} == options
    config = options_of(parse(["--config", path])[0])
    assert asdict(config) == json.loads(Path(path).read_text())["config"]


def test_what_was_run_is_run_again_from_the_record_that_it_wrote(capsys, tmp_path):
    """The options that a run resolved are options that a run takes."""
    first = planned(capsys, tmp_path, "--class_index", "2", "--train", "--memory", "8gb")
    path = written(tmp_path, "config.json", {"version": VERSION, "config": first, "constants": {}})
    assert planned(capsys, tmp_path, "--config", path) == first


def test_flags_beside_a_record_win(record, capsys, tmp_path):
    path = record(seed=7, augment=True, test_size=3)
    found = planned(capsys, tmp_path, "--config", path, "--seed", "8", "--augment", "False", "--evaluate")
    assert (found["seed"], found["augment"], found["train"], found["evaluate"]) == (8, False, True, True)
    assert found["test_size"] == 3
    assert planned(capsys, tmp_path, "--seed", "8", f"--config={path}")["seed"] == 8


def test_a_flag_that_names_the_default_beats_the_record_too(record, capsys, tmp_path):
    assert planned(capsys, tmp_path, "--config", record(seed=7), "--seed", "35")["seed"] == 35


def test_options_in_yaml_are_run_and_beat_the_preset(capsys, tmp_path):
    path = written(tmp_path, "run.yaml", {"class_index": 2, "train": True, "patience": 4})
    found = planned(capsys, tmp_path, "--config", path, "--preset", "paper")
    assert (found["class_index"], found["train"], found["patience"]) == (2, True, 4)
    assert (found["noise_pool"], found["exp_id"]) == (1, "paper")


def test_a_class_in_a_file_may_be_a_name_and_a_whole_number_stands_for_a_decimal_one(capsys, tmp_path):
    path = written(
        tmp_path, "run.yaml", {"class_index": "bat, cricket bat", "train": True, "guidance_scale": 5}
    )
    found = planned(capsys, tmp_path, "--config", path)
    assert type(found["class_index"]) is int
    assert found["guidance_scale"] == 5.0


@pytest.mark.parametrize("name", ["run.json", "run.yaml"])
def test_a_file_of_options_may_be_json_or_yaml(name, capsys, tmp_path):
    path = written(tmp_path, name, {"class_index": 2, "train": True, "seed": 9})
    assert planned(capsys, tmp_path, "--config", path)["seed"] == 9


@pytest.mark.parametrize("rate", [1e-5, 0.00025, 1.0])
def test_a_small_number_of_a_record_is_a_number(rate, record, capsys, tmp_path):
    """JSON writes 1e-05, which YAML reads as a text."""
    path = record(learning_rate=rate, weight_decay=rate)
    found = planned(capsys, tmp_path, "--config", path)
    assert (found["learning_rate"], found["weight_decay"]) == (rate, rate)


@pytest.mark.parametrize("text", ["1e-5", "1e-05", "1.0e-5", "0.00001"])
def test_a_small_number_in_yaml_is_a_number(text, capsys, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(f"class_index: 2\ntrain: true\nlearning_rate: {text}\n")
    assert planned(capsys, tmp_path, "--config", str(path))["learning_rate"] == 1e-5


def test_a_records_prompt_is_the_same_in_any_script(record):
    """JSON writes a character beyond 16 bits as two, which YAML does not join."""
    prompt = "Eine Fledermaus, 蝙蝠, 🦇: {token}"
    assert options_of(parse(["--config", record(prompt=prompt)])[0]).prompt == prompt


def test_a_record_of_version_0_2_0_is_run_again(capsys, tmp_path):
    path = written(tmp_path, "config.json", RECORD_OF_0_2_0)
    found = planned(capsys, tmp_path, "--config", path)
    own = {"model", "output_path", "dry_run", "classifier", "judge", "memory", "eval_batch_size"}
    today = asdict(RunConfig()) | {"class_index": 2, "train": True}
    assert {k: v for k, v in found.items() if k not in own} == {
        k: v for k, v in today.items() if k not in own
    }


def test_merged_options_of_a_record_of_version_0_2_0_are_run_again(capsys, tmp_path):
    then = {
        "training_scheduler": "ddim",
        "training_steps": 5,
        "gradient_mode": "last",
        "gradient_steps": 3,
        "save_as_full_pipeline": True,
        "export": "a1111",
    }
    record = RECORD_OF_0_2_0 | {"config": RECORD_OF_0_2_0["config"] | then}
    found = planned(capsys, tmp_path, "--config", written(tmp_path, "config.json", record))
    assert (found["training_sampler"], found["gradient_mode"]) == ("ddim@5", "last:3")
    assert found["export"] == "a1111,pipeline"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("token_ema", 0.5),
        ("num_templates", 1),
        ("reuse_trajectory", 2),
        ("confirm_best", False),
        ("guidance_interval", "0.1,0.8"),
        ("normalize_steps", True),
    ],
)
def test_a_record_of_what_can_be_done_no_more_is_told_in_one_line(name, value, capsys, tmp_path):
    record = RECORD_OF_0_2_0 | {"config": RECORD_OF_0_2_0["config"] | {name: value}}
    path = written(tmp_path, "config.json", record)
    told = refused(capsys, "--config", path, "--dry_run")
    assert told == f"--config: {path!r} was given; {name} is no option any more: {GONE[name].instead}"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("class_index: [1", "which cannot be read"),
        ("- class_index\n- train\n", "allowed is a run's config.json, or a file of options and values"),
        ("", "allowed is a run's config.json, or a file of options and values"),
        ("bat", "allowed is a run's config.json, or a file of options and values"),
        ("clas_index: 2\n", "clas_index is no option"),
        ("class-index: 2\n", "class-index is no option"),
        ("1: 2\n", "1 is no option"),
        ("class_index: 2.5\n", "class_index is 2.5; allowed is int | str | None"),
        ("train: 1\n", "train is 1; allowed is bool"),
        ("seed: '7'\n", "seed is '7'; allowed is int"),
        ("seed: true\n", "seed is True; allowed is int"),
        ("seed: 7.5\n", "seed is 7.5; allowed is int"),
        ("guidance_scale: high\n", "guidance_scale is 'high'; allowed is float"),
        ("guidance_scale:\n", "guidance_scale is None; allowed is float"),
        ("prompt: [a, b]\n", "prompt is ['a', 'b']; allowed is str | None"),
        ("token_ema: 0.5\n", "token_ema is no option any more: it went"),
    ],
)
def test_a_wrong_file_of_options_is_told_in_one_line(content, message, capsys, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(content)
    told = refused(capsys, "--config", str(path), "--class_index", "2", "--train", "--dry_run")
    assert told.startswith(f"--config: {str(path)!r} was given")
    assert message in told


@pytest.mark.parametrize("kind", ["nowhere", "folder", "binary"])
def test_a_file_that_cannot_be_read_is_told_in_one_line(kind, capsys, tmp_path):
    path = tmp_path / kind
    if kind == "folder":
        path.mkdir()
    if kind == "binary":
        path.write_bytes(b"\xff\xfe\x00\x80")
    told = refused(capsys, "--config", str(path), "--train")
    assert told.startswith(f"--config: {str(path)!r} was given, which cannot be read (")


def test_a_value_of_a_file_is_checked_as_a_flags_is(capsys, tmp_path):
    path = written(tmp_path, "run.yaml", {"class_index": 2, "train": True, "images_per_update": 0})
    told = refused(capsys, "--config", path)
    assert told == "--images_per_update: 0 was given; allowed is 1 or more"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("fine_rate", 1.0),
        ("enough_validation_accuracy", 0.0),
        ("cache_dir", "hub"),
        ("batch_size", 2),
        ("training_steps", 20),
        ("gradient_steps", 3),
        ("revision", "fp16"),
    ],
)
def test_an_option_of_a_file_that_went_is_told_of_rather_than_left_out(name, value, capsys, tmp_path):
    path = written(tmp_path, "run.yaml", {"class_index": 2, "train": True, name: value})
    told = refused(capsys, "--config", path, "--model", "miniature", "--dry_run")
    assert told == f"--config: {path!r} was given; {name} is no option any more: {GONE[name].instead}"


@pytest.mark.parametrize("version", [VERSION, "0.2.0"])
def test_a_record_of_other_constants_is_not_run_as_if_they_were_todays(version, record, capsys, tmp_path):
    """Another token would be learned, and nothing would say so."""
    if version == VERSION:
        content = json.loads(Path(record()).read_text())
        content["constants"]["fine_rate"] = 1.0
    else:
        content = RECORD_OF_0_2_0 | {"config": RECORD_OF_0_2_0["config"] | {"fine_rate": 1.0}}
    path = written(tmp_path, "config.json", content)
    told = refused(capsys, "--config", path, "--model", "miniature", "--dry_run")
    assert told.startswith(f"--config: {path!r} was given")
    assert "fine_rate" in told
    assert "1.0" in told
