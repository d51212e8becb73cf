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
import json
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from statistics import fmean

import torch
from PIL import Image

from apps.augment.folders import Pictures
from apps.augment.network import Network
from apps.augment.result import Difference, paired_difference
from apps.augment.training import TrainingSettings, logits_of, train
from discriminative.command_line import OneLineParser, boolean, run_program, whole_number
from discriminative.hub import quiet_libraries
from discriminative.records.files import grid, write_tensors
from discriminative.records.insight import read_pictures
from experiments.claims import augmentation_pictures as made
from experiments.claims.augmentation_pictures import SEEDS, SHOTS, TAKEN, WORDS, Place
from experiments.method import finished
from experiments.rows import add, read
from experiments.sheets import sheet_of

ROWS = Path(__file__).parents[1] / "results" / "claims_augmentation.jsonl"
FIGURE = Path(__file__).parents[2] / "docs" / "images" / "claims_augmentation.png"
NAME = "augmentation.py"
SHEET = "claims_augmentation_pictures.jpg"  # beside the figure
IN_SHEET = 3  # pictures of an arm
SHEET_SEED = 2  # no setting was chosen on it
TUNING_SEEDS = (0, 1)
STEPS = 200
BATCH = 16

# What is tried for each arm on the validation pictures, five settings each: one thing after the other, the
# first value is where it starts.
RECIPE = {"learning_rate": (3e-3, 1e-3), "cutmix": (0.5, 0.0), "magnitude": (9, 5, 3)}
PLAIN_RECIPE = {"learning_rate": (3e-3, 1e-3), "weight_decay": (0.05, 0.2), "smoothing": (0.1, 0.0, 0.2)}
DRAWING = {"share": (0.5, 0.25, 0.75), "number": (24, 8), "guidance": (2.0, 5.0)}
SEARCH = {"real": PLAIN_RECIPE, "strong": RECIPE, "twice": RECIPE}
ARMS = {
    "real": "real",
    "strong": "real + strong augmentation",
    "twice": "+ twice the real pictures",
    "plain": "+ plain prompt",
    "filtered": "+ plain prompt, filtered by the clean guide",
    "inversion": "+ textual inversion on the shots",
    "token": "+ class token, clean guide",
    "distilled": "+ plain prompt, labelled by the full guide",
    "full": "+ class token, full guide",
    "phrase": "+ precise phrase",
}
SEARCH |= dict.fromkeys(list(ARMS)[3:], DRAWING)
# The words that an arm's pictures need.
WORDS_OF = {"filtered": ("token",), "inversion": ("inversion",), "token": ("token",)}
WORDS_OF |= {"distilled": ("full",), "full": ("full",), "plain": (), "phrase": ()}
FROM_POOL = ("plain", "filtered", "distilled")
# Core-seconds of a unit on the machine of docs/results.md, until rows say better.
SECONDS = {"renders": 10.0, "guide": 10.0, "words": 16.0, "drawing": 5.0, "training": 10.0, "right": 1.0}
MEASURING = ("training", "right")  # kinds of work that leave a row, and no file

Setting = tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Job:
    """One unit of work.

    Args:
        kind: a key of ``SECONDS``.
        name: an arm of a training, a source of words and drawings ("plain" draws a word's pool).
        shots: 0 where it does not depend on them.
        what: index of a class taken; of a word for a pool; of a training -1.
        setting: of a training or a guide; of a drawing its guidance.
    """

    kind: str
    name: str = ""
    shots: int = 0
    seed: int = 0
    what: int = -1
    setting: Setting = ()

    @property
    def key(self) -> list:
        """What tells it from others in the rows."""
        return json.loads(json.dumps(list(asdict(self).values())))


