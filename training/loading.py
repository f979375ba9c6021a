"""Loading: an artifact as a generator of PyTorch."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from training.artifact import Artifact, ArtifactError, read_artifact
from training.files import FileError
from training.networks import Generator, Uninitialised, build_generator


@dataclass(frozen=True, eq=False)
class LoadedArtifact(Artifact):
    """An artifact with its generator, in evaluation mode on the CPU."""

    generator: Generator


def load_artifact(path: Path) -> LoadedArtifact:
    """Read and check an artifact, and build its generator.

    Raises:
        ArtifactError: as `read_artifact`; or the tensors are not those of the file's configuration
            by name, dtype or shape.
    """
    artifact = read_artifact(path)
    fields = {each.name: getattr(artifact, each.name) for each in dataclasses.fields(artifact)}
    return LoadedArtifact(**fields, generator=build_from(artifact))


def build_from(artifact: Artifact) -> Generator:
    """Return the generator of an artifact, in evaluation mode on the CPU.

    Raises:
        ArtifactError: the tensors are not those of its configuration by name, dtype or shape.
    """
    path = artifact.path
    tensors = {name: torch.from_numpy(each) for name, each in artifact.tensors.items()}
    with torch.device("meta"), Uninitialised():  # shapes only: a malicious file takes no memory
        generator = build_generator(artifact.info.network)
    expected = generator.state_dict()
    for name, want in expected.items():
        if name not in tensors:
            raise ArtifactError(path, f"the tensor {name!r} is missing")
        check_tensor(path, name, tensors[name], want, (want.dtype,), ArtifactError)
    for name in tensors:
        if name not in expected:
            raise ArtifactError(path, f"the tensor {name!r} does not belong to this network")
    generator.load_state_dict(tensors, assign=True)
    return generator.eval().requires_grad_(False)


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
    if not have.isfinite().all():
        raise error(path, f"{name}: holds values that are not finite")
    if name.endswith("running_var") and (have < 0).any():
        raise error(path, f"{name}: holds negative variances")
