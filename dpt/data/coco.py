"""``--data coco``: COCO's captions with mined negatives, and the referring expressions of RefCOCO, RefCOCO+
and RefCOCOg in MDETR's format.

The folders, and where their files come from:

    coco_root/annotations/captions_train2014.json          cocodataset.org
    coco_root/train2014/COCO_train2014_*.jpg               cocodataset.org
    refcoco_root/finetune_refcoco_train.json, ...          MDETR's pre-processed annotations on Zenodo
    coco_root/dpt_negatives.json                           python -m dpt mine

A sample is one expression. Its image's captions are COCO's own: the two are joined by COCO's image id.
"""

import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torchvision.transforms.v2.functional import InterpolationMode, resize

from discriminative.errors import UsageError, WorkError
from discriminative.hub import one_line
from discriminative.records.files import read_image
from dpt.data.mine import Caption, EmbedImage, EmbedText, Negatives, mine, normalised, read_negatives
from dpt.data.samples import Grounding, Picture, Sample, Span, check_least, to_cxcywh

COCO_SOURCE = "cocodataset.org (2014 train images and annotations)"
REFCOCO_SOURCE = "MDETR's pre-processed annotations on Zenodo (mdetr_annotations.tar.gz)"
EXPRESSIONS = ("refcoco", "refcoco+", "refcocog")
SPLITS = {"train": "train", "validation": "val"}
NEGATIVES_FILE = "dpt_negatives.json"
MINED = "mined"  # the kind of all hard negatives here
STREAM = 2014  # of the random choices
MARGIN = 1  # pixels by which a box may leave its image
TRIES = 1000


@dataclass(frozen=True)
class CocoImage:
    """An image's file, and its own size in pixels."""

    path: Path
    width: int
    height: int


@dataclass(frozen=True)
class Captions:
    """COCO's images, and captions by their ids and by their image's id."""

    images: dict[int, CocoImage]
    captions: dict[int, Caption]
    of_image: dict[int, list[Caption]]


@dataclass(frozen=True)
class Expression:
    """A referring expression for an image (COCO's id), with M boxes of corners (x0, y0, x1, y1) in pixels and
    the spans of each."""

    image: int
    text: str
    boxes: tuple[tuple[float, float, float, float], ...]
    spans: tuple[tuple[Span, ...], ...]


def _read(path: Path, flag: str, source: str) -> dict:
    if not path.is_file():
        raise UsageError(f"--{flag}: {path} is missing; it comes from {source}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {"images": content["images"], "annotations": content["annotations"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = one_line(error)
        raise UsageError(f"--{flag}: {path} is no annotation file of COCO's format ({reason})") from error


def read_captions(coco_root: str | Path) -> Captions:
    """COCO's captions of the training images of 2014.

    Raises:
        UsageError: a file or the folder of images is missing, malformed or empty, or a caption has no image.
    """
    root = Path(coco_root)
    path = root / "annotations" / "captions_train2014.json"
    content = _read(path, "coco_root", COCO_SOURCE)
    folder = root / "train2014"
    if not folder.is_dir():
        raise UsageError(f"--coco_root: the folder {folder} is missing; it comes from {COCO_SOURCE}")
    try:
        images = {
            row["id"]: CocoImage(folder / row["file_name"], row["width"], row["height"])
            for row in content["images"]
        }
        captions = [Caption(row["id"], row["image_id"], row["caption"]) for row in content["annotations"]]
    except (KeyError, TypeError) as error:
        raise UsageError(f"--coco_root: a row of {path} is malformed ({one_line(error)})") from error
    if not captions:
        raise UsageError(f"--coco_root: {path} holds no captions")
    of_image = defaultdict(list)
    for caption in captions:
        if caption.image not in images:
            raise UsageError(f"--coco_root: caption {caption.id} of {path} has no image ({caption.image})")
        of_image[caption.image].append(caption)
    return Captions(images, {caption.id: caption for caption in captions}, dict(of_image))


# Referring expressions.


def expression_file(refcoco_root: str | Path, name: str, split: str) -> Path:
    """Where the expressions of a data set of ``EXPRESSIONS`` and a split of ``SPLITS`` are."""
    return Path(refcoco_root) / f"finetune_{name}_{SPLITS[split]}.json"


def _box(row: dict, image: CocoImage, where: str) -> tuple[float, float, float, float]:
    """The corners of a box, cut to its image."""
    x, y, width, height = map(float, row["bbox"])
    inside = (
        min(x, y) >= -MARGIN and x + width <= image.width + MARGIN and y + height <= image.height + MARGIN
    )
    if not inside or min(width, height) <= 0:
        size = f"{image.width}x{image.height}"
        raise UsageError(
            f"{where} has the box {row['bbox']} (x, y, width, height) in an image of {size} pixels"
        )
    return max(x, 0.0), max(y, 0.0), min(x + width, image.width), min(y + height, image.height)


def _spans(row: dict, text: str, where: str) -> tuple[Span, ...]:
    spans = tuple((int(start), int(end)) for start, end in row["tokens_positive"])
    for start, end in spans:
        if not 0 <= start < end <= len(text):
            raise UsageError(f"{where} has the span [{start}, {end}] in a text of {len(text)} characters")
    if not spans:
        raise UsageError(f"{where} has no span")
    return spans


def read_expressions(
    refcoco_root: str | Path, name: str, split: str, images: dict[int, CocoImage]
) -> list[Expression]:
    """The expressions of one file.

    Args:
        refcoco_root: the folder.
        name: one of ``EXPRESSIONS``.
        split: a key of ``SPLITS``.
        images: COCO's, by their ids.

    Raises:
        UsageError: the file is missing, malformed or empty; an annotation without its image; an expression
            without a box; a box more than a pixel outside its image; a span outside its text.
    """
    path = expression_file(refcoco_root, name, split)
    content = _read(path, "refcoco_root", REFCOCO_SOURCE)
    try:
        rows = {row["id"]: row for row in content["images"]}
        of_row = defaultdict(list)
        for row in content["annotations"]:
            if row["image_id"] not in rows:
                where = f"--refcoco_root: annotation {row.get('id')} of {path}"
                raise UsageError(f"{where} has no image ({row['image_id']})")
            of_row[row["image_id"]].append(row)
        found = [_expression(row, of_row[key], images, path) for key, row in rows.items()]
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"--refcoco_root: a row of {path} is malformed ({one_line(error)})") from error
    if not found:
        raise UsageError(f"--refcoco_root: {path} holds no expressions")
    return found


