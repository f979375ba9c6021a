"""Distortions of real and fake images alike, differentiable, drawn on the images' device."""

import torch
from torch import Tensor
from torch.nn import functional as F


def flip(images: Tensor, rng: torch.Generator) -> Tensor:
    """Mirror each image (N, C, H, W) with a probability of one half."""
    mirrored = torch.rand(len(images), generator=rng, device=images.device) < 0.5
    return torch.where(mirrored[:, None, None, None], images.flip(3), images)


def augment(images: Tensor, rng: torch.Generator) -> Tensor:
    """Move each image by up to an eighth of its size (DiffAugment, arXiv 2006.10738)."""
    count, _, height, width = images.shape
    most = height // 8
    offsets = torch.randint(0, 2 * most + 1, (2, count), generator=rng, device=images.device)
    padded = F.pad(images, (most, most, most, most), value=-1.0)
    rows = offsets[0][:, None] + torch.arange(height, device=images.device)
    columns = offsets[1][:, None] + torch.arange(width, device=images.device)
    index = torch.arange(count, device=images.device)[:, None, None]
    moved = padded.permute(0, 2, 3, 1)[index, rows[:, :, None], columns[:, None, :]]
    return moved.permute(0, 3, 1, 2)
