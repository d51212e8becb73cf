"""Time and memory of an update at Stable Diffusion 1.4's shapes, 512x512, with random weights, ours
against the plain reference.

    python -m experiments.speed.gpu --out experiments/speed/results/gpu.json        # on CUDA; a few minutes
    python -m experiments.speed.gpu --tiny True                              # that it runs, on any
    machine: small shapes, float32

Random weights cost what trained ones cost. The guide is ViT-L/16. "paper" is the official trajectory (30
steps of PNDM, gradient through the last one), "stage 1" to "stage 3" are the updates of the default. All
take turns within each round. Ours write their log and a strip of images, the reference writes nothing.
"""

import argparse
import copy
import gc
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from config import RunConfig, with_preset
from discriminative.diffusion.memory import SETTINGS, checkpointed, peak_bytes
from discriminative.guides.classifier import Guide
from discriminative.hub import quiet_libraries
from discriminative.precision import resolve_dtype
from discriminative.records.layout import RunFolder
from discriminative.tokens.class_token import ClassToken
from experiments.speed import common
from experiments.speed.footprint import LiveBytes
from experiments.speed.reference import Reference
from experiments.speed.sd_shapes import build_guide, build_models
from experiments.speed.update import stages_of
from run import boolean
from trainer import Training, train

TINY = {"height": 64, "width": 64, "num_inference_steps": 3, "training_sampler": "dpmsolver++@3"}


class Operations(TorchDispatchMode):
    """Counts floating-point operations by torch's own formulas; its FlopCounterMode cannot follow
    ``autograd.grad`` to a leaf."""

    total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function._overloadpacket in flop_registry:
            self.total += flop_registry[function._overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out


class Bed:
    """Models of one precision, and updates of theirs."""

    def __init__(self, device: torch.device, precision: str, tiny: bool, compiled: bool):
        self.device = device
        self.dtype = resolve_dtype(precision, device)
        width = 0.1 if tiny else 1.0
        self.tiny = tiny
        self.changes = {"mixed_precision": precision} | (TINY if tiny else {})
        models = build_models(width, device, self.dtype)
        plain = (
            replace(models, unet=copy.deepcopy(models.unet), vae=copy.deepcopy(models.vae))
            if compiled
            else models
        )
        self.guide: Guide = build_guide(width, device, self.dtype)
        self.reference = Reference(
            plain, self.guide, "tiger cat", replace(with_preset("paper", {}), **self.paper_changes)
        )
        self.token = ClassToken(models, "newclas", "a")
        if compiled:
            models.compile()

    @property
    def paper_changes(self) -> dict:
        """Small shapes of the paper's trajectory, which has no sampler of training's own."""
        return {k: v for k, v in self.changes.items() if k != "training_sampler"}

    def cases(self) -> dict[str, RunConfig]:
        """One update of each kind."""
        once = {"class_index": 283, "train": True, "choose_by": "loss", "max_epochs": 1}
        default = replace(with_preset("default", once), **self.changes)
        return {"paper": replace(with_preset("paper", once), **self.paper_changes)} | stages_of(default)

    def update(self, config: RunConfig, memory: str = "max") -> Training:
        """One whole update of ours under a setting of ``--memory``."""
        setting = SETTINGS[memory]
        sizes = {"decode_batch_size": setting.decode_batch_size, "eval_batch_size": setting.eval_batch_size}
        learning = replace(config, **sizes).learning()
        for name in ("unet", "vae"):
            module = getattr(self.token.models, name)
            (
                module.enable_gradient_checkpointing
                if name in checkpointed(memory)
                else module.disable_gradient_checkpointing
            )()
        # The figure is drawn once a training, not once an update.
        with tempfile.TemporaryDirectory() as folder, mock.patch("trainer.show_evolution"):
            return train(learning, self.token, [self.guide], "tiger cat", RunFolder(folder, "c", "e"))

    def peak(self, work: Callable[[], object]) -> dict[str, float]:
        """GB at the peak of ``work``: of tensors; on CUDA also of all that the process holds on the card."""
        if self.device.type != "cuda":
            with LiveBytes() as live:
                work()
            return {"tensors_made_gb": live.peak / 1e9}
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)
        work()
        free, total = torch.cuda.mem_get_info(self.device)  # the allocator keeps what it had at its peak
        return {"tensors_gb": peak_bytes(self.device) / 1e9, "card_gb": (total - free) / 1e9}


def matrix_rate(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """Operations a second of a product of square matrices, the median of five."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    torch.mm(a, b)
    return 2 * size**3 / statistics.median(common.seconds(lambda: torch.mm(a, b), device) for _ in range(5))


def speed(bed: Bed, rounds: int, size: int) -> dict:
    """Median seconds of an update, ratios to the reference, and the share of the device's own matrix rate."""
    updates = {name: lambda config=config: bed.update(config) for name, config in bed.cases().items()}
    found = common.alternating({"reference": bed.reference.update} | updates, rounds, bed.device)
    rate = matrix_rate(bed.device, bed.dtype, size)
    rows = {}
    for name, middle in common.medians(found).items():
        rows[name] = {"seconds": middle, "reference_over": common.ratios(found, "reference", name)}
    for name, work in updates.items():
        with Operations() as counted:
            work()
        rows[name] |= {
            "teraflop": counted.total / 1e12,
            "share_of_matrix_rate": counted.total / rows[name]["seconds"] / rate,
        }
    return {"matrix_teraflop_a_second": rate / 1e12, "updates": rows}


def memory(bed: Bed) -> dict:
    """Peaks of the settings of ``--memory``, and of 1, 2 and 5 steps with gradient."""
    cases = bed.cases()
    found = {
        name: {kind: bed.peak(lambda c=c, name=name: bed.update(c, name)) for kind, c in cases.items()}
        for name in SETTINGS
    }
    # At the small shapes a trajectory has no five steps.
    numbers = (1, 2) if bed.tiny else (1, 2, 5)
    steps = {
        k: bed.peak(lambda k=k: bed.update(replace(cases["paper"], gradient_mode=f"last:{k}")))
        for k in numbers
    }
    return {"settings": found, "gradient_steps": steps}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--precisions",
        nargs="+",
        choices=("no", "bf16", "fp16"),
        help="default: bf16 fp16; no (float32) with --tiny",
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compile", type=boolean, default=False, help="compile UNet and decoder")
    parser.add_argument("--tiny", type=boolean, default=False, help="a tenth of the width, 64x64, 3 steps")
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    args = parser.parse_args()
    if not (args.tiny or torch.cuda.is_available()):
        parser.error("there is no CUDA device; --tiny True runs on the CPU")
    quiet_libraries()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    result = common.environment(device) | {"tiny": args.tiny, "compiled": args.compile, "precisions": {}}
    begin = time.perf_counter()
    for precision in args.precisions or (["no"] if args.tiny else ["bf16", "fp16"]):
        bed = Bed(device, precision, args.tiny, args.compile)
        found = speed(bed, args.rounds, 512 if args.tiny else 8192)
        bed.reference = (
            None  # a text encoder and an optimiser's state of its own, which are no part of our peak
        )
        gc.collect()
        result["precisions"][precision] = found | (memory(bed) if precision != "fp16" else {})
        del bed
        gc.collect()
    common.finish(result | {"seconds_in_all": time.perf_counter() - begin}, args.out)


if __name__ == "__main__":
    main()
