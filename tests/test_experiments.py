"""The experiments' own arithmetic; that they run is seen by running them."""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import pytest
import torch

from apps.earlier import BEFORE_IT_WAS_THERE
from apps.plan import Sources, make_plan
from config import RunConfig
from discriminative.errors import WorkError
from discriminative.records.files import write_json, write_tensors
from discriminative.records.summary import COLUMNS
from experiments import arbiter, measure, samplers, tables
from experiments.classes import AMBIGUOUS, plan
from experiments.measure import background
from experiments.method import SETTINGS, TUNING_CLASSES, TUNING_SEEDS, finished, print_comparison
from experiments.paired import difference, interval, interval_of_few, pairs, ratio
from experiments.rows import add, read
from miniature.scenes import HUES, render

ROWS = Path(tables.__file__).parent / "speed" / "results" / "convergence.jsonl"  # of version 0.2.0


def found(class_index, guide, judge=None, seed=35, images=100):
    """A row as ``classes.py`` makes it."""
    measured = {
        "guide": guide,
        "judge": guide if judge is None else judge,
        "images": images,
        "diversity": 0.3,
    }
    token = measured | {"on_background": 0.9, "other_templates": 0.8, "token_norm": 1.5}
    without = {"guide": 20, "judge": 20, "images": 100, "diversity": 0.2, "on_background": 1.0}
    without["phrase"] = {"guide": 90, "judge": 90, "images": 100, "diversity": 0.4}
    training = {"updates": 40, "images": 300, "seconds": 50.0}
    named = {
        "class_index": class_index,
        "name": f"n{class_index}",
        "word": "w",
        "kind": "rare" if class_index % 2 == 0 else "common",
    }
    return named | {"fine": False, "seed": seed, "token": token, "without": without, "training": training}


def test_a_class_passes_where_guide_and_judge_do_on_every_seed():
    assert tables.passes(found(2, 90, 85))
    assert not tables.passes(found(2, 90, 84))
    assert not tables.passes(found(2, 89, 100))
    rows = [found(2, 95), found(2, 80, seed=36), found(4, 95), found(3, 10)]
    lines = tables.summary(rows).splitlines()
    assert lines[2].endswith("| 1 of 3 | 1 of 2 | 0 of 1 |")
    assert lines[3].endswith("| 2 of 3 | 2 of 2 | 0 of 1 |")
    assert "| 0.70 / 0.70 | 0.90 / 0.90 | 0.10 / 0.10 |" in tables.summary(rows)


def test_the_table_has_an_interval_and_the_worst_seed():
    cells = tables.cells([found(2, 95), found(2, 85, seed=36)])
    assert len(cells) == len(tables.HEAD)
    assert cells[5] == "0.90 (0.85–0.93, worst 0.85)"  # Wilson's interval of 180 in 200
    assert tables.cells([found(2, 0)])[5] == "0.00 (0.00–0.04)"


def test_diversity_is_told_where_enough_images_are_right():
    assert tables.diversity(found(2, 50)) == pytest.approx(0.75)
    assert tables.diversity(found(2, 9)) is None
    assert tables.cells([found(2, 9)])[-1] == "–"


def test_a_summary_is_told_with_its_gaps():
    full = dict.fromkeys(COLUMNS, "0.9") | {
        "class_index": "3",
        "class_name": "mouse, field mouse",
        "updates": "30",
        "training_seconds": "31.8",
    }
    unjudged = (
        full
        | {key: "" for key in COLUMNS if key.startswith("judge") or key == "p_value"}
        | {"guide_with": "1.0", "updates": "10"}
    )
    lines = tables.summary_table([full, unjudged]).splitlines()
    same = "0.90 → 0.90 (0.90–0.90)"
    assert lines[2] == f"| 3 | mouse, field mouse | {same} | {same} | 9e-01 | 0.90 | 30 | 32 |"
    assert "0.90 → 1.00 (0.90–0.90) | – | – | 0.90 | 10 |" in lines[3]
    assert lines[4:] == [
        "| | 1 of 2 pass; means | 0.90 → 0.95 | 0.90 → 0.90 |  |  | 20 | 32 |",
        "| | medians | 0.90 → 0.95 | 0.90 → 0.90 |  |  | 20 | 32 |",
        "",
        "largest gap guide minus judge: 0.00",
    ]


def test_the_worst_class_is_told_beside_the_mean():
    rows = [found(2, 90), found(2, 90, seed=36), found(4, 90)]
    rows[1]["token"] |= {
        "on_background": rows[1]["without"]["on_background"] - 0.4,
        "diversity": 0.25 * rows[1]["token"]["diversity"],
    }
    rows[0]["token"]["on_background"] = rows[2]["token"]["on_background"] = rows[0]["without"][
        "on_background"
    ]
    told = dict(
        line[2:].split(" | ", 1) for line in tables.summary(rows).splitlines() if line.startswith("| ...")
    )
    assert told["... largest loss of a class"].startswith("0.20 |")
    least = 0.75 * (1 + 0.25) / 2
    assert told["... least of a class"].startswith(f"{least:.2f} |")


