"""The adversarial loop.

One step draws a batch on the device, runs the generator once, updates the discriminator and then
the generator, and moves the average. Nothing is read back to the host between log points.
"""

import math
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from training.config import TrainingConfig
from training.data import Dataset
from training.losses import discriminator_loss, generator_loss, gradient_penalty
from training.networks import (
    ConvDiscriminator,
    GeneratorConfig,
    MLPDiscriminator,
    MLPGenerator,
    build_generator,
)


@dataclass(kw_only=True)
class TrainState:
    """Everything that a step changes; all of it goes into a checkpoint.

    Attributes:
        rng: the only source of randomness of the steps, on the device.
        images_seen: real images shown so far.
        elapsed_s: time spent in steps so far, over all resumptions.
    """

    generator: MLPGenerator
    discriminator: nn.Module
    ema: MLPGenerator
    generator_optimizer: torch.optim.Adam
    discriminator_optimizer: torch.optim.Adam
    rng: torch.Generator
    images_seen: int = 0
    elapsed_s: float = 0.0


class DivergedError(Exception):
    """The losses are no longer numbers; going on would only waste time."""


@dataclass(frozen=True, kw_only=True)
class Losses:
    """Means since the last log point, as plain numbers.

    `real_logit` and `fake_logit` are the discriminator's mean outputs; `penalty` is the mean
    squared gradient norm, real and fake together, where one is computed.
    """

    discriminator: float
    generator: float
    real_logit: float
    fake_logit: float
    penalty: float


@dataclass(frozen=True, kw_only=True)
class LogPoint:
    """What `train` reports.

    Attributes:
        losses: means since the last log point; None where no step was made.
        used: fraction of the run that is over, in [0, 1].
        images_per_s: speed since the last log point.
        finished: whether the run is complete (else: interrupted, or simply under way).
    """

    losses: Losses | None
    used: float
    images_per_s: float
    finished: bool


def generator_config(dataset: Dataset) -> GeneratorConfig:
    """The document's generator, in the shape of a data set's images."""
    return GeneratorConfig(
        num_classes=dataset.num_classes,
        channels=3 if dataset.channels == 3 else 1,
        image_size=dataset.image_size,
    )


