"""Metrics of the certificate beside the libraries that papers use, on the same features.

Differences between the libraries and the papers:

- A ball holds its surface in arXiv 1904.06991, as here and in torch-fidelity. In prdc it does not:
  copies of real images count less, and identical points, whose balls have no radius, not at all.
- The spread of KID is the standard deviation of a population in both libraries, of a sample here.
"""

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn

from training.quality.metrics import KID_SUBSETS, frechet_distance, kid, prdc

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # of these libraries
    pytest.mark.usefixtures("one_thread", "torchvision"),
]
NEIGHBOURS = 5
WIDTH = 96
TOLERANCE = {torch.float64: 1e-6, torch.float32: 2e-3}  # of shares; a tie may fall either way


def mixture(rows: int, seed: int, shift: float = 0.0) -> npt.NDArray[np.float64]:
    """Features as of a network: 10 classes, each around a subspace, negative values cut to 0."""
    fixed, rng = np.random.default_rng(0), np.random.default_rng(seed)
    centres = fixed.normal(size=(10, WIDTH)) + shift * fixed.normal(size=WIDTH)
    directions = fixed.normal(size=(10, 12, WIDTH))
    classes, positions = rng.integers(0, 10, rows), rng.normal(size=(rows, 12))
    features: npt.NDArray[np.float64] = np.einsum("nk,nkd->nd", positions, directions[classes])
    features += centres[classes] + 0.3 * rng.normal(size=features.shape)
    return np.maximum(features, 0.0, out=features)


@pytest.fixture(params=[torch.float64, torch.float32], ids=["float64", "float32"])
def sets(request: pytest.FixtureRequest) -> tuple[Tensor, Tensor]:
    """Two overlapping sets of real and generated features, without ties."""
    real, fake = mixture(1500, 1), mixture(1200, 2, shift=0.3)
    return torch.from_numpy(real).to(request.param), torch.from_numpy(fake).to(request.param)


@pytest.fixture
def copied() -> tuple[Tensor, Tensor]:
    """Two sets as of a generator that repeats itself and some real images."""
    real, fake = mixture(1500, 1), mixture(1200, 2, shift=0.3)
    fake[:100], fake[100:200], real[100:200] = real[:100], fake[200:300], real[200:300]
    return torch.from_numpy(real), torch.from_numpy(fake)


class Identity(nn.Module):
    """A network whose images are their own features."""

    num_features = WIDTH

    def forward(self, images: Tensor) -> Tensor:
        return images


def of_torchmetrics(metric: Any, real: Tensor, fake: Tensor) -> Any:
    metric.update(real, real=True)
    metric.update(fake, real=False)
    return metric.compute()


def precision_recall_of_torch_fidelity(real: Tensor, fake: Tensor) -> tuple[float, float]:
    module = pytest.importorskip("torch_fidelity.metric_prc")
    options = {"prc_neighborhood": NEIGHBOURS, "prc_batch_size": 10_000}
    found = module.prc_features_to_metric(fake, real, save_cpu_ram=False, verbose=False, **options)
    return found["precision"], found["recall"]


def prdc_of_prdc(real: Tensor, fake: Tensor) -> tuple[float, float, float, float]:
    module = pytest.importorskip("prdc")
    found = module.compute_prdc(real.numpy(), fake.numpy(), nearest_k=NEIGHBOURS)
    return found["precision"], found["recall"], found["density"], found["coverage"]


# Fréchet distance


def test_the_frechet_distance_is_that_of_torchmetrics(sets: tuple[Tensor, Tensor]) -> None:
    fid = pytest.importorskip("torchmetrics.image.fid")
    expected = of_torchmetrics(fid.FrechetInceptionDistance(Identity()), *sets).item()
    assert expected > 1
    assert frechet_distance(*sets) == pytest.approx(expected, rel=1e-5)


