"""The adversarial training loop.

One step draws a batch on the device, runs the generator once, updates both networks, then the
moving average. Nothing is read back to the host between log points.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from training.data.augmentation import diff_augment, flip
from training.data.named import Dataset
from training.distributed import SINGLE_PROCESS, DistributedContext
from training.losses import (
    discriminator_loss,
    generator_loss,
    gradient_penalty,
    image_gradients,
    mismatch_loss,
)
from training.networks import Generator
from training.state import TrainState

# A pair further apart has no weight in the discriminator's loss that float32 could represent.
_MAX_MARGIN = 80.0


class DivergedError(Exception):
    """Training broke down: a loss is not finite, or diversity collapsed."""


@dataclass(frozen=True)
class Losses:
    """Means since the last log point."""

    discriminator: float
    generator: float
    real_logit: float  # the discriminator's output for real images
    fake_logit: float  # and for generated ones
    penalty: float  # squared gradient norm of both, over the steps that compute it


@dataclass(frozen=True, kw_only=True)
class LogPoint:
    """A report of `train`."""

    losses: Losses | None  # means since the last log point; None if no step was made
    progress: float  # completed fraction of the run, in [0, 1]
    images_per_s: float  # speed since the last log point
    finished: bool  # the run is complete
    is_scheduled: bool  # an uninterrupted run has this point too


def train_step(state: TrainState, dataset: Dataset, *, progress: float, penalise: bool) -> Tensor:
    """Make one step of both networks, in place, at a completed fraction of the run.

    Returns:
        (5,) float32 on the device, in the order of the fields of `Losses`. Without `penalise`, the
        penalty is 0.
    """
    apply_schedules(state, progress=progress, steps=1)
    return optimize(state, dataset, penalise=penalise)


def apply_schedules(state: TrainState, *, progress: float, steps: int) -> None:
    """Set the learning rate and the weight of the average for the next steps, and count them.

    Both depend on progress alone. On CUDA they are tensors, which a captured step reads.
    """
    config = state.config
    lr = config.lr * state.lr_scale
    if config.lr_schedule == "cosine":
        lr *= 0.5 * (1.0 + math.cos(math.pi * progress))
    state.images_seen += steps * config.batch_size
    if state.images_seen < config.lr_warmup:
        lr *= state.images_seen / config.lr_warmup
    for optimizer in (state.generator_optimizer, state.discriminator_optimizer):
        for group in optimizer.param_groups:
            group["lr"] = _assign(group["lr"], lr)
    half_life = min(config.ema_half_life, config.ema_ramp * state.images_seen)
    weight = 1.0 if half_life == 0 else 1.0 - 0.5 ** (config.batch_size / half_life)
    state.ema_weight = _assign(state.ema_weight, weight)


def _assign(target: float | Tensor, value: float) -> float | Tensor:
    return target.fill_(value) if isinstance(target, Tensor) else value


def optimize(state: TrainState, dataset: Dataset, *, penalise: bool) -> Tensor:
    """Run the part of `train_step` that is on the device and can be captured there."""
    config = state.config
    device_type = dataset.labels.device.type
    with torch.autocast(
        device_type,
        torch.bfloat16,
        enabled=config.precision == "bfloat16",
        cache_enabled=device_type != "cuda",  # a cached weight would outlive its step in a capture
    ):
        real, real_labels, latents, fake_labels = draw_batch(state, dataset)
        fake = state.parallel_generator(latents, fake_labels)  # (N, C, H, W), used by both updates
        labels = torch.cat([real_labels, fake_labels])
        at_once = config.objective == "relativistic"
        update = _update_at_once if at_once else _update_in_turn
        judged, g_loss = update(state, real, fake, labels, penalise=penalise)
        if config.ema_half_life > 0:  # otherwise `train` copies the generator at log points
            update_ema(state)
        logits = (judged.real_logits.mean(), judged.fake_logits.mean())
        return torch.stack([judged.adversarial, g_loss, *logits, judged.penalty]).detach()


def draw_batch(state: TrainState, dataset: Dataset) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draw this process's shard of a batch.

    Returns:
        real images (N, C, H, W) and their labels (N,), latents (N, latent_dim) and the labels (N,)
        to generate.
    """
    config, world = state.config, state.world
    real, real_labels = sample_batch(dataset, config.batch_size, state.rng, world)
    if config.flip:
        real = flip(real, state.rng)
    device, latent_dim = real.device, state.generator.config.latent_dim
    latents = torch.randn((config.batch_size, latent_dim), generator=state.rng, device=device)
    if config.objective == "relativistic":
        fake_labels = real_labels  # otherwise the label alone would tell the images of a pair apart
    else:
        shape = (config.batch_size,)
        drawn = torch.randint(dataset.num_classes, shape, generator=state.rng, device=device)
        fake_labels = world.shard(drawn)
    return real, real_labels, world.shard(latents), fake_labels


