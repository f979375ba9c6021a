"""Sheets of all classes with their names."""

from dataclasses import replace
from typing import Literal

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import ImageFont

from tests.support import tiny_training as tiny
from training.images import class_grid
from training.networks import Generator, build_generator
from training.sheet import LINE, MAX_PIXELS, class_sheet, drawable

pytestmark = pytest.mark.usefixtures("one_thread")

FONT = ImageFont.load_default(12)


def generator_of(classes: int, size: int = 8, channels: Literal[1, 3] = 1) -> Generator:
    network = replace(tiny.NETWORK, num_classes=classes, image_size=size, channels=channels)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build_generator(network).eval()


def sheet_of(generator: Generator, *names: str) -> NDArray[np.uint8]:
    shown: NDArray[np.uint8] = class_sheet(generator, names).numpy()
    return shown


def numbered(classes: int) -> tuple[str, ...]:
    return tuple(f"class {i}" for i in range(classes))


@pytest.mark.parametrize("channels", [1, 3])
def test_a_row_has_the_images_of_its_class_twice_as_large(channels: Literal[1, 3]) -> None:
    generator = generator_of(2, channels=channels)
    sheet = sheet_of(generator, "left", "right")
    images = class_grid(generator, columns=10).numpy().repeat(2, axis=0).repeat(2, axis=1)
    assert np.array_equal(sheet[:, -160:], images)


def test_a_name_stands_beside_its_row() -> None:
    generator = generator_of(3)
    plain, renamed = (sheet_of(generator, "aaaa", name, "bbbb") for name in ("aaaa", "abab"))
    changed = np.flatnonzero((plain[:, :-160] != renamed[:, :-160]).any(axis=(1, 2)))
    assert set(changed) <= set(range(16, 32))
    assert plain[:16, :-160].any()
    assert np.array_equal(plain[:, -160:], renamed[:, -160:])


@pytest.mark.parametrize("classes", [26, 100, 300])
def test_all_classes_are_shown_in_a_sheet_that_is_about_square(classes: int) -> None:
    generator = generator_of(classes, size=32)
    sheet = sheet_of(generator, *numbered(classes))
    height, width, _ = sheet.shape
    assert 0.5 < height / width < 2
    renamed = (*numbered(classes - 1), "another")  # the last one is there too
    assert (sheet_of(generator, *renamed) != sheet).any()


def test_images_of_thousands_of_classes_are_smaller() -> None:
    sheet = sheet_of(generator_of(3000, size=64, channels=3), *numbered(3000))
    assert MAX_PIXELS / 4 < sheet.shape[0] * sheet.shape[1] < 1.2 * MAX_PIXELS


def test_a_name_fits_in_a_row_of_small_images() -> None:
    assert sheet_of(generator_of(2, size=6), "left", "right").shape[0] == 2 * LINE


def test_a_long_name_takes_no_more_than_its_column() -> None:
    generator = generator_of(2)
    long, longer = (sheet_of(generator, "short", "long " * count) for count in (40, 80))
    assert long.shape == longer.shape
    assert long.shape[1] < 2 * 160


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("T-shirt/top", "T-shirt/top"),
        ("caf\N{LATIN SMALL LETTER E WITH ACUTE}", "7 cafe"),
        ("Bär 熊 (braun)", "7 Bar (braun)"),
        ("犬", "7"),
        ("\N{GREEK SMALL LETTER LAMDA}-calculus", "7 -calculus"),
    ],
)
def test_letters_that_the_font_lacks_are_left_out_after_the_index(name: str, shown: str) -> None:
    assert isinstance(FONT, ImageFont.FreeTypeFont)
    assert drawable(name, 7, FONT) == shown
