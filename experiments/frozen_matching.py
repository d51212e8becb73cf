"""What the frozen UNet itself tells apart, before any probe: the caption under which its noise errs less.

    python -m experiments.frozen_matching

After *Diffusion Classifier* (Li et al. 2023). Expect things .87 at t = 300 to 600, colours .74 at t = 900,
numbers .73 at t = 60 and relations .5 everywhere, in a minute on one CPU core. It is the neighbour of
``python -m dpt evaluate``, which a trained adapter has to beat: the same kinds, both directions, chance .50.
"""

import argparse
from collections import defaultdict

import torch
from tqdm import tqdm

from discriminative.diffusion.models import load_models
from discriminative.hub import quiet_libraries
from dpt.data.scenes import Miniature
from dpt.evaluate import noised, share
from dpt.files import new_reader
from dpt.forward import HARD, RIGHT, TRUE, Reader, encode_texts
from dpt.latents import Latents, Row
from dpt.settings import MINIATURE_ADAPTER, MINIATURE_PROBE

CPU = torch.device("cpu")
BATCH = 16  # samples at once
CANDIDATES = (RIGHT, (TRUE, HARD), (HARD, TRUE))  # picture and text
TIMESTEPS = (60, 150, 300, 450, 600, 750, 900)


@torch.no_grad()
def errors(reader: Reader, rows: list[Row], first: int, timestep: int, noises: int) -> torch.Tensor:
    """Mean squared error of the predicted noise (3, B) under each of ``CANDIDATES``, over the noises."""
    unet = reader.models.unet
    texts = encode_texts(reader, rows)
    total = torch.zeros(len(CANDIDATES), len(rows))  # (3, B)
    for number in range(noises):
        # Scaled posterior means under the noise that the sample's pictures share.
        seen = noised(reader, rows, first, seed=0, number=number, timestep=timestep)
        for candidate, (picture, text) in enumerate(CANDIDATES):
            latents = seen.latents[:, picture]  # (B, 4, h, w)
            noise_pred = unet(latents, seen.timesteps, texts[text].states).sample  # (B, 4, h, w)
            total[candidate] += (noise_pred - seen.target).square().mean(dim=(1, 2, 3)) / noises
    return total


def measure(reader: Reader, rows: list[Row], timestep: int, noises: int) -> dict[str, dict]:
    """By kind of negative the share of right verdicts, both directions together, and of all."""
    right = defaultdict(list)
    for first in range(0, len(rows), BATCH):
        batch = rows[first : first + BATCH]
        true, hard_text, hard_picture = errors(reader, batch, first, timestep, noises)
        for i, row in enumerate(batch):
            verdicts = [bool(true[i] < hard_text[i]), bool(true[i] < hard_picture[i])]
            right[row.kind] += verdicts
            right["all"] += verdicts
    return {kind: share(verdicts) for kind, verdicts in right.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--split", choices=("validation", "test"), default="validation")
    parser.add_argument("--samples", type=int, default=300)
    parser.add_argument("--noises", type=int, default=2, help="over which errors are averaged")
    parser.add_argument("--timesteps", nargs="+", type=int, default=TIMESTEPS)
    args = parser.parse_args()
    quiet_libraries()
    models = load_models("miniature", CPU, torch.float32)
    reader = new_reader(models, MINIATURE_PROBE, MINIATURE_ADAPTER, "pipeline")
    data = Miniature(args.split, args.samples, seed=0, wording="bare")
    latents = Latents(models.vae)
    rows = [latents.row(data[i]) for i in tqdm(range(len(data)), "encode", leave=False)]
    for timestep in args.timesteps:
        found = measure(reader, rows, timestep, args.noises)
        cells = [f"{kind} {f['share']:.2f} [{f['low']:.2f}, {f['high']:.2f}]" for kind, f in found.items()]
        print(f"t = {timestep:>3}: {', '.join(cells)}", flush=True)


if __name__ == "__main__":
    main()
