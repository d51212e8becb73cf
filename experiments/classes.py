"""Learn and evaluate every ambiguous or fine-grained class of the miniature, and print the README's table.

    python experiments/classes.py                       # with the defaults; classes that are done are skipped
    python experiments/classes.py --preset paper
    python experiments/classes.py --gradient_mode last --exp_id last    # any other flag goes to run.py
    python experiments/classes.py --preset paper --table True           # only print what is there

Each class is one ``run.py --model miniature --class_index N --train True --evaluate True --test_size 100``, with batches and without
gradient checkpointing as suit a small model: neither changes more than rounding.
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from config import RunConfig, with_preset
from miniature.scenes import CLASSES, SceneClass
from outputs import RunFolder, class_folder
from run import boolean, build_parser

ROOT = Path(__file__).parent.parent
TEST_SIZE = 100


@dataclass(frozen=True)
class Run:
    """One class of one variant: the words for ``run.py``, what they mean, and where it puts its files."""

    scene_class: SceneClass
    argv: list[str]
    config: RunConfig

    @property
    def folder(self) -> RunFolder:
        return RunFolder(self.config.output_path, self.name, self.config.exp_id)

    @property
    def name(self) -> str:
        return class_folder(self.scene_class.index + 1, self.scene_class.label)

    @property
    def is_done(self) -> bool:
        """Whether a finished run of today's options is there: rows of older defaults must not stand in one table with new ones."""
        return self.folder.result.exists() and json.loads(self.folder.config.read_text())["config"] == asdict(self.config)


def plan(scene_class: SceneClass, output_path: str, extra: list[str]) -> Run:
    """The run of one class; ``extra`` are flags for ``run.py``."""
    todo = {"class_index": scene_class.index + 1, "train": True, "evaluate": True, "test_size": TEST_SIZE, "output_path": output_path}
    todo |= {"model": "miniature", "eval_batch_size": 50, "gradient_checkpointing": False}
    argv = [word for flag, value in todo.items() for word in (f"--{flag}", str(value))] + extra
    given = vars(build_parser().parse_args(argv))
    return Run(scene_class, argv, with_preset(given.pop("preset"), given))


def row(run: Run) -> str:
    """One line of the table."""
    result, training = json.loads(run.folder.result.read_text()), json.loads(run.folder.config.read_text())["training"]
    shares = [f"{result[f'{who}accuracy_{arm}']:.2f}" for who in ("", "judge_") for arm in ("baseline", "token")]
    c = run.scene_class
    cells = (c.index + 1, c.name, c.word, *shares, training["updates"], round(training["seconds"]), training["stopped_by"])
    return "| " + " | ".join(str(c) for c in cells) + " |"


def print_table(runs: list[Run], extra: list[str]) -> None:
    """The table of one variant, with the means by sense."""
    head = ("class", "to draw", "word", "guide without", "guide with", "judge without", "judge with", "updates", "seconds", "stopped by")
    print(f"\n`{' '.join(extra) or 'defaults'}`, {TEST_SIZE} unseen seeds\n\n| " + " | ".join(head) + " |\n|" + "-|" * len(head))
    done = [r for r in runs if r.is_done]
    for run in runs:
        c = run.scene_class
        print(row(run) if run in done else f"| {c.index + 1} | {c.name} | {c.word} | not there |" + " |" * (len(head) - 4))
    for kind in ("common", "rare"):
        rows = [json.loads(r.folder.result.read_text()) for r in done if r.scene_class.kind == kind]
        means = [
            f"{sum(r[f'{who}accuracy_{arm}'] for r in rows) / len(rows):.2f}"
            for who in ("", "judge_")
            for arm in ("baseline", "token")
            if rows
        ]
        print(f"| | mean of {len(rows)}, {kind} sense | | " + " | ".join(means) + " | | | |")


def carry_out(run: Run, threads: dict[str, str]) -> int:
    """Learn and evaluate one class in a process of its own; its output goes to ``<output_path>/logs``."""
    log = Path(run.config.output_path) / "logs" / f"{run.config.exp_id}-{run.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as out:
        command = [sys.executable, str(ROOT / "run.py"), *run.argv]
        return subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, env=os.environ | threads).returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--output_path", default="results/classes")
    parser.add_argument("--kinds", nargs="+", choices=("common", "rare"), default=["rare", "common"], help="senses to run, in this order")
    parser.add_argument("--workers", type=int, default=1, help="classes at a time; with more than one, each has one thread")
    parser.add_argument("--table", type=boolean, default=False, help="print the table of what is there, and stop")
    args, extra = parser.parse_known_args()
    runs = [plan(c, args.output_path, extra) for c in CLASSES if c.kind != "plain"]
    failed = 0
    if not args.table:
        wanted = sorted((r for r in runs if r.scene_class.kind in args.kinds), key=lambda r: args.kinds.index(r.scene_class.kind))
        left, threads = [r for r in wanted if not r.is_done], {} if args.workers == 1 else {"OMP_NUM_THREADS": "1"}
        with ThreadPoolExecutor(args.workers) as pool:
            for r, code in zip(left, pool.map(lambda r: carry_out(r, threads), left), strict=True):
                print(f"class {r.scene_class.index + 1} ({r.scene_class.name}): exit code {code}", flush=True)
                failed += code != 0
    print_table(runs, extra)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
