"""Generators that other programs published, as generators of this one.

Two public programs train the network that `MLPGenerator` is, from standard normal latents to images
in [-1, 1], and differ in three things, which `Layout` names:

- Lornatang/CGAN-PyTorch (`cgan_pytorch/models/generator.py`; the releases 0.1.0 and 0.2.0 agree)
  feeds latents before label embeddings and leaves batch norm's eps at 1e-5, as this code does.
- eriklindernoren/PyTorch-GAN (`implementations/cgan/cgan.py`) feeds label embeddings before
  latents, and its `BatchNorm1d(width, 0.8)` sets eps, not the momentum, to 0.8.

A state dict holds neither eps nor the activation: the names of its tensors are what tells the
programs apart. One who kept the names and changed the rest gets wrong images; measuring shows it.
"""

import hashlib
import io
import re
import zipfile
from dataclasses import dataclass
from math import isqrt
from pathlib import Path
from typing import Any, TypeGuard

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from training.artifact import MAX_BYTES, ArtifactInfo
from training.data.named import DATASETS
from training.networks import MLPGenerator, MLPGeneratorConfig

# Under these a checkpoint of more than weights keeps its generator.
WRAPPERS = (
    *("ema_state_dict", "ema", "generator", "generator_state_dict", "netG", "G"),
    *("state_dict", "model_state_dict", "model"),
)
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_NAMED_SHAPE = (1, 28)  # channels and size of the images of every named data set
_CONFIG = TypeAdapter(MLPGeneratorConfig)

StateDict = dict[str, Tensor]


