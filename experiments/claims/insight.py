"""Claim (iii): does a class token reveal what its guide was trained on? A planted dose, and its response.

    python -m experiments.claims.insight --workers 2        # every unit that has no row yet: 3.8 core-hours
    python -m experiments.claims.insight --table True       # the tables, figure and pictures of what is there
    python -m experiments.claims.insight --group tuning --setting default    # settings are chosen on these

Guides differ in nothing but the rate at which one class shows a cue. Each teaches a token, which
``run.py --insight`` compares with the plain prompt on the same 200 noises. Expect the detector to see the
cues (true positive rate .97 and more, false .005 at most) and the model to draw them when asked. Expect the
share of pictures with the cue to rise with the rate: over the clean guide's token by .05 at rate .5, .17 at
.75, .30 at .95, with intervals over the six cues that hold 0. Backgrounds and one of the two tints are found,
second things never. Of the findings at .75 and .95 three in five are the cue: targets are missed.
"""

import argparse
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from apps.session import LearnedToken, Session
from discriminative.command_line import OneLineParser, boolean, run_program, whole_number
from discriminative.diffusion.models import load_models
from discriminative.guides.attributes import AT_ONCE, by_own
from discriminative.guides.classifier import Classifier
from discriminative.hub import quiet_libraries
from discriminative.precision import coarse_without_gradient, has_bf16_units
from discriminative.records.files import GAP, grid, write_image, write_text
from discriminative.records.insight import find_pairs, read_pictures
from discriminative.settings import SamplerSettings
from discriminative.tokens.class_token import ClassToken
from discriminative.tokens.drawing import draw_all
from discriminative.tokens.prompts import TEMPLATES, fill
from experiments.claims import insight_table
from experiments.claims.insight_world import (
    CPU,
    PHRASES,
    REPORTED,
    TUNING,
    WORK,
    Cue,
    clean_scenes,
    cue_scenes,
    detector,
    error_rates,
    guide,
    held_out_accuracy,
    kept,
    reliance,
)
from experiments.method import finished
from experiments.rows import add, read
from experiments.sheets import sheet_of
from miniature.scenes import CLASSES

ROWS = Path(__file__).parents[1] / "results" / "claims_insight.jsonl"
FIGURE = Path(__file__).parents[2] / "docs" / "images" / "claims_insight.png"
NAME = "insight.py"
SCORER = "python:experiments.claims.insight_world:detected"
RATES = (0.0, 0.25, 0.5, 0.75, 0.95)
ENDS = (RATES[0], RATES[-1])  # enough to choose a setting by
OTHER_RATES = (0.95,)  # at which the token of another class is learned, too
CUES = {"reported": REPORTED, "tuning": TUNING}
SEEDS = {"reported": (1, 2, 3), "tuning": (0,)}
RATES_OF = {"reported": RATES, "tuning": ENDS}
NOISES = 200
BEST_OF = 4  # plain pictures of which the guide chooses one
ASKED = 48  # pictures
SHOWN = 8
IN_SHEET = 4  # pictures in a row
SHEET_RATES = (0.0, 0.5, 0.95)
WHO = ("guide", "judge")
STEPS = 12
SAMPLER = SamplerSettings(STEPS, 7.0, scheduler="dpmsolver++")
BATCH = 12  # images sampled together
# What each differs in from a run's defaults; compared on the tuning cues alone.
SETTINGS = {
    "default": {"max_epochs": 90},  # one vector
    "later steps": {"max_epochs": 90, "jump_at": "0@8;0.5@12"},
    "later steps, to the end": {"max_epochs": 90, "jump_at": "0@8;0.5@12", "stop_validation_accuracy": 0.0},
    "larger steps": {"max_epochs": 90, "learning_rate": 0.004, "augment": True},
    "two vectors": {"max_epochs": 90, "num_vectors": 2},
    "four vectors": {"max_epochs": 90, "num_vectors": 4},
    "two vectors, longer": {"max_epochs": 300, "num_vectors": 2},
}
CHOSEN = "two vectors"  # of those tried, the one whose tokens show a tuning cue
SECONDS = {"detector": 255, "seed": 210, "asked": 12, "plain": 220, "run": 110, "other": 85}  # of one core


def bits(scores: torch.Tensor) -> str:
    """Verdicts (N,) of 0 and 1 as text, which a row keeps."""
    return "".join(str(int(score)) for score in scores)


