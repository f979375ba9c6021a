"""The models that travel with the code are as good as their certificates say."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.support.processes import REPOSITORY
from training.artifact import Artifact
from training.data.named import DATASETS, load_dataset
from training.generator_config import MLPGeneratorConfig
from training.images import class_grid
from training.loading import LoadedArtifact, load_artifact
from training.networks import count_parameters
from training.quality.certificate import (
    IMAGES,
    Certificate,
    generate_dataset,
    read_certificate,
)
from training.quality.classifier import DIGESTS, load_bundled_classifier
from training.quality.metrics import NEIGHBOURS
from training.quality.report import picture_path, render_page

WEIGHTS = REPOSITORY / "weights"
PATHS = sorted(WEIGHTS.glob("*.safetensors"), key=lambda path: path.stem)

pytestmark = pytest.mark.usefixtures("one_thread")
each = pytest.mark.parametrize("path", PATHS, ids=[path.stem for path in PATHS])


def certified(artifact: Artifact) -> Certificate:
    certificate = read_certificate(artifact.info)
    assert certificate is not None, f"{artifact.path} is not certified"
    return certificate


@dataclass(frozen=True)
class Floor:
    """The least that a certificate must show."""

    gan_train: float
    gan_test: float
    worst_class: float
    coverage: float


FLOORS = {
    "mnist": Floor(gan_train=0.985, gan_test=0.992, worst_class=0.98, coverage=0.85),
    "mnist-mlp": Floor(gan_train=0.975, gan_test=0.98, worst_class=0.96, coverage=0.65),
    "fashion-mnist": Floor(gan_train=0.85, gan_test=0.92, worst_class=0.65, coverage=0.75),
}


@pytest.fixture(scope="module")
def mlp() -> LoadedArtifact:
    return load_artifact(WEIGHTS / "mnist-mlp.safetensors")


def test_there_is_a_model_of_each_kind() -> None:
    assert {path.stem for path in PATHS} >= set(FLOORS)


@each
def test_a_model_is_certified_by_the_committed_classifier(path: Path) -> None:
    artifact = load_artifact(path)
    certificate = certified(artifact)
    assert certificate.dataset == artifact.info.training["dataset"]
    assert certificate.classifier_sha256 == DIGESTS[certificate.dataset]
    assert (certificate.images, certificate.neighbours) == (IMAGES, NEIGHBOURS)
    assert artifact.info.class_names == DATASETS[certificate.dataset].class_names
    for quality in (certificate.generated, certificate.reference):
        assert len(quality.gan_test_per_class) == len(artifact.info.class_names)


@each
def test_a_model_says_where_it_comes_from(path: Path) -> None:
    info = load_artifact(path).info
    assert info.images_seen > 0
    assert {"preset", "seed", "dataset_sha256", "config", "elapsed_s"} <= set(info.training)


@each
def test_a_model_has_the_picture_that_its_generator_makes(path: Path) -> None:
    artifact = load_artifact(path)
    expected = class_grid(artifact.generator, columns=16)
    with Image.open(picture_path(artifact)) as picture:
        small = picture.reduce(2)  # it is enlarged by whole pixels
        shown = torch.tensor(list(small.tobytes()), dtype=torch.uint8).view(expected.shape)
    # Another processor may round a pixel otherwise.
    assert (shown.int() - expected.int()).abs().max() <= 1


def test_the_page_beside_the_models_is_what_they_say() -> None:
    page = (WEIGHTS / "README.md").read_text(encoding="utf-8")
    assert page == render_page([load_artifact(path) for path in PATHS])


def test_the_documents_generator_is_among_them(mlp: LoadedArtifact) -> None:
    assert mlp.info.network == MLPGeneratorConfig(num_classes=10, channels=1, image_size=28)
    assert count_parameters(mlp.generator) == 1_511_412


@pytest.mark.parametrize(("name", "floor"), FLOORS.items(), ids=list(FLOORS))
def test_a_model_stands_above_its_floors(name: str, floor: Floor) -> None:
    certificate = certified(load_artifact(WEIGHTS / f"{name}.safetensors"))
    quality = certificate.generated
    classes = [share for share in quality.gan_test_per_class if share is not None]
    assert len(classes) == 10
    assert certificate.gan_train.mean >= floor.gan_train
    assert quality.gan_test >= floor.gan_test
    assert min(classes) >= floor.worst_class
    assert quality.coverage >= floor.coverage
    assert certificate.memorisation.close <= 0.02


def test_a_certificate_can_be_reproduced(mlp: LoadedArtifact, mnist_dir: Path) -> None:
    """The other metrics take minutes: `python -m training evaluate` measures all of them."""
    stored = certified(mlp)
    test = load_dataset("mnist", "test", mnist_dir, mirrors=())
    generated = generate_dataset(mlp.generator, test, images=stored.images, seed=stored.seed)
    predictions, _ = load_bundled_classifier(test).classify(generated.images)
    correct = (predictions == generated.labels).double()
    per_class = [correct[generated.labels == label].mean().item() for label in range(10)]
    assert correct.mean().item() == pytest.approx(stored.generated.gan_test, abs=2e-3)
    assert per_class == pytest.approx(list(stored.generated.gan_test_per_class), abs=3e-3)
