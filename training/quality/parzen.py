"""Parzen-window log-likelihood: the legacy metric of the papers of 2014, for comparison with them.

A normal distribution is centred on each of 10,000 generated images, its width is chosen on
validation images, and the metric is the mean log-likelihood of the test images under the mixture,
in nats (Breuleux et al. 2011; Goodfellow et al., arXiv 1406.2661; Mirza & Osindero, arXiv
1411.1784). It says little about quality: real images do not score best (Theis et al., arXiv
1511.01844).
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SIGMAS = tuple(10 ** (-1.0 + 0.05 * step) for step in range(11))  # 0.1 to 0.32
VALIDATION_IMAGES = 1000

# Published values on MNIST by the same protocol, with their sources.
PUBLISHED = {
    "CGAN (arXiv 1411.1784)": "132 ± 2",
    "GAN (arXiv 1406.2661)": "225 ± 2",
    "the best claim of an MLP CGAN": "283",
}


@dataclass(frozen=True, kw_only=True)
class Parzen:
    """A log-likelihood in nats."""

    mean: float  # over the test images
    standard_error: float  # of the mean
    sigma: float  # width of the window, for pixels in [0, 1]


def parzen(samples: Tensor, validation: Tensor, test: Tensor) -> Parzen:
    """Return the log-likelihood of test images under windows around samples.

    Args:
        samples: (N, D) float32 in [0, 1].
        validation: (V, D), on which the width is chosen from `SIGMAS`.
        test: (M, D).
    """
    means = [each.mean() for each in _log_likelihoods(samples, validation, SIGMAS)]
    sigma = SIGMAS[int(torch.stack(means).argmax())]
    likelihoods = torch.cat(
        [
            likelihood
            for part in test.split(VALIDATION_IMAGES)
            for likelihood in _log_likelihoods(samples, part, [sigma])
        ]
    )
    return Parzen(
        mean=likelihoods.mean().item(),
        standard_error=(likelihoods.std() / len(likelihoods) ** 0.5).item(),
        sigma=sigma,
    )


def _log_likelihoods(samples: Tensor, images: Tensor, sigmas: Sequence[float]) -> Iterator[Tensor]:
    """Yield for each width the log of the mean normal density at each image: (M,) float64."""
    squared = torch.cdist(images, samples).square_()  # (M, N)
    nearest = squared.amin(1)
    squared -= nearest[:, None]  # else a narrow width would sum zeros only
    for sigma in sigmas:
        scale = -1.0 / (2.0 * sigma**2)
        # Smaller terms do not change a sum that holds a 1, and denormals are many times slower.
        sums = squared.mul(scale).clamp_(min=-80.0).exp_().sum(1)
        normaliser = math.log(len(samples)) + samples.shape[1] * math.log(
            sigma * math.sqrt(2.0 * math.pi)
        )
        yield (sums.log() + scale * nearest).double() - normaliser
