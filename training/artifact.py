"""Artifact: one safetensors file with a generator and everything needed to serve it.

Training and the service share nothing else. The file holds the generator's tensors, and its compute
graphs for runtimes other than PyTorch, which this module does not import; see
`training.loading` for the generator itself. Reading executes nothing in the file.
"""

import dataclasses
import hashlib
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from safetensors import SafetensorError

from training.files import FileError, find_kind, read_file, write_atomically
from training.generator_config import GeneratorConfig

MAX_BYTES = 1 << 30  # limits the memory that a wrong path can take; real files are far smaller
MAX_NAME = 200  # characters of a class name
VERSION = 2
_KINDS = ("mlp", "conv")
# URLs, headers and metrics contain a model's name unquoted.
_MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_METADATA_KEY = "artifact"  # a single key of sorted JSON: equal contents give equal bytes
# Stored beside the fields of `ArtifactInfo`. It detects damage, not manipulation. Files of early
# versions have none.
_DIGEST_KEY = "contents_sha256"
_GRAPHS_KEY = "graphs"  # also beside them: for each graph the names of its initialisers
# Prefixes of the names of tensors that are not the generator's own.
EMBEDDING = "label_embedding.weight"  # (num_classes, embedding_dim)
_GRAPH, _REFERENCE, QUANTISED = "onnx.", "reference.", "int8."

Precision = Literal["float32", "int8"]
Tensors = Mapping[str, NDArray[Any]]


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
    version: Literal[1, 2] = 2  # files of version 1 have no graphs

    def __post_init__(self) -> None:
        if len(self.class_names) != self.network.num_classes:
            raise ValueError(
                f"{len(self.class_names)} class names for {self.network.num_classes} classes"
            )
        if len(set(self.class_names)) != len(self.class_names):
            twice = next(name for name, n in Counter(self.class_names).items() if n > 1)
            raise ValueError(f"class names repeat: {_quote(twice)}")
        json.dumps((self.training, self.certificate), allow_nan=False)  # raises for NaN and inf

    @property
    def int8_is_lossless(self) -> bool:
        """True if the certificate shows that images in int8 are as good as those in float32."""
        measured = (self.certificate or {}).get("int8")
        return isinstance(measured, dict) and measured.get("lossless") is True

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


@dataclass(frozen=True, eq=False)
class Graph:
    """A generator's network in ONNX.

    It maps `latents` (N, latent_dim) and `embedded` (N, embedding_dim), labels or mixtures of them,
    to `images` (N, C, H, W) in [-1, 1]; all are float32.

    Attributes:
        model: a serialised `ModelProto` in which large initialisers have no values.
        initialisers: the values of these, by name.
    """

    model: bytes
    initialisers: Tensors


class Reference(NamedTuple):
    """A few images that the generator made when the artifact was written, to compare with."""

    latents: NDArray[np.float32]  # (N, latent_dim)
    labels: NDArray[np.int64]  # (N,)
    images: NDArray[np.float32]  # (N, C, H, W) in [-1, 1]


@dataclass(frozen=True, eq=False)
class Artifact:
    """An artifact's content, and the file's identity.

    Attributes:
        path: of the file.
        sha256: hexadecimal digest of the whole file, the identity of the model.
        info: the description.
        tensors: of the generator, by the names that they have in PyTorch.
        graphs: by precision; none in a file of an earlier version.
        reference: None in a file of an earlier version.
    """

    path: Path
    sha256: str
    info: ArtifactInfo
    tensors: Tensors
    graphs: Mapping[Precision, Graph]
    reference: Reference | None


_INFO = TypeAdapter(ArtifactInfo)
_NAMES = TypeAdapter(dict[Precision, list[str]])


def write_artifact(
    path: Path,
    info: ArtifactInfo,
    tensors: Tensors,
    graphs: Mapping[Precision, Graph],
    reference: Reference,
) -> None:
    """Write an artifact beside its target, sync it, and rename it into place.

    Args:
        path: of the file.
        info: the description; its version becomes the newest.
        tensors: of the generator, with finite values.
        graphs: their initialisers are among `tensors`, or have names with the prefix `QUANTISED`.
        reference: images of the generator.

    Raises:
        ArtifactError: the description could not be read again.
        OSError: the file cannot be written; a previous file is untouched.
    """
    stored = {**tensors}
    for precision, graph in graphs.items():
        for name, tensor in graph.initialisers.items():
            if not name.startswith(QUANTISED) and name not in tensors:
                raise ValueError(f"{name} is neither a tensor of the generator nor a changed one")
            stored[name] = tensor
        stored[_GRAPH + precision] = np.frombuffer(graph.model, dtype=np.uint8)
    stored |= {_REFERENCE + name: values for name, values in reference._asdict().items()}
    description = json.loads(json.dumps(dataclasses.asdict(info)))  # equal to what is read later
    description["version"] = VERSION
    _parse_info(path, description)
    description[_GRAPHS_KEY] = {each: sorted(graphs[each].initialisers) for each in graphs}
    stored = {name: tensor.copy(order="C") for name, tensor in stored.items()}
    description[_DIGEST_KEY] = _digest(description, safetensors.numpy.save(stored))
    metadata = json.dumps(description, sort_keys=True)
    write_atomically(path, safetensors.numpy.save(stored, {_METADATA_KEY: metadata}))


