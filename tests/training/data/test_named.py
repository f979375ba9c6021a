"""Data sets against real files and real HTTP servers on the loopback interface."""

import errno
import gzip
import hashlib
import io
import os
import socket
import struct
import sys
import tarfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import numpy.typing as npt
import pooch  # type: ignore[import-untyped]
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tqdm import tqdm

from training.data import named as data
from training.data.named import (
    CIFAR_FILES,
    CIFAR_FOLDER,
    DATASETS,
    FILES,
    DataError,
    DatasetSpec,
    default_data_dir,
    load_dataset,
    parse_idx,
)

IMAGES = "train-images-idx3-ubyte"
LABELS = "train-labels-idx1-ubyte"
ARCHIVES = [f"{IMAGES}.gz", f"{LABELS}.gz"]


def idx(array: npt.NDArray[np.uint8]) -> bytes:
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    return header + array.tobytes()


PIXELS = np.random.default_rng(0).integers(0, 256, (5, 4, 4), dtype=np.uint8)
CLASSES = np.array([0, 1, 2, 1, 0], dtype=np.uint8)
IMAGE_BYTES = idx(PIXELS)
LABEL_BYTES = idx(CLASSES)


def tiny_spec(
    *,
    images: bytes = IMAGE_BYTES,
    labels: bytes = LABEL_BYTES,
    mirrors: tuple[str, ...] = (),
    class_names: tuple[str, ...] = ("red", "green", "blue"),
) -> DatasetSpec:
    """A data set whose two files are these bytes."""
    digests = (hashlib.sha256(content).hexdigest() for content in (images, labels))
    return DatasetSpec(class_names, mirrors, dict(zip(FILES["train"], digests, strict=True)))


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """The data set "tiny" beside the real ones, and no proxy before the loopback interface."""
    monkeypatch.setattr(data, "DATASETS", {**DATASETS, "tiny": tiny_spec()})
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return the folder of the files of "tiny"; it does not exist yet."""
    return tmp_path / "tiny"


def put(folder: Path, files: dict[str, bytes]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)


def good_files() -> dict[str, bytes]:
    return {f"{IMAGES}.gz": gzip.compress(IMAGE_BYTES), f"{LABELS}.gz": gzip.compress(LABEL_BYTES)}


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


class Mirror:
    """The files of a server, its manner of answering, and the names it was asked for."""

    def __init__(
        self, files: dict[str, bytes], *, headers: dict[str, str] | None = None, cut: bool = False
    ) -> None:
        self.files = files
        self.headers = headers or {}
        self.cut = cut  # promise the whole file, send half of it
        self.asked: list[str] = []
        self.url = ""

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        name = request.path.removeprefix("/data/")
        self.asked.append(name)
        body = self.files.get(name, b"<html>there is no such file</html>")
        request.send_response(200 if name in self.files else 404)
        request.send_header("Content-Length", str(len(body)))
        for key, value in self.headers.items():
            request.send_header(key, value)
        request.end_headers()
        request.wfile.write(body[: len(body) // 2] if self.cut else body)


@contextmanager
def running(mirror: Mirror) -> Iterator[Mirror]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            mirror.answer(self)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = False  # so that closing waits for the answers under way

    with Server(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        mirror.url = f"http://127.0.0.1:{server.server_address[1]}/data/"
        try:
            yield mirror
        finally:
            server.shutdown()
            thread.join()


Serve = Callable[[Mirror], Mirror]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Starts mirrors, and stops them all at the end of the test."""
    with ExitStack() as stack:
        yield lambda mirror: stack.enter_context(running(mirror))


