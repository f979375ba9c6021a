"""Data sets of generated images, and their names in files.

A data set consists of blocks. A block holds each class once, in an order that the seed shuffles
anew for each block, so that any part of the file is balanced. Image `b` of a class is in block `b`;
it is the image that `/generate` makes of the class, the seed and the index `b`. A shard is a fixed
run of blocks, in a file of its own.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

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
_SHUFFLE = np.uint64(0x6A09E667F3BCC909)  # keeps the order independent of the latents
_UNSAFE = re.compile(r"[^\w.\x80-\U0010ffff-]+", re.ASCII)

Pixels = NDArray[np.uint8]
_NO_PIXELS: Pixels = np.empty((0, 0, 0, 0), np.uint8)


class Shard(NamedTuple):
    """The number of a shard, from 1, and the number of shards of a set."""

    number: int
    total: int


ALL = Shard(1, 1)  # the whole set


@dataclass(frozen=True)
class GeneratedDataset:
    """A balanced, labelled set of images: a shard of the blocks start:per_class of a seed."""

    model: Model
    seed: int
    start: int
    per_class: int
    truncation: float = 1.0
    shard: Shard = ALL

    @property
    def first(self) -> int:
        """Return the first block of the shard."""
        return self._begin(self.shard.number - 1)

    @property
    def last(self) -> int:
        """Return the block after the last one of the shard."""
        return self._begin(self.shard.number)

    def _begin(self, shards: int) -> int:
        """Return the block after the first shards; all have as many blocks, give or take one."""
        return self.start + (self.per_class - self.start) * shards // self.shard.total

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

    @property
    def class_list(self) -> bytes:
        """Return the class names as a text file, one a line in the order of the labels."""
        names = (" ".join(name.splitlines()) for name in self.model.info.class_names)
        return "".join(f"{name}\n" for name in names).encode()

    def file_name(self, file_format: DatasetFormat, digest: str) -> str:
        """Return a name for the file. The digest of the whole set distinguishes it from others."""
        parts = [f"{self.model.name}-{self.per_class}-of-each-seed-{self.seed}"]
        if self.start:
            parts.append(f"from-{self.start * self.classes}")
        parts.append(digest)
        if self.shard.total > 1:
            parts.append("shard-{}of{}".format(*self.shard))
        return f"{'-'.join(parts)}.{_SUFFIXES.get(file_format, file_format)}"


class Batch(NamedTuple):
    """The images of some blocks."""

    first: int  # the number of the first image, counted from the first of the data set
    request: ResolvedRequest
    pixels: Pixels = _NO_PIXELS  # (N, H, W, C); empty for segments that need none

    def rows(self) -> Iterator[tuple[int, int, int]]:
        """Yield number, label and index of each image."""
        labels, indices = self.request.labels.tolist(), self.request.indices.tolist()
        return zip(count(self.first), labels, indices, strict=False)


def class_folders(names: Sequence[str]) -> list[str]:
    """Return a folder name for each class.

    It begins with the label, so that readers who number the classes in the order of the folders'
    names arrive at the same labels.
    """
    width = len(str(len(names) - 1))
    safe = ("".join(each if each.isprintable() else " " for each in name) for name in names)
    return [f"{label:0{width}}-{_UNSAFE.sub('_', name)[:40]}" for label, name in enumerate(safe)]
