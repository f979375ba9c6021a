"""Data sets as files of which any part can be made without the rest.

All images of a data set take the same number of bytes: PNGs are stored without compression and
their recipes are padded. So the offset of every byte and the length of the file are known in
advance, and a download can resume.

A data set consists of blocks. A block holds each class once, in an order that the seed shuffles
anew for each block, so that any part of the file is balanced. Image `b` of a class is in block `b`;
it is the image that `/generate` makes of the class, the seed and the index `b`.
"""

import io
import json
import math
import re
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from service.encoding.archives import (
    DESCRIPTOR_BYTES,
    TAR_END,
    TarMember,
    ZipEntry,
    tar_padded,
    zip_end,
)
from service.encoding.png import store_png
from service.inference.latents import splitmix64
from service.inference.repository import Model

DatasetFormat = Literal["zip", "webdataset", "idx", "npz"]
MEDIA_TYPES: dict[DatasetFormat, str] = {
    "zip": "application/zip",
    "webdataset": "application/x-tar",
    "idx": "application/x-tar",
    "npz": "application/x-npz",
}
_SUFFIXES: dict[DatasetFormat, str] = {
    "zip": "zip",
    "webdataset": "tar",
    "idx": "idx.tar",
    "npz": "npz",
}
LAYOUT_VERSION = 1  # of the bytes that this module makes
_SHUFFLE = np.uint64(0x6A09E667F3BCC909)  # keeps the order independent of the latents
_UNSAFE = re.compile(r"[^\w.-]+", re.ASCII)  # zip needs a flag for names beyond ASCII

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class GeneratedDataset:
    """A balanced, labelled set of images: the blocks first:last of a seed."""

    model: Model
    seed: int
    first: int
    last: int
    truncation: float = 1.0

    @property
    def classes(self) -> int:
        """Return the number of classes, which is that of the images of a block."""
        return len(self.model.info.class_names)

    @property
    def blocks(self) -> int:
        """Return the number of blocks."""
        return self.last - self.first

    @property
    def images(self) -> int:
        """Return the number of images."""
        return self.blocks * self.classes

    def labels(self, first: int, last: int) -> NDArray[np.int64]:
        """Return the labels (N,) of blocks first:last, counted from the first of the data set."""
        begin, end = ((self.first + block) * self.classes for block in (first, last))
        positions = np.arange(begin, end, dtype=np.uint64).reshape(-1, self.classes)
        keys = splitmix64(np.full(1, self.seed, dtype=np.uint64) ^ _SHUFFLE, positions)
        return keys.argsort(axis=1, kind="stable").ravel()

    def indices(self, first: int, last: int) -> NDArray[np.int64]:
        """Return the index (N,) of each image of blocks first:last among those of its class."""
        return np.arange(self.first + first, self.first + last).repeat(self.classes)

    def file_name(self, file_format: DatasetFormat) -> str:
        """Return a name for the file."""
        part = "" if self.first == 0 else f"-from-{self.first * self.classes}"
        name = f"{self.model.name}-{self.last}-of-each-seed-{self.seed}{part}"
        return f"{name}.{_SUFFIXES[file_format]}"


class Batch(NamedTuple):
    """The images of some blocks."""

    first: int  # the number of the first image, counted from the first of the data set
    labels: NDArray[np.int64]  # (N,)
    indices: NDArray[np.int64]  # (N,)
    pixels: Pixels  # (N, H, W, C); empty for segments that need none

    def rows(self) -> Iterator[tuple[int, int, Pixels]]:
        """Yield label, index and pixels of each image."""
        return zip(self.labels.tolist(), self.indices.tolist(), self.pixels, strict=True)


@dataclass(frozen=True)
class StaticSegment:
    """Bytes that occur once; made late, since they may hold checksums of what precedes them."""

    length: int
    make: Callable[[], bytes]


@dataclass(frozen=True)
class BlockSegment:
    """The bytes of all blocks, the same number for each."""

    block_bytes: int
    make: Callable[[Batch], Iterator[bytes]]  # yields the bytes of some blocks in small pieces
    needs_pixels: bool = True  # false if labels and indices are enough


Segment = StaticSegment | BlockSegment


class SegmentRange(NamedTuple):
    """A static segment, or the blocks first:last of another: the unit of work of a download."""

    segment: Segment
    offset: int  # of its first byte in the file
    length: int  # in bytes
    first: int  # counted from the first block of the data set
    last: int


