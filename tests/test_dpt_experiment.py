"""The experiment on DPT: arms are what they are called, rivals get the same cost, and nothing is done twice.

pytest tests/test_dpt_experiment.py
"""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dpt.__main__ import main
from dpt.alignment import MEASURES
from dpt.choose import pick
from dpt.config import Options
from dpt.data.facts import Fact, Phrase
from dpt.data.scenes import CLAIMS, draw_fact, prompts
from dpt.experiment import (
    costs,
    figures,
    gains,
    judging,
    own_errors,
    run,
    soft_tokens,
    tables,
    trainings,
    units,
    work,
)
from dpt.experiment import prompts as prompts_of
from dpt.experiment import settings as s
from dpt.experiment.drawing import draw
from dpt.experiment.prompts import chosen, is_for_tuning, meaning, part_of
from dpt.experiment.units import PRICED, Progress, Unit, missing, needs, tuning_units, units_of
from dpt.forward import Noised
from dpt.settings import StageSettings

CPU = torch.device("cpu")
NO_BOXES = SimpleNamespace(expression="a thing")


def without_files(unit, settings):
    return False


def progress_of(*rows, has_files=without_files):
    return Progress(rows, has_files)


def row_of(unit, settings, full="2", **more):
    base = {name: value for name, value in vars(unit).items() if name != "choice"}
    number = s.PART * s.NOISES
    costs_of = {"forwards": 24.0, "backwards": 0.0, "seconds": 0.1, "took": 20.0}
    verdicts = {"full": (full * number)[:number]}
    return base | {"settings": settings} | costs_of | verdicts | more


def tuning_rows(name, shares):
    """Rows of an arm's choices, each with so many whole captions."""
    rows = []
    for unit in tuning_units(name):
        right = round(s.PART * s.NOISES * shares[unit.choice])
        full = "2" * right + "0" * (s.PART * s.NOISES - right)
        rows.append(row_of(unit, s.ALL_ARMS[name].choices[unit.choice], full))
    return rows


PRICES = [row_of(PRICED[0], {}), row_of(PRICED[1], s.CORRECTIONS[0], forwards=36.0, backwards=12.0)]


# Prompts.


def test_settings_are_chosen_on_facts_and_noises_that_the_table_does_not_use():
    meanings = {name: {meaning(p.fact) for p in chosen(name)} for name in s.QUOTAS}
    assert meanings["table"].isdisjoint(meanings["tuning"])
    parts = {name: [part_of(name, i) for i in range(prompts_of.number_of_parts(name))] for name in s.QUOTAS}
    k = 4
    noises = {n: {x for p in some for c in range(k) for x in p.candidates(c)} for n, some in parts.items()}
    assert noises["table"].isdisjoint(noises["tuning"])
    assert len(noises["table"]) == 500 * s.NOISES * k


def test_the_table_has_500_prompts_of_four_kinds_with_held_out_ones_apart():
    found = chosen("table")
    assert len({prompt.text for prompt in found}) == 500
    for kind, (seen, held_out) in s.QUOTAS["table"].items():
        some = [prompt for prompt in found if prompt.kind == kind]
        assert (sum(not p.held_out for p in some), sum(p.held_out for p in some)) == (seen, held_out)
    for number in range(10):
        assert {prompt.kind for prompt in part_of("table", number).prompts} == set(s.QUOTAS["table"])


def test_the_same_claim_in_other_words_is_on_the_same_side():
    bat, car = Phrase("fruit bat"), Phrase("car")
    assert meaning(Fact((bat, car), "left of")) == meaning(Fact((car, bat), "right of"))
    assert meaning(Fact((bat, car))) == meaning(Fact((car, bat)))
    assert meaning(Fact((bat, car), "left of")) != meaning(Fact((car, bat), "left of"))
    assert is_for_tuning(Fact((bat, car))) == is_for_tuning(Fact((car, bat)))


@pytest.mark.parametrize("kind", CLAIMS)
def test_a_render_of_a_prompt_shows_what_it_says(kind):
    rng = np.random.default_rng(0)
    for prompt in prompts(kind, 3, 0):
        assert draw_fact(prompt.fact, rng).size == (64, 64)


# Costs.


