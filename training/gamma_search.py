"""The short probe that chooses gamma, the weight of the R1 + R2 penalty.

Too little of it and the generator covers few of the images, too much and it learns slowly; where
the two meet differs from data set to data set (R3GAN, arXiv 2501.05441, appendix). So a run begins
several times with different values, each for a small share of the budget, and goes on from the one
whose generator looks best: by its score, or by its Fréchet distance, which tells noise from less
noise, where all of them have learnt so little that a score is chance.
"""

import dataclasses
import math
import time
from collections.abc import Callable

from training.config import TrainingConfig
from training.cuda_graph import make_stepper
from training.data.named import Dataset
from training.distributed import DistributedContext
from training.loop import DivergedError, TrainState, recompute_batch_norm, train
from training.networks import Generator
from training.quality.evaluator import QuickMetrics

# Measures a generator, lightly; only the process that writes is ever asked to.
Look = Callable[[Generator], QuickMetrics]

PENALTIES = (0.2, 1.0, 5.0)
DEFAULT_PENALTY = 1.0
SHARE = 0.03  # of the run, for each of them
# A look at a generator that has seen less than this says nothing about what it will become.
MIN_IMAGES = 50_000
MIN_SECONDS = 60.0
MIN_SCORE = 0.01  # less is chance

_BROKEN_DOWN = QuickMetrics(gan_test=0.0, coverage=0.0, frechet_distance=math.inf, score=0.0)


def is_worthwhile(config: TrainingConfig, seconds: float | None) -> bool:
    """Whether a run is long enough for a share of it to tell one penalty from another."""
    if seconds is None:
        return config.images * SHARE >= MIN_IMAGES
    return seconds * SHARE >= MIN_SECONDS


def choose_penalty(
    config: TrainingConfig,
    start: Callable[[TrainingConfig], TrainState],
    dataset: Dataset,
    look: Look,
    *,
    seconds: float | None,
    stop: Callable[[], bool],
    report: Callable[[str], None],
) -> tuple[TrainState, TrainingConfig, dict[str, float]]:
    """Begin a run with each penalty, and keep the beginning that looks best.

    Args:
        config: of the run, whose penalty is to be chosen.
        start: makes a fresh state, the same one for every penalty.
        dataset: resident on the state's device.
        look: measures a generator.
        seconds: of the run, where time ends it.
        stop: whether to break off, asked before every step.
        report: told how each one looks.

    Returns:
        the state to go on from, its configuration, and gamma -> score.
    """
    states: dict[float, TrainState] = {}
    looks: dict[float, QuickMetrics] = {}
    for penalty in PENALTIES:
        attempt = dataclasses.replace(config, penalty=penalty)
        state = start(attempt)
        looks[penalty] = seen = _try(state, attempt, dataset, look, seconds, stop)
        states[penalty] = state
        report(
            f"gamma {penalty:g}: score {seen.score:.3f}, Fréchet distance "
            f"{seen.frechet_distance:.2f}"
        )
        if state.world.any(stop()):
            break
    best = best_of(looks)
    chosen = dataclasses.replace(config, penalty=best)
    return states[best], chosen, {f"{p:g}": round(seen.score, 4) for p, seen in looks.items()}


def best_of(looks: dict[float, QuickMetrics]) -> float:
    """The penalty whose generator looks best."""
    if max(seen.score for seen in looks.values()) >= MIN_SCORE:
        return max(looks, key=lambda penalty: looks[penalty].score)
    return min(looks, key=lambda penalty: looks[penalty].frechet_distance)


def _try(
    state: TrainState,
    config: TrainingConfig,
    dataset: Dataset,
    look: Look,
    seconds: float | None,
    stop: Callable[[], bool],
) -> QuickMetrics:
    """Train for a share of the run; what comes of it."""
    began = time.perf_counter()

    def enough() -> bool:
        if seconds is None:
            over = state.images_seen >= SHARE * config.images
        else:
            over = time.perf_counter() - began >= SHARE * seconds
        return over or stop()

    stepper = make_stepper(state, dataset, config, lambda _reason: None)
    try:
        for _ in train(state, config, stepper, seconds=seconds, log_every=2**62, stop=enough):
            pass
    except DivergedError:
        return _BROKEN_DOWN
    recompute_batch_norm(state.ema, batches=20)
    return agreed(state.world, look, state.ema)


def agreed(world: DistributedContext, look: Look, generator: Generator) -> QuickMetrics:
    """What the process that writes sees, in all of them."""
    names = [field.name for field in dataclasses.fields(QuickMetrics)]
    seen = dataclasses.astuple(look(generator)) if world.writes else (0.0,) * len(names)
    return QuickMetrics(**dict(zip(names, world.agree(*seen), strict=True)))
