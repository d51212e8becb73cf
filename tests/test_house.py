"""The rule of imports, and what else holds the house up.

    pytest tests/test_house.py

Expect all to pass within seconds: only sources are read, nothing of the program runs. The rule:
``experiments -> run -> apps -> trainer, evaluate -> classifiers, config -> dpt -> discriminative``.
Imports run this way and never back, those inside functions too.
"""

import re
from pathlib import Path

import pytest

from experiments.house import (
    Import,
    imports_of,
    measure,
    module_name,
    python_sources,
    table,
    targets,
    visible_entries,
)

ROOT = Path(__file__).parent.parent
SOURCES = python_sources(ROOT)

# The floors of the house, the highest first. Those on one floor do not import each other.
FLOORS = (
    ("experiments",),
    ("run",),
    ("apps",),
    ("trainer", "evaluate"),
    ("classifiers", "config"),
    ("dpt",),
    ("discriminative",),
)

# The rooms of the library, alike.
ROOMS = (
    ("tokens",),
    ("diffusion", "guides"),
    ("records",),
    ("hub", "precision"),
    ("settings",),
    ("command_line", "progress", "seeds"),
    ("errors",),
)

# The miniature's scripts stand beside the house: what they may import, and who may import them.
MINIATURE_TAKES = ("discriminative", "classifiers", "evaluate", "config")
MINIATURE_SERVES = ("experiments", "dpt")

# A class of one's own is found from the working directory.
CHANGES_SEARCH_PATH = ("discriminative/guides/loaders.py",)

LIGHT = ("run", "config", "discriminative.errors", "discriminative.settings", "discriminative.seeds")
HEAVY = ("torch", "transformers", "diffusers")

SEARCH_PATH = re.compile(r"\bsys\.path(\.(insert|append|extend)\b|\[.*\]\s*=|\s*\+?=[^=])")


# The checker: pure functions of sources, path -> text.


def arrows_of(sources: dict[str, str]) -> dict[str, set[str]]:
    """The internal modules that each module imports, wherever the import stands."""
    modules = {module_name(path) for path in sources}
    arrows = {}
    for path, source in sources.items():
        arrows[module_name(path)] = set().union(*(targets(i, modules) for i in imports_of(path, source)))
    return arrows


def level(name: str, levels: tuple[tuple[str, ...], ...]) -> int | None:
    """How deep a name stands in the levels, 0 the highest; None: nowhere."""
    return next((depth for depth, names in enumerate(levels) if name in names), None)


def objection(importer: str, imported: str) -> str | None:
    """What is wrong with one module's import of another; None: nothing."""
    home, *rooms = importer.split(".")
    other, *other_rooms = imported.split(".")
    arrow = f"{importer} imports {imported}"
    if "miniature" in (home, other):
        allowed = home == other or home in MINIATURE_SERVES or other in MINIATURE_TAKES
        return None if allowed else f"{arrow}: not the miniature's business"
    if home != other:
        return against(arrow, home, other, FLOORS)
    # A package's own __init__.py has no room of its own.
    if home == "discriminative" and rooms and other_rooms and rooms[0] != other_rooms[0]:
        return against(arrow, rooms[0], other_rooms[0], ROOMS)
    return None


def against(arrow: str, home: str, other: str, levels: tuple[tuple[str, ...], ...]) -> str | None:
    """What is wrong with an arrow from one place in the levels to another."""
    here = level(home, levels)
    there = level(other, levels)
    if here is None or there is None:
        return f"{arrow}: {home if here is None else other} has no place in the house"
    if here == there:
        return f"{arrow}: beside it"
    return f"{arrow}: upward" if here > there else None


def homeless(sources: dict[str, str]) -> list[str]:
    """Modules for which the rule has no floor or no room."""
    found = []
    for module in map(module_name, sources):
        home, *rooms = module.split(".")
        if home != "miniature" and level(home, FLOORS) is None:
            found.append(f"{module}: no floor")
        if home == "discriminative" and rooms and level(rooms[0], ROOMS) is None:
            found.append(f"{module}: no room")
    return found


def wrong_imports(sources: dict[str, str]) -> list[str]:
    """Every import against the rule, in words."""
    found = []
    for importer, reached in sorted(arrows_of(sources).items()):
        found += [reason for imported in sorted(reached) if (reason := objection(importer, imported))]
    return found


