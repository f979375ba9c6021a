"""Classifiers trained on generated images alone."""

import logging
from collections.abc import Iterator
from dataclasses import replace
from statistics import fmean, stdev

import pytest
import torch

from tests.support import tiny_training as tiny
from training.quality import gan_train as module
from training.quality.gan_train import (
    EPOCHS,
    SEEDS,
    GANTrain,
    GanTrainClassifier,
    GANTrainSpread,
    gan_train,
)
from training.quality.spread import binomial

pytestmark = pytest.mark.usefixtures("one_thread", "short")

TRAIN, TEST, GENERATED = tiny.dataset(128, 0), tiny.dataset(120, 1), tiny.dataset(128, 5)


@pytest.fixture(scope="module")
def short() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("training.quality.classifier.BATCH", 16)
        yield


class _Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@pytest.fixture(scope="module")
def measured(one_thread: None, short: None) -> tuple[GANTrain, list[str]]:
    """The result for images like the real ones, and the messages logged meanwhile."""
    handler = _Lines()
    logger = logging.getLogger(module.__name__)
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    result = gan_train(GENERATED, TRAIN, TEST)
    logger.removeHandler(handler)
    logger.setLevel(level)
    return result, handler.lines


def test_images_like_real_ones_teach_what_real_ones_teach(
    measured: tuple[GANTrain, list[str]],
) -> None:
    result, _ = measured
    assert result.images == 128
    assert len(result.accuracies) == SEEDS
    assert min(*result.accuracies, result.real) > 0.9


def test_images_with_the_wrong_labels_teach_the_wrong_thing() -> None:
    result = gan_train(replace(GENERATED, labels=1 - GENERATED.labels), TRAIN, TEST)
    assert max(result.accuracies) < 0.1
    assert result.real > 0.9


def test_images_of_one_kind_teach_little() -> None:
    """A collapsed generator: right labels do not help without anything to tell apart."""
    images = GENERATED.images[:1].expand(128, -1, -1, -1).contiguous()
    assert gan_train(replace(GENERATED, images=images), TRAIN, TEST).mean < 0.7


def test_the_same_images_give_the_same_metrics_whatever_the_global_random_state(
    measured: tuple[GANTrain, list[str]],
) -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    assert gan_train(GENERATED, TRAIN, TEST) == measured[0]
    assert torch.equal(torch.get_rng_state(), state)


def test_each_accuracy_is_logged(measured: tuple[GANTrain, list[str]]) -> None:
    result, lines = measured
    expected = [f"{each:.2%}" for each in (*result.accuracies, result.real)]
    assert [line.rpartition(" ")[2] for line in lines] == expected


def test_mean_and_standard_deviation_are_those_of_the_seeds() -> None:
    result = GANTrain(images=1, accuracies=(0.9, 0.95, 0.98), real=0.99)
    assert result.mean == pytest.approx(fmean((0.9, 0.95, 0.98)))
    assert result.std == pytest.approx(stdev((0.9, 0.95, 0.98)))


@pytest.mark.parametrize(("size", "channels"), [(28, 1), (32, 3), (33, 3), (64, 1)])
def test_a_classifier_takes_images_of_every_allowed_size(size: int, channels: int) -> None:
    classifier = GanTrainClassifier(num_classes=7, channels=channels).eval()
    assert classifier(torch.zeros(2, channels, size, size)).shape == (2, 7)


def test_a_brief_measurement_has_fewer_seeds_and_says_how_far_it_may_be_off() -> None:
    generated = replace(GENERATED, images=GENERATED.images[:32], labels=GENERATED.labels[:32])
    result = gan_train(generated, TRAIN, TEST, seeds=1, spread=True)
    assert (result.images, len(result.accuracies)) == (32, 1)
    assert result.spread == GANTrainSpread(
        shown=EPOCHS * 32, generated=binomial(result.mean, 120), real=binomial(result.real, 120)
    )
    assert result.std == result.spread.generated


def test_the_seeds_count_where_they_differ_more_than_few_test_images_explain(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    accuracies = iter([0.2, 0.9, 0.5])
    monkeypatch.setattr(module, "_accuracy", lambda *_given: next(accuracies))
    result = gan_train(GENERATED, TRAIN, TEST, seeds=2, spread=True)
    assert result.std == pytest.approx(stdev((0.2, 0.9)))


def test_classifiers_share_the_time_that_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """By this clock a step takes 1 s, so 64 s are half of what two classifiers need."""
    clock = tiny.FakeClock(monkeypatch)
    clock.spend("training.quality.classifier.random_affine", 1.0)
    full = EPOCHS * 128 // 16
    result = gan_train(GENERATED, TRAIN, TEST, seeds=1, seconds=full, spread=True)
    assert clock.now_s == pytest.approx(full, abs=2)
    assert result.spread is not None
    assert result.spread.shown == pytest.approx(EPOCHS * 128 / 2, abs=16)
    assert min(result.mean, result.real) > 0.9
