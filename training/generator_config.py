"""Configurations of generators, as artifacts hold them; importing them needs no PyTorch.

A generator is built from a frozen configuration that the artifact contains, so that training,
evaluation and the service agree on its shape.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import ConfigDict, Field

# The bounds keep a hostile or damaged file from allocating terabytes before its tensors are read.
Width = Annotated[int, Field(ge=1, le=8192)]
Classes = Annotated[int, Field(ge=1, le=100_000)]
Channels = Literal[1, 3]
ImageSize = Annotated[int, Field(ge=4, le=512)]


@dataclass(frozen=True, kw_only=True)
class MLPGeneratorConfig:
    """The multilayer-perceptron generator of the CGAN (Mirza & Osindero, arXiv 1411.1784).

    Attributes:
        channels: 1 (grey) or 3 (RGB).
        image_size: height and width of an image in pixels.
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


@dataclass(frozen=True, kw_only=True)
class ConvGeneratorConfig:
    """A small residual convolutional generator without normalisation.

    Attributes as in `MLPGeneratorConfig`, and:
        style_dim: width of the dense layers that latent and label pass first.
        widths: channels of the feature maps, coarsest first; each level doubles the size, and the
            finest has half the image's size.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    kind: Literal["conv"] = "conv"
    num_classes: Classes
    channels: Channels
    image_size: ImageSize
    latent_dim: Width = 64
    embedding_dim: Width = 64
    style_dim: Width = 256
    widths: Annotated[tuple[Width, ...], Field(min_length=1, max_length=8)]


GeneratorConfig = Annotated[MLPGeneratorConfig | ConvGeneratorConfig, Field(discriminator="kind")]