class ForeignCheckpointError(Exception):
    """A checkpoint that cannot be imported; names the path and the cause."""

    def __init__(self, path: Path, cause: str) -> None:
        super().__init__(f"{path}: {cause}")
        self.path = path
        self.cause = cause


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a program names and computes what `MLPGenerator` does.

    Attributes:
        source: the program.
        embedding: its name for `label_embedding`.
        body: its name for `main`.
        eps: of its batch norm.
        labels_first: whether label embeddings come before the latents.
    """

    source: str
    embedding: str
    body: str
    eps: float
    labels_first: bool

    def name(self, ours: str) -> str:
        """Their name of a tensor of `MLPGenerator`."""
        module, _, rest = ours.partition(".")
        return f"{self.embedding if module == 'label_embedding' else self.body}.{rest}"

    def owns(self, theirs: str) -> bool:
        """Whether a tensor of this name could belong to this layout."""
        return theirs.startswith((f"{self.embedding}.", f"{self.body}."))


_CGAN_PYTORCH = "Lornatang/CGAN-PyTorch"
_PYTORCH_GAN = "eriklindernoren/PyTorch-GAN"
LAYOUTS = (
    Layout(
        source=_CGAN_PYTORCH, embedding="label_embedding", body="main", eps=1e-5, labels_first=False
    ),
    Layout(
        source=_CGAN_PYTORCH,
        embedding="label_embedding",
        body="layers",
        eps=1e-5,
        labels_first=False,
    ),
    Layout(source=_PYTORCH_GAN, embedding="label_emb", body="model", eps=0.8, labels_first=True),
)


@dataclass(frozen=True)
class ForeignGenerator:
    """A generator that another program trained.

    Attributes:
        path: where it was read.
        sha256: hexadecimal digest of the whole file.
        source: the program whose layout it has.
        generator: of this code, in evaluation mode, making the same images.
    """

    path: Path
    sha256: str
    source: str
    generator: MLPGenerator


def load_foreign(path: Path) -> ForeignGenerator:
    """Read a generator's state dict as `torch.save` wrote it; nothing in it is executed.

    Raises:
        ForeignCheckpointError: the file cannot be read, holds more than tensors and plain values,
            or its tensors are not those of a generator: names the first that is not.
    """
    data = _read(path)
    tensors = _find_state_dict(path, _load(path, data))
    layout = max(LAYOUTS, key=lambda layout: sum(map(layout.owns, tensors)))
    config = _config(path, layout, tensors)
    with torch.device("meta"):  # shapes only: a hostile file's take no memory
        generator = MLPGenerator(config)
    generator.load_state_dict(_fitted(path, layout, generator, tensors), assign=True)
    generator.eval().requires_grad_(False)
    _convert(generator, layout)
    return ForeignGenerator(path, hashlib.sha256(data).hexdigest(), layout.source, generator)


def describe_foreign(published: ForeignGenerator, dataset: str) -> ArtifactInfo:
    """What the artifact says: the classes are the data set's if its images have the same shape.

    Otherwise the classes are named "0", "1", …, and no data set is recorded.
    """
    network = published.generator.config
    names = DATASETS[dataset].class_names
    fits = (network.channels, network.image_size) == _NAMED_SHAPE
    fits = fits and network.num_classes == len(names)
    training: dict[str, Any] = {
        # A file's name may be no text at all, which JSON cannot hold.
        "imported_from": published.path.name.encode(errors="replace").decode(),
        "imported_sha256": published.sha256,
        "layout": published.source,
        "images_seen": None,  # unknown; the field of this name counts what is known, which is none
    }
    return ArtifactInfo(
        network=network,
        class_names=names if fits else tuple(map(str, range(network.num_classes))),
        training={**training, "dataset": dataset} if fits else training,
        images_seen=0,
    )


def _read(path: Path) -> bytes:
    try:
        if path.is_dir():
            raise ForeignCheckpointError(path, "is a folder, not a file")
        size = path.stat().st_size
        if not path.is_file():  # a pipe or a device would be read for ever
            raise ForeignCheckpointError(path, "is no ordinary file")
        _check_size(path, "takes", size)
        return path.read_bytes()
    except OSError as error:
        raise ForeignCheckpointError(path, f"cannot be read: {error.strerror}") from error


def _check_size(path: Path, takes: str, size: int) -> None:
    if size > MAX_BYTES:
        raise ForeignCheckpointError(
            path, f"{takes} {size} bytes, more than the {MAX_BYTES} allowed"
        )


def _load(path: Path, data: bytes) -> object:
    """What `torch.save` saved, restricted to tensors and plain values."""
    if not data.startswith((b"PK", b"\x80")):
        raise ForeignCheckpointError(path, "is no file of torch.save")
    try:
        if zipfile.is_zipfile(io.BytesIO(data)):  # one that is packed grows when it is read
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                unpacked = sum(entry.file_size for entry in archive.infolist())
            _check_size(path, "takes, unpacked,", unpacked)
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except ForeignCheckpointError:
        raise
    except Exception as error:  # of damaged files PyTorch raises about everything there is
        raise ForeignCheckpointError(
            path,
            "is damaged, or holds more than tensors and plain values; nothing in it was executed",
        ) from error


def _is_state_dict(contents: object) -> TypeGuard[StateDict]:
    return (
        isinstance(contents, dict)
        and len(contents) > 0
        and all(isinstance(name, str) for name in contents)
        and all(isinstance(value, Tensor) for value in contents.values())
    )


def _find_state_dict(path: Path, contents: object) -> StateDict:
    """The state dict that a checkpoint is or wraps, without the prefix of `DataParallel`."""
    found: dict[str, StateDict] = {"": contents} if _is_state_dict(contents) else {}
    if not found and isinstance(contents, dict):
        wrapped = {key: contents.get(key) for key in WRAPPERS}
        found = {key: value for key, value in wrapped.items() if _is_state_dict(value)}
    if not found:
        keys = ", ".join(WRAPPERS)
        raise ForeignCheckpointError(path, f"is no state dict, and none lies under {keys}")
    if len(found) > 1:
        raise ForeignCheckpointError(
            path, f"holds several networks, expected one: {', '.join(found)}"
        )
    (tensors,) = found.values()
    if all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    size = sum(4 * tensor.numel() for tensor in tensors.values())  # in float32
    _check_size(path, "holds tensors that take", size)
    return tensors


def _config(path: Path, layout: Layout, tensors: StateDict) -> MLPGeneratorConfig:
    """The configuration that the shapes of the embedding and of the linear layers determine."""
    key = layout.name("label_embedding.weight")
    if key not in tensors:
        raise ForeignCheckpointError(path, f"the tensor {key!r} is missing")
    if tensors[key].dim() != 2:
        shape = list(tensors[key].shape)
        raise ForeignCheckpointError(path, f"{key}: shape is {shape}, expected 2 dimensions")
    num_classes, embedding_dim = tensors[key].shape
    pattern = re.compile(rf"{layout.body}\.([0-9]{{1,4}})\.weight")
    matches = [(pattern.fullmatch(name), tensor) for name, tensor in tensors.items()]
    linear = sorted(
        (int(match[1]), *tensor.shape) for match, tensor in matches if match and tensor.dim() == 2
    )  # (position, fan_out, fan_in)
    if len(linear) < 2:
        raise ForeignCheckpointError(
            path, f"has {len(linear)} linear layers under {layout.body!r}, expected 2 or more"
        )
    last, pixels, _ = linear[-1]
    channels, image_size = _image_shape(path, f"{layout.body}.{last}.weight", pixels)
    try:
        return _CONFIG.validate_python(
            {
                "num_classes": num_classes,
                "channels": channels,
                "image_size": image_size,
                "latent_dim": linear[0][2] - embedding_dim,
                "embedding_dim": embedding_dim,
                "hidden": tuple(fan_out for _, fan_out, _ in linear[:-1]),
            }
        )
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ForeignCheckpointError(
            path, f"its shapes mean {where} = {first['input']}: {first['msg']}"
        ) from error


def _image_shape(path: Path, key: str, pixels: int) -> tuple[int, int]:
    """Channels and size; never ambiguous, since no square is three times another one."""
    for channels in (1, 3):
        size = isqrt(pixels // channels)
        if pixels > 1 and channels * size**2 == pixels:
            return channels, size
    hint = " (a discriminator?)" if pixels == 1 else ""
    raise ForeignCheckpointError(
        path, f"{key}: makes {pixels} values, expected a square image in grey or RGB{hint}"
    )


def _fitted(path: Path, layout: Layout, generator: nn.Module, tensors: StateDict) -> StateDict:
    """The tensors under this code's names, in its dtypes, sharing no memory."""
    expected = generator.state_dict()
    for name, want in expected.items():
        key = layout.name(name)
        if key not in tensors:
            raise ForeignCheckpointError(path, f"the tensor {key!r} is missing")
        _check_tensor(path, key, tensors[key], want)
    names = {layout.name(name) for name in expected}
    for key in tensors:
        if key not in names:
            raise ForeignCheckpointError(path, f"the tensor {key!r} does not belong to a generator")
    return {
        name: tensors[layout.name(name)]
        .detach()
        .to(want.dtype, copy=True, memory_format=torch.contiguous_format)
        for name, want in expected.items()
    }


