"""The loaded models, by name."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from service.engine import Engine, EngineError, resolve_dtype
from service.settings import Settings
from training.artifact import ArtifactError, ArtifactInfo, load_artifact
from training.devices import resolve_device

# A model's name stands in URLs, headers and metrics as it is.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_BUNDLED_DEFAULT = "mnist"


@dataclass(frozen=True)
class Model:
    """A model that is being served.

    Attributes:
        name: the stem of the artifact's file name.
        engine: makes its images.
        labels: the class index that each class name, and each index as a text, stands for.
    """

    name: str
    engine: Engine
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


class Registry:
    """The models of one service.

    Attributes:
        default: answers requests that name no model.
    """

    def __init__(self, models: list[Model], default: str) -> None:
        self._models = {model.name: model for model in models}
        self.default = self._models[default]

    def __iter__(self) -> Iterator[Model]:
        return iter(self._models.values())

    def find(self, name: str) -> Model | None:
        """The model of this name."""
        return self._models.get(name)

    @property
    def names(self) -> list[str]:
        """All names, sorted."""
        return list(self._models)


def load_registry(settings: Settings) -> Registry:
    """Load, warm up and check every model that the settings name.

    Raises:
        ArtifactError: a file is no valid artifact, or there is none, or it computes wrong images.
        DeviceError: the device is not there.
    """
    device = resolve_device(settings.device)
    dtype = resolve_dtype(settings.dtype, device)
    models = []
    paths = _artifact_paths(settings.weights)
    default = _default_name([path.stem for path in paths], settings)
    for path in paths:
        if not _NAME.fullmatch(path.stem):
            raise ArtifactError(
                path,
                "gives the model a name that is not allowed; allowed are up to 100 of the letters "
                "A to Z and a to z, digits, '.', '_' and '-', the first a letter or a digit",
            )
        artifact = load_artifact(path)
        try:
            engine = Engine(artifact, device=device, dtype=dtype, max_batch=settings.max_batch)
        except EngineError as error:
            raise ArtifactError(path, f"is not served: {error}") from error
        models.append(Model(path.stem, engine))
    return Registry(models, default)


def _default_name(names: list[str], settings: Settings) -> str:
    wanted = settings.default_model
    if wanted is None:
        return _BUNDLED_DEFAULT if _BUNDLED_DEFAULT in names else names[0]
    if wanted not in names:
        raise ArtifactError(
            settings.weights,
            f"holds no model {wanted!r} to be the default; allowed are {', '.join(names)}",
        )
    return wanted


def _artifact_paths(weights: Path) -> list[Path]:
    if not weights.is_dir():
        return [weights]
    try:
        found = [path for path in weights.iterdir() if path.suffix == ".safetensors"]
    except OSError as error:
        raise ArtifactError(weights, f"cannot be read: {error.strerror}") from error
    if not found:
        raise ArtifactError(weights, "holds no *.safetensors file")
    return sorted(found, key=lambda path: path.stem)  # of whole names mnist-mlp would come first
