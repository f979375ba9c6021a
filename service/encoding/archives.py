"""Records of tar and ZIP64 archives, for files whose sizes are known before their content.

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


# ZIP64 as of APPNOTE 6.3.10.
_VERSION = 45  # needed to extract: ZIP64
_ZIP64_EXTRA = 1
_IN_64_BITS = 0xFFFFFFFF
_DATE = 0x21  # 1980-01-01, the earliest
DESCRIPTOR_BYTES = 24


@dataclass
class ZipEntry:
    """A stored file. Sizes and offsets take 64 bits, so that the length of records is fixed."""

    name: bytes
    size: int
    crc: int | None = None  # CRC-32; None if it is unknown until a descriptor follows the file
    offset: int = 0  # of its local header in the archive

    def __post_init__(self) -> None:
        self._flags = 8 if self.crc is None else 0

    @property
    def local_bytes(self) -> int:
        """Return the length of the local header."""
        return 30 + len(self.name) + 20

    @property
    def central_bytes(self) -> int:
        """Return the length of the entry in the central directory."""
        return 46 + len(self.name) + 28

    def local(self) -> bytes:
        """Return the local header, which precedes the file."""
        size = 0 if self._flags else self.size
        header = struct.pack(
            "<4s5H3I2H",
            *(b"PK\3\4", _VERSION, self._flags, 0, 0, _DATE, self.crc or 0),
            *(_IN_64_BITS, _IN_64_BITS, len(self.name), 20),
        )
        return header + self.name + struct.pack("<2H2Q", _ZIP64_EXTRA, 16, size, size)

    def descriptor(self) -> bytes:
        """Return the descriptor, which follows a file whose CRC was unknown before."""
        return struct.pack("<4sI2Q", b"PK\7\10", self.crc, self.size, self.size)

    def central(self) -> bytes:
        """Return the entry in the central directory."""
        header = struct.pack(
            "<4s6H3I5H2I",
            *(b"PK\1\2", _VERSION, _VERSION, self._flags, 0, 0, _DATE, self.crc or 0),
            *(_IN_64_BITS, _IN_64_BITS, len(self.name), 28, 0, 0, 0, 0, _IN_64_BITS),
        )
        extra = struct.pack("<2H3Q", _ZIP64_EXTRA, 24, self.size, self.size, self.offset)
        return header + self.name + extra


def zip_end(entries: int, offset: int, size: int) -> bytes:
    """Return the records after a central directory of `size` bytes that begins at `offset`."""
    return b"".join(
        (
            struct.pack(
                "<4sQ2H2I4Q",
                *(b"PK\6\6", 44, _VERSION, _VERSION, 0, 0, entries, entries, size, offset),
            ),
            struct.pack("<4sIQI", b"PK\6\7", 0, offset + size, 1),
            struct.pack(
                "<4s4H2IH",
                *(b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, _IN_64_BITS, _IN_64_BITS, 0),
            ),
        )
    )
