"""What the stages of the miniature's build share: renders on disk, schedule, averaging, checkpoints and
the log."""

import json
import math
import os
import platform
import time
from copy import deepcopy
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file

from discriminative.records.files import write_tensors
from miniature.scenes import CLASSES, SIZE, render

LABELLED = {"count": 1}  # what a classifier sees: one thing, so that the label is exact


class Renders(NamedTuple):
    """Scenes of a split: images (N, 64, 64, 3) uint8, their two captions, class index of each one's first
    thing (N,)."""

    images: np.ndarray
    captions: list[str]
    precise_captions: list[str]
    labels: np.ndarray


def renders(work: Path, split: str, number: int, labelled: bool = False) -> Renders:
    """The first ``number`` scenes of a split, rendered once and kept in ``work``.

    Args:
        labelled: scenes of one thing only, every class equally often (for classifiers); else scenes as
            they come.
    """
    folder = work / f"renders-{split}-{number}{'-labelled' if labelled else ''}"
    if not (folder / "captions.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        images = np.lib.format.open_memmap(folder / "images.npy", "w+", np.uint8, (number, SIZE, SIZE, 3))
        captions = []
        precise_captions = []
        labels = []
        for i in range(number):
            # Labelled scenes count on from a million, so that they are other scenes than the captioned ones.
            scene = (
                render(split, 1_000_000 + i, class_index=i % len(CLASSES), **LABELLED)
                if labelled
                else render(split, i)
            )
            images[i] = np.asarray(scene.image)
            captions.append(scene.caption)
            precise_captions.append(scene.precise_caption)
            labels.append(scene.things[0].class_index)
        images.flush()
        np.save(folder / "labels.npy", np.array(labels))
        (folder / "captions.json").write_text(json.dumps([captions, precise_captions]))
    captions = json.loads((folder / "captions.json").read_text())
    return Renders(np.load(folder / "images.npy", mmap_mode="r"), *captions, np.load(folder / "labels.npy"))


def to_tensor(images: np.ndarray, device: torch.device) -> torch.Tensor:
    """Images (B, 64, 64, 3) uint8 to a tensor in [-1, 1]."""
    batch = torch.from_numpy(np.array(images)).to(device)
    return batch.permute(0, 3, 1, 2).float() / 127.5 - 1  # (B, 3, 64, 64)


def lr_factor(step: int, steps: int, warmup: int = 200, decay: float = 0.3) -> float:
    """Warm up linearly, hold, and fall to zero along a half cosine over the last ``decay`` of the steps."""
    if step < warmup:
        return (step + 1) / warmup
    start = steps * (1 - decay)
    return 1.0 if step < start else 0.5 * (1 + math.cos(math.pi * (step - start) / (steps - start)))


def log_hardware(work: Path, device: str) -> None:
    """Note in ``<work>/build.log`` what the build runs on."""
    name = (
        torch.cuda.get_device_name(device)
        if device.startswith("cuda")
        else platform.processor() or platform.machine()
    )
    Log(work, "build")(
        f"{device} ({name}), {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch "
        f"{torch.__version__}"
    )


class Log:
    """Prints a line and appends it, with the seconds since the start, to ``<work>/<stage>.log``."""

    def __init__(self, work: Path, stage: str):
        self.path = work / f"{stage}.log"
        self.start = time.monotonic()

    def __call__(self, text: str) -> None:
        line = f"[{time.monotonic() - self.start:7.1f} s] {text}"
        print(line, flush=True)
        with self.path.open("a") as log:
            log.write(line + "\n")


class Trainee:
    """Modules in training: AdamW, an exponential average of the weights, and a checkpoint that can be
    resumed.

    Args:
        modules: name -> module; they share one optimiser and one average each.
        rounds: updates at the end of each round of training, and its learning rate, which warms up, holds
            and falls.
        ema: decay of the average; it warms up, so early averages are not the random start.
    """

    def __init__(
        self, modules: dict, work: Path, stage: str, rounds: list[tuple[int, float]], ema: float = 0.999
    ):
        self.modules = modules
        self.ends = [end for end, _ in rounds]
        self.rates = [rate for _, rate in rounds]
        self.ema = ema
        self.steps = self.ends[-1]
        self.average = {name: deepcopy(m).requires_grad_(False) for name, m in modules.items()}
        self.optimizer = torch.optim.AdamW(
            [p for m in modules.values() for p in m.parameters()],
            lr=self.rates[0],
            betas=(0.9, 0.99),
            weight_decay=1e-2,
        )
        self.step = 0
        self.path = work / f"{stage}.checkpoint"
        self.log = Log(work, stage)

    @property
    def round(self) -> int:
        """Index of the round that the next update belongs to."""
        return next((i for i, end in enumerate(self.ends) if self.step < end), len(self.ends) - 1)

    def update(self, loss: torch.Tensor) -> None:
        """One step of the optimiser on ``loss``, then of the average."""
        begin = (0, *self.ends)[self.round]
        end = self.ends[self.round]
        for group in self.optimizer.param_groups:
            group["lr"] = self.rates[self.round] * lr_factor(self.step - begin, end - begin)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        params = [p for m in self.modules.values() for p in m.parameters()]
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        self.optimizer.step()
        self.step += 1
        decay = min(self.ema, (1 + self.step) / (10 + self.step))
        self.average_in(1 - decay)

    @torch.no_grad()
    def average_in(self, weight: float) -> None:
        """Move the averages towards the modules."""
        for name, module in self.modules.items():
            torch._foreach_lerp_(list(self.average[name].parameters()), list(module.parameters()), weight)
            for mean, now in zip(self.average[name].buffers(), module.buffers(), strict=True):
                mean.copy_(now)

    def save(self) -> None:
        """Write weights, averages and the optimiser's state; the file replaces the last one in one move."""
        tensors = {}
        for kind, group in (("now", self.modules), ("average", self.average)):
            for name, module in group.items():
                tensors |= {
                    f"{kind}/{name}/{k}": v.clone().contiguous() for k, v in module.state_dict().items()
                }
        for i, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{i}/{k}": torch.as_tensor(v).clone() for k, v in state.items()}
        write_tensors(self.path, tensors, {"step": str(self.step)})

    def resume(self) -> None:
        """Go on from the last checkpoint, if there is one."""
        if not self.path.exists():
            return
        tensors = load_file(self.path)
        for kind, group in (("now", self.modules), ("average", self.average)):
            for name, module in group.items():
                prefix = f"{kind}/{name}/"
                module.load_state_dict(
                    {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
                )
        state = self.optimizer.state_dict()
        for key, value in tensors.items():
            if key.startswith("optimizer/"):
                _, index, name = key.split("/")
                state["state"].setdefault(int(index), {})[name] = value
        self.optimizer.load_state_dict(state)
        self.step = int(state["state"][0]["step"])
        self.log(f"resumed at step {self.step} of {self.steps}")
