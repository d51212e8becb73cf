"""Try settings of the method over classes and training seeds, and print how good the tokens are.

    python -m experiments.method --settings default "first stage only" --workers 2      # on the eight
    tuning classes
    python -m experiments.method --settings default --seeds 35 36 37
    python -m experiments.method --table True                                  # only print what is there

Resumable: every finished run is one JSON line in ``--out``; runs that are there are skipped. Images are
    judged on seeds that neither
training, validation nor the evaluation of ``run.py`` uses. Only the eight tuning classes choose defaults;
of the others, which are for reporting, one may be named to find out what is wrong with it.
"""

import argparse
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from dataclasses import fields
from operator import itemgetter
from pathlib import Path

from config import RunConfig, with_preset
from experiments.paired import difference, pairs, ratio
from experiments.rows import add, read
from miniature.scenes import CLASSES
from run import boolean

# Lexical and fine-grained, easy and hard ones of both; the first four also chose the first defaults.
TUNING_CLASSES = (2, 8, 24, 26, 6, 14, 20, 30)
CLASS_INDICES = range(1, len(CLASSES) + 1)
TUNING_SEEDS = range(
    700_000, 700_040
)  # validation counts from 500,000, training from 1,000,000, run.py's evaluation from 0


# What each differs in from the defaults of the day. "default" is whatever stands in config.py.
SETTINGS = {
    "default": {},
    "drawn as evaluated": {"training_sampler": "same", "jump_at": "0@8;0.13"},
    **{
        f"start {start}": {"start": start}
        for start in ("class", "vocabulary", "initializer", "class+vocabulary")
    },
    "first stage only": {"jump_at": "0@8"},
    "second stage only": {"jump_at": "0.07@15"},
    "two stages": {"jump_at": "0@8;0.07@15"},
    "second stage .5": {"jump_at": "0@8;0.5@15"},
    "second stage last step": {"jump_at": "0@8;1@12"},
    "skip": {"gradient_mode": "skip", "jump_at": "1"},
    "last": {"gradient_mode": "last"},
    **{f"rate {rate}": {"relative_rate": rate} for rate in (0.03, 0.08)},
    **{f"bound {bound}": {"max_token_norm": bound} for bound in (0.0, 1.15, 1.6)},
    "full rate to the end": {"fine_rate": 1.0},
    "12 images an update": {"images_per_update": 12, "relative_rate": 0.02},
    "augment": {"augment": True},
    "noises of 4 updates": {"noise_pool": 4},
    **{f"validation in {steps} steps": {"training_sampler": f"dpmsolver++@{steps}"} for steps in (6, 8)},
    "stop at .95": {"stop_validation_accuracy": 0.95},
    "enough .93": {"enough_validation_accuracy": 0.93},
    "float32": {"mixed_precision": "no"},
    **{f"certainty {share}": {"validation_certainty": share} for share in (0.0, 0.85)},
    "validation of 6 first": {"validation_size": 6, "confirm_size": 42},
    "two guides": {"classifier": "miniature,miniature-judge2"},
}
# Defaults of before, by which rows of then are named; rows of options that went have names of their own.
SETTINGS |= {
    "enough .93, bound 1.6": SETTINGS["enough .93"] | SETTINGS["bound 1.6"],
    "enough .93, certainty 0": SETTINGS["enough .93"] | SETTINGS["certainty 0.0"],
    "enough .93, certainty 0, two guides": SETTINGS["enough .93"]
    | SETTINGS["certainty 0.0"]
    | SETTINGS["two guides"],
}
OPTIONS = {f.name for f in fields(RunConfig)}


def one_run(setting: str, class_index: int, seed: int) -> dict:
    """Learn one token and judge it; the figures as one row."""
    import torch

    from classifiers import load_classifier
    from discriminative.diffusion.models import load_models
    from discriminative.guides.classifier import Guide
    from discriminative.guides.labels import prompt_class_name
    from discriminative.hub import quiet_libraries
    from discriminative.records.layout import RunFolder
    from discriminative.records.scores import spread
    from discriminative.tokens.class_token import ClassToken
    from discriminative.tokens.prompts import TEMPLATES, fill
    from trainer import train

    torch.set_num_threads(1)
    quiet_libraries()
    to = torch.device("cpu"), torch.float32
    given = {"model": "miniature", "classifier": "miniature", "eval_batch_size": 40}
    given |= {"class_index": class_index, "seed": seed}
    changes = SETTINGS[setting]
    config = with_preset("default", given | {k: v for k, v in changes.items() if k in OPTIONS})
    learning = config.learning(**{k: v for k, v in changes.items() if k not in OPTIONS})
    guides = [load_classifier(name, *to) for name in config.classifier.split(",")]
    judge = load_classifier("miniature-judge", *to)
    models = load_models("miniature", *to)
    token = ClassToken(models, config.placeholder_token, config.initializer_token, config.num_vectors)
    name = prompt_class_name(guides[0].labels[class_index - 1])
    asked = [Guide(guide, class_index - 1) for guide in guides]
    with tempfile.TemporaryDirectory() as folder:
        training = train(learning, token, asked, name, RunFolder(folder, "c", "e"))
    prompt = fill(TEMPLATES[0], token.placeholder, name)
    images = token.sample([prompt] * len(TUNING_SEEDS), list(TUNING_SEEDS), config.sampler)  # (40, 3, 64, 64)
    with torch.no_grad():
        guide_logits, _ = guides[0].look(images)  # (40, K)
        judge_logits, features = judge.look(images)  # (40, K), (40, D)
    right = guide_logits.argmax(1) == class_index - 1  # (40,)
    return {
        "setting": setting,
        "differs": SETTINGS[setting],
        "class_index": class_index,
        "seed": seed,
        "guide": right.float().mean().item(),
        "judge": (judge_logits.argmax(1) == class_index - 1).float().mean().item(),
        "diversity": spread(features[right]),
        "updates": len(training.rows),
        "kept": training.kept_updates,
        "seconds": round(training.seconds, 1),
        "stopped_by": training.stopped_by,
        "precision": training.precision,
        "norm": token.norm(),  # over a word's
    }


