"""Whole data sets as files: what their bytes are, without holding more of them than a few.

Every image of a set takes as many bytes as any other: PNGs are stored and not compressed, and their
recipes are filled up with spaces. So the place of every byte is known before anything is made, the
length is announced, and a download goes on where it broke off.

A set is made of blocks, which hold each class once, in an order that the seed shuffles anew for
each block: whatever part of it a training has read, the classes are balanced. Image b of a class is
in block b, and is the image that `/generate` makes of that class, the seed and the index b.
"""

import hashlib
import io
import json
import math
import re
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from service.encoding.png import store_png
from service.inference.latents import splitmix64
from service.inference.repository import Model

SetFormat = Literal["zip", "webdataset", "idx", "npz"]
MEDIA_TYPES: dict[SetFormat, str] = {
    "zip": "application/zip",
    "webdataset": "application/x-tar",
    "idx": "application/x-tar",
    "npz": "application/x-npz",
}
SUFFIXES: dict[SetFormat, str] = {"zip": "zip", "webdataset": "tar", "idx": "idx.tar", "npz": "npz"}

_LAYOUT = 1  # of the bytes of this module; part of the ETag
_SHUFFLE = np.uint64(0x6A09E667F3BCC909)  # so that no image's latent comes of the same numbers
_UNSAFE = re.compile(r"[^\w.-]+", re.ASCII)  # a zip has other names in a way of their own

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class DataSet:
    """A balanced, labelled set of images.

    Attributes:
        model: makes them.
        seed: of all images.
        first: the block that it begins with.
        last: the block before which it ends.
        truncation: in (0, 1].
    """

    model: Model
    seed: int
    first: int
    last: int
    truncation: float = 1.0

    @property
    def classes(self) -> int:
        """Images of a block."""
        return len(self.model.info.class_names)

    @property
    def blocks(self) -> int:
        """How many there are."""
        return self.last - self.first

    @property
    def images(self) -> int:
        """How many there are."""
        return self.blocks * self.classes

    def labels(self, first: int, last: int) -> NDArray[np.int64]:
        """The labels (N,) of blocks of the set, counted from its own first one."""
        begin, end = ((self.first + block) * self.classes for block in (first, last))
        places = np.arange(begin, end, dtype=np.uint64).reshape(-1, self.classes)
        keys = splitmix64(np.full(1, self.seed, dtype=np.uint64) ^ _SHUFFLE, places)
        return keys.argsort(axis=1, kind="stable").ravel()

    def indices(self, first: int, last: int) -> NDArray[np.int64]:
        """The index (N,) of each image of blocks among those of its class."""
        return np.arange(self.first + first, self.first + last).repeat(self.classes)

    def entity_tag(self, form: SetFormat) -> str:
        """A strong ETag of the set as a file."""
        what = (form, _LAYOUT, self.seed, self.first, self.last, self.truncation)
        digest = hashlib.sha256(self.model.fingerprint + repr(what).encode())
        return f'"{digest.hexdigest()[:32]}"'

    def file_name(self, form: SetFormat) -> str:
        """What to save it as."""
        part = "" if self.first == 0 else f"-from-{self.first * self.classes}"
        name = f"{self.model.name}-{self.last}-of-each-seed-{self.seed}{part}"
        return f"{name}.{SUFFIXES[form]}"


class Chunk(NamedTuple):
    """Some blocks of a set.

    Attributes:
        first: the number of the first image, counted from the set's own first one.
        labels: (N,) int64.
        indices: (N,) int64.
        pixels: (N, H, W, C) uint8; nothing where they are not needed.
    """

    first: int
    labels: NDArray[np.int64]
    indices: NDArray[np.int64]
    pixels: Pixels


@dataclass(frozen=True)
class Static:
    """Bytes that are there once; made when their turn comes, for they may hold checksums."""

    length: int
    make: Callable[[], bytes]


