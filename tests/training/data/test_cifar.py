"""Archives and records of CIFAR-10, made by hand."""

import io
import tarfile

import numpy as np
import pytest

from training.data import cifar
from training.data.cifar import RECORD_BYTES, parse_records, read_members

FILES = {"a.bin": b"first", "b.bin": b"second"}


def pack(files: dict[str, bytes], *, folder: str = "batches/", mode: str = "w:gz") -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode=mode) as archive:  # type: ignore[call-overload]
        for name, content in files.items():
            member = tarfile.TarInfo(folder + name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return packed.getvalue()


@pytest.mark.parametrize("mode", ["w:gz", "w"])
@pytest.mark.parametrize("folder", ["batches/", "", "./x/y/"])
def test_files_are_found_in_any_folder_of_an_archive(folder: str, mode: str) -> None:
    archive = pack({"._a.bin": b"of macOS", **FILES, "readme": b""}, folder=folder, mode=mode)

    assert read_members(archive, ("b.bin",)) == {"b.bin": b"second"}
    assert read_members(archive, ("b.bin", "a.bin")) == FILES


def test_missing_files_are_named() -> None:
    with pytest.raises(ValueError, match=r"^lacks c\.bin, d\.bin$"):
        read_members(pack(FILES), ("d.bin", "a.bin", "c.bin"))


@pytest.mark.parametrize(
    "wrong",
    [b"", b"<html>", pack(FILES)[:-30], pack(FILES, mode="w")[:700]],
    ids=["empty", "html", "truncated gzip", "truncated tar"],
)
def test_a_damaged_archive_is_refused(wrong: bytes) -> None:
    with pytest.raises(ValueError, match=f"{len(wrong)} bytes that are not a whole tar archive"):
        read_members(wrong, ("a.bin", "b.bin", "c.bin"))


def test_a_file_that_is_too_large_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cifar, "MAX_FILE_BYTES", 5)
    archive = pack(FILES)

    assert read_members(archive, ("a.bin",)) == {"a.bin": b"first"}
    with pytest.raises(ValueError, match=r"batches/b\.bin has 6 bytes, at most 5 expected"):
        read_members(archive, FILES)


def test_a_link_in_an_archive_is_not_followed() -> None:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        link = tarfile.TarInfo("a.bin")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)

    with pytest.raises(ValueError, match=r"a\.bin is not a regular file"):
        read_members(packed.getvalue(), ("a.bin",))


def test_a_record_is_a_label_and_three_planes() -> None:
    planes = np.random.default_rng(0).integers(0, 256, (2, 3, 32, 32), dtype=np.uint8)

    images, labels = parse_records(b"".join(bytes([7 + i]) + planes[i].tobytes() for i in (0, 1)))

    np.testing.assert_array_equal(images, planes, strict=True)
    assert labels.tolist() == [7, 8]
    assert images.flags.writeable
    assert labels.flags.writeable


@pytest.mark.parametrize("length", [0, 1, RECORD_BYTES - 1, RECORD_BYTES + 1])
def test_a_part_of_a_record_is_refused(length: int) -> None:
    with pytest.raises(ValueError, match=f"{length} bytes are not a multiple of 3073"):
        parse_records(bytes(length))
