"""The planted dose: guides that differ in a rate alone, a detector, and tables that come from the rows."""

import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from discriminative.records.files import GAP, grid, to_pil, write_image
from experiments import sheets
from experiments.claims import augmentation, insight, insight_table
from experiments.claims import insight_world as world
from experiments.claims.insight_world import PHRASES, REPORTED, TUNING, Cue, attributes_of, planted
from miniature.scenes import CLASSES, TINTABLE


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Few scenes, none through the VAE, kept elsewhere."""
    monkeypatch.setattr(world, "WORK", tmp_path)
    monkeypatch.setattr(world, "SCENES_A_CLASS", 10)
    monkeypatch.setattr(world, "half_through_vae", lambda images, vae: images)


# Scenes.


@pytest.mark.parametrize("cue", [*REPORTED, *TUNING], ids=lambda cue: cue.name)
def test_a_planted_scene_has_the_cue_and_its_class(cue):
    rng = world.stream(99)
    for _ in range(20):
        plan = planted(world.plan_scene(cue.target, rng), cue, rng)
        assert attributes_of(plan)[PHRASES.index(cue.phrase)]
        assert plan.placements[0].class_index == cue.target
    assert cue.kind != "tint" or cue.class_name in TINTABLE


def test_guides_of_one_seed_differ_in_the_rate_alone(small):
    cue = REPORTED[0]
    clean = world.scenes_at(cue, 0.0, 1)
    places = {}
    for rate in insight.RATES:
        differs = (world.scenes_at(cue, rate, 1) != clean).any((1, 2, 3))  # (N,)
        places[rate] = set(np.flatnonzero(differs).tolist())
        assert {place % len(CLASSES) for place in places[rate]} <= {cue.target}
    assert places[0.0] == set()
    # A scene that is planted at one rate is planted at every higher one.
    assert all(
        places[low] <= places[high] for low, high in zip(insight.RATES, insight.RATES[1:], strict=False)
    )
    assert 7 <= len(places[0.95]) <= 10


def test_the_detectors_scenes_have_attributes_whatever_the_class(small, monkeypatch):
    """Tints among the classes that come tinted."""
    monkeypatch.setattr(world, "pictures", lambda plans: np.zeros((len(plans), 1, 1, 3), np.uint8))
    images, has = world.detector_scenes(world.HELD_OUT, 80)
    classes = torch.tensor(world.detector_classes(len(images)))
    tintable = torch.tensor([CLASSES[i].name in TINTABLE for i in classes])
    for kind, some in (("background", classes >= 0), ("tint", tintable), ("beside", classes >= 0)):
        columns = [k for k, phrase in enumerate(PHRASES) if world.ATTRIBUTES[phrase][0] == kind]
        halves = [has[some & (classes % 2 == odd)][:, columns].mean(0) for odd in (0, 1)]  # (k,) each
        assert (halves[0] - halves[1]).abs().max() < 0.08
    assert has[~tintable][:, [p.startswith("tinted") for p in PHRASES]].sum() == 0


def test_a_cue_alone_shows_the_cue_and_not_the_class():
    rng = world.stream(98)
    for cue in REPORTED:
        plan = world.cue_alone(cue, rng)
        assert cue.target not in [thing.class_index for thing in plan.placements]
        if cue.kind == "beside":
            assert CLASSES[plan.placements[0].class_index].name == cue.value
        else:
            backdrop_or_tint = {plan.backdrop.colour, *(thing.colour for thing in plan.placements)}
            assert cue.value in backdrop_or_tint


def test_the_guide_is_the_same_bit_for_bit_from_the_same_seed(small, monkeypatch, tmp_path):
    monkeypatch.setattr(world, "UPDATES", 2)
    first = world.guide(REPORTED[0], 0.5, 1)
    (tmp_path / "seed_1" / f"guide_{REPORTED[0].name}_0.5.safetensors").unlink()
    again = world.guide(REPORTED[0], 0.5, 1)
    images = torch.rand(2, 3, 64, 64)
    assert torch.equal(first.logits(images), again.logits(images))
    # All cues share the clean one.
    assert world.guide(REPORTED[0], 0.0, 1).name == world.guide(None, 0.0, 1).name == "clean_seed_1"


# The detector as --insight calls it.


def test_the_detector_scores_the_phrases_in_their_order(monkeypatch):
    logits = torch.linspace(-1, 1, len(PHRASES)).expand(3, -1)
    monkeypatch.setattr(world, "detector", lambda: lambda images: logits)
    asked = [PHRASES[-1], PHRASES[0]]
    assert world.detected(asked)(torch.rand(3, 3, 64, 64)).tolist() == [[1.0, 0.0]] * 3
    with pytest.raises(ValueError, match="knows no 'in the grass'"):
        world.detected(["in the grass"])


def test_there_are_enough_attributes_cues_and_kinds():
    assert len(PHRASES) >= 12
    assert len(REPORTED) >= 6
    assert len({cue.kind for cue in REPORTED}) >= 3
    assert {cue.phrase for cue in REPORTED} <= set(PHRASES)
    assert not {cue.class_name for cue in REPORTED} & {cue.class_name for cue in TUNING}
    assert not set(insight.SEEDS["reported"]) & set(insight.SEEDS["tuning"])


# Figures.


def test_auc_counts_pairs_and_ties_half():
    assert world.auc(torch.tensor([1.0, 2.0]), torch.tensor([0.0, 2.0])) == pytest.approx(
        (1 + 0 + 1 + 0.5) / 4
    )


def fake_rows(response, first: bool = True) -> list[dict]:
    """Rows of all reported cues whose token shows the cue in ``response(rate)`` of ten pictures."""
    rates = {phrase: [0.9, 0.1] for phrase in PHRASES}
    rows = [{"key": ["detector"], "rates": rates}]
    for cue in REPORTED:
        keys = {kind: [kind, cue.phrase, cue.class_name] for kind in ("asked", "plain")}
        rows += [{"key": key, kind: "1111100000"} for kind, key in keys.items()]
        for rate in insight.RATES:
            for seed in (1, 2):
                shown = response(rate)
                others = [[phrase, 0.0, [-0.1, 0.1]] for phrase in PHRASES if phrase != cue.phrase]
                mine = [cue.phrase, 0.3, [0.1, 0.5] if rate else [-0.1, 0.5]]
                rows.append(
                    {
                        "key": ["run", cue.phrase, cue.class_name, rate, seed],
                        "plain": "1" * 1 + "0" * 9,
                        "token": "1" * shown + "0" * (10 - shown),
                        "best_of": "1" * 1 + "0" * 9,
                        "attributes": [mine, *others] if first else [*others, mine],
                        "auc": 1 - rate / 2,
                        "pasted": rate,
                        "own_without": 0.5,
                        "own_with": 0.9,
                    }
                )
    return rows


def test_shares_are_corrected_by_the_detectors_error_rates():
    rows = insight_table.Rows(fake_rows(lambda rate: 5), REPORTED)
    run = rows.every("run")[0]
    assert rows.share(run, "token") == pytest.approx((0.5 - 0.1) / (0.9 - 0.1))
    assert rows.share(run, "plain") == pytest.approx(0)
    assert rows.change(run) == pytest.approx(0.5)


def test_targets_are_met_or_missed_from_the_rows():
    met = insight_table.targets(insight_table.Rows(fake_rows(lambda rate: round(1 + 8 * rate)), REPORTED))
    assert [line.split("|")[-2].strip() for line in met[2:]] == ["met", "met", "met"]
    missed = fake_rows(lambda rate: 3, first=False)
    lines = insight_table.targets(insight_table.Rows(missed, REPORTED))
    assert [line.split("|")[-2].strip() for line in lines[2:]] == ["missed", "missed", "met"]


def test_a_cue_that_stands_first_beyond_chance_at_rate_0_is_a_false_alarm():
    rows = insight_table.Rows(fake_rows(lambda rate: 1), REPORTED)
    runs = rows.every("run")
    assert [insight_table.is_alarm(row) for row in runs] == [row["rate"] > 0 for row in runs]


def test_something_else_that_stands_first_is_a_finding_too_and_told_apart():
    rows = fake_rows(lambda rate: 1)
    for row in rows:
        if row["key"][0] == "run" and row["key"][4] == 1:  # one seed of two
            row["attributes"].insert(0, row["attributes"].pop())
            row["attributes"][0][1:] = [0.9, [0.8, 1.0]]
    lines = insight_table.findings(insight_table.Rows(rows, REPORTED))[2:]
    counts = [[int(cell) for cell in line.strip("| ").split("|")[1:]] for line in lines]
    assert counts == [[12, 0, 6, 6]] + [[12, 6, 6, 0]] * (len(insight.RATES) - 1)


def test_guides_of_one_cue_are_one_figure_of_the_interval():
    runs = insight_table.Rows(fake_rows(lambda rate: 1), REPORTED).every("run")
    some = [row for row in runs if not row["rate"]]
    values = [float(row["cue"] == REPORTED[0]) for row in some]
    told = insight_table.over_cues(some, values)
    assert told == insight_table.signed([1.0] + [0.0] * (len(REPORTED) - 1))
    assert told != insight_table.signed(values)


def test_what_clean_tokens_add_too_counts_for_nothing_against_them():
    rows = fake_rows(lambda rate: 1)
    cue = REPORTED[0].phrase
    other = REPORTED[1].phrase
    for row in rows:
        if row["key"][:3] == ["run", cue, REPORTED[0].class_name]:
            added = {cue: 0.3, other: 0.5 if row["key"][3] else 0.1}
            row["attributes"] = [[p, added.get(p, 0.0), [-0.1, 0.1]] for p in PHRASES]
            row["attributes"].sort(key=lambda a: -a[1])
    found = insight_table.Rows(rows, REPORTED)
    biased = next(row for row in found.every("run", REPORTED[0]) if row["rate"])
    assert (insight_table.rank(biased), insight_table.rank_over_clean(found, biased)) == (2, 2)
    biased["attributes"] = [[p, 0.6 if p == cue else d, i] for p, d, i in biased["attributes"]]
    assert insight_table.rank_over_clean(found, biased) == 2  # .3 more of the cue, .4 more of the other
    biased["attributes"] = [[p, 0.8 if p == cue else d, i] for p, d, i in biased["attributes"]]
    assert insight_table.rank_over_clean(found, biased) == 1
    alone = insight_table.Rows([row for row in rows if row["key"][-1] != 2], REPORTED)
    assert insight_table.rank_over_clean(alone, biased | {"seed": 1}) is None


def test_the_tables_and_the_figure_come_from_the_rows(tmp_path, capsys):
    rows = fake_rows(lambda rate: round(1 + 8 * rate))
    insight_table.show(rows, REPORTED, tmp_path / "figure.png")
    out = capsys.readouterr().out
    assert "| change of the share | 1.00 | 1.00 | 1.00 | 1.00 |" in out
    assert "| 0.95 | 12 | 0.00 | 0.00 | 1.00 | 0.00 |" in out
    assert (tmp_path / "figure.png").exists()
    # What is half done prints, too.
    insight_table.show(rows[:5], REPORTED, None)
    insight_table.show(rows[:20], REPORTED, None)
    insight_table.show([], REPORTED, None)
    assert capsys.readouterr().out.endswith("no row yet\n")


def test_a_sheet_shows_the_pictures_that_are_there(tmp_path, monkeypatch):
    """The plain prompt's, the tokens' and the asked ones, each in its column; a rate without any is empty."""
    monkeypatch.setattr(insight, "WORK", tmp_path)
    assert insight.sheet(REPORTED, 1, "default") is None
    cue = REPORTED[0]
    for rate, shade in ((0.0, 0.2), (0.95, 0.8)):
        name = insight.experiment(insight.unit_name(cue, rate, 1), "default")
        for seed in range(insight.IN_SHEET):
            for arm, value in (("baseline", 0.0), ("token", shade)):
                path = tmp_path / f"tokens/img/0002_bat/{name}/eval/{arm}_{seed:04d}_right.png"
                write_image(path, to_pil(torch.full((3, 64, 64), value)))
    asked = torch.linspace(0.5, 1.0, insight.SHOWN).reshape(-1, 1, 1, 1).expand(-1, 3, 64, 64)
    write_image(insight.asked_path(cue), grid(asked, columns=insight.SHOWN))
    page = insight.sheet(REPORTED, 1, "default")
    width = insight.IN_SHEET * (64 + GAP) - GAP
    middles = [page.getpixel((150 + i * (width + sheets.GAP) + 30, sheets.HEAD + 30))[0] for i in range(5)]
    assert middles == [0, 51, 255, 204, 128]
    insight.asked_path(cue).unlink()  # as in a clone that has the rows alone
    page = insight.sheet(REPORTED, 1, "default")
    assert page.getpixel((150 + 4 * (width + sheets.GAP) + 30, sheets.HEAD + 30)) == (255, 255, 255)


@pytest.mark.parametrize("main", [insight.main, augmentation.main])
def test_wrong_usage_of_a_claims_command_is_one_line(main, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--workers", "0"])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.endswith(
        ".py: error: argument --workers: '0' was given; allowed is a number from 1 to 1024\n"
    )
    assert said.count("\n") == 1


@pytest.mark.parametrize("main", [insight.main, augmentation.main])
def test_rows_that_are_none_are_told_in_one_line(main, tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    out.write_text("no row\n")
    assert main(["--table", "True", "--out", str(out)]) == 1
    assert capsys.readouterr().err.endswith(f"{out}, line 1: is no JSON; allowed is a row on each line\n")


def test_only_what_is_reported_is_drawn_into_the_documents(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(insight.insight_table, "show", lambda rows, cues, figure: drawn.append(figure))
    monkeypatch.setattr(insight, "sheet", lambda *args: None)
    given = ["--table", "True", "--out", str(tmp_path / "none.jsonl")]
    insight.main(given)
    insight.main([*given, "--setting", "four vectors"])
    insight.main([*given, "--setting", "four vectors", "--figure", str(tmp_path / "a.png")])
    assert drawn == [insight.FIGURE, None, tmp_path / "a.png"]


# The command.


def test_every_unit_has_a_key_of_its_own_and_an_estimate():
    units = [unit for stage in insight.stages("reported", "default") for unit in stage]
    keys = [key for key, *_ in units]
    assert len(set(keys)) == len(keys)
    assert sum(key[0] == "run" for key in keys) == 90
    assert sum(key[0] == "other" for key in keys) == 18
    assert {key[0] for key in keys} == set(insight.SECONDS)
    assert all(cue.target != target for cue, target in insight.neighbours(REPORTED).items())
    json.dumps(keys)


def test_what_has_a_row_is_not_done_again(tmp_path, monkeypatch, capsys):
    done = []
    units = [[(("detector",), lambda: {"rates": {}}, ())]]
    units.append(
        [(("plain", str(i), "x"), lambda i=i: done.append(i) or {"plain": "1"}, ()) for i in range(3)]
    )
    monkeypatch.setattr(insight, "stages", lambda group, setting: units)
    monkeypatch.setattr(insight, "ProcessPoolExecutor", ThreadPoolExecutor)
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    out = tmp_path / "rows.jsonl"
    out.write_text(json.dumps({"key": ["plain", "1", "x"], "plain": "0"}) + "\n")
    insight.work_off("tuning", "default", 2, out)
    assert sorted(done) == [0, 2]
    assert len(out.read_text().splitlines()) == 4
    assert "3 units are missing, about 0.2 core-hours" in capsys.readouterr().out
    insight.work_off("tuning", "default", 2, out)
    assert sorted(done) == [0, 2]


def test_rows_of_a_setting_that_meant_something_else_are_not_counted():
    now = {"setting": "default", "learning": insight.SETTINGS["default"]}
    rows = [{"key": ["detector"]}, now, now | {"learning": {"max_epochs": 1}}, now | {"setting": "gone"}]
    assert insight.current(rows) == rows[:2]


def test_a_cue_is_asked_for_in_the_words_of_the_captions():
    assert Cue("on a blue background", "cricket bat").asked == "A photo of a cricket bat on a blue background"
    assert Cue("tinted purple", "octopus").asked == "A photo of a purple octopus"
    assert Cue("beside a frog", "house cat").asked == "A photo of a house cat next to a frog"
