"""Named data sets as uint8 tensors: found on disk or downloaded, verified, parsed.

A file is known by the SHA-256 of its decompressed content. Mirrors compress again as they like,
so the gzip wrapper says nothing about the pixels inside it.
"""

import gzip
import hashlib
import io
import math
import os
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import pooch  # type: ignore[import-untyped]
import torch
from tqdm import tqdm

from training.files import write_atomically

DATA_DIR_VARIABLE = "CGAN_DATA_DIR"

Split = Literal["train", "test"]

_GZIP_MAGIC = b"\x1f\x8b"
_IDX_UINT8 = 0x08
_CONNECT_TIMEOUT_S = 10.0
_READ_TIMEOUT_S = 30.0
_CHUNK_BYTES = 16 * 1024


class DataError(Exception):
    """A data set cannot be had: the message names the path, the cause and what to do."""


@dataclass(frozen=True, eq=False)  # == on tensors has no single answer, so identity it is
class Dataset:
    """Labelled images, resident on one device.

    Attributes:
        name: what the data set is called, for instance ``mnist``.
        images: (N, C, H, W) uint8 in [0, 255], H == W.
        labels: (N,) int64 in [0, num_classes).
        class_names: one name per label.
        digest: SHA-256 (hex) over the decompressed bytes, images before labels, so that a
            checkpoint can refuse other data.
    """

    name: str
    images: torch.Tensor = field(repr=False)  # (N, C, H, W) uint8
    labels: torch.Tensor = field(repr=False)  # (N,) int64
    class_names: tuple[str, ...]
    digest: str

    @property
    def num_classes(self) -> int:
        """How many classes there are, whether or not each of them has an image."""
        return len(self.class_names)

    @property
    def channels(self) -> int:
        """C: 1 for grey, 3 for RGB."""
        return self.images.shape[1]

    @property
    def image_size(self) -> int:
        """H, which is W as well."""
        return self.images.shape[2]

    def to(self, device: torch.device | str) -> "Dataset":
        """The same data set with images and labels on ``device``."""
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))


@dataclass(frozen=True)
class DataFile:
    """One IDX file: its name without ``.gz`` and the SHA-256 (hex) of its decompressed content."""

    name: str
    sha256: str

    @property
    def archive(self) -> str:
        """The name under which the mirrors publish it."""
        return f"{self.name}.gz"


@dataclass(frozen=True)
class SplitFiles:
    """The two files of one split."""

    images: DataFile
    labels: DataFile


@dataclass(frozen=True)
class DatasetSpec:
    """What has to be known of a data set before any byte of it is here."""

    class_names: tuple[str, ...]
    mirrors: tuple[str, ...]  # base URLs, tried in this order
    splits: Mapping[Split, SplitFiles]


def _idx_splits(
    *, train_images: str, train_labels: str, test_images: str, test_labels: str
) -> dict[Split, SplitFiles]:
    """The four files under the names that MNIST gave them, each with its SHA-256."""
    return {
        "train": SplitFiles(
            DataFile("train-images-idx3-ubyte", train_images),
            DataFile("train-labels-idx1-ubyte", train_labels),
        ),
        "test": SplitFiles(
            DataFile("t10k-images-idx3-ubyte", test_images),
            DataFile("t10k-labels-idx1-ubyte", test_labels),
        ),
    }


DATASETS: Mapping[str, DatasetSpec] = {
    "mnist": DatasetSpec(
        class_names=(
            *("zero", "one", "two", "three", "four"),
            *("five", "six", "seven", "eight", "nine"),
        ),
        mirrors=(
            "https://ossci-datasets.s3.amazonaws.com/mnist/",
            "https://storage.googleapis.com/cvdf-datasets/mnist/",
        ),
        splits=_idx_splits(
            train_images="ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
            train_labels="65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
            test_images="0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
            test_labels="ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
        ),
    ),
    "fashion-mnist": DatasetSpec(
        class_names=(
            *("t-shirt", "trouser", "pullover", "dress", "coat"),
            *("sandal", "shirt", "sneaker", "bag", "ankle-boot"),
        ),
        mirrors=(
            "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
            "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
        ),
        splits=_idx_splits(
            train_images="c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
            train_labels="bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
            test_images="5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
            test_labels="0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
        ),
    ),
}


def default_data_dir() -> Path:
    """Where data sets lie unless told otherwise: ``CGAN_DATA_DIR``, else the user's cache."""
    chosen = os.environ.get(DATA_DIR_VARIABLE)
    if chosen:
        return Path(chosen).expanduser()  # a variable set in a file has met no shell
    return Path(pooch.os_cache("cgan-service"))


