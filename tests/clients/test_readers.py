"""Libraries that read data sets of the service, each as its own documentation calls it.

A reader is right if every image has the label that its recipe names.
"""

import io
import json
import os
import shutil
import tarfile
import tomllib
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import httpx
import numpy as np
import pytest
from PIL import Image

from service.encoding.datasets import class_folders
from tests.conftest import ODD_CLASS_NAMES, make_artifact
from tests.support.processes import REPOSITORY
from tests.support.serving import serve_here
from tests.test_readme import plain, rows, section

Test = TypeVar("Test")
# Of these libraries and what they import; some leave files to the garbage collector.
pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
READ: set[tuple[str, str]] = set()  # the libraries that tests below read a format with
PER_CLASS = 4
LABELS = sorted(list(range(12)) * PER_CLASS)


def reads(library: str, form: str) -> Callable[[Test], Test]:
    """Note that a test reads a format with a library."""
    READ.add((library, form))
    return lambda test: test


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """Two models of twelve classes of odd names, in colour and in grey."""
    models = tmp_path_factory.mktemp("models")
    for name, channels in (("colour", 3), ("grey", 1)):
        make_artifact(models / f"{name}.safetensors", channels=channels, names=ODD_CLASS_NAMES)
    with serve_here("--models", str(models)) as service:
        yield service.client


def query(form: str, model: str = "colour", shard: str = "1of1") -> str:
    return f"/dataset?per_class={PER_CLASS}&seed=3&format={form}&model={model}&shard={shard}"


