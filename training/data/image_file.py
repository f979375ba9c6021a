"""An image file to pixels, or the cause why it cannot be used.

The content of a file decides its format, not its name. Of several frames the first is read.
"""

import warnings
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile

from training.data.layout import SUFFIXES
from training.data.named import DataError

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
MIN_SIZE, MAX_SIZE = 28, 64
MAX_PIXELS = 100_000_000  # per file: limits the memory that a malicious file can take

Pixels = npt.NDArray[np.uint8]
_UNDECODED = np.zeros((0, 0, 3), np.uint8)


class Cause(StrEnum):
    """A cause why a file cannot be used."""

    TRANSPARENT = "transparent pixels"
    DEEP = "more than 8 bits a channel"
    LARGE = "too many pixels"
    DAMAGED = "damaged or cut short"
    NO_IMAGE = "not an image, despite the suffix"
    UNREADABLE = "cannot be opened"
    NESTED = "a folder inside a class"
    OTHER = "another kind of file"


REMEDIES = {
    Cause.TRANSPARENT: "put a background behind them: "
    "mogrify -path NEW_FOLDER -background white -alpha remove -alpha off *.png",
    Cause.DEEP: "convert them to 8 bits: mogrify -path NEW_FOLDER -depth 8 *.png",
    Cause.LARGE: f"shrink them to {MAX_PIXELS:,} pixels or fewer: "
    "mogrify -path NEW_FOLDER -resize 50% *.png",
    Cause.DAMAGED: "copy them again from their source",
    Cause.NO_IMAGE: f"convert them to PNG or JPEG; {', '.join(FORMATS)} are read",
    Cause.UNREADABLE: "allow this user to read them, and repair links that lead nowhere",
    Cause.NESTED: "move the images into the folder of their class",
    Cause.OTHER: "convert images among them: mogrify -path NEW_FOLDER -format png *.heic; "
    f"{', '.join(FORMATS)} are read",
}


class UnusableError(Exception):
    """A file that cannot be used as an image."""

    def __init__(self, cause: Cause) -> None:
        super().__init__(str(cause))
        self.cause = cause


class Decoded(NamedTuple):
    """The pixels of a file and its size."""

    pixels: Pixels  # (H, W, 3); (0, 0, 3) for an image that is larger than allowed
    original: tuple[int, int]  # width and height in the file


def read_image(path: Path, size: int | None) -> Decoded:
    """Decode an image to RGB, upright.

    Without a size, an image of more than `MAX_SIZE` pixels a side is not decoded: its data set is
    refused by the sizes in the headers. With one, the image is cropped to its central square and
    resized. A JPEG is decoded at 1/2, 1/4 or 1/8 of its size if that leaves at least twice `size`.

    Raises:
        DataError: the memory does not suffice.
        UnusableError: the file cannot be used.
    """
    width = height = 0
    try:
        _check_kind(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # real errors are raised
            with Image.open(path, formats=FORMATS) as image:
                width, height = image.size
                _check_header(image)
                if size is None and max(image.size) > MAX_SIZE:
                    return Decoded(_UNDECODED, image.size)
                return _decode(image, size)
    except UnusableError:
        raise
    except MemoryError as error:
        raise DataError(
            f"{path}: its {width}x{height} pixels do not fit into memory; free some, or shrink the "
            "image"
        ) from error
    except Image.DecompressionBombError as error:
        raise UnusableError(Cause.LARGE) from error
    except UnidentifiedImageError as error:
        known = path.name.lower().endswith(SUFFIXES)
        raise UnusableError(Cause.NO_IMAGE if known else Cause.OTHER) from error
    except Exception as error:  # decoders raise exceptions of many types for damaged files
        missing = isinstance(error, OSError) and error.errno is not None
        raise UnusableError(Cause.UNREADABLE if missing else Cause.DAMAGED) from error


def _check_kind(path: Path) -> None:
    if not path.is_file():  # reading a pipe or a device might never end
        raise UnusableError(Cause.NESTED if path.is_dir() else Cause.UNREADABLE)


def _check_header(image: Image.Image) -> None:
    if image.width * image.height > MAX_PIXELS:
        raise UnusableError(Cause.LARGE)
    # The mode of 16-bit colour is RGB: Pillow would drop 8 bits silently.
    is_deep = isinstance(image, PngImageFile | TiffImageFile) and any(
        ";16" in str(tile.args) for tile in image.tile
    )
    if is_deep or image.mode[0] in "IF":
        raise UnusableError(Cause.DEEP)


def _decode(image: Image.Image, size: int | None) -> Decoded:
    stored = image.size
    if size is not None and isinstance(image, JpegImageFile):
        width, height = (-(-2 * size * side // min(stored)) for side in stored)
        image.draft(None, (width, height))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if image.getchannel("A").getextrema() != (255, 255):
            raise UnusableError(Cause.TRANSPARENT)
    upright = ImageOps.exif_transpose(image.convert("RGB"))  # cameras store the orientation
    turned = image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)  # by 90 degrees
    original = stored[::-1] if turned else stored
    if size is not None:
        upright = ImageOps.fit(upright, (size, size), Image.Resampling.LANCZOS)
    return Decoded(np.asarray(upright), original)
