"""Grids of generated images as PNG files."""

import io
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from training.files import write_atomically
from training.networks import Generator
from training.sampling import to_pixels

MAX_ROWS = 20


def grid(pixels: Tensor, columns: int) -> Tensor:
    """Arrange images (N, C, H, W) uint8 row by row as (rows * H, columns * W, C), padded black."""
    count, channels, height, width = pixels.shape
    rows = -(-count // columns)
    cells = pixels.new_zeros((rows * columns, channels, height, width))
    cells[:count] = pixels
    cells = cells.view(rows, columns, channels, height, width)
    return cells.permute(0, 3, 1, 4, 2).reshape(rows * height, columns * width, channels)


@torch.inference_mode()
def class_grid(generator: Generator, *, columns: int, seed: int = 0) -> Tensor:
    """Generate one row per class, at most 20: (rows * H, columns * W, C) uint8.

    Every column has its own latent vector, the same in all rows.
    """
    device = generator.label_embedding.weight.device
    rows = min(generator.config.num_classes, MAX_ROWS)
    rng = torch.Generator().manual_seed(seed)
    latents = torch.randn((columns, generator.config.latent_dim), generator=rng).to(device)
    labels = torch.arange(rows, device=device).repeat_interleave(columns)
    return grid(to_pixels(generator(latents.repeat(rows, 1), labels)), columns)


def save_png(path: Path, pixels: Tensor, *, scale: int = 1) -> None:
    """Write (H, W, C) uint8 as a PNG, enlarged `scale` times.

    Raises:
        OSError: the file cannot be written; the previous file is untouched.
    """
    array = pixels.cpu().numpy().repeat(scale, axis=0).repeat(scale, axis=1)
    buffer = io.BytesIO()
    picture = Image.fromarray(array.squeeze(-1) if array.shape[-1] == 1 else array)
    picture.save(buffer, format="PNG")
    write_atomically(path, buffer.getvalue())
