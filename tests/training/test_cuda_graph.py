"""Captured steps equal eager ones, and a step that cannot be captured stays eager."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support import tiny_training as tiny
from training import cuda_graph, loop
from training.config import TrainingConfig
from training.cuda_graph import CUDAGraphStep, make_step
from training.data.named import Dataset
from training.distributed import DistributedContext
from training.loop import StepFn, make_eager_step, train
from training.state import TrainState, create_state

pytestmark = pytest.mark.usefixtures("one_thread")

DATA = tiny.dataset()
BOTH = pytest.mark.parametrize("config", [tiny.CONFIG, tiny.CONV], ids=["mlp", "conv"])
gpu = pytest.mark.gpu


# On the CPU


@BOTH
def test_on_the_cpu_every_step_is_launched_by_itself(config: TrainingConfig) -> None:
    state, plain = tiny.state(config), tiny.state(config)
    step_fn = make_step(state, DATA)
    assert not isinstance(step_fn, CUDAGraphStep)

    for number in range(1, 4):
        report = step_fn(0.1)
        expected = make_eager_step(plain, DATA)(0.1)
        assert torch.equal(report, expected)
        assert state.images_seen == number * config.batch_size


def test_the_eager_stepper_penalises_every_interval_from_wherever_it_begins(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chosen: list[bool] = []

    def remember(state: TrainState, _data: Dataset, **how: Any) -> Tensor:
        chosen.append(how["penalise"])
        state.images_seen += state.config.batch_size
        return torch.zeros(5)

    monkeypatch.setattr(loop, "train_step", remember)
    config = replace(tiny.CONFIG, penalty_interval=3)
    state = tiny.state(config)
    state.images_seen = 2 * config.batch_size  # as a resumed run
    step_fn = make_step(state, DATA)
    for _ in range(5):
        step_fn(0.0)
    assert chosen == [False, True, False, False, True]


# On a GPU


def on_gpu(config: TrainingConfig) -> tuple[TrainState, Dataset]:
    device = torch.device("cuda")
    return create_state(config, tiny.network_of(config), device, 0), DATA.to(device)


def follow(state: TrainState, step_fn: StepFn, steps: int, config: TrainingConfig) -> Tensor:
    """Steps until at least so many are made; the sum of what they report."""
    total = torch.zeros(5, device="cuda")
    while state.images_seen < steps * config.batch_size:
        total += step_fn(0.25)
    return total


def captured(step_fn: StepFn) -> bool:
    assert isinstance(step_fn, CUDAGraphStep)
    return step_fn._captured is not None


@gpu
@BOTH
@pytest.mark.parametrize("options", [{}, {"r1_gamma": 0.0}, {"flip": True, "augment": True}])
def test_captured_steps_are_the_eager_ones(config: TrainingConfig, options: dict[str, Any]) -> None:
    config = replace(config, **options)
    (state, data), (plain, _) = on_gpu(config), on_gpu(config)
    step_fn = make_step(state, data)

    total = follow(state, step_fn, 60, config)
    assert captured(step_fn)
    expected = follow(plain, make_eager_step(plain, data), 0, config)
    eager = make_eager_step(plain, data)
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
    step_fn = make_step(state, data)
    follow(state, step_fn, 40, config)
    assert captured(step_fn)
    before = copy.deepcopy(state.generator.state_dict())
    step_fn(1.0)  # the end of the cosine
    for name, parameter in state.generator.named_parameters():
        assert torch.equal(parameter, before[name]), name
    step_fn(0.0)
    assert not torch.equal(state.generator.label_embedding.weight, before["label_embedding.weight"])


@gpu
def test_penalised_steps_are_counted_in_a_replay_as_they_are_one_by_one() -> None:
    """The mean penalty is over the steps that computed one."""
    config = replace(tiny.CONFIG, penalty_interval=4, images=16 * 16 * 8)
    (state, data), (plain, _) = on_gpu(config), on_gpu(config)
    means = []
    for each, step_fn in (
        (state, make_step(state, data)),
        (plain, make_eager_step(plain, data)),
    ):
        (point,) = train(each, step_fn, log_every=2**40, stop=lambda: False)
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
    step_fn = make_step(state, data)
    follow(state, step_fn, 40, config)
    contents = copy.deepcopy(state.state_dict())
    follow(state, step_fn, 80, config)

    for each in (state, plain):
        each.load_state_dict(contents)
    again, eager = make_step(state, data), make_eager_step(plain, data)
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
def test_steps_that_cannot_be_captured_are_launched_and_the_reason_is_logged_once(
    config: TrainingConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A capture cannot contain a read-back to the host."""

    def read_back(*given: Any, **options: Any) -> Tensor:
        report = loop.optimize(*given, **options)
        report.sum().item()
        return report

    monkeypatch.setattr(cuda_graph, "optimize", read_back)
    (state, data), (plain, _) = on_gpu(config), on_gpu(config)
    step_fn = make_step(state, data)
    total = follow(state, step_fn, 30, config)
    (reason,) = caplog.messages
    assert reason.startswith("training steps are not captured: ")
    assert "\n" not in reason
    assert not captured(step_fn)
    expected = follow(plain, make_eager_step(plain, data), 30, config)
    torch.testing.assert_close(total, expected, rtol=2e-2, atol=1e-2)
    assert all(p.requires_grad for p in state.discriminator.parameters())


@gpu
def test_steps_that_wait_for_other_processes_are_not_captured(
    caplog: pytest.LogCaptureFixture,
) -> None:
    state, data = on_gpu(tiny.CONFIG)
    state.world = DistributedContext(0, 2)  # its networks are not shared; no step is made
    step_fn = make_step(state, data)
    assert not isinstance(step_fn, CUDAGraphStep)
    assert caplog.messages == [
        "training steps are not captured: they synchronise with other processes"
    ]
