"""Imported generators give the images of the programs that trained them; other files are refused.

The networks of these programs are written here again, after their definitions and without this
project's own, so that an importer that misreads them fails its test.
"""

import gzip
import hashlib
import io
import os
import pickle
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import onnx
import pytest
import safetensors.torch
import torch
from click.testing import CliRunner, Result
from torch import Tensor, nn

import training.__main__ as command_line
from service.inference.engine import Engine
from tests.support.malicious_files import Payload, torch_saved
from training import conversion, importing
from training.artifact import MAX_BYTES, ArtifactInfo
from training.data import named as data
from training.data.named import DATASETS, DatasetSpec
from training.importing import ForeignCheckpointError, load_foreign
from training.loading import load_artifact
from training.quality.certificate import read_certificate
from training.saving import save_artifact

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
MNIST = DATASETS["mnist"].class_names
NAMES = tuple(f"kind {letter}" for letter in "abcdefghij")
StateDict = dict[str, Tensor]
Network = TypeVar("Network", bound=nn.Module)


def perceptron(inputs: int, pixels: int, eps: float) -> nn.Sequential:
    return nn.Sequential(
        *(nn.Linear(inputs, 128), nn.LeakyReLU(0.2)),
        *(nn.Linear(128, 256), nn.BatchNorm1d(256, eps), nn.LeakyReLU(0.2)),
        *(nn.Linear(256, 512), nn.BatchNorm1d(512, eps), nn.LeakyReLU(0.2)),
        *(nn.Linear(512, 1024), nn.BatchNorm1d(1024, eps), nn.LeakyReLU(0.2)),
        *(nn.Linear(1024, pixels), nn.Tanh()),
    )


class CganPytorch(nn.Module):
    """Lornatang/CGAN-PyTorch: latents first, PyTorch's own eps, embeddings as long as classes."""

    def __init__(self, image_size: int = 28, channels: int = 1, classes: int = 10) -> None:
        super().__init__()
        self.shape = (channels, image_size, image_size)
        self.label_embedding = nn.Embedding(classes, classes)
        self.main = perceptron(100 + classes, channels * image_size**2, 1e-5)

    def forward(self, noise: Tensor, labels: Tensor) -> Tensor:
        x: Tensor = self.main(torch.cat([noise, self.label_embedding(labels)], dim=-1))
        return x.reshape(-1, *self.shape)


class PytorchGan(nn.Module):
    """eriklindernoren/PyTorch-GAN: embeddings first, and an eps of 0.8."""

    def __init__(self, image_size: int = 32, channels: int = 1, classes: int = 10) -> None:
        super().__init__()
        self.shape = (channels, image_size, image_size)
        self.label_emb = nn.Embedding(classes, classes)
        self.model = perceptron(classes + 100, channels * image_size**2, 0.8)

    def forward(self, noise: Tensor, labels: Tensor) -> Tensor:
        x: Tensor = self.model(torch.cat((self.label_emb(labels), noise), -1))
        return x.view(-1, *self.shape)


def trained(network: Network) -> Network:
    """As if trained: no parameter or statistic keeps a neutral value."""
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if name.endswith("running_var"):
                tensor.uniform_(0.02, 2.0, generator=rng)
            elif tensor.is_floating_point():
                tensor.add_(0.1 * torch.randn(tensor.shape, generator=rng))
    return network.eval()


@pytest.fixture(scope="module")
def published() -> CganPytorch:
    return trained(CganPytorch())


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "GAN-last.pth"


@pytest.fixture
def checkpoint(path: Path, published: CganPytorch) -> Path:
    """A generator's checkpoint as it is published."""
    torch.save(published.state_dict(), path)
    return path


def assert_same_images(path: Path, published: nn.Module, classes: int = 10) -> None:
    ours, _ = load_foreign(path)
    latents = torch.randn(40, 100, generator=torch.Generator().manual_seed(2))
    labels = torch.arange(40) % classes
    with torch.inference_mode():
        expected = published(latents, labels)
        made = ours(latents, labels)
    assert expected.std() > 0.1  # grey images would agree whatever the network is
    torch.testing.assert_close(made, expected, atol=1e-5, rtol=0)


# What is published comes out


def test_an_imported_generator_makes_the_published_ones_images(
    checkpoint: Path, published: CganPytorch
) -> None:
    assert_same_images(checkpoint, published)
    generator, _ = load_foreign(checkpoint)
    assert not any(module.training for module in generator.modules())