def _expression(row: dict, annotations: list[dict], images: dict[int, CocoImage], path: Path) -> Expression:
    image = int(row["original_id"])
    where = f"--refcoco_root: expression {row['id']} of {path}"
    if image not in images:
        raise UsageError(f"{where} has the image {image}, which COCO's captions lack")
    if not annotations:
        raise UsageError(f"{where} has no box")
    text = row["caption"]
    boxes = tuple(_box(annotation, images[image], where) for annotation in annotations)
    return Expression(image, text, boxes, tuple(_spans(a, text, where) for a in annotations))


# The data set.


class Coco:
    """COCO with RefCOCO, images (3, size, size), resized without crop or flip.

    Images that a validation file shows are left out of training, as pictures and as negatives. Expressions
    whose image has no caption with negatives are left out, too.

    Args:
        coco_root: folder of COCO.
        refcoco_root: folder of MDETR's annotations.
        size: of the images in pixels, the model's own.
        split: "train" or "validation".
        seed: of the random choices, 0 or more.
        names: which of ``EXPRESSIONS``.
        negatives: the file that ``python -m dpt mine`` writes; None is ``coco_root/dpt_negatives.json``.

    Attributes:
        expressions: one a sample.
        left_out: how many expressions the files have beside these.

    Raises:
        UsageError: an argument outside these; a file is missing or wrong; nothing is left.
    """

    def __init__(
        self,
        coco_root: str | Path,
        refcoco_root: str | Path,
        size: int,
        split: str = "train",
        seed: int = 0,
        names: tuple[str, ...] = EXPRESSIONS,
        negatives: str | Path | None = None,
    ):
        _check_arguments(size, split, seed, names)
        self.size = size
        self.split = split
        self.seed = seed
        self.epoch = 0
        self.coco = read_captions(coco_root)
        path = Path(negatives or Path(coco_root) / NEGATIVES_FILE)
        mined = read_negatives(path)
        _check_negatives(mined, self.coco, path)
        expressions = [e for n in names for e in read_expressions(refcoco_root, n, split, self.coco.images)]
        barred = _validation_images(refcoco_root, names, self.coco) if split == "train" else set()
        self.negatives = _without(mined, self.coco, barred)
        self.expressions = [e for e in expressions if e.image not in barred and self._usable(e.image)]
        self.left_out = len(expressions) - len(self.expressions)
        if not self.expressions:
            advice = "run `python -m dpt mine`"
            raise UsageError(
                f"--negatives: {path} has none for any image of the {split} expressions; {advice}"
            )
        self.images = sorted({expression.image for expression in self.expressions})
        if len(self.images) < 2:
            raise UsageError(f"--refcoco_root: one image is left for {split}; needed are two")

    def __len__(self) -> int:
        return len(self.expressions)

    def set_epoch(self, epoch: int) -> None:
        """Other captions and negatives in training; validation stays."""
        self.epoch = epoch if self.split == "train" else 0

    def __getitem__(self, index: int) -> Sample:
        """One expression with its image.

        Raises:
            IndexError: no such sample.
            WorkError: a picture cannot be read.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        which = list(SPLITS).index(self.split)
        rng = np.random.default_rng([STREAM, self.seed, which, self.epoch, index])
        expression = self.expressions[index]
        caption = _one(self._usable(expression.image), rng)
        negatives = self.negatives[caption.id]
        other = self._other(expression.image, rng)
        return Sample(
            picture=self._picture(expression.image),
            hard_picture=self._picture(_one(negatives.pictures, rng)),
            random_picture=self._picture(other.image),
            caption=caption.text,
            hard_caption=self.coco.captions[_one(negatives.texts, rng)].text,
            random_caption=other.text,
            kind=MINED,
            grounding=self._grounding(expression),
        )

    def _usable(self, image: int) -> list[Caption]:
        """The captions of an image that have negatives."""
        return [caption for caption in self.coco.of_image.get(image, ()) if caption.id in self.negatives]

    def _other(self, image: int, rng: np.random.Generator) -> Caption:
        """A caption of another image that says what none of this image's does."""
        own = {normalised(caption.text) for caption in self.coco.of_image[image]}
        for _ in range(TRIES):
            caption = _one(self.coco.of_image[_one(self.images, rng)], rng)
            if caption.image != image and normalised(caption.text) not in own:
                return caption
        raise WorkError(f"no caption that differs from those of image {image} was found in {TRIES} tries")

    def _picture(self, image: int) -> Picture:
        path = self.coco.images[image].path
        if not path.is_file():
            raise WorkError(f"{path}: missing; it comes from {COCO_SOURCE}")
        pixels = resize(
            read_image(path), [self.size, self.size], InterpolationMode.BILINEAR, antialias=True
        )  # (3, size, size)
        return Picture(f"coco-{image}-{self.size}", pixels.clamp(0, 1))

    def _grounding(self, expression: Expression) -> Grounding:
        image = self.coco.images[expression.image]
        boxes = [to_cxcywh(box, image.width, image.height) for box in expression.boxes]
        return Grounding(expression.text, torch.tensor(boxes), expression.spans)  # boxes (M, 4)


