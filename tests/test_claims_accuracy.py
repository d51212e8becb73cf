"""Claim (i): the class token's rivals do what they are named after, at the cost that they are given."""

import argparse
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import weight_hashes
from PIL import Image
from safetensors.torch import save

from config import with_preset
from discriminative.errors import WorkError
from discriminative.guides.classifier import Guide
from discriminative.settings import SamplerSettings
from experiments.claims import accuracy, accuracy_table, accuracy_unit, rivals
from experiments.claims.accuracy_methods import METHODS, OURS, TUNING_SEED, Unit
from experiments.claims.calls import Calls
from experiments.claims.rivals import Budget, Task
from miniature.scenes import CLASSES

SAMPLER = SamplerSettings(3, 7.0, scheduler="dpmsolver++")
ONCE = 120  # calls for learning
EACH = 6  # calls of an image: three steps with guidance
HOUSE_CAT = CLASSES[23]  # in prompts "tiger cat", words of the tiny vocabulary


@pytest.fixture
def task(token, classifier):
    calls = Calls(token.models.unet)
    return Task(token, calls, Guide(classifier, 0), HOUSE_CAT, 0, SAMPLER, Budget(ONCE, EACH, 4))


RIVALS = {
    "textual_inversion": {"real": 2, "rate": 1e-2, "prompt": "{token}"},
    "hard_prompt": {"words": 2, "rate": 0.1, "stage": 0},
    "reward_lora": {"rank": 2, "rate": 1e-2, "steps": 2},
    "noise_optimisation": {"steps": 2, "rate": 5.0},
    "best_of_k": {},
}


def test_calls_are_passes_of_single_images_forward_and_backward(token):
    calls = Calls(token.models.unet)
    token.sample(["a photo of a cat"] * 2, [0, 1], SAMPLER)
    assert (calls.forward, calls.backward) == (2 * EACH, 0)
    cond = token.encode(["a photo of newclas cat"] * 2)
    found = token.models.unet(torch.zeros(2, 4, 8, 8), 5, encoder_hidden_states=cond).sample
    assert (calls.forward, calls.backward) == (2 * EACH + 2, 0)
    found.sum().backward()
    assert (calls.forward, calls.backward, calls.total) == (2 * EACH + 2, 2, 2 * EACH + 4)


@pytest.mark.parametrize(
    ("budget", "cost", "done"), [(10, 3, 4), (9, 3, 3), (2, 3, 1), (-5, 3, 1), (10, 0, 1)]
)
def test_rounds_end_when_the_budget_is_spent_and_one_is_always_done(budget, cost, done):
    calls = Calls(torch.nn.Identity())
    calls.forward = 100
    seen = []
    for i in calls.rounds(budget):
        seen.append(i)
        calls.forward += cost
    assert seen == list(range(done))


# Calls of a round, by which learning may go beyond its budget; of the hard prompt one of each kind.
ROUND = {"textual_inversion": 16, "hard_prompt": 15 + 4 * 24, "reward_lora": 80, "noise_optimisation": 32}


@pytest.mark.parametrize("name", RIVALS)
def test_a_rival_costs_what_the_class_token_does_and_leaves_the_model_as_it_was(task, name):
    if name == "hard_prompt":  # comparing one prompt takes 96 calls
        task.budget = replace(task.budget, once=600)
    total = task.budget.once + 4 * EACH
    models = task.token.models
    frozen = [models.text_encoder, models.vae] + [models.unet] * (name != "reward_lora")
    before = weight_hashes(*frozen)
    learned = getattr(rivals, name)(task, **RIVALS[name])
    assert weight_hashes(*frozen) == before
    images = learned.draw("", [0, 1, 2, 3])
    assert images.shape == (4, 3, 16, 16)
    assert images.isfinite().all()
    if name == "best_of_k":  # whole batches are drawn
        assert learned.candidates * EACH * 4 == total
    else:
        least = 0.8 * total if name == "hard_prompt" else total  # it compares no more than it has tried
        assert least <= task.calls.total < total + ROUND[name]
    assert not torch.equal(images, learned.draw(" on blue", [0, 1, 2, 3]))
    check_kept(name, task, learned)


