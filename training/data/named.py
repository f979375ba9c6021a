"""Named data sets as uint8 tensors: read from disk or downloaded, verified, parsed.

Files are verified by the SHA-256 of their decompressed content, since the archives differ between
mirrors.
"""

import gzip
import hashlib
import io
import math
import os
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
import numpy.typing as npt
import pooch  # type: ignore[import-untyped]
import torch
from tqdm import tqdm

from training.data.cifar import parse_records, read_members
from training.files import prepare_folder, write_atomically

DATA_DIR_VARIABLE = "CGAN_DATA_DIR"

Split = Literal["train", "test"]
Content = TypeVar("Content")

_GZIP_MAGIC = b"\x1f\x8b"
_IDX_UINT8 = 0x08
_CONNECT_TIMEOUT_S = 10.0
_READ_TIMEOUT_S = 30.0
_CHUNK_BYTES = 16 * 1024


class DataError(Exception):
    """A data set that cannot be loaded; names the path, the cause and the remedy."""


@dataclass(frozen=True, eq=False)  # == of tensors is a tensor
class Dataset:
    """Labelled images, resident on one device."""

    name: str
    images: torch.Tensor = field(repr=False)  # (N, C, H, W) uint8 in [0, 255], H == W
    labels: torch.Tensor = field(repr=False)  # (N,) int64 in [0, num_classes)
    class_names: tuple[str, ...]  # one per label
    digest: str  # SHA-256 (hex) of the decompressed files, in the order of `FILES`

    @property
    def num_classes(self) -> int:
        """Return the number of classes, including classes without images."""
        return len(self.class_names)

    @property
    def channels(self) -> int:
        """Return C: 1 for grey, 3 for RGB."""
        return self.images.shape[1]

    @property
    def image_size(self) -> int:
        """Return H, which equals W."""
        return self.images.shape[2]

    def to(self, device: torch.device | str) -> "Dataset":
        """Return the same data set with images and labels on ``device``."""
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))


# Names of the files of the MNIST family, without ``.gz``: images before labels.
TRAIN_IMAGES, TRAIN_LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
TEST_IMAGES, TEST_LABELS = "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"
FILES: Mapping[Split, tuple[str, ...]] = {
    "train": (TRAIN_IMAGES, TRAIN_LABELS),
    "test": (TEST_IMAGES, TEST_LABELS),
}
CIFAR_FOLDER = "cifar-10-batches-bin"  # of its archive, extracted
CIFAR_FILES: Mapping[Split, tuple[str, ...]] = {
    "train": tuple(f"data_batch_{number}.bin" for number in range(1, 6)),
    "test": ("test_batch.bin",),
}


@dataclass(frozen=True)
class DatasetSpec:
    """The classes and the files of a data set."""

    class_names: tuple[str, ...]  # one per label
    mirrors: tuple[str, ...]  # base URLs, tried in this order
    sha256: Mapping[str, str]  # file without ``.gz`` -> digest (hex) of its decompressed content
    files: Mapping[Split, tuple[str, ...]] = field(default_factory=lambda: FILES)
    archive: str | None = None  # holds the files, of records; without it they are IDX, each zipped


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
        sha256={
            TRAIN_IMAGES: "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
            TRAIN_LABELS: "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
            TEST_IMAGES: "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
            TEST_LABELS: "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
        },
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
        sha256={
            TRAIN_IMAGES: "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
            TRAIN_LABELS: "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
            TEST_IMAGES: "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
            TEST_LABELS: "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
        },
    ),
    "cifar-10": DatasetSpec(
        class_names=(
            *("airplane", "automobile", "bird", "cat", "deer"),
            *("dog", "frog", "horse", "ship", "truck"),
        ),
        mirrors=(
            "https://www.cs.toronto.edu/~kriz/",
            "https://apache-mxnet.s3-accelerate.dualstack.amazonaws.com/gluon/dataset/cifar10/",
        ),
        # As published in torchvision for Ruby, github.com/ankane/torchvision-ruby.
        sha256={
            "data_batch_1.bin": "cee916563c9f80d84e3cc88e17fdc0941787f1244f00a67874d45b261883ada5",
            "data_batch_2.bin": "a591ca11fa1708a91ee40f54b3da4784ccd871ecf2137de63f51ada8b3fa57ed",
            "data_batch_3.bin": "bbe8596564c0f86427f876058170b84dac6670ddf06d79402899d93ceea26f67",
            "data_batch_4.bin": "014e562d6e23c72197cc727519169a60359f5eccd8945ad5a09d710285ff4e48",
            "data_batch_5.bin": "755304fc0b379caeae8c14f0dac912fbc7d6cd469eb67a1029a08a39453a9add",
            "test_batch.bin": "8e2eb146ae340b09e24670f29cabc6326dba54da8789dab6768acf480273f65b",
        },
        files=CIFAR_FILES,
        archive="cifar-10-binary.tar.gz",
    ),
}


