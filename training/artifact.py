"""Artifact: one safetensors file with a generator and everything needed to serve it.

Training and the service share nothing else. Loading executes nothing in the file: it reads the file
once and checks it against the network that the file's own configuration builds.
"""

import dataclasses
import hashlib
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import safetensors.torch
import torch
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from training.files import FileError, find_kind, read_file, write_atomically
from training.networks import Generator, GeneratorConfig, build_generator

MAX_BYTES = 1 << 30  # limits the memory that a wrong path can take; real files are far smaller
MAX_NAME = 200  # characters of a class name
_KINDS = ("mlp", "conv")
# URLs, headers and metrics contain a model's name unquoted.
_MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_METADATA_KEY = "artifact"  # a single key of sorted JSON: equal contents give equal bytes
# Stored beside the fields of `ArtifactInfo`. It detects damage, not manipulation. Files of early
# versions have none.
_DIGEST_KEY = "contents_sha256"


class ArtifactError(FileError):
    """A file that is not a valid artifact."""


@dataclass(frozen=True, kw_only=True)
class ArtifactInfo:
    """The description inside an artifact.

    Attributes:
        class_names: one name per class, in the order of the labels.
        training: training configuration and circumstances.
        images_seen: real images shown during training.
        source_commit: of the code that trained it; None if unknown.
        certificate: the measured quality; None if not measured.
        value_range: of the generator's output.
        latent_prior: distribution of a latent's entries.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    network: GeneratorConfig
    class_names: tuple[Annotated[str, Field(min_length=1, max_length=MAX_NAME)], ...]
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
            twice = next(name for name, n in Counter(self.class_names).items() if n > 1)
            raise ValueError(f"class names repeat: {_quote(twice)}")
        json.dumps((self.training, self.certificate), allow_nan=False)  # raises for NaN and inf

    def label(self, text: str) -> int:
        """Return the label of a class name or, if no class has that name, of a class index.

        A name matches in every spelling of Unicode: file systems, and so clients, have several.

        Raises:
            ValueError: it is neither.
        """
        if text in self.class_names:
            return self.class_names.index(text)
        names = [unicodedata.normalize("NFC", name) for name in self.class_names]
        if (name := unicodedata.normalize("NFC", text)) in names:
            return names.index(name)
        # Only ASCII digits: int() also accepts " 7 ", "1_0" and digits of other scripts.
        if text.isascii() and text.isdecimal() and len(text) <= 6:
            index = int(text)
            if index < len(self.class_names):
                return index
        raise ValueError(
            f"{_quote(text)} is not a class; allowed is an index from 0 to "
            f"{len(self.class_names) - 1} or a name: {list_names(self.class_names)}"
        )


@dataclass(frozen=True)
class Artifact:
    """A loaded artifact: the generator in evaluation mode on the CPU, and the file's identity."""

    path: Path
    sha256: str  # hexadecimal digest of the whole file, the identity of the model
    info: ArtifactInfo
    generator: Generator


_INFO = TypeAdapter(ArtifactInfo)


class Uninitialised(TorchFunctionMode):
    """A mode that builds modules without drawing their initial weights.

    On the meta device drawing has no effect, but makes PyTorch import its compiler. The import
    delays every start and needs a writable temporary folder, which a read-only container lacks.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        # Some initialisers, such as kaiming_normal_, do not pass here, but their methods do.
        draws = getattr(func, "__module__", None) == "torch.nn.init"
        if draws or func in (Tensor.normal_, Tensor.uniform_):
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def save_artifact(path: Path, generator: nn.Module, info: ArtifactInfo) -> None:
    """Write an artifact beside its target, sync it, and rename it into place.

    Raises:
        ArtifactError: the weights are not finite, or the description could not be read again.
        OSError: the file cannot be written; a previous file is untouched.
    """
    tensors = {k: v.detach().cpu().contiguous() for k, v in generator.state_dict().items()}
    for name, tensor in tensors.items():
        _check_values(path, name, tensor, ArtifactError)
    description = json.loads(json.dumps(dataclasses.asdict(info)))  # equal to what is read later
    _parse_info(path, description)
    stored = safetensors.torch.save(tensors)
    description[_DIGEST_KEY] = _digest(description, stored)
    metadata = json.dumps(description, sort_keys=True)
    write_atomically(path, safetensors.torch.save(tensors, {_METADATA_KEY: metadata}))


def load_artifact(path: Path) -> Artifact:
    """Read and check an artifact.

    The file is read once, so the checked contents are the ones in use.

    Raises:
        ArtifactError: the file cannot be read or is not an artifact; its tensors are not those of
            its configuration by name, dtype or shape, or not finite; or it is damaged.
    """
    data = read_file(path, MAX_BYTES, ArtifactError)
    header = _parse_header(path, data)
    description = _parse_description(path, header)
    written_digest = description.pop(_DIGEST_KEY, None)
    info = _parse_info(path, description)
    try:
        tensors = safetensors.torch.load(data)
    except (SafetensorError, KeyError, ValueError) as error:
        raise ArtifactError(path, f"is not a valid safetensors file: {error}") from error
    with torch.device("meta"), Uninitialised():  # shapes only: a malicious file takes no memory
        generator = build_generator(info.network)
    expected = generator.state_dict()
    for name, want in expected.items():
        if name not in tensors:
            raise ArtifactError(path, f"the tensor {name!r} is missing")
        check_tensor(path, name, tensors[name], want, (want.dtype,), ArtifactError)
    for name in tensors:
        if name not in expected:
            raise ArtifactError(path, f"the tensor {name!r} does not belong to this network")
    if written_digest not in (None, _digest(description, data)):
        raise ArtifactError(path, "is damaged: its contents are not the ones that were written")
    generator.load_state_dict(tensors, assign=True)
    generator.eval().requires_grad_(False)
    return Artifact(path, hashlib.sha256(data).hexdigest(), info, generator)


def check_model_name(path: Path) -> None:
    """Raise ArtifactError unless the service accepts the file's stem as the name of a model."""
    if not _MODEL_NAME.fullmatch(path.stem):
        raise ArtifactError(
            path,
            "is not a valid name for a model; allowed are up to 100 of the letters A to Z and "
            "a to z, digits, '.', '_' and '-', the first a letter or a digit",
        )


