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
    SEEDS,
    GANTrain,
    GanTrainClassifier,
    estimate_gan_train_s,
    gan_train,
)

pytestmark = pytest.mark.usefixtures("one_thread", "short")

TRAIN, TEST, GENERATED = tiny.dataset(128, 0), tiny.dataset(120, 1), tiny.dataset(128, 5)


@pytest.fixture(scope="module")
def short() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "IMAGES", 128)
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


def test_the_estimate_grows_with_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "estimate_pass_s", lambda *_given, **_how: 3.0)
    short = estimate_gan_train_s(TRAIN)
    assert short == pytest.approx((SEEDS + 1) * module.EPOCHS * 3.0)  # one pass is as many images
    monkeypatch.setattr(module, "IMAGES", 1280)
    assert estimate_gan_train_s(TRAIN) == pytest.approx(10 * short)
