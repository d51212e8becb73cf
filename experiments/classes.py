"""Learn and evaluate every ambiguous or fine-grained class of the miniature, and print the README's table.

    python experiments/classes.py                       # with the defaults; classes that are done are skipped
    python experiments/classes.py --preset paper
    python experiments/classes.py --table True          # only print what is there, both presets

Each class is one ``run.py --model miniature --class_index N --train True --evaluate True --test_size 100``, with batches and without
gradient checkpointing as suit a small model: neither changes more than rounding.
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from config import PRESETS, with_preset
from miniature.scenes import CLASSES
from outputs import RunFolder, class_folder
from run import boolean

ROOT = Path(__file__).parent.parent
TEST_SIZE = 100


def folder_of(output_path: str, preset: str, scene_class) -> RunFolder:
    """Where ``run.py`` puts a class."""
    return RunFolder(output_path, class_folder(scene_class.index + 1, scene_class.label), with_preset(preset, {}).exp_id)


def row(folder: RunFolder, scene_class) -> str:
    """One line of the table."""
    result, training = json.loads(folder.result.read_text()), json.loads(folder.config.read_text())["training"]
    shares = [f"{result[f'{who}accuracy_{arm}']:.2f}" for who in ("", "judge_") for arm in ("baseline", "token")]
    cells = (
        scene_class.index + 1,
        scene_class.name,
        scene_class.word,
        *shares,
        training["updates"],
        round(training["seconds"]),
        training["stopped_by"],
    )
    return "| " + " | ".join(str(c) for c in cells) + " |"


def print_table(output_path: str, preset: str, classes: list) -> None:
    """The table of one preset, with the means by sense."""
    head = ("class", "to draw", "word", "guide without", "guide with", "judge without", "judge with", "updates", "seconds", "stopped by")
    print(f"\n`--preset {preset}`, {TEST_SIZE} unseen seeds\n\n| " + " | ".join(head) + " |\n|" + "-|" * len(head))
    results = {}
    for c in classes:
        folder = folder_of(output_path, preset, c)
        if is_done(output_path, preset, c):
            print(row(folder, c))
            results[c] = json.loads(folder.result.read_text())
        else:
            print(f"| {c.index + 1} | {c.name} | {c.word} | not there |" + " |" * (len(head) - 4))
    for kind in ("common", "rare"):
        rows = [r for c, r in results.items() if c.kind == kind]
        means = [
            f"{sum(r[f'{who}accuracy_{arm}'] for r in rows) / len(rows):.2f}"
            for who in ("", "judge_")
            for arm in ("baseline", "token")
            if rows
        ]
        print(f"| | mean of {len(rows)}, {kind} sense | | " + " | ".join(means) + " | | | |")


def options(output_path: str, scene_class) -> dict:
    """The run's options besides the preset."""
    todo = {"class_index": scene_class.index + 1, "train": True, "evaluate": True, "test_size": TEST_SIZE, "output_path": output_path}
    return todo | {"model": "miniature", "eval_batch_size": 50, "gradient_checkpointing": False}


def is_done(output_path: str, preset: str, scene_class) -> bool:
    """Whether a finished run of today's options is there: rows of older defaults must not stand in one table with new ones."""
    folder = folder_of(output_path, preset, scene_class)
    if not folder.result.exists():
        return False
    return json.loads(folder.config.read_text())["config"] == asdict(with_preset(preset, options(output_path, scene_class)))


def run_class(args: argparse.Namespace, scene_class) -> int:
    """Learn and evaluate one class in a process of its own; its output goes to ``<output_path>/logs``."""
    name = class_folder(scene_class.index + 1, scene_class.label)
    log = Path(args.output_path) / "logs" / f"{args.preset}-{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(ROOT / "run.py"), "--preset", args.preset]
    command += [word for flag, value in options(args.output_path, scene_class).items() for word in (f"--{flag}", str(value))]
    threads = {} if args.workers == 1 else {"OMP_NUM_THREADS": "1"}
    with log.open("w") as out:
        return subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, env=os.environ | threads).returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="default")
    parser.add_argument("--output_path", default="results/classes")
    parser.add_argument("--kinds", nargs="+", choices=("common", "rare"), default=["rare", "common"], help="senses to run, in this order")
    parser.add_argument("--workers", type=int, default=1, help="classes at a time; with more than one, each has one thread")
    parser.add_argument("--table", type=boolean, default=False, help="print the table of what is there, and stop")
    args = parser.parse_args()
    classes = [c for c in CLASSES if c.kind != "plain"]
    if args.table:
        for preset in PRESETS:
            print_table(args.output_path, preset, classes)
        return 0
    wanted = sorted((c for c in classes if c.kind in args.kinds), key=lambda c: args.kinds.index(c.kind))
    left, failed = [c for c in wanted if not is_done(args.output_path, args.preset, c)], 0
    with ThreadPoolExecutor(args.workers) as pool:
        for c, code in zip(left, pool.map(lambda c: run_class(args, c), left), strict=True):
            print(f"class {c.index + 1} ({c.name}): exit code {code}", flush=True)
            failed += code != 0
    print_table(args.output_path, args.preset, classes)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
