"""Fixtures that several modules share."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.support.processes import REPOSITORY
from tests.support.serving import MODEL, ServiceProcess
from training.artifact import ArtifactInfo
from training.data.named import default_data_dir
from training.generator_config import (
    Channels,
    ConvGeneratorConfig,
    GeneratorConfig,
    MLPGeneratorConfig,
)
from training.loading import LoadedArtifact, load_artifact
from training.loop import recompute_batch_norm
from training.networks import build_generator
from training.saving import save_artifact


def pytest_configure() -> None:
    """Several processes of tests, and what they start, share the cores."""
    processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if processes > 1:
        threads = max(1, (os.cpu_count() or 1) // processes)
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))
        torch.set_num_threads(threads)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


# Serving -----------------------------------------------------------------------------------------


# Names that file systems, CSV files and the splits of Hugging Face stumble over.
ODD_CLASS_NAMES = (
    *("cat", "dog", "train", "test", "val_x", "a/b, c", "..", 'c "d"', "é", "हिन्दी", "熊\u3000猫"),
    "two\nlines",
)


def make_artifact(
    path: Path,
    *,
    kind: str = "mlp",
    classes: int = 3,
    names: tuple[str, ...] = (),
    channels: int = 1,
    seed: int = 0,
    hidden: tuple[int, ...] = (16, 32, 24),
) -> Path:
    """A small untrained generator whose every parameter is far from its neutral value.

    `names` of classes replace the default ones and their number.
    """
    names = names or ("cat", "dog", "emu", "7", "fox")[:classes]
    classes = len(names)
    strength = 0.05 if kind == "conv" else 0.3  # without batch norm, more saturates every pixel
    colours: Channels = 3 if channels == 3 else 1
    config: GeneratorConfig
    if kind == "conv":
        config = ConvGeneratorConfig(
            num_classes=classes,
            channels=colours,
            image_size=12,
            latent_dim=9,
            embedding_dim=4,
            style_dim=16,
            widths=(12, 8),
        )
    else:
        config = MLPGeneratorConfig(
            num_classes=classes,
            channels=colours,
            image_size=12,
            latent_dim=9,
            embedding_dim=4,
            hidden=hidden,
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        generator = build_generator(config)
        with torch.no_grad():
            for parameter in generator.parameters():
                parameter.add_(strength * torch.randn_like(parameter))
    recompute_batch_norm(generator, batches=2)
    save_artifact(path, generator, ArtifactInfo(network=config, class_names=names, images_seen=5))
    return path


@pytest.fixture(scope="session")
def small_artifact(tmp_path_factory: pytest.TempPathFactory) -> LoadedArtifact:
    return load_artifact(make_artifact(tmp_path_factory.mktemp("weights") / "small.safetensors"))


@pytest.fixture(scope="session")
def bundled() -> Path:
    return MODEL


@pytest.fixture(scope="session")
def service() -> Iterator[ServiceProcess]:
    """The bundled models, served as a newcomer would.

    But for the self-check: its known images would be counted in the middle of a test that counts.
    """
    with ServiceProcess(
        "--models", str(REPOSITORY / "weights"), "--self-test-interval-s", "3600"
    ) as running:
        yield running


# Training ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Tiny networks are faster so, many times where other processes want the cores as well."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def mnist_dir() -> Path:
    """A data directory that holds the real MNIST; tests never download it."""
    data_dir = default_data_dir()
    if not any((data_dir / "mnist").glob("*-ubyte*")):
        pytest.skip(f"no MNIST in {data_dir}: set CGAN_DATA_DIR to a folder that has it")
    return data_dir
