"""A run's folders and files. Whatever replaces a file is written beside it and then renamed, so none is
ever half there."""

import csv
import io
import json
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from safetensors import SafetensorError
from safetensors.torch import save_file

from discriminative.errors import WorkError, WriteError
from discriminative.hub import one_line

GAP = 2  # pixels between the images of a grid
THUMBNAIL = 128  # pixels: at 512 the pictures of a training would take 200 MB
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


def _replace(path: Path, write) -> None:
    # Processes of two machines may have the same number.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    with told_what_cannot_be_written(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write(temporary)
            follow_umask(temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def told_what_cannot_be_written(path: Path) -> Iterator[None]:
    """Around whatever writes a file or folder: a full disk says neither which one, nor is it of one kind
    in all libraries.

    Raises:
        WriteError: the system refused.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        raise WriteError(f"{path}: cannot be written ({reason})") from error


def follow_umask(path: Path) -> None:
    """Give a file, or all files below a folder, the permissions of any new one: safetensors writes files
    that their owner alone can read."""
    fresh = path.with_name(f".{path.name}.fresh")
    fresh.touch()
    mode = fresh.stat().st_mode
    fresh.unlink()
    for file in (path, *path.rglob("*")):
        if file.is_file() and file.stat().st_mode != mode:
            file.chmod(mode)


def replace_folder(new: Path, old: Path) -> None:
    """Put a folder in the place of another, which goes."""
    if old.exists():
        shutil.rmtree(old)
    new.rename(old)


def clear(folder: Path, pattern: str) -> None:
    """Remove an earlier run's pictures, which would stand among the new ones under other names."""
    for path in folder.glob(pattern):
        path.unlink()


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


def write_table(path: Path, rows: list[dict], columns: Sequence[str] = ()) -> None:
    """Write rows as CSV; without ``columns`` they are the first row's."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns or list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file."""
    _replace(path, lambda p: save_file(tensors, p, metadata))


def to_pil(image: torch.Tensor) -> Image.Image:
    """An image (3, H, W) in [0, 1] as a picture of 8 bits; black where it is not finite."""
    return Image.fromarray((image.nan_to_num(0).permute(1, 2, 0).float() * 255).round().byte().cpu().numpy())


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


def thumbnails(images: torch.Tensor, size: int = THUMBNAIL) -> torch.Tensor:
    """Images (B, 3, H, W), made smaller where they are larger than ``size`` pixels."""
    largest = max(images.shape[-2:])
    if largest <= size:
        return images
    shape = [max(1, round(side * size / largest)) for side in images.shape[-2:]]
    return torch.nn.functional.interpolate(images.float(), shape, mode="area")  # (B, 3, h, w)


def grid(images: torch.Tensor, columns: int, gap: int = GAP) -> Image.Image:
    """Images (B, 3, H, W) in [0, 1] as one picture, row by row."""
    height, width = images.shape[-2:]
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for i, image in enumerate(images):
        sheet.paste(to_pil(image), (i % columns * (width + gap), i // columns * (height + gap)))
    return sheet
