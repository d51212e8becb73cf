"""Learn and measure every ambiguous class of the miniature, and print the tables of docs/results.md.

    python -m experiments.classes --seeds 35 36 37 --workers 2       # the defaults; what is done is skipped
    python -m experiments.classes --preset paper --workers 2
    python -m experiments.classes --gradient_mode last --exp_id last # any other flag goes to run.py
    python -m experiments.classes --table True                       # only print what is there, and draw it

Each token is one ``run.py --model miniature --class_index N --train True``, then measured on 100 seeds by
``measure.py``; so is each class without a token.
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from apps.provenance import is_learned
from config import RunConfig
from discriminative.records.layout import RunFolder, class_folder
from experiments import tables
from miniature.scenes import CLASSES, SceneClass
from run import boolean, build_parser, options_of

ROOT = Path(__file__).parent.parent
AMBIGUOUS = [c for kind in ("rare", "common") for c in CLASSES if c.kind == kind]


@dataclass(frozen=True)
class Run:
    """One token: the words for ``run.py``, what they mean, and where its files are."""

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
    def measured(self) -> Path:
        return self.folder.records / "measured.json"

    @property
    def without(self) -> Path:
        """What is measured without a token, for all tokens of the class."""
        return Path(self.config.output_path) / "without" / f"{self.name}.json"

    @property
    def is_learned(self) -> bool:
        """Whether a token of today's options is there: rows of older defaults must not stand in one table
        with new ones."""
        return is_learned(self.config, self.folder)

    @property
    def is_done(self) -> bool:
        """Whether it is measured too, and after it was learned."""
        there = self.is_learned and self.measured.exists() and self.without.exists()
        return there and self.measured.stat().st_mtime >= self.folder.token.stat().st_mtime

    def row(self) -> dict:
        """All that is known of the token, for the tables."""
        training = json.loads(self.folder.config.read_text())["training"]
        found = json.loads(self.measured.read_text())
        without = json.loads(self.without.read_text())
        c = self.scene_class
        named = {
            "class_index": c.index + 1,
            "name": c.name,
            "word": c.word,
            "kind": c.kind,
            "fine": c.fine,
            "seed": self.config.seed,
        }
        return named | {"training": training, "token": found, "without": without}


def plan(scene_class: SceneClass, seed: int, output_path: str, extra: list[str]) -> Run:
    """The run of one class and training seed; ``extra`` are flags for ``run.py``."""
    todo = {"class_index": scene_class.index + 1, "train": True, "seed": seed, "output_path": output_path}
    # Guide and judge by name, as a run records them.
    todo |= {"model": "miniature", "classifier": "miniature", "judge": "miniature-judge"}
    argv = [word for flag, value in todo.items() for word in (f"--{flag}", str(value))] + extra
    given = vars(build_parser().parse_args(argv))
    config = options_of(given)
    exp_id = f"{config.exp_id}_seed{seed}"
    return Run(scene_class, [*argv, "--exp_id", exp_id], replace(config, exp_id=exp_id))


def carry_out(run: Run, threads: dict[str, str]) -> int:
    """Learn and measure one token, each in a process of its own; their output goes to
    ``<output_path>/logs``."""
    log = Path(run.config.output_path) / "logs" / f"{run.config.exp_id}-{run.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    measure = ("-m", "experiments.measure")
    number = str(run.scene_class.index + 1)
    commands = [] if run.without.exists() else [[*measure, number, "--out", str(run.without)]]
    commands += [] if run.is_learned else [["-m", "run", *run.argv]]
    commands += [[*measure, number, str(run.folder.token)]]
    with log.open("w") as out:
        for command in commands:
            code = subprocess.run(
                [sys.executable, *command],
                stdout=out,
                stderr=subprocess.STDOUT,
                env=os.environ | threads | {"TQDM_DISABLE": "1"},
            ).returncode
            if code:
                return code
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--output_path", default="results/classes")
    parser.add_argument("--seeds", nargs="+", type=int, default=[35], help="training seeds")
    parser.add_argument(
        "--workers", type=int, default=1, help="tokens at a time; with more than one, each has one thread"
    )
    parser.add_argument(
        "--table",
        type=boolean,
        default=False,
        help="only print what is there, and draw the figure and the sheets",
    )
    args, extra = parser.parse_known_args()
    runs = [plan(c, seed, args.output_path, extra) for seed in args.seeds for c in AMBIGUOUS]
    failed = 0
    if not args.table:
        left = [r for r in runs if not r.is_done]
        threads = {} if args.workers == 1 else {"OMP_NUM_THREADS": "1"}
        with ThreadPoolExecutor(args.workers) as pool:
            for r, code in zip(left, pool.map(lambda r: carry_out(r, threads), left), strict=True):
                print(
                    f"class {r.scene_class.index + 1} ({r.scene_class.name}), seed {r.config.seed}: exit "
                    f"code {code}",
                    flush=True,
                )
                failed += code != 0
    done = [r for r in runs if r.is_done]
    print(f"\n`{' '.join(extra) or 'defaults'}`, {len(done)} of {len(runs)} tokens\n")
    if done:
        strips = [(r.without.with_suffix(".png"), r.measured.with_suffix(".png")) for r in done]
        tables.write_all(
            [r.row() for r in done],
            strips,
            Path(args.output_path),
            done[0].config.exp_id.rpartition("_seed")[0],
        )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
