"""Similarity metrics of two sets of images, computed from their features.

Precision and recall follow Kynkäänniemi et al. (arXiv 1904.06991), density and coverage Naeem et
al. (arXiv 2002.09797), the Fréchet distance Heusel et al. (arXiv 1706.08500), and the kernel
distance KID Bińkowski et al. (arXiv 1801.01401).
"""

import statistics

import torch
from torch import Tensor

NEIGHBOURS = 5
KID_SUBSETS = 50
KID_SUBSET_SIZE = 1000


def prdc(real: Tensor, fake: Tensor, k: int = NEIGHBOURS) -> tuple[float, float, float, float]:
    """Return precision, recall, density and coverage of fake (N, D) against real (M, D) features.

    A point's ball reaches to its k-th nearest neighbour within its own set.

    Raises:
        ValueError: a set has k points or fewer.
    """
    real_radii, fake_radii = _radii(real, k), _radii(fake, k)
    inside_any_real = torch.zeros(len(fake), dtype=torch.bool, device=fake.device)
    inside_any_fake, covered = [], []
    balls = 0
    for rows, radii in zip(real.split(1000), real_radii.split(1000), strict=True):
        distances = torch.cdist(rows, fake)  # (1000, N)
        inside = distances <= radii[:, None]
        balls += int(inside.sum())
        inside_any_real |= inside.any(0)
        covered.append(distances.min(1).values <= radii)
        inside_any_fake.append((distances <= fake_radii[None]).any(1))
    return (
        inside_any_real.float().mean().item(),
        torch.cat(inside_any_fake).float().mean().item(),
        balls / (k * len(fake)),
        torch.cat(covered).float().mean().item(),
    )


def _radii(features: Tensor, k: int) -> Tensor:
    """Return the distance (N,) to the k-th nearest other point of the same set."""
    if len(features) <= k:
        raise ValueError(f"{len(features)} images are too few for {k} neighbours")
    return torch.cat(
        [
            # topk is many times faster than `kthvalue`.
            torch.cdist(rows, features).topk(k + 1, dim=1, largest=False).values[:, k]
            for rows in features.split(1000)
        ]
    )


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """Return the squared Fréchet distance of normal distributions fitted to (N, D) and (M, D).

    The root of the product of covariances is taken in its symmetric form: it has the same trace and
    real eigenvalues, without an imaginary part.
    """
    a, b = first.double(), second.double()
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    values, vectors = torch.linalg.eigh(cov_a)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    product = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    means = (a.mean(0) - b.mean(0)).square().sum()
    distance: float = (means + cov_a.trace() + cov_b.trace() - 2 * product).item()
    return max(0.0, distance)


def kid(first: Tensor, second: Tensor, *, seed: int = 0) -> tuple[float, float]:
    """Return mean and standard deviation of KID over `KID_SUBSETS` random subsets.

    KID is the squared maximum mean discrepancy by a cubic kernel. The estimate is unbiased: for
    equal distributions its mean is 0, and it can be negative.

    Args:
        first: (N, D), N at least 2.
        second: (M, D), M at least 2.
        seed: decides the subsets.
    """
    rng = torch.Generator().manual_seed(seed)
    size = min(KID_SUBSET_SIZE, len(first), len(second))
    estimates = []
    for _ in range(KID_SUBSETS):
        x, y = (
            points[torch.randperm(len(points), generator=rng)[:size].to(points.device)].double()
            for points in (first, second)
        )
        estimates.append(_squared_mmd(x, y))
    return statistics.fmean(estimates), statistics.stdev(estimates)


def _squared_mmd(x: Tensor, y: Tensor) -> float:
    """Return equation 4 of arXiv 1801.01401 for equally many points x and y (N, D)."""
    n, dimensions = x.shape

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / dimensions + 1.0) ** 3

    within = sum(k.sum() - k.diagonal().sum() for k in (kernel(x, x), kernel(y, y)))
    estimate: Tensor = within / (n * (n - 1)) - 2.0 * kernel(x, y).mean()
    return estimate.item()
