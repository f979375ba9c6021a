"""The adversarial loop: what one step does, what it leaves alone, and that it learns."""

import copy
import itertools
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, softplus
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support import tiny_training as tiny
from training import loop
from training.config import PRESETS, TrainingConfig
from training.data.named import Dataset
from training.generator_config import ConvGeneratorConfig, MLPGeneratorConfig
from training.loop import (
    DivergedError,
    LogPoint,
    _other_labels,
    apply_schedules,
    make_eager_step,
    measure_progress,
    recompute_batch_norm,
    sample_batch,
    train,
    train_step,
    update_ema,
)
from training.networks import ConvDiscriminator, MLPDiscriminator, ResidualBlock, build_generator
from training.state import TrainState, create_state, generator_config

pytestmark = pytest.mark.usefixtures("one_thread")

DATA = tiny.dataset()
EVERY = pytest.mark.parametrize(
    "config", [tiny.CONFIG, tiny.PAPER, tiny.CONV], ids=["mlp", "paper", "conv"]
)


@dataclass
class Watcher:
    """Remembers what both networks were given, call by call."""

    generated: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    judged: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def watch(self, state: TrainState) -> None:
        def remember(calls: list[tuple[Tensor, Tensor]]) -> Any:
            return lambda _module, given: calls.append((given[0].detach().clone(), given[1]))

        state.generator.register_forward_pre_hook(remember(self.generated))
        state.discriminator.register_forward_pre_hook(remember(self.judged))


def gradients(network: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in network.named_parameters()}
    assert all(gradient is not None for gradient in found.values())
    return {name: gradient for name, gradient in found.items() if gradient is not None}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-7, msg=name)


def norms(generator: nn.Module) -> list[nn.BatchNorm1d]:
    return [m for m in generator.modules() if isinstance(m, nn.BatchNorm1d)]


# A fresh state


def test_the_wrong_label_is_any_but_the_own() -> None:
    state = tiny.state(tiny.CONV)
    state.generator.config = replace(tiny.CONV_NETWORK, num_classes=5)
    labels = torch.arange(2 * tiny.CONV.batch_size) % 5
    seen = {
        (own, other)
        for _ in range(50)
        for own, other in zip(labels.tolist(), _other_labels(state, labels).tolist(), strict=True)
    }
    assert seen == {(own, other) for own in range(5) for other in range(5) if own != other}


def test_a_seed_decides_the_initial_networks_and_nothing_else_does() -> None:
    torch.manual_seed(99)
    first, other = tiny.state(seed=1), tiny.state(seed=2)
    torch.rand(3)
    again = tiny.state(seed=1)

    for network in ("generator", "discriminator", "ema"):
        one, two = getattr(first, network).state_dict(), getattr(again, network).state_dict()
        assert all(torch.equal(one[name], two[name]) for name in one)
        different = getattr(other, network).state_dict()
        assert not all(torch.equal(one[name], different[name]) for name in one)
    assert torch.equal(first.rng.get_state(), again.rng.get_state())


def test_the_average_starts_as_the_generator_and_is_not_trained() -> None:
    state = tiny.state()
    for averaged, trained in zip(state.ema.parameters(), state.generator.parameters(), strict=True):
        assert torch.equal(averaged, trained)
        assert averaged.data_ptr() != trained.data_ptr()
        assert not averaged.requires_grad
        assert trained.requires_grad


@pytest.mark.parametrize(
    ("preset", "network", "blocks"),
    [("paper", MLPDiscriminator, 0), ("mlp", ConvDiscriminator, 0), ("conv", ConvDiscriminator, 1)],
)
def test_a_preset_builds_its_discriminator_and_optimisers(
    preset: str, network: type[nn.Module], blocks: int
) -> None:
    config = PRESETS[preset]
    state = create_state(config, generator_config(config, DATA), tiny.CPU, 0)

    assert isinstance(state.discriminator, network)
    assert sum(isinstance(m, ResidualBlock) for m in state.discriminator.modules()) == blocks
    for optimizer, trained in (
        (state.generator_optimizer, state.generator),
        (state.discriminator_optimizer, state.discriminator),
    ):
        (group,) = optimizer.param_groups
        assert (group["lr"], group["betas"]) == (config.lr, (config.beta1, config.beta2))
        assert [id(p) for p in group["params"]] == [id(p) for p in trained.parameters()]


def test_the_generator_has_the_shape_of_the_data() -> None:
    assert generator_config(tiny.CONFIG, DATA) == MLPGeneratorConfig(
        num_classes=2, channels=1, image_size=8
    )
    colour = replace(
        DATA, images=torch.zeros((2, 3, 20, 20), dtype=torch.uint8), class_names=("a", "b", "c")
    )
    assert generator_config(tiny.CONV, colour) == ConvGeneratorConfig(
        num_classes=3, channels=3, image_size=20, widths=(16, 8)
    )


