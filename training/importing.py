"""Import of generators that other programs trained.

Two public programs train the network of `MLPGenerator`, from standard normal latents to images in
[-1, 1]. `StateDictFormat` holds their differences:

- Lornatang/CGAN-PyTorch (`cgan_pytorch/models/generator.py`, releases 0.1.0 and 0.2.0) concatenates
  latents and label embeddings in this order and uses batch norm's default eps of 1e-5, as this code
  does.
- eriklindernoren/PyTorch-GAN (`implementations/cgan/cgan.py`) concatenates label embeddings and
  latents, and its `BatchNorm1d(width, 0.8)` sets eps, not the momentum, to 0.8.

A state dict has neither eps nor the activation: only the names of its tensors tell the programs
apart. A program with the same names and another network gives wrong images; evaluation reveals it.
"""

import hashlib
import io
import os
import re
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from math import isqrt
from pathlib import Path
from typing import Any, TypeGuard

import safetensors.torch
import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from torch import Tensor, nn

from training.artifact import MAX_BYTES, ArtifactInfo, check_class_name, list_names
from training.data.named import DATASETS
from training.files import FileError, find_kind, read_file
from training.generator_config import MLPGeneratorConfig
from training.loading import check_tensor
from training.networks import MLPGenerator, Uninitialised

EXPECTED = (
    "expected the state dict of a generator, as CGAN-PyTorch (tensors label_embedding.* with "
    "main.* or layers.*) or PyTorch-GAN (label_emb.* with model.*) save it with torch.save or "
    "safetensors"
)
# Keys of a checkpoint under which its generator may be.
WRAPPERS = (
    *("ema_state_dict", "ema", "generator", "generator_state_dict", "netG", "G"),
    *("state_dict", "model_state_dict", "model"),
)
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_NAMED_SHAPE = (1, 28)  # channels and size of the images of every named data set
_CONFIG = TypeAdapter(MLPGeneratorConfig)

StateDict = dict[str, Tensor]


class ForeignCheckpointError(FileError):
    """A checkpoint that cannot be imported."""


@dataclass(frozen=True)
class StateDictFormat:
    """A program's names for the tensors of `MLPGenerator`, and its network's differences."""

    source: str  # the program
    embedding: str  # its name for `label_embedding`
    body: str  # its name for `main`
    eps: float  # of its batch norm
    labels_first: bool  # label embeddings precede the latents

    def name(self, ours: str) -> str:
        """Return the program's name of a tensor of `MLPGenerator`."""
        module, _, rest = ours.partition(".")
        return f"{self.embedding if module == 'label_embedding' else self.body}.{rest}"

    def owns(self, theirs: str) -> bool:
        """Return True for the name of a tensor in this format."""
        return theirs.startswith((f"{self.embedding}.", f"{self.body}."))


_CGAN_PYTORCH, _PYTORCH_GAN = "Lornatang/CGAN-PyTorch", "eriklindernoren/PyTorch-GAN"
FORMATS = (
    StateDictFormat(_CGAN_PYTORCH, "label_embedding", "main", eps=1e-5, labels_first=False),
    StateDictFormat(_CGAN_PYTORCH, "label_embedding", "layers", eps=1e-5, labels_first=False),
    StateDictFormat(_PYTORCH_GAN, "label_emb", "model", eps=0.8, labels_first=True),
)


