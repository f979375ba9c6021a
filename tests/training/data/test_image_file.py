"""Image files of every kind: the pixels, or the cause why a file cannot be used."""

import os
import struct
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.support.image_folders import Pixels, noise
from training.data.image_file import MAX_PIXELS, REMEDIES, Cause, UnusableError, read_image
from training.data.named import DataError


def as_palette(pixels: Pixels) -> Image.Image:
    return Image.fromarray(pixels).convert("P")


def as_bits(pixels: Pixels) -> Image.Image:
    return Image.fromarray(pixels).convert("1")


def as_opaque(pixels: Pixels) -> Image.Image:
    return Image.fromarray(pixels).convert("LA")


def as_opaque_colour(pixels: Pixels) -> Image.Image:
    return Image.fromarray(pixels).convert("RGBA")


def png(*chunks: tuple[bytes, bytes], bits: int, kind: int, row: bytes) -> bytes:
    """A PNG of 28 equal rows, as Pillow would not write it; `chunks` follow the pixels."""
    header = struct.pack(">IIBBBBB", 28, 28, bits, kind, 0, 0, 0)
    pixels = zlib.compress((b"\0" + row) * 28)
    body = b""
    for name, content in ((b"IHDR", header), (b"IDAT", pixels), *chunks, (b"IEND", b"")):
        check = struct.pack(">I", zlib.crc32(name + content))
        body += struct.pack(">I", len(content)) + name + content + check
    return b"\x89PNG\r\n\x1a\n" + body


def cause_of(path: Path, size: int | None = None) -> Cause:
    with pytest.raises(UnusableError) as caught:
        read_image(path, size)
    return caught.value.cause


# Pixels


@pytest.mark.parametrize("convert", [as_palette, as_bits, as_opaque, as_opaque_colour])
def test_every_mode_of_8_bits_without_transparency_is_read(
    tmp_path: Path, convert: Callable[[Pixels], Image.Image]
) -> None:
    image = convert(noise(99))
    image.save(tmp_path / "image.png")
    read = read_image(tmp_path / "image.png", None)
    assert read.pixels.tobytes() == image.convert("RGB").tobytes()
    assert read.original == (28, 28)


@pytest.mark.parametrize(
    ("file_format", "mode", "options"),
    [
        ("WEBP", "RGB", {"lossless": True}),
        ("WEBP", "RGBA", {"lossless": True}),
        ("BMP", "RGB", {}),
        ("BMP", "1", {}),
        ("GIF", "L", {}),
        ("TIFF", "RGB", {}),
        ("TIFF", "L", {"compression": "tiff_lzw"}),
        ("TIFF", "CMYK", {}),
        ("PNG", "RGB", {}),
    ],
)
@pytest.mark.parametrize("name", ["image.png", "image.JPG", "image.tif", "image", "image.dat"])
def test_the_content_decides_the_format_and_not_the_name(
    tmp_path: Path, file_format: str, mode: str, options: dict[str, Any], name: str
) -> None:
    image = Image.fromarray(noise(1, channels=3)).convert(mode)
    image.save(tmp_path / name, file_format, **options)
    assert read_image(tmp_path / name, None).pixels.tobytes() == image.convert("RGB").tobytes()


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_a_jpeg_is_read_in_grey_in_colour_and_for_print(tmp_path: Path, mode: str) -> None:
    image = Image.new("RGB", (28, 28), (200, 200, 200)).convert(mode)
    image.save(tmp_path / "image.jpg")
    assert np.abs(read_image(tmp_path / "image.jpg", None).pixels.astype(int) - 200).max() <= 2