def test_the_residual_discriminator_has_a_level_for_each_of_the_generators() -> None:
    """Its finest map, and the generator's, have half the size of the image."""
    large = replace(tiny.CONV_NETWORK, image_size=28, widths=(16, 8))
    network = create_state(tiny.CONV, large, tiny.CPU, 0).discriminator.main
    assert isinstance(network, nn.Sequential)
    strided = [layer for layer in network if isinstance(layer, nn.Conv2d)]
    assert [(c.in_channels, c.out_channels) for c in strided] == [(1, 8), (8, 16)]


# One step


@EVERY
def test_a_step_runs_the_generator_once_and_the_discriminator_as_often_as_its_objective_needs(
    config: TrainingConfig,
) -> None:
    state, watcher = tiny.state(config), Watcher()
    watcher.watch(state)
    rounds = 3
    tiny.steps(state, rounds)

    assert len(watcher.generated) == rounds
    calls = len(watcher.judged) // rounds
    for step in range(rounds):
        both, *second = watcher.judged[step * calls : (step + 1) * calls]
        own_labels = both[1][:, 0] if config.mismatch_weight else both[1]
        assert both[0].shape == (2 * config.batch_size, 1, 8, 8)
        assert len(second) == (config.objective == "cross-entropy")
        for fakes, fake_labels in second:
            assert torch.equal(both[0][config.batch_size :], fakes)
            assert torch.equal(own_labels[config.batch_size :], fake_labels)


@EVERY
@pytest.mark.parametrize("penalise", [True, False])
def test_a_step_takes_the_gradients_of_the_formulas(config: TrainingConfig, penalise: bool) -> None:
    """Against the same step written out plainly, with whole graphs and a frozen nothing."""
    config = replace(config, r1_gamma=0.5, penalty_interval=3)
    state, watcher = tiny.state(config), Watcher()
    generator, discriminator = copy.deepcopy(state.generator), copy.deepcopy(state.discriminator)
    watcher.watch(state)

    report = train_step(state, DATA, progress=0.0, penalise=penalise)

    (latents, fake_labels), (images, labels) = watcher.generated[0], watcher.judged[0]
    if config.mismatch_weight:
        labels, others = labels.unbind(1)
        assert not (labels == others).any()
    real, real_labels = images[: config.batch_size], labels[: config.batch_size]
    fake = generator(latents, fake_labels)
    inputs = [real.clone().requires_grad_(), fake.detach().clone().requires_grad_()]
    real_logits = discriminator(inputs[0], real_labels)
    fake_logits = discriminator(inputs[1], fake_labels)
    if config.objective == "relativistic":
        d_loss = softplus(fake_logits - real_logits).mean()
    else:
        d_loss = (softplus(-real_logits) + softplus(fake_logits)).mean()
    total = d_loss
    if config.mismatch_weight:
        mismatched = discriminator(real, others[: config.batch_size])
        total = total + config.mismatch_weight * softplus(mismatched - real_logits).mean()
    if penalise:  # gamma / 2 times R1 + R2, and three times that for two steps left out
        slopes = torch.autograd.grad(
            real_logits.sum() + fake_logits.sum(), inputs, create_graph=True
        )
        r1, r2 = (slope.square().sum((1, 2, 3)).mean() for slope in slopes)
        total = total + 0.5 / 2 * (r1 + r2) * 3
        assert report[4].item() == pytest.approx((r1 + r2).item() / 2, rel=1e-4)
    total.backward()
    # Gradients of the generator's phase would have been added to these.
    assert_same(gradients(state.discriminator), gradients(discriminator))

    if config.objective == "relativistic":  # both networks are updated from the same logits
        g_loss = softplus(real_logits.detach() - discriminator(fake, fake_labels)).mean()
    else:  # the generator's phase is against the updated discriminator
        logits = state.discriminator(fake, fake_labels)
        g_loss = binary_cross_entropy_with_logits(logits, torch.ones_like(logits))
    generator.zero_grad()
    expected = torch.autograd.grad(g_loss, list(generator.parameters()))
    names = [name for name, _ in generator.named_parameters()]
    assert_same(gradients(state.generator), dict(zip(names, expected, strict=True)))

    means = [d_loss, g_loss, real_logits.mean(), fake_logits.mean()]
    assert report[:4].tolist() == pytest.approx([m.item() for m in means], rel=1e-4, abs=1e-6)


@EVERY
def test_a_step_moves_both_networks_and_leaves_the_discriminator_trainable(
    config: TrainingConfig,
) -> None:
    state = tiny.state(config)
    if config.generator == "conv":  # a block that starts as the identity wakes up by and by
        tiny.steps(state, 3)
        state.images_seen = 0
    parts = ["generator", "discriminator", *(["ema"] if config.ema_half_life else [])]
    before = {n: copy.deepcopy(getattr(state, n)) for n in parts}

    train_step(state, DATA, progress=0.0, penalise=False)

    for name, old in before.items():
        was = dict(old.named_parameters())
        unmoved = {n for n, p in getattr(state, name).named_parameters() if torch.equal(p, was[n])}
        # What is added to every logit alike cancels in a relativistic pair.
        assert unmoved <= ({"out.bias"} if config.objective == "relativistic" else set()), name
    assert all(p.requires_grad for p in state.discriminator.parameters())
    assert state.images_seen == config.batch_size


