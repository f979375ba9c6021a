"""What classifiers learn from generated images alone."""

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

TRAIN, TEST = tiny.dataset(256, 0), tiny.dataset(120, 1)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "IMAGES", 256)
    monkeypatch.setattr(module, "_BATCH", 16)


def ignore(_text: str) -> None:
    pass


def test_images_like_real_ones_teach_what_real_ones_teach() -> None:
    figures = gan_train(tiny.dataset(256, 5), TRAIN, TEST, ignore)
    assert figures.images == 256
    assert len(figures.accuracies) == SEEDS
    assert min(*figures.accuracies, figures.real) > 0.9


def test_images_with_the_wrong_labels_teach_the_wrong_thing() -> None:
    wrong = tiny.dataset(256, 5)
    wrong = replace(wrong, labels=1 - wrong.labels)
    figures = gan_train(wrong, TRAIN, TEST, ignore)
    assert max(figures.accuracies) < 0.1
    assert figures.real > 0.9


def test_images_of_one_kind_teach_little() -> None:
    """A collapsed generator: right labels would not help without anything to tell apart."""
    generated = tiny.dataset(256, 5)
    generated = replace(generated, images=generated.images[:1].expand(256, -1, -1, -1).contiguous())
    figures = gan_train(generated, TRAIN, TEST, ignore)
    assert figures.mean < 0.7


def test_the_same_images_give_the_same_figures_whatever_the_global_random_state() -> None:
    generated = tiny.dataset(256, 5)
    torch.manual_seed(1)
    first = gan_train(generated, TRAIN, TEST, ignore)
    state = torch.get_rng_state()
    assert gan_train(generated, TRAIN, TEST, ignore) == first
    assert torch.equal(torch.get_rng_state(), state)


def test_each_accuracy_is_reported_as_soon_as_it_is_known() -> None:
    lines: list[str] = []
    figures = gan_train(tiny.dataset(256, 5), TRAIN, TEST, lines.append)
    expected = [f"{each:.2%}" for each in (*figures.accuracies, figures.real)]
    assert [line.rpartition(" ")[2] for line in lines] == expected


def test_mean_and_spread_are_those_of_the_seeds() -> None:
    figures = GANTrain(images=1, accuracies=(0.9, 0.95, 0.98), real=0.99)
    assert figures.mean == pytest.approx(fmean((0.9, 0.95, 0.98)))
    assert figures.spread == pytest.approx(stdev((0.9, 0.95, 0.98)))


@pytest.mark.parametrize(("size", "channels"), [(28, 1), (32, 3), (33, 3), (64, 1)])
def test_a_pupil_takes_images_of_every_allowed_size(size: int, channels: int) -> None:
    pupil = GanTrainClassifier(num_classes=7, channels=channels).eval()
    assert pupil(torch.zeros(2, channels, size, size)).shape == (2, 7)


def test_the_estimate_grows_with_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "estimate_pass_s", lambda *_given, **_how: 3.0)
    short = estimate_gan_train_s(TRAIN)
    assert short == pytest.approx((SEEDS + 1) * module.EPOCHS * 3.0)  # one pass is as many images
    monkeypatch.setattr(module, "IMAGES", 2560)
    assert estimate_gan_train_s(TRAIN) == pytest.approx(10 * short)
