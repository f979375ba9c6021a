import shutil
import subprocess
import tarfile
import zipfile
import zlib
from pathlib import Path

import pytest

from service.encoding.archives import TAR_END, TarMember, ZipEntry, is_far, zip_end

CONTENT = b"content"
CRC = zlib.crc32(CONTENT)
FIVE_GIB = 5 << 30


def write(path: Path, entries: list[ZipEntry], content: bytes = CONTENT) -> None:
    """Write an archive with gaps between its files."""
    with path.open("wb") as file:
        for each in entries:
            file.seek(each.offset)
            local = each.local()
            assert len(local) == each.local_bytes
            file.write(local + content)
            file.seek(max(0, each.size - len(content)), 1)
        offset = file.tell()
        central = b"".join(each.central() for each in entries)
        assert len(central) == sum(each.central_bytes for each in entries)
        file.write(central + zip_end(len(entries), offset, len(central)))


def test_a_small_archive_has_nothing_of_zip64(tmp_path: Path) -> None:
    path = tmp_path / "small.zip"
    write(path, [ZipEntry("a", 7, CRC), ZipEntry("b", 7, CRC, 100)])
    content = path.read_bytes()
    assert b"PK\6\6" not in content
    assert b"\xff\xff" not in content
    with zipfile.ZipFile(path) as opened:
        assert opened.testzip() is None
        assert [each.extract_version for each in opened.infolist()] == [20, 20]


def test_names_beyond_ascii_are_marked_as_utf_8(tmp_path: Path) -> None:
    path = tmp_path / "names.zip"
    names = ["plain", "é", "हिन्दी", "熊"]
    write(path, [ZipEntry(name, 7, CRC, 100 * at) for at, name in enumerate(names)])
    with zipfile.ZipFile(path) as opened:
        assert opened.namelist() == names
        assert [each.flag_bits for each in opened.infolist()] == [0, 0x800, 0x800, 0x800]
        assert opened.testzip() is None


def test_a_file_beyond_four_gib_and_one_of_more_than_that_are_read(tmp_path: Path) -> None:
    path = tmp_path / "large.zip"  # of which the disk holds a few blocks
    large = ZipEntry("large", FIVE_GIB, 0, far=True)
    after = ZipEntry("after", 7, CRC, large.local_bytes + FIVE_GIB, far=True)
    assert is_far(after.offset)
    write(path, [large, after])
    with zipfile.ZipFile(path) as opened:
        assert opened.getinfo("large").file_size == FIVE_GIB
        assert opened.read("after") == CONTENT
        with opened.open("large") as file:
            assert file.read(7) == CONTENT


def test_more_files_than_16_bits_can_count_are_all_found(tmp_path: Path) -> None:
    entries: list[ZipEntry] = []
    for at in range(65_536):
        offset = entries[-1].offset + entries[-1].local_bytes + 7 if entries else 0
        entries.append(ZipEntry(f"{at}", 7, CRC, offset))
    path = tmp_path / "many.zip"
    for count in (65_534, 65_535, 65_536):
        write(path, entries[:count])
        assert (b"PK\6\6" in path.read_bytes()[-200:]) == (count >= 65_535)
        with zipfile.ZipFile(path) as opened:
            assert len(opened.infolist()) == count
            assert opened.read(str(count - 1)) == CONTENT
        for command in ("unzip", "busybox"):
            if shutil.which(command):
                applet = ["unzip"] if command == "busybox" else []
                listed = subprocess.run(
                    [command, *applet, "-l", path], capture_output=True, text=True, check=True
                ).stdout
                assert f"{count} files" in listed


@pytest.mark.parametrize("size", [7, FIVE_GIB])
def test_a_descriptor_has_the_length_that_unpackers_expect(size: int) -> None:
    entry = ZipEntry("a", size)
    assert entry.local()[6:8] == b"\x08\0"
    entry.crc = CRC
    assert len(entry.descriptor()) == entry.descriptor_bytes == (16 if size == 7 else 24)


def test_a_tar_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(TarMember(7).file("a", CONTENT) + TAR_END)
    with tarfile.open(path) as opened:
        member = opened.extractfile("a")
        assert member is not None
        assert member.read() == CONTENT