def test_rivals_choose_from_pictures_that_cost_no_less_than_a_corrected_one():
    plain, corrected = (costs.price(row) for row in PRICES)
    assert (plain, corrected) == (24, 60)
    assert costs.number_to_choose_from(corrected, plain) == 3
    assert costs.number_to_choose_from(48, 24) == 2
    assert costs.iterations_for(corrected, plain, steps=1) == 6
    assert costs.iterations_for(corrected, plain, steps=2) == 4
    progress = progress_of(*PRICES)
    assert progress.settings(Unit("draw", "H", 0, "table", 0)) == {"k": 3}
    assert progress_of().settings(Unit("draw", "H", 0, "table", 0)) is None


# Units.


def test_the_best_choice_on_the_tuning_prompts_is_taken_and_none_before_all_are_there():
    shares = [0.1, 0.4, 0.4, 0.2, 0.1, 0.1, 0.1]
    rows = tuning_rows("D", shares)
    unit = Unit("draw", "D", 1, "table", 3)
    assert progress_of(*rows).settings(unit) == s.CORRECTIONS[1]
    assert progress_of(*rows[:-1]).settings(unit) is None
    assert set(tuning_units("D")) <= set(needs(unit, progress_of()))


def test_only_the_chosen_soft_tokens_are_trained_for_the_table():
    progress = progress_of(*tuning_rows("J", [0.1, 0.3, 0.2]))
    trained = [u.name for u in needs(Unit("draw", "J", 2, "table", 0), progress) if u.kind == "train"]
    assert trained == ["soft tokens 0.005"]


def test_each_unit_comes_behind_what_it_needs_and_only_what_is_asked_for_is_done():
    progress = progress_of()
    left = missing(units_of("C", [0]), progress)
    names = [(unit.kind, unit.name) for unit in left]
    assert names[:3] == [("scenes", ""), ("train", "probe"), ("train", "tuned")]
    assert set(names[3:]) == {("draw", "C")}
    every = missing([u for part in s.PARTS for u in units_of(part, s.SEEDS)], progress)
    places = {unit: i for i, unit in enumerate(every)}
    for unit in every:
        assert all(places[other] < places[unit] for other in needs(unit, progress) if other in places)


def test_finished_units_are_not_done_again_nor_what_they_needed():
    units_left = units_of("B", [0])
    rows = [row_of(unit, {}) for unit in units_left[:-1]]
    left = missing(units_left, progress_of(*rows, has_files=lambda unit, settings: unit.kind == "scenes"))
    assert [(u.kind, u.name) for u in left] == [("train", "probe"), ("train", "denoising"), ("draw", "B")]
    assert missing(units_left, progress_of(*rows, row_of(units_left[-1], {}))) == []


def test_pictures_drawn_with_settings_that_are_no_longer_chosen_do_not_count():
    unit = Unit("draw", "D", 0, "table", 0)
    rows = [*tuning_rows("D", [0.1, 0.4, 0.3, 0.2, 0.1, 0.1, 0.1]), row_of(unit, s.CORRECTIONS[2])]
    assert not progress_of(*rows).is_done(unit)
    assert progress_of(*rows, row_of(unit, s.CORRECTIONS[1])).is_done(unit)


def test_a_fresh_probe_has_another_seed_than_the_probe_that_tuned_its_model():
    for seed in s.SEEDS:
        on = [
            u for u in needs(Unit("train", "fresh probe of tuned", seed), progress_of()) if u.name == "tuned"
        ]
        assert [u.seed for u in on] == [trainings.seed_of_model(seed)] != [seed]


def test_the_control_never_sees_a_discriminative_loss_and_shares_all_else_with_dpt():
    control, dpt = s.TRAININGS["denoising"], s.TRAININGS["tuned"]
    assert control.losses == ("mse",) and control.only_lora
    assert replace(control, losses=dpt.losses, only_lora=False) == dpt
    assert s.TRAININGS["probe without REC"].losses == ("itm",)
    assert s.TRAININGS["tuned without ITM"].losses == ("rec", "mse")
    for name, over in s.CONTROL.items():
        control = s.TRAININGS[s.ALL_ARMS[over].training]
        assert control.losses == ("mse",)
        arm = s.ALL_ARMS[name]
        for choice in arm.choices:
            assert s.TRAININGS[choice.get("training", arm.training)].settings == control.settings


# Judging and figures.