def default_cache() -> Path:
    """Return the user's folder for downloads and for the classifiers of their own data sets."""
    return Path(pooch.os_cache("cgan-service"))


def default_data_dir() -> Path:
    """Return the default data directory: ``CGAN_DATA_DIR``, else the user's cache."""
    chosen = os.environ.get(DATA_DIR_VARIABLE)
    if chosen:
        return Path(chosen).expanduser()  # no shell expands variables in a file
    return default_cache()


def load_dataset(
    name: str, split: Split, data_dir: Path, *, mirrors: Sequence[str] | None = None
) -> Dataset:
    """Return one split of a named data set, on the CPU; download missing or damaged files.

    Args:
        name: a key of ``DATASETS``.
        split: ``train`` or ``test``.
        data_dir: the files are in ``<data_dir>/<name>/``, each with or without ``.gz``, or in one
            archive, extracted or not.
        mirrors: base URLs instead of the data set's own; an empty sequence disables downloads.

    Returns:
        images (N, C, H, W) uint8 in [0, 255] and labels (N,) int64, both writable.

    Raises:
        DataError: an unknown name or split, or no source has the right content.
        OSError: the folder cannot be written.
    """
    if name not in DATASETS:
        raise DataError(f"unknown data set {name!r}; expected {', '.join(DATASETS)}")
    spec = DATASETS[name]
    if split not in spec.files:
        raise DataError(f"unknown split {split!r} of {name}; expected {', '.join(spec.files)}")
    folder = data_dir / name
    mirrors = spec.mirrors if mirrors is None else mirrors
    sha256 = {file: spec.sha256[file] for file in spec.files[split]}
    try:
        if spec.archive is None:
            contents = [_content(folder, *file, mirrors) for file in sha256.items()]
            images, labels = _parse_pair(*contents)
        else:
            contents = _archived(folder, spec.archive, sha256, mirrors)
            images, labels = parse_records(b"".join(contents))
        if labels.max(initial=0) >= len(spec.class_names):
            raise ValueError(  # noqa: TRY301
                f"there is a label {labels.max()} but only {len(spec.class_names)} classes"
            )
    except ValueError as error:  # though the files have the SHA-256 of the description
        names = " and ".join(sha256)
        raise DataError(f"{folder}: {error} in {names}; fix the description of {name}") from error
    return Dataset(
        name=name,
        images=torch.from_numpy(images),
        labels=torch.from_numpy(labels.astype(np.int64)),
        class_names=spec.class_names,
        digest=hashlib.sha256(b"".join(contents)).hexdigest(),
    )