def create_state(
    config: TrainingConfig, generator_config: GeneratorConfig, device: torch.device, seed: int
) -> TrainState:
    """Networks with PyTorch's ordinary initialisation, and their optimisers, on the device.

    The initial weights are drawn on the CPU, so that one seed starts from the same networks
    everywhere. The global random state is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        generator = build_generator(generator_config).to(device)
        discriminator = _build_discriminator(config, generator_config).to(device)
    return TrainState(
        generator=generator,
        discriminator=discriminator,
        ema=deepcopy(generator).requires_grad_(False),
        generator_optimizer=_adam(generator, config),
        discriminator_optimizer=_adam(discriminator, config),
        rng=torch.Generator(device).manual_seed(seed),
    )


def _build_discriminator(config: TrainingConfig, shape: GeneratorConfig) -> nn.Module:
    if config.discriminator == "conv":
        return ConvDiscriminator(
            num_classes=shape.num_classes,
            channels=shape.channels,
            image_size=shape.image_size,
            widths=config.discriminator_hidden,
        )
    return MLPDiscriminator(
        num_classes=shape.num_classes,
        channels=shape.channels,
        image_size=shape.image_size,
        hidden=config.discriminator_hidden,
    )


def _adam(network: nn.Module, config: TrainingConfig) -> torch.optim.Adam:
    return torch.optim.Adam(
        network.parameters(), lr=config.lr, betas=(config.beta1, config.beta2), fused=True
    )


def train_step(
    state: TrainState, dataset: Dataset, config: TrainingConfig, *, used: float, penalise: bool
) -> Tensor:
    """One step of both networks.

    Args:
        state: changed in place.
        dataset: resident on the state's device.
        config: the run's configuration.
        used: fraction of the run that is over, for the learning rate.
        penalise: whether this step computes the gradient penalty.

    Returns:
        (5,) float32 on the device, in the order of the fields of `Losses`.
    """
    _set_learning_rate(state, config, used)
    device_type = dataset.labels.device.type
    with torch.autocast(device_type, torch.bfloat16, enabled=config.precision == "bfloat16"):
        return _update_both(state, dataset, config, penalise=penalise)


def _update_both(
    state: TrainState, dataset: Dataset, config: TrainingConfig, *, penalise: bool
) -> Tensor:
    real, real_labels = sample_batch(dataset, config.batch_size, state.rng)
    if config.objective == "relativistic":
        fake_labels = real_labels  # a pair must share its label, or the label alone tells it apart
    else:
        fake_labels = torch.randint(
            dataset.num_classes, real_labels.shape, generator=state.rng, device=real.device
        )
    latents = torch.randn(
        (config.batch_size, state.generator.config.latent_dim),
        generator=state.rng,
        device=real.device,
    )
    fake = state.generator(latents, fake_labels)  # (N, C, H, W), shared by both phases
    labels = torch.cat([real_labels, fake_labels])
    d_loss, logits, penalty = _update_discriminator(
        state, config, torch.cat([real, fake.detach()]), labels, penalise=penalise
    )
    g_loss = _update_generator(state, config, real, fake, labels)
    state.images_seen += config.batch_size
    update_ema(state, config)
    real_logits, fake_logits = logits.chunk(2)
    return torch.stack([d_loss, g_loss, real_logits.mean(), fake_logits.mean(), penalty]).detach()


def sample_batch(dataset: Dataset, batch_size: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw real images with replacement: (N, C, H, W) float32 in [-1, 1], and (N,) int64 labels."""
    indices = torch.randint(
        len(dataset.labels), (batch_size,), generator=rng, device=dataset.labels.device
    )
    return dataset.images[indices].float().div_(127.5).sub_(1.0), dataset.labels[indices]