def sample_batch(
    dataset: Dataset,
    batch_size: int,
    rng: torch.Generator,
    world: DistributedContext = SINGLE_PROCESS,
) -> tuple[Tensor, Tensor]:
    """Draw real images with replacement and return this process's shard.

    Returns:
        (N, C, H, W) float32 in [-1, 1], and (N,) int64 labels, with N = batch_size / world.size.
    """
    device = dataset.labels.device
    indices = torch.randint(len(dataset.labels), (batch_size,), generator=rng, device=device)
    indices = world.shard(indices)
    return dataset.images[indices].float().div_(127.5).sub_(1.0), dataset.labels[indices]


@dataclass(frozen=True, kw_only=True)
class _Judgement:
    """The discriminator's logits for N real and N fake images, and its loss."""

    real_logits: Tensor  # (N,)
    fake_logits: Tensor  # (N,)
    gradients: Tensor | None  # (2N, C, H, W), of the logits by the images; for a penalty only
    penalty: Tensor  # mean squared norm of the gradients; 0 without a penalty
    adversarial: Tensor  # the loss without its further terms
    loss: Tensor


def _judge(state: TrainState, images: Tensor, labels: Tensor, *, penalise: bool) -> _Judgement:
    """Compute the discriminator's loss for 2N images, real ones first."""
    config = state.config
    shown = diff_augment(images, state.rng) if config.augment else images
    if config.mismatch_weight:
        pairs = torch.stack([labels, _other_labels(state, labels)], dim=1)
        logits, mismatched = state.parallel_discriminator(shown, pairs).unbind(1)
    else:
        logits = state.parallel_discriminator(shown, labels)  # (2N,)
    real_logits, fake_logits = logits.chunk(2)
    adversarial = discriminator_loss(config.objective, real_logits, fake_logits).mean()
    loss, penalty, gradients = adversarial, logits.new_zeros(()), None
    if config.mismatch_weight:
        mismatched, _ = mismatched.chunk(2)
        loss = loss + config.mismatch_weight * mismatch_loss(real_logits, mismatched).mean()
    if penalise:
        assert config.r1_gamma is not None
        gradients = image_gradients(images, logits)
        penalty = gradient_penalty(gradients).mean()
        # The mean is over 2N images; R1 and R2 are means over N each.
        loss = loss + config.r1_gamma * config.penalty_interval * penalty
    return _Judgement(
        real_logits=real_logits,
        fake_logits=fake_logits,
        gradients=gradients,
        penalty=penalty,
        adversarial=adversarial,
        loss=loss,
    )


def _update_at_once(
    state: TrainState, real: Tensor, fake: Tensor, labels: Tensor, *, penalise: bool
) -> tuple[_Judgement, Tensor]:
    """Update both networks from one pass of the discriminator; return the generator's loss too.

    For the relativistic objective. A logit depends on its own image alone, so the gradients of both
    losses by a fake image are multiples of the gradient of its logit.
    """
    count = len(real)
    images = torch.cat([real, fake.detach()]).requires_grad_()
    judged = _judge(state, images, labels, penalise=penalise)
    _minimise(judged.loss, state.discriminator_optimizer)
    margin = (judged.real_logits - judged.fake_logits).detach()  # (N,)
    if judged.gradients is not None:  # `images.grad` contains that of the penalty as well
        gradients = judged.gradients.detach()[count:]
        factor = -torch.sigmoid(margin) / count
    else:  # the discriminator's loss has the factor sigmoid(-margin) / count
        assert images.grad is not None
        gradients = images.grad[count:]
        factor = -margin.clamp(max=_MAX_MARGIN).exp()
    state.generator_optimizer.zero_grad(set_to_none=True)
    fake.backward(gradients * factor[:, None, None, None])
    state.generator_optimizer.step()
    losses = generator_loss(state.config.objective, judged.real_logits, judged.fake_logits)
    return judged, losses.mean()


def _update_in_turn(
    state: TrainState, real: Tensor, fake: Tensor, labels: Tensor, *, penalise: bool
) -> tuple[_Judgement, Tensor]:
    """Update the discriminator, then the generator against it; return the generator's loss too.

    For the cross-entropy objective, as its authors do (arXiv 1406.2661, algorithm 1).
    """
    images = torch.cat([real, fake.detach()]).requires_grad_(penalise)
    judged = _judge(state, images, labels, penalise=penalise)
    _minimise(judged.loss, state.discriminator_optimizer)
    state.discriminator.requires_grad_(False)  # its gradients are not used
    shown = diff_augment(fake, state.rng) if state.config.augment else fake
    fake_logits = state.discriminator(shown, labels.chunk(2)[1])
    loss = generator_loss(state.config.objective, judged.real_logits, fake_logits).mean()
    _minimise(loss, state.generator_optimizer)
    state.discriminator.requires_grad_(True)
    return judged, loss


