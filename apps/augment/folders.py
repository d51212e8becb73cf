"""Folders of pictures, a folder a class: read by torchvision's ImageFolder, checked, matched and split."""

import hashlib
import io
import json
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image
from timm.data import ImageNetInfo
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

from apps.augment.options import FOLDERS, Options
from discriminative.errors import UsageError
from discriminative.guides.labels import prompt_class_name
from discriminative.progress import progress
from discriminative.tokens.dataset import METADATA, read_rows

HELD_OUT = 0.2  # of each class of --real, where no --val is given
SPLIT_SEED = 0
LISTED = 5  # classes that a line names at most
WORDNET = re.compile(r"n\d{8}")
NUMBER = re.compile(r"^\d+[ ._-]+")


@dataclass
class Pictures:
    """Paths of pictures, and their classes' numbers from 0."""

    paths: list[Path] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.paths)

    def add(self, paths: list[Path], label: int) -> None:
        """More pictures of a class."""
        self.paths += paths
        self.labels += [label] * len(paths)

    def of_class(self, label: int) -> list[Path]:
        """The pictures of one class."""
        return self.by_class().get(label, [])

    def by_class(self) -> dict[int, list[Path]]:
        """The pictures of each class that has some."""
        found = defaultdict(list)
        for path, label in zip(self.paths, self.labels, strict=True):
            found[label].append(path)
        return dict(found)


@dataclass
class Data:
    """What is trained and measured on.

    Args:
        classes: K names, those of the folders of ``--real``.
        fit: real pictures to train on while the share is chosen, ``val`` those to choose it on.
        real: real pictures to train on in the end; ``val`` is among them where it was held out of them.
        notes: what a user should know of them, a line each.
    """

    classes: list[str]
    real: Pictures
    generated: Pictures
    test: Pictures
    fit: Pictures
    val: Pictures
    notes: list[str]


class VisibleClasses(ImageFolder):
    """An ``ImageFolder`` whose hidden folders are no classes."""

    def find_classes(self, directory: str) -> tuple[list[str], dict[str, int]]:
        """The names of the folders, in order, and their numbers."""
        names = class_folders(directory)
        return names, {name: i for i, name in enumerate(names)}


def class_folders(root: str) -> list[str]:
    """The names of the folders that are not hidden, in order."""
    found = sorted(p.name for p in Path(root).iterdir() if p.is_dir())
    return [name for name in found if not name.startswith((".", "__"))]


def read_folder(flag: str, root: str) -> dict[str, list[Path]]:
    """The pictures of each class folder.

    Raises:
        UsageError: there is no class folder, or one without a picture.
    """
    if not class_folders(root):
        raise UsageError(
            f"--{flag}: {root!r} was given, which holds no folder; allowed is one with a folder of pictures "
            "for each class"
        )
    found = VisibleClasses(root, allow_empty=True)
    pictures: dict[str, list[Path]] = {name: [] for name in found.classes}
    for path, label in found.samples:
        pictures[found.classes[label]].append(Path(path))
    empty = [name for name, paths in pictures.items() if not paths]
    if empty:
        raise UsageError(
            f"--{flag}: {listed(empty)} of {root!r} {'hold' if len(empty) > 1 else 'holds'} no picture "
            f"({', '.join(IMG_EXTENSIONS)}); put some there, or remove the folder"
        )
    return pictures


def listed(names: list[str]) -> str:
    """The first few names, and how many more there are."""
    more = len(names) - LISTED
    return ", ".join(repr(name) for name in names[:LISTED]) + (f" and {more} more" if more > 0 else "")


# Class folders of one set by those of another.


def name_of(folder: str) -> str:
    """A folder's name as a class's: no number in front, spaces, lower case; WordNet's words of its number."""
    if WORDNET.fullmatch(folder):
        with suppress(KeyError):
            folder = ImageNetInfo("imagenet-22k").label_name_to_description(folder)
    return plain(folder.split(",")[0])


def plain(text: str) -> str:
    """Words of letters and digits alone, without a number in front: "0004_mouse" -> "mouse"."""
    words = re.findall(r"[^\W_]+", NUMBER.sub("", prompt_class_name(text)))
    return " ".join(words)


def label_in(folder: Path) -> str:
    """The label that ``--export_dataset`` wrote beside the pictures; "" where it did not.

    Raises:
        UsageError: its file cannot be read.
    """
    try:
        rows = read_rows(folder / METADATA)
        return str(rows[0].get("label", "")) if rows else ""
    except (OSError, json.JSONDecodeError, AttributeError) as error:
        raise UsageError(f"--generated: {folder / METADATA} cannot be read ({error})") from error


def readings(root: Path) -> list[Callable[[str], set[str]]]:
    """Ways to read a generated class folder's name, the strictest first: a set of names each."""

    def synonyms(name: str) -> set[str]:
        return {plain(part) for part in label_in(root / name).split(",")} - {""}

    return [
        lambda name: {name},
        lambda name: {plain(name)},
        lambda name: {plain(label_in(root / name).replace(",", " "))},
        synonyms,
    ]


