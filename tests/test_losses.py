"""Losses against the formulas of their papers, and the penalty against finite differences."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from training.losses import Objective, discriminator_loss, generator_loss, gradient_penalty

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
    return gradient_penalty(images, smooth(images, weight))


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
    found = gradient_penalty(images, images.flatten(1) @ weight)
    assert found.tolist() == pytest.approx([1 + 4 + 9 + 0.25] * 3)
