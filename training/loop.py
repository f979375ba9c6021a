"""The adversarial loop.

One step draws a batch on the device, runs the generator once, updates the discriminator and then
the generator, and moves the average. Nothing is read back to the host between log points.
"""

import math
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from training.config import TrainingConfig
from training.data.augmentation import diff_augment, flip
from training.data.named import Dataset
from training.distributed import SINGLE_PROCESS, DistributedContext
from training.losses import discriminator_loss, generator_loss, gradient_penalty, mismatch_loss
from training.networks import (
    Channels,
    ConvDiscriminator,
    ConvGeneratorConfig,
    Generator,
    GeneratorConfig,
    MLPDiscriminator,
    MLPGeneratorConfig,
    ResidualDiscriminator,
    build_generator,
    doubling_widths,
)

_Network = TypeVar("_Network", bound=nn.Module)
_PARTS = ("generator", "discriminator", "ema", "generator_optimizer", "discriminator_optimizer")


@dataclass(kw_only=True)
class TrainState:
    """Everything that a step changes.

    Attributes:
        ema: the average of the generator; without a half-life, what the generator was at the last
            log point.
        rng: the only source of randomness of the steps, on the device. Every process of a run draws
            the same, and takes its share.
        world: the processes of the run.
        images_seen: real images shown so far.
        began: when the run would have begun, had it never been interrupted; see `elapsed_s`.
        lr_scale: factor of the learning rate; every rollback halves it.
        ema_weight: how far the next step moves the average; a tensor where the step is captured.
    """

    generator: Generator
    discriminator: nn.Module
    ema: Generator
    generator_optimizer: torch.optim.Adam
    discriminator_optimizer: torch.optim.Adam
    rng: torch.Generator
    world: DistributedContext = SINGLE_PROCESS
    images_seen: int = 0
    began: float = field(default_factory=time.perf_counter)
    lr_scale: float = 1.0
    ema_weight: float | Tensor = 1.0

    def __post_init__(self) -> None:
        # The same networks; with several processes, their gradients are averaged on the way back.
        self.parallel_generator = self.world.parallel(self.generator)
        self.parallel_discriminator = self.world.parallel(self.discriminator)

    @property
    def elapsed_s(self) -> float:
        """Time that the run has taken so far, over all resumptions."""
        return time.perf_counter() - self.began

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to go on from here exactly; refers to the live tensors."""
        return {
            **{part: getattr(self, part).state_dict() for part in _PARTS},
            "rng": self.rng.get_state(),
            "images_seen": self.images_seen,
            "elapsed_s": self.elapsed_s,
            "lr_scale": self.lr_scale,
        }

    def load_state_dict(self, contents: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave.

        Raises:
            KeyError, RuntimeError, ValueError, TypeError: it does not fit.
        """
        for part in _PARTS:
            # An optimiser would keep the tensors themselves, and change them from then on.
            getattr(self, part).load_state_dict(deepcopy(contents[part]))
        for optimizer in (self.generator_optimizer, self.discriminator_optimizer):
            for group in optimizer.param_groups:
                if isinstance(group["lr"], Tensor):  # the one tensor that comes as it was stored
                    group["lr"] = group["lr"].to(self.rng.device)
        self.rng.set_state(contents["rng"])
        self.images_seen = contents["images_seen"]
        self.began = time.perf_counter() - contents["elapsed_s"]
        self.lr_scale = contents["lr_scale"]


class DivergedError(Exception):
    """The losses are no longer numbers; going on would only waste time."""