def test_fake_labels_are_drawn_from_all_classes_under_cross_entropy() -> None:
    data = replace(DATA, labels=torch.zeros_like(DATA.labels))
    state, watcher = tiny.state(tiny.PAPER), Watcher()
    watcher.watch(state)

    tiny.steps(state, 20, data)

    drawn = torch.cat([labels for _, labels in watcher.generated])
    assert drawn.bincount().tolist() == pytest.approx([160, 160], abs=40)
    batches = [labels for images, labels in watcher.judged if len(images) == 32]
    assert len(batches) == 20
    assert all(labels[:16].eq(0).all() for labels in batches)


def test_fake_labels_are_those_of_the_real_images_under_the_relativistic_objective() -> None:
    state, watcher = tiny.state(), Watcher()
    watcher.watch(state)

    tiny.steps(state, 5)

    batches = [labels for images, labels in watcher.judged if len(images) == 32]
    for labels, (_, fake_labels) in zip(batches, watcher.generated, strict=True):
        assert torch.equal(labels[:16], fake_labels)
        assert torch.equal(labels[16:], fake_labels)
        assert len(labels.unique()) == 2


@EVERY
def test_every_batch_is_whole_and_fresh_however_small_the_data_set(config: TrainingConfig) -> None:
    state, watcher = tiny.state(config), Watcher()
    watcher.watch(state)

    tiny.steps(state, 4, tiny.dataset(5))

    assert [latents.shape for latents, _ in watcher.generated] == [(16, 9)] * 4
    pairs = itertools.combinations([latents for latents, _ in watcher.generated], 2)
    assert not any(torch.equal(a, b) for a, b in pairs)


def test_a_batch_holds_real_images_in_the_value_range_with_their_labels() -> None:
    rng = torch.Generator().manual_seed(0)
    images, labels = sample_batch(DATA, 1000, rng)

    assert (images.shape, images.dtype) == ((1000, 1, 8, 8), torch.float32)
    pixels = ((images + 1) * 127.5).round().byte()
    known = {
        (tuple(i.flatten().tolist()), label)
        for i, label in zip(DATA.images, DATA.labels.tolist(), strict=True)
    }
    drawn = {
        (tuple(i.flatten().tolist()), label)
        for i, label in zip(pixels, labels.tolist(), strict=True)
    }
    assert drawn <= known
    assert len(drawn) > 0.9 * len(known)  # with replacement, 98 % of 256 are expected in 1000


def test_black_is_minus_one_and_white_is_one() -> None:
    extremes = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 1, 8, 8)
    data = replace(DATA, images=extremes, labels=torch.tensor([0, 1]))
    images, labels = sample_batch(data, 16, torch.Generator().manual_seed(0))
    assert torch.equal(images[:, 0, 0, 0], labels * 2.0 - 1.0)


@EVERY
def test_the_state_alone_decides_what_is_drawn(config: TrainingConfig) -> None:
    outcomes = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        state = tiny.state(config)
        tiny.steps(state, 3)
        outcomes.append(state)
    for one, two in zip(
        outcomes[0].generator.parameters(), outcomes[1].generator.parameters(), strict=True
    ):
        assert torch.equal(one, two)


@EVERY
def test_the_global_random_state_is_left_as_it_was(config: TrainingConfig) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    state = tiny.state(config)
    tiny.steps(state, 2)
    recompute_batch_norm(state.ema, batches=1)
    assert torch.equal(torch.get_rng_state(), before)


