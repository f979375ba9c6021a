"""Checkpoints, from which a run resumes exactly. The format is private to this package.

A file is a line that names the format, the SHA-256 of the rest, and the rest as PyTorch saves it.
The digest detects any damage.
"""

import dataclasses
import hashlib
import io
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError

from training.config import TrainingConfig
from training.files import FileError, find_kind, write_atomically
from training.generator_config import GeneratorConfig
from training.state import TrainState

_MAGIC = b"cgan checkpoint, version 3\n"
_DIGEST_BYTES = 32
_CONFIG = TypeAdapter(TrainingConfig)
_NETWORK: TypeAdapter[GeneratorConfig | None] = TypeAdapter(GeneratorConfig | None)
# Names in checkpoints that earlier releases wrote.
_RENAMED = {
    "identity": "metadata",
    "began_with": "initialised_from",
    "probe": "gamma_scores",
    "penalty": "r1_gamma",
    "mismatch": "mismatch_weight",
    "discriminator_hidden": "discriminator_widths",
    "glance": "metrics",
    "last_look": "last_evaluation",
}


class CheckpointError(FileError):
    """A checkpoint that cannot be written, read or resumed."""


@dataclass(frozen=True, kw_only=True)
class RunMetadata:
    """The description of a run, which a resumption must match."""

    dataset: str
    dataset_digest: str  # SHA-256 of its contents
    preset: str
    seed: int
    config: TrainingConfig
    minutes: float | None  # the time budget, if the run has one
    network: GeneratorConfig | None = None  # None in a checkpoint of an earlier release
    prepared_s: float = 0.0  # part of the minutes that was spent before training
    gamma_scores: dict[str, float] | None = None  # gamma -> score, if there was a search
    initialised_from: dict[str, Any] | None = None  # metadata of the run with the first networks
    # Absolute path of a folder of images, or of the files of a named data set; None for their
    # default place, and in a checkpoint of an earlier release.
    data_path: str | None = None


def save_checkpoint(
    path: Path, state: TrainState, metadata: RunMetadata, best: dict[str, Any] | None
) -> None:
    """Write a checkpoint atomically; `best` holds plain values and tensors only.

    Raises:
        CheckpointError: the file cannot be written; the previous checkpoint is intact.
    """
    contents = {
        "metadata": dataclasses.asdict(metadata),
        "state": state.state_dict(),
        "best": best,
    }
    buffer = io.BytesIO()
    torch.save(contents, buffer)
    payload = buffer.getvalue()
    try:
        write_atomically(path, _MAGIC + hashlib.sha256(payload).digest() + payload)
    except OSError as error:
        kept = "; the previous checkpoint is intact" if path.exists() else ""
        raise CheckpointError(path, f"cannot be written: {error.strerror}{kept}") from error


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The contents of a checkpoint file."""

    path: Path
    metadata: RunMetadata
    state: dict[str, Any]  # contents for `TrainState.load_state_dict`
    best: dict[str, Any] | None  # the best snapshot, as it was given to `save_checkpoint`

    def restore(self, state: TrainState) -> None:
        """Load the stored state into a state of the same configuration.

        Raises:
            CheckpointError: the contents do not fit the state.
        """
        try:
            state.load_state_dict(self.state)
        except (KeyError, RuntimeError, ValueError, TypeError) as error:
            cause = str(error).splitlines()[-1].strip()  # the first line only announces it
            raise CheckpointError(self.path, f"incompatible configuration: {cause}") from error


def read_checkpoint(path: Path) -> Checkpoint:
    """Read and verify a checkpoint.

    Raises:
        CheckpointError: the file is missing, damaged or of an incompatible version.
    """
    payload = _read_payload(path)
    try:
        contents = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError) as error:
        raise CheckpointError(path, "not a checkpoint; no code in it was executed") from error
    try:
        contents = _with_current_names(contents)
        stored = _with_current_names(contents["metadata"])
        config = _CONFIG.validate_python(_with_current_names(stored.pop("config")))
        network = _NETWORK.validate_python(stored.pop("network", None))
        metadata = RunMetadata(config=config, network=network, **stored)
        best = contents["best"] and _with_current_names(contents["best"])
        return Checkpoint(path=path, metadata=metadata, state=contents["state"], best=best)
    except (AttributeError, KeyError, TypeError, ValidationError) as error:
        raise CheckpointError(path, "incompatible version; start a new run") from error


def _with_current_names(values: dict[str, Any]) -> dict[str, Any]:
    return {_RENAMED.get(name, name): value for name, value in values.items()}


def _read_payload(path: Path) -> bytes:
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise CheckpointError(path, "does not exist; give the folder of an earlier run") from error
    except OSError as error:
        raise CheckpointError(path, f"cannot be read: {error.strerror}") from error
    if not data.startswith(_MAGIC):
        kind = find_kind(data)
        found = "" if kind in (None, "a file of torch.save", "a pickle") else f"; it is {kind}"
        raise CheckpointError(path, f"not a checkpoint, or of an incompatible version{found}")
    start = len(_MAGIC) + _DIGEST_BYTES
    payload = data[start:]
    if hashlib.sha256(payload).digest() != data[len(_MAGIC) : start]:
        raise CheckpointError(path, "damaged: the contents do not match their SHA-256")
    return payload
