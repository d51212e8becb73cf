"""Pictures of a part's prompts, drawn in an arm's way, as latents; with what they cost."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from discriminative.diffusion.sampler import draw_noise
from discriminative.precision import bf16_without_gradient, trains_in_bf16
from discriminative.progress import progress
from discriminative.records.files import write_tensors
from dpt.choose import adapter_score
from dpt.correct import Correction, Told, corrected_latents, encode_prompts
from dpt.experiment.prompts import Part
from dpt.experiment.rivals import optimised_noise
from dpt.experiment.settings import AT_ONCE, CHEAP, Arm
from dpt.forward import Reader
from dpt.settings import CHOICE_NOISES, MINIATURE_EVALUATION_TIMESTEP


@dataclass
class Cost:
    """What pictures cost, all together.

    Args:
        seconds: of the processor, in this process.
        forwards: of the UNet, each of one latent under one text.
        backwards: through it.
    """

    seconds: float = 0.0
    forwards: int = 0
    backwards: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        seconds = self.seconds + other.seconds
        return Cost(seconds, self.forwards + other.forwards, self.backwards + other.backwards)


@dataclass(frozen=True)
class Drawn:
    """Finished latents (N, 4, h, w) and their cost."""

    latents: torch.Tensor
    cost: Cost = field(default_factory=Cost)


@contextmanager
def counted(unet) -> Iterator[Cost]:
    """Within the block the UNet's work and the time are counted; a forward whose latents want gradient has
    one way back."""
    cost = Cost()

    def count(module, inputs: tuple) -> None:
        cost.forwards += len(inputs[0])
        cost.backwards += len(inputs[0]) if inputs[0].requires_grad else 0

    handle = unet.register_forward_pre_hook(count)
    start = time.process_time()
    try:
        yield cost
    finally:
        cost.seconds = time.process_time() - start
        handle.remove()


def slices(number: int) -> list[slice]:
    """Of at most ``AT_ONCE`` pictures."""
    return [slice(first, first + AT_ONCE) for first in range(0, number, AT_ONCE)]


def some_of(told: Told, part: slice) -> Told:
    """The prompts of a slice."""
    return told._replace(cond=told.cond[part], pooled=told.pooled[part])


def bf16(reader: Reader, arm: Arm):
    """The context in which an arm's pictures are drawn and decoded: where no gradient is wanted in bfloat16,
    but the costly sampler's in float32."""
    wanted = arm.sampler == CHEAP and trains_in_bf16("auto", reader.device)
    return bf16_without_gradient(reader.models, wanted)


@torch.no_grad()
def draw(reader: Reader, arm: Arm, settings: dict, part: Part, candidate: int = 0) -> Drawn:
    """The pictures of a part.

    Args:
        settings: "factor" and "mode" of a correction; "steps", "rate" and "iterations" of a noise.
        candidate: which of each picture's candidates; 0 is its own noise.
    """
    correction = Correction(settings.get("factor", 0.0), settings.get("mode", "official"))
    seeds = part.candidates(candidate)
    found = []
    with bf16(reader, arm), counted(reader.models.unet) as cost:
        told = encode_prompts(reader, [prompt.text for prompt in part.asked])
        shape = reader.models.latent_shape(None, None)
        for some in progress(slices(len(seeds)), desc="pictures", unit="part", leave=False):
            noise = draw_noise(seeds[some], shape)  # (B, 4, h, w)
            prompts = some_of(told, some)
            if "iterations" in settings:
                noise = optimised_noise(reader, prompts, seeds[some], noise, settings)
            found.append(corrected_latents(reader, prompts, noise, arm.sampler, correction)[0])
    return Drawn(torch.cat(found).half().float(), cost)  # as they are kept


@torch.no_grad()
def scores_by_adapter(reader: Reader, candidates: list[Drawn], part: Part) -> tuple[torch.Tensor, Cost]:
    """The adapter's score of each picture's candidates (k, N), and what scoring cost."""

    def score(latents: torch.Tensor, some: slice) -> torch.Tensor:
        seeds = list(part.seeds[some])
        told_of = some_of(told, some)
        return adapter_score(reader, latents, told_of, seeds, MINIATURE_EVALUATION_TIMESTEP, CHOICE_NOISES)

    with counted(reader.models.unet) as cost:
        told = encode_prompts(reader, [prompt.text for prompt in part.asked])
        scores = [
            torch.cat([score(drawn.latents[some], some) for some in slices(len(part.seeds))])
            for drawn in candidates
        ]
    return torch.stack(scores), cost


# Kept on disk.


def path_of(root: Path, name: str, seed: int, prompts: str, part: int, candidate: int = 0) -> Path:
    """The file of an arm's pictures."""
    return root / "drawn" / name / str(seed) / f"{prompts}-{part:02d}-{candidate}.safetensors"


def keep(path: Path, drawn: Drawn, settings: dict) -> None:
    """Write latents in half precision."""
    metadata = {"settings": json.dumps(settings), "cost": json.dumps(vars(drawn.cost))}
    write_tensors(path, {"latents": drawn.latents.half().contiguous()}, metadata)


def kept(path: Path, settings: dict) -> Drawn | None:
    """What is kept of pictures drawn with these settings; None where there is nothing."""
    if not path.is_file():
        return None
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    if json.loads(metadata["settings"]) != settings:
        return None
    return Drawn(load_file(path)["latents"].float(), Cost(**json.loads(metadata["cost"])))
