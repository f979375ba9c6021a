"""Pixels to PNG bytes, and many images to one contact sheet.

Written here and not by an imaging library because every answer is made of it: for a small grey
image this takes a fraction of the time (`tests/benchmarks`), and its bytes are part of the byte
contract. The format is the PNG specification, third edition (https://www.w3.org/TR/png-3/); the
compression is ISA-L's, which takes half as long as zlib's fastest or less.
"""

import json
import math
import struct
import zlib
from collections.abc import Mapping
from functools import lru_cache

import numpy as np
from isal import isal_zlib
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]

RECIPE_KEYWORD = "Recipe"
SIGNATURE = b"\x89PNG\r\n\x1a\n"
_COLOUR_TYPES = {1: 0, 3: 2}  # grey, RGB
# Level 1 makes files a sixth smaller and takes up to twice as long; for a single small image, which
# takes less time than its table does to clear, six times.
_LEVEL = 0
# JSON keeps to ASCII here, so that a class name in any script fits the chunk's Latin-1.
_to_json = json.JSONEncoder(separators=(",", ":")).encode


def encode_png(pixels: Pixels, recipe: Mapping[str, object]) -> bytes:
    """One image as a PNG.

    Args:
        pixels: (H, W, C) uint8, C = 1 (grey) or 3 (RGB).
        recipe: what the image was made from; written as JSON into a text chunk named `Recipe`.
    """
    return _join(pixels, _to_json(recipe), isal_zlib.compress(_filter(pixels), _LEVEL))


def store_png(pixels: Pixels, recipe: str) -> bytes:
    """One image as a PNG that is not compressed: its length depends on the shape alone.

    Args:
        pixels: (H, W, C) uint8, C = 1 (grey) or 3 (RGB).
        recipe: as of `encode_png`, in JSON; its length counts, too.
    """
    return _join(pixels, recipe, zlib.compress(_filter(pixels).data, 0))


def _filter(pixels: Pixels) -> Pixels:
    """The rows (H, 1 + W * C) of an image, with filter type 0 before each."""
    height, width, channels = pixels.shape
    rows = np.zeros((height, 1 + width * channels), dtype=np.uint8)
    rows[:, 1:] = pixels.reshape(height, -1)
    return rows


def _join(pixels: Pixels, recipe: str, compressed: bytes) -> bytes:
    head = _head(*pixels.shape)
    text = f"{RECIPE_KEYWORD}\0{recipe}".encode("ascii")
    return b"".join((head, _chunk(b"tEXt", text), _chunk(b"IDAT", compressed), _TAIL))


def _chunk(kind: bytes, data: bytes) -> bytes:
    checksum = zlib.crc32(data, zlib.crc32(kind))
    return b"".join((len(data).to_bytes(4), kind, data, checksum.to_bytes(4)))


_TAIL = _chunk(b"IEND", b"")


@lru_cache(maxsize=256)
def _head(height: int, width: int, channels: int) -> bytes:
    """Everything before the first chunk that differs between images of a shape."""
    header = struct.pack(">IIBBBBB", width, height, 8, _COLOUR_TYPES[channels], 0, 0, 0)
    return SIGNATURE + _chunk(b"IHDR", header)


def contact_sheet(images: Pixels) -> Pixels:
    """Many images as one: columns = ceil(sqrt(N)), row by row, black where none is left.

    Args:
        images: (N, H, W, C) uint8.

    Returns:
        (rows * H, columns * W, C) uint8; the image itself where there is only one.
    """
    count, height, width, channels = images.shape
    columns = math.isqrt(count - 1) + 1
    rows = -(-count // columns)
    if rows * columns != count:
        missing = np.zeros((rows * columns - count, height, width, channels), dtype=np.uint8)
        images = np.concatenate([images, missing])
    grid = images.reshape(rows, columns, height, width, channels)
    return grid.transpose(0, 2, 1, 3, 4).reshape(rows * height, columns * width, channels)


def enlarge(images: Pixels, scale: int) -> Pixels:
    """Repeat every pixel `scale` times in both directions of (…, H, W, C)."""
    if scale == 1:
        return images
    return images.repeat(scale, axis=-3).repeat(scale, axis=-2)