def load_foreign(
    path: Path, *, class_names: Sequence[str] | None = None, dataset: str | None = None
) -> tuple[MLPGenerator, ArtifactInfo]:
    """Read a generator's state dict; nothing in the file is executed.

    Args:
        path: as `torch.save` or safetensors wrote it.
        class_names: one per class, in the order of the labels. If not given, they are those of
            `dataset`, or "0", "1", … without one.
        dataset: a key of `DATASETS`, the images that the generator imitates.

    Returns:
        the equivalent generator in evaluation mode, and the description of an artifact with it. It
        names the data set if the images have the data set's shape.

    Raises:
        ForeignCheckpointError: the file cannot be read, holds more than tensors and plain values,
            or its tensors are not those of a generator; names the first wrong tensor.
        ValueError: there are not as many names as classes, or they repeat.
    """
    data = read_file(path, MAX_BYTES, ForeignCheckpointError)
    tensors = _find_state_dict(path, _load(path, data))
    form = max(FORMATS, key=lambda form: sum(map(form.owns, tensors)))
    network = _config(path, form, tensors)
    with torch.device("meta"), Uninitialised():  # shapes only: a malicious file takes no memory
        generator = MLPGenerator(network)
    generator.load_state_dict(_remap(path, form, generator, tensors), assign=True)
    generator.eval().requires_grad_(False)
    _convert(generator, form)
    if class_names is None and dataset is not None:
        class_names = DATASETS[dataset].class_names
    training: dict[str, Any] = {
        # The bytes of a file's name need not be valid text, which JSON requires.
        "imported_from": path.name.encode(errors="replace").decode(),
        "imported_sha256": hashlib.sha256(data).hexdigest(),
        "layout": form.source,
        "images_seen": None,  # unknown, which ArtifactInfo.images_seen cannot express
    }
    if dataset is not None and (network.channels, network.image_size) == _NAMED_SHAPE:
        training["dataset"] = dataset
    return generator, ArtifactInfo(
        network=network,
        class_names=tuple(class_names or map(str, range(network.num_classes))),
        training=training,
        images_seen=0,
    )


def read_class_names(text: str) -> tuple[str, ...]:
    """Return the names that an option lists, separated by commas or in a text file, one a line.

    Raises:
        ValueError: an artifact cannot hold a name, or the file is not UTF-8 text.
        OSError: the file cannot be read.
    """
    in_file = os.path.isfile(text)  # noqa: PTH113  (Path.is_file raises for a long list)
    listed = Path(text).read_text("utf-8").strip().splitlines() if in_file else text.split(",")
    names = []
    for number, name in enumerate(listed):
        try:
            names.append(check_class_name(name))
        except ValueError as error:
            raise ValueError(f"the name of class {number} {error}") from error
    return tuple(names)


def _check_size(path: Path, subject: str, size: int) -> None:
    if size > MAX_BYTES:
        raise ForeignCheckpointError(
            path, f"{subject} {size} bytes long; at most {MAX_BYTES} are allowed"
        )


def _load(path: Path, data: bytes) -> object:
    """Return the object in a file, restricted to tensors and plain values."""
    kind = find_kind(data)
    if kind == "a safetensors file":
        return _load_safetensors(path, data)
    if kind not in ("a file of torch.save", "a pickle", None):
        raise ForeignCheckpointError(path, f"is {kind}; {EXPECTED}")
    if not data.startswith((b"PK", b"\x80")):
        raise ForeignCheckpointError(path, f"is of an unknown kind; {EXPECTED}")
    try:
        if zipfile.is_zipfile(io.BytesIO(data)):  # a compressed archive can be far larger in memory
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                unpacked = sum(entry.file_size for entry in archive.infolist())
            _check_size(path, "its unpacked content is", unpacked)
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except ForeignCheckpointError:
        raise
    except Exception as error:  # PyTorch raises exceptions of many types for damaged files
        refused = re.search(r"Unsupported (?:global|class): GLOBAL (\S+)", str(error))
        if refused is not None:
            raise ForeignCheckpointError(
                path,
                f"holds an object of {refused[1]}, not only tensors; save the state dict alone, "
                "with torch.save(generator.state_dict(), FILE); nothing in it was executed",
            ) from error
        raise ForeignCheckpointError(
            path,
            "is damaged, or holds more than tensors and plain values; nothing in it was executed",
        ) from error


def _load_safetensors(path: Path, data: bytes) -> StateDict:
    length = int.from_bytes(data[:8], "little")
    if b'"cgan-generator"' in data[8 : 8 + length].replace(b"\\", b""):
        raise ForeignCheckpointError(path, "is an artifact already; serve it as it is")
    try:
        return safetensors.torch.load(data)
    except (SafetensorError, KeyError, ValueError) as error:
        raise ForeignCheckpointError(path, f"is damaged: {error}") from error


def _is_state_dict(contents: object) -> TypeGuard[StateDict]:
    return (
        isinstance(contents, dict)
        and len(contents) > 0
        and all(isinstance(name, str) for name in contents)
        and all(isinstance(value, Tensor) for value in contents.values())
    )


