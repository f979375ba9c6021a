"""The loaded models by name, and the loader that keeps them in step with their files."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from service.inference.devices import resolve_device
from service.inference.engine import Engine
from service.settings import Settings
from training.artifact import (
    ArtifactError,
    ArtifactInfo,
    check_model_name,
    list_artifacts,
    read_artifact,
)

_BUNDLED_DEFAULT = "mnist"


@dataclass
class ModelStats:
    """Totals of the requests for a model in this process; times are in seconds since 1970."""

    since: float = field(default_factory=time.time)  # when the model was loaded
    answered: int = 0  # requests whose images were generated
    images: int = 0  # of these requests
    queue_s: float = 0.0  # these requests waited
    forward_s: float = 0.0  # these requests were computed
    failed: int = 0  # requests that were rejected or failed
    failed_s: float = 0.0  # these took
    last_at: float = 0.0  # when the last images were generated; 0 for never


@dataclass(frozen=True)
class Model:
    """A model that is served."""

    name: str  # stem of the artifact's file name
    engine: Engine
    stats: ModelStats = field(default_factory=ModelStats, repr=False, compare=False)

    @cached_property
    def labels(self) -> dict[str, int]:
        """Class indices by label: a class name or, if no class has that name, an index as text."""
        names = self.info.class_names
        by_index = {str(index): index for index in range(len(names))}
        return by_index | {name: index for index, name in enumerate(names)}

    @property
    def ambiguous_labels(self) -> list[str]:
        """Names of classes that are also the index of another class, in the order of these."""
        indices = range(len(self.info.class_names))
        return [str(index) for index in indices if self.labels[str(index)] != index]

    @property
    def versioned_name(self) -> str:
        """The name and the file's digest, as the X-Model header has it."""
        return f"{self.name}@sha256:{self.sha256}"

    @property
    def info(self) -> ArtifactInfo:
        """The metadata of the artifact."""
        return self.engine.artifact.info

    @property
    def sha256(self) -> str:
        """The digest of the artifact's file, which identifies the model."""
        return self.engine.artifact.sha256


@dataclass(frozen=True)
class ModelSet:
    """The models of a folder or file."""

    models: Sequence[Model]  # by name; the same objects as before if their files did not change
    default: str  # name of the model for requests that name none
    load_errors: Mapping[Path, str] = field(default_factory=dict)  # causes by file


class ModelRepository:
    """The models of one service.

    Attributes:
        default: answers requests that name no model.
        load_errors: by file, why it is not served as it is.
        loader: loads the models again; None if they are not from files.
    """

    def __init__(
        self, models: Sequence[Model], default: str, loader: "ModelLoader | None" = None
    ) -> None:
        self.loader = loader
        self.replace(ModelSet(models, default))

    def __iter__(self) -> Iterator[Model]:
        return iter(self._models.values())

    def get(self, name: str) -> Model | None:
        """Return the model of this name."""
        return self._models.get(name)

    @property
    def names(self) -> list[str]:
        """All names, sorted."""
        return list(self._models)

    def replace(self, found: ModelSet) -> None:
        """Serve these models from now on; called on the thread that reads them."""
        models = {model.name: model for model in found.models}
        self._models, self.default = models, models[found.default]
        self.load_errors = found.load_errors


_FileSignature = tuple[int, int, int] | None


class ModelLoader:
    """The artifacts that the settings name, and the device to load them onto.

    Not safe for several threads at a time.

    Raises:
        DeviceError: the device is missing.
    """

    def __init__(self, settings: Settings) -> None:
        self.path = settings.models
        self._requested_default = settings.default_model
        self._max_batch = settings.max_batch
        self._device = resolve_device(settings.device)
        self._dtype = settings.dtype
        self._signatures: dict[Path, _FileSignature] = {}  # of files when they were last read

    def rescan(self, serving: ModelRepository, *, force: bool = False) -> ModelSet:
        """Load the files that changed since they were last read, or all of them with `force`.

        A file that cannot be loaded leaves the model of its name in service. A removed file does
        so if no other may be the default, and nothing changes if the folder is unreadable or
        empty, as happens to a disk that is not mounted.
        """
        try:
            paths = artifact_paths(self.path)
        except ArtifactError as error:
            return ModelSet(list(serving), serving.default.name, {error.path: error.cause})
        kept = {} if force else self._signatures
        self._signatures = {path: kept[path] for path in paths if path in kept}
        models: dict[str, Model] = {}
        errors: dict[Path, str] = {}
        for path in paths:
            model = serving.get(path.stem)
            if path in self._signatures and self._signatures[path] == _file_signature(path):
                if path in serving.load_errors:
                    errors[path] = serving.load_errors[path]
            else:
                try:
                    model = self.load(path, model)
                except ArtifactError as error:
                    errors[path] = error.cause
            if model is not None:
                models[path.stem] = model
        default = self.choose_default(list(models))
        if default is None:
            default = serving.default.name
            models[default] = serving.default
            errors[self.path / f"{default}.safetensors"] = (
                "was removed; it is still served, because no other file may be the default"
            )
        return ModelSet([models[name] for name in sorted(models)], default, errors)

    def load(self, path: Path, current: Model | None = None) -> Model:
        """Load a file, warm up its engine and test it; keep the current model of equal bytes.

        Raises:
            ArtifactError: the file is invalid or computes wrong images.
        """
        # Taken before the file is read, so that a later change is noticed.
        self._signatures[path] = _file_signature(path)
        check_model_name(path)
        artifact = read_artifact(path)
        if current is not None and current.sha256 == artifact.sha256:
            return current
        try:
            engine = Engine(
                artifact, device=self._device, dtype=self._dtype, max_batch=self._max_batch
            )
        except Exception as error:  # out of memory, for example: runtimes share no base class
            cause = str(error).partition("\n")[0]
            raise ArtifactError(path, f"cannot be served: {cause}") from error
        return Model(path.stem, engine)

    def choose_default(self, names: list[str]) -> str | None:
        """Return the name of the default model; None if none of the names may be it."""
        wanted = self._requested_default
        if wanted is None:
            return _BUNDLED_DEFAULT if _BUNDLED_DEFAULT in names else next(iter(names), None)
        return wanted if wanted in names else None


def load_repository(settings: Settings) -> ModelRepository:
    """Load, warm up and test every model that the settings name.

    Raises:
        ArtifactError: no file is found, or a file is invalid or computes wrong images.
        DeviceError: the device is missing.
    """
    loader = ModelLoader(settings)
    paths = artifact_paths(loader.path)
    names = [path.stem for path in paths]
    default = loader.choose_default(names)
    if default is None:
        raise ArtifactError(
            loader.path,
            f"has no model {settings.default_model!r} to be the default; expected one of "
            f"{', '.join(names)}",
        )
    return ModelRepository([loader.load(path) for path in paths], default, loader)


def _file_signature(path: Path) -> _FileSignature:
    """Return values that change when a file is replaced or written to; None without a file."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def artifact_paths(path: Path) -> list[Path]:
    """Return the artifacts of a folder, sorted by their models' names, or a file itself.

    Raises:
        ArtifactError: no artifact was found, or the folder cannot be read.
    """
    try:
        if not path.is_dir():
            path.stat()  # raises if the file is missing
            return [path]
        found = list_artifacts(path)
    except OSError as error:
        raise ArtifactError(path, f"cannot be read: {error.strerror}") from error
    if not found:
        raise ArtifactError(path, "holds no *.safetensors file")
    return found
