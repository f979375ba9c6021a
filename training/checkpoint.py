"""Checkpoints: everything a run needs to go on exactly where it stopped. Private to this code.

A checkpoint is no artifact: it resumes, it does not serve, and another version may refuse it. The
file is a line that says what it is, the SHA-256 of the rest, and the rest as PyTorch saves it, so
that no damage can pass for a state.
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
from training.files import write_atomically
from training.loop import TrainState

_MAGIC = b"cgan checkpoint, version 3\n"
_DIGEST_BYTES = 32
_CONFIG = TypeAdapter(TrainingConfig)


class CheckpointError(Exception):
    """A checkpoint that cannot be written, read, or continued; names the path and the cause."""


@dataclass(frozen=True, kw_only=True)
class RunMetadata:
    """What must be the same for a run to go on.

    Attributes:
        dataset: its name.
        dataset_digest: of its contents.
        preset: the preset's name.
        seed: of the run.
        config: the training configuration.
        minutes: the time budget, where the run has one.
        probe: gamma -> score, where a probe chose the configuration's penalty.
        began_with: the run whose networks this one began with, where it did; see `origin`.
    """

    dataset: str
    dataset_digest: str
    preset: str
    seed: int
    config: TrainingConfig
    minutes: float | None
    probe: dict[str, float] | None = None
    began_with: dict[str, Any] | None = None


def save_checkpoint(
    path: Path, state: TrainState, identity: RunMetadata, best: dict[str, Any] | None
) -> None:
    """Write a checkpoint atomically: where that fails, the one before it survives.

    Args:
        path: where to.
        state: to go on from.
        identity: of the run.
        best: the best snapshot so far, as plain values and tensors.

    Raises:
        CheckpointError: the file cannot be written.
    """
    contents = {
        "identity": dataclasses.asdict(identity),
        "state": state.state_dict(),
        "best": best,
    }
    buffer = io.BytesIO()
    torch.save(contents, buffer)
    payload = buffer.getvalue()
    try:
        write_atomically(path, _MAGIC + hashlib.sha256(payload).digest() + payload)
    except OSError as error:
        kept = "; the checkpoint before it is intact" if path.exists() else ""
        raise CheckpointError(f"{path}: cannot be written: {error.strerror}{kept}") from error


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint that has been read.

    Attributes:
        path: of the file.
        identity: of the run.
        state: for `restore`.
        best: the best snapshot so far, as it was given to `save_checkpoint`.
    """

    path: Path
    identity: RunMetadata
    state: dict[str, Any]
    best: dict[str, Any] | None

    def restore(self, state: TrainState) -> None:
        """Go on from here, in a state that was built from the same configuration.

        Raises:
            CheckpointError: the contents do not fit the state.
        """
        try:
            state.load_state_dict(self.state)
        except (KeyError, RuntimeError, ValueError, TypeError) as error:
            cause = str(error).splitlines()[0]
            raise CheckpointError(
                f"{self.path}: does not fit this configuration: {cause}"
            ) from error

    def begin(self, state: TrainState) -> None:
        """Give a fresh state these networks and optimisers, as the beginning of another run.

        Raises:
            CheckpointError: the networks do not fit the state.
        """
        began, seed = state.began, state.rng.initial_seed()
        self.restore(state)
        state.began, state.images_seen, state.lr_scale = began, 0, 1.0
        state.rng.manual_seed(seed)

    def origin(self) -> dict[str, Any]:
        """What a run that began with this one says of it."""
        origin = dataclasses.asdict(self.identity)
        return {**origin, "images_seen": self.state["images_seen"]}


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint: whose it is, and what to go on from.

    Raises:
        CheckpointError: there is none, or it is damaged or of another version.
    """
    payload = _read_payload(path)
    try:
        contents = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path}: is no checkpoint; nothing in it was executed") from error
    try:
        stored = dict(contents["identity"])
        config = _CONFIG.validate_python(stored.pop("config"))
        identity = RunMetadata(config=config, **stored)
        return Checkpoint(
            path=path, identity=identity, state=contents["state"], best=contents["best"]
        )
    except (KeyError, TypeError, ValidationError) as error:
        raise CheckpointError(f"{path}: was written by another version of this code") from error


def _read_payload(path: Path) -> bytes:
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: there is no checkpoint to resume from") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    if not data.startswith(_MAGIC):
        raise CheckpointError(f"{path}: is no checkpoint, or one of another version of this code")
    start = len(_MAGIC) + _DIGEST_BYTES
    payload = data[start:]
    if hashlib.sha256(payload).digest() != data[len(_MAGIC) : start]:
        raise CheckpointError(f"{path}: is damaged: its contents do not have their SHA-256")
    return payload
