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

_MAGIC = b"cgan checkpoint, version 2\n"
_DIGEST_BYTES = 32
_CONFIG = TypeAdapter(TrainingConfig)


class CheckpointError(Exception):
    """A checkpoint that cannot be written, read, or continued; names the path and the cause."""


@dataclass(frozen=True, kw_only=True)
class Identity:
    """What must be the same for a run to go on.

    Attributes:
        dataset: its name.
        dataset_digest: of its contents.
        preset: the preset's name.
        seed: of the run.
        config: the training configuration.
        minutes: the time budget, where the run has one.
    """

    dataset: str
    dataset_digest: str
    preset: str
    seed: int
    config: TrainingConfig
    minutes: float | None


def save_checkpoint(path: Path, state: TrainState, identity: Identity) -> None:
    """Write a checkpoint atomically: where that fails, the one before it survives.

    Raises:
        CheckpointError: the file cannot be written.
    """
    contents = {
        "identity": dataclasses.asdict(identity),
        "generator": state.generator.state_dict(),
        "discriminator": state.discriminator.state_dict(),
        "ema": state.ema.state_dict(),
        "generator_optimizer": state.generator_optimizer.state_dict(),
        "discriminator_optimizer": state.discriminator_optimizer.state_dict(),
        "rng": state.rng.get_state(),
        "images_seen": state.images_seen,
        "elapsed_s": state.elapsed_s,
    }
    buffer = io.BytesIO()
    torch.save(contents, buffer)
    payload = buffer.getvalue()
    try:
        write_atomically(path, _MAGIC + hashlib.sha256(payload).digest() + payload)
    except OSError as error:
        kept = "; the checkpoint before it is intact" if path.exists() else ""
        raise CheckpointError(f"{path}: cannot be written: {error.strerror}{kept}") from error


def read_checkpoint(path: Path) -> tuple[Identity, dict[str, Any]]:
    """Read a checkpoint: whose it is, and the contents for `restore`.

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
        return Identity(config=config, **stored), contents
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


def restore(path: Path, contents: dict[str, Any], state: TrainState) -> None:
    """Put a checkpoint's contents into a state that was built from the same configuration.

    Raises:
        CheckpointError: the contents do not fit the state.
    """
    try:
        for part in (
            "generator",
            "discriminator",
            "ema",
            "generator_optimizer",
            "discriminator_optimizer",
        ):
            getattr(state, part).load_state_dict(contents[part])
        state.rng.set_state(contents["rng"])
        state.images_seen = contents["images_seen"]
        state.elapsed_s = contents["elapsed_s"]
    except (KeyError, RuntimeError, ValueError, TypeError) as error:
        first_line = str(error).splitlines()[0]
        raise CheckpointError(f"{path}: does not fit this configuration: {first_line}") from error