def test_its_weights_are_taken_over_bit_by_bit(checkpoint: Path, published: CganPytorch) -> None:
    ours, _ = load_foreign(checkpoint)
    for name, tensor in published.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor), name


def test_labels_before_latents_and_another_eps_are_converted(path: Path) -> None:
    published = trained(PytorchGan())
    torch.save(published.state_dict(), path)
    assert_same_images(path, published)
    _, info = load_foreign(path)
    assert info.training["layout"] == "eriklindernoren/PyTorch-GAN"


@pytest.mark.parametrize(("size", "channels", "classes"), [(32, 3, 10), (8, 1, 3), (28, 1, 26)])
def test_the_shapes_determine_the_configuration(
    path: Path, size: int, channels: int, classes: int
) -> None:
    published = trained(CganPytorch(size, channels, classes))
    torch.save(published.state_dict(), path)
    assert_same_images(path, published, classes)
    network = load_foreign(path)[0].config
    assert (network.image_size, network.channels, network.num_classes) == (size, channels, classes)
    assert (network.latent_dim, network.embedding_dim) == (100, classes)
    assert network.hidden == (128, 256, 512, 1024)


WAYS_TO_SAVE: dict[str, Callable[[Mapping[str, Tensor]], object]] = {
    "DataParallel": lambda it: OrderedDict((f"module.{k}", v) for k, v in it.items()),
    "layers": lambda it: {k.replace("main.", "layers."): v for k, v in it.items()},
    "wrapped": lambda it: {"epoch": 7, "generator": it, "optimizer": {"lr": 2e-4}},
    "wrapped DataParallel": lambda it: {"state_dict": {f"module.{k}": v for k, v in it.items()}},
    "with a discriminator": lambda it: {"ema_state_dict": it, "discriminator": it},
    "parameters": lambda it: {
        k: v.clone().requires_grad_(v.dtype.is_floating_point) for k, v in it.items()
    },
}


@pytest.mark.parametrize("way", WAYS_TO_SAVE)
def test_however_it_was_saved_it_is_the_same(
    checkpoint: Path, published: CganPytorch, way: str
) -> None:
    torch.save(WAYS_TO_SAVE[way](published.state_dict()), checkpoint)
    assert_same_images(checkpoint, published)


def test_the_older_format_of_torch_save_is_read_too(path: Path, published: CganPytorch) -> None:
    torch.save(published.state_dict(), path, _use_new_zipfile_serialization=False)
    assert path.read_bytes()[:1] == b"\x80"
    assert_same_images(path, published)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_becomes_single_precision(path: Path, dtype: torch.dtype) -> None:
    published = trained(CganPytorch()).to(dtype)
    torch.save(published.state_dict(), path)
    assert_same_images(path, published.float())
    generator, _ = load_foreign(path)
    dtypes = {p.dtype for p in generator.parameters()}
    assert dtypes == {torch.float32}


# Refusals


def refusal(path: Path) -> str:
    with pytest.raises(ForeignCheckpointError) as caught:
        load_foreign(path)
    assert (caught.value.path, str(caught.value)) == (path, f"{path}: {caught.value.cause}")
    assert "\n" not in caught.value.cause
    return caught.value.cause


Edit = Callable[[StateDict], object]


def put(name: str, tensor: Tensor) -> Edit:
    return lambda it: it.update({name: tensor})


def spoil(name: str, value: float) -> Edit:
    def edit(tensors: StateDict) -> None:
        tensors[name].view(-1)[-1] = value

    return edit


