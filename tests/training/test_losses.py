"""Losses against the formulas of their papers, and the penalty against finite differences."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from training.losses import (
    Objective,
    discriminator_loss,
    generator_loss,
    gradient_penalty,
    image_gradients,
    mismatch_loss,
)
from training.networks import ConvDiscriminator, MLPDiscriminator

OBJECTIVES: list[Objective] = ["cross-entropy", "relativistic"]
REAL = [2.5, -1.0, 0.0, 0.3]
FAKE = [-0.5, 4.0, 0.0, -3.0]


def log_sigmoid(x: float) -> float:
    return -math.log(1 + math.exp(-x))


@pytest.mark.parametrize(
    ("loss", "formula"),
    [
        # Goodfellow et al., eq. 1: maximise log D(x) + log(1 - D(G(z))).
        (discriminator_loss, lambda r, f: -log_sigmoid(r) - math.log(1 - 1 / (1 + math.exp(-f)))),
        # Its non-saturating twin: maximise log D(G(z)).
        (generator_loss, lambda r, f: -log_sigmoid(f)),
    ],
)
def test_cross_entropy_is_the_papers_formula(
    loss: Callable[[Objective, Tensor, Tensor], Tensor], formula: Callable[[float, float], float]
) -> None:
    expected = [formula(r, f) for r, f in zip(REAL, FAKE, strict=True)]
    found = loss("cross-entropy", torch.tensor(REAL), torch.tensor(FAKE))
    assert found.tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("loss", "formula"),
    [
        # R3GAN, eq. 2, with f(t) = -log(1 + exp(-t)) of the difference of a pair.
        (discriminator_loss, lambda r, f: -log_sigmoid(r - f)),
        (generator_loss, lambda r, f: -log_sigmoid(f - r)),
    ],
)
def test_the_relativistic_objective_is_the_papers_formula(
    loss: Callable[[Objective, Tensor, Tensor], Tensor], formula: Callable[[float, float], float]
) -> None:
    expected = [formula(r, f) for r, f in zip(REAL, FAKE, strict=True)]
    found = loss("relativistic", torch.tensor(REAL), torch.tensor(FAKE))
    assert found.tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("loss", [discriminator_loss, generator_loss])
def test_no_loss_overflows_however_sure_the_discriminator_is(
    loss: Callable[[Objective, Tensor, Tensor], Tensor], objective: Objective
) -> None:
    sure = torch.tensor([1000.0, -1000.0])
    found = loss(objective, sure, -sure)
    assert found.isfinite().all()
    assert found.max() >= 1000


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_two_players_pull_a_fake_logit_in_opposite_directions(objective: Objective) -> None:
    slopes = []
    for loss in (discriminator_loss, generator_loss):
        fake = torch.tensor(FAKE, requires_grad=True)
        (slope,) = torch.autograd.grad(loss(objective, torch.tensor(REAL), fake).sum(), fake)
        slopes.append(slope)
    assert (slopes[0] > 0).all()
    assert (slopes[1] < 0).all()


# The gradient penalty, on a smooth discriminator, in float64

GENERATOR = torch.Generator().manual_seed(0)
WEIGHT = torch.randn((12, 5), generator=GENERATOR, dtype=torch.float64)
IMAGES = torch.randn((4, 3, 2, 2), generator=GENERATOR, dtype=torch.float64)


def smooth(images: Tensor, weight: Tensor) -> Tensor:
    return (images.flatten(1) @ weight).tanh().square().sum(1)


def numeric_penalty(image: Tensor, weight: Tensor, h: float = 1e-5) -> float:
    total = 0.0
    for position in range(image.numel()):
        nudge = torch.zeros(image.numel(), dtype=torch.float64)
        nudge[position] = h
        nudge = nudge.view_as(image)
        above, below = (smooth((image + s * nudge)[None], weight).item() for s in (1, -1))
        total += ((above - below) / (2 * h)) ** 2
    return total


def penalty(weight: Tensor) -> Tensor:
    images = IMAGES.clone().requires_grad_()
    return gradient_penalty(image_gradients(images, smooth(images, weight)))


def test_the_penalty_is_the_squared_gradient_norm_of_each_image() -> None:
    expected = [numeric_penalty(image, WEIGHT) for image in IMAGES]
    assert penalty(WEIGHT).tolist() == pytest.approx(expected, rel=1e-6)


def test_the_penalty_can_be_differentiated_again() -> None:
    weight = WEIGHT.clone().requires_grad_()
    (slope,) = torch.autograd.grad(penalty(weight).sum(), weight)

    h = 1e-6
    for row, column in [(0, 0), (5, 2), (11, 4)]:
        nudge = torch.zeros_like(WEIGHT)
        nudge[row, column] = h
        difference = penalty(WEIGHT + nudge).sum() - penalty(WEIGHT - nudge).sum()
        assert slope[row, column].item() == pytest.approx(difference.item() / (2 * h), rel=1e-5)


def test_the_penalty_of_a_linear_discriminator_is_its_squared_weight() -> None:
    images = torch.randn(3, 1, 2, 2).requires_grad_()
    weight = torch.tensor([1.0, 2.0, -3.0, 0.5])
    found = gradient_penalty(image_gradients(images, images.flatten(1) @ weight))
    assert found.tolist() == pytest.approx([1 + 4 + 9 + 0.25] * 3)


# The gradient penalty of the discriminators themselves


def mlp(channels: int, size: int) -> nn.Module:
    return MLPDiscriminator(num_classes=3, channels=channels, image_size=size, hidden=(8, 6))


def conv(channels: int, size: int) -> nn.Module:
    return ConvDiscriminator(num_classes=3, channels=channels, image_size=size, widths=(4, 6))


def residual(channels: int, size: int) -> nn.Module:
    return ConvDiscriminator(
        num_classes=3, channels=channels, image_size=size, widths=(4, 6), residual=True
    )


EVERY = pytest.mark.parametrize("build", [mlp, conv, residual])


def seeded(
    build: Callable[[int, int], nn.Module], seed: int, channels: int, size: int
) -> tuple[nn.Module, Tensor, Tensor]:
    """A discriminator in float64 whose every parameter matters, images, and their labels."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = build(channels, size).double()
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
        images = torch.rand((2, channels, size, size), dtype=torch.float64) * 2 - 1
        labels = torch.randint(3, (2,))
    return network, images, labels