@pytest.fixture
def dead_url() -> Iterator[str]:
    """A base URL that refuses connections: the port is taken, but nobody listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}/data/"


def failure_to_load(data_dir: Path, *mirrors: str) -> str:
    with pytest.raises(DataError) as caught:
        load_dataset("tiny", "train", data_dir, mirrors=mirrors)
    return str(caught.value)


# What a data set is


def test_a_data_set_holds_the_pixels_and_labels_of_its_files(tmp_path: Path, folder: Path) -> None:
    put(folder, good_files())

    tiny = load_dataset("tiny", "train", tmp_path)

    assert tiny.name == "tiny"
    assert tiny.images.dtype == torch.uint8
    assert tiny.images.tolist() == PIXELS[:, None].tolist()
    assert tiny.labels.dtype == torch.int64
    assert tiny.labels.tolist() == CLASSES.tolist()
    assert tiny.class_names == ("red", "green", "blue")
    assert (tiny.num_classes, tiny.channels, tiny.image_size) == (3, 1, 4)
    assert tiny.digest == hashlib.sha256(IMAGE_BYTES + LABEL_BYTES).hexdigest()


def test_its_tensors_can_be_written_to(tmp_path: Path, folder: Path) -> None:
    put(folder, good_files())
    tiny = load_dataset("tiny", "train", tmp_path)

    tiny.images.zero_()
    tiny.labels.zero_()

    assert int(tiny.images.sum()) == int(tiny.labels.sum()) == 0


def test_it_moves_to_another_device_whole(tmp_path: Path, folder: Path) -> None:
    put(folder, good_files())
    tiny = load_dataset("tiny", "train", tmp_path)

    moved = tiny.to("meta")

    assert moved.images.device.type == moved.labels.device.type == "meta"
    assert moved.images.shape == tiny.images.shape
    assert (moved.name, moved.class_names, moved.digest) == (
        tiny.name,
        tiny.class_names,
        tiny.digest,
    )
    assert tiny.images.device.type == "cpu"


# Files that are there


@pytest.mark.parametrize("level", [0, 1, 9])
def test_another_gzip_wrapper_around_the_same_content_is_the_same_data(
    tmp_path: Path, folder: Path, level: int
) -> None:
    put(folder, {f"{IMAGES}.gz": gzip.compress(IMAGE_BYTES, level, mtime=level)})
    put(folder, {f"{LABELS}.gz": gzip.compress(LABEL_BYTES, level, mtime=level)})

    digest = load_dataset("tiny", "train", tmp_path).digest

    assert digest == hashlib.sha256(IMAGE_BYTES + LABEL_BYTES).hexdigest()


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_unzipped_files_are_accepted_whatever_their_name_says(
    tmp_path: Path, folder: Path, suffix: str
) -> None:
    put(folder, {f"{IMAGES}{suffix}": IMAGE_BYTES, f"{LABELS}{suffix}": LABEL_BYTES})

    assert load_dataset("tiny", "train", tmp_path).images.tolist() == PIXELS[:, None].tolist()


def test_no_mirror_is_asked_for_files_that_are_there(
    tmp_path: Path, folder: Path, serve: Serve
) -> None:
    put(folder, good_files())
    mirror = serve(Mirror(good_files()))

    load_dataset("tiny", "train", tmp_path, mirrors=[mirror.url])

    assert mirror.asked == []


WRONG = {
    "truncated gzip": gzip.compress(IMAGE_BYTES)[:-20],
    "corrupt gzip": gzip.compress(IMAGE_BYTES)[:-8] + bytes(8),
    "not gzip": b"<html>you are not logged in</html>",
    "other content": gzip.compress(idx(PIXELS[::-1])),
    "nothing": b"",
}
FOUND = {
    "truncated gzip": "truncated gzip data",
    "corrupt gzip": "corrupt gzip data",
    "not gzip": "34 bytes that are not gzip data",
    "other content": hashlib.sha256(idx(PIXELS[::-1])).hexdigest()[:12],
    "nothing": "0 bytes that are not gzip data",
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_damaged_file_is_named_with_what_to_do_and_left_alone(
    tmp_path: Path, folder: Path, dead_url: str, wrong: str
) -> None:
    put(folder, {f"{IMAGES}.gz": WRONG[wrong]})

    message = failure_to_load(tmp_path, dead_url)

    assert f"{folder / IMAGES}.gz: " in message
    assert FOUND[wrong] in message
    assert f"put {IMAGES}.gz into this folder" in message
    assert hashlib.sha256(IMAGE_BYTES).hexdigest() in message
    assert (folder / f"{IMAGES}.gz").read_bytes() == WRONG[wrong]


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_damaged_file_is_replaced(
    tmp_path: Path, folder: Path, serve: Serve, wrong: str, suffix: str
) -> None:
    put(folder, {f"{IMAGES}{suffix}": WRONG[wrong]})
    mirror = serve(Mirror(good_files()))

    for _ in range(2):
        loaded = load_dataset("tiny", "train", tmp_path, mirrors=[mirror.url])
        assert loaded.images.tolist() == PIXELS[:, None].tolist()

    assert mirror.asked == ARCHIVES
    assert (folder / f"{IMAGES}.gz").read_bytes() == mirror.files[f"{IMAGES}.gz"]


def test_a_directory_in_a_files_place_is_named(tmp_path: Path, folder: Path) -> None:
    (folder / f"{IMAGES}.gz").mkdir(parents=True)

    message = failure_to_load(tmp_path)

    assert f"{folder / IMAGES}.gz: cannot be read (Is a directory)" in message


def test_a_link_that_leads_nowhere_is_named_and_not_replaced(
    tmp_path: Path, folder: Path, serve: Serve
) -> None:
    put(folder, {})
    link = folder / f"{IMAGES}.gz"
    link.symlink_to(tmp_path / "unplugged disk" / IMAGES)
    mirror = serve(Mirror(good_files()))

    message = failure_to_load(tmp_path, mirror.url)

    assert f"{link}: cannot be read (No such file or directory)" in message
    assert link.is_symlink()
    assert mirror.asked == []


# Files that do not belong together


@pytest.mark.parametrize(
    ("pair", "problem"),
    [
        ((PIXELS, CLASSES[:4]), "there are 5 images but 4 labels"),
        ((PIXELS, CLASSES + 1), "there is a label 3 but only 3 classes"),
        ((PIXELS[:, :3], CLASSES), "images (5, 3, 4) and labels (5,) are not (N, H, H) and (N,)"),
        ((CLASSES, PIXELS), "images (5,) and labels (5, 4, 4) are not (N, H, H) and (N,)"),
    ],
)
def test_files_that_do_not_fit_each_other_are_refused(
    tmp_path: Path,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    pair: tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]],
    problem: str,
) -> None:
    images, labels = map(idx, pair)
    put(folder, {IMAGES: images, LABELS: labels})
    monkeypatch.setattr(data, "DATASETS", {"tiny": tiny_spec(images=images, labels=labels)})

    message = failure_to_load(tmp_path)

    assert f"{folder}: {problem} in {IMAGES} and {LABELS}" in message


def test_a_pinned_file_that_is_not_idx_is_refused(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(folder, {IMAGES: b"PNG", LABELS: LABEL_BYTES})
    monkeypatch.setattr(data, "DATASETS", {"tiny": tiny_spec(images=b"PNG")})

    assert f"{folder}: not IDX data" in failure_to_load(tmp_path)


# Downloads


def test_missing_files_come_from_the_data_sets_own_mirrors_and_stay(
    tmp_path: Path, folder: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    mirror = serve(Mirror(good_files()))
    monkeypatch.setattr(data, "DATASETS", {"tiny": tiny_spec(mirrors=(mirror.url,))})

    first = load_dataset("tiny", "train", tmp_path)
    second = load_dataset("tiny", "train", tmp_path)

    assert mirror.asked == ARCHIVES
    assert {name: (folder / name).read_bytes() for name in names_in(folder)} == mirror.files
    assert first.digest == second.digest
    assert first.images.tolist() == second.images.tolist() == PIXELS[:, None].tolist()


def test_only_what_is_missing_is_downloaded(tmp_path: Path, folder: Path, serve: Serve) -> None:
    put(folder, {IMAGES: IMAGE_BYTES})
    mirror = serve(Mirror(good_files()))

    load_dataset("tiny", "train", tmp_path, mirrors=[mirror.url])

    assert mirror.asked == [f"{LABELS}.gz"]
    assert names_in(folder) == [IMAGES, f"{LABELS}.gz"]


def test_a_mirror_is_named_with_or_without_a_slash_at_its_end(tmp_path: Path, serve: Serve) -> None:
    mirror = serve(Mirror(good_files()))

    load_dataset("tiny", "train", tmp_path, mirrors=[mirror.url.rstrip("/")])

    assert mirror.asked == ARCHIVES


def test_the_second_mirror_helps_when_the_first_is_down(
    tmp_path: Path, folder: Path, serve: Serve, dead_url: str
) -> None:
    mirror = serve(Mirror(good_files()))

    load_dataset("tiny", "train", tmp_path, mirrors=[dead_url, mirror.url])

    assert names_in(folder) == ARCHIVES


@pytest.mark.parametrize("wrong", WRONG)
def test_a_mirror_with_wrong_content_leads_to_the_next(
    tmp_path: Path, folder: Path, serve: Serve, wrong: str
) -> None:
    bad = serve(Mirror({**good_files(), f"{IMAGES}.gz": WRONG[wrong]}))
    good = serve(Mirror(good_files()))

    tiny = load_dataset("tiny", "train", tmp_path, mirrors=[bad.url, good.url])

    assert tiny.images.tolist() == PIXELS[:, None].tolist()
    assert bad.asked == ARCHIVES
    assert good.asked == [f"{IMAGES}.gz"]
    assert names_in(folder) == ARCHIVES


def test_a_download_that_breaks_off_leads_to_the_next_mirror(
    tmp_path: Path, folder: Path, serve: Serve
) -> None:
    broken = serve(Mirror(good_files(), cut=True))
    good = serve(Mirror(good_files()))

    load_dataset("tiny", "train", tmp_path, mirrors=[broken.url, good.url])

    assert good.asked == ARCHIVES
    assert names_in(folder) == ARCHIVES


def test_a_file_that_a_server_unzips_on_the_way_is_accepted(
    tmp_path: Path, folder: Path, serve: Serve
) -> None:
    mirror = serve(Mirror(good_files(), headers={"Content-Encoding": "gzip"}))

    load_dataset("tiny", "train", tmp_path, mirrors=[mirror.url])

    again = load_dataset("tiny", "train", tmp_path, mirrors=())
    assert again.images.tolist() == PIXELS[:, None].tolist()
    assert (folder / f"{IMAGES}.gz").read_bytes() == IMAGE_BYTES


def test_without_a_working_mirror_the_message_says_what_was_tried_and_what_to_do(
    tmp_path: Path, folder: Path, serve: Serve, dead_url: str
) -> None:
    empty = serve(Mirror({}))
    wrong = serve(Mirror({f"{IMAGES}.gz": WRONG["other content"]}))
    broken = serve(Mirror(good_files(), cut=True))

    message = failure_to_load(tmp_path, dead_url, empty.url, wrong.url, broken.url)

    lines = message.splitlines()
    assert lines[0] == f"{folder}: cannot load {IMAGES}, with or without .gz:"
    assert lines[1] == f"  {dead_url}{IMAGES}.gz: [Errno {errno.ECONNREFUSED}] Connection refused"
    assert lines[2] == f"  {empty.url}{IMAGES}.gz: 404 Client Error: Not Found"
    digest = FOUND["other content"]
    assert lines[3].startswith(
        f"  {wrong.url}{IMAGES}.gz: other content (SHA-256 {digest}, expected "
    )
    assert lines[4].startswith(f"  {broken.url}{IMAGES}.gz: IncompleteRead(")
    assert lines[5].startswith(f"Connect to a network, or put {IMAGES}.gz into this folder; ")
    assert len(lines) == 6
    assert names_in(folder) == []


def test_only_the_files_that_are_still_missing_are_asked_for(
    tmp_path: Path, folder: Path, serve: Serve
) -> None:
    half = serve(Mirror({f"{IMAGES}.gz": gzip.compress(IMAGE_BYTES)}))

    message = failure_to_load(tmp_path, half.url)

    assert f"put {LABELS}.gz into this folder" in message
    assert f"{IMAGES}.gz" not in message
    assert names_in(folder) == [f"{IMAGES}.gz"]


def test_no_mirrors_at_all_means_no_download_and_no_folder(tmp_path: Path, folder: Path) -> None:
    message = failure_to_load(tmp_path)

    assert "missing, and downloads are off" in message
    assert f"put {IMAGES}.gz into this folder" in message
    assert not folder.exists()


def test_a_data_directory_that_cannot_be_made_is_named_before_anything_is_downloaded(
    tmp_path: Path, serve: Serve
) -> None:
    (tmp_path / "notes.txt").write_text("a file in the way")
    mirror = serve(Mirror(good_files()))

    with pytest.raises(OSError, match="Not a directory") as caught:
        load_dataset("tiny", "train", tmp_path / "notes.txt", mirrors=[mirror.url])

    assert str(tmp_path / "notes.txt" / "tiny") in str(caught.value)
    assert mirror.asked == []


def test_a_data_directory_that_cannot_be_written_is_named_before_anything_is_downloaded(
    tmp_path: Path, folder: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(folder, {})

    def refuse(*, dir: Path) -> None:  # noqa: A002
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), dir)

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)  # the superuser may write anywhere
    mirror = serve(Mirror(good_files()))

    with pytest.raises(OSError, match="Read-only file system") as caught:
        load_dataset("tiny", "train", tmp_path, mirrors=[mirror.url])

    assert str(folder) in str(caught.value)
    assert mirror.asked == []


def test_a_full_disk_is_not_blamed_on_the_mirror_and_nothing_half_written_stays(
    tmp_path: Path, folder: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    first, second = serve(Mirror(good_files())), serve(Mirror(good_files()))

    message = failure_to_load(tmp_path, first.url, second.url)

    assert f"{folder / IMAGES}.gz: cannot be written (No space left on device)" in message
    assert second.asked == []
    assert names_in(folder) == []


def test_a_download_shows_its_progress_on_a_terminal(
    tmp_path: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(tqdm, "monitor_interval", 0)  # no thread that outlives the test
    mirror = serve(Mirror(good_files()))

    load_dataset("tiny", "train", tmp_path, mirrors=[mirror.url])

    assert f"{IMAGES}: 100%" in terminal.getvalue()
    assert f"{LABELS}: 100%" in terminal.getvalue()


def test_a_download_writes_nothing_into_a_log(
    tmp_path: Path, serve: Serve, capfd: pytest.CaptureFixture[str]
) -> None:
    mirror = serve(Mirror(good_files()))

    load_dataset("tiny", "train", tmp_path, mirrors=[mirror.url])

    assert capfd.readouterr() == ("", "")


# CIFAR-10, whose files are in one archive

RECORDS = {
    name: b"".join(bytes([label]) + bytes([label + shade]) * 3072 for label in (0, 2, 1))
    for shade, name in enumerate((*CIFAR_FILES["train"], *CIFAR_FILES["test"]))
}
ARCHIVE = "cifar-10-binary.tar.gz"


def records_archive(records: dict[str, bytes]) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for name, content in records.items():
            member = tarfile.TarInfo(f"{CIFAR_FOLDER}/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return packed.getvalue()


@pytest.fixture
def records(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let "tiny" be a data set of the layout of CIFAR-10."""
    sha256 = {name: hashlib.sha256(content).hexdigest() for name, content in RECORDS.items()}
    names = ("red", "green", "blue")
    spec = DatasetSpec(names, (), sha256, files=CIFAR_FILES, archive=ARCHIVE)
    monkeypatch.setattr(data, "DATASETS", {"tiny": spec})


