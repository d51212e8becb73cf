"""The experiment's tables in Markdown, from the rows that are there; what was not run is said to be."""

from collections.abc import Callable
from pathlib import Path

from discriminative.records.files import write_text
from dpt.alignment import MEASURES
from dpt.data.scenes import KINDS, Prompt
from dpt.experiment.figures import draw_figures
from dpt.experiment.gains import (
    gain,
    level,
    mean_of,
    read_gain,
    read_level,
    read_rows_of,
    rows_of,
    seeds_of,
)
from dpt.experiment.settings import (
    ALL_ARMS,
    BLOCKS,
    CHOOSING_SEED,
    CONTROL,
    COURSE,
    FRESH,
    LONGER,
    QUOTAS,
    THAT_TUNED,
)
from dpt.experiment.units import COURSE_OF, Progress, Unit, share_of, tuning_units

PAGE = Path(__file__).parents[2] / "docs" / "dpt.md"
BEGIN = "<!-- tables: python -m dpt experiment --table True -->"
END = "<!-- end of tables -->"
NOT_RUN = "*Not run yet.*"
COMPARED = (
    ("C", "B"),
    ("D", "C"),
    ("D", "H"),
    ("D", "I"),
    ("D", "J"),
    ("D", "K"),
    ("E", "A"),
    ("D", "E"),
    ("B", "A"),
    ("C", "A"),
    ("D", "A"),
    ("H", "A"),
    ("I", "A"),
    ("J", "A"),
    ("K", "A"),
    ("C", "F"),
    ("C", "G"),
    ("C longer", "A"),
    ("C alone", "A"),
    ("B longer", "A"),
)
SIDES: dict[str, Callable[[Prompt], bool] | None] = {
    "all": None,
    "seen": lambda prompt: not prompt.held_out,
    "held out": lambda prompt: prompt.held_out,
    **{kind: lambda prompt, kind=kind: prompt.kind == kind for kind in QUOTAS["table"]},
}
# What was hoped for: an arm over another by so many whole captions.
TARGETS = (("C", "B", 0.10), ("D", "C", 0.05), ("D", "H", 0.0), ("D", "I", 0.0))
TEXT_TARGET = 0.05  # ITM's text side, fresh probes of C over the base's


def tell(progress: Progress, rows: Path, root: Path) -> None:
    """Print all tables, draw the figures, and put the tables into the page where it is at hand."""
    images = PAGE.parent / "images"
    draw_figures(progress, root, images)
    # Pictures side by side stay where the drawn ones are no longer at hand.
    figures = [images / name for name in CAPTIONS if (images / name).is_file()]
    text = f"{all_tables(progress)}\n\n{figure_links(figures)}"
    print(text)
    if PAGE.is_file():
        write_text(PAGE, with_tables(PAGE.read_text(encoding="utf-8"), text))
        print(f"tables of {rows} are in {PAGE}")


CAPTIONS = {
    "dpt_strength.png": "Whole captions of the tuning prompts by strength of self-correction",
    "dpt_updates.png": "Whole captions of the tuning prompts over the updates of stage 2",
    "dpt_blocks.png": "Matching by the block that is probed, after short trainings; chance is .5",
    "dpt_arms.png": "A, B, C and D side by side, same noises; green shows all of its caption, by the judge",
}


def figure_links(paths: list[Path]) -> str:
    """The figures that are there, each with what it shows."""
    links = [f"{CAPTIONS[path.name]}:\n\n![{CAPTIONS[path.name]}](images/{path.name})" for path in paths]
    return "\n\n".join(["### Figures", *(links or [NOT_RUN])])


def with_tables(page: str, tables: str) -> str:
    """A page with new tables between its marks; as it is where it has none."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    return f"{before}{begin}\n\n{tables}\n\n{end}{after}" if begin and end else page


def all_tables(progress: Progress) -> str:
    """Every table below its title."""
    return "\n\n".join(f"### {title}\n\n{make(progress) or NOT_RUN}" for title, make in TABLES.items())


def table(head: list[str], rows: list[list[str]]) -> str:
    """A table; nothing where it has no rows."""
    if not rows:
        return ""
    lines = [head, ["-"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def share(figure: dict | None) -> str:
    """A share with its interval."""
    return f"{figure['share']:.3f} [{figure['low']:.3f}, {figure['high']:.3f}]" if figure else ""


def signed(figure: dict | None) -> str:
    """A gain with its interval."""
    return f"{figure['share']:+.3f} [{figure['low']:+.3f}, {figure['high']:+.3f}]" if figure else ""


def number(value: float | None, form: str) -> str:
    """A number, or nothing."""
    return "" if value is None else format(value, form)


def settings_of(progress: Progress, name: str, seed: int = 0) -> str:
    """The settings of an arm's rows in words."""
    rows = rows_of(progress, name, seed)
    settings = next(iter(rows.values()))["settings"] if rows else {}
    return ", ".join(f"{key} {value}" for key, value in settings.items())


