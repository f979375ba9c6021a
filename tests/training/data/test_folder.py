"""A folder of images: what is read, what is held out, what is left out, and what is refused."""

import io
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support.image_folders import fill, noise
from training.data.folder import Folder, is_folder, read_folder
from training.data.image_file import Cause
from training.data.named import DataError


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


def test_a_train_folder_alone_has_a_tenth_held_out(tmp_path: Path) -> None:
    for seed, name in enumerate(("a", "b")):
        fill(tmp_path / "train" / name, 20, seed=seed)
    found = read_folder(tmp_path)
    assert (len(found.train.labels), len(found.test.labels)) == (36, 4)


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


def test_a_file_that_cannot_be_used_is_reported_with_its_cause_and_what_helps(pets: Path) -> None:
    Image.new("RGBA", (28, 28)).save(pets / "cat" / "clear.png")
    (pets / "dog" / "notes.txt").write_text("hello")
    report = read_folder(pets).report
    assert {path: each.cause for path, each in report.left_out.items()} == {
        pets / "cat" / "clear.png": Cause.TRANSPARENT,
        pets / "dog" / "notes.txt": Cause.OTHER,
    }
    assert "1 left out (transparent pixels): cat 1, such as cat/clear.png; put" in report.render()
    assert sum(report.counts["cat"]) == 20


def test_a_file_name_that_is_not_text_can_be_reported(pets: Path) -> None:
    (pets / "cat" / os.fsdecode(b"caf\xe9.png")).write_bytes(b"junk")
    report = read_folder(pets).report.render()
    assert r"such as cat/caf\udce9.png" in report
    report.encode()


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


def test_no_usable_image_at_all_is_said_with_the_causes_by_class_and_what_helps(
    tmp_path: Path,
) -> None:
    for name in ("a", "b"):
        fill(tmp_path / name / "2026", 1)
        Image.new("RGBA", (28, 28)).save(tmp_path / name / "clear.png")
        Image.fromarray(np.zeros((28, 28), np.uint16)).save(tmp_path / name / "deep.png")
        (tmp_path / name / "junk.png").write_bytes(b"junk")
        (tmp_path / name / "photo.heic").write_bytes(b"junk")
    Image.new("RGBA", (28, 28)).save(tmp_path / "b" / "void.png")
    refused(
        tmp_path,
        "has no usable image in its class folders",
        "3 left out (transparent pixels): a 1, b 2, such as a/clear.png; put a background",
        "2 left out (more than 8 bits a channel): a 1, b 1, such as a/deep.png; convert them to 8",
        "2 left out (not an image, despite the suffix): a 1, b 1, such as a/junk.png; convert",
        "2 left out (a folder inside a class): a 1, b 1, such as a/2026; move the images into",
        "2 left out (another kind of file): a 1, b 1, such as a/photo.heic; convert",
    )


def test_a_class_without_usable_images_is_named_with_its_causes(pets: Path) -> None:
    fill(pets / "emu", 0)
    Image.new("RGBA", (28, 28)).save(pets / "emu" / "clear.png")
    refused(pets, "too few usable images: emu", "1 left out (transparent pixels): emu 1, such as")
    (pets / "emu" / "clear.png").unlink()
    (pets / "emu").rmdir()
    (pets / "emu").symlink_to(pets / "lost")
    refused(pets, "too few usable images: emu", "(cannot be opened): emu 1, such as emu; allow")


def test_a_class_that_may_not_be_opened_is_named() -> None:
    with tempfile.TemporaryDirectory() as name:  # not tmp_path, which another user may not open
        path = Path(name)
        path.chmod(0o755)
        for number, each in enumerate(("cat", "dog", "emu")):
            fill(path / each, 3, seed=number)
        (path / "emu").chmod(0)
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)  # the superuser may open anything
        try:
            refused(path, "too few usable images: emu", "(cannot be opened): emu 1, such as emu;")
        finally:
            os.seteuid(user)
            (path / "emu").chmod(0o755)


def test_photographs_without_a_size_are_refused_by_their_headers(tmp_path: Path) -> None:
    """The files have no pixels, and decoding one would leave it out."""
    header = io.BytesIO()
    Image.new("RGB", (4000, 3000)).save(header, "JPEG")
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(3):
            (tmp_path / name / f"{i}.jpg").write_bytes(header.getvalue()[:1000])
    refused(tmp_path, "the sizes of the images are 4000x3000 (6)", "--image-size 32")
    refused(tmp_path, "(damaged or cut short): a 3, b 3, such as a/0.jpg", size=32)


def test_too_few_test_images_are_refused(tmp_path: Path) -> None:
    for split, name, count in (("train", "a", 3), ("train", "b", 3), ("test", "a", 1)):
        fill(tmp_path / split / name, count, seed=len(split) + ord(name))
    refused(tmp_path, "has fewer than 2 usable images to hold out")