@pytest.mark.parametrize("file_format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_of_several_frames_is_read(tmp_path: Path, file_format: str) -> None:
    first, second = (Image.new("RGB", (28, 28), shade) for shade in ("white", "black"))
    first.save(tmp_path / "film", file_format, save_all=True, append_images=[second])
    assert read_image(tmp_path / "film", None).pixels.min() > 250


def test_a_bitmap_of_16_bits_a_pixel_has_fewer_than_8_a_channel(tmp_path: Path) -> None:
    header = struct.pack("<IiiHHIIiiII", 40, 28, 28, 1, 16, 3, 28 * 28 * 2, 0, 0, 0, 0)
    masks = struct.pack("<III", 0xF800, 0x07E0, 0x001F)
    body = header + masks + b"\xff\xff" * 28 * 28
    (tmp_path / "a.bmp").write_bytes(
        b"BM" + struct.pack("<IHHI", 14 + len(body), 0, 0, 14 + 52) + body
    )
    assert read_image(tmp_path / "a.bmp", None).pixels.min() == 255


def test_a_photograph_is_upright_and_has_the_size_that_is_seen(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    image = Image.new("L", (1600, 1200))
    image.paste(255, (0, 0, 1600, 600))
    image.save(tmp_path / "photo.jpg", exif=exif)
    pixels, original = read_image(tmp_path / "photo.jpg", 28)
    assert original == (1200, 1600)
    assert pixels[:, :12].max() < 5  # the lower half is at the left then
    assert pixels[:, 16:].min() > 250


@pytest.mark.parametrize("size", [(1600, 1200), (1201, 1999), (130, 128), (4100, 64), (28, 28)])
def test_a_jpeg_at_a_fraction_of_its_size_has_the_pixels_of_the_whole(
    tmp_path: Path, size: tuple[int, int]
) -> None:
    width, height = size
    x, y = np.linspace(0, 6, width), np.linspace(0, 4, height)
    waves = 128 + 60 * np.sin(x)[None] + 60 * np.cos(y)[:, None]
    Image.fromarray(waves.astype(np.uint8)).save(tmp_path / "a.jpg", quality=95)
    Image.open(tmp_path / "a.jpg").save(tmp_path / "a.png")
    reduced, whole = (read_image(tmp_path / name, 28) for name in ("a.jpg", "a.png"))
    assert reduced.original == whole.original == size
    assert np.abs(reduced.pixels.astype(int) - whole.pixels).max() <= 4
    again = read_image(tmp_path / "a.jpg", 28).pixels
    assert again.tobytes() == reduced.pixels.tobytes()


# Causes


@pytest.mark.parametrize("file_format", ["PNG", "WEBP", "TIFF"])
def test_a_single_transparent_pixel_makes_an_image_unusable(
    tmp_path: Path, file_format: str
) -> None:
    image = as_opaque_colour(noise(99))
    image.putpixel((3, 3), (1, 2, 3, 254))
    image.save(tmp_path / "image", file_format)
    assert cause_of(tmp_path / "image") == Cause.TRANSPARENT


@pytest.mark.parametrize("file_format", ["PNG", "GIF"])
def test_a_palette_with_a_transparent_colour_is_unusable(tmp_path: Path, file_format: str) -> None:
    Image.fromarray(noise(99)).quantize(8).save(tmp_path / "a", file_format, transparency=0)
    assert cause_of(tmp_path / "a") == Cause.TRANSPARENT


@pytest.mark.parametrize(("kind", "samples"), [(0, 1), (2, 3), (4, 2), (6, 4)])
def test_16_bits_are_unusable_in_every_colour(tmp_path: Path, kind: int, samples: int) -> None:
    path = tmp_path / "deep.png"
    path.write_bytes(png(bits=16, kind=kind, row=b"\xff" * 28 * 2 * samples))
    assert cause_of(path) == Cause.DEEP


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
def test_a_measurement_of_more_than_8_bits_is_unusable(tmp_path: Path, dtype: type) -> None:
    Image.fromarray(np.zeros((28, 28), dtype)).save(tmp_path / "deep.tif")
    assert cause_of(tmp_path / "deep.tif") == Cause.DEEP


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(png(bits=8, kind=3, row=bytes(28)), id="no palette"),
        pytest.param(png((b"iCCP", b"name\0"), bits=8, kind=0, row=bytes(28)), id="no profile"),
        pytest.param(b"GIF89a" + struct.pack("<HH", 28, 28) + bytes(20), id="no frame"),
    ],
)
def test_an_image_that_lacks_a_part_is_damaged(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "odd.png").write_bytes(content)
    assert cause_of(tmp_path / "odd.png") in (Cause.DAMAGED, Cause.NO_IMAGE)


def test_an_image_with_a_wrong_checksum_is_unusable(tmp_path: Path) -> None:
    content = bytearray(png(bits=8, kind=0, row=bytes(28)))
    content[content.index(b"IDAT") - 5] ^= 1  # of the header
    (tmp_path / "odd.png").write_bytes(content)
    assert cause_of(tmp_path / "odd.png") in (Cause.DAMAGED, Cause.NO_IMAGE)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".bmp", ".tiff"])
def test_an_image_that_is_cut_short_is_damaged(tmp_path: Path, suffix: str) -> None:
    path = (tmp_path / "cut").with_suffix(suffix)
    Image.fromarray(noise(99)).save(path)
    path.write_bytes(path.read_bytes()[:-300])
    assert cause_of(path) == Cause.DAMAGED


@pytest.mark.parametrize("content", [b"", b"not an image", b"\0\0\0\x20ftypheic" + bytes(40)])
def test_other_content_is_told_from_other_files_by_the_suffix(
    tmp_path: Path, content: bytes
) -> None:
    for name, cause in (("a.PNG", Cause.NO_IMAGE), ("a.heic", Cause.OTHER), ("a", Cause.OTHER)):
        (tmp_path / name).write_bytes(content)
        assert cause_of(tmp_path / name) == cause


def test_a_link_that_leads_nowhere_cannot_be_opened(tmp_path: Path) -> None:
    (tmp_path / "link.png").symlink_to(tmp_path / "lost.png")
    assert cause_of(tmp_path / "link.png") == Cause.UNREADABLE


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    assert cause_of(tmp_path / "pipe.png") == Cause.UNREADABLE


def test_a_folder_is_not_an_image(tmp_path: Path) -> None:
    assert cause_of(tmp_path) == Cause.NESTED


@pytest.mark.parametrize("side", [10_001, 30_000])
def test_the_size_in_a_header_is_enough_to_refuse_an_image(tmp_path: Path, side: int) -> None:
    assert side**2 > MAX_PIXELS
    path = tmp_path / "bomb.png"
    header = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    content = png(bits=8, kind=0, row=bytes(28))
    path.write_bytes(content[:12] + header + struct.pack(">I", zlib.crc32(header)) + content[33:])
    assert cause_of(path, 32) == Cause.LARGE


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits the memory of a process")
def test_an_image_larger_than_the_memory_is_named(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    Image.new("L", (9000, 9000)).save(tmp_path / "large.png")
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + 50_000_000, hard))
    try:
        with pytest.raises(DataError, match="its 9000x9000 pixels do not fit into memory"):
            read_image(tmp_path / "large.png", 32)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def test_every_cause_has_a_remedy() -> None:
    assert set(REMEDIES) == set(Cause)
