"""A folder of images as a data set, with a sub-folder per class.

The layout is `DIR/CLASS/*.png`, of which a tenth of every class is held out for testing, or
`DIR/train/CLASS/*.png` with `DIR/test/CLASS/*.png`. Unusable files are left out and reported.
"""

import hashlib
import json
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps
from tqdm import tqdm

from training.data.named import DATASETS, DataError, Dataset

SUFFIXES = (".png", ".jpg", ".jpeg")
MIN_SIZE, MAX_SIZE = 28, 64
MAX_CLASSES = 1000
MAX_PIXELS = 100_000_000  # per file: limits the memory that a malicious file can take
HELD_OUT = 10  # one image in 10 is held out
SMALL_CLASS = 100  # training images
_SHOWN = 10  # entries of a list in a report

Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class _File:
    """A readable image; the digest is that of its pixels, whatever the file's format."""

    path: Path
    pixels: Pixels = field(repr=False)  # (H, W, 3)
    grey: bool  # the three channels are equal
    original: tuple[int, int]  # width and height in the file
    digest: str

    @property
    def class_name(self) -> str:
        return self.path.parent.name


@dataclass(frozen=True, kw_only=True)
class FolderReport:
    """The contents of a folder."""

    path: Path
    counts: dict[str, tuple[int, int]]  # class name -> training images, held-out images
    image_size: int  # height and width, in pixels
    channels: int  # 1 or 3
    originals: dict[tuple[int, int], int]  # (width, height) in the files -> number of files
    unusable: dict[Path, str]  # file left out -> reason
    duplicates: tuple[Path, ...]  # left out, with the pixels of another file of their class
    ambiguous: tuple[Path, ...]  # left out, with the pixels of a file of another class
    leaked: tuple[Path, ...]  # held-out files left out, with the pixels of a training file
    ignored: int  # number of files whose names are not those of PNG or JPEG files

    def render(self) -> str:
        """Return the report as lines of text."""
        train, test = (sum(pair[i] for pair in self.counts.values()) for i in (0, 1))
        colour = "grey" if self.channels == 1 else "colour"
        small = [name for name, (trained, _) in self.counts.items() if trained < SMALL_CLASS]
        lines = [
            f"{self.path}: {len(self.counts)} classes, {train:,} images to train on and {test:,} "
            f"held out, {self.image_size}x{self.image_size}, {colour}",
            "  images to train on + held out: "
            + _some([f"{name} {a:,} + {b:,}" for name, (a, b) in self.counts.items()], 20),
        ]
        if set(self.originals) != {(self.image_size, self.image_size)}:
            sizes = Counter(self.originals).most_common()
            lines.append("  resized from " + _some([f"{w}x{h} ({n:,})" for (w, h), n in sizes]))
        reasons = zip(self._names(self.unusable), self.unusable.values(), strict=True)
        kinds = (
            ("unusable", [f"{name} ({why})" for name, why in reasons]),
            ("left out, the same as another of its class", self._names(self.duplicates)),
            ("left out, the same as one of another class", self._names(self.ambiguous)),
            ("not held out, the same as one to train on", self._names(self.leaked)),
            (f"classes of fewer than {SMALL_CLASS} images", small),
        )
        lines += [f"  {len(names):,} {kind}: {_some(names)}" for kind, names in kinds if names]
        if self.ignored:
            lines.append(f"  {self.ignored:,} other files ignored")
        return "\n".join(lines)

    def _names(self, paths: Iterable[Path]) -> list[str]:
        return [str(path.relative_to(self.path)) for path in paths]


@dataclass(frozen=True)
class Folder:
    """The two splits of a folder of images, on the CPU, and a report of its contents."""

    train: Dataset
    test: Dataset
    report: FolderReport


def is_folder(name: str) -> bool:
    """Return True if a data set is given by a path, not by the name of a known one."""
    return name not in DATASETS


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
    train_dirs, test_dirs = _class_folders(path)
    class_names, test_paths = tuple(train_dirs), set(test_dirs.values())
    files, unusable, ignored = _read_classes([*train_dirs.values(), *test_dirs.values()], size)
    image_size = size or _one_size(path, files)
    train_files = [file for file in files if file.path.parent not in test_paths]
    test_files = [file for file in files if file.path.parent in test_paths]
    train, train_duplicates, train_ambiguous = _without_duplicates(train_files)
    test, test_duplicates, test_ambiguous = _without_duplicates(test_files)
    known = {file.digest for file in train}
    leaked = [file.path for file in test if file.digest in known]
    test = [file for file in test if file.digest not in known]
    if not test_dirs:
        train, test = _hold_out(train)
    channels = channels or (1 if all(file.grey for file in files) else 3)
    report = FolderReport(
        path=path,
        counts=_count(path, class_names, train, test),
        image_size=image_size,
        channels=channels,
        originals=dict(Counter(file.original for file in files)),
        unusable=unusable,
        duplicates=(*train_duplicates, *test_duplicates),
        ambiguous=(*train_ambiguous, *test_ambiguous),
        leaked=tuple(leaked),
        ignored=ignored,
    )
    name = path.resolve().name
    name = f"{name}-folder" if name in DATASETS else name  # its metrics are not comparable
    train_set, test_set = (_dataset(name, class_names, it, channels) for it in (train, test))
    return Folder(train_set, test_set, report)


