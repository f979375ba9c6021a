"""Generators and discriminators: the one definition of each network.

A network is built from a frozen configuration that travels inside the artifact, so that training,
evaluation and the service can never disagree about its shape.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Literal

import torch
from pydantic import ConfigDict, Field
from torch import Tensor, nn

# The bounds keep a hostile or damaged file from asking for terabytes before its tensors are seen.
Width = Annotated[int, Field(ge=1, le=8192)]
Classes = Annotated[int, Field(ge=1, le=100_000)]
Channels = Literal[1, 3]
ImageSize = Annotated[int, Field(ge=4, le=512)]


@dataclass(frozen=True, kw_only=True)
class MLPGeneratorConfig:
    """The generator of the CGAN of Mirza & Osindero (arXiv 1411.1784) as a multilayer perceptron.

    Attributes:
        num_classes: how many classes there are.
        channels: 1 (grey) or 3 (RGB).
        image_size: height and width of an image, in pixels.
        latent_dim: length of a latent vector.
        embedding_dim: length of a label's embedding.
        hidden: widths of the hidden layers; all but the first are batch-normalised.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    kind: Literal["mlp"] = "mlp"
    num_classes: Classes
    channels: Channels
    image_size: ImageSize
    latent_dim: Width = 100
    embedding_dim: Width = 10
    hidden: Annotated[tuple[Width, ...], Field(min_length=1, max_length=16)] = (128, 256, 512, 1024)


GeneratorConfig = MLPGeneratorConfig


class MLPGenerator(nn.Module):
    """Latents and labels to images, as a multilayer perceptron; see `MLPGeneratorConfig`."""

    def __init__(self, config: MLPGeneratorConfig) -> None:
        super().__init__()
        self.config = config
        pixels = config.channels * config.image_size**2
        widths = (config.latent_dim + config.embedding_dim, *config.hidden)
        layers: list[nn.Module] = []
        for depth, (fan_in, fan_out) in enumerate(pairwise(widths)):
            layers.append(nn.Linear(fan_in, fan_out))
            if depth > 0:
                layers.append(nn.BatchNorm1d(fan_out))
            layers.append(nn.LeakyReLU(0.2))
        self.label_embedding = nn.Embedding(config.num_classes, config.embedding_dim)
        self.main = nn.Sequential(*layers, nn.Linear(widths[-1], pixels), nn.Tanh())

    def forward(self, latents: Tensor, labels: Tensor) -> Tensor:
        """Generate images.

        Args:
            latents: (N, latent_dim) float32, drawn from a standard normal distribution.
            labels: (N,) int64 in [0, num_classes).

        Returns:
            (N, C, H, W) float32 in [-1, 1].
        """
        size = self.config.image_size
        x = torch.cat([latents, self.label_embedding(labels)], dim=1)  # (N, latent + embedding)
        x = self.main(x)  # (N, C * H * W)
        images: Tensor = x.view(-1, self.config.channels, size, size)
        return images


class MLPDiscriminator(nn.Module):
    """Images and labels to logits: the multilayer perceptron of arXiv 1411.1784.

    The sigmoid of the published model belongs to the loss here, which is the same function computed
    without losing precision. There is no normalisation between samples, so a logit depends on its
    own image alone and a gradient penalty is exact.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        channels: int,
        image_size: int,
        embedding_dim: int = 10,
        hidden: tuple[int, ...] = (512, 256),
    ) -> None:
        super().__init__()
        widths = (channels * image_size**2 + embedding_dim, *hidden)
        layers: list[nn.Module] = []
        for fan_in, fan_out in pairwise(widths):
            layers += [nn.Linear(fan_in, fan_out), nn.LeakyReLU(0.2)]
        self.label_embedding = nn.Embedding(num_classes, embedding_dim)
        self.main = nn.Sequential(*layers, nn.Linear(widths[-1], 1))

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        """Score images against labels.

        Args:
            images: (N, C, H, W) float32 in [-1, 1].
            labels: (N,) int64.

        Returns:
            logits: (N,), large where an image looks real for its label.
        """
        x = torch.cat([images.flatten(1), self.label_embedding(labels)], dim=1)
        x = self.main(x)  # (N, 1)
        logits: Tensor = x.squeeze(1).float()
        return logits


class ConvDiscriminator(nn.Module):
    """Images and labels to logits: strided convolutions and a projection of the class embedding.

    The class enters as an inner product with the features (Miyato & Koyama, arXiv 1802.05637). No
    normalisation between samples, for the same reason as in `MLPDiscriminator`.
    """

    def __init__(
        self, *, num_classes: int, channels: int, image_size: int, widths: tuple[int, ...]
    ) -> None:
        super().__init__()
        *conv_widths, features = widths
        layers: list[nn.Module] = []
        fan_in, size = channels, image_size
        for fan_out in conv_widths:
            layers += [nn.Conv2d(fan_in, fan_out, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
            fan_in, size = fan_out, size // 2
        layers += [nn.Flatten(), nn.Linear(fan_in * size**2, features), nn.LeakyReLU(0.2)]
        self.main = nn.Sequential(*layers)
        self.label_embedding = nn.Embedding(num_classes, features)
        self.out = nn.Linear(features, 1)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        """Score images against labels; the same contract as `MLPDiscriminator.forward`."""
        x = self.main(images)  # (N, features)
        unconditional: Tensor = self.out(x).squeeze(1).float()
        projected: Tensor = (x.float() * self.label_embedding(labels)).sum(1) / x.shape[1] ** 0.5
        return unconditional + projected


def build_generator(config: GeneratorConfig) -> MLPGenerator:
    """Build the generator that a configuration describes, freshly initialised."""
    return MLPGenerator(config)


def count_parameters(module: nn.Module) -> int:
    """The number of trainable values in a module."""
    return sum(p.numel() for p in module.parameters())
