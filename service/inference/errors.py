"""Errors of admission, batches and devices; importing them needs no PyTorch."""
# ruff: noqa: N818  (the exceptions are named for what happened: Overloaded, Draining)

import numpy as np
from numpy.typing import NDArray


class EngineError(Exception):
    """A model that cannot be served: the self-test at start-up found a wrong image."""


class Draining(Exception):
    """A batcher that admits no work: it is shutting down, or was never started."""


class Overloaded(Exception):
    """A request for which the queue has no room or not enough time; retry in `retry_after_s`."""

    def __init__(self, retry_after_s: float) -> None:
        super().__init__(retry_after_s)
        self.retry_after_s = retry_after_s


class DeadlineExceeded(Exception):
    """A request that was not complete at its deadline."""


class ForwardFailed(Exception):
    """A request with rows in a batch that failed; `__cause__` is the engine's exception."""


class OutOfMemory(Exception):
    """A batch that does not fit the device's memory; a smaller one may fit."""


class CorruptRows(Exception):
    """A batch of which some rows are not finite.

    Args:
        pixels: (B, H, W, C) uint8, of all rows.
        rows: (B,) bool, True for the rows that are not finite.
    """

    def __init__(self, pixels: NDArray[np.uint8], rows: NDArray[np.bool_]) -> None:
        super().__init__(f"{rows.sum()} of {len(rows)} rows are not finite")
        self.pixels, self.rows = pixels, rows


class DeviceLost(Exception):
    """A device that fails or computes wrong images; only a new process can use it again."""
