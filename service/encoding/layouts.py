"""Files of data sets, of which any part can be made without the rest.

All images of a data set take the same number of bytes: PNGs are stored without compression and
their recipes are padded. So the offset of every byte and the length of the file are known in
advance, and a download can resume.
"""

import io
import json
import math
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from service.encoding import archives
from service.encoding.datasets import Batch, DatasetFormat, GeneratedDataset, class_folders
from service.encoding.png import store_png
from service.generation import ResolvedRequest

LAYOUT_VERSION = 2  # of the bytes that this module makes
_MANIFEST_HEAD = b"file_name,label\n"


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


class _PNGWriter:
    """Encodes the images of a data set as PNG files of one length."""

    def __init__(self, dataset: GeneratedDataset) -> None:
        # The last block of the whole set: an image is the same file in any shard.
        end = dataset.per_class - dataset.first
        last = dataset.request(end - 1, end)
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


def _late(length: int, make: Callable[[], bytes]) -> Segment:
    """Return bytes that occur once and depend on those before them."""
    return Segment(length, lambda _batch: [make()])


def _images(dataset: GeneratedDataset) -> Segment:
    """Return the pixels of all images."""
    block_bytes = dataset.classes * math.prod(dataset.model.engine.image_shape)
    return Segment(
        block_bytes, lambda batch: [batch.pixels.tobytes()], dataset.blocks, needs_pixels=True
    )


def _lay_out_webdataset(dataset: GeneratedDataset) -> FileLayout:
    """Lay out a tar of samples (https://github.com/webdataset/webdataset).

    Each has `00000000.png` and `00000000.cls`, numbered from the first image with `start=0`. The
    class names are in `__classes__`, which readers do not take for a sample.
    """
    writer = _PNGWriter(dataset)
    begin = dataset.first * dataset.classes
    digits = max(8, len(str(dataset.per_class * dataset.classes - 1)))
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
    names = archives.TarMember(len(dataset.class_list)).file("__classes__", dataset.class_list)
    return FileLayout([segment, _once(names + archives.TAR_END)])


def _lay_out_idx(dataset: GeneratedDataset) -> FileLayout:
    """Lay out a tar of MNIST's two files (http://yann.lecun.com/exdb/mnist/) and the class names.

    The images must be grey: no reader of these files expects a fourth dimension.
    """
    height, width, _ = dataset.model.engine.image_shape
    names = dataset.class_list
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
        *file("train-images-idx3-ubyte", (dataset.images, height, width), _images(dataset)),
        *file("train-labels-idx1-ubyte", (dataset.images,), labels),
        _once(archives.TarMember(len(names)).file("classes.txt", names) + archives.TAR_END),
    ]
    return FileLayout([segment for segment in segments if segment.length])  # padding may be empty