@dataclass(frozen=True)
class Blocks:
    """Bytes of one block after the other, each of the same length.

    Attributes:
        block_bytes: length of one.
        make: the bytes of some blocks, in pieces that are made quickly.
        drawn: whether it needs pixels.
    """

    block_bytes: int
    make: Callable[[Chunk], Iterator[bytes]]
    drawn: bool = True


Piece = Static | Blocks


class Part(NamedTuple):
    """What is made at once: a static piece, or some blocks of a piece.

    Attributes:
        piece: of which.
        offset: of its first byte in the file.
        first: the first block, counted from the set's own first one.
        last: the block before which it ends.
    """

    piece: Piece
    offset: int
    first: int
    last: int


@dataclass(frozen=True)
class Layout:
    """A data set as a file; to be read once, since checksums are kept while it is.

    Attributes:
        blocks: how many blocks the set has.
        pieces: one after the other.
        seekable: whether it can be read from anywhere. Otherwise there are checksums in it of what
            comes before, so all of that has to be made, too.
    """

    blocks: int
    pieces: tuple[Piece, ...]
    seekable: bool = True

    def bytes_of(self, piece: Piece) -> int:
        """The length of a piece."""
        return piece.length if isinstance(piece, Static) else self.blocks * piece.block_bytes

    @property
    def length(self) -> int:
        """In bytes."""
        return sum(map(self.bytes_of, self.pieces))

    def parts(self, start: int, stop: int, blocks: int) -> Iterator[Part]:
        """What to make for bytes start:stop, so many blocks at a time."""
        offset = 0
        for piece in self.pieces:
            length = self.bytes_of(piece)
            skipped = 0 if not self.seekable else min(max(0, start - offset), length)
            if isinstance(piece, Static):
                if skipped < length and offset < stop:
                    yield Part(piece, offset, 0, 0)
            else:
                for first in range(skipped // piece.block_bytes, self.blocks, blocks):
                    at = offset + first * piece.block_bytes
                    if at >= stop:
                        return
                    yield Part(piece, at, first, min(first + blocks, self.blocks))
            offset += length


def lay_out(dataset: DataSet, form: SetFormat) -> Layout:
    """What a data set is as a file."""
    return _LAYOUTS[form](dataset)


def class_folders(names: Sequence[str]) -> list[str]:
    """A folder for each class.

    They begin with the label, so that readers who number the classes in the order of their names
    arrive at the same numbers.
    """
    width = len(str(len(names) - 1))
    return [f"{label:0{width}}-{_UNSAFE.sub('_', name)[:40]}" for label, name in enumerate(names)]


# PNG files --------------------------------------------------------------------------------------


class _Files:
    """The images of a set as PNG files of one length."""

    def __init__(self, dataset: DataSet) -> None:
        self._dataset = dataset
        names = dataset.model.info.class_names
        last = dataset.last - 1
        self._width = max(len(self._recipe(label, last)) for label in range(len(names)))
        height, width, channels = dataset.model.engine.image_shape
        blank = np.zeros((height, width, channels), dtype=np.uint8)
        self.length = len(self.encode(blank, 0, 0))

    def _recipe(self, label: int, index: int) -> str:
        dataset = self._dataset
        recipe = {
            "model": dataset.model.name,
            "sha256": dataset.model.sha256,
            "label": label,
            "class": dataset.model.info.class_names[label],
            "seed": dataset.seed,
            "index": index,
        }
        if dataset.truncation != 1.0:
            recipe["truncation"] = dataset.truncation
        return json.dumps(recipe, separators=(",", ":"))

    def encode(self, pixels: Pixels, label: int, index: int) -> bytes:
        """The file of one image (H, W, C)."""
        return store_png(pixels, self._recipe(label, index).ljust(self._width))


# Formats ----------------------------------------------------------------------------------------


def _lay_out_webdataset(dataset: DataSet) -> Layout:
    """A tar of samples (https://github.com/webdataset/webdataset), `00000000.png` and
    `00000000.cls` for each, numbered from the first image of the whole set.
    """
    files = _Files(dataset)
    begin = dataset.first * dataset.classes
    digits = max(8, len(str(dataset.last * dataset.classes - 1)))
    label_bytes = len(str(dataset.classes - 1))
    sample_bytes = 2 * tarfile.BLOCKSIZE + _padded(files.length) + _padded(label_bytes)

    png_member, label_member = _Member(files.length), _Member(label_bytes)

    def samples(chunk: Chunk) -> Iterator[bytes]:
        for number, (label, index, pixels) in enumerate(_rows(chunk), begin + chunk.first):
            name = f"{number:0{digits}}"
            text = str(label).rjust(label_bytes).encode()
            yield png_member.whole(f"{name}.png", files.encode(pixels, label, index))
            yield label_member.whole(f"{name}.cls", text)

    return Layout(dataset.blocks, (Blocks(sample_bytes * dataset.classes, samples), _static(_END)))


def _lay_out_idx(dataset: DataSet) -> Layout:
    """A tar of the two files that MNIST has (http://yann.lecun.com/exdb/mnist/), and the class
    names. Images of three colours have one dimension more.
    """
    height, width, channels = dataset.model.engine.image_shape
    shape = (dataset.images, height, width, *(() if channels == 1 else (channels,)))
    names = "".join(f"{name}\n" for name in dataset.model.info.class_names).encode()

    def images(chunk: Chunk) -> Iterator[bytes]:
        yield chunk.pixels.tobytes()

    def labels(chunk: Chunk) -> Iterator[bytes]:
        yield chunk.labels.astype(np.uint8).tobytes()

    def file(name: str, sizes: tuple[int, ...], blocks: Blocks) -> tuple[Piece, ...]:
        head = struct.pack(f">HBB{len(sizes)}I", 0, 8, len(sizes), *sizes)
        size = len(head) + blocks.block_bytes * dataset.blocks
        filler = bytes(_padded(size) - size)
        return _static(_Member(size).head(name) + head), blocks, _static(filler)

    block = height * width * channels * dataset.classes
    return Layout(
        dataset.blocks,
        (
            *file("train-images-idx3-ubyte", shape, Blocks(block, images)),
            *file(
                "train-labels-idx1-ubyte",
                (dataset.images,),
                Blocks(dataset.classes, labels, drawn=False),
            ),
            _static(_Member(len(names)).whole("classes.txt", names) + _END),
        ),
    )


def _lay_out_zip(dataset: DataSet) -> Layout:
    """A folder of PNGs for each class, as ImageFolder reads them."""
    files = _Files(dataset)
    digits = len(str(dataset.last - 1))
    folders = class_folders(dataset.model.info.class_names)

    def name(label: int, index: int) -> bytes:
        return f"{folders[label]}/{index:0{digits}}.png".encode()

    entries = [_Entry(name(label, 0), files.length) for label in range(dataset.classes)]
    block_bytes = sum(each.local_bytes + files.length for each in entries)
    central_bytes = sum(each.central_bytes for each in entries)
    crcs = np.zeros(dataset.images, dtype=np.uint32)

    def images(chunk: Chunk) -> Iterator[bytes]:
        for number, (label, index, pixels) in enumerate(_rows(chunk), chunk.first):
            png = files.encode(pixels, label, index)
            crcs[number] = zlib.crc32(png)
            entry = _Entry(name(label, index), files.length, int(crcs[number]))
            yield entry.local() + png

    def directory(chunk: Chunk) -> Iterator[bytes]:
        at = chunk.first // dataset.classes * block_bytes
        pairs = zip(chunk.labels.tolist(), chunk.indices.tolist(), strict=True)
        for number, (label, index) in enumerate(pairs, chunk.first):
            entry = _Entry(name(label, index), files.length, int(crcs[number]), at)
            yield entry.central()
            at += entry.local_bytes + files.length

    return Layout(
        dataset.blocks,
        (
            Blocks(block_bytes, images),
            Blocks(central_bytes, directory, drawn=False),
            _static(
                _zip_end(
                    dataset.images, dataset.blocks * block_bytes, dataset.blocks * central_bytes
                )
            ),
        ),
        seekable=False,
    )


def _lay_out_npz(dataset: DataSet) -> Layout:
    """Arrays for NumPy: images (N, H, W, C), labels, indices, seed, and class_names."""

    def images(chunk: Chunk) -> Iterator[bytes]:
        yield chunk.pixels.tobytes()

    def labels(chunk: Chunk) -> Iterator[bytes]:
        yield chunk.labels.tobytes()

    def indices(chunk: Chunk) -> Iterator[bytes]:
        yield chunk.indices.tobytes()

    shape = dataset.model.engine.image_shape
    row_bytes = int(np.prod(shape))
    count, classes = dataset.images, dataset.classes
    arrays: list[_Array] = [
        _Array("images", np.dtype(np.uint8), (count, *shape), Blocks(row_bytes * classes, images)),
        _Array("labels", np.dtype(np.int64), (count,), Blocks(8 * classes, labels, drawn=False)),
        _Array("indices", np.dtype(np.int64), (count,), Blocks(8 * classes, indices, drawn=False)),
        _Array.of("seed", np.array(dataset.seed, dtype=np.uint64)),
        _Array.of("class_names", np.array(dataset.model.info.class_names)),
    ]
    at = 0
    for array in arrays:
        array.entry.at = at
        at += array.length(dataset.blocks)
    central_bytes = sum(array.entry.central_bytes for array in arrays)
    end = _zip_end(len(arrays), at, central_bytes)

    def directory() -> bytes:
        return b"".join((*(array.entry.central() for array in arrays), end))

    pieces = [piece for array in arrays for piece in array.pieces()]
    pieces.append(Static(central_bytes + len(end), directory))
    return Layout(dataset.blocks, tuple(pieces), seekable=False)


_LAYOUTS: dict[SetFormat, Callable[[DataSet], Layout]] = {
    "zip": _lay_out_zip,
    "webdataset": _lay_out_webdataset,
    "idx": _lay_out_idx,
    "npz": _lay_out_npz,
}


def _rows(chunk: Chunk) -> Iterator[tuple[int, int, Pixels]]:
    """Label, index and pixels of each image."""
    return zip(chunk.labels.tolist(), chunk.indices.tolist(), chunk.pixels, strict=True)


def _static(content: bytes) -> Static:
    return Static(len(content), lambda: content)


# Tar --------------------------------------------------------------------------------------------

_END = bytes(2 * tarfile.BLOCKSIZE)  # of a tar


def _padded(size: int) -> int:
    return -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


class _Member:
    """Files of one size in a tar; their heads differ in the name and the checksum alone.

    `tarfile` makes the first, and takes longer for one than its image takes to be stored.
    """

    def __init__(self, size: int) -> None:
        info = tarfile.TarInfo()
        info.size = size
        head = info.tobuf(tarfile.GNU_FORMAT)  # of 8 GiB and more, too
        self._before, self._after = head[100:148], head[156:]
        # The checksum counts itself as eight spaces.
        self._sum = sum(self._before) + sum(self._after) + 8 * ord(" ")
        self._padding = bytes(_padded(size) - size)

    def head(self, name: str) -> bytes:
        """What stands before a file."""
        encoded = name.encode("ascii")
        checksum = b"%06o\0 " % (self._sum + sum(encoded))
        return b"".join((encoded.ljust(100, b"\0"), self._before, checksum, self._after))

    def whole(self, name: str, content: bytes) -> bytes:
        """A file and all that belongs to it."""
        return b"".join((self.head(name), content, self._padding))


# Zip (APPNOTE 6.3.10), whose libraries keep every entry in memory until its end -----------------

_VERSION = 45  # that can read 64-bit sizes
_ZIP64_EXTRA = 1
_IN_64_BITS = 0xFFFFFFFF
_DATE = 0x21  # 1980-01-01, the first that there is


@dataclass
class _Entry:
    """A stored file; every size and place is written in 64 bits, so that all take as many bytes.

    Attributes:
        name: its name.
        size: its bytes.
        crc: their CRC-32; None before they are there, which is said after them.
        at: where it begins.
    """

    name: bytes
    size: int
    crc: int | None = None
    at: int = 0

    def __post_init__(self) -> None:
        self._flags = 8 if self.crc is None else 0

    @property
    def local_bytes(self) -> int:
        """What stands before it."""
        return 30 + len(self.name) + 20

    @property
    def central_bytes(self) -> int:
        """What stands of it in the directory."""
        return 46 + len(self.name) + 28

    def local(self) -> bytes:
        """What stands before it."""
        size = 0 if self._flags else self.size
        head = struct.pack(
            "<4s5H3I2H",
            *(b"PK\3\4", _VERSION, self._flags, 0, 0, _DATE, self.crc or 0),
            *(_IN_64_BITS, _IN_64_BITS, len(self.name), 20),
        )
        return head + self.name + struct.pack("<2H2Q", _ZIP64_EXTRA, 16, size, size)

    def descriptor(self) -> bytes:
        """What stands after it, where it was not known before."""
        return struct.pack("<4sI2Q", b"PK\7\10", self.crc, self.size, self.size)

    def central(self) -> bytes:
        """What stands of it in the directory."""
        head = struct.pack(
            "<4s6H3I5H2I",
            *(b"PK\1\2", _VERSION, _VERSION, self._flags, 0, 0, _DATE, self.crc or 0),
            *(_IN_64_BITS, _IN_64_BITS, len(self.name), 28, 0, 0, 0, 0, _IN_64_BITS),
        )
        extra = struct.pack("<2H3Q", _ZIP64_EXTRA, 24, self.size, self.size, self.at)
        return head + self.name + extra


def _zip_end(entries: int, at: int, size: int) -> bytes:
    """What stands after the directory, which begins at `at`."""
    return b"".join(
        (
            struct.pack(
                "<4sQ2H2I4Q",
                *(b"PK\6\6", 44, _VERSION, _VERSION, 0, 0, entries, entries, size, at),
            ),
            struct.pack("<4sIQI", b"PK\6\7", 0, at + size, 1),
            struct.pack(
                "<4s4H2IH",
                *(b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, _IN_64_BITS, _IN_64_BITS, 0),
            ),
        )
    )


class _Array:
    """An array of an npz, whose checksum is known when all of it was made."""

    def __init__(
        self, name: str, dtype: np.dtype[Any], shape: tuple[int, ...], data: Blocks | Static
    ) -> None:
        buffer = io.BytesIO()
        description = {"descr": dtype.str, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(buffer, description)
        self._head, self._data = buffer.getvalue(), data
        size = len(self._head) + dtype.itemsize * math.prod(shape)
        self.entry = _Entry(f"{name}.npy".encode(), size)
        self._crc = 0

    @classmethod
    def of(cls, name: str, array: NDArray[Any]) -> Self:
        """One that is there already."""
        return cls(name, array.dtype, array.shape, _static(array.tobytes()))

    def length(self, blocks: int) -> int:
        """All its bytes in the file."""
        data = self._data
        size = data.length if isinstance(data, Static) else blocks * data.block_bytes
        return self.entry.local_bytes + len(self._head) + size + 24

    def pieces(self) -> Iterator[Piece]:
        """All its bytes in the file."""
        data = self._data
        yield Static(self.entry.local_bytes + len(self._head), self._begin)
        if isinstance(data, Static):
            yield Static(data.length, lambda: self._sum(data.make()))
        else:
            yield Blocks(data.block_bytes, self._sum_all, data.drawn)
        yield Static(24, self._finish)

    def _begin(self) -> bytes:
        return self.entry.local() + self._sum(self._head)

    def _sum_all(self, chunk: Chunk) -> Iterator[bytes]:
        assert isinstance(self._data, Blocks)
        return map(self._sum, self._data.make(chunk))

    def _sum(self, content: bytes) -> bytes:
        self._crc = zlib.crc32(content, self._crc)
        return content

    def _finish(self) -> bytes:
        self.entry.crc = self._crc
        return self.entry.descriptor()
