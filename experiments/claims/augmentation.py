"""Claim (ii): do a class token's pictures help where real ones are few? Eight ambiguous classes.

    python -m experiments.claims.augmentation --workers 2      # goes on where it broke off
    python -m experiments.claims.augmentation --table True     # only the tables and the figure

Expect six to seven core-hours, for 1, 2, 4, 8 and 16 shots: 320 tokens by clean guides and 64 by the full
one, 320 inverted words, 36,000 pictures, 800 trainings of a small network from scratch, by the same function
as ``python -m apps.augment``. The figure to expect: with one and two shots the token's pictures gain .20 and
.24 over strong augmentation, with 16 nothing. Everything is made below ``--output_path``; a finished unit is
a line of ``--out``. The targets are printed with met or missed.

Training, validation and test pictures are renders of separate random streams. All arms have the same number
of steps, the same eight seeds (shots, weights and order of the pictures), and five settings that are tried
on the validation pictures, with two of the seeds. "Clean" is a guide that saw the n shots alone; "full" is
the miniature's own, which saw hundreds of pictures of these classes. Equal cost is one of images: the plain
prompt may draw as many as the token's learning did, and those that the token draws. In passes through the
UNet that is more than the token's.

The words were fixed before any result: the first four on which no default of the method was chosen.
"""

import argparse
import sys
import time
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import fmean

import torch

from apps.augment.folders import Pictures
from apps.augment.network import Network
from apps.augment.training import TrainingSettings, logits_of, train
from discriminative.command_line import OneLineParser, boolean, run_program, whole_number
from discriminative.hub import quiet_libraries
from discriminative.records.files import write_tensors
from experiments.claims import augmentation_pictures as made
from experiments.claims.augmentation_pictures import SEEDS, SHOTS, TAKEN, WORDS, Place
from experiments.claims.augmentation_plan import ARMS, DRAWING, TUNING_SEEDS, Job, Plan
from experiments.claims.augmentation_table import tell
from experiments.method import finished
from experiments.rows import add, read

ROWS = Path(__file__).parents[1] / "results" / "claims_augmentation.jsonl"
FIGURE = Path(__file__).parents[2] / "docs" / "images" / "claims_augmentation.png"
NAME = "augmentation.py"
STEPS = 200
BATCH = 16
# Core-seconds of a unit on the machine of docs/results.md, until rows say better.
SECONDS = {"renders": 10.0, "guide": 10.0, "words": 16.0, "drawing": 5.0, "training": 10.0, "right": 1.0}


# Doing one unit.


def do(job: Job, output_path: Path) -> dict:
    """The row of a unit, done."""
    torch.set_num_threads(1)
    quiet_libraries()
    began = time.process_time()
    place = Place(output_path)
    found = {}
    if job.kind == "renders":
        made.render_all(place)
    elif job.kind == "guide":
        model = trained(place, job)[0]
        weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
        write_tensors(place.guide(job.shots, job.seed), weights, {})
    elif job.kind == "words":
        c = TAKEN[job.what]
        if job.name == "inversion":
            found = made.invert_word(place, job.shots, job.seed, c)
        else:
            found = made.learn_token(place, job.name, job.shots, job.seed, c)
    elif job.kind == "drawing":
        guidance = dict(job.setting)["guidance"]
        if job.name == "plain":
            made.draw_pool(place, job.seed, guidance, WORDS[job.what])
        else:
            made.draw_class(place, job.name, job.shots, job.seed, guidance, TAKEN[job.what])
    elif job.kind == "right":
        found = {"right": round(made.share_right(added(place, job)), 4)}
    else:
        found = measured(place, job)
    return {"key": job.key} | found | {"seconds": round(time.process_time() - began, 1)}


def trained(place: Place, job: Job) -> tuple[torch.nn.Module, Network, int]:
    """The model of a training, its network, and how many generated pictures it had."""
    setting = dict(job.setting)
    recipe = {k: v for k, v in setting.items() if k not in DRAWING}
    recipe["augmentation"] = "basic" if job.name == "real" else "strong"
    number = job.shots * (2 if job.name == "twice" else 1)
    real = made.pictures_in(place.shots(job.seed), number)
    generated = added(place, job) if job.name in made.GENERATED else None
    settings = TrainingSettings(STEPS, BATCH, recipe.pop("learning_rate"), **recipe)
    network = made.network()
    share = setting.get("share", 0.0)
    model = train(network, len(TAKEN), real, settings, job.seed, made.CPU, generated, share)
    return model, network, len(generated) if generated else 0