# The arms.


def arm_table(progress: Progress) -> str:
    """All measures, variety, distance and cost of each arm."""
    columns = {"seconds": ".2f", "forwards": ".0f", "backwards": ".0f"}
    rows = []
    for name, arm in ALL_ARMS.items():
        seeds = seeds_of(progress, name)
        if seeds:
            cells = [name, arm.told, settings_of(progress, name, seeds[0])]
            cells += [str(len(seeds)) if arm.seeds else "", str(level(progress, name, "full")["number"])]
            cells += [share(level(progress, name, "full"))]
            cells += [number((level(progress, name, m) or {}).get("share"), ".3f") for m in MEASURES[:-1]]
            cells += [number(level(progress, name, "diversity")["share"], ".3f")]
            cells += [number(mean_of(progress, name, "kernel_distance"), ".4f")]
            cells += [number(mean_of(progress, name, column), form) for column, form in columns.items()]
            rows.append(cells)
    head = [
        "",
        "arm",
        "settings",
        "trainings",
        "prompts",
        "whole caption",
        *MEASURES[:-1],
        "diversity",
        "KID",
    ]
    return table([*head, "CPU s a picture", "forwards", "ways back"], rows)


def gain_table(progress: Progress) -> str:
    """Paired gains of whole captions."""
    compared = [*COMPARED, *CONTROL.items()]
    rows = []
    for name, over in compared:
        found = {side: gain(progress, name, over, where=where) for side, where in SIDES.items()}
        if found["all"]:
            by_seed = ", ".join(f"{value:+.3f}" for value in found["all"]["by_seed"])
            cells = [signed(found["all"]), by_seed, signed(found["seen"]), signed(found["held out"])]
            rows.append([f"{name} over {over}", *cells])
    return table(["", "whole captions", "by training", "seen", "held out"], rows)


def kind_table(progress: Progress) -> str:
    """Whole captions by kind of prompt, and by whether training has shown its combinations."""
    rows = []
    for name in ALL_ARMS:
        found = {side: level(progress, name, "full", where) for side, where in SIDES.items()}
        if found["all"]:
            rows.append([name, *(share(found[side]) for side in SIDES if side != "all")])
    return table(["", *(side for side in SIDES if side != "all")], rows)


def target_table(progress: Progress) -> str:
    """Whether what was hoped for came about."""
    rows = []
    for name, over, wanted in TARGETS:
        found = gain(progress, name, over)
        if found:
            rows.append([f"{name} over {over}", f"{wanted:+.2f}", signed(found), verdict(found, wanted)])
    found = read_gain(*(read_rows_of(progress, n) for n in ("fresh probe of tuned", "probe")), "text")
    if found:
        cells = ["ITM, text, fresh probe of C over the base's", f"{TEXT_TARGET:+.2f}", signed(found)]
        rows.append([*cells, verdict(found, TEXT_TARGET)])
    return table(["", "target", "found", ""], rows)


def verdict(found: dict, wanted: float) -> str:
    """In words: a gain counts only where its interval excludes 0."""
    if found["low"] <= 0 <= found["high"]:
        return "no gain shown"
    return "met" if found["share"] >= wanted and found["low"] > 0 else "missed"


def sampler_table(progress: Progress) -> str:
    """The cheap sampler beside the model's own, on the same prompts and noises."""
    found = {measure: gain(progress, "A30", "A", measure) for measure in MEASURES}
    if not found["full"]:
        return ""
    return table(
        ["A30 over A", "difference"], [[measure, signed(figure)] for measure, figure in found.items()]
    )


# Probes.


def probe_table(progress: Progress) -> str:
    """Matching and boxes by adapters that learned anew on each model, and by the one that tuned."""
    base = read_rows_of(progress, "probe")
    rows = []
    for name, told in (FRESH | THAT_TUNED).items():
        found = read_rows_of(progress, name)
        if found:
            columns = ("text", "picture", "hit@1", "hit@5")
            cells = [told, str(len(found)), *(share(read_level(found, column)) for column in columns)]
            over = [
                signed(read_gain(found, base, column)) if name != "probe" else "" for column in columns[:2]
            ]
            rows.append(cells + over)
    head = ["model", "probes", "right text", "right picture", "hit@1", "hit@5", "text, over base", "picture"]
    return table(head, rows)


