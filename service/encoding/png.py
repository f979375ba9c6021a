"""PNG encoding of single images and contact sheets.

Hand-written, because the bytes are part of the byte contract, and because an imaging library takes
several times as long for a small grey image (`tests/benchmarks`). The format is the PNG
specification, third edition (https://www.w3.org/TR/png-3/). ISA-L compresses in at most half the
time of zlib's fastest level.
"""

import math
import struct
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
from isal import isal_zlib
from numpy.typing import NDArray
from pydantic import TypeAdapter

Pixels = NDArray[np.uint8]

ENCODER_VERSION = 2  # of the bytes that this module makes
RECIPE_KEYWORD = "Recipe"
_KEYWORD = RECIPE_KEYWORD.encode()
SIGNATURE = b"\x89PNG\r\n\x1a\n"
_COLOUR_TYPES = {1: 0, 3: 2}  # grey, RGB
# Level 1 makes files a sixth smaller, but takes up to twice as long, and six times as long for a
# single small image, where clearing its tables dominates.
_LEVEL = 0
_STORED_BLOCK_BYTES = 0xFFFF  # most of a stored block of deflate
_RECIPE: TypeAdapter[Any] = TypeAdapter(Any)


def encode_png(pixels: Pixels, recipe: Mapping[str, object]) -> bytes:
    """Encode one image.

    Args:
        pixels: (H, W, C) uint8, C = 1 (grey) or 3 (RGB).
        recipe: everything that determines the image; written as JSON into the text chunk `Recipe`.
    """
    return _compress(_filter(pixels), pixels.shape[2], recipe)


def encode_contact_sheet(images: Pixels, recipe: Mapping[str, object]) -> bytes:
    """Encode many images as one PNG, laid out as by `contact_sheet`.

    Args:
        images: (N, H, W, C) uint8, C = 1 (grey) or 3 (RGB).
        recipe: as of `encode_png`.
    """
    return _compress(_lay_out(images), images.shape[3], recipe)


def store_png(pixels: Pixels, recipe: str) -> bytes:
    """Encode one image without compression: the length depends on shape and recipe length alone.

    Args:
        pixels: (H, W, C) uint8, C = 1 (grey) or 3 (RGB).
        recipe: as of `encode_png`, in JSON.
    """
    data = _store(_filter(pixels))
    return _join(_head(*pixels.shape), recipe.encode("ascii"), data)


def _filter(pixels: Pixels) -> Pixels:
    """Return the rows (H, 1 + W * C) of an image, each after its filter type 0.

    `_lay_out` returns the same for one image, in twice the time.
    """
    height, width, channels = pixels.shape
    rows = np.zeros((height, 1 + width * channels), dtype=np.uint8)
    rows[:, 1:] = pixels.reshape(height, -1)
    return rows


def _lay_out(images: Pixels) -> Pixels:
    """Return the rows of a contact sheet as `_filter` does, copying the images only once."""
    count, height, width, channels = images.shape
    columns = math.isqrt(count - 1) + 1
    lines = np.zeros((-(-count // columns), height, 1 + columns * width * channels), dtype=np.uint8)
    cells = lines[:, :, 1:].reshape(len(lines), height, columns, -1)  # of the same memory
    whole, last = divmod(count, columns)
    rows = images.reshape(count, height, -1)
    full = rows[: whole * columns].reshape(whole, columns, height, -1)
    cells[:whole] = full.swapaxes(1, 2)
    if last:
        cells[whole, :, :last] = rows[whole * columns :].swapaxes(0, 1)
    return lines.reshape(-1, lines.shape[2])


def _compress(lines: Pixels, channels: int, recipe: Mapping[str, object]) -> bytes:
    height, width = lines.shape[0], (lines.shape[1] - 1) // channels
    # In ASCII, so that a class name in any script fits the Latin-1 of the chunk.
    text = _RECIPE.dump_json(recipe, ensure_ascii=True)
    data = isal_zlib.compress(lines, _LEVEL)
    if len(data) > _stored_bytes(lines.size):  # noise, which grows by a fifth
        data = _store(lines)
    return _join(_head(height, width, channels), text, data)


def _store(lines: Pixels) -> bytes:
    """Return a zlib stream of stored blocks (RFC 1950, RFC 1951)."""
    data = lines.reshape(-1).data
    pieces: list[bytes | memoryview] = [b"\x78\x01"]
    for begin in range(0, len(data), _STORED_BLOCK_BYTES):
        block = data[begin : begin + _STORED_BLOCK_BYTES]
        last = begin + len(block) == len(data)
        pieces += [struct.pack("<?HH", last, len(block), len(block) ^ 0xFFFF), block]
    pieces.append(isal_zlib.adler32(data).to_bytes(4))
    return b"".join(pieces)


def _stored_bytes(size: int) -> int:
    """Return the length of what `_store` makes of `size` bytes."""
    return size + 5 * -(-size // _STORED_BLOCK_BYTES) + 6


def _join(head: bytes, recipe: bytes, compressed: bytes) -> bytes:
    text = _chunk(b"tEXt", b"%b\0%b" % (_KEYWORD, recipe))
    return b"".join((head, text, _chunk(b"IDAT", compressed), _TAIL))


def _chunk(kind: bytes, data: bytes) -> bytes:
    checksum = isal_zlib.crc32(data, isal_zlib.crc32(kind))
    return b"".join((len(data).to_bytes(4), kind, data, checksum.to_bytes(4)))


_TAIL = _chunk(b"IEND", b"")


@lru_cache(maxsize=256)
def _head(height: int, width: int, channels: int) -> bytes:
    """Return the signature and header chunk, which all images of a shape share."""
    header = struct.pack(">IIBBBBB", width, height, 8, _COLOUR_TYPES[channels], 0, 0, 0)
    return SIGNATURE + _chunk(b"IHDR", header)


def contact_sheet(images: Pixels) -> Pixels:
    """Arrange many images as one: ceil(sqrt(N)) columns, row by row, black after the last image.

    Args:
        images: (N, H, W, C) uint8.

    Returns:
        (rows * H, columns * W, C) uint8; a single image as it is.
    """
    lines = _lay_out(images)[:, 1:]
    return lines.reshape(len(lines), -1, images.shape[3])


def enlarge(images: Pixels, scale: int) -> Pixels:
    """Repeat every pixel `scale` times in both directions of (…, H, W, C)."""
    if scale == 1:
        return images
    return images.repeat(scale, axis=-3).repeat(scale, axis=-2)
