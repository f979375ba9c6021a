"""Whether a generator repeats its training images: how far its images are from the nearest one.

Real test images give the scale, since none of them can have been learnt by heart. A generator that
copies comes far nearer than they do. The distance is of pixels, so a copy that was moved or
mirrored is not seen.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

IMAGES = 2000
AT_A_TIME = 10_000  # training images: all would take four times their memory
_BATCH = 500  # each one has to look through the training images anew


@dataclass(frozen=True, kw_only=True)
class Memorisation:
    """Distances to the nearest training image: root mean square over pixels in [0, 1].

    Attributes:
        median: of the generated images.
        first_percentile: of the generated images.
        test_median: of the real test images.
        test_first_percentile: of the real test images.
        close: share of generated images that are nearer than the test images' first percentile;
            0.01 is what test images have.
    """

    median: float
    first_percentile: float
    test_median: float
    test_first_percentile: float
    close: float


def memorisation(generated: Tensor, train: Tensor, test: Tensor) -> Memorisation:
    """Compare up to `IMAGES` generated and as many test images with all training images.

    Args:
        generated: (N, C, H, W) uint8.
        train: (T, C, H, W) uint8.
        test: (M, C, H, W) uint8, none of which is in train.
    """
    made, real = (nearest(images[:IMAGES], train) for images in (generated, test))
    threshold = real.quantile(0.01)
    return Memorisation(
        median=made.median().item(),
        first_percentile=made.quantile(0.01).item(),
        test_median=real.median().item(),
        test_first_percentile=threshold.item(),
        close=(made < threshold).float().mean().item(),
    )


def nearest(images: Tensor, train: Tensor) -> Tensor:
    """Each image's (N, C, H, W) uint8 distance to the nearest of train (T, C, H, W) uint8: (N,)."""
    rows = images.flatten(1).float().div_(255.0)
    best = torch.full((len(rows),), torch.inf, device=rows.device)
    for part in train.split(AT_A_TIME):
        columns = part.flatten(1).float().div_(255.0)
        found = [torch.cdist(batch, columns).min(1).values for batch in rows.split(_BATCH)]
        best = torch.minimum(best, torch.cat(found))
    best /= rows.shape[1] ** 0.5
    return best
