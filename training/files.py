"""Files: kinds by content, checked reads, atomic writes."""

import errno
import io
import os
import tempfile
import zipfile
from pathlib import Path

# (position, bytes there, kind); the first match counts.
_SIGNATURES = (
    (
        *(0, b"version https://git-lfs.github.com/spec/"),
        "a Git LFS pointer instead of the file itself; fetch the file with: git lfs pull",
    ),
    (0, b"\x89HDF\r\n\x1a\n", "an HDF5 file, such as a Keras model of .h5"),
    (0, b"\x80", "a pickle"),
    (0, b"GGUF", "a GGUF model"),
    (4, b"TFL3", "a TensorFlow Lite model"),
    (0, b"\x93NUMPY", "a NumPy array"),
    (0, b"\x1f\x8b", "a gzip archive; unpack it first"),
    (0, b"\xfd7zXZ", "an xz archive; unpack it first"),
    (0, b"7z\xbc\xaf", "a 7-zip archive; unpack it first"),
    (0, b"Rar!", "a RAR archive; unpack it first"),
    (257, b"ustar", "a tar archive; unpack it first"),
    (0, b"\x89PNG", "a PNG image"),
    (0, b"\xff\xd8\xff", "a JPEG image"),
    (0, b"%PDF", "a PDF document"),
    (8, b"{", "a safetensors file"),
    (0, b"{", "JSON text"),
    # Protocol buffers: the first field is a version, the second one text or a message.
    (0, b"\x08\x01\x12", "a TensorFlow SavedModel"),
    *((0, bytes([8, version]), "an ONNX model") for version in range(3, 64)),
)
# A zip archive with a file whose path ends like this -> kind; the first match counts.
_ZIPPED = {
    "model.weights.h5": "a Keras model",
    "/constants.pkl": "a TorchScript model",
    "/archive_format": "a program of torch.export",
    "data.pkl": "a file of torch.save",
    ".npy": "a file of NumPy arrays",
    "": "a zip archive; unpack it first",
}


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


def find_kind(data: bytes) -> str | None:
    """Return the kind of a file by its content, such as "a Keras model"; None if unknown."""
    if not data:
        return "an empty file"
    if data.startswith(b"PK\x03\x04"):
        return _find_zipped_kind(data)
    if data[:1000].lstrip().lower().startswith((b"<!doctype html", b"<html")):
        return "an HTML page, probably the answer of a failed download; download it again"
    found = (kind for position, bytes_, kind in _SIGNATURES if data.startswith(bytes_, position))
    return next(found, None)


def _find_zipped_kind(data: bytes) -> str | None:
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError):
        return None  # damaged
    found = (kind for end, kind in _ZIPPED.items() if any(name.endswith(end) for name in names))
    return next(found, None)


def check_folder(folder: Path) -> None:
    """Check that a folder is writable or can be created, before time is spent on its contents.

    Raises:
        OSError: it is not; names the folder and the cause.
    """
    nearest = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    try:
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise OSError(
            f"cannot write to the folder {folder}: {error.strerror}; choose another one"
        ) from error


def prepare_folder(folder: Path) -> None:
    """Create a folder and check that it is writable.

    Raises:
        OSError: it cannot be created or written; names the folder and the cause.
    """
    check_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    check_folder(folder)


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
    except OSError as error:
        Path(name).unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error  # not the temporary file
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _sync_folder(path: Path) -> None:
    """Make a rename in a folder survive a power cut, where the system can.

    Windows opens no folders, some network disks sync none, and this process may be allowed to write
    a folder but not to read it.
    """
    try:
        folder = os.open(path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EINVAL, errno.ENOTSUP):
            raise
