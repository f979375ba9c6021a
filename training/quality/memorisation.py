"""Memorisation: pixel distances of generated images to their nearest training image.

Real test images give the scale, since the generator never saw them. A generator that copies is far
closer than they are. Shifted or mirrored copies are not detected.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

IMAGES = 2000
CHUNK_IMAGES = 10_000  # training images at a time: all as float32 take four times their memory
_BATCH = 500  # bounds the matrix of distances


@dataclass(frozen=True, kw_only=True)
class Memorisation:
    """Distances to the nearest training image: root mean square over pixels in [0, 1].

    `close` is the share of generated images that are nearer than the first percentile of the real
    test images, which have 0.01.
    """

    median: float
    first_percentile: float
    test_median: float
    test_first_percentile: float
    close: float


def memorisation(generated: Tensor, train: Tensor, test: Tensor) -> Memorisation:
    """Compare up to `IMAGES` generated and as many test images with all training images.

    All are (…, C, H, W) uint8; none of the test images is in train.
    """
    fake, real = (nearest_distances(images[:IMAGES], train) for images in (generated, test))
    threshold = real.quantile(0.01)
    return Memorisation(
        median=fake.median().item(),
        first_percentile=fake.quantile(0.01).item(),
        test_median=real.median().item(),
        test_first_percentile=threshold.item(),
        close=(fake < threshold).float().mean().item(),
    )


def nearest_distances(images: Tensor, train: Tensor) -> Tensor:
    """Return each image's distance (N,) to the nearest of train, both (…, C, H, W) uint8."""
    rows = images.flatten(1).float().div_(255.0)
    best = torch.full((len(rows),), torch.inf, device=rows.device)
    for chunk in train.split(CHUNK_IMAGES):
        columns = chunk.flatten(1).float().div_(255.0)
        found = [torch.cdist(batch, columns).min(1).values for batch in rows.split(_BATCH)]
        best = torch.minimum(best, torch.cat(found))
    best /= rows.shape[1] ** 0.5
    return best
