"""Seconds from the shell to the first denoising step of the miniature, against importing the libraries alone.

    python -m experiments.speed.startup --rounds 5

Each is a process of its own; they take turns.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from experiments.speed import common

ROOT = Path(__file__).parents[2]

# The libraries load their classes when they are first named, so importing the libraries alone leaves most
# of the work undone.
LIBRARIES = "import torch, diffusers, transformers"
CLASSES = (
    f"{LIBRARIES}, timm; diffusers.UNet2DConditionModel, diffusers.AutoencoderKL, transformers.CLIPTextModel"
)

# Ends the process at its first call of the UNet; one that never gets there fails.
FIRST_STEP = """
import os
import run, diffusers
diffusers.UNet2DConditionModel.forward = lambda *args, **kwargs: os._exit(0)
run.main("--model miniature --class_index 2 --train True --device cpu --output_path".split() + [{out!r}])
os._exit(1)
"""


def process(code: list[str]) -> None:
    """Run Python with these arguments to its end."""
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.run([sys.executable, *code], check=True, cwd=ROOT, **quiet)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    args = parser.parse_args()
    device = torch.device("cpu")
    with tempfile.TemporaryDirectory() as out:
        cases = {
            "libraries": lambda: process(["-c", LIBRARIES]),
            "their classes": lambda: process(["-c", CLASSES]),
            "to the first denoising step": lambda: process(["-c", FIRST_STEP.format(out=out)]),
            "run.py --help": lambda: process([str(ROOT / "run.py"), "--help"]),
        }
        found = common.alternating(cases, args.rounds, device)
    over = {
        name: common.ratios(found, "to the first denoising step", name)
        for name in ("libraries", "their classes")
    }
    result = {
        "imports": {"libraries": LIBRARIES, "their classes": CLASSES},
        "seconds": common.medians(found),
        "first_step_over": over,
    }
    common.finish(common.environment(device) | result, args.out)


if __name__ == "__main__":
    main()
