"""Spreads: the standard errors of metrics, which matter where few images are measured."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

RESAMPLES = 20


def binomial(share: float, count: float) -> float:
    """Return the standard error of a share of `count` images.

    Two hits and two misses are added (Agresti & Coull 1998), because a share of 0 or 1 in a few
    images is not certain either.
    """
    adjusted = (share * count + 2.0) / (count + 4.0)
    return math.sqrt(adjusted * (1.0 - adjusted) / (count + 4.0))


def bootstrap(statistic: Callable[..., float], *samples: Tensor, seed: int = 0) -> float:
    """Return the standard deviation of a statistic over resamples of the rows of its arguments."""
    rng = torch.Generator().manual_seed(seed)

    def resample(rows: Tensor) -> Tensor:
        drawn = torch.randint(len(rows), (len(rows),), generator=rng)
        return rows[drawn.to(rows.device)]

    values = [statistic(*map(resample, samples)) for _ in range(RESAMPLES)]
    return torch.tensor(values, dtype=torch.float64).std().item()
