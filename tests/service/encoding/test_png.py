import io
import json

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from service.encoding.png import (
    contact_sheet,
    encode_contact_sheet,
    encode_png,
    enlarge,
    store_png,
)


def noise(*shape: int) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def decode(png: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(png))
    image.load()
    return image


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_a_png_decodes_to_the_pixels_it_was_made_of(channels: int, mode: str) -> None:
    pixels = noise(13, 29, channels)
    image = decode(encode_png(pixels, {}))
    assert image.mode == mode
    assert (np.asarray(image).reshape(pixels.shape) == pixels).all()


def test_a_png_carries_its_recipe() -> None:
    recipe = {"model": "m", "class": "Bär 熊", "seed": 2**64 - 1, "index": 0}
    image = decode(encode_png(noise(8, 8, 1), recipe))
    assert json.loads(image.info["Recipe"]) == recipe


def test_pixels_that_are_a_view_are_encoded_as_they_look() -> None:
    pixels = noise(16, 16, 3)
    assert (np.asarray(decode(encode_png(pixels[::2, ::-1], {}))) == pixels[::2, ::-1]).all()


@pytest.mark.parametrize(
    ("count", "rows", "columns"),
    [(1, 1, 1), (2, 1, 2), (3, 2, 2), (4, 2, 2), (5, 2, 3), (16, 4, 4)],
)
def test_a_sheet_has_the_rounded_up_root_of_its_images_as_columns(
    count: int, rows: int, columns: int
) -> None:
    images = noise(count, 5, 7, 3)
    sheet = contact_sheet(images)
    assert sheet.shape == (rows * 5, columns * 7, 3)
    for place in range(rows * columns):
        top, left = place // columns * 5, place % columns * 7
        cell = sheet[top : top + 5, left : left + 7]
        assert (cell == (images[place] if place < count else 0)).all()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("count", [1, 5, 16])
def test_a_sheet_is_the_same_file_however_it_is_made(count: int, channels: int) -> None:
    images, recipe = enlarge(noise(count, 5, 7, channels), 2), {"labels": [7] * count}
    assert encode_contact_sheet(images, recipe) == encode_png(contact_sheet(images), recipe)


@pytest.mark.parametrize("shape", [(28, 28, 1), (64, 64, 3), (512, 300, 3)])
def test_no_png_is_larger_than_its_stored_pixels(shape: tuple[int, int, int]) -> None:
    pixels = noise(*shape)
    png = encode_png(pixels, {})
    assert (np.asarray(decode(png)).reshape(shape) == pixels).all()
    assert len(png) <= len(store_png(pixels, "{}"))
    assert len(png) < pixels.size * 1.001 + pixels.shape[0] + 100
    flat = encode_png(np.zeros(shape, np.uint8), {})
    assert len(flat) < len(png) / 3


@pytest.mark.parametrize("size", [1, 255, 256, 257])
def test_a_stored_png_has_the_same_length_for_any_pixels(size: int) -> None:
    """Also around 65,535 bytes, the most of a block of deflate."""
    pixels = noise(255, size, 1)
    png = store_png(pixels, "{}")
    assert (np.asarray(decode(png)) == pixels[..., 0]).all()
    assert len(png) == len(store_png(np.zeros_like(pixels), "{}"))


def test_enlarging_repeats_whole_pixels() -> None:
    pixels = noise(4, 3, 1)
    large = enlarge(pixels, 3)
    assert large.shape == (12, 9, 1)
    assert (large[1::3, 2::3] == pixels).all()
    assert (enlarge(pixels, 1) == pixels).all()