def check_kept(name, task, learned):
    """What is kept is what was learned."""
    kept = {key: tuple(tensor.shape) for key, tensor in learned.tensors.items()}
    if name == "textual_inversion":
        assert kept == {"newclas": (1, 16)}
        assert not torch.equal(task.token.vector, task.token.start_vector("class", "tiger cat"))
    elif name == "reward_lora":
        assert kept
        assert all("lora_" in key for key in kept)
        assert any(tensor.any() for key, tensor in learned.tensors.items() if "lora_B" in key)
    else:
        assert not kept
    if name == "hard_prompt":
        assert len(task.token.models.tokenizer(learned.text, add_special_tokens=False).input_ids) == 2


def test_the_best_of_k_is_the_candidate_that_the_guide_is_surest_of(task):
    task.budget = Budget(once=2 * 2 * EACH, each=EACH, images=2)  # two more for each of two images
    learned = rivals.best_of_k(task)
    images = learned.draw("", [0, 1])
    assert learned.candidates == 3
    for i in (0, 1):
        prompt = "A photo of a tiger cat"
        turns = [[0, 1], [1000, 1001], [2000, 2001]]
        drawn = torch.stack([task.token.sample([prompt] * 2, turn, SAMPLER)[i] for turn in turns])
        scores = rivals.log_probabilities(task.guide, drawn)
        assert torch.equal(images[i], drawn[scores.argmax()])


def test_a_part_of_a_turn_is_for_the_first_images_only(task, monkeypatch):
    asked = []

    def candidates(task, prompt, seeds, number):
        asked.append((seeds, number))
        return torch.rand(min(number, len(seeds)), 3, 16, 16)

    monkeypatch.setattr(rivals, "candidates", candidates)
    task.budget = Budget(once=3 * EACH, each=EACH, images=2)  # 2.5 for each of two images
    rivals.best_of_k(task).draw("", [0, 1])
    assert asked == [([0, 1], 5), ([1000, 1001], 3), ([2000, 2001], 1)]


def test_a_token_drawn_as_evaluated_is_the_one_that_was_learned_or_is_learned_again(
    task, tmp_path, monkeypatch
):
    def class_token(task, preset):
        task.token.load(torch.full_like(task.token.vector, 0.5))
        return rivals.with_token(task, {"preset": preset})

    monkeypatch.setattr(rivals, "class_token", class_token)
    task.files = tmp_path
    again = rivals.drawn_as_evaluated(task, OURS, "default")
    assert again.once is None
    assert torch.equal(task.token.vector, torch.full_like(task.token.vector, 0.5))
    kept = rivals.with_token(task, {})
    monkeypatch.setattr(accuracy_unit, "FILES", tmp_path)
    size = accuracy_unit.write_kept(Unit(OURS, 24, task.seed), kept, {"calls": 77, "seconds": 1.5})
    assert size == len(save(kept.tensors))
    task.token.load(torch.zeros_like(task.token.vector))
    found = rivals.drawn_as_evaluated(task, OURS, "default")
    assert torch.equal(task.token.vector, torch.full_like(task.token.vector, 0.5))
    assert found.once == {"calls": 77, "seconds": 1.5}
    assert found.as_evaluated
    assert task.sampler == with_preset("default", {"model": "miniature"}).sampler


def test_textual_inversion_has_the_loss_of_diffusers_on_noised_latents(token):
    latents = torch.randn(2, 4, 8, 8)
    prompts = ["a photo of newclas", "a photo of a cat"]
    found = rivals.denoising_loss(token, prompts, latents, torch.Generator().manual_seed(3))
    rng = torch.Generator().manual_seed(3)
    noise = torch.randn(latents.shape, generator=rng)
    timesteps = torch.randint(1000, (2,), generator=rng)
    a = token.models.scheduler.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    noisy = a.sqrt() * latents + (1 - a).sqrt() * noise
    predicted = token.models.unet(noisy, timesteps, encoder_hidden_states=token.encode(prompts)).sample
    assert found.item() == pytest.approx(F.mse_loss(predicted, noise).item(), rel=1e-5)
    found.backward()
    assert token.vector.grad.abs().sum() > 0


def test_real_images_are_renders_of_the_class_that_no_other_seed_has():
    first = rivals.real_images(HOUSE_CAT, 38, 2)
    again = rivals.real_images(HOUSE_CAT, 38, 4)
    assert first.shape == (2, 3, 64, 64)
    assert torch.equal(first, again[:2])
    assert not torch.equal(first, rivals.real_images(HOUSE_CAT, 39, 2))