@dataclass(frozen=True)
class FileLayout:
    """A data set as a file; to be read once, since its segments accumulate checksums."""

    blocks: int
    segments: tuple[Segment, ...]
    seekable: bool = True  # false if segments hold checksums of earlier ones

    def _bytes_of(self, segment: Segment) -> int:
        if isinstance(segment, StaticSegment):
            return segment.length
        return self.blocks * segment.block_bytes

    @property
    def length(self) -> int:
        """Return the length of the file in bytes."""
        return sum(map(self._bytes_of, self.segments))

    def ranges(self, start: int, stop: int, blocks: int) -> Iterator[SegmentRange]:
        """Yield what must be made for the bytes start:stop, at most `blocks` blocks at a time."""
        offset = 0
        for segment in self.segments:
            length = self._bytes_of(segment)
            skipped = 0 if not self.seekable else min(max(0, start - offset), length)
            if isinstance(segment, StaticSegment):
                if skipped < length and offset < stop:
                    yield SegmentRange(segment, offset, length, 0, 0)
            else:
                size = segment.block_bytes
                for first in range(skipped // size, self.blocks, blocks):
                    begin, last = offset + first * size, min(first + blocks, self.blocks)
                    if begin >= stop:
                        return
                    yield SegmentRange(segment, begin, (last - first) * size, first, last)
            offset += length


def lay_out(dataset: GeneratedDataset, file_format: DatasetFormat) -> FileLayout:
    """Return the layout of a data set as a file."""
    return _LAYOUTS[file_format](dataset)


def class_folders(names: Sequence[str]) -> list[str]:
    """Return a folder name for each class.

    It begins with the label, so that readers who number the classes in the order of the folders'
    names arrive at the same labels.
    """
    width = len(str(len(names) - 1))
    return [f"{label:0{width}}-{_UNSAFE.sub('_', name)[:40]}" for label, name in enumerate(names)]


class _PNGWriter:
    """Encodes the images of a data set as PNG files of one length."""

    def __init__(self, dataset: GeneratedDataset) -> None:
        self._dataset = dataset
        last = dataset.last - 1
        self._width = max(len(self._recipe(label, last)) for label in range(dataset.classes))
        blank = np.zeros(dataset.model.engine.image_shape, dtype=np.uint8)
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
        """Return the file of one image (H, W, C)."""
        return store_png(pixels, self._recipe(label, index).ljust(self._width))


def _static(content: bytes) -> StaticSegment:
    return StaticSegment(len(content), lambda: content)


def _lay_out_webdataset(dataset: GeneratedDataset) -> FileLayout:
    """Lay out a tar of samples (https://github.com/webdataset/webdataset).

    Each has `00000000.png` and `00000000.cls`, numbered from the first image with `start=0`.
    """
    writer = _PNGWriter(dataset)
    begin = dataset.first * dataset.classes
    digits = max(8, len(str(dataset.last * dataset.classes - 1)))
    label_bytes = len(str(dataset.classes - 1))
    png_member, label_member = TarMember(writer.length), TarMember(label_bytes)
    sample_bytes = png_member.length + label_member.length

    def samples(batch: Batch) -> Iterator[bytes]:
        for number, (label, index, pixels) in enumerate(batch.rows(), begin + batch.first):
            name = f"{number:0{digits}}"
            text = str(label).rjust(label_bytes).encode()
            yield png_member.file(f"{name}.png", writer.encode(pixels, label, index))
            yield label_member.file(f"{name}.cls", text)

    segments = (BlockSegment(sample_bytes * dataset.classes, samples), _static(TAR_END))
    return FileLayout(dataset.blocks, segments)


def _lay_out_idx(dataset: GeneratedDataset) -> FileLayout:
    """Lay out a tar of MNIST's two files (http://yann.lecun.com/exdb/mnist/) and the class names.

    RGB images have one dimension more.
    """
    height, width, channels = dataset.model.engine.image_shape
    shape = (dataset.images, height, width, *(() if channels == 1 else (channels,)))
    names = "".join(f"{name}\n" for name in dataset.model.info.class_names).encode()
    images = BlockSegment(
        height * width * channels * dataset.classes, lambda batch: iter([batch.pixels.tobytes()])
    )
    labels = BlockSegment(
        dataset.classes,
        lambda batch: iter([batch.labels.astype(np.uint8).tobytes()]),
        needs_pixels=False,
    )

    def file(name: str, sizes: tuple[int, ...], data: BlockSegment) -> tuple[Segment, ...]:
        header = struct.pack(f">HBB{len(sizes)}I", 0, 8, len(sizes), *sizes)
        size = len(header) + data.block_bytes * dataset.blocks
        padding = bytes(tar_padded(size) - size)
        return _static(TarMember(size).header(name) + header), data, _static(padding)

    return FileLayout(
        dataset.blocks,
        (
            *file("train-images-idx3-ubyte", shape, images),
            *file("train-labels-idx1-ubyte", (dataset.images,), labels),
            _static(TarMember(len(names)).file("classes.txt", names) + TAR_END),
        ),
    )


def _lay_out_zip(dataset: GeneratedDataset) -> FileLayout:
    """Lay out a folder of PNGs for each class, as ImageFolder reads them."""
    writer = _PNGWriter(dataset)
    digits = len(str(dataset.last - 1))
    folders = class_folders(dataset.model.info.class_names)
    crcs = np.zeros(dataset.images, dtype=np.uint32)

    def entry(label: int, index: int, number: int = 0, offset: int = 0) -> ZipEntry:
        name = f"{folders[label]}/{index:0{digits}}.png".encode()
        return ZipEntry(name, writer.length, int(crcs[number]), offset)

    entries = [entry(label, 0) for label in range(dataset.classes)]
    block_bytes = sum(each.local_bytes + writer.length for each in entries)
    central_bytes = sum(each.central_bytes for each in entries)

    def images(batch: Batch) -> Iterator[bytes]:
        for number, (label, index, pixels) in enumerate(batch.rows(), batch.first):
            png = writer.encode(pixels, label, index)
            crcs[number] = zlib.crc32(png)
            yield entry(label, index, number).local() + png

    def directory(batch: Batch) -> Iterator[bytes]:
        offset = batch.first // dataset.classes * block_bytes
        pairs = zip(batch.labels.tolist(), batch.indices.tolist(), strict=True)
        for number, (label, index) in enumerate(pairs, batch.first):
            each = entry(label, index, number, offset)
            yield each.central()
            offset += each.local_bytes + writer.length

    end = zip_end(dataset.images, dataset.blocks * block_bytes, dataset.blocks * central_bytes)
    segments = (
        BlockSegment(block_bytes, images),
        BlockSegment(central_bytes, directory, needs_pixels=False),
        _static(end),
    )
    return FileLayout(dataset.blocks, segments, seekable=False)


class _NPZArray:
    """An array of an npz, whose checksum is known once all of it has been made."""

    def __init__(self, name: str, dtype: Any, shape: tuple[int, ...], data: Segment) -> None:
        buffer = io.BytesIO()
        description = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(buffer, description)
        self._header, self._data = buffer.getvalue(), data
        self._size: int = np.dtype(dtype).itemsize * math.prod(shape)
        self.entry = ZipEntry(f"{name}.npy".encode(), len(self._header) + self._size)
        self._crc = 0

    @classmethod
    def of(cls, name: str, array: NDArray[Any]) -> Self:
        """Create one of an array in memory."""
        return cls(name, array.dtype, array.shape, _static(array.tobytes()))

    @property
    def length(self) -> int:
        """Return all its bytes in the file."""
        return self.entry.local_bytes + len(self._header) + self._size + DESCRIPTOR_BYTES

    def segments(self) -> Iterator[Segment]:
        """Yield its segments."""
        data = self._data
        yield StaticSegment(self.entry.local_bytes + len(self._header), self._begin)
        if isinstance(data, StaticSegment):
            yield StaticSegment(data.length, lambda: self._sum(data.make()))
        else:
            make = data.make
            yield BlockSegment(
                data.block_bytes, lambda batch: map(self._sum, make(batch)), data.needs_pixels
            )
        yield StaticSegment(DESCRIPTOR_BYTES, self._finish)

    def _begin(self) -> bytes:
        return self.entry.local() + self._sum(self._header)

    def _sum(self, content: bytes) -> bytes:
        self._crc = zlib.crc32(content, self._crc)
        return content

    def _finish(self) -> bytes:
        self.entry.crc = self._crc
        return self.entry.descriptor()


def _lay_out_npz(dataset: GeneratedDataset) -> FileLayout:
    """Lay out arrays for NumPy: images (N, H, W, C), labels, indices, seed, and class_names."""
    shape = dataset.model.engine.image_shape
    count, classes = dataset.images, dataset.classes
    images = BlockSegment(math.prod(shape) * classes, lambda batch: iter([batch.pixels.tobytes()]))
    labels = BlockSegment(
        8 * classes, lambda batch: iter([batch.labels.tobytes()]), needs_pixels=False
    )
    indices = BlockSegment(
        8 * classes, lambda batch: iter([batch.indices.tobytes()]), needs_pixels=False
    )
    arrays = [
        _NPZArray("images", np.uint8, (count, *shape), images),
        _NPZArray("labels", np.int64, (count,), labels),
        _NPZArray("indices", np.int64, (count,), indices),
        _NPZArray.of("seed", np.array(dataset.seed, dtype=np.uint64)),
        _NPZArray.of("class_names", np.array(dataset.model.info.class_names)),
    ]
    offset = 0
    for array in arrays:
        array.entry.offset = offset
        offset += array.length
    central_bytes = sum(array.entry.central_bytes for array in arrays)
    end = zip_end(len(arrays), offset, central_bytes)

    def directory() -> bytes:
        return b"".join((*(array.entry.central() for array in arrays), end))

    segments = [segment for array in arrays for segment in array.segments()]
    segments.append(StaticSegment(central_bytes + len(end), directory))
    return FileLayout(dataset.blocks, tuple(segments), seekable=False)


_LAYOUTS: dict[DatasetFormat, Callable[[GeneratedDataset], FileLayout]] = {
    "zip": _lay_out_zip,
    "webdataset": _lay_out_webdataset,
    "idx": _lay_out_idx,
    "npz": _lay_out_npz,
}
