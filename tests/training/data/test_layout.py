"""The layouts of folders of images: splits, classes, their names, and folders of systems."""

import os
import unicodedata
from pathlib import Path

import pytest

from tests.support.image_folders import fill
from training.data.folder import read_folder
from training.data.layout import read_layout
from training.data.named import DataError


def tree(path: Path, *folders: str) -> Path:
    """Folders of two images each; all images differ."""
    for folder in folders:
        fill(path / folder, 2, seed=sum(map(ord, folder)) + len(folder))
    return path


def refused(path: Path, *said: str) -> None:
    with pytest.raises(DataError) as caught:
        read_layout(path)
    for words in said:
        assert words in str(caught.value)


def remarks(path: Path) -> str:
    return "\n".join(read_layout(path).remarks)


# Splits


@pytest.mark.parametrize("test", ["test", "testing", "val", "valid", "validation", "dev", "eval"])
@pytest.mark.parametrize("train", ["train", "Train", "TRAINING"])
def test_a_split_is_known_by_all_of_its_common_names(tmp_path: Path, train: str, test: str) -> None:
    for name in (test, test.capitalize(), test.upper()):
        path = tree(tmp_path / name, f"{train}/a", f"{train}/b", f"{name}/a", f"{name}/b")
        layout = read_layout(path)
        assert layout.train == {"a": [path / train / "a"], "b": [path / train / "b"]}
        assert layout.test == {"a": [path / name / "a"], "b": [path / name / "b"]}
        assert (f"measured with: {name}" in layout.remarks) == (name != "test")


def test_of_several_test_splits_the_others_are_named(tmp_path: Path) -> None:
    folders = [f"{split}/{name}" for split in ("train", "val", "test") for name in "ab"]
    path = tree(tmp_path, *folders, "annotations")
    assert read_layout(path).test["a"] == [path / "test" / "a"]
    assert remarks(path) == "not used, beside the splits: annotations, val"


def test_classes_may_lie_beside_their_test_split(tmp_path: Path) -> None:
    path = tree(tmp_path, "cat", "dog", "test/cat", "test/dog")
    layout = read_layout(path)
    assert (list(layout.train), list(layout.test)) == (["cat", "dog"], ["cat", "dog"])


@pytest.mark.parametrize("name", ["train", "test", "valid", "Training"])
def test_a_class_may_have_the_name_of_a_split(tmp_path: Path, name: str) -> None:
    path = tree(tmp_path, name, "bus", "car")
    assert set(read_layout(path).train) == {name, "bus", "car"}
    assert remarks(path) == f"classes with names of splits: {name}"


def test_a_class_with_the_name_of_a_split_may_hold_folders_beside_its_images(
    tmp_path: Path,
) -> None:
    path = tree(tmp_path, "train", "train/freight", "bus", "car")
    assert list(read_layout(path).train) == ["bus", "car", "train"]


def test_splits_without_classes_are_not_taken_for_classes(tmp_path: Path) -> None:
    path = tree(tmp_path, "train", "test")
    refused(path, "has the splits test, train", "DIR/CLASS/1.png, or DIR/train/CLASS/1.png with")


def test_a_test_split_without_classes_is_named(tmp_path: Path) -> None:
    path = tree(tmp_path, "train/a", "train/b", "test")
    assert read_layout(path).test == {}
    assert remarks(path) == "not used, beside the splits: test"


def test_a_test_split_alone_is_refused(tmp_path: Path) -> None:
    refused(tree(tmp_path, "val/a", "val/b"), "has the splits val, but no train folder")


def test_two_training_splits_are_refused(tmp_path: Path) -> None:
    path = tree(tmp_path, *[f"{name}/{each}" for name in ("Train", "train") for each in "ab"])
    refused(path, "has several training splits: Train, train; keep one of them")


def test_a_test_class_that_is_not_trained_on_is_named(tmp_path: Path) -> None:
    path = tree(tmp_path, "train/a", "train/b", "test/a", "test/c")
    refused(path, "test: has classes that train lacks: c")


# Classes


def test_a_folder_that_is_not_there_is_answered_with_the_known_names(tmp_path: Path) -> None:
    refused(tmp_path / "mnits", "mnits: is neither a folder nor", "mnist, fashion-mnist")


def test_a_file_is_not_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refused(tmp_path / "file", "is neither a folder nor", "; unpack an archive first")


def test_a_single_class_is_refused(tmp_path: Path) -> None:
    path = tree(tmp_path, "cat")
    refused(path, "has 1 sub-folder, cat, expected one per class, 2 to 1000", "DIR/CLASS/1.png")