def _one(choices, rng: np.random.Generator):
    return choices[rng.integers(len(choices))]


def _check_arguments(size: int, split: str, seed: int, names: tuple[str, ...]) -> None:
    if split not in SPLITS:
        raise UsageError(f"--split: {split!r} was given; allowed for coco is {', '.join(SPLITS)}")
    check_least("size", size, 1)
    check_least("seed", seed, 0)
    if not names or set(names) - set(EXPRESSIONS):
        given = ", ".join(names) or "nothing"
        raise UsageError(
            f"--expressions: {given} was given; allowed is one or more of {', '.join(EXPRESSIONS)}"
        )


def _validation_images(refcoco_root: str | Path, names: tuple[str, ...], coco: Captions) -> set[int]:
    """The images that a validation file of these data sets shows."""
    return {e.image for n in names for e in read_expressions(refcoco_root, n, "validation", coco.images)}


def _check_negatives(negatives: dict[int, Negatives], coco: Captions, path: Path) -> None:
    """Raises UsageError where a negative is none of COCO's captions or images."""
    for caption, found in negatives.items():
        captions = {caption, *found.texts} - coco.captions.keys()
        unknown = captions or set(found.pictures) - coco.images.keys()
        if unknown:
            what = "caption" if captions else "image"
            raise UsageError(
                f"--negatives: {path} names the {what} {min(unknown)}, which COCO's captions lack; "
                "run `python -m dpt mine` again"
            )


def _without(negatives: dict[int, Negatives], coco: Captions, barred: set[int]) -> dict[int, Negatives]:
    """The negatives without those of barred images; captions that have none left go."""
    kept = {}
    for caption, found in negatives.items():
        texts = tuple(text for text in found.texts if coco.captions[text].image not in barred)
        pictures = tuple(picture for picture in found.pictures if picture not in barred)
        if texts and pictures:
            kept[caption] = Negatives(texts, pictures)
    return kept


def mine_coco(
    coco_root: str | Path,
    refcoco_root: str | Path,
    embed_text: EmbedText,
    embed_image: EmbedImage | None = None,
    names: tuple[str, ...] = EXPRESSIONS,
    texts: int = 20,
    pictures: int = 4,
) -> dict[int, Negatives]:
    """Hard negatives of the captions of all images that have an expression, as :func:`mine.mine` finds them.

    Raises:
        UsageError: as :class:`Coco` and :func:`mine.mine`.
        WorkError: a picture cannot be read.
    """
    coco = read_captions(coco_root)
    shown = {
        expression.image
        for name in names
        for split in SPLITS
        for expression in read_expressions(refcoco_root, name, split, coco.images)
    }
    captions = [caption for image in sorted(shown) for caption in coco.of_image.get(image, ())]
    paths = {image: coco.images[image].path for image in shown}
    return mine(captions, paths if embed_image else None, embed_text, embed_image, texts, pictures)
