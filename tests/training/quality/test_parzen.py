"""The legacy log-likelihood against a plain mixture of normal distributions."""

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from training.quality.parzen import SIGMAS, parzen

pytestmark = pytest.mark.usefixtures("one_thread")


def points(count: int, seed: int, *, spread: float = 0.15) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return 0.5 + spread * torch.randn((count, 4), generator=rng)


def mixture(samples: Tensor, sigma: float) -> MixtureSameFamily:
    windows = Independent(Normal(samples.double(), sigma), 1)
    return MixtureSameFamily(Categorical(torch.ones(len(samples)).double()), windows)


def test_it_is_the_mean_log_density_of_a_mixture_of_normal_distributions() -> None:
    samples, validation, test = points(40, 1), points(30, 2), points(50, 3)
    found = parzen(samples, validation, test)
    likelihoods = mixture(samples, found.sigma).log_prob(test.double())
    assert found.mean == pytest.approx(likelihoods.mean().item(), abs=1e-4)
    error = likelihoods.std().item() / math.sqrt(50)
    assert found.standard_error == pytest.approx(error, rel=1e-4)


def test_the_width_is_the_best_one_on_the_validation_images() -> None:
    samples, validation, test = points(40, 1), points(30, 2), points(50, 3, spread=0.5)
    means = [mixture(samples, s).log_prob(validation.double()).mean().item() for s in SIGMAS]
    best = SIGMAS[means.index(max(means))]
    assert parzen(samples, validation, test).sigma == best
    assert best not in (SIGMAS[0], SIGMAS[-1])  # a choice at the end of the grid is none


def test_samples_like_the_test_images_score_higher_than_others() -> None:
    validation, test = points(100, 2), points(100, 3)
    alike, apart = (
        parzen(samples, validation, test) for samples in (points(100, 1), points(100, 1) + 1)
    )
    assert alike.mean > apart.mean + 3 * alike.standard_error


def test_many_test_images_are_taken_in_parts_and_none_is_lost() -> None:
    samples, validation = points(20, 1), points(30, 2)
    test = points(2300, 3)
    found = parzen(samples, validation, test)
    expected = mixture(samples, found.sigma).log_prob(test.double()).mean().item()
    assert found.mean == pytest.approx(expected, abs=1e-4)
