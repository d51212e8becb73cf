"""The figures of the house on any checkout: its entries, imports, options, README, lines and comments.

    python -m experiments.house                     # this tree
    python -m experiments.house --root ../before    # another checkout, of the old layout or the new
    python -m experiments.house --out house.json    # the figures as JSON, too

Expect at most 18 visible entries, 57 options (40 in the default help) and a README of about 200 lines.
The flat tree of version 0.2.0 has 38 entries (27 of them modules), 3.8 arrows a module, 31 % of internal
names imported inside functions, 83 options, a README of 46,032 bytes and 531 lines, 17.1 % of lines over 100
and 7.9 % over 120 characters, 16 words a comment line, 27 assignments of several names at once per 1,000
lines.

Files are those that git tracks and that are there; without git, all but hidden and made ones. "The program"
is every .py file outside tests, docs, experiments, benchmarks and miniature; the second column adds the last
three. How it counts:

- modules: files that hold more than a docstring, so that an empty __init__.py is none;
- arrows: distinct modules of the same column that a module imports, wherever the import stands; their mean;
- imports inside functions: of all statements; and of all names that come from modules of the same column;
- options: annotated fields of RunConfig, read from the source; ``more=True`` leaves one to ``--help all``;
- long lines: their share of the lines that are not blank;
- comments: a line that is a comment alone; and whole ones, lines that follow one another joined. Those
  behind code and directives such as noqa do not count;
- several names at once: ``a, b = 1, 2``, one tuple to another, per 1,000 lines of code, which are neither
  blank nor comment nor docstring; ``a, b = f()`` counts in the second figure only;
- functions: from ``def`` to the last line, methods and inner functions too.
"""

import argparse
import ast
import io
import json
import re
import subprocess
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from statistics import mean, median
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
SCRIPTS = ("benchmarks", "experiments", "miniature")
NO_CODE = ("tests", "docs")
MADE = ("build", "results")
ROWS = {
    "entries": "visible entries at the top level",
    "entries_that_are_modules": "of them modules",
    "options": "options of a training",
    "options_in_default_help": "of them in the default help",
    "readme_bytes": "README, bytes",
    "readme_lines": "README, lines",
    "docs_bytes": "docs/*.md, bytes",
    "modules": "modules",
    "arrows_a_module": "import arrows a module",
    "statements_inside_functions": "import statements inside functions, %",
    "internal_names_inside_functions": "internal names imported inside functions, %",
    "lines_over_100": "lines over 100 characters, %",
    "lines_over_110": "lines over 110 characters, %",
    "lines_over_120": "lines over 120 characters, %",
    "words_of_a_comment_line": "words of a comment line, median",
    "words_of_a_whole_comment": "words of a whole comment, median",
    "several_at_once": "assignments of several names at once, per 1,000 lines",
    "several_at_once_or_unpacked": "the same, with unpacked calls",
    "function_lines": "lines of a function, median",
    "longest_function_lines": "lines of the longest function",
    "longest_function": "which one",
}
DIRECTIVE = re.compile(r"#\s*(!|noqa|type:|ruff:|pragma|fmt:)")

Function = ast.FunctionDef | ast.AsyncFunctionDef


class Import(NamedTuple):
    """One import statement, or one module of ``import a, b``."""

    module: str  # with its packages: discriminative.hub
    names: tuple[str, ...]  # what is taken from it; none where the module itself is imported
    inside: bool  # in a function
    typing: bool  # under ``if TYPE_CHECKING``: never runs


# Files.


def tracked(root: Path) -> list[str]:
    """The files that git tracks below ``root``; without git, those that are neither hidden nor made."""
    git = ["git", "-C", str(root), "ls-files", "-z"]
    try:
        found = subprocess.run(git, capture_output=True, check=True, text=True).stdout.split("\0")
    except (OSError, subprocess.CalledProcessError):
        found = []
    if not any(found):
        tops = [p for p in root.iterdir() if not p.name.startswith(".") and p.name not in MADE]
        files = [f for top in tops for f in (top.rglob("*") if top.is_dir() else [top])]
        found = [f.relative_to(root).as_posix() for f in files if "__pycache__" not in f.parts]
    return sorted(name for name in found if name and (root / name).is_file())


def visible_entries(root: Path) -> list[str]:
    """The top level as a reader sees it: tracked files and folders, without hidden ones."""
    tops = {name.split("/")[0] for name in tracked(root)}
    return sorted(top for top in tops if not top.startswith("."))


