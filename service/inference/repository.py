"""The loaded models, by name."""

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from service.inference.engine import Engine, resolve_dtype
from service.inference.errors import EngineError
from service.settings import Settings
from training.artifact import ArtifactError, ArtifactInfo, load_artifact
from training.devices import resolve_device

# A model's name stands in URLs, headers and metrics as it is.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_BUNDLED_DEFAULT = "mnist"


@dataclass
class ModelStats:
    """What came of the requests for a model, in this process.

    Attributes:
        since: when the model was loaded, in seconds since 1970.
        answered: requests whose images were made.
        images: of these.
        queue_s: seconds they waited in all.
        forward_s: seconds they were computed in all.
        failed: requests that were refused, or whose images could not be made.
        failed_s: seconds until that was known, in all.
        last_at: when the last images were made, in seconds since 1970; 0 for never.
    """

    since: float = field(default_factory=time.time)
    answered: int = 0
    images: int = 0
    queue_s: float = 0.0
    forward_s: float = 0.0
    failed: int = 0
    failed_s: float = 0.0
    last_at: float = 0.0


@dataclass(frozen=True)
class Model:
    """A model that is being served.

    Attributes:
        name: the stem of the artifact's file name.
        engine: makes its images.
        labels: the class index that each class name, and each index as a text, stands for.
        tally: what it did.
    """

    name: str
    engine: Engine
    tally: ModelStats = field(default_factory=ModelStats, repr=False, compare=False)
    labels: dict[str, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        names = self.info.class_names
        labels = {str(index): index for index in range(len(names))}
        # A name goes before an index, and the first of equal names before the others.
        labels |= {name: index for index, name in reversed(list(enumerate(names)))}
        object.__setattr__(self, "labels", labels)

    @property
    def identity(self) -> bytes:
        """The X-Model header: the name, and which file of that name."""
        return f"{self.name}@sha256:{self.sha256}".encode()

    @property
    def info(self) -> ArtifactInfo:
        """What the artifact says of itself."""
        return self.engine.artifact.info

    @property
    def sha256(self) -> str:
        """The model's identity: the digest of its file."""
        return self.engine.artifact.sha256


@dataclass(frozen=True, eq=False)
class Refusal:
    """Why something in the weights is not served as it is; another attempt gives another one."""

    path: Path
    cause: str


@dataclass(frozen=True)
class Found:
    """What the weights hold.

    Attributes:
        models: in the order of their names; the same objects as before where no file changed.
        default: the name of the model that answers where none is named.
        refused: by file name, what is not served.
    """

    models: Sequence[Model]
    default: str
    refused: Mapping[str, Refusal] = field(default_factory=dict)


class ModelRepository:
    """The models of one service.

    Attributes:
        default: answers requests that name no model.
        refused: by file name, what came into the weights and is not served.
        weights: where the models are from; None if not from files.
    """

    def __init__(
        self, models: Sequence[Model], default: str, weights: "Weights | None" = None
    ) -> None:
        self.weights = weights
        self.replace(Found(models, default))

    def __iter__(self) -> Iterator[Model]:
        return iter(self._models.values())

    def find(self, name: str) -> Model | None:
        """The model of this name."""
        return self._models.get(name)

    @property
    def names(self) -> list[str]:
        """All names, sorted."""
        return list(self._models)

    def replace(self, found: Found) -> None:
        """Have these models from now on; called on the thread that reads them."""
        models = {model.name: model for model in found.models}
        self._models, self.default, self.refused = models, models[found.default], found.refused


_Stamp = tuple[int, int, int] | None


class Weights:
    """The artifacts that the settings name, and the device to load them onto.

    Not for two threads at a time.

    Raises:
        DeviceError: the device is not there.
    """

    def __init__(self, settings: Settings) -> None:
        self.path = settings.models
        self._wanted_default = settings.default_model
        self._max_batch = settings.max_batch
        self._device = resolve_device(settings.device)
        self._dtype = resolve_dtype(settings.dtype, self._device)
        self._stamps: dict[Path, _Stamp] = {}  # of files when they were last read

    def load(self) -> ModelRepository:
        """Load, warm up and check every model.

        Raises:
            ArtifactError: a file is no valid artifact, or there is none, or it computes wrong
                images.
        """
        paths = artifact_paths(self.path)
        names = [path.stem for path in paths]
        default = self._choose_default(names)
        if default is None:
            raise ArtifactError(
                self.path,
                f"holds no model {self._wanted_default!r} to be the default; allowed are "
                f"{', '.join(names)}",
            )
        return ModelRepository([self._load(path) for path in paths], default, self)

    def look_again(self, serving: ModelRepository, *, afresh: bool = False) -> Found:
        """Load the files that changed since they were last read, or all of them `afresh`.

        A file that is refused leaves the model of its name in service. So does removing what has to
        be the default, and nothing changes where the folder cannot be read or holds nothing, as
        happens to a disk that is not mounted.
        """
        try:
            paths = artifact_paths(self.path)
        except ArtifactError as error:
            refused = {error.path.name: _refusal(serving, error.path, error.cause)}
            return Found(list(serving), serving.default.name, refused)
        kept = {} if afresh else self._stamps
        self._stamps = {path: kept[path] for path in paths if path in kept}
        models: dict[str, Model] = {}
        refused = {}
        for path in paths:
            model, refusal = self._look_at(path, serving)
            if model is not None:
                models[path.stem] = model
            if refusal is not None:
                refused[path.name] = refusal
        default = self._choose_default(list(models))
        if default is None:
            default = serving.default.name
            path = self.path / f"{default}.safetensors"
            cause = "was removed; it is still served, because no other file may be the default"
            models[default] = serving.default
            refused[path.name] = _refusal(serving, path, cause)
        return Found([models[name] for name in sorted(models)], default, refused)

    def _look_at(self, path: Path, serving: ModelRepository) -> tuple[Model | None, Refusal | None]:
        """The model for the name of a file, where there is one, and why it is not the file's."""
        current = serving.find(path.stem)
        if path in self._stamps and self._stamps[path] == _stamp(path):
            return current, serving.refused.get(path.name)
        try:
            return self._load(path, current), None
        except ArtifactError as error:
            return current, Refusal(path, error.cause)

    def _load(self, path: Path, current: Model | None = None) -> Model:
        """The model of a file, which is the current one where the bytes are the same."""
        self._stamps[path] = _stamp(path)  # before it is read: a change after that is seen later
        if not _NAME.fullmatch(path.stem):
            raise ArtifactError(
                path,
                "gives the model a name that is not allowed; allowed are up to 100 of the letters "
                "A to Z and a to z, digits, '.', '_' and '-', the first a letter or a digit",
            )
        artifact = load_artifact(path)
        if current is not None and current.sha256 == artifact.sha256:
            return current
        try:
            engine = Engine(
                artifact, device=self._device, dtype=self._dtype, max_batch=self._max_batch
            )
        except (EngineError, RuntimeError) as error:  # the latter of a device, as out of memory
            cause = str(error).partition("\n")[0]
            raise ArtifactError(path, f"is not served: {cause}") from error
        return Model(path.stem, engine)

    def _choose_default(self, names: list[str]) -> str | None:
        """Which of some names is the default; None where none of them may be."""
        wanted = self._wanted_default
        if wanted is None:
            return _BUNDLED_DEFAULT if _BUNDLED_DEFAULT in names else next(iter(names), None)
        return wanted if wanted in names else None


def load_repository(settings: Settings) -> ModelRepository:
    """Load, warm up and check every model that the settings name.

    Raises:
        ArtifactError: a file is no valid artifact, or there is none, or it computes wrong images.
        DeviceError: the device is not there.
    """
    return Weights(settings).load()


def _refusal(serving: ModelRepository, path: Path, cause: str) -> Refusal:
    """A refusal, the same one as long as the cause does not change."""
    known = serving.refused.get(path.name)
    return known if known is not None and known.cause == cause else Refusal(path, cause)


def _stamp(path: Path) -> _Stamp:
    """What changes with a file, whether it is replaced or written to; None where there is none."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def artifact_paths(weights: Path) -> list[Path]:
    """The artifacts that weights name, in the order of their models' names.

    Raises:
        ArtifactError: there is none, or the folder cannot be read.
    """
    try:
        if not weights.is_dir():
            weights.stat()  # raises where there is none
            return [weights]
        found = [path for path in weights.iterdir() if path.suffix == ".safetensors"]
    except OSError as error:
        raise ArtifactError(weights, f"cannot be read: {error.strerror}") from error
    if not found:
        raise ArtifactError(weights, "holds no *.safetensors file")
    return sorted(found, key=lambda path: path.stem)  # of whole names mnist-mlp would come first
