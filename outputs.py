"""A run's folders and files. Whatever replaces a file is written beside it and then renamed, so none is ever half there."""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file

from config import PICTURE_FOLDERS, WorkError

GAP = 2  # pixels between the images of a grid
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


def class_folder(class_index: int, label: str) -> str:
    """A safe, unique folder name: "0283_tiger_cat" (label lists hold the same name twice: ImageNet has two cranes)."""
    return f"{class_index:04d}_{re.sub(r'[^a-z0-9]+', '_', label.lower()).strip('_')[:60]}"


class RunFolder:
    """The paths of one class and experiment below ``--output_path``.

    Args:
        output_path: the run's root. class_name: from :func:`class_folder`. exp_id: name of the experiment.
    """

    def __init__(self, output_path: str, class_name: str, exp_id: str):
        root, self.name = Path(output_path), class_name
        self.records = root / "pipeline_token" / class_name / exp_id
        self.token, self.config = self.records / "learned_embeds.safetensors", self.records / "config.json"
        self.partial_token = self.records / "learned_embeds.partial.safetensors"  # the best so far, while training runs
        self.pipeline, self.web_ui = self.records / "pipeline", self.records / "a1111"
        self.log, self.result = self.records / "log.jsonl", self.records / "evaluation.json"
        # Experiments of one class do not mix their pictures; the default one has no folder of its own.
        images = root / "img" / class_name / ("" if exp_id == "default" else exp_id)
        self.train_images, self.eval_images, self.prompt_images = (images / name for name in PICTURE_FOLDERS)
        self.unfinished_eval_images = images / "eval.partial"  # until all are drawn
        # Nothing but classes in the folder, which is what readers of data sets take its folders for.
        self.dataset = root / ("dataset" if exp_id == "default" else f"dataset_{exp_id}") / class_name
        self.grid, self.evolution = images / "grid.png", images / "evolution.png"

    def forget_token(self) -> None:
        """Remove what was made of a token that another one replaces: how it was learned, its evaluation with the pictures, its exports."""
        for path in (self.result, self.config, self.grid):
            path.unlink(missing_ok=True)
        for folder in (self.eval_images, self.web_ui, self.pipeline):
            shutil.rmtree(folder, ignore_errors=True)


def _replace(path: Path, write) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def replace_folder(new: Path, old: Path) -> None:
    """Put a folder in the place of another, which goes."""
    if old.exists():
        shutil.rmtree(old)
    new.rename(old)


def clear(folder: Path, pattern: str) -> None:
    """Remove an earlier run's pictures, which would stand among the new ones under other names."""
    for path in folder.glob(pattern):
        path.unlink()


def make_readable(pipeline: Path, tokenizer: Any) -> None:
    """Let transformers 4, too, read the text encoder and tokenizer of a pipeline's folder that transformers 5 wrote.

    5 writes names of weights that 4 takes for missing, and no vocabulary but that in tokenizer.json, which 4's CLIPTokenizer does not
    read. 5 reads either.
    """
    path = pipeline / "text_encoder" / "model.safetensors"
    tensors = load_file(path)
    write_tensors(path, {f"text_model.{k.removeprefix('text_model.')}": v for k, v in tensors.items()}, {"format": "pt"})
    backend = getattr(tokenizer, "backend_tokenizer", None)  # transformers 4's CLIPTokenizer has none, and writes the files itself
    if backend:
        backend.model.save(str(pipeline / "tokenizer"))


def write_text(path: Path, text: str) -> None:
    """Write a text file."""
    _replace(path, lambda p: p.write_text(text, encoding="utf-8"))


def read_json(path: Path) -> dict:
    """An object that :func:`write_json` wrote.

    Raises:
        WorkError: it cannot be read, or holds no object.
    """
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise WorkError(f"{path}: cannot be read ({error}); remove or mend it") from error
    if not isinstance(content, dict):
        raise WorkError(f"{path}: holds no object; remove or mend it")
    return content


def write_json(path: Path, content: dict) -> None:
    """Write an object as indented JSON."""
    _replace(path, lambda p: p.write_text(json.dumps(content, indent=2) + "\n"))


def write_lines(path: Path, rows: list[dict]) -> None:
    """Write JSON lines, one object a row."""
    _replace(path, lambda p: p.write_text("".join(json.dumps(row) + "\n" for row in rows)))


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file."""
    _replace(path, lambda p: save_file(tensors, p, metadata))


def to_pil(image: torch.Tensor) -> Image.Image:
    """An image (3, H, W) in [0, 1] as a picture of 8 bits."""
    return Image.fromarray((image.permute(1, 2, 0).float() * 255).round().byte().cpu().numpy())


def image_files(folder: str | Path) -> list[Path]:
    """All pictures below a folder, in order."""
    return sorted(p for p in Path(folder).rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())


def read_image(path: Path) -> torch.Tensor:
    """A picture (3, H, W) in [0, 1].

    Raises:
        WorkError: it cannot be read.
    """
    try:
        with Image.open(path) as picture:
            pixels = np.array(ImageOps.exif_transpose(picture).convert("RGB"))  # (H, W, 3)
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise WorkError(f"{path}: not a readable picture ({error})") from error
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255


def write_image(path: Path, picture: Image.Image) -> None:
    """Write a PNG file, little compressed: training waits for it."""
    _replace(path, lambda p: picture.save(p, format="PNG", compress_level=1))


def grid(images: torch.Tensor, columns: int, gap: int = GAP) -> Image.Image:
    """Images (B, 3, H, W) in [0, 1] as one picture, row by row."""
    height, width = images.shape[-2:]
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for i, image in enumerate(images):
        sheet.paste(to_pil(image), (i % columns * (width + gap), i // columns * (height + gap)))
    return sheet