def test_images_with_gradient_are_the_samplers(task):
    seeds = [7, 8]
    prompts = ["A photo of a cat"] * 2
    plain = task.token.sample(prompts, seeds, SAMPLER)
    for steps in (1, 2, 3, 12):
        found = rivals.with_gradient(task.token, prompts, seeds, SAMPLER, steps)
        assert torch.allclose(found, plain, atol=1e-5)


def test_a_noise_never_becomes_worse_and_its_norm_stays_likely(task):
    noises = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    few = replace(SAMPLER, num_inference_steps=2)
    prompt = "A photo of a tiger cat"
    found = rivals.optimised(task, prompt, noises, few, rate=5.0)
    before, after = (
        rivals.log_probabilities(task.guide, rivals.images_of(task, prompt, n, few)) for n in (noises, found)
    )
    assert (after >= before - 1e-5).all()
    assert (after > before).any()
    likely = F.normalize(noises.flatten(1), dim=1).view_as(noises) * (noises[0].numel() - 1) ** 0.5
    likely.requires_grad_()
    rivals.unlikely_norm(likely).sum().backward()
    assert likely.grad.abs().max() < 1e-4


def test_nearest_words_are_nearest_by_angle():
    table = torch.tensor([[1.0, 0.0], [0.0, 9.0], [-1.0, 0.0]])
    assert rivals.nearest_words(torch.tensor([[100.0, 90.0], [-0.1, 0.01]]), table).tolist() == [0, 2]


# What there is to do, and the tables.


def row(method, class_index=2, seed=38, judge=30, once=1000, changes=None, budget=None, **more):
    """A row as ``one_unit`` makes it."""
    unit = Unit(method, class_index, seed, changes or {}, budget)
    found = {"method": method, "class_index": class_index, "seed": seed, "changes": unit.changes}
    found |= {"budget": budget, "check": False, "settings": unit.settings, "version": accuracy.VERSION}
    found |= {"guide": judge, "judge": judge, "judge2": judge, "images": 40, "diversity": 0.2}
    found |= {"once": {"calls": once, "seconds": 9.0}, "each": {"calls": 24.0, "seconds": 0.1}}
    found |= {"kind": "rare" if class_index % 2 == 0 else "common", "said": {}, "on_background": 0.9}
    found |= {"right_on_background": 0.7}
    return found | {"bytes": 600, "took": 30.0, "name": "bat", "word": "bat"} | more


BUDGET = {"once": 1000, "each": 24.0, "images": 40}


def test_a_rival_waits_until_the_class_token_says_what_it_may_cost():
    unit = Unit("best of k", 2, 38)
    assert accuracy.missing([unit], []) == []
    assert accuracy.to_do([unit], []) == [unit]
    assert accuracy.missing([unit], [row(OURS)]) == [replace(unit, budget=BUDGET)]
    done = row("best of k", budget=BUDGET)
    assert accuracy.missing([unit], [row(OURS), done]) == []
    assert accuracy.missing([unit], [row(OURS, once=900), done])  # at another cost it is another


def test_the_candidate_that_did_best_on_the_tuning_classes_is_taken(monkeypatch):
    name = "noise optimisation"
    candidates = ({"rate": 5.0}, {"rate": 20.0})
    monkeypatch.setitem(METHODS, name, replace(METHODS[name], candidates=candidates))
    rows = [row(OURS, c, TUNING_SEED) for c in accuracy.TUNING_CLASSES]
    assert accuracy.chosen(name, rows) is None
    for changes, judge in zip(candidates, (10, 20), strict=True):
        rows += [
            row(name, c, TUNING_SEED, judge, changes=changes, budget=BUDGET) for c in accuracy.TUNING_CLASSES
        ]
    assert accuracy.chosen(name, rows) == candidates[1]
    assert accuracy.chosen("best of k", rows) == {}
    units = accuracy.reporting([name], [38, 39], [38], rows)
    assert {u.seed for u in units if u.class_index == 2} == {38, 39}
    assert {u.seed for u in units if u.class_index == 1} == {38}
    assert all(u.changes == candidates[1] for u in units if u.method == name)