NOT_FINITE = "holds values that are not finite"
WRONG_TENSORS: list[tuple[Edit, str]] = [
    (lambda it: it.pop("main.11.bias"), "the tensor 'main.11.bias' is missing"),
    (lambda it: it.pop("main.5.weight"), "the tensor 'main.5.weight' is missing"),
    (lambda it: it.pop("main.3.running_mean"), "the tensor 'main.3.running_mean' is missing"),
    (lambda it: it.pop("label_embedding.weight"), "the tensor 'label_embedding.weight' is missing"),
    (put("extra", torch.zeros(1)), "the tensor 'extra' does not belong to a generator"),
    (put("layers.0.bias", torch.zeros(128)), "the tensor 'layers.0.bias' does not belong"),
    (put("main.0.bias", torch.zeros(129)), "main.0.bias: shape is [129], expected [128]"),
    (
        put("main.5.weight", torch.zeros(512, 255)),
        "main.5.weight: shape is [512, 255], expected [512, 256]",
    ),
    (
        put("label_embedding.weight", torch.zeros(10)),
        "label_embedding.weight: shape is [10], expected 2 dimensions",
    ),
    (
        put("label_embedding.weight", torch.zeros(10, 110)),
        "its shapes imply latent_dim = 0: Input should be greater than or equal to 1",
    ),
    (
        put("main.11.weight", torch.zeros(785, 1024)),
        "main.11.weight: has 785 outputs, expected a square grey or RGB image",
    ),
    (
        put("main.11.weight", torch.zeros(4, 1024)),
        "its shapes imply image_size = 2: Input should be greater than or equal to 4",
    ),
    (spoil("main.0.weight", float("nan")), f"main.0.weight: {NOT_FINITE}"),
    (spoil("main.11.bias", float("inf")), f"main.11.bias: {NOT_FINITE}"),
    (spoil("main.6.running_var", -1e-3), "main.6.running_var: holds negative variances"),
    (
        put("main.0.bias", torch.zeros(128).double()),
        "main.0.bias: dtype is torch.float64, expected torch.float32 or torch.float16",
    ),
    (
        put("main.3.num_batches_tracked", torch.tensor(1.0)),
        "main.3.num_batches_tracked: dtype is torch.float32, expected torch.int64",
    ),
    (put("main.0.bias", torch.zeros(128).to_sparse()), "main.0.bias: is sparse or has no values"),
    (put("main.0.bias", torch.zeros(128, device="meta")), "main.0.bias: is sparse or has no"),
    (
        put("main.0.weight", torch.zeros(1).expand(10**6, 10**6)),  # four bytes in the file
        "its tensors are 40000",
    ),
]


@pytest.mark.parametrize(("edit", "cause"), WRONG_TENSORS, ids=[c for _, c in WRONG_TENSORS])
def test_the_first_tensor_that_is_wrong_is_named(
    path: Path, published: CganPytorch, edit: Edit, cause: str
) -> None:
    tensors = {name: tensor.clone() for name, tensor in published.state_dict().items()}
    edit(tensors)
    torch.save(tensors, path)
    assert refusal(path).startswith(cause)


def test_a_discriminator_is_not_taken_for_a_generator(path: Path) -> None:
    layers = [nn.Linear(794, 512), nn.LeakyReLU(), nn.Linear(512, 256), nn.LeakyReLU()]
    discriminator = nn.Module()
    discriminator.label_embedding = nn.Embedding(10, 10)
    discriminator.main = nn.Sequential(*layers, nn.Linear(256, 1), nn.Sigmoid())
    torch.save(discriminator.state_dict(), path)
    assert refusal(path).endswith("expected a square grey or RGB image (a discriminator?)")


def test_the_perceptron_of_the_first_commits_is_another_network(path: Path) -> None:
    """It had neither batch norm nor leaky activations."""
    first = nn.Module()
    first.label_embedding = nn.Embedding(10, 10)
    first.main = nn.Sequential(
        *(nn.Linear(110, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU()),
        *(nn.Linear(256, 784), nn.Tanh()),
    )
    torch.save(first.state_dict(), path)
    assert refusal(path) == "the tensor 'main.3.weight' is missing"


@pytest.mark.parametrize(
    ("contents", "cause"),
    [
        ({}, "is not a state dict and has none under ema_state_dict, ema, generator"),
        ([1, 2], "is not a state dict"),
        ({"epoch": 3, "weights": {"a": torch.zeros(1)}}, "is not a state dict"),
        ({0: torch.zeros(1)}, "is not a state dict"),
        (
            {"generator": {"a": torch.zeros(1)}, "ema": {"a": torch.zeros(1)}},
            "holds several networks: ema, generator",
        ),
        ({"label_embedding.weight": torch.zeros(10, 10)}, "has 0 linear layers under 'main'"),
    ],
    ids=["empty", "list", "elsewhere", "numbered", "several", "embedding"],
)
def test_what_holds_no_generator_is_refused(path: Path, contents: object, cause: str) -> None:
    torch.save(contents, path)
    assert refusal(path).startswith(cause)


@pytest.mark.parametrize("save", [torch_saved, pickle.dumps], ids=["zip", "pickle"])
def test_nothing_in_a_checkpoint_is_executed(
    path: Path, tmp_path: Path, save: Callable[[object], bytes]
) -> None:
    trace = tmp_path / "trace"
    pickle.loads(pickle.dumps(Payload(trace)))  # the payload works
    trace.rmdir()
    path.write_bytes(save({"main.0.weight": torch.zeros(3), "payload": Payload(trace)}))

    assert refusal(path).endswith("nothing in it was executed")

    assert not trace.exists()


@pytest.mark.parametrize("kept", [2, 10, 1000, -1000, -1])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "older"])
def test_a_file_cut_short_is_refused(
    path: Path, published: CganPytorch, kept: int, zipped: bool
) -> None:
    torch.save(published.state_dict(), path, _use_new_zipfile_serialization=zipped)
    path.write_bytes(path.read_bytes()[:kept])
    assert refusal(path).startswith("is damaged")