def test_a_folder_around_the_data_set_is_named(tmp_path: Path) -> None:
    path = tree(tmp_path, "photos/cat", "photos/dog")
    refused(path, f"for the classes in {path / 'photos'}, give that folder")


def test_images_beside_each_other_are_not_classes(tmp_path: Path) -> None:
    refused(tree(tmp_path, "."), "holds images itself, but no class folders; the layout is DIR/CL")


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    refused(tmp_path, "has no class folders; the layout is")


def test_images_outside_the_class_folders_are_counted(tmp_path: Path) -> None:
    assert remarks(tree(tmp_path, ".", "a", "b")) == (
        "2 images outside the class folders are not used"
    )


def test_numbers_are_in_the_order_of_their_values(tmp_path: Path) -> None:
    path = tree(tmp_path, *map(str, (10, 9, 1, 0, 2)))
    assert list(read_layout(path).train) == ["0", "1", "2", "9", "10"]


def test_a_name_may_begin_with_underscores(tmp_path: Path) -> None:
    path = tree(tmp_path, "__other", "_cat", "dog")
    assert list(read_layout(path).train) == ["__other", "_cat", "dog"]


SYSTEM_FILES = (".DS_Store", "._IMG.jpg", "Thumbs.db", "desktop.ini", "ehthumbs.db")
SYSTEM_FOLDERS = (
    *("@eaDir", "__MACOSX", "lost+found", "$RECYCLE.BIN", "System Volume Information"),
    *(".ipynb_checkpoints", ".git"),
)


@pytest.mark.parametrize("split", [".", "train"])
def test_files_and_folders_of_a_system_never_count(tmp_path: Path, split: str) -> None:
    tree(tmp_path / split, "a", "b")
    before = read_folder(tmp_path).train.digest
    for folder in {tmp_path, tmp_path / split, tmp_path / split / "a"}:
        tree(folder, *SYSTEM_FOLDERS)
        for name in SYSTEM_FILES:
            (folder / name).write_bytes(b"\0")
    found = read_folder(tmp_path)
    assert found.train.class_names == ("a", "b")
    assert found.train.digest == before
    assert found.report.left_out == {}
    assert "hidden folders and folders of a system ignored: $RECYCLE.BIN" in found.report.render()


# Names


def test_two_spellings_of_a_name_are_one_class(tmp_path: Path) -> None:
    composed, decomposed = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    path = tree(tmp_path / "one", composed, decomposed, "tea")
    assert list(read_layout(path).train) == [composed, "tea"]
    assert sum(read_folder(path).report.counts[composed]) == 4
    assert remarks(path) == f"one class in several spellings: {composed}"
    splits = tree(tmp_path / "two", f"train/{composed}", "train/tea", f"test/{decomposed}")
    assert list(read_layout(splits).test) == [composed]


def test_white_space_around_a_name_does_not_count(tmp_path: Path) -> None:
    path = tree(tmp_path, "cat ", " dog", "dog")
    assert list(read_layout(path).train) == ["cat", "dog"]
    assert remarks(path) == "one class in several spellings: dog"


def test_names_that_differ_in_case_are_named(tmp_path: Path) -> None:
    assert remarks(tree(tmp_path, "Cat", "cat")) == (
        "class names that differ in case only: Cat, cat"
    )


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            os.fsdecode(b"caf\xe9"),
            r"/caf\udce9: cannot name a class: it has control characters, or bytes",
        ),
        ("two\nlines", "it has control characters"),
        ("x" * 201, "it has 201 characters, expected 1 to 200"),
    ],
)
def test_a_name_that_no_model_can_hold_is_refused(tmp_path: Path, name: str, said: str) -> None:
    path = tree(tmp_path, "a", "b", name)
    refused(path, said, "cannot name a class", "; rename the folder")


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (
            ("1", "2", "3"),
            "class names that are also the indices of other classes: 1, 2; the service looks for a "
            "name first: label=1 is the class 1 (index 0)",
        ),
        (("0", "2", "4"), "other classes: 2; the service looks for a name first: label=2 is the"),
        (
            ("01", "02", "03"),
            "other classes: 01, 02; the service looks for a name first: label=1 is "
            "the class 02 (index 1)",
        ),
    ],
)
def test_numbers_that_are_indices_of_other_classes_are_named(
    tmp_path: Path, names: tuple[str, ...], said: str
) -> None:
    assert said in read_folder(tree(tmp_path, *names)).report.render()


@pytest.mark.parametrize("names", [("0", "1", "2"), ("10", "20"), ("cat", "dog"), ("00", "01")])
def test_names_that_are_clear_are_not_remarked_on(tmp_path: Path, names: tuple[str, ...]) -> None:
    assert remarks(tree(tmp_path, *names)) == ""
