"""Files are whole or not there, whatever goes wrong."""

import errno
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from training.files import prepare_folder, write_atomically


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_holds_what_was_written_and_nothing_lies_beside_it(tmp_path: Path) -> None:
    write_atomically(tmp_path / "model.bin", b"contents")

    assert (tmp_path / "model.bin").read_bytes() == b"contents"
    assert names_in(tmp_path) == ["model.bin"]


def test_the_folder_is_made_where_it_is_missing(tmp_path: Path) -> None:
    write_atomically(tmp_path / "a" / "b" / "model.bin", b"")
    assert (tmp_path / "a" / "b" / "model.bin").read_bytes() == b""


def test_a_file_is_replaced_and_who_has_the_old_one_open_keeps_it(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    write_atomically(path, b"old")
    with path.open("rb") as reader:
        write_atomically(path, b"new contents")
        assert reader.read() == b"old"
    assert path.read_bytes() == b"new contents"


def test_other_users_may_read_it(tmp_path: Path) -> None:
    write_atomically(tmp_path / "model.bin", b"contents")
    assert stat.S_IMODE((tmp_path / "model.bin").stat().st_mode) == 0o644


def test_the_contents_are_on_the_disk_before_they_have_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, synced = tmp_path / "model.bin", []
    fsync = os.fsync

    def watch(descriptor: int) -> None:
        what = "folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "contents"
        synced.append((what, path.exists()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watch)
    write_atomically(path, b"contents")

    assert synced == [("contents", False), ("folder", True)]


@pytest.mark.parametrize(("system", "code"), [("Windows", "EACCES"), ("a network disk", "EINVAL")])
def test_a_file_is_written_where_folders_cannot_be_synced(
    system: str, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = OSError(getattr(errno, code), os.strerror(getattr(errno, code)))
    open_file, fsync = os.open, os.fsync

    def open_no_folder(path: Path, *arguments: int, **options: Any) -> int:
        if system == "Windows" and Path(path).is_dir():
            raise error
        return open_file(path, *arguments, **options)

    def sync_no_folder(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise error
        fsync(descriptor)

    monkeypatch.setattr(os, "open", open_no_folder)
    monkeypatch.setattr(os, "fsync", sync_no_folder)
    write_atomically(tmp_path / "model.bin", b"contents")
    assert (tmp_path / "model.bin").read_bytes() == b"contents"


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), KeyboardInterrupt()])
def test_after_a_failure_the_old_file_is_intact_and_nothing_else_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    path = tmp_path / "model.bin"
    write_atomically(path, b"old")

    def fail(_descriptor: int) -> None:
        raise error

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(type(error)):
        write_atomically(path, b"new")

    assert path.read_bytes() == b"old"
    assert names_in(tmp_path) == ["model.bin"]


def test_a_folder_is_made_and_left_empty(tmp_path: Path) -> None:
    for _ in range(2):
        prepare_folder(tmp_path / "a" / "b")
    assert list(tmp_path.rglob("*")) == [tmp_path / "a", tmp_path / "a" / "b"]


@pytest.mark.parametrize("place", ["file", "file/deeper"])
def test_a_folder_that_cannot_be_made_is_named_with_the_cause(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(OSError, match=rf"to the folder .*{place}: (File exists|Not a dir)"):
        prepare_folder(tmp_path / place)


def test_a_folder_that_takes_no_files_is_named_with_the_cause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*, dir: Path) -> None:  # noqa: A002
        raise OSError(errno.EROFS, "Read-only file system", dir)

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    with pytest.raises(OSError, match=f"to the folder {tmp_path}: Read-only file system"):
        prepare_folder(tmp_path)


def test_a_folder_in_its_place_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "model.bin").mkdir()
    with pytest.raises(IsADirectoryError):
        write_atomically(tmp_path / "model.bin", b"contents")
    assert names_in(tmp_path) == ["model.bin"]
    assert names_in(tmp_path / "model.bin") == []