def onnx_model() -> bytes:
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    graph = onnx.helper.make_graph([], "nothing", [value], [value])
    content: bytes = onnx.helper.make_model(graph).SerializeToString()
    return content


def zipped(*names: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in names:
            archive.writestr(name, "content")
    return buffer.getvalue()


def torchscript() -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # people still have such files
        torch.jit.save(torch.jit.script(nn.Linear(2, 2)), buffer)
    return buffer.getvalue()


def numpy_arrays() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, np.zeros(2))
    return buffer.getvalue()


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 6062080\n"
OTHER_KINDS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is an empty file"),
    "text": (b"hello", "is of an unknown kind"),
    "Git LFS": (POINTER, "is a Git LFS pointer instead of the file itself; fetch the file with"),
    "page": (b"\n<!DOCTYPE html><html>404", "is an HTML page, probably the answer of a failed"),
    "answer": (b'{"error": "Entry not found"}', "is JSON text"),
    "Keras": (
        zipped("metadata.json", "config.json", "model.weights.h5"),
        "is a Keras model",
    ),
    "HDF5": (b"\x89HDF\r\n\x1a\n" + bytes(100), "is an HDF5 file, such as a Keras model of .h5"),
    "ONNX": (onnx_model(), "is an ONNX model"),
    "SavedModel": (b"\x08\x01\x12\x80\x01" + bytes(128), "is a TensorFlow SavedModel"),
    "TorchScript": (torchscript(), "is a TorchScript model"),
    "zip": (zipped("generator.pth"), "is a zip archive; unpack it first"),
    "NumPy": (numpy_arrays(), "is a file of NumPy arrays"),
    "gzip": (gzip.compress(b"generator"), "is a gzip archive; unpack it first"),
}


@pytest.mark.parametrize(("content", "kind"), OTHER_KINDS.values(), ids=OTHER_KINDS)
def test_a_file_of_another_kind_is_named_with_what_is_expected(
    path: Path, content: bytes, kind: str
) -> None:
    path.write_bytes(content)
    cause = refusal(path)
    assert cause.startswith(kind)
    assert "expected the state dict of a generator, as CGAN-PyTorch" in cause


def test_a_pickled_network_is_refused_with_what_to_save_instead(path: Path) -> None:
    for zipped in (True, False):
        torch.save(nn.Linear(2, 2), path, _use_new_zipfile_serialization=zipped)
        cause = refusal(path)
        assert cause.startswith("holds an object of torch.nn.modules.linear.Linear, not only")
        assert "torch.save(generator.state_dict(), FILE)" in cause


def test_a_network_of_another_layout_is_named_by_its_tensors(path: Path) -> None:
    tensors = {"conv1.weight": torch.zeros(8, 1, 3, 3), "conv1.bias": torch.zeros(8)}
    torch.save(tensors, path)
    cause = refusal(path)
    assert "the file holds conv1.weight [8, 1, 3, 3], conv1.bias [8]; expected the" in cause


def test_tensors_in_a_safetensors_file_are_read_too(path: Path, published: CganPytorch) -> None:
    path.write_bytes(safetensors.torch.save(published.state_dict()))
    assert_same_images(path, published)
    path.write_bytes(safetensors.torch.save({"conv1.bias": torch.zeros(8)}))
    assert "the file holds conv1.bias [8]" in refusal(path)


def test_an_artifact_needs_no_import(bundled: Path) -> None:
    assert refusal(bundled) == "is an artifact already; serve it as it is"