@pytest.mark.usefixtures("records")
@pytest.mark.parametrize("kind", ["archive", "extracted"])
def test_both_splits_are_read_from_an_archive_or_its_folder(
    tmp_path: Path, folder: Path, kind: str
) -> None:
    if kind == "archive":
        put(folder, {ARCHIVE: records_archive(RECORDS)})
    else:
        put(folder / CIFAR_FOLDER, RECORDS)

    train, test = (load_dataset("tiny", split, tmp_path) for split in CIFAR_FILES)

    assert train.images.shape == (15, 3, 32, 32)
    assert train.images[:, 0, 0, 0].tolist() == [n + i for i in range(5) for n in (0, 2, 1)]
    assert train.labels.tolist() == [0, 2, 1] * 5
    assert test.images[:, 2, 31, 31].tolist() == [5, 7, 6]
    assert test.labels.tolist() == [0, 2, 1]
    assert (test.channels, test.image_size) == (3, 32)
    assert test.digest == hashlib.sha256(RECORDS["test_batch.bin"]).hexdigest()


@pytest.mark.usefixtures("records")
def test_an_archive_is_downloaded_once_for_both_splits(
    tmp_path: Path, folder: Path, serve: Serve
) -> None:
    mirror = serve(Mirror({ARCHIVE: records_archive(RECORDS)}))

    for split in CIFAR_FILES:
        load_dataset("tiny", split, tmp_path, mirrors=[mirror.url])

    assert mirror.asked == [ARCHIVE]
    assert names_in(folder) == [ARCHIVE]


