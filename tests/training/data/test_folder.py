"""A folder of images: what is read, what is held out, what is left out, and what is refused."""

import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image

from training.data import folder as module
from training.data.folder import Folder, is_folder, read_folder
from training.data.named import DataError

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


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    """Twenty cats and thirty dogs."""
    fill(tmp_path / "pets" / "cat", 20, seed=1)
    fill(tmp_path / "pets" / "dog", 30, seed=2)
    return tmp_path / "pets"


def rows(images: torch.Tensor) -> set[bytes]:
    return {image.numpy().tobytes() for image in images}


# What is read


def test_the_sub_folders_are_the_classes(pets: Path) -> None:
    train, test = read_folder(pets).train, read_folder(pets).test
    assert (train.name, train.class_names) == ("pets", ("cat", "dog"))
    assert test.class_names == train.class_names
    assert (train.images.dtype, train.labels.dtype) == (torch.uint8, torch.int64)
    assert train.images.shape == (18 + 27, 1, 28, 28)
    assert train.labels.bincount().tolist() == [18, 27]
    assert test.labels.bincount().tolist() == [2, 3]


def test_the_pixels_are_those_of_the_files(pets: Path) -> None:
    found = read_folder(pets)
    both = rows(found.train.images[found.train.labels == 1])
    both |= rows(found.test.images[found.test.labels == 1])
    assert both == {noise(2000 + i).tobytes() for i in range(30)}


def test_a_folder_of_train_and_test_is_taken_as_it_is(tmp_path: Path) -> None:
    for split, count in (("train", 12), ("test", 5)):
        for seed, name in enumerate(("a", "b")):
            fill(tmp_path / split / name, count, seed=10 * count + seed)
    found = read_folder(tmp_path)
    assert found.train.labels.tolist() == [0] * 12 + [1] * 12
    assert found.test.labels.tolist() == [0] * 5 + [1] * 5


def test_a_class_may_have_no_test_images(tmp_path: Path) -> None:
    for split, name, count in (("train", "a", 3), ("train", "b", 3), ("test", "b", 2)):
        fill(tmp_path / split / name, count, seed=10 * len(split) + ord(name))
    found = read_folder(tmp_path)
    assert found.report.counts == {"a": (3, 0), "b": (3, 2)}
    assert found.test.labels.tolist() == [1, 1]


def test_a_class_called_train_is_a_class(tmp_path: Path) -> None:
    for seed, name in enumerate(("train", "car")):
        fill(tmp_path / name, 4, seed=seed)
    assert read_folder(tmp_path).train.class_names == ("car", "train")


def test_a_train_folder_alone_has_a_tenth_held_out(tmp_path: Path) -> None:
    for seed, name in enumerate(("a", "b")):
        fill(tmp_path / "train" / name, 20, seed=seed)
    found = read_folder(tmp_path)
    assert (len(found.train.labels), len(found.test.labels)) == (36, 4)


def test_numbers_are_in_the_order_of_their_values(tmp_path: Path) -> None:
    for number in (10, 9, 1, 0, 2):
        fill(tmp_path / str(number), 2, seed=number)
    assert read_folder(tmp_path).train.class_names == ("0", "1", "2", "9", "10")


def test_colour_in_one_image_makes_all_of_them_colour(pets: Path) -> None:
    assert read_folder(pets).train.channels == 1
    Image.fromarray(noise(7, channels=3)).save(pets / "cat" / "red.png")
    found = read_folder(pets)
    assert found.train.channels == found.test.channels == 3
    grey = found.train.images[found.train.labels == 1]
    assert torch.equal(grey[:, 0], grey[:, 2])


def test_channels_can_be_asked_for(pets: Path) -> None:
    assert read_folder(pets, channels=3).train.channels == 3
    Image.fromarray(noise(7, channels=3)).save(pets / "cat" / "red.png")
    assert read_folder(pets, channels=1).train.channels == 1


def as_palette(pixels: Pixels) -> Image.Image:
    return Image.fromarray(pixels).convert("P")


def as_bits(pixels: Pixels) -> Image.Image:
    return Image.fromarray(pixels).convert("1")


def as_opaque(pixels: Pixels) -> Image.Image:
    return Image.fromarray(pixels).convert("LA")