def check_class_name(text: str) -> str:
    """Return a class name in one spelling: Unicode NFC without white space at its ends.

    Raises:
        ValueError: an artifact cannot hold it, or formats of data sets, which list a name a line.
    """
    name = unicodedata.normalize("NFC", text).strip()
    if not 1 <= len(name) <= MAX_NAME:
        raise ValueError(f"has {len(name)} characters, expected 1 to {MAX_NAME}")
    if any(unicodedata.category(character) in ("Cc", "Cs") for character in name):
        raise ValueError("has control characters, or bytes that are not UTF-8")
    return name


def printable(text: str) -> str:
    """Escape control characters and bytes that are not UTF-8; keep line breaks.

    Text in a file then cannot control the terminal, and any terminal can show it.
    """
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def list_artifacts(folder: Path) -> list[Path]:
    """Return the artifacts of a folder, sorted by name.

    Hidden files do not count: macOS writes `._NAME.safetensors` beside a copied file, and programs
    write `.NAME.safetensors` before they rename it.

    Raises:
        OSError: the folder cannot be read.
    """
    found = [path for path in folder.iterdir() if path.suffix == ".safetensors"]
    visible = [path for path in found if not path.name.startswith(".")]
    return sorted(visible, key=lambda path: path.stem)  # by whole names mnist-mlp would come first


def _quote(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:40] + "…")


def list_names(names: Sequence[str], most: int = 20) -> str:
    """Return names separated by commas; of more than `most`, the first ones and their number."""
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown}, … ({len(names):,} in all)"


def _parse_header(path: Path, data: bytes) -> dict[str, Any]:
    """Return the header of a safetensors file: JSON after 8 bytes of its length."""
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > len(data) - 8:
        kind = find_kind(data)
        if kind in ("a pickle", "a file of torch.save"):
            raise ArtifactError(path, "is a pickle (a checkpoint?); nothing in it was executed")
        if kind not in (None, "a safetensors file"):
            raise ArtifactError(path, f"is {kind}; expected an artifact (.safetensors)")
        raise ArtifactError(path, f"is truncated or not a safetensors file ({len(data)} bytes)")
    try:
        header = json.loads(data[8 : 8 + length])
    except (ValueError, RecursionError) as error:
        raise ArtifactError(path, "is not a safetensors file: its header is not JSON") from error
    if not isinstance(header, dict):
        raise ArtifactError(path, "is not a safetensors file: its header is not an object")
    return header


def _digest(description: dict[str, Any], stored: bytes) -> str:
    """Return the SHA-256 of a description and of the tensors' bytes after a safetensors header."""
    digest = hashlib.sha256(json.dumps(description, sort_keys=True).encode())
    digest.update(memoryview(stored)[8 + int.from_bytes(stored[:8], "little") :])
    return digest.hexdigest()


def _parse_description(path: Path, header: dict[str, Any]) -> dict[str, Any]:
    metadata = header.get("__metadata__")
    text = metadata.get(_METADATA_KEY) if isinstance(metadata, dict) else None
    if not isinstance(text, str):
        raise ArtifactError(path, "is a safetensors file without the description of an artifact")
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
        # A union's error names the kind of network, too; the field is clearer without it.
        field_path = [str(part) for part in first["loc"] if part not in _KINDS]
        where = ".".join(field_path) or "description"
        raise ArtifactError(path, f"{where}: {first['msg']}") from error


def check_tensor(
    path: Path,
    name: str,
    have: Tensor,
    want: Tensor,
    dtypes: tuple[torch.dtype, ...],
    error: type[FileError],
) -> None:
    """Raise `error` unless `have` has the shape of `want`, one of the dtypes, and valid values."""
    if have.dtype not in dtypes:
        allowed = " or ".join(map(str, dtypes))
        raise error(path, f"{name}: dtype is {have.dtype}, expected {allowed}")
    if have.shape != want.shape:
        shapes = f"{list(have.shape)}, expected {list(want.shape)}"
        raise error(path, f"{name}: shape is {shapes}")
    _check_values(path, name, have, error)


def _check_values(path: Path, name: str, tensor: Tensor, error: type[FileError]) -> None:
    if not tensor.isfinite().all():
        raise error(path, f"{name}: holds values that are not finite")
    if name.endswith("running_var") and (tensor < 0).any():
        raise error(path, f"{name}: holds negative variances")