@pytest.fixture(scope="module")
def archive(client: httpx.Client, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("zip") / "set.zip"
    path.write_bytes(client.get(query("zip")).content)
    return path


@pytest.fixture(scope="module")
def folder(archive: Path) -> Path:
    with zipfile.ZipFile(archive) as opened:
        opened.extractall(archive.parent / "set")
    return archive.parent / "set"


@pytest.fixture(scope="module")
def truth(folder: Path) -> dict[bytes, int]:
    """The label of each image by its pixels, from its recipe."""
    found = {}
    for path in folder.rglob("*.png"):
        with Image.open(path) as image:
            found[np.asarray(image.convert("RGB")).tobytes()] = json.loads(image.info["Recipe"])
    assert len(found) == 12 * PER_CLASS
    return {pixels: recipe["label"] for pixels, recipe in found.items()}


Check = Callable[[Iterable[tuple[Any, Any]]], None]


@pytest.fixture
def check(truth: dict[bytes, int]) -> Check:
    """Check that samples are all images, each with its label."""

    def run(samples: Iterable[tuple[Any, Any]]) -> None:
        found = []
        for image, label in samples:
            pixels = np.asarray(image.convert("RGB") if isinstance(image, Image.Image) else image)
            assert truth[pixels.astype(np.uint8).tobytes()] == int(label)
            found.append(int(label))
        assert sorted(found) == LABELS

    return run


def serve_shards(client: httpx.Client, count: int = 2) -> list[str]:
    return [
        f"{client.base_url}{query('webdataset', shard=f'{number}of{count}')}"
        for number in range(1, count + 1)
    ]


def fetch_shards(client: httpx.Client, path: Path) -> None:
    for number in (1, 2):
        content = client.get(query("webdataset", shard=f"{number}of2")).content
        (path / f"set-shard-{number}of2.tar").write_bytes(content)


# Folders of PNGs ----------------------------------------------------------------------------------


@reads("torchvision", "zip")
def test_torchvision_reads_the_folders(torchvision: Any, folder: Path, check: Check) -> None:
    loaded = torchvision.datasets.ImageFolder(folder)
    assert loaded.classes == class_folders(ODD_CLASS_NAMES)
    check(loaded)


@reads("timm", "zip")
def test_timm_reads_the_folders(torchvision: Any, folder: Path, check: Check) -> None:
    data = pytest.importorskip("timm.data")
    check(data.create_dataset("", root=folder))


@reads("keras", "zip")
def test_keras_reads_the_folders(
    folder: Path, check: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("grain")
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    keras = pytest.importorskip("keras")
    loaded = keras.utils.image_dataset_from_directory(
        folder, image_size=(12, 12), batch_size=None, format="grain", verbose=False
    )
    assert loaded.class_names == class_folders(ODD_CLASS_NAMES)
    check(loaded)


@reads("datasets", "zip")
def test_datasets_reads_the_folders_with_one_split_of_all_files(
    folder: Path, check: Check, tmp_path: Path
) -> None:
    datasets = pytest.importorskip("datasets")
    loaded = datasets.load_dataset(
        "imagefolder", data_files={"train": f"{folder}/**"}, cache_dir=str(tmp_path)
    )
    assert loaded.keys() == {"train"}
    check((each["image"], each["label"]) for each in loaded["train"])


def test_datasets_loses_rows_where_a_class_is_called_like_a_split(
    folder: Path, tmp_path: Path
) -> None:
    """Why the page says to name the files."""
    datasets = pytest.importorskip("datasets")
    loaded = datasets.load_dataset("imagefolder", data_dir=str(folder), cache_dir=str(tmp_path))
    assert sum(len(split) for split in loaded.values()) < len(LABELS)


@pytest.mark.parametrize("argument", ["data_files", "data_dir"])
def test_datasets_reads_the_zip(archive: Path, check: Check, tmp_path: Path, argument: str) -> None:
    datasets = pytest.importorskip("datasets")
    shutil.copy(archive, tmp_path)
    value = tmp_path / archive.name if argument == "data_files" else tmp_path
    loaded = datasets.load_dataset(
        "imagefolder", **{argument: str(value)}, split="train", cache_dir=str(tmp_path / "cache")
    )
    assert set(loaded.column_names) == {"image", "label"}
    check((each["image"], each["label"]) for each in loaded)


def test_datasets_reads_the_shards_of_a_zip(
    client: httpx.Client, check: Check, tmp_path: Path
) -> None:
    datasets = pytest.importorskip("datasets")
    for number in (1, 2):
        content = client.get(query("zip", shard=f"{number}of2")).content
        (tmp_path / f"{number}.zip").write_bytes(content)
    loaded = datasets.load_dataset(
        "imagefolder", data_files=f"{tmp_path}/*.zip", split="train", cache_dir=str(tmp_path / "c")
    )
    check((each["image"], each["label"]) for each in loaded)


# Samples in tars ----------------------------------------------------------------------------------


@reads("webdataset", "webdataset")
@pytest.mark.parametrize("workers", [0, 2])
def test_webdataset_reads_shards_with_workers(
    client: httpx.Client, check: Check, tmp_path: Path, workers: int
) -> None:
    webdataset = pytest.importorskip("webdataset")
    data = pytest.importorskip("torch.utils.data")
    fetch_shards(client, tmp_path)
    shards = webdataset.WebDataset(f"{tmp_path}/set-shard-{{1..2}}of2.tar", shardshuffle=False)
    samples = shards.decode("rgb8").to_tuple("png", "cls")
    check(data.DataLoader(samples, batch_size=None, num_workers=workers))


@pytest.mark.skipif(shutil.which("curl") is None, reason="webdataset runs curl")
def test_webdataset_streams_shards_with_workers(client: httpx.Client, check: Check) -> None:
    webdataset = pytest.importorskip("webdataset")
    data = pytest.importorskip("torch.utils.data")
    samples = webdataset.WebDataset(serve_shards(client), shardshuffle=False)
    decoded = samples.decode("rgb8").to_tuple("png", "cls")
    check(data.DataLoader(decoded, batch_size=None, num_workers=2))


@reads("timm", "webdataset")
def test_timm_reads_shards(
    torchvision: Any, client: httpx.Client, check: Check, tmp_path: Path
) -> None:
    pytest.importorskip("webdataset")
    data = pytest.importorskip("timm.data")
    fetch_shards(client, tmp_path)
    (tmp_path / "_info.json").write_text("{}")
    split = f"set-shard-{{1..2}}of2.tar|{len(LABELS)}"
    check(data.create_dataset("wds/", root=str(tmp_path), split=split))


@reads("datasets", "webdataset")
@pytest.mark.parametrize("streaming", [False, True])
def test_datasets_reads_shards_by_url(
    client: httpx.Client, check: Check, tmp_path: Path, streaming: bool
) -> None:
    datasets = pytest.importorskip("datasets")
    loaded = datasets.load_dataset(
        "webdataset",
        data_files=serve_shards(client),
        split="train",
        streaming=streaming,
        cache_dir=str(tmp_path),
    )
    check((each["png"], each["cls"]) for each in loaded)


def test_datasets_streams_shards_into_workers(
    client: httpx.Client, check: Check, tmp_path: Path
) -> None:
    datasets = pytest.importorskip("datasets")
    data = pytest.importorskip("torch.utils.data")
    loaded = datasets.load_dataset(
        "webdataset",
        data_files=serve_shards(client),
        split="train",
        streaming=True,
        cache_dir=str(tmp_path),
    )
    loader = data.DataLoader(loaded, batch_size=None, num_workers=2)
    check((each["png"], each["cls"]) for each in loader)


@pytest.fixture(scope="module")
def locked_shards() -> Iterator[tuple[list[str], str]]:
    """The URLs of two shards, and the header without which they are 401."""
    with serve_here("--api-keys", "me:a-secret-of-16-characters") as service:
        address = f"{service.client.base_url}/dataset?per_class=3&seed=0&format=webdataset"
        assert service.client.get(address).status_code == 401
        shards = [f"{address}&shard={number}of2" for number in (1, 2)]
        yield shards, "Bearer a-secret-of-16-characters"


@pytest.mark.skipif(shutil.which("curl") is None, reason="webdataset runs curl")
def test_webdataset_streams_with_an_api_key(locked_shards: tuple[list[str], str]) -> None:
    webdataset = pytest.importorskip("webdataset")
    urls, key = locked_shards
    pipes = [f"pipe:curl -fsL -H 'Authorization: {key}' '{url}'" for url in urls]
    assert len(list(webdataset.WebDataset(pipes, shardshuffle=False))) == 30


def test_datasets_streams_with_an_api_key(
    locked_shards: tuple[list[str], str], tmp_path: Path
) -> None:
    datasets = pytest.importorskip("datasets")
    urls, key = locked_shards
    loaded = datasets.load_dataset(
        "webdataset",
        data_files=urls,
        split="train",
        streaming=True,
        storage_options={"http": {"headers": {"Authorization": key}}},
        cache_dir=str(tmp_path),
    )
    assert len(list(loaded)) == 30


# Arrays -------------------------------------------------------------------------------------------


@reads("numpy", "npz")
def test_numpy_reads_arrays(client: httpx.Client, check: Check) -> None:
    with np.load(io.BytesIO(client.get(query("npz")).content)) as arrays:
        check(zip(arrays["images"], arrays["labels"], strict=True))


@pytest.fixture
def files_of_mnist(client: httpx.Client, tmp_path: Path) -> Path:
    content = client.get(query("idx", "grey")).content
    with tarfile.open(fileobj=io.BytesIO(content)) as opened:
        opened.extractall(tmp_path, filter="data")
    return tmp_path


@pytest.fixture
def grey(client: httpx.Client) -> tuple[list[Any], list[int]]:
    with np.load(io.BytesIO(client.get(query("npz", "grey")).content)) as arrays:
        return arrays["images"][..., 0].tolist(), arrays["labels"].tolist()


@reads("python-mnist", "idx")
def test_python_mnist_reads_its_files(
    files_of_mnist: Path, grey: tuple[list[Any], list[int]]
) -> None:
    mnist = pytest.importorskip("mnist")
    images, labels = mnist.MNIST(str(files_of_mnist), return_type="numpy").load_training()
    assert images.reshape(-1, 12, 12).tolist() == grey[0]
    assert labels.tolist() == grey[1]


@reads("torchvision", "idx")
def test_torchvision_reads_files_of_mnist(
    torchvision: Any, files_of_mnist: Path, grey: tuple[list[Any], list[int]]
) -> None:
    """It looks for the files of the test set too, and does not read them."""
    raw = files_of_mnist / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name in ("images-idx3-ubyte", "labels-idx1-ubyte"):
        os.rename(files_of_mnist / f"train-{name}", raw / f"train-{name}")  # noqa: PTH104
        (raw / f"t10k-{name}").touch()
    loaded = torchvision.datasets.MNIST(files_of_mnist)
    assert loaded.data.tolist() == grey[0]
    assert loaded.targets.tolist() == grey[1]


# The page -----------------------------------------------------------------------------------------


def test_the_page_lists_these_readers_and_the_versions_that_are_installed_for_them() -> None:
    table = rows(section("service/README.md", "Readers"), "library")
    assert sorted((plain(library), plain(form)) for library, _, form, _ in table) == sorted(READ)
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    required = set(project["dependencies"]).union(*project["optional-dependencies"].values())
    for library, version, *_ in table:
        assert f"{plain(library)}{version}" in required