@dataclass(frozen=True)
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
        regular: whether an uninterrupted run has this point too.
    """

    losses: Losses | None
    used: float
    images_per_s: float
    finished: bool
    regular: bool


def generator_config(config: TrainingConfig, dataset: Dataset) -> GeneratorConfig:
    """The generator of a training configuration, in the shape of a data set's images."""
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
) -> TrainState:
    """Networks with PyTorch's ordinary initialisation, and their optimisers, on the device.

    The initial weights are drawn on the CPU, so that one seed starts from the same networks
    everywhere. The global random state is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        generator = _on(build_generator(generator_config), device)
        discriminator = _on(_build_discriminator(config, generator_config), device)
    return TrainState(
        generator=generator,
        discriminator=discriminator,
        ema=deepcopy(generator).requires_grad_(False),
        generator_optimizer=_adam(generator, config, device),
        discriminator_optimizer=_adam(discriminator, config, device),
        rng=torch.Generator(device).manual_seed(seed),
        world=world,
        ema_weight=torch.ones((), device=device) if device.type == "cuda" else 1.0,
    )


def _on(network: _Network, device: torch.device) -> _Network:
    # Channels last is the order in which both kinds of device convolve fastest.
    placed: _Network = network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return placed


def _build_discriminator(config: TrainingConfig, shape: GeneratorConfig) -> nn.Module:
    classes, channels, size = shape.num_classes, shape.channels, shape.image_size
    widths = config.discriminator_hidden
    if config.discriminator == "residual":
        finest, features = widths
        return ResidualDiscriminator(
            num_classes=classes,
            channels=channels,
            image_size=size,
            widths=(*doubling_widths(size, finest), features),
        )
    if config.discriminator == "conv":
        return ConvDiscriminator(
            num_classes=classes, channels=channels, image_size=size, widths=widths
        )
    return MLPDiscriminator(num_classes=classes, channels=channels, image_size=size, hidden=widths)


def _adam(network: nn.Module, config: TrainingConfig, device: torch.device) -> torch.optim.Adam:
    captured = device.type == "cuda"  # a captured step reads its learning rate from the device
    return torch.optim.Adam(
        network.parameters(),
        lr=torch.tensor(config.lr, device=device) if captured else config.lr,
        betas=(config.beta1, config.beta2),
        fused=True,
        capturable=captured,
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
    schedule(state, config, used=used, steps=1)
    return update(state, dataset, config, penalise=penalise)


def schedule(state: TrainState, config: TrainingConfig, *, used: float, steps: int) -> None:
    """What the host decides of the next steps: their learning rate, and the weight of the average.

    Both are functions of progress alone. A captured step finds them in tensors.
    """
    lr = config.lr * state.lr_scale
    if config.lr_schedule == "cosine":
        lr *= 0.5 * (1.0 + math.cos(math.pi * used))
    for optimizer in (state.generator_optimizer, state.discriminator_optimizer):
        for group in optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr
    state.images_seen += steps * config.batch_size
    half_life = min(config.ema_half_life, config.ema_ramp * state.images_seen)
    weight = 1.0 if half_life == 0 else 1.0 - 0.5 ** (config.batch_size / half_life)
    if isinstance(state.ema_weight, Tensor):
        state.ema_weight.fill_(weight)
    else:
        state.ema_weight = weight


def update(
    state: TrainState, dataset: Dataset, config: TrainingConfig, *, penalise: bool
) -> Tensor:
    """The part of a step that runs on the device, and can be captured there: `train_step`'s."""
    device_type = dataset.labels.device.type
    with torch.autocast(
        device_type,
        torch.bfloat16,
        enabled=config.precision == "bfloat16",
        cache_enabled=device_type != "cuda",  # a cached weight would outlive its step in a capture
    ):
        return _update_both(state, dataset, config, penalise=penalise)


def _update_both(
    state: TrainState, dataset: Dataset, config: TrainingConfig, *, penalise: bool
) -> Tensor:
    real, real_labels, latents, fake_labels = draw_batch(state, dataset, config)
    # (N, C, H, W), shared by both phases
    fake = state.parallel_generator(latents, fake_labels)
    labels = torch.cat([real_labels, fake_labels])
    d_loss, logits, penalty = _update_discriminator(
        state, config, torch.cat([real, fake.detach()]), labels, penalise=penalise
    )
    g_loss = _update_generator(state, config, real, fake, labels)
    if config.ema_half_life > 0:  # else it is a copy, which `train` makes where one is looked at
        update_ema(state)
    real_logits, fake_logits = logits.chunk(2)
    return torch.stack([d_loss, g_loss, real_logits.mean(), fake_logits.mean(), penalty]).detach()


