"""Folders of images of noise."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

Pixels = npt.NDArray[np.uint8]


def noise(seed: int, *, size: int = 28, channels: int = 1) -> Pixels:
    shape = (size, size) if channels == 1 else (size, size, channels)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def fill(folder: Path, count: int, *, seed: int = 0, channels: int = 1, size: int = 28) -> Path:
    """A class folder of so many different PNGs."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        pixels = noise(1000 * seed + i, size=size, channels=channels)
        Image.fromarray(pixels).save(folder / f"{i:03d}.png")
    return folder
