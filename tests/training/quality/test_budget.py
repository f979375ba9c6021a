"""Measurements fit into a fifth of any budget from two minutes up, or are the least there is."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support import tiny_training as tiny
from training.data.named import Dataset
from training.quality import budget as module
from training.quality.budget import (
    CLASSIFIER_SHARE,
    EVALUATIONS_SHARE,
    MARGIN,
    MEASURING_SHARE,
    SMALLEST,
    Costs,
    certificate_s,
    choose_size,
    measure_costs,
    plan_measuring,
    quick_evaluation_s,
)
from training.quality.certificate import FULL, CertificateSize

pytestmark = pytest.mark.usefixtures("one_thread")


def images_of(count: int) -> Dataset:
    """A data set whose images take no memory."""
    pixels = torch.zeros((1, 1, 8, 8), dtype=torch.uint8).expand(count, -1, -1, -1)
    return replace(tiny.dataset(8), images=pixels, labels=torch.zeros(count, dtype=torch.int64))


TRAIN, TEST = images_of(60_000), images_of(10_000)
# Of a core of 2023 that trains on 28x28 images.
COSTS = Costs(
    generate_s=2e-4,
    classify_s=6e-4,
    pair_s=5e-9,
    nearest_s=5e-3,
    classifier_s=1e-3,
    gan_train_s=4e-4,
)
durations = st.floats(1e-5, 5e-3)
costs_of_machines = st.builds(
    Costs,
    generate_s=durations,
    classify_s=durations,
    pair_s=st.floats(1e-10, 1e-8),
    nearest_s=st.floats(1e-5, 1e-2),
    classifier_s=durations,
    gan_train_s=durations,
)


@pytest.fixture(scope="module", autouse=True)
def _untrained_classifier(tmp_path_factory: pytest.TempPathFactory) -> object:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "default_cache", lambda: tmp_path_factory.mktemp("cache"))
        yield


@given(costs=costs_of_machines, minutes=st.floats(2, 600))
def test_everything_fits_into_a_fifth_or_is_the_least_there_is(
    costs: Costs, minutes: float
) -> None:
    plan = plan_measuring(costs, TRAIN, TEST, minutes=minutes, certified=True)
    assert plan.size is not None
    total_s = 60 * minutes
    assert plan.classifier_s <= CLASSIFIER_SHARE * total_s * 1.001
    measured_s = plan.classifier_s + EVALUATIONS_SHARE * total_s + plan.certificate_s
    least = plan.size.gan_train_images == SMALLEST.gan_train_images
    assert measured_s <= MEASURING_SHARE * total_s or least
    assert plan.certificate_s == pytest.approx(certificate_s(costs, TEST, plan.size))


@given(costs=costs_of_machines, seconds=st.floats(0, 10_000))
def test_a_certificate_takes_the_time_that_it_is_given(costs: Costs, seconds: float) -> None:
    size = choose_size(costs, TEST, seconds)
    for name in vars(FULL):
        assert getattr(SMALLEST, name) <= getattr(size, name) <= getattr(FULL, name)
    takes_s = certificate_s(costs, TEST, size)
    if size != FULL and size.gan_train_images > SMALLEST.gan_train_images:
        assert 0.5 * seconds < takes_s <= seconds


def test_more_time_measures_more() -> None:
    sizes = [choose_size(COSTS, TEST, seconds) for seconds in (10, 60, 300, 600, 10_000)]
    for name in vars(FULL):
        numbers = [getattr(size, name) for size in sizes]
        assert numbers == sorted(numbers)
    assert sizes[0].gan_train_seeds == 1
    assert sizes[-1] == FULL


def test_time_goes_to_longer_training_before_more_seeds() -> None:
    for seconds in range(10, 1500, 50):
        size = choose_size(COSTS, TEST, seconds)
        assert size.gan_train_seeds == 1 or size.gan_train_images > 0.7 * FULL.gan_train_images


def test_without_a_budget_everything_is_measured_in_full() -> None:
    plan = plan_measuring(COSTS, TRAIN, TEST, minutes=None, certified=True)
    assert (plan.size, plan.quick_share, plan.epochs) == (FULL, 1.0, 12)
    assert plan.classifier_s == pytest.approx(12 * 60)
    assert plan.certificate_s == certificate_s(COSTS, TEST, FULL)


def test_a_run_without_a_certificate_plans_none() -> None:
    plan = plan_measuring(COSTS, TRAIN, TEST, minutes=5, certified=False)
    assert (plan.size, plan.certificate_s) == (None, 0.0)


def test_quick_evaluations_are_smaller_where_they_would_take_long() -> None:
    slow = replace(COSTS, generate_s=1e-2)
    plan = plan_measuring(slow, TRAIN, TEST, minutes=2, certified=False)
    assert 0.0 < plan.quick_share < 1.0
    assert plan.quick_s == quick_evaluation_s(slow, TRAIN, plan.quick_share)
    assert plan.quick_s == pytest.approx(1.2, rel=0.05)


def test_a_ready_classifier_leaves_its_time_to_the_certificate(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    learnt = plan_measuring(COSTS, TRAIN, TEST, minutes=5, certified=True)
    monkeypatch.setattr(module, "plan_epochs", lambda *_given, **_how: 0.0)
    ready = plan_measuring(COSTS, TRAIN, TEST, minutes=5, certified=True)
    assert ready.classifier_s == 0.0 < learnt.classifier_s
    assert ready.certificate_s > learnt.certificate_s


def test_numbers_are_stated_with_two_digits() -> None:
    size = choose_size(COSTS, TEST, 60)
    assert str(size).startswith(f"{size.images:,} images; GAN-train with 1 seed of ")
    for number in (size.images, size.gan_train_images, size.memorisation_images):
        assert number % 10 ** (len(str(number)) - 2) == 0


def test_costs_are_times_for_each_image_with_a_margin(monkeypatch: pytest.MonkeyPatch) -> None:
    """By this clock every image that is generated, classified or shown takes a second."""
    clock = tiny.FakeClock(monkeypatch)
    clock.spend("training.quality.budget.generate_dataset", lambda *_given, images, **_how: images)
    clock.spend("training.quality.classifier.to_images", len)
    clock.spend("torch.cdist", lambda few, many: few.shape[0] * many.shape[0])
    train, test = tiny.dataset(256, 0), tiny.dataset(100, 1)
    generator = tiny.state().ema.eval()
    costs = measure_costs(train, test, generator, certified=True)
    for name in ("generate_s", "classify_s", "pair_s", "gan_train_s"):
        assert getattr(costs, name) == pytest.approx(MARGIN), name
    assert costs.classifier_s == pytest.approx(1)  # its training has a limit instead
    assert costs.nearest_s == pytest.approx(256 * MARGIN)
    plain = measure_costs(train, test, generator, certified=False)
    assert (plain.nearest_s, plain.gan_train_s) == (0.0, 0.0)


def test_a_smaller_certificate_takes_less_time() -> None:
    for name, smaller in vars(SMALLEST).items():
        less = replace(FULL, **{name: smaller})
        assert certificate_s(COSTS, TEST, less) < certificate_s(COSTS, TEST, FULL), name
    assert isinstance(SMALLEST, CertificateSize)
