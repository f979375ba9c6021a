"""Records of tar and zip archives, for files whose sizes are known before their content.

Libraries keep every entry of a zip in memory until its end; these records stand alone.
"""

import struct
import tarfile
from dataclasses import dataclass

TAR_END = bytes(2 * tarfile.BLOCKSIZE)


def tar_padded(size: int) -> int:
    """Return the size of a file in a tar, which is a multiple of the block size."""
    return -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


class TarMember:
    """Files of one size in a tar; only the name and the checksum of their headers differ.

    `tarfile` makes the first header. Making each one takes it longer than encoding the image.

    Attributes:
        length: bytes of a file with its header and padding.
    """

    def __init__(self, size: int) -> None:
        info = tarfile.TarInfo()
        info.size = size
        header = info.tobuf(tarfile.GNU_FORMAT)  # supports 8 GiB and more
        self._before, self._after = header[100:148], header[156:]
        # The checksum counts its own field as eight spaces.
        self._sum = sum(self._before) + sum(self._after) + 8 * ord(" ")
        self._padding = bytes(tar_padded(size) - size)
        self.length = len(header) + tar_padded(size)

    def header(self, name: str) -> bytes:
        """Return the header of a file."""
        encoded = name.encode("ascii")
        checksum = b"%06o\0 " % (self._sum + sum(encoded))
        return b"".join((encoded.ljust(100, b"\0"), self._before, checksum, self._after))

    def file(self, name: str, content: bytes) -> bytes:
        """Return a file with its header and padding."""
        return b"".join((self.header(name), content, self._padding))


# Zip as of APPNOTE 6.3.10. Zip64 is used only where a number does not fit, since unpackers such as
# BusyBox's know no Zip64.
_VERSION, _ZIP64_VERSION = 20, 45  # needed to extract
_ZIP64_EXTRA = 1
_IN_64_BITS, _IN_64_BITS_SHORT = 0xFFFFFFFF, 0xFFFF  # the number is in a record of Zip64
_DATE = 0x21  # 1980-01-01, the earliest
_MADE_ON_UNIX = 3 << 8  # with it, Info-ZIP takes names as UTF-8 and expects a file mode
_MODE = 0o100644 << 16  # a plain file
_CRC_FOLLOWS, _UTF_8 = 1 << 3, 1 << 11  # flags


@dataclass
class ZipEntry:
    """A stored file. The lengths of its records depend on `name`, `size` and `far` alone."""

    name: str
    size: int
    crc: int | None = None  # CRC-32; None if it is unknown until a descriptor follows the file
    offset: int = 0  # of its local header in the archive
    far: bool = False  # the offset takes 64 bits; the same for all files of an archive

    def __post_init__(self) -> None:
        self._name = self.name.encode()
        self._flags = (_CRC_FOLLOWS if self.crc is None else 0) | (
            0 if self.name.isascii() else _UTF_8
        )
        self._large = self.size >= _IN_64_BITS

    @property
    def local_bytes(self) -> int:
        """Return the length of the local header."""
        return 30 + len(self._name) + 20 * self._large

    @property
    def descriptor_bytes(self) -> int:
        """Return the length of the descriptor."""
        return 24 if self._large else 16

    @property
    def central_bytes(self) -> int:
        """Return the length of the entry in the central directory."""
        return 46 + len(self._name) + len(_zip64_extra(self._central_numbers()))

    def local(self) -> bytes:
        """Return the local header, which precedes the file."""
        size = 0 if self._flags & _CRC_FOLLOWS else self.size
        extra = _zip64_extra([size, size] if self._large else [])
        if self._large:
            size = _IN_64_BITS
        header = struct.pack(
            "<4s5H3I2H",
            *(b"PK\3\4", self._version, self._flags, 0, 0, _DATE, self.crc or 0),
            *(size, size, len(self._name), len(extra)),
        )
        return header + self._name + extra

    def descriptor(self) -> bytes:
        """Return the descriptor, which follows a file whose CRC was unknown before."""
        numbers = "<4sI2Q" if self._large else "<4sI2I"
        return struct.pack(numbers, b"PK\7\10", self.crc, self.size, self.size)

    def central(self) -> bytes:
        """Return the entry in the central directory."""
        size = min(self.size, _IN_64_BITS)
        extra = _zip64_extra(self._central_numbers())
        header = struct.pack(
            "<4s6H3I5H2I",
            *(b"PK\1\2", _MADE_ON_UNIX | self._version, self._version, self._flags, 0, 0, _DATE),
            *(self.crc or 0, size, size, len(self._name), len(extra), 0, 0, 0, _MODE),
            _IN_64_BITS if self.far else self.offset,
        )
        return header + self._name + extra

    @property
    def _version(self) -> int:
        return _ZIP64_VERSION if self._large or self.far else _VERSION

    def _central_numbers(self) -> list[int]:
        """Return the numbers that do not fit the entry in the central directory."""
        return [self.size] * 2 * self._large + [self.offset] * self.far


def _zip64_extra(numbers: list[int]) -> bytes:
    if not numbers:
        return b""
    return struct.pack(f"<2H{len(numbers)}Q", _ZIP64_EXTRA, 8 * len(numbers), *numbers)


def is_far(directory_offset: int) -> bool:
    """Return true if offsets in an archive take 64 bits, by that of its central directory."""
    return directory_offset >= _IN_64_BITS


def zip_end(entries: int, offset: int, size: int) -> bytes:
    """Return the records after a central directory of `size` bytes that begins at `offset`."""
    short_entries = min(entries, _IN_64_BITS_SHORT)
    short_size, short_offset = min(size, _IN_64_BITS), min(offset, _IN_64_BITS)
    end = struct.pack(
        "<4s4H2IH", b"PK\5\6", 0, 0, short_entries, short_entries, short_size, short_offset, 0
    )
    if short_entries < _IN_64_BITS_SHORT and max(short_size, short_offset) < _IN_64_BITS:
        return end
    end_64 = struct.pack(
        "<4sQ2H2I4Q",
        *(b"PK\6\6", 44, _ZIP64_VERSION, _ZIP64_VERSION, 0, 0, entries, entries, size, offset),
    )
    locator = struct.pack("<4sIQI", b"PK\6\7", 0, offset + size, 1)
    return end_64 + locator + end