def test_backgrounds_are_read_off_renders():
    scenes = [render("test", i) for i in range(300)]
    read = [background(np.asarray(s.image)) for s in scenes]
    assert (
        np.mean(
            [
                r == ("gray" if s.background == "white" else s.background)
                for r, s in zip(read, scenes, strict=True)
            ]
        )
        > 0.97
    )
    assert set(HUES) < set(read)


def test_every_class_and_seed_has_a_folder_of_its_own():
    runs = [plan(c, seed, "r", []) for seed in (35, 36) for c in AMBIGUOUS]
    assert len({r.folder.records for r in runs}) == 64
    assert [c.kind for c in AMBIGUOUS] == ["rare"] * 16 + ["common"] * 16
    paper = plan(AMBIGUOUS[0], 36, "r", ["--preset", "paper"])
    assert (paper.config.choose_by, paper.config.seed, paper.config.exp_id) == ("loss", 36, "paper_seed36")
    assert not paper.is_done


def test_settings_name_options_or_constants_and_tuning_has_seeds_of_its_own():
    constants = RunConfig().learning().constants
    known = {f.name for f in fields(RunConfig)} | set(constants)
    assert {name for differs in SETTINGS.values() for name in differs} <= known
    assert "fine_rate" in constants
    assert min(TUNING_SEEDS) > 500_000 + 10_000
    assert max(TUNING_SEEDS) < 1_000_000
    assert set(TUNING_CLASSES) < {c.index + 1 for c in AMBIGUOUS}


def recorded(run) -> dict:
    """The options of a run as its record has them: with the memory's settings filled in."""
    return asdict(make_plan(run.config, Sources(run.config)).config)


def test_a_learned_token_is_known_by_its_options_whatever_the_path_to_it(tmp_path, monkeypatch):
    run = plan(AMBIGUOUS[0], 35, str(tmp_path), [])
    write_tensors(run.folder.token, {"newclas": torch.ones(1, 4)}, {})
    constants = run.config.learning().constants
    # The token is older than this option, which was as its default then.
    options = {name: value for name, value in recorded(run).items() if name != "augment"}
    record = {"version": "0.3.0", "config": options, "constants": constants}
    write_json(run.folder.config, record)
    monkeypatch.chdir(tmp_path)
    assert plan(AMBIGUOUS[0], 35, ".", []).is_learned
    assert plan(AMBIGUOUS[0], 35, ".", ["--memory", "8gb"]).is_learned
    own_sampler = [
        "--scheduler",
        "ddim",
        "--num_inference_steps",
        "20",
    ]  # of the evaluation; training has its own
    assert plan(AMBIGUOUS[0], 35, ".", own_sampler).is_learned
    assert not plan(AMBIGUOUS[0], 35, ".", ["--noise_pool", "4"]).is_learned
    assert not plan(AMBIGUOUS[0], 35, ".", ["--learning_rate", "0.1"]).is_learned
    assert not plan(AMBIGUOUS[0], 36, ".", []).is_learned
    write_json(run.folder.config, record | {"constants": constants | {"relative_rate": 0.1}})
    assert not plan(AMBIGUOUS[0], 35, ".", []).is_learned


def test_a_token_that_is_older_than_a_constant_had_it_off(tmp_path):
    """Their defaults are not what was done before there was such a constant."""
    run = plan(AMBIGUOUS[0], 35, str(tmp_path), [])
    write_tensors(run.folder.token, {"newclas": torch.ones(1, 4)}, {})
    rows = [json.loads(line) for line in ROWS.read_text().splitlines()]
    then = next(row for row in rows if row["way"] == "ours")["options"]
    then |= {"seed": 35, "classifier": "miniature", "judge": "miniature-judge"}
    then |= {"class_index": run.config.class_index, "eval_batch_size": None}
    write_json(run.folder.config, {"config": then})
    assert plan(AMBIGUOUS[0], 35, str(tmp_path), []).is_learned
    for option in BEFORE_IT_WAS_THERE:
        write_json(run.folder.config, {"config": {k: v for k, v in then.items() if k != option}})
        assert not plan(AMBIGUOUS[0], 35, str(tmp_path), []).is_learned


def test_only_tokens_of_the_same_class_and_seed_are_compared():
    rows, others = (
        [found(2, 90), found(4, 80), found(2, 70, seed=36)],
        [found(2, 80), found(2, 90, seed=37), found(6, 10)],
    )
    assert pairs(rows, others) == [(rows[0], others[0])]
    assert "| tokens that pass, of 1 | 1 | 0 |" in tables.comparison(rows, others)
    assert "| +0.100 |" in tables.comparison(rows, others)  # one token tells nothing of others
    assert tables.comparison(rows[1:2], others) == "no class and seed in common"


