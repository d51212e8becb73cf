"""Seconds until a token is good on unseen seeds: ours with the defaults, the plain reference with the
paper's settings.

    python -m experiments.speed.convergence --seeds 35 36 37 --workers 2      # resumes; rows go to
    results/convergence.jsonl
    python -m experiments.speed.convergence --table True

Good is: right in at least .9 of 50 unseen images, by guide and by judge. Of both ways the time of the
first good token is told: of ours among those that a validation found the best so far, which is what a
training that is broken off leaves; of the reference among those after 10, 20, ... updates, the last one,
and the one that it keeps. Where none is good, the accuracy is that of the token kept, and the time that
of all updates. "To the end" is ours until training ends by itself, and the token kept. Both ways count
the loading of the models, but neither the libraries' import nor the judging.
"""

import argparse
import multiprocessing
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

import torch

from apps.earlier import read_record
from classifiers import load_classifier
from config import RunConfig, with_preset
from discriminative import VERSION
from discriminative.diffusion.models import load_models
from discriminative.guides.classifier import Guide
from discriminative.guides.labels import prompt_class_name
from discriminative.hub import quiet_libraries
from discriminative.records.files import write_lines, write_tensors
from discriminative.records.layout import RunFolder
from discriminative.tokens.class_token import ClassToken
from discriminative.tokens.drawing import draw_all
from discriminative.tokens.files import read_token, token_tensors
from discriminative.tokens.prompts import TEMPLATES, fill
from experiments.measure import SEEDS, Measured
from experiments.method import TUNING_CLASSES, finished
from experiments.rows import read
from experiments.speed import common
from experiments.speed.reference import bytes_of, learn_class
from run import boolean
from trainer import train

GOOD = 0.9
IMAGES = 50
EVERY = 10
PART = 10  # images that are drawn before a token that cannot be good any more is given up


def judged(bench: Measured, vector: torch.Tensor, at_least: float = 0.0) -> dict[str, float]:
    """Accuracy by guide and judge on unseen seeds of a token's vector (1, width), among the images drawn.

    Args:
        bench: of the token's class.
        at_least: no more are drawn once one of the two cannot reach this any more.
    """
    right = {"guide": [], "judge": []}
    bench.token.load(vector)
    prompt = fill(TEMPLATES[0], bench.token.placeholder, bench.class_name)
    for first in range(0, IMAGES, PART):
        seeds = list(SEEDS[first : first + PART])
        images = draw_all(bench.token, prompt, seeds, bench.config.sampler)  # (PART, 3, 64, 64)
        for who, verdicts in right.items():
            verdicts += bench.right(images, getattr(bench, who)).tolist()
        reachable = IMAGES - max(verdicts.count(False) for verdicts in right.values())
        if reachable / IMAGES < at_least:
            break
    return {who: fmean(verdicts) for who, verdicts in right.items()}


def is_good(row: dict) -> bool:
    """Whether guide and judge agree that the token does."""
    return min(row["guide"], row["judge"]) >= GOOD


@dataclass(frozen=True)
class Point:
    """A token on the way: what it had cost by then, and its vector (1, width)."""

    updates: int
    images: int
    seconds: float
    vector: torch.Tensor


def first_good(bench: Measured, points: list[Point], kept: torch.Tensor) -> dict:
    """What the first good token had cost, and its accuracy; where none is good, all that was spent, and
    the accuracy of ``kept``."""
    judgements = ((point, judged(bench, point.vector, GOOD)) for point in points)
    point, told = next(((p, told) for p, told in judgements if is_good(told)), (points[-1], None))
    cost = {"updates": point.updates, "images": point.images, "seconds": point.seconds}
    return cost | (told or judged(bench, kept))


def ours(config: RunConfig) -> dict:
    """Learn one class with the defaults."""
    begin = time.perf_counter()
    to = (torch.device("cpu"), torch.float32)
    points = []
    guide = Guide(load_classifier("miniature", *to), config.class_index - 1)
    token = ClassToken(load_models("miniature", *to), config.placeholder_token, config.initializer_token)
    name = prompt_class_name(guide.classifier.labels[guide.target])

    def note(row: dict, _: torch.Tensor) -> None:
        if row["epoch"] == row["best_epoch"]:
            seconds = time.perf_counter() - begin
            points.append(Point(row["epoch"], row["images"], seconds, read_token(folder.partial_token)[1]))

    with tempfile.TemporaryDirectory() as out:
        folder = RunFolder(out, "c", "e")
        training = train(config.learning(), token, [guide], name, folder, note)
        write_tensors(folder.token, token_tensors(token), {})
        seconds = time.perf_counter() - begin
        size = bytes_of(folder.records)  # without images, which the reference writes none of
    kept = token.vector.detach()
    bench = Measured(config.class_index, None)
    points.append(Point(len(training.rows), training.images, seconds, kept))
    to_the_end = {"updates": len(training.rows), "images": training.images, "seconds": seconds} | judged(
        bench, kept
    )
    return first_good(bench, points, kept) | {"to_the_end": to_the_end, "bytes_on_disk": size}


def reference(config: RunConfig) -> dict:
    """Learn one class as the official program does."""
    with tempfile.TemporaryDirectory() as out:
        _, rows = learn_class(config, Path(out))
        size = bytes_of(Path(out))
    kept = 1 + min(
        range(len(rows)), key=lambda i: rows[i]["loss"]
    )  # updates after which the official program keeps its token
    tried = sorted({kept, len(rows), *range(EVERY, len(rows), EVERY)})
    points = [
        Point(n, n * config.images_per_update, rows[n - 1]["seconds"], rows[n - 1]["vector"]) for n in tried
    ]
    return first_good(Measured(config.class_index, None), points, rows[kept - 1]["vector"]) | {
        "bytes_on_disk": size
    }