def _update_discriminator(
    state: TrainState, config: TrainingConfig, images: Tensor, labels: Tensor, *, penalise: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Real images in the first half of the batch, fake ones in the second."""
    images.requires_grad_(penalise)
    logits = state.discriminator(images, labels)  # (2N,)
    adversarial = discriminator_loss(config.objective, *logits.chunk(2)).mean()
    penalty = logits.new_zeros(())
    loss = adversarial
    if penalise:
        penalty = gradient_penalty(images, logits).mean()
        # The mean is over 2N images; R1 and R2 are means over N each.
        loss = adversarial + config.penalty * config.penalty_interval * penalty
    state.discriminator_optimizer.zero_grad(set_to_none=True)
    loss.backward()
    state.discriminator_optimizer.step()
    return adversarial, logits, penalty


def _update_generator(
    state: TrainState, config: TrainingConfig, real: Tensor, fake: Tensor, labels: Tensor
) -> Tensor:
    real_labels, fake_labels = labels.chunk(2)
    state.discriminator.requires_grad_(False)  # its gradients would be computed and thrown away
    fake_logits = state.discriminator(fake, fake_labels)
    real_logits = fake_logits
    if config.objective == "relativistic":
        with torch.no_grad():
            real_logits = state.discriminator(real, real_labels)
    loss = generator_loss(config.objective, real_logits, fake_logits).mean()
    state.generator_optimizer.zero_grad(set_to_none=True)
    loss.backward()
    state.generator_optimizer.step()
    state.discriminator.requires_grad_(True)
    return loss


def _set_learning_rate(state: TrainState, config: TrainingConfig, used: float) -> None:
    lr = config.lr
    if config.lr_schedule == "cosine":
        lr *= 0.5 * (1.0 + math.cos(math.pi * used))
    for optimizer in (state.generator_optimizer, state.discriminator_optimizer):
        for group in optimizer.param_groups:
            group["lr"] = lr


@torch.no_grad()
def update_ema(state: TrainState, config: TrainingConfig) -> None:
    """Move the average towards the generator by one step's worth of images."""
    half_life = min(config.ema_half_life, config.ema_ramp * state.images_seen)
    weight = 1.0 if half_life == 0 else 1.0 - 0.5 ** (config.batch_size / half_life)
    torch._foreach_lerp_(list(state.ema.parameters()), list(state.generator.parameters()), weight)


@torch.no_grad()
def recompute_batch_norm(generator: MLPGenerator, *, batches: int, seed: int = 0) -> None:
    """Measure the batch-norm statistics that belong to the generator's present weights.

    The running statistics that training keeps belong to other weights than the averaged ones.
    Labels are balanced over the batches; the statistics are the plain mean over all batches of 500
    images. The generator is left in evaluation mode.
    """
    norms = [m for m in generator.modules() if isinstance(m, nn.BatchNorm1d)]
    device = generator.label_embedding.weight.device
    rng = torch.Generator(device).manual_seed(seed)
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a cumulative average instead of an exponential one
    generator.train()
    for first in range(0, 500 * batches, 500):
        labels = torch.arange(first, first + 500, device=device) % generator.config.num_classes
        latents = torch.randn((500, generator.config.latent_dim), generator=rng, device=device)
        generator(latents, labels)
    generator.eval()
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def train(
    state: TrainState,
    dataset: Dataset,
    config: TrainingConfig,
    *,
    minutes: float | None = None,
    log_every: int,
    stop: Callable[[], bool],
) -> Iterator[LogPoint]:
    """Step until the run is complete or `stop` says so.

    Args:
        state: where to start; changed in place.
        dataset: resident on the state's device.
        config: the run's configuration.
        minutes: ends the run by time instead of by `config.images`, every schedule included.
        log_every: images between two log points.
        stop: asked before every step; cheap.

    Yields:
        a point every `log_every` images, and a last one when the run ends or is stopped. The state
        may be saved at every point.

    Raises:
        DivergedError: a loss is not finite.
    """
    while True:
        point = _train_to_log_point(state, dataset, config, minutes, log_every, stop)
        # Asked before the caller looks: a stop that comes later is told by a point of its own.
        last = point.finished or stop()
        yield point
        if last:
            return


def used_fraction(state: TrainState, config: TrainingConfig, minutes: float | None) -> float:
    """How much of the run is over, in [0, 1]: a share of the images, or of the minutes."""
    if minutes is not None:
        return min(1.0, state.elapsed_s / (60.0 * minutes))
    return min(1.0, state.images_seen / config.images)


def _train_to_log_point(
    state: TrainState,
    dataset: Dataset,
    config: TrainingConfig,
    minutes: float | None,
    log_every: int,
    stop: Callable[[], bool],
) -> LogPoint:
    first_image, began, elapsed = state.images_seen, time.perf_counter(), state.elapsed_s
    totals = torch.zeros(5, device=dataset.labels.device)
    steps = penalties = 0
    while (used := used_fraction(state, config, minutes)) < 1.0 and not stop():
        step = state.images_seen // config.batch_size
        penalise = config.penalty > 0 and step % config.penalty_interval == 0
        totals += train_step(state, dataset, config, used=used, penalise=penalise)
        steps += 1
        penalties += penalise
        state.elapsed_s = elapsed + time.perf_counter() - began
        if state.images_seen // log_every > first_image // log_every:
            break
    means = totals / steps if steps else totals
    values = means.tolist()  # the one read-back; it waits for the device
    if not all(map(math.isfinite, values)):
        raise DivergedError(
            f"the losses are no longer finite after {state.images_seen:,} images; the last "
            "checkpoint is from before"
        )
    spent = time.perf_counter() - began
    state.elapsed_s = elapsed + spent
    if penalties:
        values[4] *= steps / penalties
    return LogPoint(
        losses=Losses(
            discriminator=values[0],
            generator=values[1],
            real_logit=values[2],
            fake_logit=values[3],
            penalty=values[4],
        )
        if steps
        else None,
        used=(used := used_fraction(state, config, minutes)),
        images_per_s=(state.images_seen - first_image) / spent,
        finished=used >= 1.0,
    )
