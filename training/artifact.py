"""The artifact: one safetensors file that holds a generator and everything needed to serve it.

This is the only thing that training and the service share. Nothing in it is executed: it is read
once, checked against the network that its own configuration builds, and refused with the path and
the cause where it differs.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import safetensors.torch
import torch
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from training.files import write_atomically
from training.networks import Generator, GeneratorConfig, build_generator

MAX_BYTES = 1 << 30  # far above any generator here; bounds what a wrong path can read
_KINDS = ("mlp", "conv")
_METADATA_KEY = "artifact"  # one key of sorted JSON: the same contents always give the same bytes
# Beside the fields of `ArtifactInfo`: tells damage that leaves a valid file, not ill will. Files
# written before there was one have none.
_DIGEST_KEY = "contents_sha256"


class ArtifactError(Exception):
    """A file that is no valid artifact; names the path and the cause."""

    def __init__(self, path: Path, cause: str) -> None:
        super().__init__(f"{path}: {cause}")
        self.path = path
        self.cause = cause


@dataclass(frozen=True, kw_only=True)
class ArtifactInfo:
    """What an artifact says of itself.

    Attributes:
        network: the generator's full configuration.
        class_names: one name a class, in the order of the labels.
        training: the training configuration and circumstances, as recorded.
        images_seen: real images shown during training.
        source_commit: of the code that trained it, where it was known.
        certificate: the measured quality, where it was measured.
        value_range: of the generator's output.
        latent_prior: what a latent's entries are drawn from.
        format: always `cgan-generator`.
        version: of the format.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    network: GeneratorConfig
    class_names: tuple[Annotated[str, Field(min_length=1, max_length=200)], ...]
    training: dict[str, Any] = field(default_factory=dict)
    images_seen: Annotated[int, Field(ge=0)]
    source_commit: str | None = None
    certificate: dict[str, Any] | None = None
    value_range: Literal["[-1, 1]"] = "[-1, 1]"
    latent_prior: Literal["standard normal"] = "standard normal"
    format: Literal["cgan-generator"] = "cgan-generator"
    version: Literal[1] = 1

    def __post_init__(self) -> None:
        if len(self.class_names) != self.network.num_classes:
            raise ValueError(
                f"{len(self.class_names)} class names for {self.network.num_classes} classes"
            )
        if len(set(self.class_names)) != len(self.class_names):
            raise ValueError("class names repeat")
        json.dumps((self.training, self.certificate), allow_nan=False)  # raises for NaN and inf

    def label(self, text: str) -> int:
        """The label that a class name or, failing that, a class index stands for.

        Raises:
            ValueError: it is neither; says what is allowed.
        """
        if text in self.class_names:
            return self.class_names.index(text)
        # Only plain decimal digits: int() would also take " 7 ", "1_0" and digits of other scripts.
        if text.isascii() and text.isdecimal() and len(text) <= 6:
            index = int(text)
            if index < len(self.class_names):
                return index
        raise ValueError(
            f"{_quote(text)} is not a class; allowed is an index from 0 to "
            f"{len(self.class_names) - 1} or a name: {_list(self.class_names)}"
        )


@dataclass(frozen=True)
class Artifact:
    """A loaded artifact: the generator in evaluation mode on the CPU, and the file's identity.

    Attributes:
        path: where it was read.
        sha256: hexadecimal digest of the whole file, the identity of the model.
        info: what the file says of itself.
        generator: with the file's weights.
    """

    path: Path
    sha256: str
    info: ArtifactInfo
    generator: Generator


_INFO = TypeAdapter(ArtifactInfo)


