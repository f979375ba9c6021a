"""Generators and discriminators: the one definition of each network."""

from collections.abc import Callable
from itertools import pairwise
from math import ceil, log2
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from training.generator_config import ConvGeneratorConfig, GeneratorConfig, MLPGeneratorConfig


class MLPGenerator(nn.Module):
    """Multilayer perceptron from latents and labels to images; see `MLPGeneratorConfig`."""

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
        """Map latents and labels to images (N, C, H, W) float32 in [-1, 1].

        Latents (N, latent_dim) float32 are standard normal, labels (N,) int64 in [0, num_classes).
        """
        return self.synthesise(latents, self.label_embedding(labels))

    def synthesise(self, latents: Tensor, embedded: Tensor) -> Tensor:
        """Map latents and embedded labels (N, embedding_dim), or mixtures of these, to images."""
        size = self.config.image_size
        x = self.main(torch.cat([latents, embedded], dim=1))  # (N, C * H * W)
        images: Tensor = x.view(-1, self.config.channels, size, size)
        return images


class MLPDiscriminator(nn.Module):
    """Multilayer perceptron from images and labels to logits (arXiv 1411.1784).

    The loss applies the sigmoid, which is more precise. No normalisation mixes samples, so a logit
    depends on its own image alone and a gradient penalty is exact.
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
        """Map images (N, C, H, W) float32 in [-1, 1] and labels (N,) int64 to logits (N,).

        A logit is large if the image looks real for its label.
        """
        x = torch.cat([images.flatten(1), self.label_embedding(labels)], dim=1)
        x = self.main(x)  # (N, 1)
        logits: Tensor = x.squeeze(1).float()
        return logits


class ConvDiscriminator(nn.Module):
    """Convolutional network from images and labels to logits, with a class projection.

    Strided convolutions, each followed by a residual block if `residual`. The class enters as an
    inner product with the features (Miyato & Koyama, arXiv 1802.05637). No normalisation mixes
    samples, as in `MLPDiscriminator`.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        channels: int,
        image_size: int,
        widths: tuple[int, ...],
        residual: bool = False,
    ) -> None:
        super().__init__()
        *conv_widths, features = widths
        layers: list[nn.Module] = []
        fan_in, size = channels, image_size
        for fan_out in conv_widths:
            layers.append(nn.Conv2d(fan_in, fan_out, 4, stride=2, padding=1))
            if residual:
                layers.append(ResidualBlock(fan_out))
            layers.append(nn.LeakyReLU(0.2))
            fan_in, size = fan_out, size // 2
        layers += [nn.Flatten(), nn.Linear(fan_in * size**2, features), nn.LeakyReLU(0.2)]
        self.main = nn.Sequential(*layers)
        self.label_embedding = nn.Embedding(num_classes, features)
        self.out = nn.Linear(features, 1)
        if residual:
            _kaiming_init(self)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        """Score images against labels, as `MLPDiscriminator.forward` does.

        Labels (N, K) score each image against K labels: logits (N, K).
        """
        features = self.main(images)  # (N, F)
        realness = self.out(features).squeeze(1).float()  # (N,)
        embedded = self.label_embedding(labels)  # (N, F) or (N, K, F)
        if labels.ndim == 2:
            features, realness = features[:, None], realness[:, None]
        projected = (features.float() * embedded).sum(-1) / features.shape[-1] ** 0.5
        logits: Tensor = realness + projected
        return logits


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions of a feature map, added to it, without normalisation.

    The second convolution starts at zero, so that every block starts as the identity and a deep
    stack as a shallow network (Fixup, arXiv 1901.09321).
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)
        _kaiming_init(self)

    def forward(self, x: Tensor, style: Tensor | None = None) -> Tensor:
        """Map (N, width, H, W) to the same shape; `style` (N, width) scales the input."""
        inner = F.leaky_relu(x, 0.2)
        if style is not None:
            inner = inner * (1.0 + style[:, :, None, None])
        inner = F.leaky_relu(self.first(inner), 0.2)
        refined: Tensor = x + self.second(inner)
        return refined