def parse_idx(data: bytes) -> npt.NDArray[np.uint8]:
    """Parse a decompressed IDX file: two zero bytes, type, rank, big-endian sizes, payload.

    Returns:
        uint8 in [0, 255] with 1 to 3 dimensions; a writable copy.

    Raises:
        ValueError: the header is not that of a uint8 array of 1 to 3 dimensions, or the payload
            has another length.
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
        raise ValueError(f"IDX header is truncated: {len(data)} of {header_bytes} bytes")
    shape: tuple[int, ...] = struct.unpack_from(f">{rank}I", data, 4)
    payload_bytes = len(data) - header_bytes
    if payload_bytes != math.prod(shape):
        raise ValueError(
            f"IDX header says {' x '.join(map(str, shape))} = {math.prod(shape)} bytes, "
            f"but {payload_bytes} follow it"
        )
    # A copy, since torch warns of the immutable memory of frombuffer.
    return np.frombuffer(data, np.uint8, offset=header_bytes).reshape(shape).copy()


def _parse_pair(
    images_idx: bytes, labels_idx: bytes
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """Parse images (N, 1, H, H) and labels (N,); raise ValueError unless they fit each other."""
    images, labels = parse_idx(images_idx), parse_idx(labels_idx)
    if images.ndim != 3 or images.shape[1] != images.shape[2] or labels.ndim != 1:
        raise ValueError(
            f"images {images.shape} and labels {labels.shape} are not (N, H, H) and (N,)"
        )
    if len(images) != len(labels):
        raise ValueError(f"there are {len(images)} images but {len(labels)} labels")
    return images[:, None], labels


def _content(folder: Path, name: str, sha256: str, mirrors: Sequence[str]) -> bytes:
    """Return the verified content of a file; download it if it is missing or damaged."""

    def verify(raw: bytes) -> bytes:
        return _verify(raw, sha256)

    return _load(
        folder,
        f"{name}.gz",
        verify,
        mirrors,
        others={folder / name: lambda path: verify(path.read_bytes())},
        wanted=f"{name}, with or without .gz",
        hint=f"the SHA-256 of its decompressed content is {sha256}",
    )


def _archived(
    folder: Path, archive: str, sha256: Mapping[str, str], mirrors: Sequence[str]
) -> list[bytes]:
    """Return the verified files of an archive; download it if it is missing or damaged."""

    def verify(contents: Mapping[str, bytes]) -> list[bytes]:
        for name, digest in sha256.items():
            _check_digest(contents[name], digest, f"other content in {name}")
        return [contents[name] for name in sha256]

    def read_extracted(path: Path) -> list[bytes]:
        missing = [name for name in sha256 if not (path / name).is_file()]
        if missing:
            raise ValueError(f"lacks {', '.join(missing)}")
        return verify({name: (path / name).read_bytes() for name in sha256})

    return _load(
        folder,
        archive,
        lambda raw: verify(read_members(raw, sha256)),
        mirrors,
        others={folder / CIFAR_FOLDER: read_extracted},
        wanted=f"{archive} or {CIFAR_FOLDER}",
        hint=f"its folder {CIFAR_FOLDER} will do as well",
    )


def _load(
    folder: Path,
    archive: str,
    verify: Callable[[bytes], Content],
    mirrors: Sequence[str],
    *,
    others: Mapping[Path, Callable[[Path], Content]],
    wanted: str,
    hint: str,
) -> Content:
    """Return the content of the first good source: the archive, others on disk, the mirrors."""
    failures: list[str] = []
    readers = {folder / archive: lambda path: verify(path.read_bytes()), **others}
    for path, read in readers.items():
        if not os.path.lexists(path):  # true for a link whose target is missing
            continue
        try:
            return read(path)
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
        except ValueError as error:
            failures.append(f"{path}: {error}")
    for mirror in mirrors:
        prepare_folder(folder)
        url = f"{mirror.rstrip('/')}/{archive}"
        try:
            raw = _get(url)
            content = verify(raw)
        except OSError as error:  # includes all exceptions of requests
            failures.append(f"{url}: {_root_cause(error)}")
        except ValueError as error:
            failures.append(f"{url}: {error}")
        else:
            _store(folder / archive, raw)
            return content
    raise DataError(
        "\n".join(
            [
                f"{folder}: cannot load {wanted}:",
                *(f"  {failure}" for failure in failures or ["missing, and downloads are off"]),
                f"Connect to a network, or put {archive} into this folder; {hint}.",
            ]
        )
    )


def _verify(raw: bytes, sha256: str) -> bytes:
    """Return the decompressed content of a file, gzip or not; raise ValueError for another one."""
    zipped = raw.startswith(_GZIP_MAGIC)  # not by name: browsers decompress and keep the name
    try:
        content = gzip.decompress(raw) if zipped else raw
    except EOFError:
        raise ValueError(f"truncated gzip data ({len(raw)} bytes)") from None
    except (OSError, zlib.error) as error:
        raise ValueError(f"corrupt gzip data ({error})") from error
    kind = "other content" if zipped else f"{len(raw)} bytes that are not gzip data"
    return _check_digest(content, sha256, kind)


def _check_digest(content: bytes, sha256: str, kind: str) -> bytes:
    """Return the content; raise ValueError, which begins with `kind`, for another digest."""
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise ValueError(f"{kind} (SHA-256 {found[:12]}, expected {sha256[:12]})")
    return content


def _get(url: str) -> bytes:
    """Download a file into memory, with a progress bar on a terminal.

    Unverified bytes never reach the disk, and an OSError from here is one of the network.
    """
    body = io.BytesIO()
    # pooch sets the true total later, but tests the bar's truth value first, and a bar without a
    # total raises then. disable=None: no bar unless stderr is a terminal.
    with tqdm(total=1, desc=Path(url).stem, unit="B", unit_scale=True, disable=None) as bar:
        download = pooch.HTTPDownloader(
            progressbar=bar, chunk_size=_CHUNK_BYTES, timeout=(_CONNECT_TIMEOUT_S, _READ_TIMEOUT_S)
        )
        download(url, body, None)
    return body.getvalue()


def _root_cause(error: BaseException) -> str:
    """Return the message of the innermost cause, such as "Connection refused"."""
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    # Without the URL that requests appends.
    return str(error).partition(" for url: ")[0] or type(error).__name__


def _store(path: Path, raw: bytes) -> None:
    try:
        write_atomically(path, raw)
    except OSError as error:
        raise DataError(
            f"{path}: cannot be written ({error.strerror or error}); free {len(raw)} bytes, or "
            f"choose another data directory with {DATA_DIR_VARIABLE}"
        ) from error