def test_a_class_is_worse_where_other_images_would_hardly_show_it():
    """By all images of its tokens: what one seed does not show two may."""
    rows = [found(2, 90), found(2, 90, seed=36), found(4, 90), found(6, 99)]
    others = [found(2, 96), found(2, 96, seed=36), found(4, 96), found(6, 90)]
    listed, _, better, _, worse = tables.comparison(rows, others).splitlines()[-5:]
    assert listed.startswith("other updates or verdicts (4 tokens): n2 35 (40 updates, 0.90 / 0.90; ")
    assert better.endswith(": n6 (0.99 (0.95–1.00); 0.90 (0.83–0.94))")
    assert worse.endswith(": n2 (0.90 (0.85–0.93, worst 0.90); 0.96 (0.92–0.98, worst 0.96))")
    assert tables.comparison(rows[2:3], others).splitlines()[-1].endswith(": none")


def test_a_row_that_was_cut_off_is_left_out_and_the_next_takes_its_place(tmp_path):
    out = tmp_path / "of" / "rows.jsonl"
    assert read(out) == []
    add(out, {"a": 1})
    with out.open("a") as file:
        file.write('{"b": ')
    assert read(out) == [{"a": 1}]
    add(out, {"c": "é"})
    assert read(out) == [{"a": 1}, {"c": "é"}]
    out.write_text('{"a": 1}\nb\n')
    with pytest.raises(WorkError, match="line 2: is no JSON; allowed is a row on each line"):
        read(out)


def test_the_interval_of_few_is_students_and_wider_than_a_bootstraps():
    values = [0.1, 0.2, 0.2, 0.4, 0.6]
    low, high = interval_of_few(values)
    deviation = (sum((v - 0.3) ** 2 for v in values) / 4) ** 0.5
    assert (high - low) / 2 == pytest.approx(2.776 * deviation / 5**0.5, rel=1e-3)
    assert (low + high) / 2 == pytest.approx(0.3)
    below, above = interval(values)
    assert low < below < above < high
    assert interval_of_few([0.5, 0.5]) is None
    assert interval_of_few([0.5]) is None


def test_an_interval_is_of_the_paired_differences():
    """Tokens that differ much from each other, but each by about .05 from its twin."""
    rows = [{"class_index": c, "seed": 35, "x": 0.1 * c + 0.05 + 0.001 * (c % 3)} for c in range(9)]
    both = pairs(rows, [{"class_index": c, "seed": 35, "x": 0.1 * c} for c in range(9)])
    assert difference(both, lambda r: r["x"]) == "+0.051 [+0.050, +0.052]"
    doubled = [({"x": 2.0 * x}, {"x": x}) for x in (1.0, 5.0, 0.3)]
    assert ratio([*doubled, ({"x": 0}, {"x": 3.0}), ({"x": None}, {"x": 3.0})], lambda r: r["x"]) == "2.00"
    assert ratio([({"x": 0}, {"x": 0})], lambda r: r["x"]) == "–"


def test_settings_are_compared_with_the_default_on_what_both_have(capsys):
    row = {"class_index": 2, "guide": 0.9, "judge": 0.8, "diversity": 0.1, "updates": 10, "seconds": 20.0}
    rows = [row | {"setting": "default", "seed": seed} for seed in (35, 36)]
    rows.append(row | {"setting": "augment", "seed": 36, "guide": 1.0, "seconds": 30.0})
    print_comparison([*rows, row | {"setting": "last", "seed": 37}], "default")
    told = capsys.readouterr().out
    assert "| augment | 1 | +0.100 |" in told
    assert told.rstrip().endswith("| 1.50 |")


def test_where_a_job_fails_those_that_have_not_begun_are_dropped():
    begun = []

    def work(number):
        begun.append(number)
        time.sleep(0.05)  # the next may begin before the failure is seen
        return {"row": 1 // number}

    assert list(finished(ThreadPoolExecutor(1), work, [(1,)])) == [{"row": 1}]
    with pytest.raises(ZeroDivisionError):
        list(finished(ThreadPoolExecutor(1), work, [(0,), *[(1,)] * 50]))
    assert len(begun) < 10


@pytest.mark.parametrize(("program", "before"), [(arbiter, []), (measure, ["2"]), (samplers, [])])
def test_a_token_file_that_is_not_there_is_told_in_one_line(monkeypatch, capsys, program, before):
    monkeypatch.setattr("sys.argv", ["program", *before, "no/such.safetensors"])
    with pytest.raises(SystemExit) as error:
        program.main()
    assert error.value.code == 2
    assert "'no/such.safetensors' was given; allowed is a file that is there" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "allowed"),
    [
        (None, "is a file that is there"),
        ("", "are rows that classes.py wrote"),
        ("# a page", "are rows that classes.py wrote"),
        ('{"method": "LoRA"}', "are rows that classes.py wrote"),
    ],
)
@pytest.mark.parametrize("before", [[], ["--against"]])
def test_a_file_without_rows_is_told_in_one_line(tmp_path, monkeypatch, capsys, content, allowed, before):
    path = tmp_path / "rows.jsonl"
    if content is not None:
        path.write_text(content)
    monkeypatch.setattr("sys.argv", ["tables", *before, str(path)])
    with pytest.raises(SystemExit) as error:
        tables.main()
    assert error.value.code == 2
    assert f"rows.jsonl' was given; allowed {allowed}" in capsys.readouterr().err