def test_digits_give_back_the_measures():
    values = [0.0, 0.5, 1.0, None]
    text = judging.as_digits(values)
    assert text == "012-"
    assert np.array_equal(judging.from_digits(text), [0, 0.5, 1, np.nan], equal_nan=True)


class Blind:
    """A detector that sees nothing, and whose features are the pixels' means."""

    def things(self, images):
        return [() for _ in images]

    def features(self, images):
        return images.mean(dim=(2, 3)) + torch.arange(3.0)


def test_a_row_has_a_digit_a_picture_and_the_variety_of_each_prompt():
    part = part_of("tuning", 0)
    row = judging.judged(Blind(), part, torch.rand(len(part.seeds), 3, 64, 64))
    assert all(len(row[measure]) == len(part.seeds) for measure in MEASURES)
    assert set(row["full"]) == {"0"} and len(row["diversity"]) == s.PART
    assert row["kernel_distance"] > 0
    relations = [prompt.kind == "relation" for prompt in part.asked]
    assert [digit != "-" for digit in row["relation"]] == relations


def test_gains_pair_by_prompt_and_training():
    """Arms that differ by a constant have an interval of no width, however much prompts differ."""
    rng = np.random.default_rng(0)
    first = rng.integers(0, 2, s.PART)
    rows = []
    for seed in s.SEEDS:
        worse = "".join("2000" if x else "0000" for x in first)
        better = "".join("2200" if x else "2000" for x in first)
        rows.append(row_of(Unit("draw", "B", seed, "table", 0), {}, worse, diversity=[0.1] * s.PART))
        rows.append(row_of(Unit("draw", "C", seed, "table", 0), {}, better, diversity=[0.1] * s.PART))
    found = gains.gain(progress_of(*rows), "C", "B")
    assert (found["share"], found["low"], found["high"]) == (0.25, 0.25, 0.25)
    assert found["by_seed"] == [0.25] * 3 and found["number"] == s.PART
    assert gains.gain(progress_of(*rows), "D", "B") is None
    relations = gains.gain(progress_of(*rows), "C", "B", where=lambda p: p.kind == "relation")
    assert relations["number"] == sum(p.kind == "relation" for p in part_of("table", 0).prompts)


def test_tables_say_what_was_not_run_and_take_their_place_in_the_page():
    text = tables.all_tables(progress_of())
    assert text.count(tables.NOT_RUN) == len(tables.TABLES)
    page = f"before\n{tables.BEGIN}\nold\n{tables.END}\nafter\n"
    assert tables.with_tables(page, "new") == f"before\n{tables.BEGIN}\n\nnew\n\n{tables.END}\nafter\n"
    assert tables.with_tables("no marks", "new") == "no marks"
    assert tables.NOT_RUN in tables.figure_links([])
    assert "](images/dpt_arms.png)" in tables.figure_links([tables.PAGE.parent / "dpt_arms.png"])


def test_the_time_is_the_sum_of_what_the_rows_took():
    rows = [row_of(Unit("draw", "A", 0, "table", part), {}, took=1800.0) for part in range(3)]
    trained = row_of(Unit("train", "probe", 0), {}, took=3600.0)
    told = tables.time_table(progress_of(*rows, trained)).splitlines()
    assert told[2:] == ["| draw | 3 | 1.5 |", "| train | 1 | 1.0 |", "| all | 4 | 2.5 |"]


def test_a_gain_counts_only_where_its_interval_excludes_0():
    assert tables.verdict({"share": 0.2, "low": -0.01, "high": 0.4}, 0.1) == "no gain shown"
    assert tables.verdict({"share": 0.2, "low": 0.01, "high": 0.4}, 0.1) == "met"
    assert tables.verdict({"share": 0.05, "low": 0.01, "high": 0.1}, 0.1) == "missed"


# Rivals.


def test_the_highest_score_is_chosen_and_the_first_of_equals():
    candidates = torch.arange(6.0).view(3, 2, 1)
    scores = torch.tensor([[0.1, 0.5], [0.9, 0.5], [0.2, 0.4]])
    assert pick(candidates, scores.argmax(dim=0)).flatten().tolist() == [2, 1]


@pytest.fixture
def reader():
    return trainings.reader_of(None, "", "", 0)