class ForbidReadBack(TorchDispatchMode):
    """Fails where a tensor's value is asked for, which makes a GPU's host wait."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default, "read back to the host"
        assert func is not torch.ops.aten.nonzero.default, "read back to the host"
        return func(*args, **(kwargs or {}))


def test_the_watch_for_read_backs_sees_one() -> None:
    with ForbidReadBack(), pytest.raises(AssertionError, match="read back"):
        bool(torch.ones(()) > 0)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@EVERY
def test_nothing_is_read_back_during_a_step(config: TrainingConfig, precision: Any) -> None:
    config = replace(config, precision=precision)
    state = tiny.state(config)
    with ForbidReadBack():
        report = train_step(state, DATA, progress=0.3, penalise=bool(config.r1_gamma))
    assert report.isfinite().all()


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_makes_finite_steps_in_its_own_precision(preset: str) -> None:
    widths = PRESETS[preset].discriminator_widths
    config = replace(
        PRESETS[preset], batch_size=8, r1_gamma=1.0, discriminator_widths=(8,) * len(widths)
    )
    network = tiny.CONV_NETWORK if config.generator == "conv" else tiny.NETWORK
    state = create_state(config, network, tiny.CPU, 0)
    report = tiny.steps(state, config.penalty_interval + 1)
    assert report.isfinite().all()
    weights = [p for n in (state.generator, state.discriminator) for p in n.parameters()]
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in weights)


# Learning rate


@pytest.mark.parametrize(
    ("progress", "factor"), [(0.0, 1.0), (0.25, 0.5 + 0.5**1.5), (0.5, 0.5), (1.0, 0.0)]
)
def test_the_cosine_schedule_falls_to_nothing(progress: float, factor: float) -> None:
    state = tiny.state()
    train_step(state, DATA, progress=progress, penalise=False)
    for optimizer in (state.generator_optimizer, state.discriminator_optimizer):
        lr = optimizer.param_groups[0]["lr"]
        assert lr == pytest.approx(tiny.CONFIG.lr * factor, abs=1e-12)


def test_the_learning_rate_rises_over_the_first_images() -> None:
    config = replace(tiny.CONFIG, lr_warmup=4 * tiny.CONFIG.batch_size)
    state, rates = tiny.state(config), []
    for _ in range(6):
        apply_schedules(state, progress=0.0, steps=1)
        rates += [group["lr"] / config.lr for group in state.generator_optimizer.param_groups]
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 1.0])


def test_the_constant_schedule_stays() -> None:
    state = tiny.state(tiny.PAPER)
    train_step(state, DATA, progress=0.99, penalise=False)
    assert state.generator_optimizer.param_groups[0]["lr"] == tiny.PAPER.lr


def test_the_last_steps_of_a_run_have_almost_no_learning_rate() -> None:
    state = tiny.state()
    for _ in follow(state, tiny.CONFIG, log_every=10_000, stop=lambda: False):
        pass
    assert 0 < state.generator_optimizer.param_groups[0]["lr"] < 0.01 * tiny.CONFIG.lr


# The average


def averaged(config: TrainingConfig, images_seen: int) -> float:
    """The weight that one update gave the generator, from the change of its parameters."""
    state = tiny.state(config)
    with torch.no_grad():
        for average, parameter in zip(
            state.ema.parameters(), state.generator.parameters(), strict=True
        ):
            average.fill_(1.0)
            parameter.fill_(3.0)
    state.images_seen = images_seen - config.batch_size
    apply_schedules(state, progress=0.0, steps=1)
    assert state.images_seen == images_seen
    update_ema(state)
    moved = {value for p in state.ema.parameters() for value in p.unique().tolist()}
    assert len(moved) == 1
    return (float(moved.pop()) - 1.0) / 2.0


def test_after_a_half_life_of_images_half_of_the_old_average_is_left() -> None:
    config = replace(tiny.CONFIG, ema_half_life=160.0)
    expected = 1 - 0.5 ** (config.batch_size / 160)
    assert averaged(config, 1_000_000) == pytest.approx(expected, rel=1e-5)
    assert (1 - expected) ** 10 == pytest.approx(0.5)  # ten batches of 16 are a half-life


def test_the_half_life_grows_with_the_images_seen_until_it_is_reached() -> None:
    config = replace(tiny.CONFIG, ema_half_life=1000.0, ema_ramp=0.05)
    for images_seen, half_life in [(2000, 100.0), (10_000, 500.0), (20_000, 1000.0), (10**6, 1e3)]:
        expected = 1 - 0.5 ** (config.batch_size / half_life)
        assert averaged(config, images_seen) == pytest.approx(expected, rel=1e-4)


def test_without_a_half_life_the_average_is_the_generator_of_the_last_log_point() -> None:
    """Nobody sees it in between, so that a step need not copy it."""
    state, points = tiny.state(tiny.PAPER), 0
    for _ in follow(state, tiny.PAPER, log_every=160, stop=lambda: False):
        points += 1
        for average, parameter in zip(
            state.ema.parameters(), state.generator.parameters(), strict=True
        ):
            assert torch.equal(average, parameter)
            assert average.data_ptr() != parameter.data_ptr()
    assert points == 640 / 160


def test_the_average_counts_the_step_that_it_follows() -> None:
    """The first step, too, has a half-life: of 5 % of its own images."""
    state, fresh = tiny.state(), tiny.state()
    tiny.steps(state, 1)
    weight = 1 - 0.5 ** (1 / 0.05)
    for average, start, parameter in zip(
        state.ema.parameters(), fresh.ema.parameters(), state.generator.parameters(), strict=True
    ):
        expected = start + weight * (parameter - start)
        torch.testing.assert_close(average, expected.detach())


# Batch-norm statistics


def moments(generator: nn.Module, latents: Tensor, labels: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Mean and unbiased variance at each norm for one batch, layer by layer in float64."""
    x = torch.cat([latents, generator.label_embedding.weight[labels]], dim=1).double()  # type: ignore[index, union-attr]
    found = []
    for layer in generator.main.double():  # type: ignore[union-attr]
        if isinstance(layer, nn.BatchNorm1d):
            mean, var = x.mean(0), x.var(0)
            found.append((mean, var))
            x = (x - mean) / (x.var(0, unbiased=False) + layer.eps).sqrt()
            x = x * layer.weight + layer.bias
        else:
            x = layer(x)
    return found