def test_a_file_that_is_none_is_named(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert refusal(tmp_path) == "is a folder, not a file"
    assert refusal(tmp_path / "pipe") == "is not a regular file"
    assert refusal(tmp_path / "none") == "cannot be read: No such file or directory"


def test_a_file_far_too_large_is_refused_before_it_is_read(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(MAX_BYTES + 1)  # a hole; it takes no room on the disk
    assert refusal(path) == "is 1073741825 bytes long; at most 1073741824 are allowed"


def test_a_file_that_grows_when_it_is_unpacked_is_refused(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importing, "MAX_BYTES", 1 << 20)
    plain = zipfile.ZipFile(io.BytesIO(torch_saved({"a": torch.zeros(1 << 20)})))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    assert path.stat().st_size < 1 << 14
    assert refusal(path).startswith("its unpacked content is 4")


# What the artifact says


def test_the_artifact_says_where_it_is_from_and_what_is_not_known(checkpoint: Path) -> None:
    _, info = load_foreign(checkpoint, dataset="mnist")
    assert info.class_names == MNIST
    assert info.training == {
        "dataset": "mnist",
        "imported_from": "GAN-last.pth",
        "imported_sha256": hashlib.sha256(checkpoint.read_bytes()).hexdigest(),
        "layout": "Lornatang/CGAN-PyTorch",
        "images_seen": None,
    }
    assert (info.images_seen, info.source_commit, info.certificate) == (0, None, None)


def test_the_data_set_names_the_classes(checkpoint: Path) -> None:
    _, info = load_foreign(checkpoint, dataset="fashion-mnist")
    assert info.class_names == DATASETS["fashion-mnist"].class_names
    assert info.training["dataset"] == "fashion-mnist"


def test_given_names_are_those_of_the_classes(checkpoint: Path) -> None:
    _, info = load_foreign(checkpoint, class_names=NAMES, dataset="mnist")
    assert info.class_names == NAMES
    assert info.training["dataset"] == "mnist"


@pytest.mark.parametrize(("size", "channels", "classes"), [(28, 1, 10), (32, 1, 10), (28, 3, 4)])
def test_classes_without_names_are_numbered(
    path: Path, size: int, channels: int, classes: int
) -> None:
    torch.save(CganPytorch(size, channels, classes).state_dict(), path)
    _, info = load_foreign(path)
    assert info.class_names == tuple(map(str, range(classes)))
    assert "dataset" not in info.training


def test_a_file_whose_name_is_no_text_is_imported(tmp_path: Path, checkpoint: Path) -> None:
    odd = checkpoint.rename(tmp_path / os.fsdecode(b"\xe9.pth"))
    out = tmp_path / "a.safetensors"
    save_artifact(out, *load_foreign(odd))
    assert load_artifact(out).info.training["imported_from"] == "?.pth"


# The command


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "digits.safetensors"


def invoke(*arguments: str | Path) -> Result:
    result = CliRunner().invoke(command_line.main, ["import", *map(str, arguments)])
    expected = result.exception is None or isinstance(result.exception, SystemExit)
    assert expected, result.exception  # a traceback for whoever typed it
    return result


def test_an_imported_artifact_is_served(
    checkpoint: Path, out: Path, published: CganPytorch
) -> None:
    result = invoke(checkpoint, "--out", out, "--no-certify")
    assert result.exit_code == 0, result.output
    artifact = load_artifact(out)
    assert artifact.sha256 in result.stdout

    first, second = (
        Engine(artifact, device="cpu", dtype="float32", max_batch=16) for _ in range(2)
    )
    order = (np.arange(16, dtype=np.uint64), np.arange(16), np.arange(16) % 10)
    assert np.array_equal(first(*order), second(*order))


def test_classes_are_named_by_the_user_or_by_number(checkpoint: Path, tmp_path: Path) -> None:
    listed = tmp_path / "names.txt"
    listed.write_text("\n".join(NAMES) + "\n")
    expected = {"none": tuple("0123456789"), "given": NAMES, "listed": NAMES}
    options = {"none": (), "given": ("--classes", ",".join(NAMES)), "listed": ("--classes", listed)}
    for case, names in expected.items():
        result = invoke(checkpoint, "--out", tmp_path / f"{case}.safetensors", *options[case])
        assert result.exit_code == 0, result.output
        assert f"Classes: {', '.join(names)}\n" in result.stdout
        assert ("Name the classes with --classes" in result.stdout) == (case == "none")
        assert load_artifact(tmp_path / f"{case}.safetensors").info.class_names == names


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--classes", "cat,dog"), "--classes: 2 class names for 10 classes"),
        (("--classes", "0,1,2,3,4,5,6,7,8,8"), "--classes: class names repeat: '8'"),
        (("--classes", "0,1,,3"), "the name of class 2 has 0 characters, expected 1 to 200"),
        (("--certify",), "--certify needs --dataset, the images to compare with"),
    ],
)
def test_names_that_do_not_fit_are_refused(
    checkpoint: Path, out: Path, options: tuple[str, ...], said: str
) -> None:
    result = invoke(checkpoint, "--out", out, *options)
    assert result.exit_code == 2
    assert said in result.stderr
    assert not out.exists()