def added(place: Place, job: Job) -> Pictures:
    """The pictures that an arm adds to the real ones in a training."""
    setting = dict(job.setting)
    arm = made.GENERATED[job.name]
    return arm(place, job.shots, job.seed, setting["guidance"], int(setting["number"]))


def measured(place: Place, job: Job) -> dict:
    """Accuracy of a training on the validation and on the test pictures, and on each class of the test."""
    model, network, number = trained(place, job)
    found = {"generated": number}
    for split in ("validation", "test"):
        pictures = made.pictures_in(place.split("val" if split == "validation" else "test"))
        predicted = logits_of(network, model, pictures.paths, made.CPU).argmax(1).tolist()
        right = [a == b for a, b in zip(predicted, pictures.labels, strict=True)]
        found[split] = round(fmean(right), 4)
        by_class = defaultdict(list)
        for label, is_right in zip(pictures.labels, right, strict=True):
            by_class[label].append(is_right)
        if split == "test":
            found["by_class"] = [round(fmean(by_class[k]), 4) for k in sorted(by_class)]
    return found


# How much is left.


def whole() -> dict[str, int]:
    """Units of the whole experiment, about: where seeds draw at both guidances depends on what is chosen."""
    cells = len(SHOTS) * len(SEEDS)
    classes = len(TAKEN)
    of_words = 2 * cells * classes
    return {
        "renders": 1,
        "guide": cells,
        "words": of_words + len(SEEDS) * classes,
        "drawing": round(1.25 * of_words) + 2 * len(SEEDS) * (2 * classes + len(WORDS)),
        "training": len(ARMS) * (cells + 4 * len(TUNING_SEEDS) * len(SHOTS)),
        "right": len(made.GENERATED) * cells,
    }


def seconds_left(rows: list[dict]) -> float:
    """Core-seconds of what is missing, by the mean of the units that are done."""
    left = 0.0
    for kind, number in whole().items():
        these = [r["seconds"] for r in rows if r["key"][0] == kind]
        mean = fmean(these) if len(these) > 10 else SECONDS[kind]
        left += max(0, number - len(these)) * mean
    return left


def carry_out(args: argparse.Namespace) -> None:
    """Do what is missing, round by round: what a round finds decides the next."""
    while True:
        rows = read(args.out)
        jobs = Plan(rows, args.output_path).ready()
        if not jobs:
            return
        left = seconds_left(rows) / 3600
        told = ", ".join(f"{sum(j.kind == kind for j in jobs)} {kind}" for kind in SECONDS)
        print(f"this round: {told}; about {left:.1f} core-hours left in all", flush=True)
        with ProcessPoolExecutor(args.workers) as pool:
            work = [(job, args.output_path) for job in jobs]
            for number, row in enumerate(finished(pool, do, work), start=1):
                add(args.out, row)
                kind, name, shots, seed, what, _ = row["key"]
                accuracy = f" test {row['test']:.3f}" if "test" in row else ""
                place = f"{kind} {name} {shots} shots, seed {seed}"
                print(f"{number}/{len(jobs)} {place}:{accuracy} {row['seconds']} s", flush=True)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.name = NAME
    parser.add_argument(
        "--workers", type=whole_number(1, 1024), default=2, help="units at a time, one thread each"
    )
    parser.add_argument(
        "--output_path", type=Path, default=Path("results/claims_augmentation"), help="folder of what is made"
    )
    parser.add_argument("--out", type=Path, default=ROWS, help="file of the rows")
    parser.add_argument("--figure", type=Path, default=FIGURE, help="file of the figure")
    parser.add_argument("--table", type=boolean, default=False, help="only print what is there")
    return parser


def dispatch(argv: list[str]) -> int:
    """Do what the command line asks for; the exit code."""
    args = build_parser().parse_args(argv)
    if not args.table:
        carry_out(args)
    tell(read(args.out), args.output_path, args.figure)
    return 0


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return run_program(NAME, dispatch, argv)


if __name__ == "__main__":
    sys.exit(main())