@pytest.fixture
def small_part(monkeypatch):
    monkeypatch.setattr("dpt.experiment.prompts.NOISES", 1)
    return prompts_of.Part(chosen("table")[:2], (5, 6))


FEW = replace(s.CHEAP, num_inference_steps=2)


def test_a_correction_of_0_is_the_base_bit_for_bit(reader, small_part):
    arm = replace(s.ARMS["D"], sampler=FEW)
    plain = draw(reader, arm, {}, small_part)
    corrected = draw(reader, arm, {"factor": 0.0, "mode": "state"}, small_part)
    assert torch.equal(plain.latents, corrected.latents)
    moved = draw(reader, arm, {"factor": 5.0, "mode": "official"}, small_part)
    assert not torch.equal(plain.latents, moved.latents)
    assert (plain.cost.forwards, plain.cost.backwards) == (8, 0)  # 2 pictures, 2 steps, with guidance
    assert (moved.cost.forwards, moved.cost.backwards) == (12, 4)


def test_a_noise_is_optimised_at_the_counted_cost_and_the_first_one_is_the_pictures_own(reader, small_part):
    arm = replace(s.ARMS["K"], sampler=FEW)
    settings = {"steps": 1, "rate": 20.0, "iterations": 3}
    drawn = draw(reader, arm, settings, small_part)
    # Each iteration has a step and a score, with the way back.
    assert (drawn.cost.forwards, drawn.cost.backwards) == (8 + 12, 12)
    one = draw(reader, arm, settings | {"iterations": 1}, small_part)
    assert torch.equal(one.latents, draw(reader, arm, {}, small_part).latents)


def test_soft_tokens_leave_the_empty_prompt_alone_and_are_few(reader):
    latents = torch.randn(2, 4, 16, 16)
    with torch.no_grad():
        states = reader.condition.encode(["a frog", ""]).states
        before = reader.models.unet(latents, 500, encoder_hidden_states=states).sample
        soft = soft_tokens.new_tokens(reader, 0)
        after = reader.models.unet(latents, 500, encoder_hidden_states=states).sample
    assert torch.equal(before[1], after[1])
    assert not torch.allclose(before[0], after[0])
    assert sum(p.numel() for p in soft.parameters()) < 1e6


def test_own_errors_are_those_of_each_text_with_the_right_one_first(reader):
    texts = ["a frog", "a red car", "two pizzas", "a cactus"]
    rows = [SimpleNamespace(captions=(t, f"{t} here", "a bat"), grounding=NO_BOXES) for t in texts]
    torch.manual_seed(0)
    noised = Noised(
        torch.randn(4, 3, 4, 16, 16), torch.tensor([900, 500, 300, 100]), torch.randn(4, 4, 16, 16)
    )
    with torch.no_grad():
        errors = own_errors.errors_by_text(reader, rows, noised)
        losses = own_errors.contrast(reader, rows, noised)
        for column, captions in ((0, texts), (2, ["a bat"] * 4), (3, texts[-1:] + texts[:-1])):
            states = reader.condition.encode(captions).states
            found = reader.models.unet(noised.latents[:, 0], noised.timesteps, encoder_hidden_states=states)
            alone = (found.sample - noised.target).square().flatten(1).mean(1)
            assert torch.allclose(errors[:, column], alone, atol=1e-4)
    assert losses["mse"] == errors[:, 0].mean()
    expected = torch.nn.functional.cross_entropy(-1000 * errors, torch.zeros(4).long())
    assert torch.allclose(losses["i2t"], expected, rtol=1e-4, atol=1e-3)  # logits of -1000


# The command.


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--parts", "A,Z"], "--parts: 'A,Z' was given; allowed is one or more of A, B, C"),
        (["--seeds", "7"], "--seeds: '7' was given; allowed is one or more of 0, 1, 2"),
        (["--workers", "0"], "--workers: 0 was given; allowed is 1 or more"),
        (["--model", "sd1.4"], "--model is no option of experiment"),
    ],
)
def test_wrong_usage_is_one_line(argv, told, capsys):
    assert main(["experiment", *argv]) == 2
    err = capsys.readouterr().err
    assert told in err and err.count("\n") == 1