class Plan:
    """Which units are missing, and which of them can be done now.

    Args:
        rows: of all finished units.
    """

    def __init__(self, rows: list[dict], output_path: Path):
        self.place = Place(output_path)
        self.rows = {json.dumps(r["key"]): r for r in rows if r["key"][0] in MEASURING}

    def row(self, job: Job) -> dict | None:
        """The row of a unit that leaves nothing else, if it is done."""
        return self.rows.get(json.dumps(job.key))

    def start(self, arm: str, shots: int) -> dict[str, float] | None:
        """The settings that an arm's search begins with; None while they are not known."""
        first = {name: values[0] for name, values in SEARCH[arm].items()}
        if arm in ("real", "strong"):
            return first
        below, missing = self.chosen("strong", shots)
        return None if missing else below | ({} if arm == "twice" else first)

    @cache  # noqa: B019 (a plan is made anew after each round)
    def chosen(self, arm: str, shots: int) -> tuple[dict[str, float] | None, tuple[Job, ...]]:
        """The setting that is best on the validation pictures; or the trainings that have to say so."""
        setting = self.start(arm, shots)
        if setting is None:
            return None, self.chosen("strong", shots)[1]
        for name, values in SEARCH[arm].items():
            tried = [setting | {name: value} for value in sorted(values, key=lambda v: v != setting[name])]
            jobs = [[training(arm, shots, seed, one) for seed in TUNING_SEEDS] for one in tried]
            missing = tuple(job for these in jobs for job in these if not self.row(job))
            if missing:
                return None, missing
            scores = [fmean(self.row(job)["validation"] for job in these) for these in jobs]
            setting = tried[scores.index(max(scores))]
        return setting, ()

    def final(self, arm: str, shots: int) -> list[Job]:
        """The trainings of all seeds with the chosen setting; none while it is not known."""
        setting, missing = self.chosen(arm, shots)
        return [] if missing else [training(arm, shots, seed, setting) for seed in SEEDS]

    def right(self, arm: str, shots: int) -> list[Job]:
        """The judging of what an arm adds in its final trainings; none where it adds real pictures alone."""
        return [replace(job, kind="right") for job in self.final(arm, shots) if arm in made.GENERATED]

    def wanted(self) -> list[Job]:
        """The rows that are known to be missing: fewest shots first, which are whole before the next."""
        for shots in SHOTS:
            jobs = []
            for arm in ARMS:
                jobs += [*self.chosen(arm, shots)[1], *self.final(arm, shots), *self.right(arm, shots)]
            missing = [job for job in dict.fromkeys(jobs) if not self.row(job)]
            if missing:
                return missing
        return []

    def ready(self) -> list[Job]:
        """What can be done now, so that the missing rows become possible."""
        found: dict[Job, None] = {}
        for job in self.wanted():
            self.collect(job, found)
        return list(found)

    def collect(self, job: Job, found: dict[Job, None]) -> None:
        """Add the job, or what it needs and is not there."""
        needed = [need for need in self.needs(job) if not self.is_there(need)]
        if not needed:
            found[job] = None
        for need in needed:
            self.collect(need, found)

    def needs(self, job: Job) -> Iterator[Job]:
        """What a unit is made from."""
        if job.kind != "renders":
            yield Job("renders")
        every = range(len(TAKEN))
        if job.kind in MEASURING and job.name in WORDS_OF:
            setting = (("guidance", dict(job.setting)["guidance"]),)
            if job.name in FROM_POOL:
                yield from (Job("drawing", "plain", 0, job.seed, w, setting) for w in range(len(WORDS)))
                yield from (
                    words(source, job.shots, job.seed, k) for source in WORDS_OF[job.name] for k in every
                )
            else:
                shots = 0 if job.name in made.WITHOUT_SHOTS else job.shots
                yield from (Job("drawing", job.name, shots, job.seed, k, setting) for k in every)
            if job.name == "filtered":
                yield self.guide(job.shots, job.seed)
        if job.kind == "drawing" and job.name not in ("plain", "phrase"):
            yield words(job.name, job.shots, job.seed, job.what)
        if job.kind == "words" and job.name == "token":
            yield self.guide(job.shots, job.seed)

    def guide(self, shots: int, seed: int) -> Job:
        """The clean guide: real + strong augmentation, with the setting that was chosen for it."""
        return Job("guide", "strong", shots, seed, -1, tuple(self.chosen("strong", shots)[0].items()))

    def is_there(self, job: Job) -> bool:
        """Whether a unit that leaves files is done."""
        place = self.place
        if job.kind == "renders":
            return all(p.exists() for p in (place.split("test"), *map(place.shots, SEEDS)))
        if job.kind == "guide":
            return place.guide(job.shots, job.seed).exists()
        if job.kind == "words":
            return place.token(job.name, job.shots, job.seed, TAKEN[job.what]).exists()
        name = WORDS[job.what] if job.name == "plain" else made.folder_of(TAKEN[job.what])
        return place.drawn(job.name, job.shots, job.seed, dict(job.setting)["guidance"], name).exists()


def training(arm: str, shots: int, seed: int, setting: dict[str, float]) -> Job:
    """A training of an arm."""
    return Job("training", arm, shots, seed, -1, tuple(setting.items()))


