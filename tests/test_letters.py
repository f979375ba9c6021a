"""The data set of letters that the benchmarks render."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFont

from tests.support.letters import CLASSES, SIZE, draw, draw_letters, is_typical, write_letters


def default_font() -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(100)
    if not isinstance(font, ImageFont.FreeTypeFont):
        pytest.skip("this build of Pillow has no FreeType")
    return font


@pytest.fixture
def fonts(tmp_path: Path) -> Path:
    """A folder with the font of Pillow."""
    folder = tmp_path / "fonts"
    folder.mkdir()
    (folder / "default.ttf").write_bytes(default_font().font_bytes)
    return folder


def test_every_letter_is_a_class_of_white_on_black(fonts: Path, tmp_path: Path) -> None:
    assert write_letters(tmp_path / "out", fonts) == (1, 26)

    assert sorted(folder.name for folder in (tmp_path / "out").iterdir()) == list(CLASSES)
    for path in (tmp_path / "out").glob("*/*"):
        with Image.open(path) as image:
            assert (image.size, image.mode) == ((SIZE, SIZE), "L")
            assert image.getpixel((0, 0)) == 0
            assert np.asarray(image).max() > 200


def test_a_copy_of_a_font_is_left_out(fonts: Path, tmp_path: Path) -> None:
    (fonts / "copy.ttf").write_bytes((fonts / "default.ttf").read_bytes())

    assert write_letters(tmp_path / "out", fonts) == (1, 26)


def test_a_letter_fills_its_image_and_is_centred() -> None:
    image = draw(default_font(), "H")

    assert image is not None
    left, top, right, bottom = Image.fromarray(image).getbbox()  # type: ignore[misc]
    assert (top, bottom) == (3, SIZE - 3)
    assert abs(left - (SIZE - right)) <= 1


def test_a_blank_character_is_not_drawn() -> None:
    assert draw(default_font(), " ") is None


def test_letters_in_another_order_are_not_typical() -> None:
    letters = draw_letters(default_font())

    assert letters is not None
    assert is_typical(letters, letters.astype(np.float64))
    assert not is_typical(np.roll(letters, 1, axis=0), letters.astype(np.float64))


def test_a_folder_without_fonts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no font with the letters A to Z"):
        write_letters(tmp_path / "out", tmp_path)


def test_a_folder_with_other_files_is_refused(fonts: Path) -> None:
    with pytest.raises(ValueError, match="is not empty; name a new folder"):
        write_letters(fonts, fonts)