def _minimise(loss: Tensor, optimizer: torch.optim.Adam) -> None:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()


def _other_labels(state: TrainState, labels: Tensor) -> Tensor:
    """Draw for each image a label that is not its own: (2N,)."""
    classes = state.generator.config.num_classes
    shape = (2 * state.config.batch_size,)
    offsets = torch.randint(1, classes, shape, generator=state.rng, device=labels.device)
    return (labels + state.world.shard(offsets)) % classes


@torch.no_grad()
def update_ema(state: TrainState) -> None:
    """Move the average towards the generator by `state.ema_weight`."""
    for average, latest in zip(state.ema.parameters(), state.generator.parameters(), strict=True):
        average.lerp_(latest, state.ema_weight)


@torch.no_grad()
def recompute_batch_norm(generator: Generator, *, batches: int, seed: int = 0) -> None:
    """Measure the batch-norm statistics of the generator's present weights.

    The running statistics of training belong to the generator, not to its average. The new ones are
    the mean over all batches of 500 images with balanced labels. The generator is left in
    evaluation mode, and without a momentum: it must not be trained.
    """
    norms = [m for m in generator.modules() if isinstance(m, nn.BatchNorm1d)]
    generator.eval()
    if not norms:
        return
    device = generator.label_embedding.weight.device
    rng = torch.Generator(device).manual_seed(seed)
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a cumulative average instead of an exponential one
    generator.train()
    for first in range(0, 500 * batches, 500):
        labels = torch.arange(first, first + 500, device=device) % generator.config.num_classes
        latents = torch.randn((500, generator.config.latent_dim), generator=rng, device=device)
        generator(latents, labels)
    generator.eval()


# Makes one or more steps, given the progress of the run, and returns the sum of their reports: (5,)
# on the device. `state.images_seen` counts the steps.
StepFn = Callable[[float], Tensor]


def make_eager_step(state: TrainState, dataset: Dataset) -> StepFn:
    """Return a function that makes one step, launched operation by operation."""
    config = state.config

    def step(progress: float) -> Tensor:
        number = state.images_seen // config.batch_size
        penalise = bool(config.r1_gamma) and number % config.penalty_interval == 0
        return train_step(state, dataset, progress=progress, penalise=penalise)

    return step


def train(
    state: TrainState,
    step: StepFn,
    *,
    log_every: int,
    stop: Callable[[], bool],
) -> Iterator[LogPoint]:
    """Train until the run is complete or `stop` returns True.

    Args:
        state: changed in place.
        step: makes the steps of this state.
        log_every: images between two log points.
        stop: called before every step, so it must be cheap. If one process stops, all stop.

    Yields:
        a point every `log_every` images and one at the end. The state may be saved at every point.

    Raises:
        DivergedError: a loss is not finite.
    """
    last = False
    while not last:
        first, began = state.images_seen, time.perf_counter()
        totals = torch.zeros(5, device=state.rng.device)
        due = False
        while not due and (progress := measure_progress(state)) < 1.0:
            if state.world.any(stop()):
                break
            totals += step(progress)
            due = state.images_seen // log_every > first // log_every
        if state.config.ema_half_life == 0:
            update_ema(state)
        losses = _mean_losses(state, totals, first)
        images_per_s = (state.images_seen - first) / (time.perf_counter() - began)
        progress = measure_progress(state)
        finished = progress >= 1.0
        # Before the caller works on the point: a stop during that work gets a point of its own.
        last = finished or state.world.any(stop())
        yield LogPoint(
            losses=losses,
            progress=progress,
            images_per_s=images_per_s,
            finished=finished,
            is_scheduled=due or finished,
        )


def measure_progress(state: TrainState) -> float:
    """Return the completed fraction of the run, in [0, 1], by images or by time."""
    if state.budget_s is None:
        return min(1.0, state.images_seen / state.config.images)
    (elapsed_s,) = state.world.broadcast(state.elapsed_s)  # every process makes the same steps
    return min(1.0, elapsed_s / state.budget_s)


def _mean_losses(state: TrainState, totals: Tensor, first: int) -> Losses | None:
    """Return the mean report of the steps since `first` images, which waits for the device."""
    config = state.config
    begin, end = first // config.batch_size, state.images_seen // config.batch_size
    steps = end - begin
    means: list[float] = state.world.mean(totals / max(1, steps)).tolist()  # the one read-back
    if not all(map(math.isfinite, means)):
        raise DivergedError(f"the losses are not finite after {state.images_seen:,} images")
    # Steps whose number is a multiple of the interval compute the penalty.
    penalties = -(-end // config.penalty_interval) - -(-begin // config.penalty_interval)
    if penalties:
        means[4] *= steps / penalties
    return Losses(*means) if steps else None