def test_importing_twice_gives_the_same_file(checkpoint: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        invoke(checkpoint, "--out", tmp_path / f"{name}.safetensors", "--no-certify")
    first, second = ((tmp_path / f"{name}.safetensors").read_bytes() for name in "ab")
    assert first == second


def test_the_certificate_is_written_with_the_artifact(
    checkpoint: Path, out: Path, bundled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificate = read_certificate(load_artifact(bundled).info)
    asked: list[dict[str, Any]] = []

    def certify(
        path: Path, generator: nn.Module, info: ArtifactInfo, dataset: str, **options: Any
    ) -> Any:
        asked.append({**options, "path": path, "dataset": dataset})
        return certificate

    monkeypatch.setattr(conversion, "certify_artifact", certify)
    result = invoke(checkpoint, "--out", out, "--dataset", "mnist", "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert asked == [{"path": checkpoint, "dataset": "mnist", "device": "cpu", "data_dir": None}]
    assert read_certificate(load_artifact(out).info) == certificate


def test_without_the_data_set_nothing_is_written_and_the_way_out_is_named(
    checkpoint: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offline = replace(DATASETS["mnist"], mirrors=())
    monkeypatch.setitem(cast("dict[str, DatasetSpec]", data.DATASETS), "mnist", offline)

    result = invoke(
        *(checkpoint, "--out", out, "--dataset", "mnist"),
        *("--device", "cpu", "--data-dir", tmp_path / "none"),
    )

    assert result.exit_code == 1
    assert "cannot load train-images-idx3-ubyte" in result.stderr
    assert "--no-certify" in result.stderr
    assert sorted(tmp_path.iterdir()) == [checkpoint]


def test_images_of_another_shape_than_the_data_sets_cannot_be_certified(
    path: Path, out: Path
) -> None:
    torch.save(PytorchGan().state_dict(), path)
    result = invoke(path, "--out", out, "--dataset", "mnist", "--device", "cpu")
    assert result.exit_code == 1
    assert f"{path}: generates images of 32x32x1 in 10 classes, unlike mnist" in result.stderr
    assert "--no-certify" in result.stderr
    assert not out.exists()


def test_an_artifact_that_is_there_already_is_left_alone(checkpoint: Path, out: Path) -> None:
    out.write_bytes(b"precious")
    result = invoke(checkpoint, "--out", out, "--no-certify")
    assert result.exit_code == 2
    assert f"{out} already exists" in result.stderr
    assert out.read_bytes() == b"precious"


def test_an_artifact_that_the_service_would_not_find_is_not_written(
    checkpoint: Path, tmp_path: Path
) -> None:
    result = invoke(checkpoint, "--out", tmp_path / "digits.pth", "--no-certify")
    assert result.exit_code == 2
    assert "digits.pth must end in .safetensors" in result.stderr
    assert sorted(tmp_path.iterdir()) == [checkpoint]


def test_a_folder_that_takes_no_files_is_named(checkpoint: Path) -> None:
    result = invoke(checkpoint, "--out", checkpoint / "a.safetensors", "--no-certify")
    assert result.exit_code == 1
    assert f"cannot write to the folder {checkpoint}: Not a directory" in result.stderr


def test_a_file_that_is_no_checkpoint_is_refused_in_one_line(path: Path, out: Path) -> None:
    path.write_bytes(b"hello")
    result = invoke(path, "--out", out, "--no-certify")
    assert result.exit_code == 1
    assert result.stderr.startswith(f"Error: {path}: is of an unknown kind; expected the state")
    assert result.stderr.count("\n") == 1
    assert not out.exists()