class _Uninitialised(TorchFunctionMode):
    """Builds modules without drawing their initial weights.

    On the meta device drawing them does nothing, but PyTorch loads its whole compiler to find that
    out. That delays every start, and needs a writable temporary folder, which a locked-down
    container has not.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        # Some initialisers, as kaiming_normal_, are not seen here, but the method they call is.
        draws = getattr(func, "__module__", None) == "torch.nn.init"
        if draws or func in (Tensor.normal_, Tensor.uniform_):
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def save_artifact(path: Path, generator: nn.Module, info: ArtifactInfo) -> None:
    """Write an artifact beside its target, sync it, and rename it into place.

    Raises:
        ArtifactError: the weights are not finite.
        OSError: the file cannot be written; what was there before is untouched.
    """
    tensors = {k: v.detach().cpu().contiguous() for k, v in generator.state_dict().items()}
    _check_finite(path, tensors)
    description = json.loads(json.dumps(dataclasses.asdict(info)))  # as it will be read
    stored = safetensors.torch.save(tensors)
    description[_DIGEST_KEY] = _digest(description, stored)
    metadata = json.dumps(description, sort_keys=True)
    write_atomically(path, safetensors.torch.save(tensors, {_METADATA_KEY: metadata}))


def load_artifact(path: Path) -> Artifact:
    """Read and check an artifact.

    The file is read once, so what was checked is what is used.

    Raises:
        ArtifactError: the file cannot be read, is no artifact, its tensors are not the ones that
            its configuration builds (by name, dtype, shape, or a value that is not finite), or its
            contents are not the ones that were written.
    """
    data = _read(path)
    header = _parse_header(path, data)
    description = _parse_description(path, header)
    written_digest = description.pop(_DIGEST_KEY, None)
    info = _parse_info(path, description)
    try:
        tensors = safetensors.torch.load(data)
    except (SafetensorError, KeyError, ValueError) as error:
        raise ArtifactError(path, f"is not a valid safetensors file: {error}") from error
    with torch.device("meta"), _Uninitialised():  # shapes only: a hostile one takes no memory
        generator = build_generator(info.network)
    _check_tensors(path, generator.state_dict(), tensors)
    if written_digest not in (None, _digest(description, data)):
        raise ArtifactError(path, "is damaged: its contents are not the ones that were written")
    generator.load_state_dict(tensors, assign=True)
    generator.eval().requires_grad_(False)
    return Artifact(path, hashlib.sha256(data).hexdigest(), info, generator)


def _quote(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:40] + "…")


def _list(names: tuple[str, ...], most: int = 20) -> str:
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown}, … ({len(names)} in all)"


def _read(path: Path) -> bytes:
    try:
        if path.is_dir():
            raise ArtifactError(path, "is a folder, not a file")
        size = path.stat().st_size
        if not path.is_file():  # a pipe or a device would be read for ever
            raise ArtifactError(path, "is no ordinary file")
        if size > MAX_BYTES:
            raise ArtifactError(path, f"is {size} bytes long, more than the {MAX_BYTES} allowed")
        return path.read_bytes()
    except OSError as error:
        raise ArtifactError(path, f"cannot be read: {error.strerror}") from error


def _parse_header(path: Path, data: bytes) -> dict[str, Any]:
    """The header of a safetensors file: its length in 8 bytes, then JSON."""
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > len(data) - 8:
        if data[:2] == b"PK" or data[:1] == b"\x80":
            raise ArtifactError(path, "is a pickle (a checkpoint?); nothing in it was executed")
        raise ArtifactError(path, f"is cut short or no safetensors file ({len(data)} bytes)")
    try:
        header = json.loads(data[8 : 8 + length])
    except (ValueError, RecursionError) as error:
        raise ArtifactError(path, "is no safetensors file: its header is not JSON") from error
    if not isinstance(header, dict):
        raise ArtifactError(path, "is no safetensors file: its header is not an object")
    return header


def _digest(description: dict[str, Any], stored: bytes) -> str:
    """SHA-256 of a description and of the tensors' bytes, which follow a safetensors header."""
    digest = hashlib.sha256(json.dumps(description, sort_keys=True).encode())
    digest.update(memoryview(stored)[8 + int.from_bytes(stored[:8], "little") :])
    return digest.hexdigest()


def _parse_description(path: Path, header: dict[str, Any]) -> dict[str, Any]:
    metadata = header.get("__metadata__")
    text = metadata.get(_METADATA_KEY) if isinstance(metadata, dict) else None
    if not isinstance(text, str):
        raise ArtifactError(path, "is a safetensors file but no artifact: it has no description")
    try:
        description = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(path, "description: Invalid JSON") from error
    if not isinstance(description, dict):
        raise ArtifactError(path, "description: is not an object")
    return description


def _parse_info(path: Path, description: dict[str, Any]) -> ArtifactInfo:
    try:
        return _INFO.validate_json(json.dumps(description))
    except RecursionError as error:
        raise ArtifactError(path, "description: is nested too deeply") from error
    except ValidationError as error:
        first = error.errors()[0]
        # A union's error also names the kind of network; the field is clearer without.
        field_path = [str(part) for part in first["loc"] if part not in _KINDS]
        where = ".".join(field_path) or "description"
        raise ArtifactError(path, f"{where}: {first['msg']}") from error


def _check_tensors(path: Path, expected: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    for name, want in expected.items():
        if name not in found:
            raise ArtifactError(path, f"the tensor {name!r} is missing")
        have = found[name]
        if have.dtype != want.dtype:
            raise ArtifactError(path, f"{name}: dtype is {have.dtype}, expected {want.dtype}")
        if have.shape != want.shape:
            shapes = f"{list(have.shape)}, expected {list(want.shape)}"
            raise ArtifactError(path, f"{name}: shape is {shapes}")
    for name in found:
        if name not in expected:
            raise ArtifactError(path, f"the tensor {name!r} does not belong to this network")
    _check_finite(path, found)


def _check_finite(path: Path, tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ArtifactError(path, f"{name}: holds values that are not finite")
        if name.endswith("running_var") and (tensor < 0).any():
            raise ArtifactError(path, f"{name}: holds negative variances")