def _check_tensor(path: Path, key: str, have: Tensor, want: Tensor) -> None:
    if have.layout != torch.strided or have.device.type != "cpu":
        raise ForeignCheckpointError(path, f"{key}: is sparse or without values, expected neither")
    allowed = _FLOATS if want.is_floating_point() else (want.dtype,)
    if have.dtype not in allowed:
        dtypes = " or ".join(map(str, allowed))
        raise ForeignCheckpointError(path, f"{key}: dtype is {have.dtype}, expected {dtypes}")
    if have.shape != want.shape:
        shapes = f"{list(have.shape)}, expected {list(want.shape)}"
        raise ForeignCheckpointError(path, f"{key}: shape is {shapes}")
    if not have.isfinite().all():
        raise ForeignCheckpointError(path, f"{key}: holds values that are not finite")
    if key.endswith("running_var") and (have < 0).any():
        raise ForeignCheckpointError(path, f"{key}: holds negative variances")


@torch.no_grad()
def _convert(generator: MLPGenerator, layout: Layout) -> None:
    """Make the generator compute with their weights what their network does."""
    for module in generator.modules():
        if isinstance(module, nn.BatchNorm1d) and module.running_var is not None:
            # Only the sum of variance and eps counts: what their eps has more, the variance gets.
            module.running_var += layout.eps - module.eps
    if layout.labels_first:
        weight = generator.get_parameter("main.0.weight")  # (hidden[0], embedding + latent)
        weight.copy_(weight.roll(-generator.config.embedding_dim, dims=1))