def circles(sources: dict[str, str]) -> list[str]:
    """Circles of imports, as "a -> b -> a"; one at least of those that a module stands in."""
    arrows = arrows_of(sources)
    found = []
    done = set()

    def follow(module: str, way: tuple[str, ...]) -> None:
        if module in way:
            found.append(" -> ".join([*way[way.index(module) :], module]))
        elif module not in done:
            for imported in sorted(arrows[module]):
                follow(imported, (*way, module))
            done.add(module)

    for module in sorted(arrows):
        follow(module, ())
    return found


def at_start(found: tuple[Import, ...]) -> list[Import]:
    """The imports that run when a module is imported: neither in a function nor for a type checker alone."""
    return [i for i in found if not i.inside and not i.typing]


def with_packages(modules: set[str]) -> set[str]:
    """Modules and the packages around them, whose __init__.py an import runs, too."""
    parts = [module.split(".") for module in modules]
    return {".".join(names[:depth]) for names in parts for depth in range(1, len(names) + 1)}


def heavy_ways(start: str, sources: dict[str, str]) -> list[str]:
    """The ways by which importing a module brings in a heavy library, through the modules that it imports."""
    paths = {module_name(path): path for path in sources}
    ways = {start: start}  # module -> how it is reached
    waiting = [start]
    found = []
    while waiting:
        module = waiting.pop()
        reached = with_packages({module})
        for i in at_start(imports_of(paths[module], sources[paths[module]])):
            reached |= with_packages(targets(i, set(paths)))
            if i.module.split(".")[0] in HEAVY:
                found.append(f"{ways[module]} -> {i.module}")
        for imported in sorted((reached & set(paths)) - set(ways)):
            ways[imported] = f"{ways[module]} -> {imported}"
            waiting.append(imported)
    return found


# The house as it stands.


def test_every_module_has_a_floor_and_in_the_library_a_room():
    found = homeless(SOURCES)
    assert not found, "\n".join(found)


def test_imports_run_down_the_floors_and_never_back():
    found = wrong_imports(SOURCES)
    assert not found, "\n".join(found)


def test_no_circle_of_imports():
    found = circles(SOURCES)
    assert not found, "\n".join(found)


def test_the_library_does_not_know_the_options_of_a_run():
    library = {path: source for path, source in SOURCES.items() if path.startswith("discriminative/")}
    assert library
    found = [path for path, source in library.items() if re.search(r"\bRunConfig\b", source)]
    assert not found, found


@pytest.mark.parametrize("module", LIGHT)
def test_what_the_command_line_reads_first_is_light(module):
    found = heavy_ways(module, SOURCES)
    assert not found, "\n".join(found)


def test_no_file_changes_where_python_looks_for_modules():
    changing = [path for path, source in SOURCES.items() if SEARCH_PATH.search(source)]
    found = [path for path in changing if path not in CHANGES_SEARCH_PATH]
    assert not found, found


def test_the_top_level_is_seen_at_a_glance():
    entries = visible_entries(ROOT)
    assert {"run.py", "config.py", "trainer.py", "classifiers.py", "evaluate.py"} <= set(entries)
    assert len(entries) <= 18, entries


# The checker can fail.


def with_line(path: str, line: str) -> dict[str, str]:
    """The real sources with one more line at the end of one of them."""
    return {**SOURCES, path: f"{SOURCES[path]}\n\n{line}\n"}


@pytest.mark.parametrize(
    ("path", "line", "expected"),
    [
        ("discriminative/seeds.py", "import config", "discriminative.seeds imports config: upward"),
        ("config.py", "def late():\n    import classifiers", "config imports classifiers: beside it"),
        ("trainer.py", "from evaluate import evaluate", "trainer imports evaluate: beside it"),
        ("classifiers.py", "from apps import plan", "classifiers imports apps.plan: upward"),
        ("apps/plan.py", "import run", "apps.plan imports run: upward"),
        (
            "discriminative/guides/labels.py",
            "from ..diffusion import sampler",
            "discriminative.guides.labels imports discriminative.diffusion.sampler: beside it",
        ),
        (
            "discriminative/errors.py",
            "from discriminative import hub",
            "discriminative.errors imports discriminative.hub: upward",
        ),
        (
            "evaluate.py",
            "from miniature.scenes import CLASSES",
            "evaluate imports miniature.scenes: not the miniature's business",
        ),
        ("miniature/vae.py", "import trainer", "miniature.vae imports trainer: not the miniature's business"),
    ],
)
def test_one_wrong_import_is_reported(path, line, expected):
    new = set(wrong_imports(with_line(path, line))) - set(wrong_imports(SOURCES))
    assert new == {expected}


