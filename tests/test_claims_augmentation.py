"""Claim (ii)'s plan: equal numbers of settings tried, nothing made twice, what an arm is made of.

pytest tests/test_claims_augmentation.py
"""

import json
import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from experiments.claims import augmentation as claim
from experiments.claims import augmentation_pictures as made
from experiments.claims import augmentation_plan as planned
from experiments.claims import augmentation_table as table
from experiments.sheets import GAP, HEAD


@pytest.fixture
def carried_out(monkeypatch, tmp_path):
    """The whole plan, with figures made up in the place of work: all jobs in order, and the rows."""
    there = set()
    for module in (planned, table):
        monkeypatch.setattr(module, "SHOTS", (1, 4))
    monkeypatch.setattr(planned.Plan, "is_there", lambda plan, job: job in there)
    rows = []
    order = []
    while jobs := planned.Plan(rows, tmp_path).ready():
        assert not there & set(jobs)
        for job in jobs:
            there.add(job)
            order.append(job)
            row = {"key": job.key, "seconds": 1.0}
            if job.kind == "training":
                accuracy = random.Random(json.dumps(job.key)).random()
                row |= {"validation": accuracy, "test": accuracy, "by_class": [accuracy] * len(planned.TAKEN)}
            if job.kind == "right":
                row |= {"right": 0.25 if job.seed % 2 else 0.75}
            rows.append(row)
    return order, rows, tmp_path


def test_every_arm_tries_five_settings_and_is_measured_on_every_seed(carried_out):
    order, rows, folder = carried_out
    found = table.results(planned.Plan(rows, folder))
    assert set(found) == {(arm, shots) for arm in planned.ARMS for shots in (1, 4)}
    for arm in planned.ARMS:
        settings = {job.setting for job in order if (job.kind, job.name, job.shots) == ("training", arm, 4)}
        assert len(settings) == 5
    assert all([r["key"][3] for r in these] == list(planned.SEEDS) for these in found.values())


def test_the_fewest_shots_are_whole_before_the_next_begin(carried_out):
    order, *_ = carried_out
    shots = [job.shots for job in order if job.kind == "training"]
    assert shots == sorted(shots)


def test_what_validation_finds_best_is_what_is_measured(carried_out):
    order, rows, folder = carried_out
    plan = planned.Plan(rows, folder)
    setting, missing = plan.chosen("token", 1)
    assert not missing
    last = [setting | {"guidance": guidance} for guidance in planned.DRAWING["guidance"]]
    scores = [
        sum(plan.row(planned.training("token", 1, seed, one))["validation"] for seed in planned.TUNING_SEEDS)
        for one in last
    ]
    assert setting["guidance"] == last[scores.index(max(scores))]["guidance"]


def test_nothing_is_made_twice_and_the_full_guides_tokens_are_shared_by_the_shots(carried_out):
    order, *_ = carried_out
    assert max(Counter(order).values()) == 1
    seeds = len(planned.SEEDS)
    classes = len(planned.TAKEN)
    number = Counter((job.kind, job.name) for job in order)
    assert number["words", "token"] == 2 * seeds * classes
    assert number["words", "full"] == seeds * classes
    assert number["guide", "strong"] == 2 * seeds


def test_a_unit_comes_after_all_that_it_is_made_from(carried_out):
    order, rows, folder = carried_out
    plan = planned.Plan(rows, folder)
    place = {job: i for i, job in enumerate(order)}
    for job in order:
        assert all(place[need] < place[job] for need in plan.needs(job))


def test_targets_are_met_or_missed_by_the_rows(carried_out, capsys):
    _, rows, folder = carried_out
    for row in rows:
        if row["key"][:2] == ["training", "token"]:
            row["test"] += 10
    table.print_targets(table.results(planned.Plan(rows, folder)) | {})
    told = capsys.readouterr().out.splitlines()[2:]
    assert [line.split("|")[3].strip() for line in told] == ["met", "not measured yet"] * 3


def test_classes_and_costs_are_means_of_the_rows(carried_out, capsys):
    _, rows, folder = carried_out
    for row in rows:
        kind, name, shots = row["key"][:3]
        if kind == "words":
            row |= {"images": {"token": 200, "full": 100, "inversion": 75}[name]}
        if kind == "training" and name in ("strong", "token") and shots == 1:
            row["by_class"] = [0.25 if name == "strong" else 0.75] * len(planned.TAKEN)
    table.print_classes(table.results(planned.Plan(rows, folder)))
    told = capsys.readouterr().out.splitlines()[2:]
    assert [line.split("|")[2].strip() for line in told] == ["0.25 -> 0.75"] * len(planned.TAKEN)
    table.print_costs(rows)
    assert "a word of token: worth 200 pictures, 1 s" in capsys.readouterr().out


def test_the_pictures_of_each_final_training_are_judged_once_and_real_ones_never(carried_out, capsys):
    order, rows, folder = carried_out
    plan = planned.Plan(rows, folder)
    judged = [job for job in order if job.kind == "right"]
    finals = [job for arm in made.GENERATED for shots in (1, 4) for job in plan.final(arm, shots)]
    assert Counter(replace(job, kind="training") for job in judged) == Counter(finals)
    table.print_right(plan)
    told = capsys.readouterr().out.splitlines()[2:]
    assert told == [f"| {planned.ARMS[arm]} | 0.50 | 0.50 |" for arm in made.GENERATED]


# Pictures.