@pytest.mark.usefixtures("records")
def test_a_file_of_an_archive_with_other_content_is_named_with_what_to_do(
    tmp_path: Path, folder: Path, serve: Serve
) -> None:
    other = {**RECORDS, "data_batch_3.bin": RECORDS["data_batch_2.bin"]}
    put(folder, {ARCHIVE: records_archive(other)})
    put(folder / CIFAR_FOLDER, {"data_batch_1.bin": RECORDS["data_batch_1.bin"]})
    mirror = serve(Mirror({ARCHIVE: b"<html>"}))

    lines = failure_to_load(tmp_path, mirror.url).splitlines()

    assert lines[0] == f"{folder}: cannot load {ARCHIVE} or {CIFAR_FOLDER}:"
    assert lines[1].startswith(f"  {folder / ARCHIVE}: other content in data_batch_3.bin (SHA-256 ")
    assert lines[2].startswith(f"  {folder / CIFAR_FOLDER}: lacks data_batch_2.bin, data_batch_3")
    assert lines[3] == f"  {mirror.url}{ARCHIVE}: 6 bytes that are not a whole tar archive"
    assert lines[4] == (
        f"Connect to a network, or put {ARCHIVE} into this folder; "
        f"its folder {CIFAR_FOLDER} will do as well."
    )
    assert len(lines) == 5


