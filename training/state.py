"""The state of a training run: networks, optimisers, random numbers and progress."""

import time
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from training.config import TrainingConfig
from training.data.named import Dataset
from training.distributed import SINGLE_PROCESS, DistributedContext
from training.generator_config import (
    Channels,
    ConvGeneratorConfig,
    GeneratorConfig,
    MLPGeneratorConfig,
)
from training.networks import (
    ConvDiscriminator,
    Generator,
    MLPDiscriminator,
    build_generator,
    doubling_widths,
)

_PARTS = ("generator", "discriminator", "ema", "generator_optimizer", "discriminator_optimizer")


@dataclass(kw_only=True)
class TrainState:
    """Everything that a step changes, and the configuration that decides how.

    Every process of a run draws the same random numbers and takes its shard.
    """

    config: TrainingConfig
    generator: Generator
    discriminator: nn.Module
    ema: Generator  # the moving average; without a half-life, a copy made at log points
    generator_optimizer: torch.optim.Adam
    discriminator_optimizer: torch.optim.Adam
    rng: torch.Generator  # the only source of randomness of the steps, on the device
    world: DistributedContext = SINGLE_PROCESS
    budget_s: float | None = None  # of `elapsed_s`; replaces `config.images` in every schedule
    images_seen: int = 0  # real images shown so far
    # `time.perf_counter()` at the start, minus the time of interruptions.
    started_at: float = field(default_factory=time.perf_counter)
    lr_scale: float = 1.0  # factor of the learning rate; every rollback halves it
    # Weight of the generator in the next update of the average; a tensor on CUDA, where a captured
    # step reads it.
    ema_weight: float | Tensor = 1.0

    def __post_init__(self) -> None:
        # The same networks, with gradients averaged over the processes.
        self.parallel_generator = self.world.parallel(self.generator)
        self.parallel_discriminator = self.world.parallel(self.discriminator)

    @property
    def elapsed_s(self) -> float:
        """Seconds that the run has taken, summed over all resumptions."""
        return time.perf_counter() - self.started_at

    def state_dict(self) -> dict[str, Any]:
        """Return everything that resumes the run exactly; refers to the live tensors."""
        return {
            **{part: getattr(self, part).state_dict() for part in _PARTS},
            "rng": self.rng.get_state(),
            "images_seen": self.images_seen,
            "elapsed_s": self.elapsed_s,
            "lr_scale": self.lr_scale,
        }

    def load_state_dict(self, contents: dict[str, Any]) -> None:
        """Restore the contents of `state_dict`.

        Raises:
            KeyError, RuntimeError, ValueError, TypeError: the contents do not fit.
        """
        for part in _PARTS:
            # A copy, because an optimiser would adopt the tensors and change them in place.
            getattr(self, part).load_state_dict(deepcopy(contents[part]))
        for optimizer in (self.generator_optimizer, self.discriminator_optimizer):
            for group in optimizer.param_groups:
                if isinstance(group["lr"], Tensor):  # an optimiser does not move it to its device
                    group["lr"] = group["lr"].to(self.rng.device)
        self.rng.set_state(contents["rng"])
        self.images_seen = contents["images_seen"]
        self.started_at = time.perf_counter() - contents["elapsed_s"]
        self.lr_scale = contents["lr_scale"]


def generator_config(config: TrainingConfig, dataset: Dataset) -> GeneratorConfig:
    """Return the configuration of the generator for the images of a data set."""
    channels: Channels = 3 if dataset.channels == 3 else 1
    if config.generator == "mlp":
        return MLPGeneratorConfig(
            num_classes=dataset.num_classes, channels=channels, image_size=dataset.image_size
        )
    return ConvGeneratorConfig(
        num_classes=dataset.num_classes,
        channels=channels,
        image_size=dataset.image_size,
        widths=doubling_widths(dataset.image_size, config.generator_width)[::-1],
    )


def create_state(
    config: TrainingConfig,
    generator_config: GeneratorConfig,
    device: torch.device,
    seed: int,
    world: DistributedContext = SINGLE_PROCESS,
    budget_s: float | None = None,
) -> TrainState:
    """Build the networks and their optimisers on the device.

    The initial weights are drawn on the CPU, so that a seed gives the same networks on every
    device. The global random state is not changed.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        generator = build_generator(generator_config)
        discriminator = _build_discriminator(config, generator_config)
    for network in (generator, discriminator):  # convolutions are fastest in channels-last order
        network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return TrainState(
        config=config,
        generator=generator,
        discriminator=discriminator,
        ema=deepcopy(generator).requires_grad_(False),
        generator_optimizer=_adam(generator, config, device),
        discriminator_optimizer=_adam(discriminator, config, device),
        rng=torch.Generator(device).manual_seed(seed),
        world=world,
        budget_s=budget_s,
        ema_weight=torch.ones((), device=device) if device.type == "cuda" else 1.0,
    )


def _build_discriminator(config: TrainingConfig, shape: GeneratorConfig) -> nn.Module:
    classes, channels, size = shape.num_classes, shape.channels, shape.image_size
    widths = config.discriminator_widths
    if config.discriminator == "mlp":
        return MLPDiscriminator(
            num_classes=classes, channels=channels, image_size=size, hidden=widths
        )
    residual = config.discriminator == "residual"
    if residual:
        finest, features = widths
        widths = (*doubling_widths(size, finest), features)
    return ConvDiscriminator(
        num_classes=classes, channels=channels, image_size=size, widths=widths, residual=residual
    )


def _adam(network: nn.Module, config: TrainingConfig, device: torch.device) -> torch.optim.Adam:
    captured = device.type == "cuda"  # a captured step reads its learning rate from the device
    return torch.optim.Adam(
        network.parameters(),
        lr=torch.tensor(config.lr, device=device) if captured else config.lr,
        betas=(config.beta1, config.beta2),
        fused=True,
        capturable=captured,
    )
