"""The layout of a folder of images: its splits and classes.

The layouts are `DIR/CLASS/1.png` and `DIR/train/CLASS/1.png` with `DIR/test/CLASS/2.png`. A folder
with the name of a split is one if it holds class folders; if it holds images it is a class.
"""

import os
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from training.artifact import check_class_name, list_names, printable
from training.data.named import DATASETS, DataError

LAYOUTS = "DIR/CLASS/1.png, or DIR/train/CLASS/1.png with DIR/test/CLASS/2.png"
MAX_CLASSES = 1000
# By content any of these is read; by name they tell images from other files.
SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp"),
    *(".bmp", ".dib", ".gif", ".tif", ".tiff"),
)
# Names of splits in lower case; of several test splits the first in this order is measured with.
_TRAIN = ("train", "training")
_TEST = (
    *("test", "testing", "holdout", "held-out", "held_out", "val", "valid", "validation"),
    *("dev", "eval", "evaluation"),
)
# Files and folders that systems create by themselves, in lower case; others begin with a dot.
_SYSTEM = {
    *("thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini", "iconcache.db"),  # Windows
    *("$recycle.bin", "recycler", "system volume information"),
    *("__macosx", "icon\r", "network trash folder", "temporary items"),  # macOS
    *("lost+found", "__pycache__"),
    *(
        "@eadir",
        "@tmp",
        "#recycle",
        "#snapshot",
        "~snapshot",
        "@recycle",
        "@recently-snapshot",
    ),  # NAS
}

ClassFolders = dict[str, list[Path]]  # class name -> folders, in the order of the labels


@dataclass(frozen=True)
class Layout:
    """The class folders of the two splits, and remarks on the rest."""

    train: ClassFolders
    test: ClassFolders  # empty without a test split
    remarks: tuple[str, ...]


def read_layout(path: Path) -> Layout:
    """Find the splits and classes of a folder.

    Raises:
        DataError: the folder has another layout, cannot be opened, or a class has a name that no
            artifact can hold.
    """
    if not path.is_dir():
        known = ", ".join(DATASETS)
        hint = "; unpack an archive first" if path.is_file() else ""
        raise DataError(f"{path}: is neither a folder nor one of the data sets {known}{hint}")
    folders = _sub_folders(path)
    train, test = _find_splits(path, folders)
    parts = _sub_folders(train) if train else folders
    if test and not train:
        parts = [each for each in folders if not _split_of(each)]
    classes = _classes(parts)
    _check_count(train or path, classes)
    held_out = _classes(_sub_folders(test)) if test else {}
    unknown = [name for name in held_out if name not in classes]
    if unknown:
        raise DataError(f"{test}: has classes that train lacks: {list_names(unknown, 10)}")
    remarks = {
        "measured with": [test] if test and test.name != "test" else [],
        "not used, beside the splits": [
            each for each in folders if each not in (train, test, *parts)
        ],
        "classes with names of splits": [each for each in parts if _split_of(each)],
    }
    lines = [f"{remark}: {_names(found)}" for remark, found in remarks.items() if found]
    stray = sum(_count_images(each) for each in (path, train, test) if each)
    lines += [f"{stray:,} images outside the class folders are not used"] if stray else []
    return Layout(classes, held_out, (*lines, *_remarks(path, classes, held_out)))


def _find_splits(path: Path, folders: list[Path]) -> tuple[Path | None, Path | None]:
    """Return the folders to train on and to measure with, or None.

    A folder with the name of a split is a class, if it is beside other classes and holds images.
    """
    others = [each for each in folders if not _split_of(each)]
    splits = [
        each
        for each in folders
        if each not in others and _sub_folders(each) and not (others and _count_images(each))
    ]
    train = [each for each in splits if _split_of(each) in _TRAIN]
    test = [each for each in splits if _split_of(each) in _TEST]
    test.sort(key=lambda each: _TEST.index(each.name.casefold()))
    if len(train) > 1:
        raise DataError(f"{path}: has several training splits: {_names(train)}; keep one of them")
    if not others and not train:
        raise DataError(f"{path}: {_describe(path, folders)}; the layout is {LAYOUTS}")
    return next(iter(train), None), next(iter(test), None)