def python_sources(root: Path) -> dict[str, str]:
    """Path and text of every tracked .py file that is code: no tests, no examples of the docs."""
    sources = {}
    for name in tracked(root):
        folders = name.split("/")[:-1]
        hidden = any(folder.startswith(".") for folder in folders)
        skipped = folders and folders[0] in (*NO_CODE, *MADE)
        if name.endswith(".py") and not hidden and not skipped:
            sources[name] = (root / name).read_text(encoding="utf-8")
    return sources


# Imports.


def module_name(path: str) -> str:
    """The name by which a file is imported: "a/b.py" is a.b, "a/__init__.py" is a."""
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


@cache
def imports_of(path: str, source: str) -> tuple[Import, ...]:
    """Every import of a file, at its top or inside a function, with relative ones resolved."""
    package = module_name(path) if path.endswith("__init__.py") else module_name(path).rpartition(".")[0]
    found = []
    for node, inside, typing in walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [Import(alias.name, (), inside, typing) for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: 1 - node.level or None] if node.level else []
            module = ".".join([*parents, *([node.module] if node.module else [])])
            found.append(Import(module, tuple(alias.name for alias in node.names), inside, typing))
    return tuple(found)


def walk(node: ast.AST, inside: bool = False, typing: bool = False) -> Iterator[tuple[ast.AST, bool, bool]]:
    """Every node below one, whether it is in a function, and whether only a type checker reads it."""
    checked = isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
    for child in ast.iter_child_nodes(node):
        only_typing = typing or (checked and child in node.body)
        yield child, inside, only_typing
        yield from walk(child, inside or isinstance(child, Function), only_typing)


def targets(found: Import, modules: set[str]) -> set[str]:
    """Which of ``modules`` an import reaches: "from a import b" is a.b where that is a module, else a."""
    submodules = {f"{found.module}.{name}" for name in found.names} & modules
    takes_more = len(submodules) < len(found.names) or not found.names
    return submodules | ({found.module} & modules if takes_more else set())


def import_figures(sources: dict[str, str]) -> dict[str, float]:
    """Modules, arrows a module, and the shares of imports that stand inside functions."""
    modules = {module_name(path) for path in sources}
    bodies = {path: ast.parse(source).body for path, source in sources.items()}
    filled = [
        path for path, body in bodies.items() if len(body) > (ast.get_docstring(ast.Module(body)) is not None)
    ]
    arrows = []
    statements = []  # of each: whether it is inside a function
    names = []  # of each internal name: whether it is imported inside a function
    for path in filled:
        reached = set()
        for found in imports_of(path, sources[path]):
            internal = targets(found, modules) - {module_name(path)}
            reached |= internal
            statements.append(found.inside)
            names += [found.inside] * (len(found.names or (found.module,)) if internal else 0)
        arrows.append(len(reached))
    return {
        "modules": len(filled),
        "arrows_a_module": round(mean(arrows), 2),
        "statements_inside_functions": percent(statements),
        "internal_names_inside_functions": percent(names),
    }


# Options and texts.


def option_figures(root: Path) -> dict[str, int | None]:
    """How many fields RunConfig has, and how many the default help shows; None without a config.py."""
    path = root / "config.py"
    if not path.is_file():
        return {"options": None, "options_in_default_help": None}
    classes = [
        node for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.ClassDef)
    ]
    body = next((node.body for node in classes if node.name == "RunConfig"), [])
    fields = [
        node
        for node in body
        if isinstance(node, ast.AnnAssign) and "ClassVar" not in ast.unparse(node.annotation)
    ]
    shown = [node for node in fields if not is_more(node.value)]
    return {"options": len(fields), "options_in_default_help": len(shown)}


def is_more(value: ast.expr | None) -> bool:
    """Whether a field's ``option(...)`` says ``more=True``: only ``--help all`` shows it."""
    keywords = value.keywords if isinstance(value, ast.Call) else []
    return any(
        k.arg == "more" and isinstance(k.value, ast.Constant) and k.value.value is True for k in keywords
    )


def text_figures(root: Path) -> dict[str, int]:
    """Bytes and lines of the README, and bytes of the other texts: docs/**/*.md."""
    readme = (root / "README.md").read_bytes() if (root / "README.md").is_file() else b""
    docs = [name for name in tracked(root) if name.startswith("docs/") and name.endswith(".md")]
    return {
        "readme_bytes": len(readme),
        "readme_lines": len(readme.splitlines()),
        "docs_bytes": sum((root / name).stat().st_size for name in docs),
    }


# Lines, comments, functions.


def line_figures(sources: dict[str, str]) -> dict[str, float]:
    """Shares of long lines among those that are not blank."""
    lines = [line for source in sources.values() for line in source.splitlines() if line.strip()]
    limits = (100, 110, 120)
    return {f"lines_over_{limit}": percent([len(line) > limit for line in lines]) for limit in limits}


