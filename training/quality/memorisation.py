"""Memorisation: pixel distances of generated images to their nearest training image.

Real test images give the scale, since the generator never saw them. A generator that copies is far
closer than they are. Shifted or mirrored copies are not detected.
"""

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from training.quality.spread import binomial, bootstrap

IMAGES = 2000
CHUNK_IMAGES = 10_000  # training images at a time: all as float32 take four times their memory
_BATCH = 500  # bounds the matrix of distances


@dataclass(frozen=True, kw_only=True)
class MemorisationSpread:
    """Standard errors of the distances of a few images, generated and real test images."""

    images: int  # of each kind, at most
    median: float
    first_percentile: float
    test_median: float
    test_first_percentile: float
    close: float


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
    spread: MemorisationSpread | None = None  # in a brief certificate


def memorisation(
    generated: Tensor, train: Tensor, test: Tensor, *, images: int = IMAGES, spread: bool = False
) -> Memorisation:
    """Compare up to `images` generated and as many test images with all training images.

    All are (…, C, H, W) uint8; none of the test images is in train. With fewer training images the
    distances would be larger, so there are always all of them.
    """
    fake, real = (nearest_distances(each[:images], train) for each in (generated, test))
    found = Memorisation(
        median=_median(fake),
        first_percentile=_first_percentile(fake),
        test_median=_median(real),
        test_first_percentile=_first_percentile(real),
        close=_close(fake, real),
    )
    return dataclasses.replace(found, spread=_spread(found, fake, real)) if spread else found


def _median(distances: Tensor) -> float:
    return distances.median().item()


def _first_percentile(distances: Tensor) -> float:
    return distances.quantile(0.01).item()


def _close(fake: Tensor, real: Tensor) -> float:
    return (fake < real.quantile(0.01)).float().mean().item()


def _spread(found: Memorisation, fake: Tensor, real: Tensor) -> MemorisationSpread:
    return MemorisationSpread(
        images=max(len(fake), len(real)),
        median=bootstrap(_median, fake),
        first_percentile=bootstrap(_first_percentile, fake),
        test_median=bootstrap(_median, real),
        test_first_percentile=bootstrap(_first_percentile, real),
        close=max(binomial(found.close, len(fake)), bootstrap(_close, fake, real)),
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
