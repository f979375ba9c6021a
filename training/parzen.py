"""The Parzen-window log-likelihood of the papers of 2014, as a legacy figure.

A normal distribution is put around each of 10,000 generated images, its width is chosen on
validation images, and the mean log-likelihood of the test images under the mixture is reported, in
nats (Breuleux et al. 2011; Goodfellow et al., arXiv 1406.2661; Mirza & Osindero, arXiv 1411.1784).
It says little about quality: real images do not score best by it (Theis et al., arXiv 1511.01844).
It stands here because the older figures do.
"""

import math
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
    """A log-likelihood in nats.

    Attributes:
        mean: over the test images.
        standard_error: of the mean.
        sigma: the width of the window, for pixels in [0, 1].
    """

    mean: float
    standard_error: float
    sigma: float


def parzen(samples: Tensor, validation: Tensor, test: Tensor) -> Parzen:
    """The log-likelihood of test images under windows around samples.

    Args:
        samples: (N, D) float32 in [0, 1].
        validation: (V, D), which chooses the width from `SIGMAS`.
        test: (M, D).
    """
    distances = _squared_distances(samples, validation)
    means = [_log_likelihood(distances, sigma, samples.shape[1]).mean() for sigma in SIGMAS]
    sigma = SIGMAS[int(torch.stack(means).argmax())]
    likelihoods = torch.cat(
        [
            _log_likelihood(_squared_distances(samples, part), sigma, samples.shape[1])
            for part in test.split(VALIDATION_IMAGES)
        ]
    )
    return Parzen(
        mean=likelihoods.mean().item(),
        standard_error=(likelihoods.std() / len(likelihoods) ** 0.5).item(),
        sigma=sigma,
    )


def _squared_distances(samples: Tensor, images: Tensor) -> Tensor:
    """(M, N) between every image and every sample."""
    return torch.cdist(images, samples).square()


def _log_likelihood(squared_distances: Tensor, sigma: float, dimensions: int) -> Tensor:
    """(M,) float64: the log of the mean of N normal densities at squared distances (M, N)."""
    exponents = (squared_distances / (-2.0 * sigma**2)).logsumexp(1).double()
    normaliser = dimensions * math.log(sigma * math.sqrt(2.0 * math.pi))
    return exponents - math.log(squared_distances.shape[1]) - normaliser