WAYS = {"ours": (ours, "default"), "reference": (reference, "paper")}


def cells(rows: list[dict]) -> list[str]:
    """Columns of one way of one class: how many are good, and medians of accuracy and cost."""
    middle = {
        key: statistics.median(r[key] for r in rows)
        for key in ("guide", "judge", "updates", "images", "seconds")
    }
    good = f"{sum(map(is_good, rows))} of {len(rows)}"
    return [
        good,
        f"{middle['guide']:.2f} / {middle['judge']:.2f}",
        *(f"{middle[key]:.0f}" for key in ("updates", "images", "seconds")),
    ]


def times_as_long(theirs: list[dict], mine: list[dict]) -> str:
    """Median seconds of ``theirs`` over those of ``mine``: from below where not all of theirs are good,
    "" where not all of mine."""
    if not all(map(is_good, mine)):
        return ""
    ratio = statistics.median(r["seconds"] for r in theirs) / statistics.median(r["seconds"] for r in mine)
    return ("" if all(map(is_good, theirs)) else "> ") + f"{ratio:.1f}"


def print_table(rows: list[dict]) -> None:
    """Both ways class by class and over all, medians over the training seeds that both have, and the
    ratios where ours are good."""
    parts = [
        f"{way}: good | guide / judge | updates | images | s"
        for way in ("ours", "ours to the end", "reference")
    ]
    print(f"| class | {' | '.join(parts)} | ratio | ... to the end |")
    print("|-" * 18 + "|")
    of = {way: {(r["class_index"], r["seed"]): r for r in rows if r["way"] == way} for way in WAYS}
    both = sorted(of["ours"].keys() & of["reference"].keys())
    groups = {str(c): [key for key in both if key[0] == c] for c in dict.fromkeys(c for c, _ in both)}
    for name, keys in (groups | ({"all": both} if len(groups) > 1 else {})).items():
        mine, theirs = ([of[way][key] for key in keys] for way in WAYS)
        ends = [r["to_the_end"] for r in mine]
        ratios = [times_as_long(theirs, way) for way in (mine, ends)]
        print(f"| {name} | " + " | ".join([*cells(mine), *cells(ends), *cells(theirs), *ratios]) + " |")


def print_tables(rows: list[dict]) -> None:
    """A table for each machine; rows of other options than today's are left out, and counted."""
    today = [r for r in rows if is_of_today(r)]
    for hardware in dict.fromkeys(r["hardware"] for r in today):
        print(f"\n{hardware}:\n")
        print_table([r for r in today if r["hardware"] == hardware])
    if len(today) < len(rows):
        print(f"\n{len(rows) - len(today)} rows of other options are left out")


def identity(row: dict) -> tuple:
    """What a row is the only one of."""
    return row["way"], row["class_index"], row["seed"], row["hardware"]


def is_of_today(row: dict) -> bool:
    """Whether a row's token was learned with what its way is told today."""
    today = options(row["way"], row["class_index"], row["seed"])
    then, constants = read_record(row | {"config": row["options"]})
    if row["way"] == "reference":  # takes two steps whatever the options say
        then["gradient_mode"] = today.gradient_mode
    return asdict(RunConfig()) | then == asdict(today) and constants == today.learning().constants


def options(way: str, class_index: int, seed: int) -> RunConfig:
    """What one way of learning one class is told."""
    given = {
        "model": "miniature",
        "class_index": class_index,
        "seed": seed,
        "train": True,
        "device": "cpu",
        "eval_batch_size": 12,
    }
    return with_preset(WAYS[way][1], given)


def warm_up(threads: int) -> None:
    """Have a process import what both ways need: the first token is not to wait for it."""
    torch.set_num_threads(threads)
    quiet_libraries()
    load_models("miniature", torch.device("cpu"), torch.float32)


def one_row(way: str, class_index: int, seed: int) -> dict:
    """Learn one class in one way, and judge it; the figures as one row."""
    config = options(way, class_index, seed)
    named = {"way": way, "class_index": class_index, "seed": seed, "options": asdict(config)}
    named |= {"version": VERSION, "constants": config.learning().constants}
    return named | WAYS[way][0](config) | common.environment(torch.device("cpu"))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--classes", nargs="+", type=int, default=TUNING_CLASSES, help="of the miniature, from 1"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[35], help="training seeds")
    parser.add_argument(
        "--workers", type=int, default=1, help="tokens at a time; with more than one, each has one thread"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("results/convergence.jsonl"), help="JSON lines, one a token"
    )
    parser.add_argument(
        "--table", type=boolean, default=False, help="print the table of what is there, and stop"
    )
    args = parser.parse_args()
    rows = read(args.out)
    threads = 1 if args.workers > 1 else torch.get_num_threads()
    torch.set_num_threads(threads)
    here = common.environment(torch.device("cpu"))["hardware"]
    # In turns: what else the machine does meets both ways alike.
    jobs = [(way, c, seed) for seed in args.seeds for c in args.classes for way in WAYS]
    done = [identity(r)[:3] for r in rows if is_of_today(r) and r["hardware"] == here]
    left = [job for job in jobs if job not in done] if not args.table else []
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.workers, context, initializer=warm_up, initargs=(threads,)) as pool:
        for row in finished(pool, one_row, left):
            rows = [r for r in rows if identity(r) != identity(row)] + [row]  # none of older options
            write_lines(args.out, rows)
            print(
                "{way}, class {class_index}, seed {seed}: {guide:.2f}/{judge:.2f}, {seconds:.0f} s".format(
                    **row
                ),
                flush=True,
            )
    print_tables(rows)


if __name__ == "__main__":
    main()
