"""Quick metrics of a run, and the limits of a classifier's training."""

import math
from collections.abc import Iterator

import pytest
import torch

from tests.support import tiny_training as tiny
from training.data.named import Dataset
from training.networks import Generator
from training.quality import evaluator as module
from training.quality.certificate import generate_dataset
from training.quality.classifier import FeatureClassifier
from training.quality.evaluator import Evaluator, quick_sizes
from training.quality.metrics import frechet_distance, prdc

pytestmark = pytest.mark.usefixtures("one_thread")

TRAIN, TEST = tiny.dataset(256, 0), tiny.dataset(120, 1)


@pytest.fixture(scope="module")
def evaluator(one_thread: None) -> Iterator[Evaluator]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "get_classifier", tiny.feature_classifier)
        patch.setattr(module, "QUICK_IMAGES", 100)
        yield Evaluator.create(TRAIN, TEST)


@pytest.fixture(scope="module")
def generator(one_thread: None) -> Generator:
    return tiny.state().ema.eval()


def test_quick_metrics_compare_with_training_images(
    evaluator: Evaluator, generator: Generator
) -> None:
    metrics = evaluator.evaluate_quick(generator)
    fake = generate_dataset(generator, TRAIN, images=100, seed=1)
    _, features = evaluator.classifier.classify(fake.images)
    _, real = evaluator.classifier.classify(TRAIN.images)
    assert metrics.gan_test == pytest.approx(evaluator.classifier.accuracy(fake))
    assert metrics.coverage == pytest.approx(prdc(real, features)[3])
    assert metrics.frechet_distance == pytest.approx(frechet_distance(real, features), rel=1e-3)
    assert metrics.score == metrics.gan_test * metrics.coverage


def test_quick_metrics_leave_the_random_state_as_it_was(
    evaluator: Evaluator, generator: Generator
) -> None:
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first = evaluator.evaluate_quick(generator)
    assert torch.equal(torch.get_rng_state(), state)
    assert evaluator.evaluate_quick(generator) == first


def test_a_share_of_a_quick_evaluation_keeps_the_ratio_of_its_images(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "QUICK_IMAGES", 3000)
    assert quick_sizes(1.0) == (3000, 5000)
    assert quick_sizes(0.1) == (300, 500)


def test_a_smaller_evaluation_measures_fewer_images_of_both_kinds(
    evaluator: Evaluator, generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "get_classifier", lambda *_given, **_how: evaluator.classifier)
    monkeypatch.setattr(module, "REFERENCE_IMAGES", 200)
    smaller = Evaluator.create(TRAIN, TEST, quick_share=0.4)
    assert len(smaller.reference_features) == 80
    assert smaller.evaluate_quick(generator).images == 40
    assert evaluator.evaluate_quick(generator).images == 100


def test_passes_and_seconds_limit_the_training_of_a_classifier(
    monkeypatch: pytest.MonkeyPatch, evaluator: Evaluator
) -> None:
    limits: list[tuple[float | None, float]] = []

    def note(
        _train: Dataset, *, epochs: float | None, seconds: float, **_how: object
    ) -> FeatureClassifier:
        limits.append((epochs, seconds))
        return evaluator.classifier

    monkeypatch.setattr(module, "get_classifier", note)
    Evaluator.create(TRAIN, TEST, epochs=2.5, seconds=24.0)
    Evaluator.create(TRAIN, TEST)
    assert limits == [(2.5, 24.0), (None, math.inf)]
