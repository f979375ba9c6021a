import io
import json
import os
import shutil
import struct
import subprocess
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from service.encoding.datasets import MEDIA_TYPES, DatasetFormat, GeneratedDataset, class_folders
from service.encoding.layouts import lay_out
from tests.conftest import ODD_CLASS_NAMES, make_artifact
from tests.support.serving import LocalService, Service, ServiceProcess, serve_here
from tests.support.wire import wait_until
from training.data.named import parse_idx

FORMS: list[DatasetFormat] = list(MEDIA_TYPES)
PER_CLASS = 30  # more than one part of a download


@pytest.fixture(scope="module")
def files(service: Service) -> dict[str, bytes]:
    """A small set in every format."""
    return {form: fetch(service.client, form).content for form in FORMS}


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A service with a model of colour images and twelve classes of odd names."""
    path = tmp_path_factory.mktemp("models") / "odd.safetensors"
    make_artifact(path, channels=3, names=ODD_CLASS_NAMES)
    with serve_here("--models", str(path)) as service:
        yield service.client


def fetch(client: httpx.Client, form: str, **more: Any) -> httpx.Response:
    headers = more.pop("headers", {})
    parameters = {"per_class": PER_CLASS, "seed": 3, "format": form, **more}
    answer = client.get("/dataset", params=parameters, headers=headers)
    assert answer.is_success, answer.text
    return answer


def generated(client: httpx.Client, label: int, count: int) -> NDArray[np.uint8]:
    answer = client.post(f"/generate?label={label}&n={count}&seed=3&format=npz")
    with np.load(io.BytesIO(answer.content)) as arrays:
        images: NDArray[np.uint8] = arrays["images"]
        return images


def read_npz(content: bytes) -> dict[str, NDArray[Any]]:
    with np.load(io.BytesIO(content)) as arrays:
        return dict(arrays.items())


def extract(files: dict[str, bytes], form: str, folder: Path) -> Path:
    if form == "zip":
        with zipfile.ZipFile(io.BytesIO(files[form])) as opened:
            assert opened.testzip() is None
            opened.extractall(folder)
    else:
        with tarfile.open(fileobj=io.BytesIO(files[form])) as opened_tar:
            opened_tar.extractall(folder, filter="data")
    return folder


def test_numpy_reads_a_balanced_set_of_the_images_of_generate(
    client: httpx.Client, files: dict[str, bytes]
) -> None:
    arrays = read_npz(files["npz"])
    assert arrays["images"].shape == (10 * PER_CLASS, 28, 28, 1)
    assert arrays["seed"] == 3
    assert arrays["class_names"][7] == "seven"
    for label in (0, 7):
        mine = arrays["labels"] == label
        assert arrays["indices"][mine].tolist() == list(range(PER_CLASS))
        assert np.array_equal(arrays["images"][mine], generated(client, label, PER_CLASS))


def test_every_block_has_each_class_once_and_in_an_order_of_its_own(
    files: dict[str, bytes],
) -> None:
    blocks = read_npz(files["npz"])["labels"].reshape(-1, 10)
    assert (np.sort(blocks, axis=1) == np.arange(10)).all()
    assert len({tuple(block) for block in blocks.tolist()}) > PER_CLASS // 2


def test_the_formats_hold_the_same_images_in_the_same_order(
    files: dict[str, bytes], tmp_path: Path
) -> None:
    arrays = read_npz(files["npz"])
    extract(files, "idx", tmp_path)
    images = parse_idx((tmp_path / "train-images-idx3-ubyte").read_bytes())
    labels = parse_idx((tmp_path / "train-labels-idx1-ubyte").read_bytes())
    assert np.array_equal(images, arrays["images"][..., 0])
    assert np.array_equal(labels, arrays["labels"])
    with tarfile.open(fileobj=io.BytesIO(files["webdataset"])) as opened:
        names = opened.getnames()
    assert names[:3] == ["00000000.png", "00000000.cls", "00000001.png"]
    assert len(names) == 20 * PER_CLASS + 1


def test_a_plain_reader_of_mnist_reads_it(files: dict[str, bytes], tmp_path: Path) -> None:
    # As in the readers that people have written for LeCun's files.
    extract(files, "idx", tmp_path)
    with (tmp_path / "train-images-idx3-ubyte").open("rb") as file:
        magic, count, rows, columns = struct.unpack(">IIII", file.read(16))
        images = np.fromfile(file, dtype=np.uint8).reshape(count, rows, columns)
    with (tmp_path / "train-labels-idx1-ubyte").open("rb") as file:
        label_magic, label_count = struct.unpack(">II", file.read(8))
        labels = np.fromfile(file, dtype=np.uint8)
    assert (magic, label_magic) == (2051, 2049)
    assert images.shape == (count, 28, 28)
    assert label_count == count == len(labels)
    assert (tmp_path / "classes.txt").read_text().split()[7] == "seven"


# The library leaves its files to the garbage collector.
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_webdataset_reads_it(files: dict[str, bytes], tmp_path: Path) -> None:
    path = tmp_path / "set.tar"
    path.write_bytes(files["webdataset"])
    loaded = (
        webdataset.WebDataset(str(path), shardshuffle=False).decode("pil").to_tuple("png", "cls")
    )
    samples = [(np.asarray(image), label) for image, label in loaded]
    arrays = read_npz(files["npz"])
    assert [label for _, label in samples] == arrays["labels"].tolist()
    # Its decoder gives three channels.
    first = np.broadcast_to(arrays["images"][0], (28, 28, 3))
    assert np.array_equal(samples[0][0].reshape(28, 28, -1) * np.ones(3, np.uint8), first)


def test_image_folder_reads_it_and_numbers_the_classes_as_we_do(
    files: dict[str, bytes], tmp_path: Path
) -> None:
    # What torchvision.datasets.ImageFolder does: the classes are the folders in the order of their
    # names, and of each all files with the ending of an image.
    root = extract(files, "zip", tmp_path)
    classes = sorted(each.name for each in root.iterdir() if each.is_dir())
    assert [name.partition("-")[2] for name in classes] == (
        read_npz(files["npz"])["class_names"].tolist()
    )
    for label, name in enumerate(classes):
        paths = sorted((root / name).iterdir())
        assert len(paths) == PER_CLASS
        assert {path.suffix for path in paths} == {".png"}
        with Image.open(paths[2]) as image:
            assert image.convert("RGB").size == (28, 28)
            recipe = json.loads(image.info["Recipe"])
        assert (recipe["label"], recipe["index"], recipe["seed"]) == (label, 2, 3)


def test_a_file_of_it_is_verified(
    client: httpx.Client, files: dict[str, bytes], tmp_path: Path
) -> None:
    root = extract(files, "zip", tmp_path)
    png = (root / "7-seven" / "05.png").read_bytes()
    assert client.post("/verify", content=png).json()["same_pixels"]


@pytest.mark.parametrize("form", FORMS)
def test_length_and_number_of_images_are_announced(
    client: httpx.Client, files: dict[str, bytes], form: DatasetFormat
) -> None:
    head = client.head("/dataset", params={"per_class": PER_CLASS, "seed": 3, "format": form})
    assert head.headers["Content-Length"] == str(len(files[form]))
    assert head.headers["X-Images"] == str(10 * PER_CLASS)
    assert head.headers["Content-Type"] == MEDIA_TYPES[form]
    assert head.content == b""


@pytest.mark.parametrize("form", FORMS)
def test_any_range_is_that_part_of_the_file(
    client: httpx.Client, files: dict[str, bytes], form: DatasetFormat
) -> None:
    whole = files[form]

    @settings(max_examples=8, deadline=None)
    @given(st.integers(0, len(whole) - 1), st.integers(0, 5000))
    def check(start: int, length: int) -> None:
        stop = min(len(whole), start + length + 1)
        answer = fetch(client, form, headers={"Range": f"bytes={start}-{stop - 1}"})
        assert answer.status_code == 206
        assert answer.headers["Content-Range"] == f"bytes {start}-{stop - 1}/{len(whole)}"
        assert answer.content == whole[start:stop]

    check()
    tail = fetch(client, form, headers={"Range": "bytes=-777"})
    assert tail.content == whole[-777:]


def test_a_range_is_only_of_the_file_that_was_begun(
    client: httpx.Client, files: dict[str, bytes]
) -> None:
    tag = fetch(client, "idx", headers={"Range": "bytes=0-9"}).headers["ETag"]
    for condition, status in ((tag, 206), ('"another"', 200)):
        sent = {"Range": "bytes=5-9", "If-Range": condition}
        assert fetch(client, "idx", headers=sent).status_code == status
    for ignored in ("bytes=9-5", "bytes=0-1,5-6", "images=0-1", "bytes=-"):
        assert fetch(client, "idx", headers={"Range": ignored}).content == files["idx"]
    beyond = client.get(
        "/dataset?per_class=1&seed=3&format=idx", headers={"Range": "bytes=99999999-"}
    )
    assert beyond.status_code == 416
    assert beyond.headers["Content-Range"].startswith("bytes */")
    kept = client.get("/dataset?per_class=1&seed=3", headers={"If-None-Match": "*"})
    assert kept.status_code == 304


def test_without_a_seed_one_is_drawn_and_no_range_is_given(client: httpx.Client) -> None:
    answer = client.get("/dataset?per_class=1&format=npz", headers={"Range": "bytes=5-9"})
    assert answer.status_code == 200
    assert "ETag" not in answer.headers
    again = client.get(f"/dataset?per_class=1&format=npz&seed={answer.headers['X-Seed']}")
    assert again.content == answer.content


def test_a_set_may_begin_later(client: httpx.Client, files: dict[str, bytes]) -> None:
    whole = read_npz(files["npz"])
    rest = read_npz(fetch(client, "npz", start=100).content)
    for name in ("images", "labels", "indices"):
        assert np.array_equal(rest[name], whole[name][100:])
    content = fetch(client, "webdataset", start=100).content
    with tarfile.open(fileobj=io.BytesIO(content)) as opened:
        assert opened.getnames()[0] == "00000100.png"


def test_truncation_is_in_the_recipe(client: httpx.Client) -> None:
    content = fetch(client, "zip", per_class=1, truncation=0.5).content
    with zipfile.ZipFile(io.BytesIO(content)) as opened:
        png = opened.read("7-seven/0.png")
    with Image.open(io.BytesIO(png)) as image:
        pixels, recipe = np.asarray(image), json.loads(image.info["Recipe"])
    assert recipe["truncation"] == 0.5
    expected = client.post("/generate?label=7&seed=3&truncation=0.5").content
    with Image.open(io.BytesIO(expected)) as image:
        assert np.array_equal(pixels, np.asarray(image))


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("seed=1", "per_class"),
        ("per_class=0", "per_class"),
        ("per_class=1000001", "per_class"),
        ("per_class=1&format=jpg", "format"),
        ("per_class=1&start=3", "start"),
        ("per_class=1&start=10", "start"),
        ("per_class=1&truncation=2", "truncation"),
        ("per_class=1&shuffle=1", "shuffle"),
        ("per_class=3&seed=0&shard=4of3", "shard"),
        ("per_class=3&seed=0&shard=0of3", "shard"),
        ("per_class=3&seed=0&shard=1of4", "shard"),
        ("per_class=3&seed=0&shard=1of3&start=10", "shard"),
        ("per_class=3&seed=0&shard=1/3", "shard"),
        ("per_class=3&seed=0&shard=", "shard"),
        ("per_class=3&shard=1of3", "shard"),
        ("per_class=1&model=nobody", "model"),
    ],
)
def test_a_wrong_value_is_named(client: httpx.Client, query: str, field: str) -> None:
    answer = client.get(f"/dataset?{query}")
    assert answer.status_code == (404 if field == "model" else 422)
    assert [each["field"] for each in answer.json()["errors"]] == [field]


UNPACKERS = {
    "BusyBox": ["busybox", "unzip", "-q"],
    "Info-ZIP": ["unzip", "-q"],
    "bsdtar": ["bsdtar", "-xf"],
    "Python": [],
}


@pytest.mark.parametrize("name", UNPACKERS)
def test_every_unpacker_reads_a_zip_with_class_names_of_any_script(
    odd: httpx.Client, tmp_path: Path, name: str
) -> None:
    path = tmp_path / "set.zip"
    path.write_bytes(fetch(odd, "zip", per_class=3).content)
    command = UNPACKERS[name]
    with zipfile.ZipFile(path) as opened:
        assert opened.testzip() is None
        expected = {each: opened.read(each) for each in opened.namelist()}
    if command:
        if shutil.which(command[0]) is None:
            pytest.skip(f"needs {command[0]}")
        (tmp_path / "out").mkdir()
        subprocess.run(
            [*command, path],
            cwd=tmp_path / "out",
            check=True,
            env={**os.environ, "LC_ALL": "C.UTF-8"},
        )
        found = (tmp_path / "out").rglob("*.*")
        files = {str(each.relative_to(tmp_path / "out")): each for each in found if each.is_file()}
        assert {each: file.read_bytes() for each, file in files.items()} == expected
    folders = sorted({each.partition("/")[0] for each in expected if each.endswith(".png")})
    assert folders == class_folders(ODD_CLASS_NAMES)
    assert folders[8:10] == ["08-é", "09-हिन्दी"]


def test_a_folder_name_is_safe_on_every_file_system() -> None:
    names = ["a/b", "..", "c d", "é", "e\u0301", "a\\b:c*?", "\u202egnp.", "x" * 200, "熊" * 200]
    folders = class_folders(names)
    assert folders[:6] == ["0-a_b", "1-..", "2-c_d", "3-é", "4-e\u0301", "5-a_b_c_"]
    assert folders[6] == "6-_gnp."
    assert max(len(each.encode()) for each in folders) < 128


@pytest.mark.parametrize("form", ["zip", "webdataset", "npz"])
def test_every_format_names_the_classes_in_a_file(odd: httpx.Client, form: str) -> None:
    names = list(ODD_CLASS_NAMES)
    content = fetch(odd, form, per_class=3).content
    if form == "npz":
        arrays = read_npz(content)
        assert arrays["images"].shape == (36, 12, 12, 3)
        assert arrays["class_names"].tolist() == names
        return
    if form == "zip":
        with zipfile.ZipFile(io.BytesIO(content)) as opened:
            text = opened.read("classes.txt")
    else:
        with tarfile.open(fileobj=io.BytesIO(content)) as opened_tar:
            file = opened_tar.extractfile("__classes__")
            assert file is not None
            text = file.read()
    lines = text.decode().removesuffix("\n").split("\n")
    assert lines == [*names[:-1], "two lines"]


def test_a_zip_lists_its_files_with_their_labels(files: dict[str, bytes]) -> None:
    with zipfile.ZipFile(io.BytesIO(files["zip"])) as opened:
        rows = opened.read("metadata.csv").decode().splitlines()
        names = opened.namelist()
    assert rows[0] == "file_name,label"
    assert [row.partition(",")[0] for row in rows[1:]] == names[:-2]
    for row in rows[1:]:
        name, label = row.split(",")
        assert name.startswith(f"{label}-")
    assert names[-2:] == ["metadata.csv", "classes.txt"]


def test_files_of_mnist_are_refused_for_what_their_readers_cannot_read(
    odd: httpx.Client, tmp_path: Path
) -> None:
    answer = odd.get("/dataset?per_class=1&format=idx")
    assert answer.status_code == 422
    (error,) = answer.json()["errors"]
    assert error["field"] == "format"
    assert error["message"] == (
        "holds grey images, and odd makes colour images; take format=npz for arrays or format=zip "
        "for files"
    )
    make_artifact(tmp_path / "many.safetensors", names=tuple(map(str, range(257))))
    with serve_here("--models", str(tmp_path)) as service:
        answer = service.client.get("/dataset?per_class=1&format=idx")
        assert answer.status_code == 422
        assert "at most 256 classes, and many has 257" in answer.text


# Shards -------------------------------------------------------------------------------------------


def test_the_shards_are_the_set_in_its_order(client: httpx.Client, files: dict[str, bytes]) -> None:
    whole = read_npz(files["npz"])
    shards = [fetch(client, "npz", shard=f"{number}of7") for number in range(1, 8)]
    assert [int(each.headers["X-Images"]) for each in shards] == [40, 40, 40, 50, 40, 40, 50]
    arrays = [read_npz(each.content) for each in shards]
    for name in ("images", "labels", "indices"):
        assert np.array_equal(np.concatenate([each[name] for each in arrays]), whole[name])
    assert len({each.headers["ETag"] for each in shards}) == 7
    assert fetch(client, "npz", shard="1of1").content == files["npz"]


@pytest.mark.parametrize("form", ["zip", "webdataset"])
def test_a_shard_holds_the_same_files_as_the_whole_set(
    client: httpx.Client, files: dict[str, bytes], form: str
) -> None:
    whole = members(files[form], form)
    shards = [members(fetch(client, form, shard=f"{at}of2").content, form) for at in (1, 2)]
    images = [{name for name in each if name.endswith(".png")} for each in (whole, *shards)]
    assert images[1] | images[2] == images[0]
    assert not images[1] & images[2]
    for shard, names in zip(shards, images[1:], strict=True):
        assert all(shard[name] == whole[name] for name in names)


def members(content: bytes, form: str) -> dict[str, bytes]:
    if form == "zip":
        with zipfile.ZipFile(io.BytesIO(content)) as opened:
            return {name: opened.read(name) for name in opened.namelist()}
    with tarfile.open(fileobj=io.BytesIO(content)) as opened_tar:
        found = ((each.name, opened_tar.extractfile(each)) for each in opened_tar)
        return {name: file.read() for name, file in found if file is not None}


@pytest.mark.parametrize("form", FORMS)
def test_a_shard_resumes_and_announces_its_length(client: httpx.Client, form: str) -> None:
    whole = fetch(client, form, shard="2of3", start=60)
    content, tag = whole.content, whole.headers["ETag"]
    assert whole.headers["Content-Length"] == str(len(content))
    sent = {"Range": f"bytes={len(content) // 3}-", "If-Range": tag}
    rest = fetch(client, form, shard="2of3", start=60, headers=sent)
    assert rest.content == content[len(content) // 3 :]
    other = fetch(client, form, shard="3of3", start=60, headers=sent)
    assert other.status_code == 200  # the tag is that of another shard


def test_the_layout_of_ten_million_images_is_known_without_making_them(
    service: LocalService,
) -> None:
    dataset = GeneratedDataset(service.repository.default, 0, 0, 1_000_000)
    for form in MEDIA_TYPES:
        layout = lay_out(dataset, form)
        assert layout.length > 7_840_000_000
        last = next(layout.ranges(layout.length - 1, layout.length, 25))
        assert layout.seekable == (last.offset > 0)


def test_a_small_request_is_answered_between_the_parts_of_a_large_set(
    client: httpx.Client,
) -> None:
    with client.stream("GET", "/dataset?per_class=2000&seed=1&format=idx") as stream:
        blocks = stream.iter_raw()
        received = len(next(blocks))
        for _ in range(5):
            assert client.post("/generate?label=7").status_code == 200
        assert received < int(stream.headers["Content-Length"])


def test_a_client_that_disconnects_ends_it(client: httpx.Client) -> None:
    def waiting() -> float:
        text = client.get("/metrics").text
        return sum(
            float(line.split()[-1])
            for line in text.splitlines()
            if line.startswith(("cgan_queue_images ", "cgan_requests_in_progress "))
        )

    with client.stream("GET", "/dataset?per_class=1000000&seed=1&format=webdataset") as stream:
        next(stream.iter_raw())
    wait_until(lambda: waiting() == 0.0, "the end of the set")


def test_a_key_over_its_limit_waits_in_the_middle_of_a_set() -> None:
    with serve_here(
        "--api-keys",
        "me:a-secret-of-16-characters",
        "--images-per-second",
        "200",
        "--burst-images",
        "100",
    ) as service:
        service.client.headers["Authorization"] = "Bearer a-secret-of-16-characters"
        answer = fetch(service.client, "npz", per_class=20)
        assert len(read_npz(answer.content)["images"]) == 200


def test_a_set_that_cannot_be_completed_is_cut_off() -> None:
    """As by SIGTERM: what is half sent looks like nothing else."""

    def read(service: ServiceProcess) -> None:
        query = "per_class=1000000&seed=1&format=idx"
        with service.client.stream("GET", f"/dataset?{query}") as stream:
            for count, _ in enumerate(stream.iter_raw()):
                if count == 3:
                    service.signal()

    with ServiceProcess() as service:
        with pytest.raises(httpx.RemoteProtocolError):
            read(service)
        assert service.wait() == 0
    assert any("a data set was cut off" in line for line in service.errors)
    assert not any("traceback" in line for line in service.errors)
