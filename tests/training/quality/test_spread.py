"""Standard errors agree with those of many repetitions."""

import pytest
import torch
from torch import Tensor

from training.quality.spread import binomial, bootstrap

RNG = torch.Generator().manual_seed(0)


def mean(values: Tensor) -> float:
    return values.mean().item()


@pytest.mark.parametrize("share", [0.5, 0.9, 0.99])
def test_the_error_of_a_share_is_that_of_repeated_draws(share: float) -> None:
    draws = torch.rand((4000, 500), generator=RNG) < share
    assert binomial(share, 500) == pytest.approx(draws.float().mean(1).std().item(), rel=0.3)


def test_a_share_of_all_or_none_of_a_few_images_is_uncertain() -> None:
    assert binomial(1.0, 100) == pytest.approx(binomial(0.0, 100))
    assert 0.01 < binomial(1.0, 100) < 0.02


def test_a_bootstrap_finds_the_error_of_a_mean_and_repeats_it() -> None:
    values = torch.randn(400, generator=RNG)
    assert bootstrap(mean, values) == pytest.approx(1 / 20, rel=0.5)
    assert bootstrap(mean, values) == bootstrap(mean, values) != bootstrap(mean, values, seed=1)


def test_a_bootstrap_draws_from_every_set() -> None:
    first, second = torch.zeros(50, 2), torch.randn((50, 2), generator=RNG)
    assert bootstrap(lambda a, b: (a.sum() + b.sum()).item(), first, second) > 0.0
