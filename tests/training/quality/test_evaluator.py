"""Quick metrics of a run, and the time that is left for training."""

import itertools
import re
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support import tiny_training as tiny
from training.data.named import Dataset
from training.networks import Generator
from training.quality import evaluator as module
from training.quality.certificate import generate_dataset
from training.quality.classifier import FeatureClassifier
from training.quality.evaluator import (
    CERTIFICATION_MARGIN,
    CLASSIFIER_SHARE,
    MIN_TRAINING_SHARE,
    RESERVED_SHARE,
    Evaluator,
    Overhead,
    estimate_overhead,
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


def overhead(monkeypatch: pytest.MonkeyPatch, generator: Generator, *, certified: bool) -> Overhead:
    """The estimate where the clock advances a second each time that it is read."""
    ticks = itertools.count()
    monkeypatch.setattr("time.perf_counter", lambda: float(next(ticks)))
    monkeypatch.setattr(module, "estimate_certification_s", lambda *_a, **_k: 60.0)
    monkeypatch.setattr(module, "estimate_classifier_s", lambda *_a, **_k: 90.0)
    return estimate_overhead(TRAIN, TEST, generator, certified=certified)


def test_all_but_training_is_estimated_without_a_trained_classifier(
    monkeypatch: pytest.MonkeyPatch, generator: Generator
) -> None:
    def train(*_given: object, **_how: object) -> None:
        raise AssertionError("a classifier is trained")

    monkeypatch.setattr(module, "get_classifier", train)
    certified, plain = (overhead(monkeypatch, generator, certified=it) for it in (True, False))
    assert plain == Overhead(classifier_s=90, quick_s=1, certification_s=0)
    assert certified == replace(plain, certification_s=60 * CERTIFICATION_MARGIN)


def test_the_time_of_the_last_evaluation_and_of_the_certificate_is_reserved() -> None:
    plain = Overhead(classifier_s=90, quick_s=1)
    assert plain.seconds_for_training(5) == pytest.approx(300 * (1 - RESERVED_SHARE) - 1)
    found = replace(plain, certification_s=75).seconds_for_training(5)
    assert found == pytest.approx(300 * (1 - RESERVED_SHARE) - 1 - 75)


@given(
    classifier_s=st.floats(0, 10_000), quick_s=st.floats(0.01, 60), certify_s=st.floats(0, 10_000)
)
def test_too_little_time_is_refused_and_the_suggested_times_are_enough(
    classifier_s: float, quick_s: float, certify_s: float
) -> None:
    estimate = Overhead(classifier_s=classifier_s, quick_s=quick_s, certification_s=certify_s)
    with pytest.raises(ValueError, match="1e-05 is too short for ") as caught:
        estimate.seconds_for_training(1e-5)
    suggested = re.search(r"give ([\d.]+) or more(?:, or ([\d.]+) without)?", str(caught.value))
    assert suggested is not None
    enough, without = suggested.groups()
    for minutes, overhead in (
        (enough, estimate),
        *([(without, replace(estimate, certification_s=0.0))] if without else []),
    ):
        left = overhead.seconds_for_training(float(minutes))
        left -= overhead.durations_s(float(minutes))["the training of a classifier"]
        assert left >= 0.99 * MIN_TRAINING_SHARE * 60 * float(minutes) * (1 - RESERVED_SHARE)


def test_the_refusal_names_what_takes_the_time() -> None:
    estimate = Overhead(classifier_s=600, quick_s=1, certification_s=1320)
    with pytest.raises(ValueError, match="7 is too short") as caught:
        estimate.seconds_for_training(7)
    assert "the training of a classifier (1.4 minutes)" in str(caught.value)
    assert "certification (22.0 minutes); give 32.3 or more, or 0.1 without --certify" in str(
        caught.value
    )


def test_training_a_classifier_takes_a_limited_share_of_a_budget(
    monkeypatch: pytest.MonkeyPatch, evaluator: Evaluator
) -> None:
    limits: list[float | None] = []

    def note(_train: Dataset, *, seconds: float | None, **_how: object) -> FeatureClassifier:
        limits.append(seconds)
        return evaluator.classifier

    monkeypatch.setattr(module, "get_classifier", note)
    for minutes in (5.0, None):
        Evaluator.create(TRAIN, TEST, minutes=minutes)
    assert limits == [pytest.approx(300 * CLASSIFIER_SHARE), None]