def test_the_frechet_distance_is_that_of_torch_fidelity(sets: tuple[Tensor, Tensor]) -> None:
    module = pytest.importorskip("torch_fidelity.metric_fid")
    statistics = [module.fid_features_to_statistics(features) for features in sets]
    found = module.fid_statistics_to_metric(*statistics, verbose=False)
    expected = found["frechet_inception_distance"]
    assert frechet_distance(*sets) == pytest.approx(expected, rel=1e-5)


# KID


def test_kid_of_whole_sets_is_that_of_both_libraries(sets: tuple[Tensor, Tensor]) -> None:
    real, fake = (features[:1000] for features in sets)
    image = pytest.importorskip("torchmetrics.image.kid")
    theirs = image.KernelInceptionDistance(Identity(), subsets=2, subset_size=1000)
    module = pytest.importorskip("torch_fidelity.metric_kid")
    options = {"kid_subsets": 2, "kid_subset_size": 1000, "rng_seed": 0, "verbose": False}
    other = module.kid_features_to_metric(real, fake, **options)

    mean, _ = kid(real, fake)

    assert mean > 0.1
    assert of_torchmetrics(theirs, real, fake)[0].item() == pytest.approx(mean, rel=1e-5)
    assert other["kernel_inception_distance_mean"] == pytest.approx(mean, rel=1e-5)


def test_kid_of_subsets_is_that_of_torchmetrics_but_for_the_kind_of_its_spread(
    sets: tuple[Tensor, Tensor],
) -> None:
    image = pytest.importorskip("torchmetrics.image.kid")
    theirs = image.KernelInceptionDistance(Identity(), subsets=KID_SUBSETS, subset_size=300)
    with torch.random.fork_rng():
        torch.manual_seed(7)  # draws the subsets of seed 7 below
        expected, of_population = (value.item() for value in of_torchmetrics(theirs, *sets))

    mean, std = kid(*sets, seed=7, size=300)

    assert mean == pytest.approx(expected, rel=1e-4)
    of_sample = of_population * math.sqrt(KID_SUBSETS / (KID_SUBSETS - 1))
    assert std == pytest.approx(of_sample, rel=1e-4)


# Precision, recall, density, coverage


def test_precision_and_recall_are_those_of_torch_fidelity(sets: tuple[Tensor, Tensor]) -> None:
    expected = precision_recall_of_torch_fidelity(*sets)
    assert 0.1 < min(expected) < max(expected) < 0.99
    assert prdc(*sets, NEIGHBOURS)[:2] == pytest.approx(expected, abs=TOLERANCE[sets[0].dtype])


def test_all_four_are_those_of_prdc_where_no_distances_are_equal(
    sets: tuple[Tensor, Tensor],
) -> None:
    expected = prdc_of_prdc(*sets)
    assert 0.1 < min(expected) < max(expected) < 0.99
    assert prdc(*sets, NEIGHBOURS) == pytest.approx(expected, abs=TOLERANCE[sets[0].dtype])


def test_copies_count_as_in_torch_fidelity_and_less_in_prdc(copied: tuple[Tensor, Tensor]) -> None:
    precision, recall, density, coverage = prdc(*copied, NEIGHBOURS)
    assert (precision, recall) == pytest.approx(
        precision_recall_of_torch_fidelity(*copied), abs=TOLERANCE[torch.float64]
    )
    theirs = prdc_of_prdc(*copied)
    assert density > theirs[2] + 0.005
    assert coverage > theirs[3]


def test_a_copy_of_identical_points_is_perfect_and_nothing_in_prdc() -> None:
    points = torch.from_numpy(mixture(100, 1)).repeat(NEIGHBOURS + 1, 1)
    precision, recall, _, coverage = prdc(points, points.clone(), NEIGHBOURS)
    assert (precision, recall, coverage) == (1.0, 1.0, 1.0)
    assert precision_recall_of_torch_fidelity(points, points.clone()) == (1.0, 1.0)
    assert prdc_of_prdc(points, points.clone()) == (0.0, 0.0, 0.0, 0.0)