def as_opaque_colour(pixels: Pixels) -> Image.Image:
    return Image.fromarray(pixels).convert("RGBA")


def as_transparent(pixels: Pixels) -> Image.Image:
    image = Image.fromarray(pixels).convert("RGBA")
    image.putpixel((3, 3), (1, 2, 3, 254))
    return image


def as_16_bits(pixels: Pixels) -> Image.Image:
    return Image.fromarray(pixels.astype(np.uint16) * 200)


def png(*chunks: tuple[bytes, bytes], bits: int, kind: int, row: bytes) -> bytes:
    """A PNG of 28 equal rows, as Pillow would not write it; `chunks` follow the pixels."""
    header = struct.pack(">IIBBBBB", 28, 28, bits, kind, 0, 0, 0)
    pixels = zlib.compress((b"\0" + row) * 28)
    body = b""
    for name, content in ((b"IHDR", header), (b"IDAT", pixels), *chunks, (b"IEND", b"")):
        check = struct.pack(">I", zlib.crc32(name + content))
        body += struct.pack(">I", len(content)) + name + content + check
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize("convert", [as_palette, as_bits, as_opaque, as_opaque_colour])
def test_every_mode_of_8_bits_without_transparency_is_read(
    pets: Path, convert: Callable[[Pixels], Image.Image]
) -> None:
    convert(noise(99)).save(pets / "cat" / "extra.png")
    report = read_folder(pets).report
    assert report.unusable == {}
    assert sum(report.counts["cat"]) == 21


def test_jpeg_is_read_by_both_of_its_names_in_whatever_case(pets: Path) -> None:
    for i, name in enumerate(("a.jpg", "b.jpeg", "c.JPG")):
        Image.fromarray(noise(90 + i)).save(pets / "cat" / name, "JPEG")
    assert sum(read_folder(pets).report.counts["cat"]) == 23
    assert read_folder(pets).train.channels == 1
    Image.fromarray(noise(95, channels=3)).save(pets / "cat" / "d.jpg")
    assert read_folder(pets).train.channels == 3


def test_an_image_is_the_same_in_whatever_file(pets: Path) -> None:
    Image.fromarray(noise(1000)).convert("RGBA").save(pets / "cat" / "again.png")
    assert len(read_folder(pets).report.duplicates) == 1