def test_of_candidates_that_are_equal_the_first_is_taken(monkeypatch):
    """1/40 and 37/40 are no more than 0/40 and 38/40, which rounding may say."""
    candidates = ({"steps": 1}, {"steps": 12})
    monkeypatch.setitem(METHODS, "LoRA", replace(METHODS["LoRA"], candidates=candidates))
    rows = [row(OURS, c, TUNING_SEED) for c in accuracy.TUNING_CLASSES]
    for changes, judged in zip(candidates, ((0, 38), (1, 37)), strict=True):
        rows += [
            row("LoRA", c, TUNING_SEED, judge, changes=changes, budget=BUDGET)
            for c, judge in zip(accuracy.TUNING_CLASSES, judged, strict=True)
        ]
    assert accuracy.chosen("LoRA", rows) == candidates[0]


RATES = ({"rate": 0.02, "steps": 1}, {"rate": 0.01, "steps": 1}, {"rate": 0.01, "steps": 12})


def tuned_twice(monkeypatch, at_long):
    """Rows of a LoRA that choose the first of RATES; then, at many calls, what each rate got right."""
    monkeypatch.setitem(METHODS, "LoRA", replace(METHODS["LoRA"], candidates=RATES))
    rows = [row(OURS, c, TUNING_SEED) for c in accuracy.TUNING_CLASSES]
    for changes, judge in zip(RATES, (20, 10, 15), strict=True):
        rows += [
            row("LoRA", c, TUNING_SEED, judge, changes=changes, budget=BUDGET)
            for c in accuracy.TUNING_CLASSES
        ]
    units = accuracy.tuning_long(["LoRA", "best of k"], rows)
    assert [u.changes for u in units] == [RATES[0], RATES[0], RATES[1], RATES[1]]  # steps are as chosen first
    assert {u.budget["once"] for u in units} == {accuracy.LONG}
    assert accuracy.tuning_long(["LoRA"], rows[:2]) == []  # nothing is chosen yet
    return rows, [
        row("LoRA", u.class_index, TUNING_SEED, judge, changes=u.changes, budget=u.budget)
        for u, judge in zip(units, at_long, strict=True)
    ]


def test_the_rate_of_a_long_training_is_chosen_a_second_time(monkeypatch):
    rows, again = tuned_twice(monkeypatch, (4, 4, 36, 36))
    short = accuracy.LONG_FROM - 1
    rows += [row(OURS, 4, once=short), row(OURS, 6, once=accuracy.LONG_FROM)]
    units = [u for u in accuracy.reporting(["LoRA"], [38], [38], rows) if u.method == "LoRA"]
    both = [u for u in units if u.class_index in (4, 6)]
    assert [u.changes for u in accuracy.missing(both, rows)] == [RATES[0]]  # the long one waits
    assert len(accuracy.to_do(both, rows)) == 2
    assert accuracy.chosen("LoRA", rows + again) == RATES[0]  # of short ones all stays as it was
    found = accuracy.missing(both, rows + again)
    assert [(u.class_index, u.changes) for u in found] == [(4, RATES[0]), (6, RATES[1])]


def test_of_equal_rates_of_a_long_training_the_first_choice_stays(monkeypatch):
    rows, again = tuned_twice(monkeypatch, (4, 30, 30, 4))
    assert accuracy.chosen("LoRA", rows + again, accuracy.LONG) == RATES[0]


def test_what_each_candidate_came_to_is_a_table_for_either_cost(monkeypatch, tmp_path, capsys):
    rows, again = tuned_twice(monkeypatch, (4, 4, 36, 36))
    out = tmp_path / "rows.jsonl"
    out.write_text("".join(json.dumps(r) + "\n" for r in rows + again))
    assert accuracy.main(["--table", "True", "--out", str(out), "--figure", str(tmp_path / "f.png")]) == 0
    first, second = capsys.readouterr().out.split("On the tuning classes, at 10,000 calls:")
    assert "| LoRA | 'rate': 0.02, 'steps': 1 | 0.50 | 0.50 | 2 |" in first
    assert "| LoRA | 'rate': 0.01, 'steps': 12 | 0.38 | 0.38 | 2 |" in first
    assert "| LoRA | 'rate': 0.01, 'steps': 1 | 0.90 | 0.90 | 2 |" in second
    assert "'steps': 12" not in second