class _FolderZip:
    """A zip with a folder of PNGs for each class, `metadata.csv` and `classes.txt`.

    The folders are what ImageFolder reads. The CSV has the label of each file; the library
    `datasets` finds none otherwise, as it takes the path to the archive for the class.
    """

    def __init__(self, dataset: GeneratedDataset) -> None:
        self._dataset, self._writer = dataset, _PNGWriter(dataset)
        self._digits = len(str(dataset.per_class - 1))
        self._folders = class_folders(dataset.model.info.class_names)
        self._crcs = np.zeros(dataset.images, dtype=np.uint32)
        rows = [self._row(label, 0) for label in range(dataset.classes)]
        self._row_bytes = sum(map(len, rows))
        self._entries = [self._entry(label, 0) for label in range(dataset.classes)]
        self._block_bytes = sum(each.local_bytes + each.size for each in self._entries)
        # The CRC is that of all rows once all images are made.
        size, crc = dataset.blocks * self._row_bytes, zlib.crc32(_MANIFEST_HEAD)
        self._manifest = archives.ZipEntry("metadata.csv", len(_MANIFEST_HEAD) + size, crc)
        names = dataset.class_list
        self._names = archives.ZipEntry("classes.txt", len(names), zlib.crc32(names))
        self._offset = dataset.blocks * self._block_bytes
        for each in (self._manifest, self._names):
            each.offset = self._offset
            self._offset += each.local_bytes + each.size  # in the end, that of the directory
        for each in (*self._entries, self._manifest, self._names):
            each.far = archives.is_far(self._offset)

    def layout(self) -> FileLayout:
        """Return the layout of the file."""
        blocks, manifest, names = self._dataset.blocks, self._manifest, self._names
        central_bytes = sum(each.central_bytes for each in self._entries)
        last_bytes = manifest.central_bytes + names.central_bytes
        end = archives.zip_end(
            self._dataset.images + 2, self._offset, blocks * central_bytes + last_bytes
        )
        head_bytes = manifest.local_bytes + len(_MANIFEST_HEAD)
        segments = [
            Segment(self._block_bytes, self._images, blocks, needs_pixels=True),
            _late(head_bytes, lambda: manifest.local() + _MANIFEST_HEAD),
            Segment(self._row_bytes, self._rows, blocks),
            _once(names.local() + self._dataset.class_list),
            Segment(central_bytes, self._directory, blocks),
            _late(last_bytes + len(end), lambda: manifest.central() + names.central() + end),
        ]
        return FileLayout(segments, seekable=False)

    def _path(self, label: int, index: int) -> str:
        return f"{self._folders[label]}/{index:0{self._digits}}.png"

    def _row(self, label: int, index: int) -> bytes:
        return f"{self._path(label, index)},{label}\n".encode()

    def _entry(self, label: int, index: int, number: int = 0, offset: int = 0) -> archives.ZipEntry:
        path, crc = self._path(label, index), int(self._crcs[number])
        return archives.ZipEntry(path, self._writer.length, crc, offset)

    def _images(self, batch: Batch) -> Iterator[bytes]:
        for (number, label, index), png in zip(
            batch.rows(), self._writer.files(batch), strict=True
        ):
            self._crcs[number] = zlib.crc32(png)
            self._manifest.crc = zlib.crc32(self._row(label, index), self._manifest.crc or 0)
            yield self._entry(label, index, number).local() + png

    def _rows(self, batch: Batch) -> Iterator[bytes]:
        for _, label, index in batch.rows():
            yield self._row(label, index)

    def _directory(self, batch: Batch) -> Iterator[bytes]:
        offset = batch.first // self._dataset.classes * self._block_bytes
        for number, label, index in batch.rows():
            entry = self._entry(label, index, number, offset)
            entry.far = self._names.far
            yield entry.central()
            offset += entry.local_bytes + entry.size


class _NPZArray:
    """An array of an npz, whose checksum is known once all of it has been made."""

    def __init__(self, name: str, dtype: Any, shape: tuple[int, ...], data: Segment) -> None:
        buffer = io.BytesIO()
        description = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(buffer, description)
        self._header, self._data = buffer.getvalue(), data
        self.entry = archives.ZipEntry(f"{name}.npy", len(self._header) + data.length)
        self._crc = 0

    def segments(self) -> list[Segment]:
        """Return its header, data and descriptor."""
        make = self._data.make
        return [
            _late(self.entry.local_bytes + len(self._header), self._begin),
            replace(self._data, make=lambda batch: map(self._sum, make(batch))),
            _late(self.entry.descriptor_bytes, self._finish),
        ]

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
    for array in arrays:
        array.entry.far = archives.is_far(offset)
    central_bytes = sum(array.entry.central_bytes for array in arrays)
    end = archives.zip_end(len(arrays), offset, central_bytes)

    def directory() -> bytes:
        return b"".join(array.entry.central() for array in arrays) + end

    segments = [segment for array in arrays for segment in array.segments()]
    return FileLayout([*segments, _late(central_bytes + len(end), directory)], seekable=False)


_LAYOUTS: dict[DatasetFormat, Callable[[GeneratedDataset], FileLayout]] = {
    "zip": lambda dataset: _FolderZip(dataset).layout(),
    "webdataset": _lay_out_webdataset,
    "idx": _lay_out_idx,
    "npz": _lay_out_npz,
}