def test_a_photograph_is_turned_the_way_it_was_taken(pets: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    pixels = noise(99)
    Image.fromarray(pixels).save(pets / "cat" / "turned.png", exif=exif)
    found = read_folder(pets)
    both = rows(found.train.images) | rows(found.test.images)
    assert np.ascontiguousarray(pixels[::-1, ::-1]).tobytes() in both


def test_images_are_cropped_and_resized_on_request(tmp_path: Path) -> None:
    for seed, name in enumerate(("a", "b")):
        fill(tmp_path / name, 3, seed=seed, size=64)
    wide = np.zeros((40, 80, 3), np.uint8)
    wide[:, 20:60] = 200  # the middle square is all bright
    Image.fromarray(wide).save(tmp_path / "a" / "wide.png")

    found = read_folder(tmp_path, size=32)

    assert found.train.image_size == found.test.image_size == 32
    images = torch.cat([found.train.images, found.test.images])
    # At the edge a filter sees a little of what was cut off.
    assert any(bool((image[:, 4:-4, 4:-4] == 200).all()) for image in images)
    assert "resized from 64x64 (6), 80x40 (1)" in found.report.render()


# What is held out


def test_what_is_held_out_depends_on_the_pixels_alone(pets: Path, tmp_path: Path) -> None:
    before = read_folder(pets)
    for i, path in enumerate(sorted((pets / "dog").iterdir(), reverse=True)):
        path.rename(path.with_name(f"renamed-{i}.png"))
    moved = tmp_path / "elsewhere" / "pets"
    shutil.move(pets, moved)

    after = read_folder(moved)

    assert after.test.digest == before.test.digest
    assert after.train.digest == before.train.digest
    assert torch.equal(after.test.images, before.test.images)


def test_no_image_is_both_trained_on_and_held_out(pets: Path) -> None:
    found = read_folder(pets)
    train, test = rows(found.train.images), rows(found.test.images)
    assert not train & test
    assert len(train | test) == 50


def test_a_small_class_has_one_image_held_out(tmp_path: Path) -> None:
    for seed, name in enumerate(("a", "b")):
        fill(tmp_path / name, 2, seed=seed)
    assert read_folder(tmp_path).report.counts == {"a": (1, 1), "b": (1, 1)}


def change_a_pixel(pets: Path) -> None:
    pixels = noise(1000)
    pixels[0, 0] ^= 1
    Image.fromarray(pixels).save(pets / "cat" / "000.png")


def change_a_label(pets: Path) -> None:
    shutil.move(pets / "cat" / "000.png", pets / "dog" / "other.png")


def change_a_name(pets: Path) -> None:
    (pets / "cat").rename(pets / "car")


@pytest.mark.parametrize("change", [change_a_pixel, change_a_label, change_a_name])
def test_the_digest_tells_other_data(pets: Path, change: Callable[[Path], None]) -> None:
    def digests(found: Folder) -> tuple[str, str]:
        return found.train.digest, found.test.digest

    before = digests(read_folder(pets))
    change(pets)
    assert digests(read_folder(pets)) != before


# What is left out


@pytest.mark.parametrize(
    ("convert", "cause"),
    [(as_transparent, "transparent"), (as_16_bits, "more than 8 bits")],
)
def test_an_image_of_another_kind_is_left_out_with_its_cause(
    pets: Path, convert: Callable[[Pixels], Image.Image], cause: str
) -> None:
    path = pets / "cat" / "odd.png"
    convert(noise(99)).save(path)
    report = read_folder(pets).report
    assert list(report.unusable) == [path]
    assert cause in report.unusable[path]
    assert "1 unusable: cat/odd.png (" in report.render()


@pytest.mark.parametrize(("kind", "samples"), [(0, 1), (2, 3), (4, 2), (6, 4)])
def test_16_bits_are_left_out_whatever_the_colours(pets: Path, kind: int, samples: int) -> None:
    path = pets / "cat" / "deep.png"
    path.write_bytes(png(bits=16, kind=kind, row=b"\xff" * 28 * 2 * samples))
    assert read_folder(pets).report.unusable == {path: "more than 8 bits a channel"}


def test_a_palette_with_a_transparent_colour_is_left_out(pets: Path) -> None:
    path = pets / "cat" / "odd.png"
    Image.fromarray(noise(99)).quantize(8).save(path, transparency=0)
    assert read_folder(pets).report.unusable == {path: "has transparent pixels"}


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(png(bits=8, kind=3, row=bytes(28)), id="no palette"),
        pytest.param(png((b"iCCP", b"name\0"), bits=8, kind=0, row=bytes(28)), id="no profile"),
    ],
)
def test_an_image_that_lacks_a_part_is_left_out(pets: Path, content: bytes) -> None:
    path = pets / "cat" / "odd.png"
    path.write_bytes(content)
    assert read_folder(pets).report.unusable == {path: "is corrupt"}


def test_an_image_with_a_wrong_checksum_is_left_out(pets: Path) -> None:
    path = pets / "cat" / "odd.png"
    content = bytearray(png(bits=8, kind=0, row=bytes(28)))
    content[content.index(b"IDAT") - 5] ^= 1  # of the header
    path.write_bytes(content)
    assert list(read_folder(pets).report.unusable) == [path]


def test_a_link_that_leads_nowhere_is_left_out(pets: Path) -> None:
    (pets / "cat" / "link.png").symlink_to(pets / "gone.png")
    assert "No such file" in read_folder(pets).report.unusable[pets / "cat" / "link.png"]


@pytest.mark.parametrize("content", [b"", b"not an image", b"GIF89a" + bytes(40)])
def test_a_file_that_is_no_image_is_left_out_with_its_cause(pets: Path, content: bytes) -> None:
    path = pets / "cat" / "broken.png"
    path.write_bytes(content)
    assert "cannot identify image file" in read_folder(pets).report.unusable[path]


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_an_image_that_is_cut_short_is_left_out(pets: Path, suffix: str) -> None:
    path = (pets / "cat" / "cut").with_suffix(suffix)
    Image.fromarray(noise(99)).save(path)
    path.write_bytes(path.read_bytes()[:-300])
    assert list(read_folder(pets).report.unusable) == [path]


