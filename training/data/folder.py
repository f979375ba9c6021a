"""A folder of images as a data set, with a sub-folder per class.

A tenth of every class is held out for testing, unless the folder has a test split. Unusable files
are left out and reported.
"""

import hashlib
import json
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from training.artifact import list_names, printable
from training.data.image_file import (
    MAX_SIZE,
    MIN_SIZE,
    REMEDIES,
    Cause,
    Pixels,
    UnusableError,
    read_image,
)
from training.data.layout import ClassFolders, read_layout, visible
from training.data.named import DATASETS, DataError, Dataset

HELD_OUT = 10  # one image in 10 is held out
SMALL_CLASS = 100  # training images
_SHOWN = 10  # entries of a list in a report


@dataclass(frozen=True)
class _File:
    """A readable image; the digest is that of its pixels, whatever the file's format."""

    path: Path
    class_name: str
    pixels: Pixels = field(repr=False)  # (H, W, 3)
    grey: bool  # the three channels are equal
    original: tuple[int, int]  # width and height in the file
    digest: str


@dataclass(frozen=True)
class LeftOut:
    """A file that is not used."""

    class_name: str
    cause: Cause


@dataclass(frozen=True, kw_only=True)
class FolderReport:
    """The contents of a folder."""

    path: Path
    counts: dict[str, tuple[int, int]]  # class name -> training images, held-out images
    image_size: int  # height and width, in pixels
    channels: int  # 1 or 3
    originals: dict[tuple[int, int], int]  # (width, height) in the files -> number of files
    left_out: dict[Path, LeftOut]
    duplicates: tuple[Path, ...]  # left out, with the pixels of another file of their class
    ambiguous: tuple[Path, ...]  # left out, with the pixels of a file of another class
    leaked: tuple[Path, ...]  # held-out files left out, with the pixels of a training file
    remarks: tuple[str, ...]  # on the layout and the names of the classes

    def render(self) -> str:
        """Return the report as lines of text."""
        train, test = (sum(pair[i] for pair in self.counts.values()) for i in (0, 1))
        colour = "grey" if self.channels == 1 else "colour"
        small = [name for name, (trained, _) in self.counts.items() if trained < SMALL_CLASS]
        lines = [
            f"{self.path}: {len(self.counts)} classes, {train:,} images to train on and {test:,} "
            f"held out, {self.image_size}x{self.image_size}, {colour}",
            "images to train on + held out: "
            + list_names([f"{name} {a:,} + {b:,}" for name, (a, b) in self.counts.items()], 20),
        ]
        if set(self.originals) != {(self.image_size, self.image_size)}:
            lines.append(f"resized from {_sizes(self.originals)}")
        lines += self.remarks
        lines += _causes(self.path, self.left_out)
        kinds = (
            ("left out, the same as another of its class", self._names(self.duplicates)),
            ("left out, the same as one of another class", self._names(self.ambiguous)),
            ("not held out, the same as one to train on", self._names(self.leaked)),
            (f"classes of fewer than {SMALL_CLASS} images", small),
        )
        lines += [
            f"{len(names):,} {kind}: {list_names(names, _SHOWN)}" for kind, names in kinds if names
        ]
        return printable("\n  ".join(lines))

    def _names(self, paths: Iterable[Path]) -> list[str]:
        return [str(path.relative_to(self.path)) for path in paths]


def _causes(path: Path, left_out: Mapping[Path, LeftOut]) -> Iterator[str]:
    """Yield a line per cause: the number of files, by class, an example, and what helps."""
    for cause, remedy in REMEDIES.items():
        files = {file: each for file, each in left_out.items() if each.cause == cause}
        if files:
            classes = Counter(each.class_name for each in files.values())
            counts = list_names([f"{name} {count:,}" for name, count in classes.items()], _SHOWN)
            example = next(iter(files)).relative_to(path)
            yield f"{len(files):,} left out ({cause}): {counts}, such as {example}; {remedy}"


def _because(path: Path, left_out: Mapping[Path, LeftOut]) -> str:
    """Return the causes as the end of an error."""
    return printable("".join(f"\n  {line}" for line in _causes(path, left_out)))