def _find_state_dict(path: Path, contents: object) -> StateDict:
    """Return a checkpoint's only state dict, without the prefix of `DataParallel`."""
    found: dict[str, StateDict] = {"": contents} if _is_state_dict(contents) else {}
    if not found and isinstance(contents, dict):
        wrapped = {key: contents.get(key) for key in WRAPPERS}
        found = {key: value for key, value in wrapped.items() if _is_state_dict(value)}
    if not found:
        keys = ", ".join(WRAPPERS)
        raise ForeignCheckpointError(
            path, f"is not a state dict and has none under {keys}; {EXPECTED}"
        )
    if len(found) > 1:
        raise ForeignCheckpointError(
            path, f"holds several networks: {', '.join(found)}; save the generator alone"
        )
    (tensors,) = found.values()
    if all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    size = sum(4 * tensor.numel() for tensor in tensors.values())  # in float32
    _check_size(path, "its tensors are", size)
    return tensors


def _config(path: Path, form: StateDictFormat, tensors: StateDict) -> MLPGeneratorConfig:
    """Derive the configuration from the shapes of the embedding and of the linear layers."""
    key = form.name("label_embedding.weight")
    if key not in tensors:
        held = list_names([f"{name} {list(it.shape)}" for name, it in tensors.items()], most=3)
        raise ForeignCheckpointError(
            path, f"the tensor {key!r} is missing; the file holds {held}; {EXPECTED}"
        )
    if tensors[key].dim() != 2:
        shape = list(tensors[key].shape)
        raise ForeignCheckpointError(path, f"{key}: shape is {shape}, expected 2 dimensions")
    num_classes, embedding_dim = tensors[key].shape
    pattern = re.compile(rf"{form.body}\.([0-9]{{1,4}})\.weight")
    linear = sorted(  # (position, fan_out, fan_in)
        (int(match[1]), *tensor.shape)
        for name, tensor in tensors.items()
        if (match := pattern.fullmatch(name)) and tensor.dim() == 2
    )
    if len(linear) < 2:
        raise ForeignCheckpointError(
            path,
            f"has {len(linear)} linear layers under {form.body!r}, expected 2 or more: its network "
            "is not the multilayer perceptron that this command reads",
        )
    last, pixels, _ = linear[-1]
    channels, image_size = _image_shape(path, f"{form.body}.{last}.weight", pixels)
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
            path, f"its shapes imply {where} = {first['input']}: {first['msg']}"
        ) from error


def _image_shape(path: Path, key: str, pixels: int) -> tuple[int, int]:
    """Return channels and size; unambiguous, since no square is three times another one."""
    for channels in (1, 3):
        size = isqrt(pixels // channels)
        if pixels > 1 and channels * size**2 == pixels:
            return channels, size
    hint = " (a discriminator?)" if pixels == 1 else ""
    raise ForeignCheckpointError(
        path, f"{key}: has {pixels} outputs, expected a square grey or RGB image{hint}"
    )


def _remap(
    path: Path, form: StateDictFormat, generator: nn.Module, tensors: StateDict
) -> StateDict:
    """Return copies of the tensors under this code's names and in its dtypes."""
    remapped, keys = {}, set()
    for name, want in generator.state_dict().items():
        key = form.name(name)
        keys.add(key)
        if key not in tensors:
            raise ForeignCheckpointError(path, f"the tensor {key!r} is missing")
        have = tensors[key]
        if have.layout != torch.strided or have.device.type != "cpu":
            raise ForeignCheckpointError(path, f"{key}: is sparse or has no values")
        dtypes = _FLOATS if want.is_floating_point() else (want.dtype,)
        check_tensor(path, key, have, want, dtypes, ForeignCheckpointError)
        remapped[name] = have.detach().to(
            want.dtype, copy=True, memory_format=torch.contiguous_format
        )
    for key in tensors:
        if key not in keys:
            raise ForeignCheckpointError(path, f"the tensor {key!r} does not belong to a generator")
    return remapped


@torch.no_grad()
def _convert(generator: MLPGenerator, form: StateDictFormat) -> None:
    """Adapt the weights, so that the generator computes the same as the program's network."""
    for module in generator.modules():
        if isinstance(module, nn.BatchNorm1d) and module.running_var is not None:
            # Only the sum of variance and eps matters: add the difference of eps to the variance.
            module.running_var += form.eps - module.eps
    if form.labels_first:
        weight = generator.get_parameter("main.0.weight")  # (hidden[0], embedding + latent)
        weight.copy_(weight.roll(-generator.config.embedding_dim, dims=1))
