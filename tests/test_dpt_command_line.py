"""``python -m dpt``: quick help, one line for what is wrong, and nothing half-written.

pytest tests/test_dpt_command_line.py
pytest tests/test_dpt_command_line.py -m slow    # every command once on the miniature
"""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_dpt_data import folders, mined  # noqa: F401  (fixtures)

from dpt.__main__ import main, parse
from dpt.config import COMMANDS, Options
from dpt.files import ADAPTER, LORA, RECORD, new_reader, write_adapter
from dpt.settings import MINIATURE_ADAPTER, STAGES

ROOT = Path(__file__).parent.parent
MINI = ["--model", "miniature", "--device", "cpu"]


@pytest.fixture(scope="module")
def miniature():
    from discriminative.diffusion.models import load_models

    return load_models("miniature", torch.device("cpu"), torch.float32)


@pytest.fixture
def weights(tmp_path, miniature):
    """An adapter of the miniature, not trained."""
    folder = tmp_path / "weights"
    write_adapter(
        folder, new_reader(miniature, "up0", MINIATURE_ADAPTER, "pipeline"), "pipeline", "miniature", {}
    )
    return folder


def refused(capsys, argv, code=2):
    """What a command says on standard error, in one line."""
    try:
        got = main([str(a) for a in argv])
    except SystemExit as ended:
        got = ended.code
    out, err = capsys.readouterr()
    assert got == code, (got, err)
    # Progress rewrites its line.
    lines = [x for x in re.split(r"[\r\n]+", err) if x.strip() and not re.search(r"it/s|s/it", x)]
    assert len(lines) == 1, err
    assert lines[0].startswith("dpt: error: " if code == 2 else "dpt: failed: ")
    return lines[0]


# Reading the command line.


def test_help_answers_at_once_without_heavy_imports():
    start = time.perf_counter()
    code = "import sys; sys.argv[1:] = ['--help']\nimport dpt.__main__ as m\n"
    code += "try: m.main()\nexcept SystemExit: pass\n"
    code += "print([n for n in ('torch', 'numpy', 'diffusers', 'transformers') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    assert done.stdout.splitlines()[-1] == "[]"
    assert all(command in done.stdout for command in COMMANDS)
    assert seconds < 3  # about .2 on an idle machine


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_of_a_command_is_in_its_help(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    shown = capsys.readouterr().out
    for name, f in Options.__dataclass_fields__.items():
        there = re.search(rf"^  --{name}\b", shown, re.MULTILINE) is not None
        assert there == (command in f.metadata["commands"]), name


def test_flags_take_dashes_and_a_boolean_alone_is_true():
    command, options = parse(["tune", "--only-train-lora", "--batch-size=3", "--dry_run", "False"])
    assert (command, options.only_train_lora, options.batch_size, options.dry_run) == ("tune", True, 3, False)


def test_defaults_are_the_papers_and_the_miniature_has_its_own():
    for command in ("probe", "tune"):
        assert Options().stage(command) == STAGES[command]
        assert Options(model="miniature").stage(command).steps < STAGES[command].steps
    assert Options(steps=7).stage("probe").steps == 7


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["probe", "--bach_size", "3"], "--bach_size is no option of probe; the nearest is --batch_size"),
        (["probe", "--prompt", "x"], "--prompt is no option of probe"),
        (["prob"], "invalid choice: 'prob'"),
        (["tune", "--only_train_lora", "yes"], "'yes' was given; allowed is True"),
        (["probe", *MINI, "--steps", "0"], "--steps: 0 was given; allowed is 1 or more"),
        (["probe", *MINI, "--learning_rate", "nan"], "--learning_rate: nan was given; allowed is above 0"),
        (["probe", *MINI, "--losses", "itm,x"], "allowed is one or more of itm, rec, mse"),
        (["probe", *MINI, "--losses", "mse"], "allowed in probe is itm, rec or both"),
        (["probe", *MINI, "--probe", "up9"], "'up9' was given; allowed is one of bottom0, bottom1, bottom2"),
        (["probe", *MINI, "--probe", "mid_up0"], "whose maps differ in size (mid 4x4, up0 8x8)"),
        (["probe"], "--coco_root: nothing was given"),
        (["probe", "--model", "nowhere", "--data", "miniature"], "--model: 'nowhere' was given"),
        (["probe", *MINI, "--device", "gpu"], "allowed is auto, cpu, cuda or cuda:N"),
        (["generate", *MINI], "--prompt: nothing was given"),
        (["generate", *MINI, "--prompt", "a {token} bat"], "--token_path: nothing was given"),
        (["generate", *MINI, "--prompt", "x", "--token_path", "no.safetensors"], "there is no token at"),
        (["generate", *MINI, "--prompt", "x", "--correction_steps", "9:3"], "allowed is FIRST < STOP"),
        (["generate", *MINI, "--prompt", "x", "--correction_steps", "0:3"], "needs --correction_factor"),
        (["evaluate", *MINI, "--correction", "state"], "needs --correction_factor, which is 0 there"),
        (["evaluate", *MINI, "--correction_steps", "9:3"], "allowed is FIRST < STOP"),
        (
            ["evaluate", "--coco_root", "c", "--refcoco_root", "r", "--prompts", "2"],
            "--prompts: 2 was given; allowed for coco is 0",
        ),
        (["generate", *MINI, "--prompt", "x", "--correction_factor", "-1"], "allowed is 0 or more"),
        (["generate", *MINI, "--prompt", "x", "--best_of", "0"], "0 was given; allowed is 1 or more"),
        (["evaluate", *MINI, "--data", "coco", "--coco_root", "a", "--refcoco_root", "b", "--split", "test"],
         "allowed for coco is validation"),
    ],
)  # fmt: skip
def test_wrong_usage_is_one_line(argv, told, capsys, tmp_path):
    where = [] if argv[0] == "prob" else ["--output_path", tmp_path / "out"]
    assert told in refused(capsys, [*argv, *where])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["tune", "evaluate", "generate"])