def _split_of(folder: Path) -> str | None:
    name = folder.name.casefold()
    return name if name in _TRAIN + _TEST else None


def visible(folder: Path) -> list[os.DirEntry[str]]:
    """Return the entries of a folder that are not hidden and not created by a system, sorted.

    Raises:
        OSError: the folder cannot be opened.
    """
    with os.scandir(folder) as entries:
        return sorted((e for e in entries if not _is_hidden(e.name)), key=lambda e: e.name)


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name.casefold() in _SYSTEM


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        return visible(folder)
    except OSError as error:
        raise DataError(f"{folder}: cannot be opened: {error.strerror}") from error


def _sub_folders(folder: Path) -> list[Path]:
    """Return the visible folders in a folder; a link that leads nowhere counts as one."""
    return [
        Path(each.path)
        for each in _entries(folder)
        if each.is_dir() or (each.is_symlink() and not Path(each.path).exists())
    ]


def _count_images(folder: Path) -> int:
    return sum(each.name.lower().endswith(SUFFIXES) for each in _entries(folder))


def _describe(path: Path, folders: list[Path]) -> str:
    """Return the reason why a folder has no classes."""
    if folders:
        return f"has the splits {_names(folders)}, but no train folder with class folders in it"
    if _count_images(path):
        return "holds images itself, but no class folders"
    return "has no class folders"


def _class_name(folder: Path) -> str:
    try:
        return check_class_name(folder.name)
    except ValueError as error:
        raise DataError(
            f"{printable(str(folder))}: cannot name a class: it {error}; rename the folder"
        ) from error


def _classes(folders: Iterable[Path]) -> ClassFolders:
    """Return the folders by class name; if all names are numbers, in their order."""
    found: ClassFolders = defaultdict(list)
    for folder in folders:
        found[_class_name(folder)].append(folder)
    numbers = all(name.isascii() and name.isdecimal() for name in found)
    order = sorted(found, key=lambda name: (int(name) if numbers else 0, name))
    return {name: found[name] for name in order}


def _check_count(path: Path, classes: ClassFolders) -> None:
    if 2 <= len(classes) <= MAX_CLASSES:
        return
    count, hint = f"{len(classes):,} sub-folders", ""
    if len(classes) == 1:
        [[only, *_]] = classes.values()
        count = f"1 sub-folder, {printable(only.name)}"
        hint = f"; for the classes in {only}, give that folder" if _holds_several(only) else ""
    raise DataError(
        f"{path}: has {count}, expected one per class, 2 to {MAX_CLASSES}; the layout is "
        f"{LAYOUTS}{hint}"
    )


def _holds_several(folder: Path) -> bool:
    return folder.is_dir() and len(_sub_folders(folder)) > 1


def _remarks(path: Path, *splits: ClassFolders) -> Iterable[str]:
    """Yield remarks on the names of the classes."""
    names = list(splits[0])
    twice = [name for split in splits for name, folders in split.items() if len(folders) > 1]
    if twice:
        yield f"one class in several spellings: {list_names(twice, 10)}"
    spelled: dict[str, list[str]] = defaultdict(list)
    for name in names:
        spelled[name.casefold()].append(name)
    alike = [name for group in spelled.values() if len(group) > 1 for name in group]
    if alike:
        yield f"class names that differ in case only: {list_names(alike, 10)}"
    taken = [name for label, name in enumerate(names) if _is_another_index(name, label, names)]
    if taken:
        number = str(int(taken[0]))
        meant = number if number in names else names[int(number)]
        yield (
            f"class names that are also the indices of other classes: {list_names(taken, 10)}; the "
            f"service looks for a name first: label={number} is the class {meant} (index "
            f"{names.index(meant)})"
        )
    with os.scandir(path) as entries:
        hidden = sorted(each.name for each in entries if each.is_dir() and _is_hidden(each.name))
    if hidden:
        yield f"hidden folders and folders of a system ignored: {list_names(hidden, 10)}"


def _is_another_index(name: str, label: int, names: list[str]) -> bool:
    return name.isascii() and name.isdecimal() and label != int(name) < len(names)


def _names(folders: Iterable[Path]) -> str:
    return list_names([printable(each.name) for each in folders], 10)