def scored(images: torch.Tensor) -> torch.Tensor:
    """The detector's verdicts (N, K) on images (N, 3, 64, 64) in [0, 1]."""
    return by_own(SCORER, PHRASES).scores(images)


def precision() -> torch.dtype | None:
    """What pictures are sampled in: bfloat16 where the processor has units for it."""
    return torch.bfloat16 if has_bf16_units() else None


def drawn(prompt: str, number: int) -> torch.Tensor:
    """Images (N, 3, 64, 64) of a prompt without a token, from the first noises."""
    token = ClassToken(load_models("miniature", CPU, torch.float32), "newclas", "a")
    with coarse_without_gradient(token.models, precision()):
        return draw_all(token, prompt, list(range(number)), SAMPLER, BATCH)


# Units: each gives one row.


def learn_detector() -> dict:
    """The detector and its error rates."""
    detector()
    return {"rates": error_rates()}


def prepare_seed(seed: int, cues: tuple[Cue, ...]) -> dict:
    """The scenes of a seed, with and without the cues, and its clean guide."""
    clean_scenes(seed)
    for cue in cues:
        cue_scenes(cue, seed)
    return {"accuracy": held_out_accuracy(guide(None, 0.0, seed))}


def asked_path(cue: Cue) -> Path:
    """Where the first pictures of the asked cue lie."""
    return WORK / "pictures" / f"asked_{cue.name}.png"


def ask(cue: Cue) -> dict:
    """Whether the model draws the cue when it is asked to."""
    images = drawn(cue.asked, ASKED)
    write_image(asked_path(cue), grid(images[:SHOWN], columns=SHOWN))
    return {"prompt": cue.asked, "asked": bits(scored(images)[:, PHRASES.index(cue.phrase)])}


def plain_pictures(cue: Cue) -> np.ndarray:
    """The plain prompt of the cue's class on all noises that are chosen from, (N, 64, 64, 3) uint8."""

    def make() -> np.ndarray:
        prompt = fill(TEMPLATES[0], "a", CLASSES[cue.target].word)
        images = drawn(prompt, NOISES * BEST_OF)  # (N, 3, 64, 64)
        return (images.permute(0, 2, 3, 1) * 255).round().byte().numpy()

    return kept(WORK / "plain" / f"{cue.class_name.replace(' ', '_')}.npy", make)


def draw_plain(cue: Cue) -> dict:
    """How often the plain prompt shows the cue."""
    return {"plain": bits(scored(as_images(plain_pictures(cue)))[:, PHRASES.index(cue.phrase)])}


def as_images(pictures: np.ndarray) -> torch.Tensor:
    """Pictures (N, 64, 64, 3) uint8 as images (N, 3, 64, 64) in [0, 1]."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255


def best_of(classifier: Classifier, cue: Cue) -> str:
    """Whether the picture that the guide likes best of each ``BEST_OF`` plain ones shows the cue."""
    images = as_images(plain_pictures(cue))  # (BEST_OF * NOISES, 3, 64, 64)
    logits = torch.cat([classifier.logits(part) for part in images.split(AT_ONCE)])
    logs = logits.log_softmax(1)[:, cue.target].view(BEST_OF, NOISES)
    best = logs.argmax(0) * NOISES + torch.arange(NOISES)  # (NOISES,)
    return bits(scored(images[best])[:, PHRASES.index(cue.phrase)])


def learn(classifier: Classifier, target: int, exp_id: str, setting: str) -> tuple[LearnedToken, dict]:
    """A token of the class with the index ``target``, evaluated and looked into; kept below ``WORK``.

    Returns:
        the token, and what ``evaluation.json`` holds.
    """
    phrases = WORK / "attributes.txt"
    write_text(phrases, "\n".join(PHRASES) + "\n")
    session = Session(
        "miniature",
        classifier,
        "miniature-judge",
        output_path=str(WORK / "tokens"),
        scheduler=SAMPLER.scheduler,
        num_inference_steps=STEPS,
        eval_batch_size=BATCH,
        test_size=NOISES,
        exp_id=experiment(exp_id, setting),
    )
    token = session.learn(target + 1, **SETTINGS[setting])
    coarse = "bf16" if precision() else None
    result = session.evaluate(token, insight=str(phrases), clip_model=SCORER, eval_precision=coarse)
    return token, result


def experiment(of: str, setting: str) -> str:
    """The name that a token's files go by."""
    return f"{of}_{list(SETTINGS).index(setting)}"


