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
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from service.encoding import archives
from service.encoding.png import store_png
from service.generation import ResolvedRequest
from service.inference.latents import SamplingOptions, splitmix64
from service.inference.repository import Model

DatasetFormat = Literal["zip", "webdataset", "idx", "npz"]
MEDIA_TYPES: dict[DatasetFormat, str] = {
    "zip": "application/zip",
    "webdataset": "application/x-tar",
    "idx": "application/x-tar",
    "npz": "application/x-npz",
}
_SUFFIXES = {"webdataset": "tar", "idx": "idx.tar"}  # of the others, the name of the format
LAYOUT_VERSION = 1  # of the bytes that this module makes
_SHUFFLE = np.uint64(0x6A09E667F3BCC909)  # keeps the order independent of the latents
_UNSAFE = re.compile(r"[^\w.-]+", re.ASCII)  # zip needs a flag for names beyond ASCII

Pixels = NDArray[np.uint8]
_NO_PIXELS: Pixels = np.empty((0, 0, 0, 0), np.uint8)


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

    def request(self, first: int, last: int) -> ResolvedRequest:
        """Return the request for blocks first:last, counted from the first of the data set."""
        begin, end = ((self.first + block) * self.classes for block in (first, last))
        positions = np.arange(begin, end, dtype=np.uint64).reshape(-1, self.classes)
        keys = splitmix64(np.full(1, self.seed, dtype=np.uint64) ^ _SHUFFLE, positions)
        labels = keys.argsort(axis=1, kind="stable").ravel()
        indices = np.arange(self.first + first, self.first + last).repeat(self.classes)
        seeds = np.full(len(labels), self.seed, dtype=np.uint64)
        options = None if self.truncation == 1.0 else SamplingOptions(self.truncation)
        return ResolvedRequest(self.model, seeds, labels, indices, options)

    def file_name(self, file_format: DatasetFormat) -> str:
        """Return a name for the file."""
        part = "" if self.first == 0 else f"-from-{self.first * self.classes}"
        name = f"{self.model.name}-{self.last}-of-each-seed-{self.seed}{part}"
        return f"{name}.{_SUFFIXES.get(file_format, file_format)}"


class Batch(NamedTuple):
    """The images of some blocks."""

    first: int  # the number of the first image, counted from the first of the data set
    request: ResolvedRequest
    pixels: Pixels = _NO_PIXELS  # (N, H, W, C); empty for segments that need none

    def rows(self) -> Iterator[tuple[int, int, int]]:
        """Yield number, label and index of each image."""
        labels, indices = self.request.labels.tolist(), self.request.indices.tolist()
        return zip(count(self.first), labels, indices, strict=False)


@dataclass(frozen=True)
class Segment:
    """Bytes that occur once, or those of all blocks, the same number for each.

    They are made in order and late, since they may hold checksums of what precedes them.
    """

    unit_bytes: int  # of a block, or of the bytes that occur once
    make: Callable[[Batch], Iterable[bytes]]  # returns the bytes of some blocks in small pieces
    units: int = 1  # number of blocks
    needs_pixels: bool = False  # false if labels and indices are enough

    @property
    def length(self) -> int:
        """Return the number of bytes."""
        return self.units * self.unit_bytes


class SegmentRange(NamedTuple):
    """The units first:last of a segment: the unit of work of a download."""

    segment: Segment
    offset: int  # of its first byte in the file
    length: int  # in bytes
    first: int
    last: int


