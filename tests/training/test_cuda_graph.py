"""Captured steps are the eager ones, and what cannot be captured is launched as ever."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support import tiny_training as tiny
from training import cuda_graph as capture
from training import loop
from training.config import TrainingConfig
from training.cuda_graph import CUDAGraphStep, make_stepper
from training.data.named import Dataset
from training.distributed import DistributedContext
from training.loop import Stepper, TrainState, create_state, eager_stepper, train

pytestmark = pytest.mark.usefixtures("one_thread")

DATA = tiny.dataset()
BOTH = pytest.mark.parametrize("config", [tiny.CONFIG, tiny.CONV], ids=["mlp", "conv"])
gpu = pytest.mark.gpu


def silent(reason: str) -> None:
    raise AssertionError(f"nothing to warn of: {reason}")


# On the CPU


@BOTH
def test_on_the_cpu_every_step_is_launched_by_itself(config: TrainingConfig) -> None:
    state, plain = tiny.state(config), tiny.state(config)
    stepper = make_stepper(state, DATA, config, silent)
    assert not isinstance(stepper, CUDAGraphStep)

    for number in range(1, 4):
        report = stepper(0.1)
        expected = eager_stepper(plain, DATA, config)(0.1)
        assert torch.equal(report, expected)
        assert state.images_seen == number * config.batch_size


def test_the_eager_stepper_penalises_every_interval_from_wherever_it_begins(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chosen: list[bool] = []

    def remember(state: TrainState, _data: Dataset, config: TrainingConfig, **how: Any) -> Tensor:
        chosen.append(how["penalise"])
        state.images_seen += config.batch_size
        return torch.zeros(5)

    monkeypatch.setattr(loop, "train_step", remember)
    config = replace(tiny.CONFIG, penalty_interval=3)
    state = tiny.state(config)
    state.images_seen = 2 * config.batch_size  # as a resumed run
    stepper = make_stepper(state, DATA, config, silent)
    for _ in range(5):
        stepper(0.0)
    assert chosen == [False, True, False, False, True]


# On a GPU


def on_gpu(config: TrainingConfig) -> tuple[TrainState, Dataset]:
    device = torch.device("cuda")
    return create_state(config, tiny.network_of(config), device, 0), DATA.to(device)


def follow(state: TrainState, stepper: Stepper, steps: int, config: TrainingConfig) -> Tensor:
    """Steps until at least so many are made; the sum of what they report."""
    total = torch.zeros(5, device="cuda")
    while state.images_seen < steps * config.batch_size:
        total += stepper(0.25)
    return total


def captured(stepper: Stepper) -> bool:
    assert isinstance(stepper, CUDAGraphStep)
    return stepper._captured is not None


@gpu
@BOTH
@pytest.mark.parametrize("options", [{}, {"penalty": 0.0}, {"flip": True, "augment": True}])
def test_captured_steps_are_the_eager_ones(config: TrainingConfig, options: dict[str, Any]) -> None:
    config = replace(config, **options)
    (state, data), (plain, _) = on_gpu(config), on_gpu(config)
    stepper = make_stepper(state, data, config, silent)

    total = follow(state, stepper, 60, config)
    assert captured(stepper)
    expected = follow(plain, eager_stepper(plain, data, config), 0, config)
    eager = eager_stepper(plain, data, config)
    while plain.images_seen < state.images_seen:
        expected += eager(0.25)

    assert plain.images_seen == state.images_seen
    assert torch.equal(plain.rng.get_state(), state.rng.get_state())
    torch.testing.assert_close(total, expected, rtol=2e-2, atol=1e-2)
    for name in ("generator", "discriminator", "ema"):
        ours, theirs = getattr(state, name).state_dict(), getattr(plain, name).state_dict()
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=5e-3)


@gpu
@BOTH
def test_a_replay_follows_the_schedule_of_its_moment(config: TrainingConfig) -> None:
    """Rates and weights lie in tensors: with a rate of nothing, the networks stand still."""
    state, data = on_gpu(config)
    stepper = make_stepper(state, data, config, silent)
    follow(state, stepper, 40, config)
    assert captured(stepper)
    before = copy.deepcopy(state.generator.state_dict())
    stepper(1.0)  # the end of the cosine
    for name, parameter in state.generator.named_parameters():
        assert torch.equal(parameter, before[name]), name
    stepper(0.0)
    assert not torch.equal(state.generator.label_embedding.weight, before["label_embedding.weight"])


@gpu
def test_penalised_steps_are_counted_in_a_replay_as_they_are_one_by_one() -> None:
    """The mean penalty is over the steps that computed one."""
    config = replace(tiny.CONFIG, penalty_interval=4, images=16 * 16 * 8)
    (state, data), (plain, _) = on_gpu(config), on_gpu(config)
    means = []
    for each, stepper in (
        (state, make_stepper(state, data, config, silent)),
        (plain, eager_stepper(plain, data, config)),
    ):
        (point,) = train(each, config, stepper, log_every=2**40, stop=lambda: False)
        assert point.losses is not None
        means.append(point.losses.penalty)
    assert means[0] > 0
    assert means[0] == pytest.approx(means[1], rel=0.05)


@gpu
@BOTH
def test_a_stepper_made_anew_goes_on_after_other_weights_were_loaded(
    config: TrainingConfig,
) -> None:
    """As after a return to the best."""
    (state, data), (plain, _) = on_gpu(config), on_gpu(config)
    stepper = make_stepper(state, data, config, silent)
    follow(state, stepper, 40, config)
    contents = copy.deepcopy(state.state_dict())
    follow(state, stepper, 80, config)

    for each in (state, plain):
        each.load_state_dict(contents)
    again, eager = make_stepper(state, data, config, silent), eager_stepper(plain, data, config)
    follow(state, again, state.images_seen // config.batch_size + 40, config)
    assert captured(again)
    while plain.images_seen < state.images_seen:
        eager(0.25)
    torch.testing.assert_close(
        state.generator.label_embedding.weight,
        plain.generator.label_embedding.weight,
        rtol=2e-2,
        atol=5e-3,
    )


@gpu
@BOTH
def test_steps_that_cannot_be_captured_are_launched_and_the_reason_is_told_once(
    config: TrainingConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A read-back to the host is what a capture cannot hold."""

    def read_back(*given: Any, **options: Any) -> Tensor:
        report = loop.update(*given, **options)
        report.sum().item()
        return report

    monkeypatch.setattr(capture, "update", read_back)
    (state, data), (plain, _) = on_gpu(config), on_gpu(config)
    reasons: list[str] = []
    stepper = make_stepper(state, data, config, reasons.append)
    total = follow(state, stepper, 30, config)
    (reason,) = reasons
    assert reason.startswith("Steps are not captured: ")
    assert "\n" not in reason
    assert not captured(stepper)
    expected = follow(plain, eager_stepper(plain, data, config), 30, config)
    torch.testing.assert_close(total, expected, rtol=2e-2, atol=1e-2)
    assert all(p.requires_grad for p in state.discriminator.parameters())


@gpu
def test_steps_that_wait_for_other_processes_are_not_captured() -> None:
    state, data = on_gpu(tiny.CONFIG)
    state.world = DistributedContext(0, 2)  # its networks are not shared; no step is made
    reasons: list[str] = []
    stepper = make_stepper(state, data, tiny.CONFIG, reasons.append)
    assert not isinstance(stepper, CUDAGraphStep)
    assert reasons == ["Steps are not captured: they wait for other processes."]