def test_recomputed_statistics_are_the_mean_over_batches_of_what_the_weights_give() -> None:
    state = tiny.state()
    tiny.steps(state, 5)
    batches: list[tuple[Tensor, Tensor]] = []
    hook = state.ema.register_forward_pre_hook(lambda _module, given: batches.append(given))
    recompute_batch_norm(state.ema, batches=4)
    hook.remove()

    assert [latents.shape for latents, _ in batches] == [(500, 9)] * 4
    with torch.no_grad():
        measured = [moments(copy.deepcopy(state.ema), *batch) for batch in batches]
    for depth, norm in enumerate(norms(state.ema)):
        means = torch.stack([batch[depth][0] for batch in measured]).mean(0)
        variances = torch.stack([batch[depth][1] for batch in measured]).mean(0)
        assert norm.running_mean is not None
        assert norm.running_var is not None
        torch.testing.assert_close(norm.running_mean.double(), means, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(norm.running_var.double(), variances, rtol=1e-4, atol=1e-6)


def test_recomputing_forgets_what_was_there_and_gives_the_same_every_time() -> None:
    generator = tiny.state().ema
    recompute_batch_norm(generator, batches=2)
    first = {name: value.clone() for name, value in generator.state_dict().items()}
    for norm in norms(generator):
        assert norm.running_mean is not None
        norm.running_mean.fill_(1e9)

    recompute_batch_norm(generator, batches=2)

    assert all(torch.equal(first[name], v) for name, v in generator.state_dict().items())


def test_recomputing_leaves_evaluation_mode_and_the_weights() -> None:
    generator = tiny.state().generator
    weights = [p.detach().clone() for p in generator.parameters()]

    recompute_batch_norm(generator, batches=1)

    assert not any(module.training for module in generator.modules())
    assert all(torch.equal(a, b) for a, b in zip(weights, generator.parameters(), strict=True))


def test_a_generator_without_norms_is_left_in_evaluation_mode_too() -> None:
    generator = build_generator(replace(tiny.NETWORK, hidden=(8,)))
    recompute_batch_norm(generator, batches=1)
    assert not generator.training


@pytest.mark.parametrize(("classes", "batches"), [(2, 1), (3, 3), (10, 1), (600, 6)])
def test_every_class_has_the_same_share_in_the_statistics(classes: int, batches: int) -> None:
    generator = build_generator(replace(tiny.NETWORK, num_classes=classes))
    labels: list[Tensor] = []
    generator.register_forward_pre_hook(lambda _module, given: labels.append(given[1]))

    recompute_batch_norm(generator, batches=batches)

    counts = torch.cat(labels).bincount(minlength=classes)
    assert counts.tolist() == [500 * batches // classes] * classes


# The run


def follow(state: TrainState, config: TrainingConfig, **options: Any) -> Iterator[LogPoint]:
    state.config = config
    return train(state, make_eager_step(state, DATA), **options)


def run_to_end(state: TrainState, config: TrainingConfig, **options: Any) -> list[LogPoint]:
    return list(follow(state, config, stop=lambda: False, **options))


def test_a_run_reports_at_the_asked_for_images_and_finishes_exactly_at_its_budget() -> None:
    state, seen = tiny.state(), []
    points = []
    for point in follow(state, tiny.CONFIG, log_every=160, stop=lambda: False):
        seen.append(state.images_seen)
        points.append(point)

    assert seen == [160, 320, 480, 640]
    assert [p.progress for p in points] == [0.25, 0.5, 0.75, 1.0]
    assert [p.finished for p in points] == [False, False, False, True]
    assert all(p.is_scheduled for p in points)
    assert all(p.images_per_s > 0 for p in points)


def test_points_stay_on_their_grid_where_the_batch_does_not_divide_them() -> None:
    state, seen = tiny.state(), []
    for _ in follow(state, tiny.CONFIG, log_every=100, stop=lambda: False):
        seen.append(state.images_seen)
    assert seen == [112, 208, 304, 400, 512, 608, 640]


def test_a_budget_that_the_batch_does_not_divide_is_met_by_the_next_whole_batch() -> None:
    state = tiny.state()
    (point,) = run_to_end(state, replace(tiny.CONFIG, images=33), log_every=1000)
    assert (state.images_seen, point.progress, point.finished) == (48, 1.0, True)


def test_a_point_holds_the_means_since_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    reports: list[Tensor] = []

    def remember(*given: Any, **options: Any) -> Tensor:
        reports.append(train_step(*given, **options))
        return reports[-1]

    monkeypatch.setattr(loop, "train_step", remember)
    points = run_to_end(tiny.state(), replace(tiny.CONFIG, images=160), log_every=80)

    assert len(reports) == 10
    for point, part in zip(points, (reports[:5], reports[5:]), strict=True):
        means = torch.stack(part).mean(0).tolist()
        penalties = [report[4].item() for report in part if report[4] > 0]
        assert 0 < len(penalties) < 5
        losses = point.losses
        assert losses is not None
        assert [
            *(losses.discriminator, losses.generator, losses.real_logit, losses.fake_logit)
        ] == pytest.approx(means[:4], rel=1e-5)
        # Not a mean over steps that computed none.
        assert losses.penalty == pytest.approx(sum(penalties) / len(penalties), rel=1e-5)


def test_the_penalty_is_computed_every_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[bool] = []

    def remember(*given: Any, penalise: bool, **options: Any) -> Tensor:
        chosen.append(penalise)
        return train_step(*given, penalise=penalise, **options)

    monkeypatch.setattr(loop, "train_step", remember)
    config = replace(tiny.CONFIG, penalty_interval=3, images=112)
    run_to_end(tiny.state(), config, log_every=32)
    assert chosen == [True, False, False, True, False, False, True]

    chosen.clear()
    run_to_end(tiny.state(), replace(config, r1_gamma=0.0), log_every=32)
    assert chosen == [False] * 7


def stop_after(calls: int) -> Iterable[bool]:
    return itertools.chain([False] * calls, itertools.repeat(True))


def test_a_run_stops_before_the_next_step_when_asked_to() -> None:
    state, answers = tiny.state(), iter(stop_after(3))
    points = list(follow(state, tiny.CONFIG, log_every=10_000, stop=lambda: next(iter(answers))))
    (point,) = points
    assert state.images_seen == 3 * tiny.CONFIG.batch_size
    assert not point.finished
    assert not point.is_scheduled
    assert point.progress == state.images_seen / tiny.CONFIG.images
    assert point.losses is not None


def test_a_run_stopped_before_its_first_step_says_so_and_reports_no_losses() -> None:
    state = tiny.state()
    (point,) = follow(state, tiny.CONFIG, log_every=160, stop=lambda: True)
    assert (state.images_seen, point.losses, point.finished) == (0, None, False)


def test_a_stop_during_the_work_on_a_point_gets_a_point_of_its_own() -> None:
    """Otherwise the state could not be saved at the last point."""
    state, asked = tiny.state(), False
    points = follow(state, tiny.CONFIG, log_every=160, stop=lambda: asked)
    next(points)
    asked = True
    assert next(points).losses is None
    assert list(points) == []
    assert state.images_seen == 160


def test_a_finished_run_makes_no_further_step() -> None:
    state = tiny.state()
    run_to_end(state, tiny.CONFIG, log_every=10_000)
    weights = [p.detach().clone() for p in state.generator.parameters()]

    (point,) = run_to_end(state, tiny.CONFIG, log_every=10_000)

    assert (point.losses, point.finished, state.images_seen) == (None, True, tiny.CONFIG.images)
    pairs = zip(weights, state.generator.parameters(), strict=True)
    assert all(torch.equal(before, after) for before, after in pairs)


@dataclass
class Clock:
    """In the place of `time.perf_counter`; moves on by `step_s` whenever it is asked."""

    now_s: float = 100.0
    step_s: float = 0.0

    def __call__(self) -> float:
        self.now_s += self.step_s
        return self.now_s


def test_a_budget_in_time_counts_all_of_it_and_not_the_images(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock)
    state = tiny.state()
    state.started_at = clock.now_s
    clock.now_s += 45.0
    state.images_seen = 10**9
    assert state.elapsed_s == 45.0
    for budget_s, progress in ((180.0, 0.25), (30.0, 1.0), (None, 1.0)):
        state.budget_s = budget_s
        assert measure_progress(state) == progress


def test_a_budget_in_time_drives_the_schedule_and_ends_the_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    used: list[float] = []

    def remember(*given: Any, **options: Any) -> Tensor:
        used.append(options["progress"])
        return train_step(*given, **options)

    monkeypatch.setattr(loop, "train_step", remember)
    state = tiny.state()
    state.started_at = -20.0  # before a resumption
    clock = Clock(now_s=-2.0, step_s=1.0)
    monkeypatch.setattr(time, "perf_counter", clock)
    state.budget_s = 30.0
    points = run_to_end(state, replace(tiny.CONFIG, images=1), log_every=10_000)

    # The clock is asked once as the stretch begins, and then before every step.
    assert used == pytest.approx([(20 + second) / 30 for second in range(10)])
    assert state.images_seen == 10 * tiny.CONFIG.batch_size
    assert points[-1].finished
    assert points[-1].progress == 1.0
    expected = tiny.CONFIG.lr * 0.5 * (1 + math.cos(math.pi * 29 / 30))
    assert state.generator_optimizer.param_groups[0]["lr"] == pytest.approx(expected)


def test_a_rate_that_was_scaled_down_stays_so_on_every_schedule() -> None:
    for config in (tiny.CONFIG, tiny.PAPER):
        whole, half = tiny.state(config), tiny.state(config)
        half.lr_scale = 0.5
        for progress in (0.0, 0.3, 0.9):
            rates = []
            for state in (whole, half):
                apply_schedules(state, progress=progress, steps=1)
                for optimizer in (state.generator_optimizer, state.discriminator_optimizer):
                    rates.append(optimizer.param_groups[0]["lr"])
            assert rates[2:] == pytest.approx([rates[0] / 2] * 2, rel=1e-12)
            assert rates[0] == rates[1] > 0


def test_several_steps_at_once_count_all_of_their_images() -> None:
    """A replayed graph makes many steps; the average is weighted as at the last of them."""
    together, apart = tiny.state(), tiny.state()
    apply_schedules(together, progress=0.5, steps=8)
    for _ in range(8):
        apply_schedules(apart, progress=0.5, steps=1)
    assert together.images_seen == apart.images_seen == 8 * tiny.CONFIG.batch_size
    assert together.ema_weight == apart.ema_weight


# Learning


@pytest.mark.parametrize(
    "config",
    [
        replace(tiny.PAPER, batch_size=32, images=32 * 600, beta1=0.5, beta2=0.999),
        replace(tiny.CONFIG, batch_size=32, images=32 * 400, ema_half_life=1000.0),
        replace(
            tiny.CONFIG,
            discriminator="conv",
            discriminator_widths=(8, 16, 32),
            batch_size=32,
            images=32 * 300,
            ema_half_life=1000.0,
        ),
        replace(tiny.CONV, lr=3e-3, batch_size=32, images=32 * 250, ema_half_life=1000.0),
        replace(
            tiny.CONV,
            lr=3e-3,
            batch_size=32,
            images=32 * 250,
            ema_half_life=1000.0,
            augment=True,
        ),
    ],
    ids=["paper", "relativistic", "convolutional", "residual", "augmented"],
)
def test_a_short_run_learns_which_label_looks_how(config: TrainingConfig) -> None:
    state = tiny.state(config)
    run_to_end(state, config, log_every=10**6)
    recompute_batch_norm(state.ema, batches=10)

    labels = torch.arange(200) % 2
    latents = torch.randn((200, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        images = state.ema(latents, labels)
    left, right = images[..., :4].mean((1, 2, 3)), images[..., 4:].mean((1, 2, 3))
    real = DATA.images.float() / 127.5 - 1
    contrast = (real[..., :4].mean((1, 2, 3)) - real[..., 4:].mean((1, 2, 3))).abs().mean()
    own = torch.where(labels == 0, left - right, right - left)  # how much brighter its own half is

    assert (own > 0).float().mean() > 0.95
    assert own.mean() > 0.5 * contrast


def test_a_run_whose_losses_are_no_longer_numbers_ends_with_that_said() -> None:
    state = tiny.state()
    with torch.no_grad():
        state.generator.label_embedding.weight.fill_(float("nan"))
    points = follow(state, tiny.CONFIG, log_every=32, stop=lambda: False)
    with pytest.raises(DivergedError, match="not finite after 32 images"):
        next(points)


@pytest.mark.parametrize("config", [tiny.CONFIG, tiny.CONV], ids=["mlp", "conv"])
def test_the_discriminator_tells_the_label_of_real_images_that_it_has_not_seen(
    config: TrainingConfig,
) -> None:
    config = replace(config, batch_size=32, images=32 * 250)
    state, held_out = tiny.state(config), tiny.dataset(200, seed=9)
    run_to_end(state, config, log_every=10**6)

    images = held_out.images.float() / 127.5 - 1
    with torch.no_grad():
        own = state.discriminator(images, held_out.labels)
        other = state.discriminator(images, 1 - held_out.labels)
    assert (own > other).float().mean() > 0.95


# Mirrored and distorted images


def seen_by_the_discriminator(
    config: TrainingConfig, data: Dataset = DATA, count: int = 1
) -> list[Tensor]:
    """The images of every forward of it in a few steps from the same start."""
    state, watcher = tiny.state(config), Watcher()
    watcher.watch(state)
    tiny.steps(state, count, data)
    return [images for images, _ in watcher.judged]


def test_flip_shows_about_half_of_the_real_images_mirrored_and_no_other_change() -> None:
    """The only picture is bright on its left, so that a mirrored one is known by its right."""
    picture = torch.full((1, 1, 8, 8), 10, dtype=torch.uint8)
    picture[..., :4] = 250
    data = replace(DATA, images=picture, labels=torch.zeros(1, dtype=torch.int64))
    config = replace(tiny.CONFIG, flip=True, batch_size=200)
    batches = [images[:200] for images in seen_by_the_discriminator(config, data, 3)]

    assert len(batches) == 3
    real = (picture.float() / 127.5 - 1)[0]
    shares = []
    for batch in batches:
        plain = (batch == real).flatten(1).all(1)
        mirrored = (batch == real.flip(2)).flatten(1).all(1)
        assert (plain ^ mirrored).all()
        shares.append(mirrored.float().mean().item())
    assert shares == pytest.approx([0.5] * 3, abs=0.15)
    assert not torch.equal(*batches[:2])


def test_without_flip_no_real_image_is_mirrored() -> None:
    known = {tuple(image.flatten().tolist()) for image in DATA.images}
    (batch, *_) = seen_by_the_discriminator(tiny.CONFIG)
    shown = ((batch[:16] + 1) * 127.5).round().byte()
    assert {tuple(image.flatten().tolist()) for image in shown} <= known


@EVERY
def test_augment_distorts_real_and_fake_images_before_every_forward_of_the_discriminator(
    monkeypatch: pytest.MonkeyPatch, config: TrainingConfig
) -> None:
    """Otherwise the generator would learn the distortion."""
    distorted: list[Tensor] = []

    def invert(images: Tensor, rng: torch.Generator) -> Tensor:
        distorted.append(-images.detach())
        return -images

    plain = seen_by_the_discriminator(config)
    monkeypatch.setattr(loop, "diff_augment", invert)
    shown = seen_by_the_discriminator(replace(config, augment=True))

    assert len(shown) == len(plain) == len(distorted)
    torch.testing.assert_close(shown[0], -plain[0])  # both halves
    for images in shown[1:]:  # a second phase draws distortions of its own, for the same images
        assert torch.equal(images, shown[0][config.batch_size :])


@pytest.mark.parametrize("penalise", [True, False])
@EVERY
def test_the_gradient_of_the_generator_goes_through_the_distortion(
    monkeypatch: pytest.MonkeyPatch, config: TrainingConfig, penalise: bool
) -> None:
    monkeypatch.setattr(loop, "diff_augment", lambda images, rng: images * 0.0)
    state = tiny.state(replace(config, augment=True, r1_gamma=0.5))
    train_step(state, DATA, progress=0.0, penalise=penalise)
    assert all(not gradient.any() for gradient in gradients(state.generator).values())


@pytest.mark.parametrize("option", ["flip", "augment"])
@pytest.mark.parametrize("base", [tiny.CONFIG, tiny.CONV], ids=["mlp", "conv"])
def test_what_is_shown_differs_with_the_option_and_not_between_runs_of_one_seed(
    base: TrainingConfig, option: str
) -> None:
    config = replace(base, **{option: True})  # type: ignore[arg-type]
    plain, first, again = (seen_by_the_discriminator(c, count=2) for c in (base, config, config))
    assert all(torch.equal(one, two) for one, two in zip(first, again, strict=True))
    assert not torch.equal(plain[0][:16], first[0][:16])


# Another device


@pytest.mark.gpu
@EVERY
def test_the_gpu_computes_the_same_step_as_the_cpu(config: TrainingConfig) -> None:
    """Its random draws are others, so both are given the CPU's."""
    config = replace(config, r1_gamma=0.5, penalty_interval=1)
    draw, reports = torch.Generator().manual_seed(5), {}
    indices = torch.randint(len(DATA.labels), (config.batch_size,), generator=draw)
    latents = torch.randn((config.batch_size, 9), generator=draw)
    classes = torch.randint(2, (config.batch_size,), generator=draw)
    after = {}
    for name in ("cpu", "cuda"):
        device = torch.device(name)
        network = tiny.CONV_NETWORK if config.generator == "conv" else tiny.NETWORK
        state = create_state(config, network, device, 0)
        with pytest.MonkeyPatch.context() as patch:
            draws = iter([indices.to(device), classes.to(device)])
            patch.setattr(torch, "randint", lambda *_, draws=draws, **__: next(draws))
            patch.setattr(torch, "randn", lambda *_, device=device, **__: latents.to(device))
            report = train_step(state, DATA.to(device), progress=0.2, penalise=True)
        reports[name] = report.cpu()
        after[name] = {n: g.cpu() for n, g in gradients(state.generator).items()}
    torch.testing.assert_close(reports["cuda"], reports["cpu"], rtol=1e-3, atol=1e-5)
    for name, gradient in after["cpu"].items():
        torch.testing.assert_close(after["cuda"][name], gradient, rtol=1e-2, atol=1e-4, msg=name)