def _class_folders(path: Path) -> tuple[dict[str, Path], dict[str, Path]]:
    """Return class name -> folder for training and for testing; the latter may be empty."""
    if not path.is_dir():
        known = ", ".join(DATASETS)
        raise DataError(f"{path}: is neither a folder nor one of the data sets {known}")
    folders = _folders(path)
    test: dict[str, Path] = {}
    if "train" in folders and _folders(folders["train"]):
        test = _folders(folders["test"]) if "test" in folders else {}
        folders = _folders(folders["train"])
        unknown = [name for name in test if name not in folders]
        if unknown:
            raise DataError(f"{path / 'test'}: has classes that train lacks: {_some(unknown)}")
    if not 2 <= len(folders) <= MAX_CLASSES:
        raise DataError(
            f"{path}: has {len(folders)} sub-folders, expected one per class, 2 to {MAX_CLASSES}; "
            "the layout is DIR/CLASS/*.png or DIR/train/CLASS/*.png"
        )
    long = [name for name in folders if len(name) > 200]
    if long:
        raise DataError(
            f"{path}: a class name of {len(long[0])} characters; at most 200 are allowed"
        )
    return folders, test


def _folders(path: Path) -> dict[str, Path]:
    """Return the visible sub-folders by name; if all names are numbers, in their order."""
    names = [each.name for each in path.iterdir() if each.is_dir() and not _is_hidden(each)]
    numbers = all(name.isascii() and name.isdecimal() for name in names)
    names.sort(key=lambda name: (int(name) if numbers else 0, name))
    return {name: path / name for name in names}


def _is_hidden(path: Path) -> bool:
    return path.name.startswith((".", "__"))


def _read_classes(
    folders: Iterable[Path], size: int | None
) -> tuple[list[_File], dict[Path, str], int]:
    """Return the images by class and digest, unusable file -> reason, a count of other files."""
    files: list[_File] = []
    unusable: dict[Path, str] = {}
    ignored = 0
    for folder in folders:
        found = []
        entries = sorted(each for each in folder.iterdir() if not _is_hidden(each))
        # disable=None: no bar unless stderr is a terminal.
        for path in tqdm(entries, desc=folder.name, unit="image", leave=False, disable=None):
            if path.suffix.lower() not in SUFFIXES or path.is_dir():
                ignored += 1
                continue
            try:
                found.append(_read(path, size))
            except ValueError as error:
                unusable[path] = str(error)
        files += sorted(found, key=lambda file: file.digest)
    return files, unusable, ignored


def _read(path: Path, size: int | None) -> _File:
    """Decode an image; raise ValueError with the reason if it is unusable."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # real errors are raised
            with Image.open(path, formats=("PNG", "JPEG")) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise ValueError(f"{image.width}x{image.height} pixels are too many")
                # The mode of 16-bit colour is RGB: Pillow would drop 8 bits silently.
                if any(";16" in str(tile.args) for tile in image.tile):
                    raise ValueError("more than 8 bits a channel")
                return _decode(path, image, size)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(str(error).replace(str(path), path.name)) from error
    except (AssertionError, IndexError) as error:  # a missing palette or profile
        raise ValueError("is corrupt") from error


def _decode(path: Path, image: Image.Image, size: int | None) -> _File:
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if image.getchannel("A").getextrema() != (255, 255):
            raise ValueError("has transparent pixels")
    # Cameras store the orientation as metadata.
    image = ImageOps.exif_transpose(image.convert("RGB"))
    original = image.size
    if size is not None:
        image = ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)
    pixels = np.asarray(image)
    grey = bool((pixels == pixels[:, :, :1]).all())
    return _File(path, pixels, grey, original, hashlib.sha256(pixels.tobytes()).hexdigest())


def _one_size(path: Path, files: Sequence[_File]) -> int:
    """Return the height and width that all images share."""
    sizes = Counter(file.original for file in files)
    if not sizes:
        raise DataError(f"{path}: has no usable image in its class folders")
    shown = _some([f"{w}x{h} ({n:,})" for (w, h), n in sizes.most_common()])
    (width, height), _ = sizes.most_common()[-1]
    if len(sizes) == 1 and width == height and MIN_SIZE <= width <= MAX_SIZE:
        return width
    rare = next(file.path for file in files if file.original == (width, height))
    raise DataError(
        f"{path}: the sizes of the images are {shown}; {rare.relative_to(path)} is "
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
    path: Path, class_names: tuple[str, ...], train: list[_File], test: list[_File]
) -> dict[str, tuple[int, int]]:
    """Return class name -> numbers of training and test images, if these are enough."""
    train_counts, test_counts = (Counter(f.class_name for f in split) for split in (train, test))
    empty = [name for name in class_names if not train_counts[name]]
    if empty:
        raise DataError(f"{path}: classes with too few usable images: {_some(empty)}")
    if len(test) < 2:
        raise DataError(f"{path / 'test'}: has fewer than 2 usable images")
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


def _some(names: Iterable[str], most: int = _SHOWN) -> str:
    shown = list(names)
    text = ", ".join(shown[:most])
    return text if len(shown) <= most else f"{text}, … ({len(shown):,} in all)"