def _sizes(sizes: Mapping[tuple[int, int], int]) -> str:
    common = Counter(sizes).most_common()
    return list_names([f"{w}x{h} ({n:,})" for (w, h), n in common], _SHOWN)


@dataclass(frozen=True)
class Folder:
    """The two splits of a folder of images, on the CPU, and a report of its contents."""

    train: Dataset
    test: Dataset
    report: FolderReport


def is_folder(name: str) -> bool:
    """Return True if a data set is given by a path, not by the name of a known one."""
    return name not in DATASETS


def is_inside(dataset: str, folder: Path) -> bool:
    """Return True if a folder would be inside the images of a data set, where it is a class."""
    return is_folder(dataset) and Path(dataset).resolve() in folder.resolve().parents


def check_outside(dataset: str, option: str, path: Path, folder: Path) -> None:
    """Refuse an option's path if a folder that is created for it would be a class.

    Raises:
        DataError: the folder is inside the images.
    """
    if is_inside(dataset, folder):
        raise DataError(
            f"{option}: {path} is inside the images of {dataset}, where it would be a class; "
            "choose a folder outside"
        )


def folder_name(path: Path) -> str:
    """Return the name of the data set in a folder; no named data set has it."""
    name = printable(unicodedata.normalize("NFC", path.resolve().name)) or "root"
    return f"{name}-folder" if name in DATASETS else name  # its metrics are not comparable


def read_folder(path: Path, *, size: int | None = None, channels: int | None = None) -> Folder:
    """Read a folder of images.

    The choice of held-out images depends on their pixels only, so renaming files does not change
    it.

    Args:
        path: of the folder.
        size: crop every image to its central square and resize it to this height and width; if not
            given, all images must have one square size already.
        channels: convert the images to 1 or 3; if not given, 3 if any image has colour.

    Raises:
        DataError: the layout is wrong, the sizes differ, or a class has too few images.
    """
    layout = read_layout(path)
    class_names = tuple(layout.train)
    train_files, left_out = _read_classes(layout.train, size)
    test_files, test_left_out = _read_classes(layout.test, size)
    files, left_out = train_files + test_files, left_out | test_left_out
    image_size = size or _one_size(path, files, left_out)
    train, train_duplicates, train_ambiguous = _without_duplicates(train_files)
    test, test_duplicates, test_ambiguous = _without_duplicates(test_files)
    known = {file.digest for file in train}
    leaked = [file.path for file in test if file.digest in known]
    test = [file for file in test if file.digest not in known]
    if not layout.test:
        train, test = _hold_out(train)
    channels = channels or (1 if all(file.grey for file in files) else 3)
    report = FolderReport(
        path=path,
        counts=_count(path, class_names, train, test, left_out),
        image_size=image_size,
        channels=channels,
        originals=dict(Counter(file.original for file in files)),
        left_out=left_out,
        duplicates=(*train_duplicates, *test_duplicates),
        ambiguous=(*train_ambiguous, *test_ambiguous),
        leaked=tuple(leaked),
        remarks=layout.remarks,
    )
    name = folder_name(path)
    train_set, test_set = (_dataset(name, class_names, it, channels) for it in (train, test))
    return Folder(train_set, test_set, report)


def _read_classes(
    classes: ClassFolders, size: int | None
) -> tuple[list[_File], dict[Path, LeftOut]]:
    """Return the images by class and digest, and the files that cannot be used."""
    files: list[_File] = []
    left_out: dict[Path, LeftOut] = {}
    for name, folders in classes.items():
        entries: list[Path] = []
        for folder in folders:
            try:
                entries += [Path(each.path) for each in visible(folder)]
            except OSError:
                left_out[folder] = LeftOut(name, Cause.UNREADABLE)
        found = []
        # disable=None: no bar unless stderr is a terminal.
        for path in tqdm(entries, desc=printable(name), unit="image", leave=False, disable=None):
            try:
                found.append(_read(path, name, size))
            except UnusableError as error:
                left_out[path] = LeftOut(name, error.cause)
        files += sorted(found, key=lambda file: file.digest)
    return files, left_out


