"""An engine without a network, for tests and benchmarks of what surrounds an engine."""

import threading
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from service.inference.engine import Engine, ReferenceImages
from service.inference.latents import RowOptions
from training.artifact import Artifact

Row = tuple[int, int, int]  # (seed, index, label)
Paint = Callable[[NDArray[np.uint64], NDArray[np.int64], NDArray[np.int64]], NDArray[np.uint8]]


def paint_rows(
    seeds: NDArray[np.uint64], indices: NDArray[np.int64], labels: NDArray[np.int64]
) -> NDArray[np.uint8]:
    """Return images (B, 2, 4, 3) that hold every byte of their rows' numbers."""
    rows = np.stack((seeds.astype(np.int64), indices, labels), 1)
    return rows.view(np.uint8).reshape(-1, 2, 4, 3)


class EngineStub(Engine):
    """An engine that paints its rows and records its batches.

    Args:
        max_batch: maximum number of rows of a call.
        paint: makes the pixels (B, H, W, C) of rows.
        artifact: what the engine serves, for tests that make a `Model` of it.
    """

    def __init__(
        self, max_batch: int = 64, paint: Paint = paint_rows, artifact: Artifact | None = None
    ) -> None:
        self.max_batch = max_batch
        self.device, self.dtype = "cpu", "float32"
        self._paint = paint
        self._calls: list[tuple[NDArray[np.uint64], NDArray[np.int64], NDArray[np.int64]]] = []
        self.row_options: list[Sequence[RowOptions]] = []
        if artifact is not None:
            self.artifact = artifact
            seeds, numbers = np.zeros(2, np.uint64), np.arange(2)
            pixels = paint(seeds, numbers, numbers)
            self.image_shape = pixels.shape[1:]
            self.reference = ReferenceImages(seeds, numbers, numbers, pixels)

    def __call__(
        self,
        seeds: NDArray[np.uint64],
        indices: NDArray[np.int64],
        labels: NDArray[np.int64],
        row_options: Sequence[RowOptions] = (),
    ) -> NDArray[np.uint8]:
        self._calls.append((seeds, indices, labels))
        self.row_options.append(row_options)
        return self._paint(seeds, indices, labels)

    @property
    def batches(self) -> list[list[Row]]:
        """The rows of each call."""
        return [
            list(zip(seeds.tolist(), indices.tolist(), labels.tolist(), strict=True))
            for seeds, indices, labels in self._calls
        ]

    @property
    def sizes(self) -> list[int]:
        """The number of rows of each call."""
        return [len(seeds) for seeds, _, _ in self._calls]


def paint_indices(
    _seeds: NDArray[np.uint64], indices: NDArray[np.int64], _labels: NDArray[np.int64]
) -> NDArray[np.uint8]:
    pixels = np.zeros((len(indices), 12, 12, 1), dtype=np.uint8)
    pixels += indices.astype(np.uint8)[:, None, None, None]
    return pixels


class GatedEngine(EngineStub):
    """Paints each image with its index; waits for `gate` before batches of large enough indices."""

    held_from = 0  # the least index that a batch waits for

    def __init__(self, artifact: Artifact) -> None:
        super().__init__(8, paint_indices, artifact)
        self.gate = threading.Event()
        self.started = threading.Semaphore(0)
        self.failure: Exception | None = None

    def __call__(
        self,
        seeds: NDArray[np.uint64],
        indices: NDArray[np.int64],
        labels: NDArray[np.int64],
        row_options: Sequence[RowOptions] = (),
    ) -> NDArray[np.uint8]:
        if indices.max() >= self.held_from:
            self.started.release()
            assert self.gate.wait(60)
        if self.failure is not None:
            raise self.failure
        return super().__call__(seeds, indices, labels, row_options)