def read_artifact(path: Path) -> Artifact:
    """Read and check an artifact.

    The file is read once, so the checked contents are the ones in use. Whether the tensors are
    those of the network is checked where the network is built.

    Raises:
        ArtifactError: the file cannot be read, is not an artifact or is damaged, or a tensor is not
            finite.
    """
    data = read_file(path, MAX_BYTES, ArtifactError)
    header = _parse_header(path, data)
    description = _parse_description(path, header)
    written_digest = description.pop(_DIGEST_KEY, None)
    digest = _digest(description, data)
    names = _parse_names(path, description.pop(_GRAPHS_KEY, {}))
    info = _parse_info(path, description)
    try:
        stored = safetensors.numpy.load(data)
    except (SafetensorError, KeyError, ValueError) as error:
        raise ArtifactError(path, f"is not a valid safetensors file: {error}") from error
    for name, tensor in stored.items():
        check_values(path, name, tensor)
    _check_embedding(path, stored, info.network)
    if written_digest not in (None, digest):
        raise ArtifactError(path, "is damaged: its contents are not the ones that were written")
    graphs, reference = _take_graphs(path, stored, names), _take_reference(path, stored, info)
    own = {name: each for name, each in stored.items() if not name.startswith(QUANTISED)}
    return Artifact(path, hashlib.sha256(data).hexdigest(), info, own, graphs, reference)


def _check_embedding(path: Path, stored: Tensors, network: GeneratorConfig) -> None:
    """Raise ArtifactError unless the embedding, which is in no graph, is that of the network."""
    embedding = stored.get(EMBEDDING)
    if embedding is None:
        raise ArtifactError(path, f"the tensor {EMBEDDING!r} is missing")
    expected = [network.num_classes, network.embedding_dim]
    if embedding.dtype != np.float32 or list(embedding.shape) != expected:
        found = f"{embedding.dtype} {list(embedding.shape)}"
        raise ArtifactError(path, f"{EMBEDDING}: is {found}, expected float32 {expected}")


def _take_graphs(
    path: Path, stored: dict[str, NDArray[Any]], names: dict[Precision, list[str]]
) -> dict[Precision, Graph]:
    """Remove the graphs from the stored tensors, and return them with their initialisers."""
    graphs: dict[Precision, Graph] = {}
    for precision, initialisers in names.items():
        for name in (_GRAPH + precision, *initialisers):
            if name not in stored:
                raise ArtifactError(path, f"the tensor {name!r} is missing")
        model = stored.pop(_GRAPH + precision).tobytes()
        graphs[precision] = Graph(model, {name: stored[name] for name in initialisers})
    return graphs


def _take_reference(
    path: Path, stored: dict[str, NDArray[Any]], info: ArtifactInfo
) -> Reference | None:
    """Remove the reference images from the stored tensors, and return them."""
    taken = {name: stored.pop(_REFERENCE + name, None) for name in Reference._fields}
    if all(tensor is None for tensor in taken.values()):
        return None
    network = info.network
    shape = (network.channels, network.image_size, network.image_size)
    expected = {
        "latents": (np.dtype(np.float32), (network.latent_dim,)),
        "labels": (np.dtype(np.int64), ()),
        "images": (np.dtype(np.float32), shape),
    }
    tensors: list[NDArray[Any]] = []
    for name, tensor in taken.items():
        if tensor is None or (tensor.dtype, tensor.shape[1:]) != expected[name]:
            raise ArtifactError(path, f"{_REFERENCE}{name}: is not that of this network")
        tensors.append(tensor)
    reference = Reference(*tensors)
    labels = reference.labels
    if (
        len({len(tensor) for tensor in tensors}) > 1
        or not len(labels)
        or not (((labels >= 0) & (labels < network.num_classes)).all())
    ):
        raise ArtifactError(path, f"{_REFERENCE}labels: are not those of this network")
    return reference


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


def _parse_names(path: Path, names: object) -> dict[Precision, list[str]]:
    try:
        return _NAMES.validate_python(names)
    except ValidationError as error:
        raise ArtifactError(path, f"{_GRAPHS_KEY}: {error.errors()[0]['msg']}") from error


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


def check_values(path: Path, name: str, tensor: NDArray[Any]) -> None:
    """Raise ArtifactError if values are not finite, or are negative variances."""
    if tensor.dtype.kind == "f" and not np.isfinite(tensor).all():
        raise ArtifactError(path, f"{name}: holds values that are not finite")
    if name.endswith("running_var") and (tensor < 0).any():
        raise ArtifactError(path, f"{name}: holds negative variances")
