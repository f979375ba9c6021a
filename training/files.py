"""Atomic file writes."""

import os
import tempfile
from pathlib import Path


class FileError(Exception):
    """A file that cannot be used; names its path and the cause."""

    def __init__(self, path: Path, cause: str) -> None:
        super().__init__(f"{path}: {cause}")
        self.path = path
        self.cause = cause


def read_file(path: Path, max_bytes: int, error: type[FileError]) -> bytes:
    """Return the content of a regular file.

    Raises:
        error: the file is not a regular one, is too long, or cannot be read.
    """
    try:
        if path.is_dir():
            raise error(path, "is a folder, not a file")
        size = path.stat().st_size
        if not path.is_file():  # reading a pipe or a device might never end
            raise error(path, "is not a regular file")
        if size > max_bytes:
            raise error(path, f"is {size} bytes long; at most {max_bytes} are allowed")
        return path.read_bytes()
    except OSError as cause:
        raise error(path, f"cannot be read: {cause.strerror}") from cause


def prepare_folder(folder: Path) -> None:
    """Create a folder and check that it is writable, before time is spent on its contents.

    Raises:
        OSError: it cannot be created or written; names the folder and the cause.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(
            f"cannot write to the folder {folder}: {error.strerror}; choose another one"
        ) from error


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file beside its target, sync it, and rename it into place.

    On any failure the previous file at `path` is untouched and no temporary file remains.

    Raises:
        OSError: the folder cannot be written, or the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o644)  # mkstemp creates private files; other users read artifacts
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename itself must survive a power cut
    finally:
        os.close(folder)
