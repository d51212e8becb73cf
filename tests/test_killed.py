"""Killed at random moments and started again, a run of several classes ends as one that was left alone.

    pytest -m slow tests/test_killed.py

Each run is a forked process with the heavy imports done, so that most of its time is work that can be killed.
"""

import csv
import json
import multiprocessing
import random
import time
from pathlib import Path

import pytest
import torch
from short_runs import small_validations
from test_session import SHORT

from discriminative.tokens.files import read_token
from run import main

pytestmark = pytest.mark.slow

KILLS = 30
CLASSES = "1-3"
LONGEST = 0.4  # share of an uninterrupted run after which a kill comes at the latest
# What no two runs share.
CLOCKED = {"time", "seconds", "environment", "peak_memory_gb", "training_seconds", "evaluation_seconds"}


def without_clocks(content):
    """A record without what the clock and the process say."""
    if isinstance(content, dict):
        return {k: without_clocks(v) for k, v in content.items() if k not in CLOCKED}
    return [without_clocks(value) for value in content] if isinstance(content, list) else content


def of_file(path: Path):
    """What two runs have to agree on."""
    if path.suffix == ".safetensors":
        return read_token(path)[1].tolist()
    if path.suffix == ".json":
        return without_clocks(json.loads(path.read_text().replace(str(path.parents[3]), "")))
    if path.suffix == ".jsonl":
        return [without_clocks(json.loads(line)) for line in path.read_text().splitlines()]
    if path.name == "summary.csv":
        return [without_clocks(row) for row in csv.DictReader(path.read_text().splitlines())]
    return path.read_bytes()


def contents(root: Path) -> dict[str, object]:
    """Every file of a finished run, but what is only there to save time."""
    paths = [p for p in root.rglob("*") if p.is_file() and "cache" not in p.relative_to(root).parts[0]]
    return {str(path.relative_to(root)): of_file(path) for path in paths}


def run(argv: list[str]) -> None:
    """The program, as a process of its own would run it."""
    torch.set_num_threads(1)
    with small_validations():
        raise SystemExit(main(argv))


def started(argv: list[str]) -> multiprocessing.Process:
    process = multiprocessing.get_context("fork").Process(target=run, args=(argv,))
    process.start()
    return process


def test_a_run_that_is_killed_at_thirty_random_moments_ends_as_one_that_was_not(names, tmp_path):
    options = SHORT | names | {"class_index": CLASSES, "max_epochs": 12, "checkpoint_seconds": 0}
    argv = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    argv += ["--train", "--evaluate"]
    began = time.monotonic()
    alone = started([*argv, "--output_path", str(tmp_path / "alone")])
    alone.join()
    whole = time.monotonic() - began
    assert alone.exitcode == 0
    wanted = contents(tmp_path / "alone")
    assert len([name for name in wanted if name.endswith("learned_embeds.safetensors")]) == 3
    rng = random.Random(0)
    kills = 0
    series = 0
    while kills < KILLS:
        root = tmp_path / f"killed{series}"
        series += 1
        while True:
            process = started([*argv, "--output_path", str(root)])
            process.join(rng.uniform(0.02, LONGEST) * whole if kills < KILLS else None)
            if not process.is_alive():
                assert process.exitcode == 0
                break
            process.kill()
            process.join()
            kills += 1
        assert contents(root) == wanted
    assert kills >= KILLS
