"""Training steps as a CUDA graph: captured once, replayed several steps at a time.

Launched one by one, the hundreds of small operations of a step take longer to launch than to run.
`torch.compile` does not help: it cannot differentiate twice, which a gradient penalty needs. The
graph contains the eager step, so there is one definition of a step.
"""

import logging

import torch
from torch import Tensor

from training.data.named import Dataset
from training.loop import StepFn, apply_schedules, make_eager_step, optimize
from training.state import TrainState

_STEPS_PER_REPLAY = 16
_WARM_UP_STEPS = 4

logger = logging.getLogger(__name__)


def make_step(state: TrainState, dataset: Dataset) -> StepFn:
    """Return the fastest step function for this device: a CUDA graph, or eager steps."""
    if state.rng.device.type == "cuda":
        if state.world.size == 1:
            return CUDAGraphStep(state, dataset)
        logger.warning("training steps are not captured: they synchronise with other processes")
    return make_eager_step(state, dataset)


class CUDAGraphStep:
    """A CUDA graph of several steps, captured after a few eager ones.

    In the eager steps libraries choose their kernels and optimisers create their state. If the
    capture fails, all steps stay eager.
    """

    def __init__(self, state: TrainState, dataset: Dataset) -> None:
        self._state, self._dataset, self._config = state, dataset, state.config
        self._eager = make_eager_step(state, dataset)
        self._interval = self._config.penalty_interval if self._config.r1_gamma else 1
        # A whole number of intervals, so that every replay penalises the same steps.
        self._steps = max(self._interval, _STEPS_PER_REPLAY // self._interval * self._interval)
        self._stream = torch.cuda.Stream(state.rng.device)
        self._warm_up, self._tried = _WARM_UP_STEPS, False
        self._captured: tuple[torch.cuda.CUDAGraph, Tensor] | None = None

    def __call__(self, progress: float) -> Tensor:
        """Make one step, or all steps of the graph; see `training.loop.StepFn`."""
        number = self._state.images_seen // self._config.batch_size
        if self._warm_up <= 0 and not self._tried and number % self._interval == 0:
            self._capture()
        if self._captured is None or number % self._interval:
            return self._launch(progress)
        graph, total = self._captured
        apply_schedules(self._state, progress=progress, steps=self._steps)
        graph.replay()
        return total

    def _launch(self, progress: float) -> Tensor:
        self._warm_up -= 1
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            report = self._eager(progress)
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
                    penalise = bool(self._config.r1_gamma) and step % self._interval == 0
                    total += optimize(self._state, self._dataset, penalise=penalise)
        except RuntimeError as error:
            self._state.discriminator.requires_grad_(True)  # the step may have stopped anywhere
            logger.warning("training steps are not captured: %s", str(error).splitlines()[0])
            return
        self._captured = graph, total
