"""One table of what the benchmarks have measured, from the files in experiments/speed/results.

python -m experiments.speed.table
"""

import argparse
import json
import statistics
from collections.abc import Iterator
from pathlib import Path

from experiments.rows import read
from experiments.speed.convergence import is_good, is_of_today

RESULTS = Path(__file__).parent / "results"


def load(name: str) -> dict:
    """A benchmark's result; empty where it was not run."""
    path = RESULTS / name
    return json.loads(path.read_text()) if path.exists() else {}


def of_update(found: dict) -> Iterator[tuple[str, str]]:
    """Ratios and shares of an update on the miniature."""
    for case, ratio in found["reference_over"].items():
        yield f"update on the miniature, {case}: times the reference's speed", f"{ratio:.1f}"
        yield (
            f"update on the miniature, {case}: share of bare model calls",
            f"{found['bare_share'][case]:.2f}",
        )


def of_startup(found: dict) -> Iterator[tuple[str, str]]:
    """How long the first step takes."""
    for over, ratio in found["first_step_over"].items():
        yield f"shell to first denoising step, over importing {over}", f"{ratio:.2f}"
    yield "run.py --help", f"{found['seconds']['run.py --help']:.2f} s"


def of_footprint(found: dict) -> Iterator[tuple[str, str]]:
    """Counted memory."""
    for name, counted in found["bytes"].items():
        yield f"tensors of an update, SD 1.4, --memory {name}", f"{counted['update'] / 1e9:.1f} GB"
    of_steps = found["miniature_bytes_of_last_steps"]
    for steps, peak in list(of_steps.items())[1:]:
        yield (
            f"tensors of an update, miniature, gradient through the last {steps} steps over the last one",
            f"{peak / of_steps['1']:.2f}",
        )


def of_gpu(found: dict) -> Iterator[tuple[str, str]]:
    """Speed and memory on a GPU."""
    for precision, part in found["precisions"].items():
        for case, row in part["updates"].items():
            yield (
                f"update at SD 1.4's shapes, {precision}, {case}",
                f"{row['seconds']:.2f} s, {row['reference_over']:.1f} times",
            )
        for name, kinds in part.get("settings", {}).items():
            yield (
                f"whole card, {precision}, --memory {name}",
                f"{max(k.get('card_gb', 0) for k in kinds.values()):.1f} GB",
            )


def of_dpt(found: dict) -> Iterator[tuple[str, str]]:
    """DPT: both stages' steps, and self-correction."""
    where = f"DPT at {found['probe']} of {found['shapes']}"
    if found["width"] != 1:
        where += f", width {found['width']:g}"
    over = found["correction"]["corrected_over_plain"]
    yield f"{where}: sampling with self-correction over without, {found['images']} images", f"{over:.1f}"
    training = found["training"]
    yield f"{where}: six whole forwards over a step of stage 1", f"{training['one_by_one_over_stage_1']:.1f}"
    for stage in ("stage 1", "stage 2"):
        yield (
            f"{where}: a step of {stage}, {found['batch_size']} samples",
            f"{training['seconds'][stage]:.1f} s, {training['bytes'][stage] / 1e9:.1f} GB of tensors",
        )


THOUSAND = 1000  # classes


def of_many_classes(found: dict) -> Iterator[tuple[str, str]]:
    """What one of many classes takes."""
    parts = found["figures"]
    for size, told in parts.get("sweep", {}).items():
        over = told["cpu"]["a class in the sweep over alone"]
        yield f"a class of the miniature in a sweep of {size}, over alone, in CPU seconds", f"{over:.2f}"
    for kind in ("growth", "growth, most"):
        if "memory" in parts:
            yield f"memory over 50 classes: {kind}", f"{parts['memory'][kind]:+.1%}"
    for name, told in parts.get("bytes", {}).items():
        for kind, size in told.items():
            yield f"bytes a class on disk, {name}, {kind}", f"{size:,}"
    for part in ("batch", "processes"):
        for name, told in parts.get(part, {}).items():
            yield f"{part}, {name}: speed over the first", f"{told['speed over the first']:.2f}"


def of_simulation(found: dict) -> Iterator[tuple[str, str]]:
    """Ten thousand classes on many workers."""
    base = found["figures"]["base"]
    where = f"{found['setting']['classes']:,} classes on {found['setting']['workers']} workers, simulated"
    yield f"{where}: makespan over the ideal", f"{base['makespan_over_ideal']['mean']:.3f}"
    yield f"{where}: work lost", f"{base['work_lost']['mean']:.2%}"
    seconds = found["seconds"]["training, mean"] + found["seconds"]["evaluation"]  # times the scale
    hours = seconds * THOUSAND / 3600
    yield "1,000 classes of the miniature, core-hours", f"{hours / found['scale']:.0f}"
    yield f"1,000 classes at {found['scale']} times the miniature's seconds, hours", f"{hours:.1f}"


def of_convergence(rows: list[dict]) -> Iterator[tuple[str, str]]:
    """How many tokens get good, and how soon."""
    for way in ("ours", "reference"):
        mine = [r for r in rows if r["way"] == way]
        if mine:
            yield f"tokens that are good on unseen seeds, {way}", f"{sum(map(is_good, mine))} of {len(mine)}"
            yield (
                f"seconds to that or to the end, {way}, median",
                f"{statistics.median(r['seconds'] for r in mine):.0f}",
            )
            yield f"bytes on disk a class, {way}, most", f"{max(r['bytes_on_disk'] for r in mine):,}"


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    print("| what | figure | hardware | date |\n|-|-|-|-|")
    parts = {
        "update.json": of_update,
        "startup.json": of_startup,
        "footprint.json": of_footprint,
        "gpu.json": of_gpu,
        "dpt.json": of_dpt,
        "dpt_sd14.json": of_dpt,
        "many_classes.json": of_many_classes,
        "many_classes_simulation.json": of_simulation,
    }
    for name, told in parts.items():
        found = load(name)
        for what, figure in told(found) if found and not found.get("tiny") else ():
            print(f"| {what} | {figure} | {found['hardware']} | {found['date']} |")
    rows = [r for r in read(RESULTS / "convergence.jsonl") if is_of_today(r)]
    for hardware in dict.fromkeys(r["hardware"] for r in rows):
        mine = [r for r in rows if r["hardware"] == hardware]
        for what, figure in of_convergence(mine):
            print(f"| {what} | {figure} | {hardware} | {max(r['date'] for r in mine)} |")


if __name__ == "__main__":
    main()
