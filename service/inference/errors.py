"""What can go wrong with a device, in words that need no PyTorch."""
# ruff: noqa: N818  (the exceptions are named for what happened)

import numpy as np
from numpy.typing import NDArray


class OutOfMemory(Exception):
    """So many rows do not fit the device's memory; fewer may."""


class CorruptRows(Exception):
    """Some rows of a batch are not numbers.

    Args:
        pixels: (B, H, W, C) uint8, all rows.
        rows: (B,) bool, which of them are wrong.
    """

    def __init__(self, pixels: NDArray[np.uint8], rows: NDArray[np.bool_]) -> None:
        super().__init__(f"{rows.sum()} of {len(rows)} rows are not numbers")
        self.pixels, self.rows = pixels, rows


class DeviceLost(Exception):
    """The device does not compute any more, or not rightly; only another process may help."""