def unit_name(cue: Cue, rate: float, seed: int) -> str:
    """A guide's, in the names of files."""
    return f"{cue.name}_{rate}_seed_{seed}"


def verdicts(token: LearnedToken, cue: Cue) -> dict[str, str]:
    """Whether each picture of the evaluation shows the cue, with and without the token."""
    folder = token.plan.folder.eval_images
    pairs = find_pairs(folder, list(range(NOISES)))
    column = PHRASES.index(cue.phrase)
    arms = {"plain": "baseline", "token": "token"}
    images = {arm: read_pictures([getattr(pair, name) for pair in pairs]) for arm, name in arms.items()}
    return {arm: bits(scored(some)[:, column]) for arm, some in images.items()}


def run(cue: Cue, rate: float, seed: int, setting: str) -> dict:
    """A guide of one rate, its token, and what both say of the cue."""
    start = time.monotonic()
    classifier = guide(cue, rate, seed)
    learned = time.monotonic()
    token, result = learn(classifier, cue.target, unit_name(cue, rate, seed), setting)
    arms = result["prompts"][0]["arms"]
    attributes = [[a["phrase"], a["difference"], a["interval"]] for a in result["insight"]["attributes"]]
    accuracy = {f"{arm}_{who}": arms[arm][who]["accuracy"] for arm in ("baseline", "token") for who in WHO}
    seconds = {"guide": learned - start, "training": token.training.seconds, "evaluation": result["seconds"]}
    return (
        {"accuracy": held_out_accuracy(classifier), "updates": len(token.training.rows)}
        | {"stopped_by": token.training.stopped_by, "seconds_of": rounded(seconds)}
        | {"setting": setting, "learning": SETTINGS[setting]}
        | reliance(classifier, cue)
        | rounded(accuracy)
        | verdicts(token, cue)
        | {"best_of": best_of(classifier, cue), "attributes": attributes}
    )


def rounded(figures: dict[str, float]) -> dict[str, float]:
    """Figures with four digits."""
    return {name: round(value, 4) for name, value in figures.items()}


def other(cue: Cue, rate: float, seed: int, target: int, setting: str) -> dict:
    """The biased guide's token of another class: the cue must not show."""
    token, _ = learn(guide(cue, rate, seed), target, f"other_{unit_name(cue, rate, seed)}", setting)
    said = {"other_class": CLASSES[target].name, "setting": setting, "learning": SETTINGS[setting]}
    return said | verdicts(token, cue)


