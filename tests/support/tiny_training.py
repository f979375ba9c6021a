"""A data set, networks and a configuration small enough to train in a test.

Its two classes are easy to tell apart: one is bright on the left half, the other on the right.
"""

import gzip
import hashlib
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from training import config
from training.artifact import ArtifactInfo
from training.config import TrainingConfig
from training.data import named as data
from training.data.named import FILES, Dataset, DatasetSpec
from training.generator_config import ConvGeneratorConfig, GeneratorConfig, MLPGeneratorConfig
from training.loop import recompute_batch_norm, train_step
from training.networks import build_generator
from training.quality.certificate import CertificateSize
from training.quality.classifier import FeatureClassifier, train_classifier
from training.saving import save_artifact
from training.state import TrainState, create_state

CPU = torch.device("cpu")
CLASS_NAMES = ("left", "right")

NETWORK = MLPGeneratorConfig(
    num_classes=2, channels=1, image_size=8, latent_dim=9, embedding_dim=3, hidden=(16, 32, 24)
)
CONV_NETWORK = ConvGeneratorConfig(
    num_classes=2,
    channels=1,
    image_size=8,
    latent_dim=9,
    embedding_dim=3,
    style_dim=16,
    widths=(8,),
)
CONFIG = TrainingConfig(
    generator="mlp",
    discriminator="mlp",
    discriminator_widths=(32, 16),
    r1_gamma=0.5,
    penalty_interval=2,
    batch_size=16,
    images=640,
    lr=1e-3,
    precision="float32",
    ema_half_life=100.0,
)
CONV = replace(
    CONFIG,
    generator="conv",
    generator_width=8,
    discriminator="residual",
    discriminator_widths=(8, 16),
    mismatch_weight=0.3,
)
PAPER = replace(
    CONFIG,
    objective="cross-entropy",
    r1_gamma=0.0,
    penalty_interval=1,
    lr_schedule="constant",
    ema_half_life=0.0,
)


CERTIFICATE_SIZE = CertificateSize(images=200, gan_train_images=64)


def arrays(count: int, seed: int) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """Images (N, 8, 8) and labels (N,) as their files hold them."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, count, dtype=np.uint8)
    images = rng.integers(0, 64, (count, 8, 8), dtype=np.uint8)
    for image, label in zip(images, labels, strict=True):
        image[:, 4 * label : 4 * label + 4] += np.uint8(160)
    return images, labels


def dataset(count: int = 256, seed: int = 0) -> Dataset:
    images, labels = arrays(count, seed)
    return Dataset(
        name="tiny",
        images=torch.from_numpy(images)[:, None],
        labels=torch.from_numpy(labels.astype(np.int64)),
        class_names=CLASS_NAMES,
        digest=hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest(),
    )


def network_of(training: TrainingConfig, _dataset: Dataset | None = None) -> GeneratorConfig:
    """Stand in for `training.state.generator_config`."""
    return CONV_NETWORK if training.generator == "conv" else NETWORK


def state(training: TrainingConfig = CONFIG, seed: int = 0) -> TrainState:
    return create_state(training, network_of(training), CPU, seed)


def feature_classifier(train: Dataset, *_given: object, **_options: object) -> FeatureClassifier:
    """Stand in for `get_classifier`: train hastily, without bundled or cached classifiers."""
    return FeatureClassifier(train_classifier(train, epochs=4, seed=0), digest="0" * 64)


def steps(state: TrainState, count: int, data: Dataset | None = None) -> Tensor:
    """Make `count` steps as a run would; return the report of the last one."""
    shown, training = data or dataset(), state.config
    report = torch.zeros(5)
    for _ in range(count):
        step = state.images_seen // training.batch_size
        report = train_step(
            state,
            shown,
            progress=min(1.0, state.images_seen / training.images),
            penalise=bool(training.r1_gamma) and step % training.penalty_interval == 0,
        )
    return report


def artifact_file(path: Path, *, network: GeneratorConfig = NETWORK, **described: Any) -> Path:
    """An artifact of an untrained generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        generator = build_generator(network)
    recompute_batch_norm(generator, batches=2)
    description: dict[str, Any] = {"class_names": CLASS_NAMES, "images_seen": 0, **described}
    save_artifact(path, generator, ArtifactInfo(network=network, **description))
    return path


def set_clock(patch: pytest.MonkeyPatch, look: Callable[[], float]) -> None:
    """Replace `time.perf_counter` and `time.monotonic` in this thread alone.

    The event loop of a service that other tests share runs in another thread; with this clock it
    would sleep until that time.
    """
    here = threading.current_thread()
    for name in ("perf_counter", "monotonic"):
        real = getattr(time, name)
        patch.setattr(
            f"time.{name}",
            lambda real=real: look() if threading.current_thread() is here else real(),
        )


class FakeClock:
    """A clock of `time.perf_counter` and `time.monotonic` that only work moves on.

    A look at it takes a nanosecond, because no real clock gives the same time twice.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.now_s = 0.0
        self._patch = patch
        set_clock(patch, self._look)

    def _look(self) -> float:
        self.now_s += 1e-9
        return self.now_s

    def spend(self, name: str, seconds: float | Callable[..., float]) -> None:
        """Let every call of a function take a time, or one that follows from its arguments."""
        module, _, attribute = name.rpartition(".")
        work = getattr(import_module(module), attribute)

        def spending(*given: Any, **options: Any) -> Any:
            self.now_s += seconds(*given, **options) if callable(seconds) else seconds
            return work(*given, **options)

        self._patch.setattr(name, spending)


def idx(array: npt.NDArray[np.uint8]) -> bytes:
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def write_data_dir(folder: Path, name: str = "mnist") -> DatasetSpec:
    """Both splits as a data directory's files; returns how to find them, and no mirror."""
    sha256: dict[str, str] = {}
    (folder / name).mkdir(parents=True)
    for seed, names in enumerate(FILES.values()):
        contents = [idx(array) for array in arrays(256, seed)]
        for file_name, content in zip(names, contents, strict=True):
            (folder / name / f"{file_name}.gz").write_bytes(gzip.compress(content))
            sha256[file_name] = hashlib.sha256(content).hexdigest()
    return DatasetSpec(CLASS_NAMES, (), sha256)


def install(patch: pytest.MonkeyPatch, folder: Path, *, images: int = CONFIG.images) -> None:
    """Let the command line's `mnist`, its presets and its networks be the tiny ones.

    The command line knows its data sets by name, so the tiny one takes the name of a real one.
    """
    patch.setitem(cast("dict[str, DatasetSpec]", data.DATASETS), "mnist", write_data_dir(folder))
    patch.setitem(config.PRESETS, "mlp", replace(CONFIG, images=images))
    patch.setitem(config.PRESETS, "conv", replace(CONV, images=images))
    patch.setitem(config.PRESETS, "paper", replace(PAPER, images=images))
    patch.setattr("training.choice.SHORT_IMAGES", 0)  # all are short
    patch.setattr("training.run.LOG_EVERY_IMAGES", 160)
    patch.setattr("training.run.SAMPLE_SHEETS", 2)
    patch.setattr("training.quality.evaluator.QUICK_IMAGES", 100)
    patch.setattr("training.quality.evaluator.get_classifier", feature_classifier)
    patch.setattr("training.quality.budget.plan_epochs", lambda *_a, **_k: 0.0)
    for module in ("budget", "certificate", "evaluator"):
        patch.setattr(f"training.quality.{module}.FULL", CERTIFICATE_SIZE)
    patch.setattr("training.prepare.generator_config", network_of)
    patch.setenv(data.DATA_DIR_VARIABLE, str(folder))