def draw_batch(
    state: TrainState, dataset: Dataset, config: TrainingConfig
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What a step is made of: this process's share of a batch.

    Returns:
        real images (N, C, H, W) and their labels (N,), latents (N, latent_dim) and the labels (N,)
        to generate.
    """
    real, real_labels = sample_batch(dataset, config.batch_size, state.rng, state.world)
    if config.flip:
        real = flip(real, state.rng)
    device, latent_dim = real.device, state.generator.config.latent_dim
    latents = torch.randn((config.batch_size, latent_dim), generator=state.rng, device=device)
    if config.objective == "relativistic":
        fake_labels = real_labels  # a pair must share its label, or the label alone tells it apart
    else:
        fake_labels = state.world.share(
            torch.randint(
                dataset.num_classes, (config.batch_size,), generator=state.rng, device=device
            )
        )
    return real, real_labels, state.world.share(latents), fake_labels


def sample_batch(
    dataset: Dataset,
    batch_size: int,
    rng: torch.Generator,
    world: DistributedContext = SINGLE_PROCESS,
) -> tuple[Tensor, Tensor]:
    """Draw real images with replacement, and take this process's share of them.

    Returns:
        (N, C, H, W) float32 in [-1, 1], and (N,) int64 labels, with N = batch_size / world.size.
    """
    device = dataset.labels.device
    indices = torch.randint(len(dataset.labels), (batch_size,), generator=rng, device=device)
    indices = world.share(indices)
    return dataset.images[indices].float().div_(127.5).sub_(1.0), dataset.labels[indices]


def _update_discriminator(
    state: TrainState, config: TrainingConfig, images: Tensor, labels: Tensor, *, penalise: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Real images in the first half of the batch, fake ones in the second."""
    if config.augment:
        images = diff_augment(images, state.rng)
    images.requires_grad_(penalise)
    if config.mismatch:
        others = torch.stack([labels, _other_labels(state, config, labels)], dim=1)
        logits, mismatched = state.parallel_discriminator(images, others).unbind(1)
    else:
        logits = state.parallel_discriminator(images, labels)  # (2N,)
    adversarial = discriminator_loss(config.objective, *logits.chunk(2)).mean()
    penalty = logits.new_zeros(())
    loss = adversarial
    if config.mismatch:
        real, mismatched = logits.chunk(2)[0], mismatched.chunk(2)[0]
        loss = loss + config.mismatch * mismatch_loss(real, mismatched).mean()
    if penalise:
        assert config.penalty is not None
        penalty = gradient_penalty(images, logits).mean()
        # The mean is over 2N images; R1 and R2 are means over N each.
        loss = loss + config.penalty * config.penalty_interval * penalty
    state.discriminator_optimizer.zero_grad(set_to_none=True)
    loss.backward()
    state.discriminator_optimizer.step()
    return adversarial, logits, penalty


def _other_labels(state: TrainState, config: TrainingConfig, labels: Tensor) -> Tensor:
    """A label for each image that is not its own: (2N,)."""
    classes = state.generator.config.num_classes
    shape = (2 * config.batch_size,)
    offsets = torch.randint(1, classes, shape, generator=state.rng, device=labels.device)
    return (labels + state.world.share(offsets)) % classes


def _update_generator(
    state: TrainState, config: TrainingConfig, real: Tensor, fake: Tensor, labels: Tensor
) -> Tensor:
    real_labels, fake_labels = labels.chunk(2)
    if config.augment:
        real, fake = diff_augment(real, state.rng), diff_augment(fake, state.rng)
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


@torch.no_grad()
def update_ema(state: TrainState) -> None:
    """Move the average towards the generator, by `state.ema_weight`."""
    average: list[Tensor] = list(state.ema.parameters())
    latest: list[Tensor] = list(state.generator.parameters())
    if isinstance(state.ema_weight, Tensor):
        change = torch._foreach_sub(latest, average)
        torch._foreach_mul_(change, state.ema_weight)
        torch._foreach_add_(average, change)
    else:
        torch._foreach_lerp_(average, latest, state.ema_weight)


@torch.no_grad()
def recompute_batch_norm(generator: Generator, *, batches: int, seed: int = 0) -> None:
    """Measure the batch-norm statistics that belong to the generator's present weights.

    The running statistics that training keeps belong to other weights than the averaged ones.
    Labels are balanced over the batches; the statistics are the plain mean over all batches of 500
    images. The generator is left in evaluation mode; one without batch norm has nothing to measure.
    """
    norms = [m for m in generator.modules() if isinstance(m, nn.BatchNorm1d)]
    generator.eval()
    if not norms:
        return
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


# Makes some steps of a run, given the fraction of it that is over, and returns the sum of what they
# report: (5,) on the device. How many steps is told by `state.images_seen`.
Stepper = Callable[[float], Tensor]


def eager_stepper(state: TrainState, dataset: Dataset, config: TrainingConfig) -> Stepper:
    """One step at a time, launched operation by operation."""

    def step(used: float) -> Tensor:
        number = state.images_seen // config.batch_size
        penalise = bool(config.penalty) and number % config.penalty_interval == 0
        return train_step(state, dataset, config, used=used, penalise=penalise)

    return step


def train(
    state: TrainState,
    config: TrainingConfig,
    stepper: Stepper,
    *,
    seconds: float | None = None,
    log_every: int,
    stop: Callable[[], bool],
) -> Iterator[LogPoint]:
    """Step until the run is complete or `stop` says so.

    Args:
        state: where to start; changed in place.
        config: the run's configuration.
        stepper: makes the steps of this state.
        seconds: ends the run by `state.elapsed_s` instead of by `config.images`, every schedule
            included.
        log_every: images between two log points.
        stop: asked before every step; cheap. One process that stops takes the others along.

    Yields:
        a point every `log_every` images, and a last one when the run ends or is stopped. The state
        may be saved at every point.

    Raises:
        DivergedError: a loss is not finite.
    """
    while True:
        point = _train_to_log_point(state, config, stepper, seconds, log_every, stop)
        # Asked before the caller looks: a stop that comes later is told by a point of its own.
        last = point.finished or state.world.any(stop())
        yield point
        if last:
            return


def used_fraction(state: TrainState, config: TrainingConfig, seconds: float | None) -> float:
    """How much of the run is over, in [0, 1]: a share of the images, or of the time."""
    if seconds is None:
        return min(1.0, state.images_seen / config.images)
    (elapsed_s,) = state.world.agree(state.elapsed_s)  # every process must make the same steps
    return min(1.0, elapsed_s / seconds)


def _train_to_log_point(
    state: TrainState,
    config: TrainingConfig,
    stepper: Stepper,
    seconds: float | None,
    log_every: int,
    stop: Callable[[], bool],
) -> LogPoint:
    first, began = state.images_seen, time.perf_counter()
    totals = torch.zeros(5, device=state.rng.device)
    due = False
    while (used := used_fraction(state, config, seconds)) < 1.0 and not state.world.any(stop()):
        totals += stepper(used)
        due = state.images_seen // log_every > first // log_every
        if due:
            break
    if config.ema_half_life == 0:
        update_ema(state)
    means, steps = _means(state, config, totals, first)
    spent = time.perf_counter() - began  # the means have been waited for
    return LogPoint(
        losses=Losses(*means) if steps else None,
        used=(used := used_fraction(state, config, seconds)),
        images_per_s=(state.images_seen - first) / spent,
        finished=used >= 1.0,
        regular=due or used >= 1.0,
    )


def _means(
    state: TrainState, config: TrainingConfig, totals: Tensor, first: int
) -> tuple[list[float], int]:
    """The mean report of the steps since `first` images, and how many steps they were.

    Raises:
        DivergedError: a mean is not finite.
    """
    begin, end = first // config.batch_size, state.images_seen // config.batch_size
    steps = end - begin
    means: list[float] = state.world.mean(totals / max(1, steps)).tolist()  # the one read-back
    if not all(map(math.isfinite, means)):
        raise DivergedError(f"the losses are no longer finite after {state.images_seen:,} images")
    # Steps are penalised where their number is a multiple of the interval.
    penalties = -(-end // config.penalty_interval) - -(-begin // config.penalty_interval)
    if penalties:
        means[4] *= steps / penalties
    return means, steps
