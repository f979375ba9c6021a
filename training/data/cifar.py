"""The binary version of CIFAR-10: files of records in a tar archive.

A record is a label, one byte, and an image, 3 x 32 x 32 bytes: the red, green and blue plane.
"""

import io
import tarfile
import zlib
from collections.abc import Collection
from pathlib import PurePosixPath

import numpy as np
import numpy.typing as npt

IMAGE_SHAPE = (3, 32, 32)
RECORD_BYTES = 1 + 3 * 32 * 32
MAX_FILE_BYTES = 10_000 * RECORD_BYTES


def read_members(archive: bytes, names: Collection[str]) -> dict[str, bytes]:
    """Return files of a tar archive in memory, compressed or not; nothing is written to disk.

    Args:
        archive: the content of the archive.
        names: of the files, without folders, since mirrors pack them differently.

    Raises:
        ValueError: not a tar archive, or a file is missing, too large or not a regular one.
    """
    found: dict[str, bytes] = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
            for member in tar:
                name = PurePosixPath(member.name).name
                if name in names and name not in found:
                    found[name] = _read_member(tar, member)
                if len(found) == len(names):
                    break
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{len(archive)} bytes that are not a whole tar archive") from error
    missing = sorted(set(names) - found.keys())
    if missing:
        raise ValueError(f"lacks {', '.join(missing)}")
    return found


def _read_member(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member) if member.isfile() else None
    if file is None:
        raise ValueError(f"{member.name} is not a regular file")
    if member.size > MAX_FILE_BYTES:
        raise ValueError(
            f"{member.name} has {member.size} bytes, at most {MAX_FILE_BYTES} expected"
        )
    return file.read()


def parse_records(data: bytes) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """Parse records to images (N, 3, 32, 32) and labels (N,); writable copies.

    Raises:
        ValueError: the data are not whole records.
    """
    if not data or len(data) % RECORD_BYTES:
        raise ValueError(f"{len(data)} bytes are not a multiple of {RECORD_BYTES}, one image each")
    records = np.frombuffer(data, np.uint8).reshape(-1, RECORD_BYTES)
    return records[:, 1:].reshape(-1, *IMAGE_SHAPE).copy(), records[:, 0].copy()
