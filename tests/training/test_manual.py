"""Steps without a graph are the steps of the loop."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.support import tiny_training as tiny
from tests.training.test_checkpoint import IDENTITY, differing, everything
from training.checkpoint import read_checkpoint, save_checkpoint
from training.config import PRESETS, TrainingConfig
from training.cuda_graph import make_stepper
from training.distributed import DistributedContext
from training.loop import Stepper, TrainState, create_state, eager_stepper
from training.manual import ManualStepper
from training.networks import MLPGeneratorConfig

pytestmark = pytest.mark.usefixtures("one_thread")

DATA = tiny.dataset()
HALF = replace(tiny.PAPER, precision="bfloat16")
BOTH = pytest.mark.parametrize("config", [tiny.PAPER, HALF], ids=["float32", "bfloat16"])
FULL_SIZE = MLPGeneratorConfig(num_classes=2, channels=1, image_size=8)


def silent(reason: str) -> None:
    raise AssertionError(f"nothing to warn of: {reason}")


def manual(state: TrainState, config: TrainingConfig) -> Stepper:
    stepper = make_stepper(state, DATA, config, silent)
    assert isinstance(stepper, ManualStepper)
    return stepper


def follow(stepper: Stepper, steps: int) -> Tensor:
    """The sum of what the steps report."""
    return torch.stack([stepper(0.25) for _ in range(steps)]).sum(0)


def pair(
    config: TrainingConfig, network: MLPGeneratorConfig = tiny.NETWORK
) -> tuple[TrainState, TrainState]:
    """The same beginning twice."""
    return (
        create_state(config, network, tiny.CPU, 0),
        create_state(config, network, tiny.CPU, 0),
    )


def assert_alike(ours: TrainState, loops: TrainState) -> None:
    """The networks compute the same, and the rest of the state is the same.

    Not weight by weight: a bias before a batch norm cancels, and Adam makes steps of its rounding.
    """
    draw = torch.Generator().manual_seed(7)
    latents, labels = torch.randn((32, 9), generator=draw), torch.arange(32) % 2
    with torch.no_grad():
        for name in ("generator", "ema"):
            found, expected = (getattr(s, name)(latents, labels) for s in (ours, loops))
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
        logits, expected = (s.discriminator(expected, labels) for s in (ours, loops))
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-4)
    assert torch.equal(ours.rng.get_state(), loops.rng.get_state())
    kept = [
        {n: v for n, v in everything(s).items() if "batches" in n or "step" in n or "group" in n}
        for s in (ours, loops)
    ]
    assert kept[0] == kept[1]
    assert ours.images_seen == loops.images_seen


def gradients(state: TrainState) -> dict[str, Tensor]:
    """The first step's: without a decay, they are Adam's first moments."""
    assert tiny.PAPER.beta1 == 0.0
    found = {}
    for part in ("generator", "discriminator"):
        optimizer = getattr(state, f"{part}_optimizer")
        for name, parameter in getattr(state, part).named_parameters():
            found[f"{part}.{name}"] = optimizer.state[parameter]["exp_avg"]
    return found


# The same steps


@pytest.mark.parametrize("network", [tiny.NETWORK, FULL_SIZE], ids=["tiny", "full size"])
def test_a_step_takes_the_gradients_of_the_loop(network: MLPGeneratorConfig) -> None:
    ours, loops = pair(tiny.PAPER, network)
    report = follow(manual(ours, tiny.PAPER), 1)
    expected = follow(eager_stepper(loops, DATA, tiny.PAPER), 1)

    torch.testing.assert_close(report, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradients(ours), gradients(loops), rtol=1e-5, atol=1e-8)
    assert all(gradient.any() for gradient in gradients(ours).values())


@pytest.mark.parametrize("network", [tiny.NETWORK, FULL_SIZE], ids=["tiny", "full size"])
def test_in_bfloat16_they_are_as_close_to_the_true_ones_as_the_loops(
    network: MLPGeneratorConfig,
) -> None:
    exact, ours, loops = (create_state(c, network, tiny.CPU, 0) for c in (tiny.PAPER, HALF, HALF))
    reports = [
        follow(stepper, 1)
        for stepper in (
            eager_stepper(exact, DATA, tiny.PAPER),
            manual(ours, HALF),
            eager_stepper(loops, DATA, HALF),
        )
    ]
    for report in reports[1:]:
        torch.testing.assert_close(report, reports[0], rtol=1e-2, atol=2e-3)
    found, also, true = gradients(ours), gradients(loops), gradients(exact)
    for name, gradient in true.items():
        if gradient.norm() > 1e-6:  # else it cancels in a batch norm
            error, allowed = ((g[name] - gradient).norm() for g in (found, also))
            assert error < 1.5 * allowed + 0.01 * gradient.norm(), name
            if gradient.numel() > 100:  # else what it sums to depends on how a processor rounds
                assert error < 0.2 * gradient.norm(), name
    size = sum(gradient.square().sum() for gradient in true.values()) ** 0.5
    wrong = sum((found[name] - true[name]).square().sum() for name in true) ** 0.5
    assert wrong < 0.2 * size


@pytest.mark.parametrize(
    "options", [{}, {"flip": True}, {"ema_half_life": 100.0}, {"lr_schedule": "cosine"}], ids=str
)
def test_several_steps_leave_the_state_that_the_loop_leaves(options: dict[str, Any]) -> None:
    config = replace(tiny.PAPER, beta1=0.5, **options)
    ours, loops = pair(config)
    report = follow(manual(ours, config), 4)
    expected = follow(eager_stepper(loops, DATA, config), 4)

    torch.testing.assert_close(report, expected, rtol=1e-4, atol=1e-5)
    assert_alike(ours, loops)


@BOTH
def test_weights_and_moments_are_float32_and_the_global_random_state_is_left_alone(
    config: TrainingConfig,
) -> None:
    state, before = tiny.state(config), torch.get_rng_state()
    follow(manual(state, config), 2)
    assert torch.equal(torch.get_rng_state(), before)
    kept = {name: value for name, value in everything(state).items() if isinstance(value, Tensor)}
    whole = {name for name, value in kept.items() if not value.is_floating_point()}
    assert all(name == "rng" or name.endswith("num_batches_tracked") for name in whole)
    assert all(value.dtype == torch.float32 for name, value in kept.items() if name not in whole)


# Which steps


def test_the_paper_is_trained_by_hand_on_a_cpu() -> None:
    config = PRESETS["paper"]
    assert ManualStepper.applies(create_state(config, FULL_SIZE, tiny.CPU, 0), config)


@pytest.mark.parametrize(
    "config",
    [
        tiny.CONFIG,
        tiny.CONV,
        replace(tiny.PAPER, penalty=0.5),
        replace(tiny.PAPER, augment=True),
        replace(tiny.PAPER, objective="relativistic"),
        replace(tiny.PAPER, discriminator="conv", discriminator_hidden=(4, 8)),
    ],
)
def test_all_other_steps_are_the_loops(config: TrainingConfig) -> None:
    state = tiny.state(config)
    assert not isinstance(make_stepper(state, DATA, config, silent), ManualStepper)
    follow(make_stepper(state, DATA, config, silent), 1)


def test_steps_of_several_processes_are_the_loops() -> None:
    state = tiny.state(tiny.PAPER)
    state.world = DistributedContext(0, 2)  # its networks are not shared; no step is made
    assert not isinstance(make_stepper(state, DATA, tiny.PAPER, silent), ManualStepper)


# Going on


@BOTH
def test_a_resumed_run_is_bit_for_bit_the_uninterrupted_one(
    tmp_path: Path, config: TrainingConfig
) -> None:
    whole, stopped, resumed = (tiny.state(config, seed) for seed in (3, 3, 77))
    follow(manual(whole, config), 12)

    follow(manual(stopped, config), 5)
    save_checkpoint(tmp_path / "c.pt", stopped, IDENTITY, None)
    read_checkpoint(tmp_path / "c.pt").restore(resumed)
    follow(manual(resumed, config), 7)

    assert resumed.images_seen == 12 * config.batch_size
    assert differing(resumed, whole) == []


@pytest.mark.parametrize("first", [manual, lambda s, c: eager_stepper(s, DATA, c)])
def test_either_kind_of_steps_goes_on_from_the_other(tmp_path: Path, first: Any) -> None:
    """A checkpoint does not know which it was."""
    config = tiny.PAPER
    begun = tiny.state(config)
    follow(first(begun, config), 3)
    save_checkpoint(tmp_path / "c.pt", begun, IDENTITY, None)

    ours, loops = tiny.state(config, 1), tiny.state(config, 2)
    for state in (ours, loops):
        read_checkpoint(tmp_path / "c.pt").restore(state)
        assert differing(state, begun) == []
    follow(manual(ours, config), 3)
    follow(eager_stepper(loops, DATA, config), 3)
    assert_alike(ours, loops)
    steps = [value for name, value in everything(loops).items() if name.endswith(".step")]
    assert {float(step) for step in steps} == {6.0}


@BOTH
def test_a_stepper_made_anew_goes_on_from_the_weights_that_were_loaded(
    config: TrainingConfig,
) -> None:
    """As after a return to the best."""
    best, state = pair(config)
    with torch.no_grad():
        for network in (best.generator, best.discriminator):
            nn.utils.vector_to_parameters(
                nn.utils.parameters_to_vector(network.parameters()) * 0.5, network.parameters()
            )
    follow(manual(state, config), 3)
    state.load_state_dict(best.state_dict())
    assert torch.equal(follow(manual(state, config), 3), follow(manual(best, config), 3))