def words(source: str, shots: int, seed: int, k: int) -> Job:
    """A word of a source; the full guide's does not depend on the shots."""
    return Job("words", source, 0 if source == "full" else shots, seed, k)


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


# Tables.


def results(plan: Plan) -> dict[tuple[str, int], list[dict]]:
    """The finished rows of each arm and number of shots, a seed each, of arms that are complete."""
    found = {}
    for arm in ARMS:
        for shots in SHOTS:
            rows = [plan.row(job) for job in plan.final(arm, shots)]
            if rows and all(rows):
                found[arm, shots] = rows
    return found


def compared(found: dict, arm: str, other: str, shots: int, kind: str | None = None) -> Difference | None:
    """The paired difference of two arms' test accuracies; None while one is not complete.

    Args:
        kind: "common" or "rare" counts the classes of that sense alone.
    """
    if not ((arm, shots) in found and (other, shots) in found):
        return None
    pairs = zip(found[arm, shots], found[other, shots], strict=True)
    return paired_difference([accuracy(a, kind) - accuracy(b, kind) for a, b in pairs])


def accuracy(row: dict, kind: str | None = None) -> float:
    """The test accuracy of a row, of all classes or of one sense's."""
    if kind is None:
        return row["test"]
    return fmean(a for a, c in zip(row["by_class"], TAKEN, strict=True) if c.kind == kind)


def cell(value) -> str:
    """A cell; a dash where there is nothing yet."""
    return "–" if value is None else str(value)


def print_table(found: dict, kind: str | None = None) -> None:
    """Mean test accuracy of every arm over the shots."""
    print("| arm | " + " | ".join(f"{n} shots" if n > 1 else "1 shot" for n in SHOTS) + " |")
    print("|-" * (len(SHOTS) + 1) + "|")
    for arm, told in ARMS.items():
        cells = []
        for shots in SHOTS:
            rows = found.get((arm, shots))
            cells.append(f"{fmean(accuracy(r, kind) for r in rows):.3f}" if rows else "–")
        print(f"| {told} | " + " | ".join(cells) + " |")


PAIRS = (
    ("token", "real"),
    ("token", "strong"),
    ("token", "plain"),
    ("token", "filtered"),
    ("token", "inversion"),
    ("token", "twice"),
    ("token", "phrase"),
    ("full", "strong"),
    ("full", "distilled"),
    ("plain", "strong"),
)


def print_differences(found: dict) -> None:
    """Pairs of arms with their intervals."""
    print("| difference, paired over 8 seeds | " + " | ".join(map(str, SHOTS)) + " |")
    print("|-" * (len(SHOTS) + 1) + "|")
    for arm, other in PAIRS:
        cells = [cell(compared(found, arm, other, shots)) for shots in SHOTS]
        print(f"| {ARMS[arm]} over {ARMS[other]} | " + " | ".join(cells) + " |")


def print_settings(plan: Plan) -> None:
    """What the validation pictures chose."""
    print("| arm | shots | chosen |")
    print("|-|-|-|")
    for arm in ARMS:
        for shots in SHOTS:
            setting = plan.chosen(arm, shots)[0]
            if setting:
                told = ", ".join(f"{name} {setting[name]:g}" for name in SEARCH[arm])
                print(f"| {ARMS[arm]} | {shots} | {told} |")


def print_classes(found: dict, arm: str = "token", other: str = "strong") -> None:
    """Mean test accuracy of each class, with an arm's pictures and with another's."""
    print(f"| {ARMS[other]} -> {ARMS[arm]} | " + " | ".join(map(str, SHOTS)) + " |")
    print("|-" * (len(SHOTS) + 1) + "|")
    for k, c in enumerate(TAKEN):
        cells = []
        for shots in SHOTS:
            both = [found.get((name, shots)) for name in (other, arm)]
            means = [f"{fmean(r['by_class'][k] for r in rows):.2f}" for rows in both if rows]
            cells.append(" -> ".join(means) if len(means) == 2 else "–")
        print(f"| {c.name} | " + " | ".join(cells) + " |")


def print_right(plan: Plan) -> None:
    """The share of an arm's added pictures that the miniature's judge calls right, mean of the seeds."""
    print("| pictures added that are right | " + " | ".join(map(str, SHOTS)) + " |")
    print("|-" * (len(SHOTS) + 1) + "|")
    for arm in made.GENERATED:
        found = {shots: [plan.row(job) for job in plan.right(arm, shots)] for shots in SHOTS}
        means = [fmean(r["right"] for r in rows) if rows and all(rows) else None for rows in found.values()]
        print(f"| {ARMS[arm]} | " + " | ".join("–" if m is None else f"{m:.2f}" for m in means) + " |")