def load_dataset(
    name: str, split: Split, data_dir: Path, *, mirrors: Sequence[str] | None = None
) -> Dataset:
    """One split of a named data set, on the CPU; what is missing on disk is downloaded first.

    Args:
        name: a key of ``DATASETS``.
        split: ``train`` or ``test``.
        data_dir: the files lie in ``<data_dir>/<name>/``, with or without ``.gz``. Files that are
            there are read, never changed.
        mirrors: base URLs in place of the data set's own; an empty sequence forbids downloading.

    Returns:
        images (N, C, H, W) uint8 in [0, 255] and labels (N,) int64, both writable.

    Raises:
        DataError: an unknown name or split; a file that is present but wrong; a folder that cannot
            be written; no mirror that has the right content.
    """
    if name not in DATASETS:
        raise DataError(f"unknown data set {name!r}: the names are {', '.join(DATASETS)}")
    spec = DATASETS[name]
    if split not in spec.splits:
        raise DataError(f"{name} has no split {split!r}: its splits are {', '.join(spec.splits)}")
    files = spec.splits[split]
    folder = data_dir / name
    contents = _contents(files, folder, spec.mirrors if mirrors is None else mirrors)
    images, labels = _arrays(files, contents, folder, len(spec.class_names))

    digest = hashlib.sha256(contents[files.images])
    digest.update(contents[files.labels])
    return Dataset(
        name=name,
        images=torch.from_numpy(images).unsqueeze(1),  # (N, H, W) -> (N, 1, H, W)
        labels=torch.from_numpy(labels.astype(np.int64)),
        class_names=spec.class_names,
        digest=digest.hexdigest(),
    )


def parse_idx(data: bytes) -> npt.NDArray[np.uint8]:
    """The array in an IDX file: two zero bytes, the type, the rank, big-endian sizes, the payload.

    Args:
        data: the whole file, decompressed.

    Returns:
        uint8 in [0, 255] with 1 to 3 dimensions; a writable copy.

    Raises:
        ValueError: the header is not that of a uint8 array of 1 to 3 dimensions, or the payload
            is not as long as the header says.
    """
    if len(data) < 4 or data[:2] != b"\0\0":
        raise ValueError(f"not IDX data: starts with {data[:4].hex(' ') or 'nothing'}")
    kind, rank = data[2], data[3]
    if kind != _IDX_UINT8:
        raise ValueError(f"IDX element type is 0x{kind:02x}, expected 0x08 (uint8)")
    if not 1 <= rank <= 3:
        raise ValueError(f"IDX data has {rank} dimensions, expected 1 to 3")
    header_bytes = 4 + 4 * rank
    if len(data) < header_bytes:
        raise ValueError(f"IDX header is cut short: {len(data)} of {header_bytes} bytes")
    shape: tuple[int, ...] = struct.unpack_from(f">{rank}I", data, 4)
    payload_bytes = len(data) - header_bytes
    if payload_bytes != math.prod(shape):
        raise ValueError(
            f"IDX header says {' x '.join(map(str, shape))} = {math.prod(shape)} bytes, "
            f"but {payload_bytes} follow it"
        )
    # frombuffer looks into immutable bytes: torch takes such memory only with a warning.
    return np.frombuffer(data, np.uint8, offset=header_bytes).reshape(shape).copy()


def _contents(files: SplitFiles, folder: Path, mirrors: Sequence[str]) -> dict[DataFile, bytes]:
    """The decompressed, verified bytes of both files; those that are missing are downloaded."""
    located = {file: _find(folder, file) for file in (files.images, files.labels)}
    # What is here comes first: a wrong file is reported before minutes go into a download.
    contents = {file: _read(path, file) for file, path in located.items() if path is not None}
    missing = [file for file, path in located.items() if path is None]
    if missing and mirrors:
        _make_folder(folder)
    for position, file in enumerate(missing):
        content, failures = _download(file, folder, mirrors)
        if content is None:
            raise DataError(_do_it_by_hand(missing[position:], folder, failures))
        contents[file] = content
    return contents


def _find(folder: Path, file: DataFile) -> Path | None:
    """Where ``file`` lies in ``folder``, zipped or not; None if it does not."""
    for path in (folder / file.archive, folder / file.name):
        # A link that leads nowhere counts as present: it is the user's, and stays as it is.
        if os.path.lexists(path):
            return path
    return None


def _read(path: Path, file: DataFile) -> bytes:
    """The decompressed content of a file on disk.

    Raises:
        DataError: it cannot be read, or is not what ``file`` says.
    """
    try:
        return _verified(path.read_bytes(), file)
    except OSError as error:
        found = f"cannot be read ({error.strerror or error})"
    except ValueError as error:
        found = f"holds {error}"
    raise DataError(
        f"{path}: {found}; expected {file.name} with SHA-256 {file.sha256[:12]} once decompressed. "
        "Delete it to download it again."
    )


