"""The start of a run with networks that an earlier run trained, possibly on other classes."""

import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from training.artifact import EMBEDDING
from training.checkpoint import read_checkpoint
from training.config import PRESETS
from training.files import FileError
from training.generator_config import GeneratorConfig
from training.loading import load_artifact
from training.run_log import RunFolder
from training.state import TrainState

# Each network of a state and its optimiser.
_NETWORKS = {
    "generator": "generator_optimizer",
    "discriminator": "discriminator_optimizer",
    "ema": None,
}


logger = logging.getLogger(__name__)


class TransferError(FileError):
    """Networks that cannot start a run."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """Trained networks, of a run's folder or of an artifact."""

    path: Path
    preset: str  # of the run that trained them
    network: GeneratorConfig | None  # None for a checkpoint of an earlier release
    r1_gamma: float | None
    contents: dict[str, Any]  # parts of `TrainState.state_dict`; an artifact has generators only
    origin: dict[str, Any]  # the description that the new run keeps

    def check(self, network: GeneratorConfig) -> None:
        """Check that the networks can start a run of this generator, on other classes too.

        Raises:
            TransferError: they cannot; says what to do.
        """
        if self.network is None:
            return
        have, want = ({**asdict(each), "num_classes": None} for each in (self.network, network))
        if _images(self.network) != _images(network):
            raise TransferError(
                self.path,
                f"generates images of {_images(self.network)}, but the data set has "
                f"{_images(network)}; give a folder of images, which are converted",
            )
        for name, value in want.items():
            if have.get(name) != value:
                raise TransferError(
                    self.path,
                    f"its generator has {name} {have.get(name)}, but that of preset "
                    f"{self.preset!r} has {value}; start without --init-from",
                )
        if self.network.num_classes != network.num_classes:
            logger.info(
                "%s: generates %d classes; the %d of the data set start with new label embeddings",
                *(self.path, self.network.num_classes, network.num_classes),
            )

    def initialise(self, state: TrainState) -> None:
        """Load the networks and their optimisers into a fresh state.

        The label embeddings of another number of classes stay fresh, and so does a discriminator
        that the source lacks.

        Raises:
            TransferError: the networks do not fit.
        """
        contents = state.state_dict()
        for name, optimizer in _NETWORKS.items():
            if name not in self.contents:
                continue
            fresh, trained = contents[name], dict(self.contents[name])
            moments = self.contents.get(optimizer) if optimizer else None
            if EMBEDDING in trained and len(trained[EMBEDDING]) != len(fresh[EMBEDDING]):
                trained[EMBEDDING] = fresh[EMBEDDING]
                moments = moments and _without_embedding(moments, getattr(state, name))
            contents[name] = trained
            if optimizer and moments:
                contents[optimizer] = moments
        try:
            state.load_state_dict(contents)
        except (KeyError, RuntimeError, ValueError, TypeError) as error:
            cause = str(error).splitlines()[-1].strip()
            raise TransferError(self.path, f"its networks do not fit: {cause}") from error


def read_source(path: Path, preset: str | None = None, image_size: int | None = None) -> Source:
    """Read the networks of a run's folder or of an artifact.

    Raises:
        FileError: the checkpoint or the artifact is missing or not valid.
        TransferError: it has another preset or image size than the given one.
    """
    source = _read_artifact(path) if path.is_file() else _read_checkpoint(path)
    network = source.network
    if preset not in (None, source.preset):
        raise TransferError(
            source.path,
            f"its preset is {source.preset!r}, but {preset!r} was given; leave out --preset",
        )
    if network and image_size not in (None, network.image_size):
        raise TransferError(
            source.path,
            f"generates images of {_images(network)}, but --image-size {image_size} was given; "
            "leave it out",
        )
    return source


def _read_checkpoint(folder: Path) -> Source:
    checkpoint = read_checkpoint(RunFolder(folder).checkpoint)
    metadata = checkpoint.metadata
    origin = {**asdict(metadata), "images_seen": checkpoint.state["images_seen"]}
    del origin["data_path"]  # the artifact of the new run is public
    return Source(
        path=checkpoint.path,
        preset=metadata.preset,
        network=metadata.network,
        r1_gamma=metadata.config.r1_gamma,
        contents=checkpoint.state,
        origin=origin,
    )


def _read_artifact(path: Path) -> Source:
    artifact = load_artifact(path)
    info, weights = artifact.info, artifact.generator.state_dict()
    preset, config = info.training.get("preset"), info.training.get("config")
    gamma = config.get("r1_gamma") if isinstance(config, dict) else None
    return Source(
        path=path,
        preset=preset if preset in PRESETS else info.network.kind,  # presets have these names too
        network=info.network,
        r1_gamma=float(gamma) if isinstance(gamma, int | float) else None,
        contents={"generator": weights, "ema": weights},
        origin={**info.training, "images_seen": info.images_seen, "sha256": artifact.sha256},
    )


def _images(network: GeneratorConfig) -> str:
    colour = "grey" if network.channels == 1 else "colour"
    return f"{network.image_size}x{network.image_size}, {colour}"


def _without_embedding(moments: dict[str, Any], network: nn.Module) -> dict[str, Any]:
    """Return the state of an optimiser without that of the label embedding."""
    index = [name for name, _ in network.named_parameters()].index(EMBEDDING)
    kept = {key: value for key, value in moments["state"].items() if key != index}
    return {**moments, "state": kept}