def finished(pool: Executor, work: Callable[..., dict], jobs: list[tuple]) -> Iterator[dict]:
    """The rows of ``jobs``, each the arguments of ``work``, as they come; the pool takes no more after it.

    Raises:
        Exception: whatever a job did; those that have not begun are dropped.
    """
    try:
        for future in as_completed([pool.submit(work, *job) for job in jobs]):
            yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def print_table(rows: list[dict]) -> None:
    """A line for each setting: guide/judge by class, means over seeds, and the means over classes."""
    classes = sorted({r["class_index"] for r in rows}, key=[*TUNING_CLASSES, *CLASS_INDICES].index)
    print(
        "| setting | "
        + " | ".join(str(c) for c in classes)
        + " | mean | least judge | diversity | seconds | norm |"
    )
    print("|-" * (len(classes) + 6) + "|")
    for setting in dict.fromkeys(r["setting"] for r in rows):
        mine = [r for r in rows if r["setting"] == setting]

        def mean(key: str, of: list[dict]) -> float:
            return sum(r[key] for r in of) / len(of)

        by_class = [[r for r in mine if r["class_index"] == c] for c in classes]
        cells = [f"{mean('guide', of):.2f}/{mean('judge', of):.2f}" if of else "" for of in by_class]
        ends = [
            f"{mean('guide', mine):.2f}/{mean('judge', mine):.2f}",
            f"{min(r['judge'] for r in mine):.2f}",
        ]
        varied = [r["diversity"] for r in mine if r.get("diversity") is not None]  # older rows have none
        ends += [
            f"{sum(varied) / len(varied):.3f}" if varied else "",
            f"{mean('seconds', mine):.0f}",
            f"{mean('norm', mine):.1f}",
        ]
        print(f"| {setting} | " + " | ".join(cells + ends) + " |")


def print_comparison(rows: list[dict], base: str) -> None:
    """Each setting against ``base``, over the classes and seeds that both have, with intervals of 95 %."""
    of = {
        setting: [r for r in rows if r["setting"] == setting]
        for setting in dict.fromkeys(r["setting"] for r in rows)
    }
    if base not in of:
        print(f"\nno row of the setting {base!r} to compare with")
        return
    print(
        f"\n| against {base!r} | tokens | guide | judge | diversity, ratio | updates, ratio | seconds, "
        "ratio |\n" + "|-" * 7 + "|"
    )
    for setting, mine in of.items():
        both = pairs(mine, of.get(base, []))
        if setting != base and both:
            cells = [difference(both, itemgetter(who)) for who in ("guide", "judge")]
            cells += [
                ratio(both, lambda r, key=key: r.get(key)) for key in ("diversity", "updates", "seconds")
            ]
            print(f"| {setting} | {len(both)} | " + " | ".join(cells) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=["default"])
    parser.add_argument(
        "--classes",
        nargs="+",
        type=int,
        choices=CLASS_INDICES,
        metavar="N",
        default=TUNING_CLASSES,
        help="default: the tuning ones",
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[35])
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--out", type=Path, default=Path("results/method.jsonl"))
    parser.add_argument("--against", default="default", help="setting that the others are compared with")
    parser.add_argument(
        "--table", type=boolean, default=False, help="print the table of what is there, and stop"
    )
    args = parser.parse_args()
    if not args.table:
        done = {
            (r["setting"], r["class_index"], r["seed"])
            for r in read(args.out)
            if r["differs"] == SETTINGS.get(r["setting"])
        }
        jobs = [
            (s, c, seed)
            for seed in args.seeds
            for s in args.settings
            for c in args.classes
            if (s, c, seed) not in done
        ]
        with ProcessPoolExecutor(args.workers, max_tasks_per_child=None) as pool:
            for row in finished(pool, one_run, jobs):
                add(args.out, row)
                print(
                    f"{row['setting']}, class {row['class_index']}, seed {row['seed']}: "
                    f"{row['guide']:.2f}/{row['judge']:.2f} in {row['seconds']} s",
                    flush=True,
                )
    print_table(read(args.out))
    print_comparison(read(args.out), args.against)


if __name__ == "__main__":
    main()
