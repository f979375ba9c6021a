"""Differentiable augmentation of images, drawn on their device."""

import torch
from torch import Tensor


def flip(images: Tensor, rng: torch.Generator) -> Tensor:
    """Mirror each image (N, C, H, W) with a probability of one half."""
    mirrored = torch.rand(len(images), generator=rng, device=images.device) < 0.5
    return torch.where(mirrored[:, None, None, None], images.flip(3), images)


def diff_augment(images: Tensor, rng: torch.Generator) -> Tensor:
    """Apply DiffAugment (arXiv 2006.10738): colour, then translation, then cutout.

    Applied to real and fake images alike, it keeps a discriminator from memorising a small data
    set. The generator still learns undistorted images, since only these match the real ones after
    the same distortions.

    Args:
        images: (N, C, H, W) in [-1, 1]; gradients flow through.
        rng: on the images' device; every image has its own distortions.

    Returns:
        (N, C, H, W), not limited to [-1, 1].
    """
    return _cut_out(_translate(_recolour(images, rng), rng), rng)


def _recolour(images: Tensor, rng: torch.Generator) -> Tensor:
    """Change the brightness by up to 0.5, saturation by up to twice, contrast by up to half."""
    u = torch.rand((3, len(images), 1, 1, 1), generator=rng, device=images.device)
    images = images + (u[0] - 0.5)
    grey = images.mean(dim=1, keepdim=True)
    images = (images - grey) * (2.0 * u[1]) + grey
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    return (images - mean) * (u[2] + 0.5) + mean


def _translate(images: Tensor, rng: torch.Generator) -> Tensor:
    """Shift each image by up to an eighth of its size; fill with zeros."""
    count, _, height, width = images.shape
    most = round(height / 8)
    offsets = torch.randint(-most, most + 1, (2, count, 1), generator=rng, device=images.device)
    rows, columns = (
        offset + torch.arange(size, device=images.device)
        for offset, size in zip(offsets, (height, width), strict=True)
    )
    inside = _within(rows, height)[:, :, None] & _within(columns, width)[:, None, :]
    index = rows.clamp(0, height - 1)[:, :, None] * width + columns.clamp(0, width - 1)[:, None, :]
    index = index.view(count, 1, -1).expand(-1, images.shape[1], -1)
    moved = images.flatten(2).gather(2, index).view_as(images)
    return moved * inside[:, None]


def _within(positions: Tensor, size: int) -> Tensor:
    return (positions >= 0) & (positions < size)


def _cut_out(images: Tensor, rng: torch.Generator) -> Tensor:
    """Set a square of half the image's size, partly outside perhaps, to zero."""
    count, _, height, width = images.shape
    side = round(height / 2)
    u = torch.rand((2, count, 1), generator=rng, device=images.device)
    rows, columns = (
        _within(
            torch.arange(size, device=images.device) - (centre * size).floor() + side // 2, side
        )
        for centre, size in zip(u, (height, width), strict=True)
    )
    return images * ~(rows[:, :, None] & columns[:, None, :])[:, None]
