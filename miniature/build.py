"""Build the miniature from nothing: tokenizer, VAE, UNet with text encoder and its calibration, guide,
judges, detector, and the folder that ships.

    python -m miniature.build                       # every stage that is not done yet, on CUDA if there
    is one
    python -m miniature.build --stage unet          # one stage; an interrupted one goes on from its
    checkpoint
    python -m miniature.build --stage vae --redo    # one stage anew

Renders, checkpoints and logs stay in ``--work``; only ``--out`` is meant to be kept.
"""

import argparse
import shutil
from pathlib import Path

import torch

from discriminative.records.files import follow_umask
from miniature import calibrate, classifiers, detector, export, tokenizer, unet, vae
from miniature.training import log_hardware

WEIGHTS = Path(__file__).parent / "weights"
# Stage -> what it leaves in the work folder once it is done. In the order of their needs.
STAGES = {
    "tokenizer": "tokenizer",
    "vae": "vae",
    "unet": "unet",
    "calibrate": "calibrated_unet",
    "guide": "guide",
    "judge": "judge",
    "judge2": "judge2",
    "detector": "detector",
    "export": None,
}
NEEDS = {
    "unet": ("tokenizer", "vae"),
    "calibrate": ("unet",),
    "guide": ("vae",),
    "judge": ("vae",),
    "judge2": ("vae",),
    "detector": ("vae",),
}
RENDERS = 60_000  # captioned training scenes


def build_stage(stage: str, work: Path, out: Path, device: torch.device, steps: int | None) -> None:
    """Run one stage to its end."""
    if stage == "export":
        export.export(work, out)
    elif stage in classifiers.CLASSIFIERS:
        classifiers.train(stage, work, device, steps)
    elif stage == "detector":
        detector.train(work, device, steps)
    else:
        {"tokenizer": tokenizer, "vae": vae, "unet": unet, "calibrate": calibrate}[stage].train(
            work, device, RENDERS, steps
        )


def drop(stage: str, work: Path) -> None:
    """Remove what a stage left, and what was made from it."""
    (work / f"{stage}.checkpoint").unlink(missing_ok=True)
    if STAGES[stage]:
        shutil.rmtree(work / STAGES[stage], ignore_errors=True)
    for other, needs in NEEDS.items():
        if stage in needs:
            drop(other, work)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--stage", choices=STAGES, action="append", help="a stage to run; may be repeated; default: all"
    )
    parser.add_argument(
        "--redo",
        action="store_true",
        help="drop what the named stages left, and what was made from it, and start them anew",
    )
    parser.add_argument(
        "--steps", type=int, help="updates of the stage, where its default does not fit; for one --stage"
    )
    parser.add_argument(
        "--work", type=Path, default=Path("build/miniature"), help="folder of renders, checkpoints and logs"
    )
    parser.add_argument("--out", type=Path, default=WEIGHTS, help="folder of the finished weights")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    if args.steps and len(args.stage or ()) != 1:
        parser.error("--steps goes with exactly one --stage")
    if args.redo and not args.stage:
        parser.error("--redo goes with --stage: name what is to be dropped")
    args.work.mkdir(parents=True, exist_ok=True)
    log_hardware(args.work, args.device)
    for stage in args.stage or STAGES:
        left = STAGES[stage] and args.work / STAGES[stage]
        if args.redo:
            drop(stage, args.work)
        if left and left.exists():
            print(f"{stage}: done before ({left}); --redo starts it anew")
            continue
        build_stage(stage, args.work, args.out, torch.device(args.device), args.steps)
        if left:
            follow_umask(left)


if __name__ == "__main__":
    main()
