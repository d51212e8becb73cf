"""The tables, the figure and the sheet of pictures of claim (ii), from its rows."""

from pathlib import Path
from statistics import fmean

from PIL import Image

from apps.augment.result import Difference, paired_difference
from discriminative.records.files import grid
from discriminative.records.insight import read_pictures
from experiments.claims import augmentation_pictures as made
from experiments.claims.augmentation_pictures import SHOTS, TAKEN
from experiments.claims.augmentation_plan import ARMS, SEARCH, Plan, training
from experiments.sheets import sheet_of

SHEET = "claims_augmentation_pictures.jpg"  # beside the figure
IN_SHEET = 3  # pictures of an arm
SHEET_SEED = 2  # no setting was chosen on it


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