def test_without_an_adapter_the_command_that_trains_one_is_told(command, capsys, tmp_path):
    prompt = ["--prompt", "a bat"] if command == "generate" else []
    told = refused(capsys, [command, *MINI, "--output_path", tmp_path / "out", *prompt])
    assert "train one with python -m dpt probe" in told
    assert list(tmp_path.iterdir()) == []


# Files that do not fit.


def change_record(folder, **changes):
    path = folder / RECORD
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_an_adapter_of_another_width_is_one_line(capsys, weights, tmp_path):
    change_record(weights, text_width=768, model="sd1.4")
    argv = ["evaluate", *MINI, "--weights", weights, "--output_path", tmp_path / "out"]
    assert "text_width 768, this model 128 at up0; it is of sd1.4" in refused(capsys, argv)
    assert not (tmp_path / "out").exists()


def test_a_lora_of_another_model_is_one_line(capsys, weights, tmp_path):
    save_file({"unet.mid_block.x.lora_A.weight": torch.zeros(4, 1280)}, weights / LORA)
    change_record(weights, training={"lora": LORA})
    argv = ["generate", *MINI, "--weights", weights, "--output_path", tmp_path / "out", "--prompt", "a bat"]
    assert "is of another model" in refused(capsys, argv)
    assert not (tmp_path / "out").exists()


def test_a_damaged_adapter_is_one_line(capsys, weights, tmp_path):
    (weights / ADAPTER).write_bytes((weights / ADAPTER).read_bytes()[:1000])
    argv = ["tune", *MINI, "--weights", weights, "--output_path", tmp_path / "out"]
    assert "is not a readable safetensors file" in refused(capsys, argv)
    assert not (tmp_path / "out").exists()


def test_a_token_of_another_width_is_one_line(capsys, weights, tmp_path):
    save_file({"newclas": torch.zeros(1, 768)}, tmp_path / "learned_embeds.safetensors")
    argv = ["generate", *MINI, "--weights", weights, "--output_path", tmp_path / "out"]
    argv += ["--prompt", "a photo of {token} bat", "--token_path", tmp_path / "learned_embeds.safetensors"]
    assert "is 768 wide; the text encoder of 'miniature' takes 128" in refused(capsys, argv)


def coco_argv(roots, *more):
    coco, refcoco = roots
    return ["probe", *MINI, "--data", "coco", "--coco_root", coco, "--refcoco_root", refcoco, *more]


def test_a_box_outside_its_image_and_empty_data_are_one_line(capsys, mined, tmp_path):  # noqa: F811
    out = ["--output_path", tmp_path / "out"]
    path = mined[1] / "finetune_refcoco_train.json"
    content = json.loads(path.read_text())
    content["annotations"][0]["bbox"] = [70, 0, 40, 20]
    path.write_text(json.dumps(content))
    assert "has the box [70, 0, 40, 20]" in refused(capsys, coco_argv(mined, *out))
    path.write_text(json.dumps({"images": [], "annotations": []}))
    assert "holds no expressions" in refused(capsys, coco_argv(mined, *out))
    assert not (tmp_path / "out").exists()