def _verified(raw: bytes, file: DataFile) -> bytes:
    """``raw`` without its gzip wrapper, if it has one, and proven to be ``file``.

    Raises:
        ValueError: it is something else; the message says what, as the object of a sentence.
    """
    zipped = raw.startswith(_GZIP_MAGIC)  # the bytes decide: browsers unzip and keep the name
    try:
        content = gzip.decompress(raw) if zipped else raw
    except EOFError:
        raise ValueError(f"truncated gzip data ({len(raw)} bytes)") from None
    except (OSError, zlib.error) as error:
        raise ValueError(f"corrupt gzip data ({error})") from error
    found = hashlib.sha256(content).hexdigest()
    if found != file.sha256:
        what = "other content" if zipped else f"{len(raw)} bytes that are not gzip data"
        raise ValueError(f"{what} (SHA-256 {found[:12]})")
    return content


def _make_folder(folder: Path) -> None:
    """Make sure that ``folder`` takes files, before the network is asked for them."""
    cause = "it is not writable"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        cause = error.strerror or str(error)
    else:
        if os.access(folder, os.W_OK | os.X_OK):
            return
    raise DataError(
        f"{folder}: no data can be stored here ({cause}). "
        f"Choose another data directory, for instance with {DATA_DIR_VARIABLE}."
    )


def _download(
    file: DataFile, folder: Path, mirrors: Sequence[str]
) -> tuple[bytes | None, list[str]]:
    """The content of ``file`` from the first mirror that has it, and how the others failed."""
    failures: list[str] = []
    for mirror in mirrors:
        url = f"{mirror.rstrip('/')}/{file.archive}"
        try:
            raw = _get(url, file)
            content = _verified(raw, file)
        except OSError as error:  # all that requests raises is an OSError
            failures.append(f"{url}: {_root_cause(error)}")
        except ValueError as error:
            failures.append(f"{url}: {error}")
        else:
            _store(raw, file, folder)
            return content, failures
    return None, failures


def _get(url: str, file: DataFile) -> bytes:
    """The body behind ``url``, with a progress bar where somebody watches.

    It stays in memory, where it is at most 26 MB, until it is verified: nothing unproven
    reaches the disk, and an OSError from here speaks of the network alone.
    """
    body = io.BytesIO()
    # pooch sets the true total on arrival, but asks a bar for its truth value first, and a bar
    # without a total raises. disable=None: no bar in a log file.
    with tqdm(total=1, desc=file.name, unit="B", unit_scale=True, disable=None) as bar:
        fetch = pooch.HTTPDownloader(
            progressbar=bar,
            chunk_size=_CHUNK_BYTES,
            timeout=(_CONNECT_TIMEOUT_S, _READ_TIMEOUT_S),
        )
        fetch(url, body, None)
    return body.getvalue()


def _root_cause(error: BaseException) -> str:
    """The innermost cause in short: "Connection refused", not the tower of wrappers around it."""
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    # An HTTP status error repeats the URL, which stands at the start of the line already.
    cause = str(error).partition(" for url: ")[0]
    return cause or type(error).__name__


def _store(raw: bytes, file: DataFile, folder: Path) -> None:
    """Put verified bytes under their final name, whole or not at all."""
    # A server that declares its .gz as a content encoding has it unzipped on the way.
    target = folder / (file.archive if raw.startswith(_GZIP_MAGIC) else file.name)
    try:
        write_atomically(target, raw)
    except OSError as error:
        raise DataError(
            f"{target}: cannot be written ({error.strerror or error}). Make room for "
            f"{len(raw)} bytes, or choose another data directory with {DATA_DIR_VARIABLE}."
        ) from error


def _do_it_by_hand(missing: Sequence[DataFile], folder: Path, failures: Sequence[str]) -> str:
    """The message for whoever has no network here, but may have one elsewhere."""
    tried = failures or ["no mirror to try"]
    return "\n".join(
        [
            f"{folder}: {missing[0].archive} is missing and could not be downloaded:",
            *(f"  {failure}" for failure in tried),
            "Put these files into that folder, or try again with a network:",
            *(f"  {file.archive}" for file in missing),
        ]
    )


def _arrays(
    files: SplitFiles, contents: Mapping[DataFile, bytes], folder: Path, num_classes: int
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """Images (N, H, W) and labels (N,) that belong together.

    Raises:
        DataError: they do not, though each file has the content that its SHA-256 promises.
    """
    try:
        images = parse_idx(contents[files.images])
        labels = parse_idx(contents[files.labels])
    except ValueError as error:
        raise DataError(f"{folder}: {error}. The data set's description is wrong.") from error
    problem = None
    if images.ndim != 3 or images.shape[1] != images.shape[2] or labels.ndim != 1:
        problem = f"images {images.shape} and labels {labels.shape} are not (N, H, H) and (N,)"
    elif len(images) != len(labels):
        problem = f"there are {len(images)} images but {len(labels)} labels"
    elif labels.max(initial=0) >= num_classes:
        problem = f"there is a label {labels.max()} but only {num_classes} classes"
    if problem is not None:
        pair = f"{files.images.name} and {files.labels.name}"
        raise DataError(f"{folder}: {problem} in {pair}. The data set's description is wrong.")
    return images, labels