def print_costs(rows: list[dict]) -> None:
    """What a word cost: pictures of the sampler that the UNet could have drawn instead, and seconds."""
    for source in ("token", "full", "inversion"):
        these = [r for r in rows if r["key"][:2] == ["words", source]]
        if these:
            images = fmean(r["images"] for r in these)
            seconds = fmean(r["seconds"] for r in these)
            print(f"a word of {source}: worth {images:.0f} pictures, {seconds:.0f} s, mean of {len(these)}")


# What was aimed at: arm, its rival, at how many shots, and whether the interval has to lie above 0.
TARGETS = (("token", "strong", True), ("token", "filtered", True), ("token", "twice", False))


def print_targets(found: dict) -> None:
    """Each target, met or missed, from the rows."""
    print("| aimed at | measured | |")
    print("|-|-|-|")
    for arm, other, is_above in TARGETS:
        for shots in (1, 2):
            difference = compared(found, arm, other, shots)
            if difference is None:
                verdict = "not measured yet"
            elif is_above:
                verdict = "met" if difference.low > 0 else "missed"
            else:
                verdict = "met" if difference.mean >= 0 else "missed"
            wanted = "interval above 0" if is_above else "at least equal"
            compares = f"{shots} {'shot' if shots == 1 else 'shots'}, {ARMS[arm]} over {ARMS[other]}"
            print(f"| {compares}: {wanted} | {cell(difference)} | {verdict} |")


def draw_figure(found: dict, path: Path) -> None:
    """Test accuracy over the shots, with intervals of 95 % over the seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    for i, (arm, told) in enumerate(ARMS.items()):
        there = [shots for shots in SHOTS if (arm, shots) in found]
        if not there:
            continue
        means = [paired_difference([r["test"] for r in found[arm, shots]]) for shots in there]
        ends = [[m.mean - m.low for m in means], [m.high - m.mean for m in means]]
        places = [shots * (1 + 0.015 * (i - len(ARMS) / 2)) for shots in there]
        style = "-" if arm in ("token", "full") else "--"
        axes.errorbar(places, [m.mean for m in means], yerr=ends, fmt="o" + style, capsize=2, label=told)
    axes.set_xscale("log", base=2)
    axes.set_xticks(SHOTS, [str(n) for n in SHOTS])
    axes.set_xlabel("real pictures of a class")
    axes.set_ylabel("test accuracy, mean of 8 seeds, intervals of 95 %")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def sheet(plan: Plan, shots: int) -> Image.Image | None:
    """A row for each class: the real pictures, of which the first are the shots, and what the arms add to
    them. None where they were not made here."""
    columns = {"real": made.pictures_in(plan.place.shots(SHEET_SEED), IN_SHEET)}
    for arm, drawn in made.GENERATED.items():
        setting = plan.chosen(arm, shots)[0]
        if not setting or not all(map(plan.is_there, plan.needs(training(arm, shots, SHEET_SEED, setting)))):
            return None
        columns[arm] = drawn(plan.place, shots, SHEET_SEED, setting["guidance"], IN_SHEET)
    rows = []
    for k, c in enumerate(TAKEN):
        strips = [pictures.of_class(k)[:IN_SHEET] for pictures in columns.values()]
        strips = [grid(read_pictures(paths), IN_SHEET) if paths else None for paths in strips]
        rows.append((c.name, strips))
    return sheet_of(rows, tuple(columns))


def tell(rows: list[dict], output_path: Path, figure: Path) -> None:
    """All tables, the figure, and the pictures of one shot."""
    plan = Plan(rows, output_path)
    found = results(plan)
    trainings = sum(r["key"][0] == "training" for r in rows)
    print(f"\n{trainings} trainings, {sum(r['seconds'] for r in rows) / 3600:.1f} core-hours so far\n")
    print_table(found)
    for kind in ("rare", "common"):
        print(f"\nclasses of the {kind} sense:\n")
        print_table(found, kind)
    print()
    print_differences(found)
    for show in (print_targets, print_classes):
        print()
        show(found)
    print()
    print_right(plan)
    print()
    print_costs(rows)
    print()
    print_settings(plan)
    if found:
        draw_figure(found, figure)
        print(f"\nfigure: {figure}")
    if pictures := sheet(plan, SHOTS[0]):
        pictures.save(figure.with_name(SHEET), quality=88)
        print(f"pictures: {figure.with_name(SHEET)}")


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