def test_an_enormous_image_is_left_out_before_it_is_decoded(
    pets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_PIXELS", 28 * 28)
    Image.new("L", (400, 28)).save(pets / "cat" / "bomb.png")
    decoded: list[tuple[int, int]] = []
    original = module._decode

    def watched(path: Path, image: Image.Image, size: int | None) -> module._File:
        decoded.append(image.size)
        return original(path, image, size)

    monkeypatch.setattr(module, "_decode", watched)
    report = read_folder(pets).report
    assert report.unusable[pets / "cat" / "bomb.png"] == "400x28 pixels are too many"
    assert set(decoded) == {(28, 28)}


@pytest.mark.parametrize(("side", "cause"), [(10_001, "too many"), (30_000, "exceeds limit")])
def test_the_size_in_a_header_is_enough_to_refuse_an_image(
    pets: Path, side: int, cause: str
) -> None:
    path = pets / "cat" / "bomb.png"
    header = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    content = png(bits=8, kind=0, row=bytes(28))
    path.write_bytes(content[:12] + header + struct.pack(">I", zlib.crc32(header)) + content[33:])
    assert cause in read_folder(pets).report.unusable[path]


def test_files_that_are_no_images_by_name_are_ignored_and_counted(pets: Path) -> None:
    (pets / "cat" / "notes.txt").write_text("hello")
    (pets / "cat" / "sub").mkdir()
    (pets / "dog" / ".DS_Store").write_text("hidden")
    (pets / "README").write_text("beside the classes")
    (pets / ".cache").mkdir()
    report = read_folder(pets).report
    assert set(report.counts) == {"cat", "dog"}
    assert report.ignored == 2
    assert "2 other files ignored" in report.render()


def test_an_image_is_taken_once(pets: Path) -> None:
    shutil.copy(pets / "cat" / "000.png", pets / "cat" / "zzz.png")
    report = read_folder(pets).report
    assert len(report.duplicates) == 1
    assert sum(report.counts["cat"]) == 20
    assert "1 left out, the same as another of its class: cat/" in report.render()


def test_an_image_of_two_classes_is_taken_for_neither(pets: Path) -> None:
    shutil.copy(pets / "cat" / "000.png", pets / "dog" / "zzz.png")
    report = read_folder(pets).report
    assert set(report.ambiguous) == {pets / "cat" / "000.png", pets / "dog" / "zzz.png"}
    assert (sum(report.counts["cat"]), sum(report.counts["dog"])) == (19, 30)


def test_a_test_image_that_is_trained_on_is_not_measured_with(tmp_path: Path) -> None:
    for split, count in (("train", 6), ("test", 4)):
        for seed, name in enumerate(("a", "b")):
            fill(tmp_path / split / name, count, seed=10 * count + seed)
    shutil.copy(tmp_path / "train" / "a" / "000.png", tmp_path / "test" / "b" / "leak.png")
    found = read_folder(tmp_path)
    assert found.report.leaked == (tmp_path / "test" / "b" / "leak.png",)
    assert not rows(found.train.images) & rows(found.test.images)
    assert "not held out, the same as one to train on: test/b/leak.png" in found.report.render()


def test_a_test_image_is_measured_with_once_and_under_one_label(tmp_path: Path) -> None:
    for split, count in (("train", 6), ("test", 4)):
        for seed, name in enumerate(("a", "b")):
            fill(tmp_path / split / name, count, seed=10 * count + seed)
    test = tmp_path / "test"
    shutil.copy(test / "a" / "000.png", test / "a" / "again.png")
    shutil.copy(test / "a" / "001.png", test / "b" / "unclear.png")
    found = read_folder(tmp_path)
    assert found.test.labels.bincount().tolist() == [3, 4]
    assert len(rows(found.test.images)) == 7
    (again,) = found.report.duplicates
    assert again in (test / "a" / "000.png", test / "a" / "again.png")
    assert set(found.report.ambiguous) == {test / "a" / "001.png", test / "b" / "unclear.png"}
    assert len(found.train.labels) == 12


# The report


def test_the_report_says_what_there_is(pets: Path) -> None:
    assert read_folder(pets).report.render().split("\n") == [
        f"{pets}: 2 classes, 45 images to train on and 5 held out, 28x28, grey",
        "  images to train on + held out: cat 18 + 2, dog 27 + 3",
        "  2 classes of fewer than 100 images: cat, dog",
    ]


def test_long_lists_are_cut(tmp_path: Path) -> None:
    for number in range(30):
        fill(tmp_path / f"class {number:02d}", 2, seed=number)
    lines = read_folder(tmp_path).report.render().split("\n")
    assert lines[1].endswith("class 19 1 + 1, … (30 in all)")
    assert lines[2].endswith("class 09, … (30 in all)")


def test_a_folder_with_the_name_of_a_data_set_is_not_taken_for_it(tmp_path: Path) -> None:
    for seed, name in enumerate(("a", "b")):
        fill(tmp_path / "mnist" / name, 2, seed=seed)
    assert read_folder(tmp_path / "mnist").train.name == "mnist-folder"


def test_whatever_is_no_known_name_is_a_folder() -> None:
    assert not is_folder("mnist")
    assert not is_folder("fashion-mnist")
    assert is_folder("./mnist")
    assert is_folder("photos")


# What is refused


def refused(path: Path, *said: str, size: int | None = None) -> None:
    with pytest.raises(DataError) as caught:
        read_folder(path, size=size)
    for words in said:
        assert words in str(caught.value)


def test_a_folder_that_is_not_there_is_answered_with_the_known_names(tmp_path: Path) -> None:
    refused(tmp_path / "mnits", "mnits: is neither a folder nor", "mnist, fashion-mnist")


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refused(tmp_path / "file", "is neither a folder nor")


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_classes_are_refused(tmp_path: Path, count: int) -> None:
    for i in range(count):
        fill(tmp_path / str(i), 5)
    refused(
        tmp_path, f"has {count} sub-folders", "expected one per class, 2 to 1000", "DIR/CLASS/*.png"
    )


def test_images_beside_each_other_are_no_classes(tmp_path: Path) -> None:
    fill(tmp_path, 5)
    refused(tmp_path, "has 0 sub-folders")


def test_an_empty_class_is_named(pets: Path) -> None:
    (pets / "emu").mkdir()
    refused(pets, "classes with too few usable images: emu")


def test_a_class_of_a_single_image_is_named(pets: Path) -> None:
    fill(pets / "emu", 1, seed=5)
    refused(pets, "classes with too few usable images: emu")


def test_mixed_sizes_are_listed_with_the_way_out(pets: Path) -> None:
    fill(pets / "cat", 2, seed=9, size=32)
    refused(pets, "28x28 (48), 32x32 (2)", "one square size from 28 to 64", "--image-size 32")
    fill(pets / "dog", 1, seed=9, size=40)
    refused(pets, f"{Path('dog') / '000.png'} is 40x40")


@pytest.mark.parametrize("shape", [(27, 27), (65, 65), (28, 30)])
def test_sizes_that_are_not_allowed_are_listed(tmp_path: Path, shape: tuple[int, int]) -> None:
    for i, name in enumerate(("a", "b")):
        (tmp_path / name).mkdir()
        for j in range(3):
            pixels = np.full(shape, 10 * i + j, np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{j}.png")
    height, width = shape
    refused(tmp_path, f"are {width}x{height} (6)", "from 28 to 64", "--image-size 32")


def test_no_usable_image_at_all_is_said(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.png").write_bytes(b"junk")
    refused(tmp_path, "has no usable image")


def test_a_test_class_that_is_not_trained_on_is_named(tmp_path: Path) -> None:
    for split, name in (("train", "a"), ("train", "b"), ("test", "a"), ("test", "c")):
        fill(tmp_path / split / name, 3, seed=len(split) + ord(name))
    refused(tmp_path, "test: has classes that train lacks: c")


def test_too_few_test_images_are_refused(tmp_path: Path) -> None:
    for split, name, count in (("train", "a", 3), ("train", "b", 3), ("test", "a", 1)):
        fill(tmp_path / split / name, count, seed=len(split) + ord(name))
    refused(tmp_path, "test: has fewer than 2 usable images")


def test_a_class_name_that_is_too_long_is_refused(pets: Path) -> None:
    fill(pets / ("x" * 201), 2, seed=5)
    refused(pets, "a class name of 201 characters; at most 200 are allowed")
