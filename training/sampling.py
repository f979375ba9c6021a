"""Sampling: labels and a seed to pixels."""

from typing import Any, Protocol

import torch
from torch import Tensor

from training.generator_config import GeneratorConfig


class Sampler(Protocol):
    """A generator, by PyTorch or by another runtime."""

    @property
    def config(self) -> GeneratorConfig:
        """Return the configuration."""
        ...

    def __call__(self, latents: Tensor, labels: Tensor, /) -> Any:
        """Map latents and labels to images, as `training.networks.MLPGenerator` does."""
        ...


@torch.inference_mode()
def generate(generator: Sampler, labels: Tensor, *, seed: int, batch_size: int = 500) -> Tensor:
    """Generate one image per label.

    Args:
        generator: in evaluation mode.
        labels: (N,) int64, on the generator's device.
        seed: of the latents, which are drawn on the CPU so that every device gets the same.
        batch_size: images per forward pass.

    Returns:
        (N, C, H, W) uint8.
    """
    rng = torch.Generator().manual_seed(seed)
    # One call of randn: the values of several calls would depend on the batch size.
    latents = torch.randn((len(labels), generator.config.latent_dim), generator=rng)
    batches = zip(latents.split(batch_size), labels.split(batch_size), strict=True)
    return torch.cat([to_pixels(generator(z.to(labels.device), y)) for z, y in batches])


def to_pixels(images: Tensor) -> Tensor:
    """Convert images in [-1, 1] to uint8 pixels, rounded to the nearest level."""
    return images.float().mul(127.5).add_(127.5).round_().clamp_(0, 255).to(torch.uint8)