@pytest.fixture
def pool(tmp_path, monkeypatch):
    """A place with a small pool of plain pictures for every word: gray ones, each of its own level."""
    monkeypatch.setattr(made, "POOL", 8)
    monkeypatch.setattr(made, "DRAWN", 2)
    place = made.Place(tmp_path)
    for word in made.WORDS:
        folder = place.drawn("plain", 0, 0, 2.0, word)
        folder.mkdir(parents=True)
        for i in range(8):
            Image.fromarray(np.full((4, 4, 3), 10 * i, np.uint8)).save(folder / f"{i:03d}.png")
    return place


def numbers(paths) -> list[int]:
    """The pictures' places in their pool."""
    return [int(path.stem) for path in paths]


def test_two_classes_of_a_word_do_not_share_their_plain_pictures(pool):
    drawn = made.plain(pool, 1, 0, 2.0, 2)
    common, rare = (
        next(k for k, c in enumerate(made.TAKEN) if (c.word, c.kind) == ("mouse", kind))
        for kind in ("common", "rare")
    )
    assert numbers(drawn.of_class(common)) == [0, 1]
    assert numbers(drawn.of_class(rare)) == [4, 5]


def test_the_filter_keeps_the_guides_best_of_what_the_token_costs(pool, monkeypatch):
    monkeypatch.setattr(made, "clean_guide", lambda *args: None)
    monkeypatch.setattr(made, "images_of_learning", lambda path: 3)  # 3 and the 2 that are drawn

    def brightest(classifier, paths):
        return torch.tensor([[float(number)] * len(made.TAKEN) for number in numbers(paths)])

    monkeypatch.setattr(made, "probabilities", brightest)
    kept = made.filtered(pool, 1, 0, 2.0, 2)
    common = next(k for k, c in enumerate(made.TAKEN) if c.kind == "common")
    assert numbers(kept.of_class(common)) == [4, 3]


def test_a_precise_phrase_needs_no_word_and_does_not_depend_on_the_shots(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(made, "new_token", lambda: None)
    monkeypatch.setattr(made, "draw", lambda folder, token, prompts, *_: asked.append((folder, prompts)))
    place = made.Place(tmp_path)
    job = planned.Job("drawing", "phrase", 0, 3, 5, (("guidance", 2.0),))
    assert list(planned.Plan([], tmp_path).needs(job)) == [planned.Job("renders")]
    claim.do(job, tmp_path)
    folder, prompts = asked[0]
    assert made.TAKEN[5].name == "oil drum"
    assert folder == place.drawn("phrase", 0, 3, 2.0, "oil_drum")
    assert len(prompts) == made.DRAWN
    assert prompts[0] == "A photo of an oil drum"
    assert all(prompt.endswith("an oil drum") for prompt in prompts)


def test_right_is_the_share_that_the_judge_gives_to_its_class(pool, monkeypatch):
    monkeypatch.setattr(made, "judge", lambda: None)
    first = torch.eye(len(made.TAKEN))[0]
    monkeypatch.setattr(made, "probabilities", lambda _, paths: first.repeat(len(paths), 1))
    job = planned.Job("right", "plain", 1, 0, -1, (("guidance", 2.0), ("number", 2)))
    assert claim.do(job, pool.root)["right"] == 1 / len(made.TAKEN)


def test_distillation_takes_the_full_guides_labels(pool, monkeypatch):
    monkeypatch.setattr(made, "images_of_learning", lambda path: 0)
    monkeypatch.setattr(made, "full_guide", lambda: None)
    first = torch.eye(len(made.TAKEN))[0]
    monkeypatch.setattr(made, "probabilities", lambda _, paths: first.repeat(len(paths), 1))
    found = made.distilled(pool, 1, 0, 2.0, 8)
    assert set(found.labels) == {0}
    assert len(found) == 8
    assert len(set(found.paths)) == 8


def test_shots_are_nested_and_splits_never_share_a_picture(tmp_path, monkeypatch):
    monkeypatch.setattr(made, "SEEDS", (0,))
    monkeypatch.setattr(made, "SHOTS", (1, 2))
    monkeypatch.setattr(made, "VAL_PICTURES", 2)
    monkeypatch.setattr(made, "TEST_PICTURES", 2)
    place = made.Place(tmp_path)
    made.render_all(place)
    one, two = (made.pictures_in(place.shots(0), n) for n in (1, 2))
    assert set(one.paths) < set(two.paths)
    every = [p.read_bytes() for p in sorted(tmp_path.rglob("*.png"))]
    assert len(set(every)) == len(every) == (4 + 2 + 2) * len(made.TAKEN)


def test_the_sheet_has_a_row_for_each_class_and_is_none_before_its_pictures_are_made(pool, monkeypatch):
    monkeypatch.setattr(planned.Plan, "chosen", lambda plan, arm, shots: ({"guidance": 2.0}, ()))
    plan = planned.Plan([], pool.root)
    assert table.sheet(plan, 1) is None
    monkeypatch.setattr(planned.Plan, "is_there", lambda plan, job: True)
    drawn = made.plain(pool, 1, 0, 2.0, 2)
    monkeypatch.setattr(made, "pictures_in", lambda folder, number=None: drawn)
    monkeypatch.setattr(made, "GENERATED", {"plain": lambda *args: drawn})
    page = table.sheet(plan, 1)
    assert page.height == HEAD + len(made.TAKEN) * (4 + GAP // 2)
    seen = {value for _, value in page.convert("L").getcolors()}
    assert {0, 10, 40, 50} <= seen  # the pool's first pictures for each of a word's two classes