def comment_figures(sources: dict[str, str]) -> dict[str, float]:
    """The median number of words of a comment line and of a whole comment."""
    lines = []
    blocks = []
    for source in sources.values():
        last_row = -1
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            alone = token.type == tokenize.COMMENT and not token.line[: token.start[1]].strip()
            if not alone or DIRECTIVE.match(token.string):
                continue
            words = len(token.string.lstrip("#").split())
            lines.append(words)
            if token.start[0] == last_row + 1:
                blocks[-1] += words
            else:
                blocks.append(words)
            last_row = token.start[0]
    return {
        "words_of_a_comment_line": median(lines or [0]),
        "words_of_a_whole_comment": median(blocks or [0]),
    }


def code_lines(source: str) -> int:
    """Lines that are neither blank nor a comment alone nor part of a docstring."""
    docstrings = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | Function) and ast.get_docstring(node) is not None:
            docstrings |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    lines = enumerate(source.splitlines(), start=1)
    return sum(1 for n, line in lines if line.strip() and line.strip()[0] != "#" and n not in docstrings)


def assignment_figures(sources: dict[str, str]) -> dict[str, float]:
    """Assignments of several names at once, per 1,000 lines of code."""
    several = ast.Tuple | ast.List
    literal = 0
    unpacked = 0
    for source in sources.values():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Assign) and any(isinstance(target, several) for target in node.targets):
                unpacked += 1
                literal += isinstance(node.value, several)
    lines = sum(code_lines(source) for source in sources.values())
    return {
        "several_at_once": round(1000 * literal / lines, 1),
        "several_at_once_or_unpacked": round(1000 * unpacked / lines, 1),
    }


def function_figures(sources: dict[str, str]) -> dict[str, float | str]:
    """Median and longest function, in lines, and which one that is."""
    sizes = []
    for path, source in sources.items():
        functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, Function)]
        sizes += [(f.end_lineno - f.lineno + 1, f"{path}:{f.name}") for f in functions]
    longest = max(sizes, default=(0, ""))
    return {
        "function_lines": median([size for size, _ in sizes] or [0]),
        "longest_function_lines": longest[0],
        "longest_function": longest[1],
    }


def percent(cases: list[bool]) -> float:
    """The share of cases that hold, in percent with one decimal; 0 of none."""
    return round(100 * sum(cases) / len(cases), 1) if cases else 0.0


# The whole.

CODE_FIGURES = (import_figures, line_figures, comment_figures, assignment_figures, function_figures)


def measure(root: Path) -> dict[str, dict]:
    """All figures of a checkout: of its tree, of the program, and of the program with its scripts."""
    entries = visible_entries(root)
    everything = python_sources(root)
    program = {path: source for path, source in everything.items() if path.split("/")[0] not in SCRIPTS}
    tree = {
        "entries": len(entries),
        "entries_that_are_modules": sum(entry.endswith(".py") for entry in entries),
        **option_figures(root),
        **text_figures(root),
    }
    return {
        "tree": tree,
        "program": {key: value for figures in CODE_FIGURES for key, value in figures(program).items()},
        "with_scripts": {
            key: value for figures in CODE_FIGURES for key, value in figures(everything).items()
        },
    }


def told(value: float | str | None) -> str:
    """A figure as the table prints it."""
    if value is None:
        return "–"
    if isinstance(value, str):
        return value
    return f"{int(value):,}" if value == int(value) else f"{value:,}"


def table(figures: dict[str, dict]) -> str:
    """The figures as a markdown table; those of the tree stand in the first column."""
    rows = ["| what | the program | with scripts |", "|-|-|-|"]
    for key, value in figures["tree"].items():
        rows.append(f"| {ROWS[key]} | {told(value)} | |")
    for key, value in figures["program"].items():
        other = figures["with_scripts"][key]
        rows.append(f"| {ROWS[key]} | {told(value)} | {told(other)} |")
    return "\n".join(rows)


def main(argv: list[str] | None = None) -> None:
    """Measure, print, and write where that is asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", type=Path, default=ROOT, help="the checkout to measure; default: this one")
    parser.add_argument("--out", type=Path, help="write the figures here as JSON, too")
    args = parser.parse_args(argv)
    if not (args.root / "README.md").is_file():
        parser.error(
            f"--root: {str(args.root)!r} was given, which holds no README.md; allowed is a checkout's folder"
        )
    figures = measure(args.root)
    print(table(figures))
    if args.out:
        args.out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
