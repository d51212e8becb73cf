"""The command line, on the bundled miniature: what a user does, and what a user gets wrong."""

import csv
import json
import shutil
from dataclasses import asdict, replace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from short_runs import small_validations

from apps.plan import Sources, is_sweep, make_plan, numbers_of
from apps.provenance import changed_settings, is_evaluated, is_learned
from config import RunConfig
from discriminative.records.files import write_json
from discriminative.records.layout import RunFolder
from discriminative.tokens.curriculum import Score
from discriminative.tokens.objective import Objective
from evaluate import templates_of
from run import main, options_of, parse

MINI = ["--model", "miniature"]
SHORT = [
    "--num_inference_steps",
    "4",
    "--training_sampler",
    "dpmsolver++@4",
    "--max_epochs",
    "2",
    "--validate_every",
    "1",
    "--test_size",
    "3",
]
QUICK = [*MINI, "--device", "cpu", *SHORT]


@pytest.fixture(autouse=True, scope="module")
def small():
    with small_validations():
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """One short run of class 2, learned and evaluated."""
    out = tmp_path_factory.mktemp("results")
    assert (
        main(
            [*QUICK, "--class_index", "2", "--train", "True", "--evaluate", "True", "--output_path", str(out)]
        )
        == 0
    )
    return out


def records(out):
    (folder,) = (out / "pipeline_token").glob("*/default")
    return folder


def test_a_run_leaves_token_configuration_log_and_evaluation(trained):
    folder = records(trained)
    assert folder.parent.name == "0002_bat_cricket_bat"
    assert {p.name for p in folder.iterdir()} == {
        "learned_embeds.safetensors",
        "config.json",
        "log.jsonl",
        "evaluation.json",
        "images.csv",
    }
    assert {k: v.shape for k, v in load_file(folder / "learned_embeds.safetensors").items()} == {
        "newclas": (1, 128)
    }
    config = json.loads((folder / "config.json").read_text())
    assert config["config"]["class_index"] == 2
    assert config["training"]["stopped_by"] in ("max_epochs", "validation_accuracy")
    assert config["training"]["learning_rate"] > 0
    assert config["environment"]["versions"]["torch"] == torch.__version__.partition("+")[0]