def test_every_method_has_a_function_that_takes_its_settings():
    import inspect

    for name, method in METHODS.items():
        parameters = list(inspect.signature(getattr(rivals, method.learn)).parameters)[1:]
        for changes in ({}, *method.candidates):
            assert set(method.settings | changes) == set(parameters), name


def test_differences_are_paired_by_class_and_seed():
    mine = [row(OURS, judge=40), row(OURS, seed=39, judge=20), row(OURS, 4, judge=40)]
    judged = partial(accuracy_table.share, who="judge")
    assert accuracy_table.differences(mine, [row("LoRA", judge=30)], judged) == [0.25]
    plain = [row("plain prompt", seed=0, judge=10), row("plain prompt", 4, seed=0, judge=0)]
    assert accuracy_table.differences(mine, plain, judged) == [0.5, 1.0]
    few = {38: 0.2, 39: None}
    assert accuracy_table.differences(mine[:2], plain, lambda r: few.get(r["seed"], 0.0)) == [0.2]


def test_a_training_seed_counts_once_every_method_has_it(capsys):
    rows = [row(name, seed=0) for name in ("plain prompt", "precise phrase")]
    rows += [row(OURS, seed=seed) for seed in (38, 39)]
    rival = [row("best of k", seed=seed, budget=BUDGET) for seed in (38, 39)]
    units = [Unit(found["method"], 2, found["seed"]) for found in [*rows, *rival]]
    assert accuracy.rows_of_table(units, [*rows, *rival]) == [*rows, *rival]
    assert capsys.readouterr().out == ""
    of_table = accuracy.rows_of_table(units, [*rows, rival[0]])
    assert {found["seed"] for found in of_table} == {0, 38}
    assert accuracy.rows_of_table(units, [*rows, rival[1]]) == [*rows[:2], rows[3], rival[1]]
    assert "yet: 1\n" in capsys.readouterr().out


