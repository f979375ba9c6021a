"""Quick metrics of a run, and the time that is left for training."""

import itertools
from collections.abc import Iterator

import pytest
import torch

from tests.support import tiny_training as tiny
from training.data.named import Dataset
from training.networks import Generator
from training.quality import evaluator as module
from training.quality.certificate import generate_dataset
from training.quality.classifier import FeatureClassifier
from training.quality.evaluator import (
    CERTIFICATION_MARGIN,
    CLASSIFIER_SHARE,
    RESERVED_SHARE,
    Evaluator,
)
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


@pytest.fixture
def _quick_metrics_take_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.count()
    monkeypatch.setattr("time.perf_counter", lambda: float(next(ticks)))


@pytest.mark.usefixtures("_quick_metrics_take_a_second")
def test_a_run_without_certificate_has_nearly_all_of_its_time(
    evaluator: Evaluator, generator: Generator
) -> None:
    found = evaluator.seconds_for_training(5, generator, certified=False)
    assert found == pytest.approx(300 * (1 - RESERVED_SHARE) - 1)


@pytest.mark.usefixtures("_quick_metrics_take_a_second")
def test_the_time_of_the_certificate_is_reserved(
    evaluator: Evaluator, generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "estimate_certification_s", lambda *_a, **_k: 60.0)
    found = evaluator.seconds_for_training(5, generator, certified=True)
    assert found == pytest.approx(300 * (1 - RESERVED_SHARE) - 1 - 60 * CERTIFICATION_MARGIN)


@pytest.mark.usefixtures("_quick_metrics_take_a_second")
def test_too_little_time_is_refused_and_the_suggested_time_is_enough(
    evaluator: Evaluator, generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "estimate_certification_s", lambda *_a, **_k: 240.0)
    with pytest.raises(ValueError, match=r"5 is too short.*give 5\.7 or more"):
        evaluator.seconds_for_training(5, generator, certified=True)
    assert evaluator.seconds_for_training(5.7, generator, certified=True) > 0


def test_training_a_classifier_takes_a_limited_share_of_a_budget(
    monkeypatch: pytest.MonkeyPatch, evaluator: Evaluator
) -> None:
    given: list[float | None] = []

    def note(_train: Dataset, *, seconds: float | None, **_how: object) -> FeatureClassifier:
        given.append(seconds)
        return evaluator.classifier

    monkeypatch.setattr(module, "get_classifier", note)
    for minutes in (5.0, None):
        Evaluator.create(TRAIN, TEST, minutes=minutes)
    assert given == [pytest.approx(300 * CLASSIFIER_SHARE), None]