def probe_kind_table(progress: Progress) -> str:
    """The right text by kind of negative; the kind goes round with the scene."""
    rows = []
    for name, told in FRESH.items():
        found = read_rows_of(progress, name)
        if found:
            of_kind = [
                {seed: row | {"text": row["text"][i :: len(KINDS)]} for seed, row in found.items()}
                for i in range(len(KINDS))
            ]
            rows.append([told, *(share(read_level(some, "text")) for some in of_kind)])
    return table(["model", *KINDS], rows)


def block_table(progress: Progress) -> str:
    """Short probes of each block."""
    rows = []
    for name in BLOCKS:
        row = progress.row(Unit("read", f"block {name}", CHOOSING_SEED))
        if row:
            cells = [share(read_level({0: row}, column)) for column in ("text", "picture")]
            rows.append([name, *cells])
    return table(["block", "right text", "right picture"], rows)


# Tuning prompts.


def choice_table(progress: Progress) -> str:
    """Every choice on the tuning prompts."""
    rows = []
    for name, arm in ALL_ARMS.items():
        for i, choice in enumerate(arm.choices):
            units = [unit for unit in tuning_units(name) if unit.choice == i]
            found = [row for unit in units if (row := progress.row(unit))]
            if len(found) == len(units):
                told = ", ".join(f"{key} {value}" for key, value in choice.items())
                is_best = len(arm.choices) > 1 and progress.best(name) == found[0]["settings"]
                rows.append([name, told, f"{share_of(found):.3f}", "chosen" if is_best else ""])
    return table(["arm", "choice", "whole captions", ""], rows)


def course_table(progress: Progress) -> str:
    """Whole captions over the updates of the longer stage 2."""
    rows = [[f"after {after}", *cells] for after, cells in course(progress).items() if any(cells)]
    return table(["updates", *COURSE_OF], rows)


def course(progress: Progress) -> dict[int, list[str]]:
    """By number of updates the share of whole captions of DPT and of its control."""
    found = {0: [shown(progress, tuning_units("A"))] * len(COURSE_OF)}
    for after in COURSE:
        units = [
            [Unit("draw", n, CHOOSING_SEED, "tuning", u.part, 0, updates=after) for u in tuning_units(n)]
            for n in COURSE_OF
        ]
        found[after] = [shown(progress, some) for some in units]
    last = [shown(progress, tuning_units(f"{name} longer")) for name in COURSE_OF]
    return found | {LONGER.steps: last}


def shown(progress: Progress, units: list[Unit]) -> str:
    """The share of whole captions of units that are all there."""
    found = [progress.row(unit) for unit in units]
    return "" if None in found else f"{share_of(found):.3f}"


# Why.


def why_table(progress: Progress) -> str:
    """How alike hard negatives are to the text encoder, and how the losses pull at a fresh LoRA."""
    row = progress.row(Unit("why", seed=CHOOSING_SEED))
    if not row:
        return ""
    texts = [
        [target, *(f"{row['cosines'][target][kind]:.3f}" for kind in KINDS)] for target in row["cosines"]
    ]
    pulls = [
        [name, f"{norm:.4f}", number(row["cosines_with_mse"].get(name), "+.3f")]
        for name, norm in row["gradient_norms"].items()
    ]
    return "\n\n".join(
        [
            table(["cosine of a caption and its hard negative", *KINDS], texts),
            table(["loss", "norm of its gradient", "cosine with that of denoising"], pulls),
        ]
    )


def remedy_table(progress: Progress) -> str:
    """Each remedy over the control that was trained alike."""
    rows = []
    for name, over in CONTROL.items():
        found = gain(progress, name, over)
        if found:
            rows.append([name, ALL_ARMS[name].told, over, signed(found)])
    return table(["", "remedy", "control", "whole captions over the control"], rows)


def time_table(progress: Progress) -> str:
    """What the rows took, by kind of unit; each unit ran on one thread."""
    took: dict[str, list[float]] = {}
    for row in progress.rows.values():
        took.setdefault(row["kind"], []).append(row["took"])
    every = [seconds for some in took.values() for seconds in some]
    rows = [[kind, str(len(some)), f"{sum(some) / 3600:.1f}"] for kind, some in sorted(took.items())]
    total = ["all", str(len(every)), f"{sum(every) / 3600:.1f}"]
    return table(["units", "number", "core-hours"], [*rows, total] if rows else [])


TABLES = {
    "Targets": target_table,
    "Arms": arm_table,
    "Gains": gain_table,
    "By kind of prompt": kind_table,
    "Matching and boxes, with fresh probes": probe_table,
    "The right text by kind of negative, with fresh probes": probe_kind_table,
    "Choices, on the tuning prompts": choice_table,
    "Over the updates of stage 2, on the tuning prompts": course_table,
    "Block by block": block_table,
    "Why": why_table,
    "Remedies": remedy_table,
    "The cheap sampler": sampler_table,
    "Time": time_table,
}
