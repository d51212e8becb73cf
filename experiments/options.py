"""Write docs/options.md, every option with its default and the paper's, from the fields of ``RunConfig``.

    python -m experiments.options

Expect 64 options in 8 groups; a test says when the file is stale.
"""

from dataclasses import fields
from pathlib import Path

from apps.earlier import GONE
from config import PRESETS, RunConfig

PATH = Path(__file__).parents[1] / "docs" / "options.md"
HEAD = """# Options

*Which options are there, what is their default, and what does `--preset paper` set?*

Made by `python -m experiments.options` from the fields of `RunConfig` in `config.py`. A flag
without a value means True; dashes count as underscores. Options in *italics* are shown by `--help all` only.
An empty cell in the column *paper* means: as the default.
"""
CONSTANTS = """
## Settings that are no options

Constants of the training are set in Python, `config.learning(fine_rate=1.0)`;
`discriminative/settings.py` says what each is.

| setting | value |
|-|-|
"""
GONE_HEAD = """
## Options that went

| option of 0.2.0 | instead |
|-|-|
"""


def cell(value) -> str:
    """A value in a table."""
    return "" if value is None else f"`{value}`".replace("|", "\\|")


def page() -> str:
    """The whole document."""
    parts = [HEAD]
    for f in fields(RunConfig):
        if f.metadata["heading"]:
            parts.append(f"\n## {f.metadata['heading']}\n\n| option | default | paper | |\n|-|-|-|-|\n")
        name = f"*`--{f.name}`*" if f.metadata["more"] else f"`--{f.name}`"
        paper = cell(PRESETS["paper"].get(f.name))
        help_text = f.metadata["help"].replace("|", "\\|").replace("<", "&lt;")
        parts.append(f"| {name} | {cell(f.default)} | {paper} | {help_text} |\n")
    parts.append(CONSTANTS)
    parts += [f"| `{name}` | {cell(value)} |\n" for name, value in RunConfig().learning().constants.items()]
    parts.append(GONE_HEAD)
    parts += [f"| `--{name}` | {gone.instead} |\n" for name, gone in GONE.items()]
    return "".join(parts)


def main() -> None:
    PATH.write_text(page(), encoding="utf-8")
    print(f"{PATH}: {len(fields(RunConfig))} options")


if __name__ == "__main__":
    main()