def test_every_allowed_import_across_floors_is_wrong_the_other_way_round():
    arrows = [(a, b) for a, reached in arrows_of(SOURCES).items() for b in reached]
    across = [(a, b) for a, b in arrows if a.split(".")[0] != b.split(".")[0] and objection(a, b) is None]
    assert len(across) > 20
    assert [(a, b) for a, b in across if objection(b, a) is None] == []


def test_a_module_without_a_floor_or_a_room_is_reported():
    sources = {"helpers.py": "", "discriminative/helpers.py": "", "discriminative/__init__.py": ""}
    assert homeless(sources) == ["helpers: no floor", "discriminative.helpers: no room"]


def test_a_circle_is_reported_once():
    sources = {
        "apps/a.py": "def late():\n    from apps import b",
        "apps/b.py": "import apps.c",
        "apps/c.py": "from apps.a import late",
        "apps/d.py": "import apps.a",
    }
    assert circles(sources) == ["apps.a -> apps.b -> apps.c -> apps.a"]
    assert circles({"apps/a.py": "from apps.a import x"}) == ["apps.a -> apps.a"]


def test_a_heavy_library_is_found_behind_other_modules_and_packages():
    sources = {
        "run.py": "import config",
        "config.py": "from discriminative.settings import Stage",
        "discriminative/__init__.py": "import torch.nn",
        "discriminative/settings.py": "from typing import NamedTuple",
    }
    assert heavy_ways("run", sources) == ["run -> config -> discriminative -> torch.nn"]


def test_what_waits_in_a_function_or_is_for_types_alone_is_light():
    late = "def late():\n    import torch\n"
    typing = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import diffusers\n"
    assert heavy_ways("run", {"run.py": late + typing}) == []
    assert heavy_ways("run", {"run.py": typing + "else:\n    import torch\n"}) == ["run -> torch"]


@pytest.mark.parametrize(
    ("line", "changes"),
    [
        ("sys.path.insert(0, str(ROOT))", True),
        ("sys.path.append('.')", True),
        ("sys.path += ['.']", True),
        ("sys.path[:0] = ['.']", True),
        ("if folder not in sys.path:", False),
        ("found = sys.path == before", False),
    ],
)
def test_what_counts_as_changing_the_search_path(line, changes):
    assert bool(SEARCH_PATH.search(line)) is changes


# The figures of experiments/house.py.

SMALL = {
    "README.md": "# Small\n\nTwo lines more.\n",
    ".hidden": "",
    "config.py": """
class RunConfig:
    seed: int = option(35, "of the noise")
    patience: int = option(0, "updates", more=True)
    limit: ClassVar[int] = 3
""",
    "run.py": """
import json
from lib import core, other

# Two words
# and three more
a, b = 1, 2
c, d = core.pair()


def main():  # behind code
    from config import RunConfig
    return RunConfig  # noqa
""",
    "lib/__init__.py": '"""Nothing but this."""',
    "lib/core.py": "x = " + "1" * 100,
    "lib/other.py": "",
    "experiments/one.py": "import run",
    "tests/test_one.py": "import run, config",
    "build/made.py": "import run",
}


def test_the_figures_of_a_small_checkout(tmp_path):
    for name, text in SMALL.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    figures = measure(tmp_path)
    program = figures["program"]
    assert figures["tree"]["entries"] == 6  # README, config, run, lib, experiments, tests
    assert figures["tree"]["entries_that_are_modules"] == 2
    assert (figures["tree"]["options"], figures["tree"]["options_in_default_help"]) == (2, 1)
    assert (program["modules"], figures["with_scripts"]["modules"]) == (3, 4)
    assert program["arrows_a_module"] == 1.0  # run's three, over config, run and core
    assert program["statements_inside_functions"] == 33.3
    assert program["internal_names_inside_functions"] == 33.3
    assert (program["words_of_a_comment_line"], program["words_of_a_whole_comment"]) == (2.5, 5)
    assert program["several_at_once"] == round(1000 / 12, 1)
    assert program["several_at_once_or_unpacked"] == round(2000 / 12, 1)
    assert (program["function_lines"], program["longest_function"]) == (3, "run.py:main")
    assert "| options of a training | 2 | |" in table(figures)