def test_a_loss_that_is_not_finite_is_one_line_and_leaves_nothing(capsys, tmp_path):
    small = ["--samples", 2, "--batch_size", 2, "--steps", 50, "--learning_rate", "1e30"]
    told = refused(capsys, ["probe", *MINI, *small, "--output_path", tmp_path / "out"], code=1)
    assert "the loss is not finite at update" in told and "--learning_rate" in told
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("argv", "factor"),
    [([], 0.5), (["--model", "miniature"], 0), (["--model", "miniature", "--correction_factor", "2"], 2)],
)
def test_pictures_of_the_miniature_are_corrected_only_where_asked(argv, factor):
    assert parse(["generate", "--prompt", "x", *argv])[1].factor == factor


def test_a_dry_run_prints_the_plan_and_writes_nothing(capsys, tmp_path):
    assert main(["probe", *MINI, "--probe", "all", "--dry_run", "--output_path", str(tmp_path / "out")]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["plan"]["probe"] == ["bottom0", "bottom1", "bottom2", "mid", "up0", "up1", "up2"]
    assert told["options"]["dry_run"] is True and "prompt" not in told["options"]
    assert list(tmp_path.iterdir()) == []


# Small runs.


def test_mining_writes_the_file_that_coco_reads(capsys, folders):  # noqa: F811
    coco, refcoco = folders
    assert main(["mine", *MINI, "--coco_root", str(coco), "--refcoco_root", str(refcoco)]) == 0
    assert "negatives of 8 captions" in capsys.readouterr().out
    written = json.loads((coco / "dpt_negatives.json").read_text())
    assert written["embedding"] == "miniature" and len(written["captions"]) == 8


def test_a_probe_learns_from_coco(capsys, mined, tmp_path):  # noqa: F811
    few = ["--steps", 2, "--batch_size", 2, "--output_path", tmp_path / "out"]
    assert main([str(a) for a in coco_argv(mined, *few)]) == 0
    assert (tmp_path / "out" / "probe" / ADAPTER).is_file()


@pytest.mark.slow
def test_every_command_runs_on_the_miniature(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("dpt.work.SAMPLES_TO_EVALUATE", 6)

    def run(*argv):
        assert main([str(a) for a in (*argv, *MINI, "--output_path", tmp_path)]) == 0
        return capsys.readouterr().out

    few = ("--steps", 2, "--batch_size", 2, "--samples", 4)
    run("probe", *few)
    assert "LoRA:" in run("tune", *few)
    assert set(load_file(tmp_path / "tune" / ADAPTER)) == set(load_file(tmp_path / "probe" / ADAPTER))
    one = ("--prompts", 1, "--num_inference_steps", 4, "--correction_factor", 0.5)
    out = run("evaluate", "--samples", 6, "--noises", 1, *one)
    assert "right picture" in out and all(arm in out for arm in ("plain", "LoRA", "corrected"))
    record = json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())
    assert set(record["pictures"]["gain"]) == {"LoRA", "corrected"}
    assert "Generated pictures" in (tmp_path / "evaluation" / "report.html").read_text()
    assert (tmp_path / "evaluation" / "pictures.png").is_file()
    two = ("--num_images", 2, "--num_inference_steps", 4)
    run("generate", "--prompt", "a photo of a bat", *two, "--compare", "--best_of", 2)
    listed = [path.name for path in (tmp_path / "images").glob("*.png")]
    assert len(listed) == 3
    assert len(list((tmp_path / "images" / "plain").glob("*.png"))) == 2
    told = json.loads((tmp_path / "images" / "prompt.json").read_text())
    assert all(f"{seed:04d}.png" in listed for seed in told["seeds"])
    for seed, fits in told["candidates"].items():
        assert seed == max(fits, key=fits.get) and len(fits) == 2
    save_file({"newclas": torch.randn(2, 128)}, tmp_path / "learned_embeds.safetensors")
    token = ("--token_path", tmp_path / "learned_embeds.safetensors", "--prompt", "a photo of {token} bat")
    one = ("--num_images", 1, "--num_inference_steps", 4)
    out = run("generate", *token, *one, "--correction", "state", "--correction_factor", 2)
    assert "a photo of newclas bat" in out
    table = run("probe", "--probe", "all", *few)
    assert all(block in table for block in ("bottom0", "mid", "up2"))
    assert (tmp_path / "blocks" / "blocks.png").is_file()