def test_tables_figure_and_sheet_are_made_of_what_is_there(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(accuracy_unit, "FILES", tmp_path)
    rows = [row(OURS, c, judge=38 - c) for c in (1, 2, 4)]
    rows += [row(name, c, 0, judge=4) for name in ("plain prompt", "precise phrase") for c in (2, 4)]
    kept = {"said": {"k": 5.0}, "each": {"calls": 120.0, "seconds": None}}
    rows += [row("best of k", c, judge=20, once=0, budget=BUDGET, **kept) for c in (2, 4)]
    out = tmp_path / "rows.jsonl"
    out.write_text("".join(json.dumps(r) + "\n" for r in rows))
    seeds = {OURS: 38, "plain prompt": 0, "precise phrase": 0, "best of k": 38}
    strips = [accuracy_unit.strip_of(name, 2, seed) for name, seed in seeds.items()]
    for strip in strips:
        strip.parent.mkdir(parents=True)
        Image.new("RGB", (394, 64), "green").save(strip)
    given = {"out": out, "figure": tmp_path / "figure.png", "seeds": [38], "common_seeds": [38]}
    accuracy.print_all(argparse.Namespace(**given))
    printed = capsys.readouterr().out
    assert "rows left out, as not every method has their class and seed yet: 1" in printed  # class 1
    assert "8 units count, of 0.1 core-hours" in printed  # 30 s each
    assert "Mean over rare senses (2 classes)" in printed
    assert "Mean over all senses (2 classes)" in printed
    assert "common senses" not in printed
    shares = "| class token | 2 × 1 | 0.88 | 0.88 | 0.88 | – | 0.90 | 0.70 |"
    assert f"{shares} 1,000 | 9 | 24 | 0.10 | 1,960 | 600 |" in printed
    assert "Mean over rare senses that nothing was chosen on (1 classes)" in printed
    assert "| best of k | 2 × 1 | 0.50 |" in printed
    assert "| 0 | 9 | 120 | 0.50 | 4,800 |" in printed  # k times a plain image's seconds
    assert "| best of k | +0.38 [+0.06, +0.69] (2) | +0.38 [" in printed
    assert "| best of k | +0.35 (1) | +0.35 (1) | " in printed  # class 2 chose something
    assert (tmp_path / "figure.png").exists()
    pictures = tmp_path / "figure_pictures.jpg"
    assert Image.open(pictures).getpixel((accuracy_table.LEFT + 20, 20))[1] > 100
    # A sheet is not replaced by one with gaps.
    strips[0].unlink()
    before = pictures.read_bytes()
    accuracy.print_all(argparse.Namespace(**given))
    assert f"no pictures: {strips[0]} and 0 more are missing" in capsys.readouterr().out
    assert pictures.read_bytes() == before


def test_common_senses_have_a_table_of_their_own(capsys):
    rows = [row(OURS, c, judge=judge) for c, judge in ((1, 40), (2, 20))]
    accuracy_table.show(rows, [OURS], OURS, set(), accuracy.LONG_FROM)
    of_common = capsys.readouterr().out.split("Mean over common senses (1 classes)")[1]
    assert "| class token | 1 × 1 | 1.00 |" in of_common.split("Mean over all")[0]


def test_long_and_short_trainings_have_tables_of_their_own(capsys):
    rows = [row("plain prompt", c, seed=0, judge=4) for c in (2, 4)]
    rows += [row(OURS, judge=40, once=5000), row(OURS, seed=39, judge=20, once=4999)]
    rows += [row("LoRA", judge=30), row("LoRA", seed=39, judge=10), row(OURS, 4, judge=40, once=4999)]
    accuracy_table.show(rows, ["plain prompt", OURS, "LoRA"], OURS, set(), 5000)
    told = capsys.readouterr().out
    long = told.split("took 5,000 calls or more (1 classes)")[1].split("Mean over")[0]
    short = told.split("took fewer than 5,000 calls (2 classes)")[1].split("Mean over")[0]
    assert "| class token | 1 × 1 | 1.00 |" in long
    assert "| plain prompt | 1 × 1 |" in long
    assert "| LoRA | 1 × 1 | 0.75 |" in long
    assert "| class token | 2 × 1 | 0.75 |" in short
    assert "| LoRA | 1 × 1 | 0.25 |" in short


def test_a_check_that_fails_is_an_exit_code(tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    units = accuracy.checks(["LoRA", "hard prompt", "plain prompt"])
    assert [unit.method for unit in units] == ["LoRA", "hard prompt"]
    more = {"check": True, "seed": TUNING_SEED, "budget": units[0].budget}
    rows = [row(unit.method, accuracy.CHECKED_CLASS, judge=40) | more for unit in units]
    given = ["--methods", "LoRA", "hard prompt", "plain prompt", "--check", "True", "--out", str(out)]
    out.write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert accuracy.main(given) == 0
    out.write_text("".join(json.dumps(r | {"judge": 20}) + "\n" for r in rows))
    assert accuracy.main(given) == 1
    assert "| hard prompt | bat | 1.00 | 0.50 | 1.00 | no |" in capsys.readouterr().out


def test_a_unit_that_fails_is_told_and_keeps_no_other_from_being_done(tmp_path, capsys, monkeypatch):
    def one_unit(unit):
        if unit.class_index == 2:
            raise WorkError("loss nan")
        return row(unit.method, unit.class_index)

    class Pool(ThreadPoolExecutor):
        """Without processes, which would not see the fakes."""

    monkeypatch.setattr(accuracy, "one_unit", one_unit)
    monkeypatch.setattr(accuracy, "ProcessPoolExecutor", Pool)
    out = tmp_path / "rows.jsonl"
    units = [Unit(OURS, 2, 38), Unit(OURS, 4, 38)]
    assert accuracy.carry_out(units, out, 1) == 1
    assert [json.loads(line)["class_index"] for line in out.read_text().splitlines()] == [4]
    assert "class token, class 2, seed 38: failed: loss nan" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["--workers", "0"], "argument --workers: '0' was given; allowed is a number from 1 to 1024"),
        (["--seeds", "x"], "argument --seeds: 'x' was given; allowed is a number from 1 to 4000"),
        (["--methods", "magic"], "argument --methods: invalid choice: 'magic'"),
    ],
)
def test_wrong_usage_is_one_line(given, told, capsys):
    with pytest.raises(SystemExit) as ended:
        accuracy.main(given)
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith(f"accuracy.py: error: {told}")
    assert said.count("\n") == 1
