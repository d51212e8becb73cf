"""What the benchmarks share: the machine that they run on, and timing of several things in turn."""

import datetime
import json
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch

from discriminative.precision import has_bf16_units
from discriminative.records.environment import device_name
from discriminative.records.files import write_json


def environment(device: torch.device) -> dict:
    """Date, hardware and versions: what a figure is worth nothing without."""
    on = device_name(device)
    if device.type == "cpu":
        units = "with" if has_bf16_units() else "no"
        on = f"{on}, {torch.get_num_threads()} threads, {units} bf16 units"
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "hardware": on,
        "versions": {name: version(name) for name in ("torch", "diffusers", "transformers", "timm")},
        "command": " ".join(["python", *sys.orig_argv[1:]]),
    }


def wait(device: torch.device) -> None:
    """Until the device has done all that it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """How long ``work`` takes, or what it says of itself where it returns a float."""
    wait(device)
    start = time.perf_counter()
    told = work()
    wait(device)
    return told if isinstance(told, float) else time.perf_counter() - start


def alternating(
    cases: dict[str, Callable[[], object]], rounds: int, device: torch.device, warm_up: int = 1
) -> dict[str, list[float]]:
    """Seconds of every case in every round. Cases take turns, so that what else the machine does meets
    them all alike."""
    for _ in range(warm_up):
        for work in cases.values():
            work()
    found = {name: [] for name in cases}
    for _ in range(rounds):
        for name, work in cases.items():
            found[name].append(seconds(work, device))
    return found


def ratios(found: dict[str, list[float]], of: str, to: str) -> float:
    """Median over the rounds of how many times longer ``of`` takes than ``to`` in the same round."""
    return statistics.median(a / b for a, b in zip(found[of], found[to], strict=True))


def medians(found: dict[str, list[float]]) -> dict[str, float]:
    """Median seconds of every case."""
    return {name: statistics.median(times) for name, times in found.items()}


def finish(result: dict, out: Path | None) -> None:
    """Print the result, and write it where that was asked for."""
    print(json.dumps(result, indent=2))
    if out:
        write_json(out, result)
