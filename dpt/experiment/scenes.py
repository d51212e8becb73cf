"""The scenes that all trainings and readings share, as latents on disk: drawn and encoded once."""

import json
from pathlib import Path

import torch

from discriminative.progress import progress
from discriminative.records.files import write_tensors, write_text
from dpt.data.samples import Grounding
from dpt.data.scenes import Miniature
from dpt.experiment.settings import SCENE_SEED, SCENES
from dpt.files import read_tensors
from dpt.latents import Latents, Row
from dpt.settings import MINIATURE_WORDING

FOLDER = "scenes"


def files(root: Path, split: str) -> tuple[Path, Path]:
    """Tensors and texts of a split."""
    return root / FOLDER / f"{split}.safetensors", root / FOLDER / f"{split}.json"


def are_kept(root: Path) -> bool:
    """Whether all scenes are there."""
    return all(path.is_file() for split in SCENES for path in files(root, split))


def data_of(split: str) -> Miniature:
    """The scenes of a split."""
    return Miniature(split, SCENES[split], SCENE_SEED, wording=MINIATURE_WORDING)


def keep_scenes(root: Path, vae: torch.nn.Module) -> None:
    """Draw, encode and write what is not there yet."""
    for split in SCENES:
        tensors, texts = files(root, split)
        if tensors.is_file() and texts.is_file():
            continue
        data = data_of(split)
        latents = Latents(vae, most=0)
        places = progress(range(len(data)), desc=f"{split} scenes", unit="scene", leave=False)
        rows = [latents.row(data[i]) for i in places]
        write_text(texts, json.dumps([told(row) for row in rows]))
        stacked = torch.stack([torch.stack(row.latents) for row in rows])  # (N, 3, 2, 4, h, w)
        boxes = torch.stack([row.grounding.boxes for row in rows])  # (N, 1, 4)
        write_tensors(tensors, {"latents": stacked, "boxes": boxes}, {"format": "pt"})


def told(row: Row) -> list:
    """A row's texts."""
    return [row.captions, row.kind, row.grounding.expression, row.grounding.spans]


def kept_rows(root: Path, split: str) -> list[Row]:
    """The samples of a split without their pixels."""
    tensors, texts = files(root, split)
    found = read_tensors(tensors)
    rows = []
    for i, (captions, kind, expression, spans) in enumerate(json.loads(texts.read_text())):
        pieces = tuple(tuple(map(tuple, some)) for some in spans)
        grounding = Grounding(expression, found["boxes"][i], pieces)
        rows.append(Row(tuple(found["latents"][i]), tuple(captions), kind, grounding))
    return rows