@pytest.mark.usefixtures("records")
def test_a_damaged_archive_is_replaced(tmp_path: Path, folder: Path, serve: Serve) -> None:
    put(folder, {ARCHIVE: records_archive(RECORDS)[:-30]})
    mirror = serve(Mirror({ARCHIVE: records_archive(RECORDS)}))

    test = load_dataset("tiny", "test", tmp_path, mirrors=[mirror.url])

    assert len(test.labels) == 3
    assert (folder / ARCHIVE).read_bytes() == mirror.files[ARCHIVE]


# Names and places


def test_an_unknown_name_is_answered_with_the_names_there_are(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"unknown data set 'mnits'; expected mnist, fashion-mnist, cifar-10, tiny"
    ):
        load_dataset("mnits", "train", tmp_path)


def test_an_unknown_split_is_answered_with_the_splits_there_are(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="unknown split 'dev' of mnist; expected train, test"):
        load_dataset("mnist", "dev", tmp_path)  # type: ignore[arg-type]


def test_the_data_directory_is_the_variables_if_it_says_something(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CGAN_DATA_DIR", str(tmp_path))
    assert default_data_dir() == tmp_path

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("CGAN_DATA_DIR", "~/data")
    assert default_data_dir() == tmp_path / "data"


def test_the_data_directory_is_the_users_cache_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CGAN_DATA_DIR", "")
    assert default_data_dir() == pooch.os_cache("cgan-service")

    monkeypatch.delenv("CGAN_DATA_DIR")
    assert default_data_dir() == pooch.os_cache("cgan-service")


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist", "cifar-10"])
def test_a_published_data_set_is_described_completely(name: str) -> None:
    spec = DATASETS[name]

    assert len(set(spec.class_names)) == 10
    assert len(spec.mirrors) == 2
    digests = list(spec.sha256.values())
    assert spec.sha256.keys() == {file for files in spec.files.values() for file in files}
    assert len(set(digests)) == len(digests)
    assert all(len(bytes.fromhex(digest)) == 32 for digest in digests)


# IDX


@settings(deadline=None)  # a busy machine is not a failure
@given(shape=st.lists(st.integers(0, 5), min_size=1, max_size=3), seed=st.integers(0, 9))
def test_idx_data_is_read_back_as_it_was_written(shape: list[int], seed: int) -> None:
    array = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)

    parsed = parse_idx(idx(array))

    assert parsed.dtype == np.uint8
    assert parsed.flags.writeable
    np.testing.assert_array_equal(parsed, array, strict=True)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (b"", "not IDX data: starts with nothing"),
        (b"\0\0\x08", "not IDX data: starts with 00 00 08"),
        (b"\x1f\x8b\x08\x03" + bytes(12), "not IDX data: starts with 1f 8b 08 03"),
        (b"\0\0\x0d\x01" + bytes(4), "IDX element type is 0x0d, expected 0x08"),
        (b"\0\0\x08\x00", "IDX data has 0 dimensions, expected 1 to 3"),
        (b"\0\0\x08\x04" + bytes(16), "IDX data has 4 dimensions, expected 1 to 3"),
        (IMAGE_BYTES[:15], "IDX header is truncated: 15 of 16 bytes"),
        (IMAGE_BYTES[:-1], "IDX header says 5 x 4 x 4 = 80 bytes, but 79 follow it"),
        (IMAGE_BYTES + b"\0", "IDX header says 5 x 4 x 4 = 80 bytes, but 81 follow it"),
        (b"\0\0\x08\x03" + b"\xff" * 12, "but 0 follow it"),
    ],
)
def test_data_that_is_not_idx_is_refused_with_what_was_found(wrong: bytes, message: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        parse_idx(wrong)

    assert message in str(caught.value)


# The real thing


def test_the_real_mnist_has_its_known_counts(mnist_dir: Path) -> None:
    mnist = load_dataset("mnist", "train", mnist_dir, mirrors=())

    assert mnist.images.shape == (60_000, 1, 28, 28)
    assert mnist.num_classes == 10
    counts = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert mnist.labels.bincount().tolist() == counts
    assert mnist.images.double().mean().item() / 255 == pytest.approx(0.1307, abs=5e-5)