@dataclass(frozen=True)
class FileLayout:
    """A data set as a file; to be read once, since its segments accumulate checksums."""

    segments: Sequence[Segment]
    seekable: bool = True  # false if segments hold checksums of earlier ones

    @property
    def length(self) -> int:
        """Return the length of the file in bytes."""
        return sum(segment.length for segment in self.segments)

    def ranges(self, start: int, stop: int, blocks: int) -> Iterator[SegmentRange]:
        """Yield what must be made for the bytes start:stop, at most `blocks` blocks at a time."""
        offset = 0
        for segment in self.segments:
            size = segment.unit_bytes
            skipped = min(max(0, start - offset), segment.length) if self.seekable else 0
            for first in range(skipped // size, segment.units, blocks):
                begin, last = offset + first * size, min(first + blocks, segment.units)
                if begin >= stop:
                    return
                yield SegmentRange(segment, begin, (last - first) * size, first, last)
            offset += segment.length


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
        last = dataset.request(dataset.blocks - 1, dataset.blocks)
        recipes = [self._to_json(last, position) for position in range(dataset.classes)]
        self._width = max(map(len, recipes))
        blank = np.zeros(dataset.model.engine.image_shape, dtype=np.uint8)
        self.length = len(store_png(blank, " " * self._width))

    def _to_json(self, request: ResolvedRequest, position: int) -> str:
        return json.dumps(request.recipe(position), separators=(",", ":"))

    def files(self, batch: Batch) -> Iterator[bytes]:
        """Yield the file of each image."""
        for position, pixels in enumerate(batch.pixels):
            recipe = self._to_json(batch.request, position)
            yield store_png(pixels, recipe.ljust(self._width))


def _once(content: bytes) -> Segment:
    return Segment(len(content), lambda _batch: [content])


def _images(dataset: GeneratedDataset) -> Segment:
    """Return the pixels of all images."""
    block_bytes = dataset.classes * math.prod(dataset.model.engine.image_shape)
    return Segment(
        block_bytes, lambda batch: [batch.pixels.tobytes()], dataset.blocks, needs_pixels=True
    )


def _lay_out_webdataset(dataset: GeneratedDataset) -> FileLayout:
    """Lay out a tar of samples (https://github.com/webdataset/webdataset).

    Each has `00000000.png` and `00000000.cls`, numbered from the first image with `start=0`.
    """
    writer = _PNGWriter(dataset)
    begin = dataset.first * dataset.classes
    digits = max(8, len(str(dataset.last * dataset.classes - 1)))
    label_bytes = len(str(dataset.classes - 1))
    png_member, label_member = archives.TarMember(writer.length), archives.TarMember(label_bytes)
    sample_bytes = png_member.length + label_member.length

    def samples(batch: Batch) -> Iterator[bytes]:
        for (number, label, _), png in zip(batch.rows(), writer.files(batch), strict=True):
            name = f"{begin + number:0{digits}}"
            text = str(label).rjust(label_bytes).encode()
            yield png_member.file(f"{name}.png", png)
            yield label_member.file(f"{name}.cls", text)

    block_bytes = sample_bytes * dataset.classes
    segment = Segment(block_bytes, samples, dataset.blocks, needs_pixels=True)
    return FileLayout([segment, _once(archives.TAR_END)])


def _lay_out_idx(dataset: GeneratedDataset) -> FileLayout:
    """Lay out a tar of MNIST's two files (http://yann.lecun.com/exdb/mnist/) and the class names.

    RGB images have one dimension more.
    """
    height, width, channels = dataset.model.engine.image_shape
    shape = (dataset.images, height, width, *(() if channels == 1 else (channels,)))
    names = "".join(f"{name}\n" for name in dataset.model.info.class_names).encode()
    labels = Segment(
        dataset.classes,
        lambda batch: [batch.request.labels.astype(np.uint8).tobytes()],
        dataset.blocks,
    )

    def file(name: str, sizes: tuple[int, ...], data: Segment) -> tuple[Segment, Segment, Segment]:
        header = struct.pack(f">HBB{len(sizes)}I", 0, 8, len(sizes), *sizes)
        size = len(header) + data.length
        padding = bytes(archives.tar_padded(size) - size)
        return _once(archives.TarMember(size).header(name) + header), data, _once(padding)

    segments = [
        *file("train-images-idx3-ubyte", shape, _images(dataset)),
        *file("train-labels-idx1-ubyte", (dataset.images,), labels),
        _once(archives.TarMember(len(names)).file("classes.txt", names) + archives.TAR_END),
    ]
    return FileLayout([segment for segment in segments if segment.length])  # padding may be empty


def _lay_out_zip(dataset: GeneratedDataset) -> FileLayout:
    """Lay out a folder of PNGs for each class, as ImageFolder reads them."""
    writer = _PNGWriter(dataset)
    digits = len(str(dataset.last - 1))
    folders = class_folders(dataset.model.info.class_names)
    crcs = np.zeros(dataset.images, dtype=np.uint32)

    def entry(label: int, index: int, number: int = 0, offset: int = 0) -> archives.ZipEntry:
        name = f"{folders[label]}/{index:0{digits}}.png".encode()
        return archives.ZipEntry(name, writer.length, int(crcs[number]), offset)

    entries = [entry(label, 0) for label in range(dataset.classes)]
    block_bytes = sum(each.local_bytes + writer.length for each in entries)
    central_bytes = sum(each.central_bytes for each in entries)

    def images(batch: Batch) -> Iterator[bytes]:
        for (number, label, index), png in zip(batch.rows(), writer.files(batch), strict=True):
            crcs[number] = zlib.crc32(png)
            yield entry(label, index, number).local() + png

    def directory(batch: Batch) -> Iterator[bytes]:
        offset = batch.first // dataset.classes * block_bytes
        for number, label, index in batch.rows():
            each = entry(label, index, number, offset)
            yield each.central()
            offset += each.local_bytes + writer.length

    files = Segment(block_bytes, images, dataset.blocks, needs_pixels=True)
    central = Segment(central_bytes, directory, dataset.blocks)
    end = archives.zip_end(dataset.images, files.length, central.length)
    return FileLayout([files, central, _once(end)], seekable=False)


class _NPZArray:
    """An array of an npz, whose checksum is known once all of it has been made."""

    def __init__(self, name: str, dtype: Any, shape: tuple[int, ...], data: Segment) -> None:
        buffer = io.BytesIO()
        description = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(buffer, description)
        self._header, self._data = buffer.getvalue(), data
        self.entry = archives.ZipEntry(f"{name}.npy".encode(), len(self._header) + data.length)
        self._crc = 0

    def segments(self) -> list[Segment]:
        """Return its header, data and descriptor."""
        make = self._data.make
        return [
            Segment(self.entry.local_bytes + len(self._header), self._begin),
            replace(self._data, make=lambda batch: map(self._sum, make(batch))),
            Segment(archives.DESCRIPTOR_BYTES, self._finish),
        ]

    def _begin(self, _batch: Batch) -> list[bytes]:
        return [self.entry.local() + self._sum(self._header)]

    def _sum(self, content: bytes) -> bytes:
        self._crc = zlib.crc32(content, self._crc)
        return content

    def _finish(self, _batch: Batch) -> list[bytes]:
        self.entry.crc = self._crc
        return [self.entry.descriptor()]


def _lay_out_npz(dataset: GeneratedDataset) -> FileLayout:
    """Lay out arrays for NumPy: images (N, H, W, C), labels, indices, seed, and class_names."""
    shape = dataset.model.engine.image_shape
    images, blocks, classes = dataset.images, dataset.blocks, dataset.classes
    labels = Segment(8 * classes, lambda batch: [batch.request.labels.tobytes()], blocks)
    indices = Segment(8 * classes, lambda batch: [batch.request.indices.tobytes()], blocks)
    seed, names = np.array(dataset.seed, np.uint64), np.array(dataset.model.info.class_names)
    arrays = [
        _NPZArray("images", np.uint8, (images, *shape), _images(dataset)),
        _NPZArray("labels", np.int64, (images,), labels),
        _NPZArray("indices", np.int64, (images,), indices),
        _NPZArray("seed", seed.dtype, (), _once(seed.tobytes())),
        _NPZArray("class_names", names.dtype, names.shape, _once(names.tobytes())),
    ]
    offset = 0
    for array in arrays:
        array.entry.offset = offset
        offset += sum(segment.length for segment in array.segments())
    central_bytes = sum(array.entry.central_bytes for array in arrays)
    end = archives.zip_end(len(arrays), offset, central_bytes)

    def directory(_batch: Batch) -> Iterator[bytes]:
        yield from (array.entry.central() for array in arrays)
        yield end

    segments = [segment for array in arrays for segment in array.segments()]
    segments.append(Segment(central_bytes + len(end), directory))
    return FileLayout(segments, seekable=False)


_LAYOUTS: dict[DatasetFormat, Callable[[GeneratedDataset], FileLayout]] = {
    "zip": _lay_out_zip,
    "webdataset": _lay_out_webdataset,
    "idx": _lay_out_idx,
    "npz": _lay_out_npz,
}
