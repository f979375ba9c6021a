"""Metrics of two sets of points against plain formulas, and of sets whose metrics are known."""

import math

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from training.quality.metrics import (
    KID_SUBSETS,
    NEIGHBOURS,
    frechet_distance,
    kid,
    prdc,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def cloud(count: int, seed: int, *, centre: float = 0.0, spread: float = 1.0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return centre + spread * torch.randn((count, 6), generator=rng)


# Precision, recall, density, coverage


def brute_force(
    real: npt.NDArray[np.float64], fake: npt.NDArray[np.float64], k: int
) -> tuple[float, float, float, float]:
    """The definitions, point by point."""

    def radius(points: npt.NDArray[np.float64], i: int) -> float:
        return float(sorted(math.dist(points[i], p) for j, p in enumerate(points) if j != i)[k - 1])

    real_radii = [radius(real, i) for i in range(len(real))]
    fake_radii = [radius(fake, i) for i in range(len(fake))]
    near = [[math.dist(r, f) for f in fake] for r in real]
    in_real = [[near[i][j] <= real_radii[i] for i in range(len(real))] for j in range(len(fake))]
    in_fake = [[near[i][j] <= fake_radii[j] for j in range(len(fake))] for i in range(len(real))]
    return (
        sum(any(row) for row in in_real) / len(fake),
        sum(any(row) for row in in_fake) / len(real),
        sum(sum(row) for row in in_real) / (k * len(fake)),
        sum(min(near[i]) <= real_radii[i] for i in range(len(real))) / len(real),
    )


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize(
    "fake",
    [cloud(70, 1), cloud(50, 1, centre=1.5), cloud(60, 1, spread=0.4), cloud(40, 1, spread=2.0)],
)
def test_prdc_are_their_definitions(fake: Tensor, k: int) -> None:
    real = cloud(60, 2)
    expected = brute_force(real.double().numpy(), fake.double().numpy(), k)
    assert prdc(real, fake, k) == pytest.approx(expected, abs=1e-6)
    assert len({0.0, 1.0, *expected}) > 3  # the sets are such that the metrics say something


def test_the_figures_do_not_depend_on_the_blocks_they_are_computed_in() -> None:
    real, fake = cloud(2300, 1), cloud(1100, 2, centre=0.3)
    order, other = torch.randperm(2300), torch.randperm(1100)
    shuffled = prdc(real[order], fake[other])
    assert shuffled == pytest.approx(prdc(real, fake), abs=2e-3)


def test_identical_sets_lie_among_each_other_entirely() -> None:
    points = cloud(300, 1)
    precision, recall, density, coverage = prdc(points, points.clone())
    assert (precision, recall, coverage) == (1.0, 1.0, 1.0)
    # Each ball holds its own centre besides the k neighbours that it reaches to.
    assert density == pytest.approx(1 + 1 / NEIGHBOURS, abs=0.01)


def test_a_set_like_the_real_one_has_a_density_near_one() -> None:
    metrics = prdc(cloud(800, 1), cloud(800, 2))
    assert metrics[2] == pytest.approx(1.0, abs=0.15)
    assert min(metrics) > 0.8


def test_a_collapsed_set_is_precise_and_covers_nothing() -> None:
    real = cloud(500, 1)
    middle = real.norm(dim=1).argmin()
    collapsed = real[middle] + 0.01 * cloud(500, 2)
    precision, recall, _, coverage = prdc(real, collapsed)
    assert precision == 1.0
    assert recall < 0.05
    assert coverage < 0.25


def test_sets_far_apart_have_nothing_in_common() -> None:
    assert prdc(cloud(200, 1), cloud(200, 2, centre=50.0)) == (0.0, 0.0, 0.0, 0.0)


def test_too_few_points_for_their_neighbours_are_refused() -> None:
    with pytest.raises(ValueError, match="5 images are too few for 5 neighbours"):
        prdc(cloud(5, 1), cloud(100, 2))


# Fréchet distance


def test_the_frechet_distance_is_its_definition() -> None:
    first = cloud(400, 1).numpy().astype(np.float64) @ np.diag([1, 2, 3, 1, 0.5, 1])
    second = cloud(300, 2, centre=0.7).numpy().astype(np.float64)
    one, two = np.cov(first, rowvar=False), np.cov(second, rowvar=False)
    values = np.linalg.eigvals(one @ two).astype(complex)  # the root of a product, by its spectrum
    expected = (
        ((first.mean(0) - second.mean(0)) ** 2).sum()
        + np.trace(one)
        + np.trace(two)
        - 2 * np.sqrt(values).sum().real
    )
    found = frechet_distance(torch.from_numpy(first), torch.from_numpy(second))
    assert found == pytest.approx(expected, rel=1e-9)


def test_the_frechet_distance_of_equal_sets_is_nothing_and_of_moved_ones_the_way() -> None:
    points = cloud(500, 1)
    moved = points + torch.tensor([3.0, 4.0, 0.0, 0.0, 0.0, 0.0])
    assert frechet_distance(points, points) == pytest.approx(0.0, abs=1e-9)
    assert frechet_distance(points, moved) == pytest.approx(25.0, rel=1e-5)
    assert frechet_distance(points, 2 * points) == pytest.approx(
        frechet_distance(2 * points, points), rel=1e-9
    )


def test_the_frechet_distance_holds_for_features_that_do_not_vary() -> None:
    flat = cloud(100, 1)
    flat[:, 2:] = 0.0
    assert frechet_distance(flat, flat) == pytest.approx(0.0, abs=1e-9)
    assert frechet_distance(flat, flat + 1) == pytest.approx(6.0, rel=1e-5)


# KID


def plain_squared_mmd(x: npt.NDArray[np.float64], y: npt.NDArray[np.float64]) -> float:
    """The unbiased estimate, pair by pair."""

    def kernel(a: npt.NDArray[np.float64], b: npt.NDArray[np.float64]) -> float:
        return float((a @ b / len(a) + 1) ** 3)

    n = len(x)
    others = [(i, j) for i in range(n) for j in range(n) if i != j]
    within = sum(kernel(p[i], p[j]) for p in (x, y) for i, j in others) / (n * (n - 1))
    between = sum(kernel(a, b) for a in x for b in y) / n**2
    return within - 2 * between


def test_kid_is_its_definition() -> None:
    first, second = cloud(30, 1), cloud(30, 2, centre=0.5)  # as small as one subset
    mean, std = kid(first, second)
    expected = plain_squared_mmd(first.double().numpy(), second.double().numpy())
    assert mean == pytest.approx(expected, rel=1e-9)
    assert std == pytest.approx(0.0, abs=1e-9)  # every subset is the whole set


def test_kid_of_equal_distributions_is_about_zero_without_bias() -> None:
    values = [kid(cloud(60, 2 * i), cloud(60, 2 * i + 1))[0] for i in range(30)]
    standard_error = np.std(values) / len(values) ** 0.5
    assert abs(np.mean(values)) < 3 * standard_error
    assert min(values) < 0 < max(values)  # a biased estimate is never negative


def test_kid_grows_with_the_way_between_the_sets() -> None:
    near, far, farther = (
        kid(cloud(300, 1), cloud(300, 2, centre=centre))[0] for centre in (0.1, 0.5, 1.0)
    )
    assert near < far < farther


def test_kid_of_large_sets_is_a_mean_over_random_subsets() -> None:
    first, second = cloud(150, 1), cloud(120, 2, centre=0.3)
    mean, std = kid(first, second, seed=1, size=100)
    other, _ = kid(first, second, seed=2, size=100)
    assert std > 0
    assert mean != other
    assert abs(mean - other) < 5 * std / KID_SUBSETS**0.5
    assert kid(first, second, seed=1, size=100) == (mean, std)
