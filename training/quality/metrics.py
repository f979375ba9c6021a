"""Similarity metrics of two sets of images, computed from their features.

Precision and recall follow Kynkäänniemi et al. (arXiv 1904.06991), density and coverage Naeem et
al. (arXiv 2002.09797), the Fréchet distance Heusel et al. (arXiv 1706.08500), and the kernel
distance KID Bińkowski et al. (arXiv 1801.01401).
"""

import statistics
from dataclasses import dataclass

import torch
from torch import Tensor

NEIGHBOURS = 5
KID_SUBSETS = 50
KID_SUBSET_SIZE = 1000


@dataclass(frozen=True)
class Neighbourhoods:
    """The neighbours of N fake and M real features in the balls of the other set.

    A point's ball reaches to its k-th nearest neighbour within its own set.
    """

    k: int
    real_balls: Tensor  # (N,) int64, the number of real balls that a fake point lies in
    in_fake_ball: Tensor  # (M,) bool, of real points
    covered: Tensor  # (M,) bool, of real points: their ball contains a fake point

    def prdc(self) -> tuple[float, float, float, float]:
        """Return precision, recall, density and coverage."""
        return (
            (self.real_balls > 0).float().mean().item(),
            self.in_fake_ball.float().mean().item(),
            int(self.real_balls.sum()) / (self.k * len(self.real_balls)),
            self.covered.float().mean().item(),
        )


def prdc(real: Tensor, fake: Tensor, k: int = NEIGHBOURS) -> tuple[float, float, float, float]:
    """Return precision, recall, density and coverage of fake (N, D) against real (M, D) features.

    Raises:
        ValueError: a set has k points or fewer.
    """
    return find_neighbours(real, fake, k).prdc()


def find_neighbours(real: Tensor, fake: Tensor, k: int = NEIGHBOURS) -> Neighbourhoods:
    """Compare fake (N, D) with real (M, D) features.

    Raises:
        ValueError: a set has k points or fewer.
    """
    real_radii, fake_radii = _radii(real, k), _radii(fake, k)
    real_balls = torch.zeros(len(fake), dtype=torch.int64, device=fake.device)
    in_fake_ball, covered = [], []
    for rows, radii in zip(real.split(1000), real_radii.split(1000), strict=True):
        distances = torch.cdist(rows, fake)  # (1000, N)
        real_balls += (distances <= radii[:, None]).sum(0)
        covered.append(distances.min(1).values <= radii)
        in_fake_ball.append((distances <= fake_radii[None]).any(1))
    return Neighbourhoods(k, real_balls, torch.cat(in_fake_ball), torch.cat(covered))


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


def kid(
    first: Tensor, second: Tensor, *, seed: int = 0, size: int = KID_SUBSET_SIZE
) -> tuple[float, float]:
    """Return mean and standard deviation of KID over `KID_SUBSETS` random subsets.

    KID is the squared maximum mean discrepancy by a cubic kernel. The estimate is unbiased: for
    equal distributions its mean is 0, and it can be negative.

    Args:
        first: (N, D), N at least 2.
        second: (M, D), M at least 2.
        seed: decides the subsets.
        size: of a subset; at most that of the smaller set. It does not change the expected mean.
    """
    rng = torch.Generator().manual_seed(seed)
    size = min(size, len(first), len(second))
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