def _read(path: Path, class_name: str, size: int | None) -> _File:
    pixels, original = read_image(path, size)
    grey = bool((pixels == pixels[:, :, :1]).all())
    digest = hashlib.sha256(pixels.tobytes()).hexdigest()
    return _File(path, class_name, pixels, grey, original, digest)


def _one_size(path: Path, files: Sequence[_File], left_out: Mapping[Path, LeftOut]) -> int:
    """Return the height and width that all images share."""
    sizes = Counter(file.original for file in files)
    if not sizes:
        why = _because(path, left_out) or "; its class folders are empty"
        raise DataError(f"{path}: has no usable image in its class folders{why}")
    (width, height), _ = sizes.most_common()[-1]
    if len(sizes) == 1 and width == height and MIN_SIZE <= width <= MAX_SIZE:
        return width
    rare = next(file.path for file in files if file.original == (width, height))
    raise DataError(
        f"{path}: the sizes of the images are {_sizes(sizes)}; {rare.relative_to(path)} is "
        f"{width}x{height}. Expected one square size from {MIN_SIZE} to {MAX_SIZE}; "
        "--image-size 32 crops and resizes all images"
    )


def _without_duplicates(files: list[_File]) -> tuple[list[_File], list[Path], list[Path]]:
    """Return each image once, the repeated files, and the files in several classes."""
    homes: dict[str, set[str]] = defaultdict(set)
    for file in files:
        homes[file.digest].add(file.class_name)
    kept: dict[str, _File] = {}
    repeated, ambiguous = [], []
    for file in files:
        if len(homes[file.digest]) > 1:
            ambiguous.append(file.path)  # its label is unknown
        elif file.digest in kept:
            repeated.append(file.path)
        else:
            kept[file.digest] = file
    return list(kept.values()), repeated, ambiguous


def _hold_out(files: list[_File]) -> tuple[list[_File], list[_File]]:
    """Move a tenth of every class, the images with the smallest digests, to a second split."""
    train: list[_File] = []
    held_out: list[_File] = []
    for _, group in groupby(files, key=lambda file: file.class_name):
        members = list(group)
        count = max(1, len(members) // HELD_OUT)
        train += members[count:]
        held_out += members[:count]
    return train, held_out


def _count(
    path: Path,
    class_names: tuple[str, ...],
    train: list[_File],
    test: list[_File],
    left_out: Mapping[Path, LeftOut],
) -> dict[str, tuple[int, int]]:
    """Return class name -> numbers of training and test images, if these are enough."""
    train_counts, test_counts = (Counter(f.class_name for f in split) for split in (train, test))
    empty = [name for name in class_names if not train_counts[name]]
    if empty:
        theirs = {file: each for file, each in left_out.items() if each.class_name in empty}
        raise DataError(
            f"{path}: classes with too few usable images: {list_names(empty, _SHOWN)}; each needs "
            f"one to train on, and without a test split another to hold out"
            f"{_because(path, theirs)}"
        )
    if len(test) < 2:
        why = _because(path, left_out)
        raise DataError(f"{path}: has fewer than 2 usable images to hold out{why}")
    return {name: (train_counts[name], test_counts[name]) for name in class_names}


def _dataset(name: str, class_names: tuple[str, ...], files: list[_File], channels: int) -> Dataset:
    order = {each: label for label, each in enumerate(class_names)}
    files = sorted(files, key=lambda file: order[file.class_name])
    labels = [order[file.class_name] for file in files]
    images = torch.from_numpy(np.stack([_channels(file.pixels, channels) for file in files]))
    digest = hashlib.sha256(images.numpy().tobytes())
    digest.update(json.dumps([labels, class_names]).encode())
    return Dataset(
        name=name,
        images=images,
        labels=torch.tensor(labels),
        class_names=class_names,
        digest=digest.hexdigest(),
    )


def _channels(pixels: Pixels, channels: int) -> Pixels:
    """Convert (H, W, 3) to (C, H, W)."""
    if channels == 1:
        return np.asarray(Image.fromarray(pixels).convert("L"))[None]
    return pixels.transpose(2, 0, 1)
