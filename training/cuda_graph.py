"""Training steps as a CUDA graph: captured once, replayed several steps at a time.

Launched one by one, the hundreds of small operations of a step cost more time than they compute.
`torch.compile` is no way around that: it cannot differentiate twice, which a gradient penalty
needs. The graph holds the eager step itself, so there is one definition of a step.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from training.config import TrainingConfig
from training.data.named import Dataset
from training.loop import Stepper, TrainState, eager_stepper, schedule, update

_STEPS_PER_REPLAY = 16
_WARM_UP_STEPS = 4


def make_stepper(
    state: TrainState,
    dataset: Dataset,
    config: TrainingConfig,
    warn: Callable[[str], None],
) -> Stepper:
    """The fastest stepper that there is for these networks on this device.

    Args:
        state: of the run.
        dataset: resident on the state's device.
        config: of the run.
        warn: told the reason, once, where a CUDA device launches every step by itself.
    """
    if state.rng.device.type != "cuda":
        return eager_stepper(state, dataset, config)
    if state.world.size > 1:
        warn("Steps are not captured: they wait for other processes.")
        return eager_stepper(state, dataset, config)
    return CUDAGraphStep(state, dataset, config, warn)


class CUDAGraphStep:
    """Replays a graph of several steps, after a few ordinary ones.

    Libraries choose their kernels and optimisers make their state in the first steps, before
    anything is captured. Where the capture fails, every step stays an ordinary one.
    """

    def __init__(
        self,
        state: TrainState,
        dataset: Dataset,
        config: TrainingConfig,
        warn: Callable[[str], None],
    ) -> None:
        self._state, self._dataset, self._config, self._warn = state, dataset, config, warn
        self._eager = eager_stepper(state, dataset, config)
        self._interval = config.penalty_interval if config.penalty else 1
        # A whole number of intervals, so that every replay penalises the same steps.
        self._steps = max(self._interval, _STEPS_PER_REPLAY // self._interval * self._interval)
        self._stream = torch.cuda.Stream(state.rng.device)
        self._warm_up, self._tried = _WARM_UP_STEPS, False
        self._captured: tuple[torch.cuda.CUDAGraph, Tensor] | None = None

    def __call__(self, used: float) -> Tensor:
        """Make one step, or as many as the graph holds; see `training.loop.Stepper`."""
        number = self._state.images_seen // self._config.batch_size
        if self._warm_up <= 0 and not self._tried and number % self._interval == 0:
            self._capture()
        if self._captured is None or number % self._interval:
            return self._launch(used)
        graph, total = self._captured
        schedule(self._state, self._config, used=used, steps=self._steps)
        graph.replay()
        return total

    def _launch(self, used: float) -> Tensor:
        self._warm_up -= 1
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            report = self._eager(used)
        current.wait_stream(self._stream)
        return report

    def _capture(self) -> None:
        self._tried = True
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(self._state.rng)
        try:
            with torch.cuda.graph(graph, stream=self._stream):
                total = torch.zeros(5, device=self._state.rng.device)
                for step in range(self._steps):
                    penalise = bool(self._config.penalty) and step % self._interval == 0
                    total += update(self._state, self._dataset, self._config, penalise=penalise)
        except RuntimeError as error:
            self._state.discriminator.requires_grad_(True)  # wherever the step was broken off
            self._warn(f"Steps are not captured: {str(error).splitlines()[0]}")
            return
        self._captured = graph, total