def match(classes: list[str], root: str, generated: list[str]) -> dict[str, int]:
    """The class, from 0, of each generated folder.

    Names count whole first, then without numbers, then by the label that ``--export_dataset`` wrote and its
    synonyms; only what fits one class alone, and no other folder, counts.

    Raises:
        UsageError: a folder fits no class, or several; both sides are named.
    """
    found: dict[str, int] = {}
    for i, reading in enumerate(readings(Path(root))):
        ours = defaultdict(list)
        for number, name in enumerate(classes):
            ours[name if i == 0 else name_of(name)].append(number)
        left = [name for name in generated if name not in found]
        fits = {
            name: {number for word in reading(name) for number in ours.get(word, [])} - set(found.values())
            for name in left
        }
        often = Counter(number for numbers in fits.values() for number in numbers)
        found |= {n: min(numbers) for n, numbers in fits.items() if len(numbers) == 1 == often[min(numbers)]}
    lost = [name for name in generated if name not in found]
    if lost:
        free = [name for number, name in enumerate(classes) if number not in found.values()]
        others = (
            f"left of --real {'are' if len(free) > 1 else 'is'} {listed(free)}" if free else "none is left"
        )
        fit = "fit" if len(lost) > 1 else "fits"
        raise UsageError(
            f"--generated: {listed(lost)} of {root!r} {fit} no class folder of --real, or not one alone "
            f"({others}); name folders alike, or remove what is too much"
        )
    return found


def check_same(classes: list[str], others: list[str], flag: str) -> None:
    """Check that two folders have the same classes.

    Raises:
        UsageError: naming what only one has.
    """
    parts = []
    for has, lacks, names in (
        ("--real", f"--{flag}", sorted(set(classes) - set(others))),
        (f"--{flag}", "--real", sorted(set(others) - set(classes))),
    ):
        if names:
            parts.append(f"{has} has {listed(names)}, which {lacks} lacks")
    if parts:
        raise UsageError(f"--{flag}: {'; '.join(parts)}; both need the same class folders")


# Pictures.


def digest(flag: str, path: Path) -> str:
    """A hash of a picture's bytes, once it was seen to be readable.

    Raises:
        UsageError: it is not.
    """
    try:
        data = path.read_bytes()
        with Image.open(io.BytesIO(data)) as picture:
            picture.load()
    # Formats raise what they like on damaged files.
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UsageError(f"--{flag}: {path} is no readable picture ({error}); mend or remove it") from error
    return hashlib.sha256(data).hexdigest()


def digests(pictures: dict[str, Pictures]) -> dict[str, list[str]]:
    """The hashes of all pictures, by flag.

    Raises:
        UsageError: one cannot be read.
    """
    every = [(flag, path) for flag, these in pictures.items() for path in these.paths]
    found = defaultdict(list)
    with ThreadPoolExecutor(4) as pool, progress(total=len(every), desc="reading", unit="picture") as bar:
        for (flag, _), value in zip(every, pool.map(lambda one: digest(*one), every), strict=True):
            found[flag].append(value)
            bar.update()
    return dict(found)


def shared_with_test(hashes: dict[str, list[str]]) -> list[str]:
    """A line for each set that holds pictures of the test."""
    test = set(hashes["test"])
    lines = []
    for flag in ("real", "generated", "val"):
        number = len(test & set(hashes.get(flag, [])))
        if number:
            lines.append(f"{number} of the test's pictures are in --{flag} too: the figures flatter")
    return lines


def held_out(real: Pictures, classes: list[str]) -> tuple[Pictures, Pictures]:
    """Real pictures to fit and to validate on: a fifth of each class is held out, one at least.

    Raises:
        UsageError: a class has one picture alone.
    """
    fit = Pictures()
    val = Pictures()
    for label, paths in real.by_class().items():
        if len(paths) < 2:
            raise UsageError(
                f"--real: {classes[label]!r} has 1 picture, too few to hold one out for validation; "
                "give --val DIR, or a single --shares"
            )
        random.Random(SPLIT_SEED).shuffle(paths)
        number = max(1, round(HELD_OUT * len(paths)))
        val.add(paths[:number], label)
        fit.add(paths[number:], label)
    return fit, val


def as_pictures(folders: dict[str, list[Path]], numbers: dict[str, int]) -> Pictures:
    """All pictures of class folders, with their classes' numbers."""
    pictures = Pictures()
    for name, paths in folders.items():
        pictures.add(paths, numbers[name])
    return pictures


def read_data(options: Options) -> tuple[Data, str]:
    """All folders of the options, checked; and a hash of all that is in them.

    Raises:
        UsageError: a folder or a picture is not as it should be.
    """
    given = [flag for flag in FOLDERS if getattr(options, flag)]
    folders = {flag: read_folder(flag, getattr(options, flag)) for flag in given}
    classes = list(folders["real"])
    if len(classes) < 2:
        raise UsageError(f"--real: {options.real!r} holds one class folder; allowed are two or more")
    for flag in ("test", "val"):
        if flag in folders:
            check_same(classes, list(folders[flag]), flag)
    numbers = {name: i for i, name in enumerate(classes)}
    matched = match(classes, options.generated, list(folders["generated"]))
    sets = {
        flag: as_pictures(these, matched if flag == "generated" else numbers)
        for flag, these in folders.items()
    }
    fit = sets["real"]
    val = sets.get("val", Pictures())
    if not val and len(options.shares) > 1:
        fit, val = held_out(sets["real"], classes)
    hashes = digests(sets)
    without = [name for i, name in enumerate(classes) if i not in matched.values()]
    notes = [f"no generated pictures of {listed(without)}"] if without else []
    notes += shared_with_test(hashes)
    content = json.dumps([hashes, [these.labels for these in sets.values()], classes])
    data = Data(classes, sets["real"], sets["generated"], sets["test"], fit, val, notes)
    return data, hashlib.sha256(content.encode()).hexdigest()