def test_a_damaged_row_is_one_line(tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text('{"kind": \n')
    assert main(["experiment", "--rows", str(tmp_path / "rows.jsonl"), "--dry_run"]) == 1
    assert "line 1 of" in capsys.readouterr().err


def test_a_dry_run_tells_how_much_is_missing_and_does_nothing(tmp_path, capsys):
    where = ["--rows", str(tmp_path / "rows.jsonl"), "--output_path", str(tmp_path / "out")]
    assert main(["experiment", "--parts", "A,B", "--seeds", "0", "--dry_run", *where]) == 0
    told = capsys.readouterr().out
    assert "units are missing: about" in told and "core-hours" in told
    assert list(tmp_path.iterdir()) == []


def options_of(tmp_path, **changes):
    where = {"rows": str(tmp_path / "rows.jsonl"), "output_path": str(tmp_path / "out"), "workers": 1}
    return Options(**where | changes)


def test_a_unit_that_fails_leaves_the_rows_of_those_before_it(tmp_path, monkeypatch):
    done = []

    def fake(root, unit, settings):
        if len(done) == 3:
            raise ValueError("broken")
        done.append(unit)
        return row_of(unit, settings)

    monkeypatch.setattr(run, "carry_out", fake)
    options = options_of(tmp_path, parts="A")
    with pytest.raises(ValueError, match="broken"):
        run.run_experiment(options)
    assert len(run.read_rows(tmp_path / "rows.jsonl")) == 3
    before = list(done)
    done.clear()
    monkeypatch.setattr(run, "carry_out", lambda root, u, given: done.append(u) or row_of(u, given))
    run.run_experiment(options)
    assert not set(before) & set(done)
    assert len(done) == 10 + units.TUNING_PARTS - 3


@pytest.fixture
def small(monkeypatch, request):
    """The whole experiment in its smallest form: a few updates, four prompts."""
    for name, training in s.TRAININGS.items():
        settings = StageSettings(2, 2, 1, training.settings.learning_rate)
        kept = (1,) if training.kept else ()
        monkeypatch.setitem(s.TRAININGS, name, replace(training, settings=settings, kept=kept))
    monkeypatch.setitem(s.SCENES, "train", 6)
    monkeypatch.setitem(s.SCENES, "test", 6)
    for quota in s.QUOTAS:
        monkeypatch.setitem(s.QUOTAS, quota, {"relation": (1, 1), "count": (2, 0)})
    for module in (s, units, prompts_of, figures):
        monkeypatch.setattr(module, "PART", 4)
    for module in (units, tables, figures):
        monkeypatch.setattr(module, "COURSE", (1,))
    monkeypatch.setattr(units, "TUNING_PARTS", 1)
    monkeypatch.setattr("dpt.experiment.reading.GRADIENT_BATCHES", 1)
    monkeypatch.setattr("dpt.experiment.figures.SHOWN_PROMPTS", 2)
    for sampler in (s.CHEAP, s.COSTLY):
        # All arms hold these two.
        before = sampler.num_inference_steps
        object.__setattr__(sampler, "num_inference_steps", 3)
        request.addfinalizer(partial(object.__setattr__, sampler, "num_inference_steps", before))
    for arms in (s.ALL_ARMS, s.ARMS, s.REMEDIES):
        for name, arm in list(arms.items()):
            monkeypatch.setitem(arms, name, replace(arm, parts=1))
    for cached in (chosen, work.texts_of):
        cached.cache_clear()
    yield
    for cached in (chosen, work.texts_of):
        cached.cache_clear()


@pytest.mark.slow
def test_the_whole_experiment_runs_on_the_miniature_and_only_once(small, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tables, "PAGE", tmp_path / "docs" / "page.md")
    options = options_of(tmp_path, seeds="0")
    assert run.run_experiment(options) == 0
    rows = run.read_rows(tmp_path / "rows.jsonl")
    names = {row["name"] for row in rows if row["kind"] == "draw"}
    assert names == set(s.ALL_ARMS)
    capsys.readouterr()
    run.run_experiment(options)
    assert "nothing is missing" in capsys.readouterr().out
    assert len(run.read_rows(tmp_path / "rows.jsonl")) == len(rows)
    run.run_experiment(replace(options, table=True))
    told = capsys.readouterr().out
    assert tables.NOT_RUN not in told
    for name in ("dpt_strength", "dpt_updates", "dpt_blocks", "dpt_arms"):
        assert (tmp_path / "docs" / "images" / f"{name}.png").is_file()
