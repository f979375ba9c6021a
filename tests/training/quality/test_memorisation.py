"""Copies of training images are found, and new images are not taken for copies."""

import pytest
import torch
from torch import Tensor

from training.quality.memorisation import memorisation, nearest_distances

pytestmark = pytest.mark.usefixtures("one_thread")


def noise(count: int, seed: int) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, 5, 5), generator=rng, dtype=torch.uint8)


TRAIN, TEST = noise(300, 0), noise(200, 1)


def test_the_distance_is_the_root_mean_square_to_the_nearest_image() -> None:
    images = noise(7, 2)
    differences = (images[:, None].double() - TRAIN[None].double()) / 255
    expected = differences.square().mean(dim=(2, 3, 4)).sqrt().min(1).values
    assert torch.allclose(nearest_distances(images, TRAIN).double(), expected, atol=1e-5)


def test_the_nearest_image_is_found_in_whatever_block_it_lies() -> None:
    many = torch.zeros((25_000, 1, 2, 2), dtype=torch.uint8)
    wanted = torch.tensor([[[[255, 0], [0, 255]]]], dtype=torch.uint8)
    for place in (0, 9_999, 10_000, 24_999):
        train = many.clone()
        train[place] = wanted
        assert nearest_distances(wanted, train).item() == pytest.approx(0.0, abs=1e-6)


def test_black_and_white_are_as_far_apart_as_images_can_be() -> None:
    black = torch.zeros((1, 1, 4, 4), dtype=torch.uint8)
    assert nearest_distances(black, black + 255).item() == pytest.approx(1.0)


def test_copies_are_seen() -> None:
    copied = torch.cat([TRAIN[:50], noise(150, 2)])
    metrics = memorisation(copied, TRAIN, TEST)
    assert metrics.close == pytest.approx(0.25, abs=0.03)
    assert metrics.first_percentile == pytest.approx(0.0, abs=1e-3)
    assert metrics.test_first_percentile > 0.1


def test_new_images_are_as_close_as_test_images() -> None:
    metrics = memorisation(noise(200, 2), TRAIN, TEST)
    assert metrics.close < 0.05
    assert metrics.median == pytest.approx(metrics.test_median, rel=0.05)
    assert metrics.first_percentile == pytest.approx(metrics.test_first_percentile, rel=0.05)


def test_fewer_images_of_both_kinds_have_a_spread() -> None:
    few = memorisation(noise(200, 2), TRAIN, TEST, images=40, spread=True)
    assert few.spread is not None
    assert few.spread.images == 40
    full = memorisation(noise(200, 2), TRAIN, TEST)
    assert full.spread is None
    for name in ("median", "first_percentile", "test_median", "test_first_percentile", "close"):
        assert 0.0 < getattr(few.spread, name) < 0.1
    assert few.median == pytest.approx(full.median, abs=4 * few.spread.median)