@pytest.mark.parametrize(
    ("gains", "notes"),
    [
        ([1.0, -1.1, 1.3, -1.0], ["log-probability +0.05 on 4 new noises, p=0.5"]),
        ([-1.0, -1.1, -1.2, -1.3], ["log-probability -1.15 on 4 new noises, p=1"]),
        ([1.0, 1.1, 1.2, 1.3], []),
    ],
    ids=["chance", "loss", "gain"],
)
def test_a_run_that_gained_nothing_says_so_in_one_line_and_keeps_the_word(
    tmp_path, monkeypatch, capsys, gains, notes
):
    """A token that does nothing would look like one that was learned; the next thing to try is named."""
    monkeypatch.setattr(Objective, "compare", lambda self, vector, other: gains)
    scores = map(Score, (0.1, 0.5, 0.4), ((-3.0,) * 2, (-1.0,) * 2, (-2.0,) * 2))
    monkeypatch.setattr(Objective, "validate", lambda self, beats: next(scores))
    asked = [*QUICK, "--class_index", "2", "--initializer_token", "an", "--output_path", str(tmp_path)]
    assert main([*asked, "--train", "True"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert [line for line in told if "nothing was gained" in line or line.startswith("note:")] == [
        f"note: nothing was gained over 'an', so it is kept ({found}); try a word nearer to the class "
        "(--start, --prompt_name), another --classifier, or several"
        for found in notes
    ]
    kept = "the word in its place" if notes else "the token after 1"
    assert any(f"kept {kept}, stopped by" in line for line in told)
    training = json.loads((records(tmp_path) / "config.json").read_text())["training"]
    assert training["kept_after_updates"] == 1 - len(notes)
    assert training["gain"]["log_probability"] == pytest.approx(sum(gains) / 4)


def test_a_gain_that_may_be_chance_is_kept_and_told(tmp_path, monkeypatch, capsys):
    """Most such tokens are better than the word; thrown away, they were lost to the user."""
    monkeypatch.setattr(Objective, "compare", lambda self, vector, other: [1.0, -0.3, 1.2, -0.1])
    scores = map(Score, (0.1, 0.5, 0.4), ((-3.0,) * 2, (-1.0,) * 2, (-2.0,) * 2))
    monkeypatch.setattr(Objective, "validate", lambda self, beats: next(scores))
    assert main([*QUICK, "--class_index", "2", "--output_path", str(tmp_path), "--train", "True"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert [line for line in told if line.startswith("note:")] == [
        "note: the gain may be chance (log-probability +0.45 on 4 new noises, p=0.2); try a word nearer to "
        "the class (--start, --prompt_name), another --classifier, or several"
    ]
    assert any("kept the token after 1, stopped by" in line for line in told)


def test_a_start_that_no_update_betters_is_kept_and_told(tmp_path, monkeypatch, capsys):
    """It may gain over the word in its place: it is not what is kept where nothing was gained."""
    monkeypatch.setattr(Objective, "compare", lambda self, vector, other: [1.0, 1.1, 1.2, 1.3])
    scores = map(Score, (0.5, 0.1, 0.4), ((-1.0,) * 2, (-3.0,) * 2, (-2.0,) * 2))
    monkeypatch.setattr(Objective, "validate", lambda self, beats: next(scores))
    assert main([*QUICK, "--class_index", "2", "--output_path", str(tmp_path), "--train", "True"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert any("kept the vector that it started from, stopped by" in line for line in told)
    assert not any(line.startswith("note:") for line in told)


def evaluation(out):
    return json.loads((records(out) / "evaluation.json").read_text())


def test_evaluation_holds_what_it_promises(trained):
    result = evaluation(trained)
    (first,) = result["prompts"]
    assert result["class_name"] == "bat, cricket bat"
    assert {name: arm["prompt"] for name, arm in first["arms"].items()} == {
        "token": "A photo of newclas bat",
        "baseline": "A photo of a bat",
    }
    assert result["seeds"] == [0, 1, 2]
    assert (result["judge"], result["features"]) == ("miniature-judge", "miniature-judge")
    for arm in first["arms"].values():
        for who in ("guide", "judge"):
            low, high = arm[who]["accuracy_interval"]
            assert 0 <= low <= arm[who]["accuracy"] <= high <= 1
            assert arm[who]["accuracy"] <= arm[who]["top5"]
            assert sum(share for _, share in arm[who]["predicted"]) == pytest.approx(
                1
            )  # three images have three labels at most
    assert result["settings"]["scheduler"] == "PNDMScheduler"
    assert (result["settings"]["height"], result["settings"]["num_inference_steps"]) == (64, 4)
    assert result["verdict"].startswith("bat, cricket bat: guide ")


def test_images_are_written_for_both_arms_and_pictures_can_be_read(trained):
    images = trained / "img" / "0002_bat_cricket_bat"
    names = sorted(p.name for p in (images / "eval").iterdir())
    assert [n.rsplit("_", 1)[0] for n in names] == [
        f"{arm}_{seed:04d}" for arm in ("baseline", "token") for seed in range(3)
    ]
    for name in ("grid.png", "evolution.png"):
        with Image.open(images / name) as picture:
            assert picture.width >= 1200
    strips = sorted(p.name for p in (images / "train").glob("validation_*.png"))
    assert strips == [f"validation_{epoch:03d}.png" for epoch in range(len(strips))]


def test_a_token_on_disk_can_be_evaluated_again_with_the_same_result(trained):
    before, measured = evaluation(trained), {"seconds": 0, "peak_memory_gb": 0, "environment": {}}
    assert main([*QUICK, "--class_index", "2", "--evaluate", "True", "--output_path", str(trained)]) == 0
    assert evaluation(trained) | measured == before | measured


def test_the_images_of_an_evaluation_are_those_of_the_stock_pipeline_bit_for_bit(trained):
    from diffusers import StableDiffusionPipeline

    from discriminative.diffusion.sampler import draw_noise
    from discriminative.hub import MINIATURE
    from discriminative.records.files import to_pil

    pipeline = StableDiffusionPipeline.from_pretrained(MINIATURE / "model")
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_textual_inversion(str(records(trained) / "learned_embeds.safetensors"))
    noise = draw_noise([0, 1, 2], (4, 16, 16))  # three at once, as the evaluation drew them
    theirs = pipeline(
        ["A photo of newclas bat"] * 3,
        num_inference_steps=4,
        guidance_scale=7.0,
        latents=noise,
        output_type="pt",
    ).images
    for seed, image in enumerate(theirs):
        (path,) = (trained / "img" / "0002_bat_cricket_bat" / "eval").glob(f"token_{seed:04d}_*.png")
        with Image.open(path) as picture:
            assert picture.tobytes() == to_pil(image).tobytes()


def test_a_second_evaluation_replaces_the_first_and_its_row_of_the_summary_and_says_so(trained, capsys):
    argv = [
        *QUICK,
        "--class_index",
        "2",
        "--evaluate",
        "True",
        "--output_path",
        str(trained),
        "--test_size",
        "2",
    ]
    assert main(argv) == 0
    rows = list(csv.DictReader((trained / "summary.csv").open()))
    assert [(r["class_index"], r["exp_id"], r["test_size"]) for r in rows] == [("2", "default", "2")]
    assert main([*argv[:-1], "3"]) == 0
    (row,) = csv.DictReader((trained / "summary.csv").open())
    assert row["test_size"] == "3"
    assert float(row["guide_with"]) == evaluation(trained)["prompts"][0]["arms"]["token"]["guide"]["accuracy"]
    assert int(row["updates"]) <= 2
    assert (
        f"note: replaces the evaluation that is there, {records(trained) / 'evaluation.json'}"
        in capsys.readouterr().out
    )


def test_where_a_token_is_missing_the_experiments_that_have_one_are_told(trained, capsys):
    argv = [
        *QUICK,
        "--class_index",
        "2",
        "--evaluate",
        "True",
        "--output_path",
        str(trained),
        "--preset",
        "paper",
    ]
    assert main(argv) == 2
    told = capsys.readouterr().err
    assert (
        "this command's model (miniature), classifier (miniature), --preset and --exp_id; there is " in told
    )
    assert "of --exp_id default --model miniature" in told


def test_further_prompts_and_reference_images_are_evaluated(trained, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("# unseen\na painting of a {token} {class}\n\na bat\n")
    reference = trained / "img" / "0002_bat_cricket_bat" / "eval"
    more = ["--eval_prompts", str(prompts), "--reference_images", str(reference), "--exp_id", "more"]
    argv = [*QUICK, "--class_index", "2", "--evaluate", "True", "--output_path", str(tmp_path), *more]
    assert main([*argv, "--token_path", str(records(trained) / "learned_embeds.safetensors")]) == 0
    assert "'a bat' does not hold {token}, so the token is not used in it" in capsys.readouterr().out
    (path,) = tmp_path.rglob("evaluation.json")
    first, painting, without = json.loads(path.read_text())["prompts"]
    assert painting["arms"]["baseline"]["prompt"] == "a painting of a bat"
    assert first["arms"]["token"]["frechet_distance"] > 0
    assert without["arms"]["token"]["guide"] == without["arms"]["baseline"]["guide"]
    verdicts = {"difference": 0, "only_with": 0, "only_without": 0, "p_value": 1}
    assert without["paired"]["guide"] == verdicts | {
        "log_probability_difference": 0,
        "log_probability_p_value": 1,
    }
    assert len(list(tmp_path.glob("img/*/more/eval/prompt_02/*.png"))) == 7


def test_a_prompt_is_drawn_with_the_token(trained, capsys):
    prompt = "a painting of a {token} {class} on a blue background"
    assert (
        main(
            [
                *QUICK,
                "--class_index",
                "2",
                "--prompt",
                prompt,
                "--num_images",
                "2",
                "--output_path",
                str(trained),
            ]
        )
        == 0
    )
    (folder,) = (trained / "img" / "0002_bat_cricket_bat" / "prompt").iterdir()
    assert {p.name for p in folder.iterdir()} == {"0035.png", "0036.png", "grid.png", "prompt.json"}
    assert "a painting of a newclas bat on a blue background" in capsys.readouterr().out


def test_dry_run_prints_the_plan_and_writes_nothing(tmp_path, capsys):
    assert (
        main(
            [
                *MINI,
                "--class_index",
                "2",
                "--train",
                "True",
                "--dry_run",
                "True",
                "--output_path",
                str(tmp_path / "r"),
            ]
        )
        == 0
    )
    shown = json.loads(capsys.readouterr().out)
    assert shown["config"]["training_sampler"] == "dpmsolver++@12"
    assert shown["config"]["memory"] != "auto"
    assert shown["config"]["eval_batch_size"] >= 1
    assert shown["plan"]["classifier"] == "miniature"
    assert shown["plan"]["prompts"][0] == "A photo of newclas bat"
    assert not (tmp_path / "r").exists()


def test_a_dry_run_tells_the_memory_of_a_card_that_is_not_here(capsys):
    """5.364 GB counted, and 1.2 GB of CUDA's own; the UNet's and decoder's share grows with the image."""
    told = []
    for size in ((), ("--height", "768", "--width", "768")):
        assert (
            main(
                [
                    "--class_index",
                    "283",
                    "--train",
                    "True",
                    "--dry_run",
                    "True",
                    "--memory",
                    "8gb",
                    "--device",
                    "cpu",
                    *size,
                ]
            )
            == 0
        )
        told.append(json.loads(capsys.readouterr().out)["plan"]["memory"])
    here = "about 10.2 GB here for an update of five images"
    assert (
        told[0]
        == f"{here}, on a GPU in half precision 6.6 GB (1.2 of them CUDA's own, a guess), with --memory 8gb"
    )
    assert "on a GPU in half precision 9.5 GB" in told[1]


@pytest.mark.parametrize(
    ("asked", "sweep", "numbers"),
    [
        ("3,5-7,6", True, [3, 5, 6, 7]),
        ("2-4", True, [2, 3, 4]),
        (7, False, None),
        ("bat, cricket bat", False, None),
        ("all", True, None),
    ],
)
def test_several_classes_are_asked_for_by_their_numbers(asked, sweep, numbers):
    assert is_sweep(RunConfig(class_index=asked)) == sweep
    assert numbers is None or numbers_of(asked, 44) == numbers


def test_a_dry_run_of_several_classes_has_a_plan_for_each(capsys):
    assert main([*MINI, "--class_index", "2,4-5", "--train", "True", "--dry_run", "True"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [plan["class_index"] for plan in told["plan"]] == [2, 4, 5]
    assert told["config"]["class_index"] == "2,4-5"


def test_a_dry_run_keeps_the_prompts_to_generate_apart_and_notes_those_without_the_token(capsys):
    argv = [*MINI, "--class_index", "2", "--train", "--prompt", "a bat at night", "--dry_run"]
    assert main(argv) == 0
    plan = json.loads(capsys.readouterr().out)["plan"]
    assert plan["prompts_to_generate"] == ["a bat at night"]
    assert "a bat at night" not in plan["prompts"]
    assert plan["notes"] == ["'a bat at night' does not hold {token}, so the token is not used in it"]


@pytest.mark.parametrize("mode", ["last", "random"])
def test_more_gradient_steps_than_the_trajectory_has_are_refused_where_they_are_its_last(capsys, mode):
    argv = [*MINI, "--class_index", "2", "--train", "--dry_run", "--gradient_mode"]
    assert main([*argv, f"{mode}:12"]) == 0
    assert main([*argv, f"{mode}:13"]) == 2
    told = capsys.readouterr().err
    assert f"--gradient_mode: '{mode}:13' was given; allowed is 1 to 12 steps" in told


def test_of_lv_they_are_noises_which_may_be_more():
    argv = [*MINI, "--class_index", "2", "--train", "--dry_run", "--gradient_mode"]
    assert main([*argv, "lv:16"]) == 0


@pytest.mark.parametrize("mode", ["jump", "skip"])
def test_modes_with_places_take_no_number_of_steps(capsys, mode):
    argv = [*MINI, "--class_index", "2", "--train", "--dry_run", "--gradient_mode"]
    assert main([*argv, mode]) == 0
    assert main([*argv, f"{mode}:16"]) == 2
    assert f"--gradient_mode: '{mode}:16' was given; allowed is jump, skip, last" in capsys.readouterr().err


def test_a_dry_run_refuses_what_the_run_would(capsys):
    assert main([*MINI, "--class_index", "2", "--train", "True", "--dry_run", "True", "--height", "60"]) == 2
    assert "--height: 60 was given" in capsys.readouterr().err


def test_a_token_of_another_model_is_neither_overwritten_nor_evaluated(trained, tmp_path, capsys):
    from discriminative.hub import MINIATURE

    shutil.copytree(MINIATURE / "model", tmp_path / "model")
    other = [
        "--model",
        str(tmp_path / "model"),
        "--classifier",
        "miniature",
        "--class_index",
        "2",
        "--output_path",
        str(trained),
    ]
    before = (records(trained) / "learned_embeds.safetensors").read_bytes()
    for todo in ("--train", "--evaluate"):
        assert main([*other, *SHORT, todo, "True"]) == 2
        assert "was learned with 'miniature'; give that, or another --exp_id" in capsys.readouterr().err
    assert (records(trained) / "learned_embeds.safetensors").read_bytes() == before


def test_settings_other_than_the_tokens_own_are_told(trained, capsys):
    argv = [
        *QUICK,
        "--class_index",
        "2",
        "--prompt",
        "{token} {class}",
        "--num_images",
        "1",
        "--output_path",
        str(trained),
    ]
    assert main([*argv, "--guidance_scale", "5"]) == 0
    assert "not as the token was learned: guidance_scale 7.0 -> 5.0" in capsys.readouterr().out


# Options that a token is drawn with, and another value of each.
DRAWN_WITH = {
    "initializer_token": "pet",
    "prompt_name": "kitty",
    "num_inference_steps": 50,
    "guidance_scale": 5.0,
    "scheduler": "ddim",
    "height": 256,
    "width": 256,
}


@pytest.mark.parametrize("name", DRAWN_WITH)
def test_every_setting_that_a_token_is_drawn_with_is_told_where_it_is_another(name, folder):
    then = RunConfig()
    write_json(folder.config, {"version": "0.3.0", "config": asdict(then), "constants": {}})
    now = replace(then, **{name: DRAWN_WITH[name]})
    assert changed_settings(then, folder) == []
    assert changed_settings(now, folder) == [f"{name} {getattr(then, name)} -> {DRAWN_WITH[name]}"]
    assert changed_settings(replace(now, train=True), folder) == []  # it is learned anew


def test_another_setting_of_the_training_is_not_told_where_a_token_is_drawn(folder):
    then = RunConfig()
    write_json(folder.config, {"version": "0.3.0", "config": asdict(then), "constants": {}})
    assert changed_settings(replace(then, training_sampler="ddim@5", seed=1, test_size=3), folder) == []


def test_an_inpainting_model_is_refused_before_it_is_loaded(tmp_path, capsys):
    from discriminative.hub import MINIATURE

    shutil.copytree(MINIATURE / "model", tmp_path / "model")
    config = tmp_path / "model" / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"in_channels": 9}))
    model = ["--model", str(tmp_path / "model"), "--classifier", "miniature"]
    assert main([*model, "--class_index", "2", "--train", "True", "--output_path", str(tmp_path / "r")]) == 2
    assert "takes 9 channels and gives 4" in capsys.readouterr().err


def test_a_token_learned_anew_loses_the_figures_of_the_one_before(tmp_path):
    argv = [
        *QUICK,
        "--class_index",
        "2",
        "--train",
        "True",
        "--max_epochs",
        "1",
        "--test_size",
        "1",
        "--output_path",
        str(tmp_path),
    ]
    assert main([*argv, "--evaluate", "True", "--export", "a1111"]) == 0
    images = tmp_path / "img" / "0002_bat_cricket_bat"
    assert (images / "grid.png").exists()
    assert (records(tmp_path) / "a1111" / "newclas.safetensors").exists()
    assert main([*argv, "--seed", "36"]) == 0
    assert not (records(tmp_path) / "a1111").exists()
    assert list(csv.DictReader((tmp_path / "summary.csv").open())) == []
    assert not any(
        path.exists()
        for path in (images / "grid.png", images / "eval", records(tmp_path) / "evaluation.json")
    )


def test_a_sweep_of_one_class_leaves_out_what_is_there(trained, capsys):
    argv = [*QUICK, "--class_index", "all", "--evaluate", "True", "--output_path", str(trained)]
    assert main(argv) == 0
    capsys.readouterr()
    assert main(argv) == 0
    said = capsys.readouterr().out
    assert "skipped      1   2   (finished before)" in said
    assert "model" not in said  # none was loaded


def test_an_evaluation_passes_for_that_of_its_own_token_and_options_alone(trained, tmp_path):
    """Whatever the files' times say: copies from elsewhere keep theirs."""
    shutil.copytree(trained, tmp_path / "r")
    argv = [*QUICK, "--class_index", "2", "--evaluate", "True", "--output_path", str(tmp_path / "r")]
    assert main(argv) == 0
    config = options_of(parse(argv)[0])
    plan = make_plan(config, Sources(config))
    templates = templates_of(plan.config)
    assert is_evaluated(plan.config, plan.folder, plan.vectors, templates)
    assert not is_evaluated(replace(plan.config, num_inference_steps=5), plan.folder, plan.vectors, templates)
    assert not is_evaluated(plan.config, plan.folder, plan.vectors + 1e-6, templates)
    assert not is_evaluated(plan.config, plan.folder, plan.vectors, [*templates, "a {token} {class}"])
    plan.folder.grid.unlink()
    assert not is_evaluated(plan.config, plan.folder, plan.vectors, templates)


@pytest.mark.parametrize("broken", ["file", "program"])
def test_one_class_that_breaks_keeps_no_other_from_being_done(trained, tmp_path, monkeypatch, capsys, broken):
    import evaluate

    shutil.copytree(trained, tmp_path / "r")
    for name in ("0001_bat_fruit_bat", "0003_mouse_field_mouse"):
        folder = RunFolder(str(tmp_path / "r"), name, "default")
        folder.records.mkdir(parents=True)
        save_file(load_file(records(trained) / "learned_embeds.safetensors"), folder.token)
    if broken == "file":
        folder = RunFolder(str(tmp_path / "r"), "0001_bat_fruit_bat", "default")
        for path in (folder.grid, folder.result, folder.eval_images / "x.png"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("{")
    else:
        whole = evaluate.write_json
        monkeypatch.setattr(
            "evaluate.write_json",
            lambda path, content: 1 / 0 if "fruit" in str(path) else whole(path, content),
        )
    argv = [*QUICK, "--class_index", "all", "--evaluate", "True", "--output_path", str(tmp_path / "r")]
    assert main(argv) == 1
    said = capsys.readouterr()
    assert "run.py: failed: class 1 (bat, fruit bat): " in said.err
    assert ("ZeroDivisionError" in said.err) == (broken == "program")
    assert "mouse, field mouse: guide" in said.out


def test_a_full_disk_is_one_line(tmp_path, monkeypatch, capsys):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("discriminative.records.files.save_file", full)
    assert main([*QUICK, "--class_index", "2", "--train", "True", "--output_path", str(tmp_path)]) == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith(f"run.py: failed: {tmp_path}/")
    assert said.endswith(".safetensors: cannot be written (No space left on device)")


def test_more_steps_for_the_evaluation_are_no_reason_to_learn_again(trained):
    config = json.loads((records(trained) / "config.json").read_text())["config"]
    folder = RunFolder(str(trained), "0002_bat_cricket_bat", "default")
    assert is_learned(RunConfig(**config | {"num_inference_steps": 50}), folder)
    assert not is_learned(RunConfig(**config | {"training_sampler": "same"}), folder)
    assert not is_learned(RunConfig(**config | {"guidance_scale": 5.0}), folder)


def test_running_out_of_memory_is_one_line_that_names_the_flags(monkeypatch, tmp_path, capsys):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("apps.session.train", full)
    assert main([*QUICK, "--class_index", "2", "--train", "True", "--output_path", str(tmp_path)]) == 1
    assert "try --memory 8gb, or a smaller --height and --width" in capsys.readouterr().err
    monkeypatch.setattr("apps.session.load_models", full)  # already while models are loaded
    assert main([*QUICK, "--class_index", "2", "--train", "True", "--output_path", str(tmp_path)]) == 1
    assert "try --memory 8gb, or a smaller --height and --width" in capsys.readouterr().err


def test_all_classes_are_gone_through_and_a_run_that_broke_off_goes_on(tmp_path, capsys, monkeypatch):
    """Models are loaded once; what is learned is not learned again; one class that fails stops no other."""
    from apps import session
    from discriminative.errors import WorkError

    loaded = []
    learned = []
    load = session.load_models
    train = session.train
    monkeypatch.setattr("apps.session.load_models", lambda *args: loaded.append(args) or load(*args))
    monkeypatch.setattr(
        "apps.plan.read_labels",
        lambda name, *a, **k: ["bat, fruit bat", "bat, cricket bat", "mouse, field mouse"],
    )

    def first_fails(settings, token, guides, *rest):
        learned.append(guides[0].target + 1)
        if learned == [1]:
            raise WorkError("loss nan")
        return train(settings, token, guides, *rest)

    monkeypatch.setattr("apps.session.train", first_fails)
    monkeypatch.setattr(
        "discriminative.guides.classifier.Classifier.look",
        lambda self, images: (torch.eye(44)[[1] * len(images)], torch.rand(len(images), 4)),
    )
    argv = [
        *QUICK,
        "--class_index",
        "all",
        "--train",
        "True",
        "--evaluate",
        "True",
        "--report",
        "True",
        "--output_path",
        str(tmp_path),
    ]
    assert main(argv) == 1
    assert "run.py: failed: class 1 (bat, fruit bat): loss nan" in capsys.readouterr().err
    assert main(argv) == 0
    assert learned == [1, 2, 3, 1]
    out = capsys.readouterr().out
    assert [
        f"{name}: guide" in out for name in ("bat, fruit bat", "bat, cricket bat", "mouse, field mouse")
    ] == [True, False, False]
    assert len(loaded) == 2
    assert [r["class_index"] for r in csv.DictReader((tmp_path / "summary.csv").open())] == ["1", "2", "3"]
    assert (tmp_path / "report.html").exists()
    page = (tmp_path / "report.html").read_text()
    assert all(name in page for name in ("bat, fruit bat", "bat, cricket bat", "mouse, field mouse"))


def test_trainings_are_told_to_tensorboard(trained, tmp_path):
    argv = [*QUICK, "--class_index", "2", "--train", "True", "--output_path", str(tmp_path)]
    assert main([*argv, "--report_to", "tensorboard"]) == 0
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(next((tmp_path / "tracking").glob("*/default"))))
    events.Reload()
    log = [json.loads(line) for line in (records(tmp_path) / "log.jsonl").read_text().splitlines()]
    assert [e.value for e in events.Scalars("loss")] == pytest.approx([row["loss"] for row in log])
    assert events.Tags()["images"] == ["images"]