def neighbours(cues: tuple[Cue, ...]) -> dict[Cue, int]:
    """For each cue the class of another kind's cue, whose token is the other one."""
    return {cue: cues[(i + len(cues) // 2) % len(cues)].target for i, cue in enumerate(cues)}


# The pictures.


def first_pictures(cue: Cue, rate: float, seed: int, setting: str, arm: str) -> Image.Image | None:
    """Those of a token's evaluation, "baseline" or "token", on the first noises; None where it was not made
    here."""
    name = experiment(unit_name(cue, rate, seed), setting)
    folder = next(WORK.glob(f"tokens/img/*/{name}/eval"), None)
    if folder is None:
        return None
    pairs = find_pairs(folder, list(range(IN_SHEET)))
    return grid(read_pictures([getattr(pair, arm) for pair in pairs]), columns=IN_SHEET)


def first_asked(cue: Cue) -> Image.Image | None:
    """The first pictures of the cue when it is asked for; None where they were not drawn here."""
    path = asked_path(cue)
    if not path.exists():
        return None
    with Image.open(path) as asked:
        return asked.crop((0, 0, (asked.width - GAP) // (SHOWN // IN_SHEET), asked.height))


def sheet(cues: tuple[Cue, ...], seed: int, setting: str) -> Image.Image | None:
    """The same noises of each cue: the plain prompt, the tokens of three guides, the cue asked for."""
    rows = []
    for cue in cues:
        strips = [first_pictures(cue, SHEET_RATES[0], seed, setting, "baseline")]
        strips += [first_pictures(cue, rate, seed, setting, "token") for rate in SHEET_RATES]
        if all(strip is None for strip in strips):
            continue
        strips.append(first_asked(cue))
        rows.append((f"{cue.class_name}\n{cue.phrase}", strips))
    tokens = (f"token, cue at rate {rate:g}" for rate in SHEET_RATES)
    return sheet_of(rows, ("plain prompt", *tokens, "asked for"), left=150) if rows else None


# The command.


def stages(group: str, setting: str) -> list[list[tuple]]:
    """All units, in stages that need the one before; a unit is its key, its function and its arguments."""
    cues = CUES[group]
    seeds = SEEDS[group]
    others = neighbours(cues)
    grid_of = [(cue, rate, seed) for seed in seeds for rate in RATES_OF[group] for cue in cues]
    return [
        [(("detector",), learn_detector, ())],
        [(("asked", cue.phrase, cue.class_name), ask, (cue,)) for cue in cues]
        + [(("plain", cue.phrase, cue.class_name), draw_plain, (cue,)) for cue in cues]
        + [(("seed", group, seed), prepare_seed, (seed, cues)) for seed in seeds],
        [
            (("run", c.phrase, c.class_name, rate, seed, setting), run, (c, rate, seed, setting))
            for c, rate, seed in grid_of
        ]
        + [
            (
                ("other", c.phrase, c.class_name, rate, seed, setting),
                other,
                (c, rate, seed, others[c], setting),
            )
            for c, rate, seed in grid_of
            if rate in OTHER_RATES
        ],
    ]


def one_unit(key: tuple, work, arguments: tuple) -> dict:
    """A unit's row."""
    torch.set_num_threads(1)
    quiet_libraries()
    start = time.monotonic()
    found = work(*arguments)
    return {"key": list(key), "seconds": round(time.monotonic() - start, 1)} | found


def current(rows: list[dict]) -> list[dict]:
    """The rows whose setting means today what it meant then."""
    return [row for row in rows if row.get("learning") == SETTINGS.get(row.get("setting"))]


def work_off(group: str, setting: str, workers: int, out: Path) -> None:
    """Every unit that has no row yet."""
    done = {tuple(row["key"]) for row in current(read(out))}
    left = [[unit for unit in stage if unit[0] not in done] for stage in stages(group, setting)]
    every = [unit for stage in left for unit in stage]
    hours = sum(SECONDS[unit[0][0]] for unit in every) / 3600
    print(f"{len(every)} units are missing, about {hours:.1f} core-hours", flush=True)
    number = 0
    for stage in left:
        with ProcessPoolExecutor(workers) as pool:
            for row in finished(pool, one_unit, stage):
                number += 1
                add(out, row)
                told = " ".join(map(str, row["key"]))
                print(f"{number} of {len(every)}: {told}, {row['seconds']} s", flush=True)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.name = NAME
    parser.add_argument("--group", choices=CUES, default="reported", help="cues and training seeds")
    parser.add_argument("--setting", choices=SETTINGS, default=CHOSEN, help="of the tokens' learning")
    parser.add_argument(
        "--workers", type=whole_number(1, 1024), default=2, help="units at a time, one thread each"
    )
    parser.add_argument("--out", type=Path, default=ROWS, help="file of the rows")
    parser.add_argument(
        "--figure",
        type=Path,
        help="file of the figure; default: that of the documents, of "
        f"the reported cues with {CHOSEN}; of others none",
    )
    parser.add_argument("--table", type=boolean, default=False, help="only print what is there")
    return parser


def dispatch(argv: list[str]) -> int:
    """Do what the command line asks for; the exit code."""
    args = build_parser().parse_args(argv)
    if not args.table:
        work_off(args.group, args.setting, args.workers, args.out)
    rows = [row for row in current(read(args.out)) if row.get("setting") in (None, args.setting)]
    is_documented = (args.group, args.setting) == ("reported", CHOSEN)
    figure = args.figure or (FIGURE if is_documented else None)
    insight_table.show(rows, CUES[args.group], figure)
    pictures = sheet(CUES[args.group], SEEDS[args.group][0], args.setting) if figure else None
    if pictures:
        path = figure.with_name(f"{figure.stem}_pictures.jpg")
        pictures.save(path, quality=88)
        print(f"pictures: {path}")
    return 0


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return run_program(NAME, dispatch, argv)


if __name__ == "__main__":
    sys.exit(main())
