"""A search for gamma, the weight of the R1 + R2 penalty, at the start of a run.

A small gamma leaves modes of the data uncovered, a large one slows learning, and the best value
differs between data sets (R3GAN, arXiv 2501.05441, appendix). The run therefore starts once per
candidate, each for a small share of the budget, and continues from the best start.
"""

import dataclasses
import logging
import math
import time
from collections.abc import Callable

from training.config import TrainingConfig
from training.cuda_graph import make_step
from training.data.named import Dataset
from training.distributed import DistributedContext
from training.loop import DivergedError, recompute_batch_norm, train
from training.networks import Generator
from training.quality.evaluator import QuickMetrics
from training.state import TrainState

# Measures a generator quickly; None in every process but the main one.
EvaluateFn = Callable[[Generator], QuickMetrics] | None

GAMMAS = (0.2, 1.0, 5.0)
DEFAULT_GAMMA = 1.0
SHARE = 0.03  # of the run, for each candidate
# With less training the metrics do not predict those of the finished generator.
MIN_IMAGES = 50_000
MIN_SECONDS = 60.0
MIN_SCORE = 0.01  # below this, differences are chance

_NO_METRICS = QuickMetrics(gan_test=0.0, coverage=0.0, frechet_distance=math.inf, score=0.0)

logger = logging.getLogger(__name__)


def is_worthwhile(config: TrainingConfig, seconds: float | None) -> bool:
    """Return True if the run is long enough for a search."""
    if seconds is None:
        return config.images * SHARE >= MIN_IMAGES
    return seconds * SHARE >= MIN_SECONDS


def choose_gamma(
    config: TrainingConfig,
    start: Callable[[TrainingConfig], TrainState],
    dataset: Dataset,
    evaluate: EvaluateFn,
    *,
    stop: Callable[[], bool],
) -> tuple[TrainState, dict[str, float]]:
    """Start a run with each gamma and keep the best start.

    `start` creates a fresh state, the same for every gamma. `stop` is called before every step;
    True ends the search.

    Returns:
        the state to continue from, whose configuration has the best gamma, and gamma -> score.
    """
    states: dict[float, TrainState] = {}
    found: dict[float, QuickMetrics] = {}
    for gamma in GAMMAS:
        states[gamma] = state = start(dataclasses.replace(config, r1_gamma=gamma))
        found[gamma] = metrics = _try(state, dataset, evaluate, stop)
        logger.info(
            "gamma %g: score %.3f, Fréchet distance %.2f",
            *(gamma, metrics.score, metrics.frechet_distance),
        )
        if state.world.any(stop()):
            break
    scores = {f"{gamma:g}": round(metrics.score, 4) for gamma, metrics in found.items()}
    return states[best_of(found)], scores


def best_of(found: dict[float, QuickMetrics]) -> float:
    """Return the gamma with the best score, or with the least Fréchet distance if no score counts.

    The distance still ranks generators that have learnt too little for a score above chance.
    """
    if max(metrics.score for metrics in found.values()) >= MIN_SCORE:
        return max(found, key=lambda gamma: found[gamma].score)
    return min(found, key=lambda gamma: found[gamma].frechet_distance)


def _try(
    state: TrainState, dataset: Dataset, evaluate: EvaluateFn, stop: Callable[[], bool]
) -> QuickMetrics:
    """Train for a share of the run and measure the generator."""
    began = time.perf_counter()

    def done() -> bool:
        if state.budget_s is None:
            over = state.images_seen >= SHARE * state.config.images
        else:
            over = time.perf_counter() - began >= SHARE * state.budget_s
        return over or stop()

    step = make_step(state, dataset)
    try:
        for _ in train(state, step, log_every=2**62, stop=done):
            pass
    except DivergedError:
        return _NO_METRICS
    recompute_batch_norm(state.ema, batches=20)
    return evaluate_on_main(state.world, evaluate, state.ema)


def evaluate_on_main(
    world: DistributedContext, evaluate: EvaluateFn, generator: Generator
) -> QuickMetrics:
    """Measure a generator in the main process and return its metrics in every process."""
    metrics = evaluate(generator) if evaluate else _NO_METRICS
    return QuickMetrics(*world.broadcast(*dataclasses.astuple(metrics)))
