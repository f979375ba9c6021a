"""Grids of images and the page that shows them."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support import tiny_training as tiny
from training.images import class_grid, grid, save_png
from training.loading import load_artifact
from training.networks import build_generator
from training.quality.report import render_page, write_report
from training.sampling import to_pixels

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("count", "columns", "rows"), [(6, 3, 2), (5, 3, 2), (1, 4, 1), (4, 1, 4)])
def test_a_grid_holds_its_images_row_by_row_and_black_after_the_last(
    channels: int, count: int, columns: int, rows: int
) -> None:
    rng = np.random.default_rng(0)
    pixels = torch.from_numpy(rng.integers(1, 256, (count, channels, 4, 5), dtype=np.uint8))

    sheet = grid(pixels, columns)

    assert sheet.shape == (rows * 4, columns * 5, channels)
    for place in range(rows * columns):
        top, left = place // columns * 4, place % columns * 5
        cell = sheet[top : top + 4, left : left + 5].permute(2, 0, 1)
        assert torch.equal(cell, pixels[place]) if place < count else not cell.any()


def test_a_class_grid_has_a_row_per_class_and_a_latent_per_column() -> None:
    generator = tiny.state().ema.eval()
    sheet = class_grid(generator, columns=3, seed=4)

    latents = torch.randn((3, 9), generator=torch.Generator().manual_seed(4))
    for row, column in np.ndindex(2, 3):
        with torch.no_grad():
            image = to_pixels(generator(latents[column : column + 1], torch.tensor([row])))[0, 0]
        cell = sheet[8 * row : 8 * row + 8, 8 * column : 8 * column + 8, 0]
        assert (cell.int() - image.int()).abs().max() <= 1


def test_of_many_classes_the_first_twenty_are_shown() -> None:
    generator = build_generator(replace(tiny.NETWORK, num_classes=50)).eval()
    assert class_grid(generator, columns=2).shape == (20 * 8, 2 * 8, 1)


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
@pytest.mark.parametrize("scale", [1, 3])
def test_a_picture_has_whole_enlarged_pixels(
    tmp_path: Path, channels: int, mode: str, scale: int
) -> None:
    pixels = torch.arange(2 * 5 * channels, dtype=torch.uint8).view(2, 5, channels)
    save_png(tmp_path / "a.png", pixels, scale=scale)
    with Image.open(tmp_path / "a.png") as image:
        assert (image.mode, image.size) == (mode, (5 * scale, 2 * scale))
        shown = np.asarray(image).reshape(2 * scale, 5 * scale, channels)
    for y, x in np.ndindex(2 * scale, 5 * scale):
        assert shown[y, x].tolist() == pixels[y // scale, x // scale].tolist()


def test_a_page_has_a_section_and_a_picture_per_artifact(tmp_path: Path) -> None:
    trained = {"preset": "mlp", "dataset": "tiny", "elapsed_s": 119.0, "device": "cpu"}
    tiny.artifact_file(tmp_path / "b.safetensors", training=trained, images_seen=1234567)
    tiny.artifact_file(tmp_path / "a.safetensors")

    write_report(tmp_path)

    page = (tmp_path / "README.md").read_text()
    artifacts = [load_artifact(tmp_path / name) for name in ("a.safetensors", "b.safetensors")]
    assert page == render_page(artifacts)
    assert page.index("## a\n") < page.index("## b\n")
    for said in (
        "1,234,567 real images seen of",
        "in 2 minutes on",
        "2 classes, 8x8x1",
        "preset `mlp`",
    ):
        assert said in page
    assert page.count("Not certified.") == 2
    for name in ("a.png", "b.png"):
        assert f"({name})" in page
        with Image.open(tmp_path / name) as picture:
            assert picture.size == (16 * 8 * 2, 2 * 8 * 2)


def test_an_artifact_that_records_no_training_is_not_said_to_have_had_any(tmp_path: Path) -> None:
    page = render_page([load_artifact(tiny.artifact_file(tmp_path / "a.safetensors"))])
    assert "None" not in page