class ConvGenerator(nn.Module):
    """Residual convolutional network from latents and labels to images; see `ConvGeneratorConfig`.

    An image depends on its own latent and label alone. Two dense layers give a style vector and the
    coarsest feature map. At each level a residual block refines the map, scaled per channel by the
    style (the modulation of StyleGAN2, arXiv 1912.04958, without its demodulation). Every position
    of the finest map gives 2x2 pixels (arXiv 1609.05158), so no convolution runs at full size.
    """

    def __init__(self, config: ConvGeneratorConfig) -> None:
        super().__init__()
        self.config = config
        self.sizes = _halvings(config.image_size, len(config.widths))
        coarse, fine = config.widths[0], config.widths[-1]
        self.label_embedding = nn.Embedding(config.num_classes, config.embedding_dim)
        self.trunk = nn.Sequential(
            nn.Linear(config.latent_dim + config.embedding_dim, config.style_dim),
            nn.LeakyReLU(0.2),
            nn.Linear(config.style_dim, config.style_dim),
            nn.LeakyReLU(0.2),
        )
        self.start = nn.Linear(config.style_dim, coarse * self.sizes[0] ** 2)
        self.styles = nn.ModuleList(nn.Linear(config.style_dim, w) for w in config.widths)
        self.blocks = nn.ModuleList(ResidualBlock(w) for w in config.widths)
        self.widen = nn.ModuleList(nn.Conv2d(a, b, 1) for a, b in pairwise(config.widths))
        self.out = nn.Conv2d(fine, 4 * config.channels, 3, padding=1)
        _kaiming_init(self)
        for style in self.styles.parameters():
            nn.init.zeros_(style)

    def forward(self, latents: Tensor, labels: Tensor) -> Tensor:
        """Generate images; the same contract as `MLPGenerator.forward`."""
        return self.synthesise(latents, self.label_embedding(labels))

    def synthesise(self, latents: Tensor, embedded: Tensor) -> Tensor:
        """Generate images; the same contract as `MLPGenerator.synthesise`."""
        style = self.trunk(torch.cat([latents, embedded], dim=1))  # (N, style_dim)
        size = self.sizes[0]
        x = self.start(style).view(-1, size, size, self.config.widths[0])
        x = x.permute(0, 3, 1, 2)  # (N, widths[0], size, size), channels last in memory
        for level, (block, modulation) in enumerate(zip(self.blocks, self.styles, strict=True)):
            if level > 0:
                size = self.sizes[level]
                x = F.interpolate(self.widen[level - 1](x), size=(size, size), mode="nearest")
            x = block(x, modulation(style))  # (N, widths[level], size, size)
        x = F.pixel_shuffle(self.out(F.leaky_relu(x, 0.2)), 2)  # (N, C, 2 * size, 2 * size)
        if 2 * size != self.config.image_size:
            x = x[:, :, : self.config.image_size, : self.config.image_size]
        images: Tensor = torch.tanh(x)
        return images


def _kaiming_init(network: nn.Module) -> None:
    """Initialise layers so that a signal keeps its variance (He et al., arXiv 1502.01852).

    PyTorch's default shrinks it at every layer. Without batch norm, all latents would then start
    with nearly the same image, which training hardly leaves.
    """
    for module in network.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, a=0.2, nonlinearity="leaky_relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for module in network.modules():
        if isinstance(module, ResidualBlock):
            nn.init.zeros_(module.second.weight)


def doubling_widths(image_size: int, finest: int) -> tuple[int, ...]:
    """Return the channels per level, from half the image's size down to maps of at most 8x8.

    `finest` at the first level, twice as many at each halving, so that all levels cost the same.
    """
    levels = max(1, ceil(log2(image_size / 8)))
    return tuple(finest * 2**level for level in range(levels))


def _halvings(image_size: int, levels: int) -> tuple[int, ...]:
    """Return the sizes of the feature maps, coarsest first; the finest is half the image's size."""
    sizes = []
    for _ in range(levels):
        image_size = -(-image_size // 2)
        sizes.append(image_size)
    return tuple(reversed(sizes))


Generator = MLPGenerator | ConvGenerator


class Uninitialised(TorchFunctionMode):
    """A mode that builds modules without drawing their initial weights.

    On the meta device drawing has no effect, but makes PyTorch import its compiler. The import
    delays every start and needs a writable temporary folder, which a read-only container lacks.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        # Some initialisers, such as kaiming_normal_, do not pass here, but their methods do.
        draws = getattr(func, "__module__", None) == "torch.nn.init"
        if draws or func in (Tensor.normal_, Tensor.uniform_):
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def build_generator(config: GeneratorConfig) -> Generator:
    """Build a freshly initialised generator from its configuration."""
    if isinstance(config, ConvGeneratorConfig):
        return ConvGenerator(config)
    return MLPGenerator(config)


def count_parameters(module: nn.Module) -> int:
    """Return the number of trainable values in a module."""
    return sum(p.numel() for p in module.parameters())