def in_float64(network: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Its logits without their cast to float32, which is too coarse to take differences of."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "float", Tensor.double)
        logits: Tensor = network(images, labels)
    return logits


@EVERY
@settings(deadline=None, max_examples=12, derandomize=True)
@given(seed=st.integers(0, 2**20), channels=st.sampled_from([1, 3]), size=st.integers(4, 6))
def test_the_penalty_of_every_discriminator_is_what_finite_differences_say(
    build: Callable[[int, int], nn.Module], seed: int, channels: int, size: int
) -> None:
    network, images, labels = seeded(build, seed, channels, size)
    inputs = images.clone().requires_grad_()
    found = gradient_penalty(image_gradients(inputs, network(inputs, labels)))

    h, pixels = 1e-7, images[0].numel()  # so small that no kink of an activation lies between
    nudges = h * torch.eye(pixels, dtype=torch.float64).view(pixels, *images[0].shape)
    for image, label, penalty_of_it in zip(images, labels, found, strict=True):
        repeated = label.repeat(pixels)
        with torch.no_grad():
            above, below = (in_float64(network, image + s * nudges, repeated) for s in (1, -1))
        expected = ((above - below) / (2 * h)).square().sum()
        assert penalty_of_it.item() == pytest.approx(expected.item(), rel=1e-4)
        assert expected > 0


@EVERY
@settings(deadline=None, max_examples=6, derandomize=True)
@given(seed=st.integers(0, 2**20))
def test_the_penaltys_own_gradient_is_what_finite_differences_say(
    build: Callable[[int, int], nn.Module], seed: int
) -> None:
    """In one direction through all weights; this is what training follows."""
    network, images, labels = seeded(build, seed, 1, 4)
    weights = [parameter for name, parameter in network.named_parameters() if "weight" in name]

    def total() -> Tensor:
        inputs = images.clone().requires_grad_()
        logits = in_float64(network, inputs, labels)
        return gradient_penalty(image_gradients(inputs, logits)).sum()

    slopes = torch.autograd.grad(total(), weights)
    draw = torch.Generator().manual_seed(seed)
    directions = [
        torch.randn(weight.shape, generator=draw, dtype=torch.float64) for weight in weights
    ]
    slope = sum((s * d).sum() for s, d in zip(slopes, directions, strict=True))

    h, totals = 1e-6, []
    for sign in (1, -2):
        with torch.no_grad():
            for weight, direction in zip(weights, directions, strict=True):
                weight.add_(sign * h * direction)
        totals.append(total().item())
    difference = (totals[0] - totals[1]) / (2 * h)
    assert float(slope) == pytest.approx(difference, rel=1e-4, abs=1e-6)
    assert difference != 0


def test_a_wrong_label_is_to_score_below_the_right_one() -> None:
    right, wrong = torch.tensor([2.0, 0.0, -3.0]), torch.tensor([-1.0, 0.0, 1.0])
    losses = mismatch_loss(right, wrong)
    assert torch.allclose(losses, torch.log1p(torch.exp(wrong - right)))
    assert losses[0] < losses[1] < losses[2]
