"""Files that are either whole or not there."""

import os
import tempfile
from pathlib import Path


class FileError(Exception):
    """A file that cannot be used; names its path and the cause."""

    def __init__(self, path: Path, cause: str) -> None:
        super().__init__(f"{path}: {cause}")
        self.path = path
        self.cause = cause


def prepare_folder(folder: Path) -> None:
    """Make sure that a folder is there and takes files, before time is spent on what goes into it.

    Raises:
        OSError: it cannot be made, or not be written; names it and the cause.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"{folder}: cannot hold files: {error.strerror}; choose another") from error


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file beside its target, sync it, and rename it into place.

    Whatever goes wrong, what was at `path` before is untouched and nothing else is left behind.

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
        Path(name).chmod(0o644)  # mkstemp makes private files; artifacts are read by other users
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename itself must survive a power cut
    finally:
        os.close(folder)
