"""Estimates of quality by a run's quick metrics: in words, in time, and inside an artifact."""

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from pydantic import TypeAdapter, ValidationError

from training.artifact import ArtifactInfo
from training.quality.evaluator import QuickMetrics

KEY = "quick_metrics"  # of `ArtifactInfo.training`

# Bounds of GAN-test, rescaled so that guesses have 0 for any number of classes.
LEGIBLE = (0.5, 0.85)
# Bounds of coverage. With 3,000 images, real ones reach about 0.9.
SOME_VARIETY, VARIED, NEARLY_REAL = 0.2, 0.5, 0.8
# A row per range of GAN-test, a column per range of coverage.
_WORDS = (
    (
        "not legible yet",
        "some variety, but mostly of the wrong class",
        "varied, but mostly of the wrong class",
        "varied, but mostly of the wrong class",
    ),
    (
        "partly legible, and repeats itself",
        "partly legible, with some variety",
        "varied, and often of the right class",
        "varied, and often of the right class",
    ),
    (
        "legible, but repeats itself",
        "legible, with some variety",
        "legible and varied",
        "legible, and nearly as varied as real images",
    ),
)
FORECAST_POINTS = 3
# Longest forecast, as a multiple of the time passed.
FORECAST_FACTOR = 10.0


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Quick metrics as an artifact holds them; they compare with training images."""

    gan_test: float
    coverage: float
    frechet_distance: float
    images: int  # generated

    @classmethod
    def of(cls, metrics: QuickMetrics) -> "Estimate":
        """Return the metrics without digits that few images do not support."""
        return cls(
            gan_test=round(metrics.gan_test, 4),
            coverage=round(metrics.coverage, 4),
            frechet_distance=round(metrics.frechet_distance, 4),
            images=int(metrics.images),  # a float if other processes sent it
        )


_ESTIMATE = TypeAdapter(Estimate)


def read_estimate(info: ArtifactInfo) -> Estimate | None:
    """Return the estimate in an artifact; None if it has none that this version can read."""
    try:
        return _ESTIMATE.validate_python(info.training.get(KEY))
    except ValidationError:
        return None


def describe(metrics: QuickMetrics | Estimate, num_classes: int) -> str:
    """Return the meaning of metrics: 'legible, but repeats itself: GAN-test 95.0%, …'."""
    words = judge(metrics, num_classes)
    return f"{words}: GAN-test {metrics.gan_test:.1%}, coverage {metrics.coverage:.2f}"


def judge(metrics: QuickMetrics | Estimate, num_classes: int) -> str:
    """Return the meaning of metrics in words alone, one of ten texts."""
    chance = 1.0 / num_classes if num_classes > 1 else 0.0
    row = bisect_right(LEGIBLE, (metrics.gan_test - chance) / (1.0 - chance))
    return _WORDS[row][bisect_right((SOME_VARIETY, VARIED, NEARLY_REAL), metrics.coverage)]


def forecast_varied_s(history: Sequence[tuple[float, float]]) -> float | None:
    """Return the time at which images will be varied, or None without a basis for it.

    Coverage rises about linearly in the logarithm of time, so the last points are extended to
    `VARIED` in it. They are a basis if coverage rose from each to the next.

    Args:
        history: (seconds of training, coverage) of each evaluation, in order.
    """
    last = history[-FORECAST_POINTS:]
    if len(last) < FORECAST_POINTS:
        return None
    (first_s, first), (last_s, coverage) = last[0], last[-1]
    rising = all(a < b for (_, a), (_, b) in pairwise(last))
    if not rising or coverage >= VARIED or not 0.0 < first_s < last_s:
        return None
    passed = math.log(last_s) - math.log(first_s)
    growth = (VARIED - coverage) / (coverage - first) * passed  # the logarithm of a factor of time
    return last_s * math.exp(growth) if growth <= math.log(FORECAST_FACTOR) else None


def render_forecast(history: Sequence[tuple[float, float]], end_s: float, prepared_s: float) -> str:
    """Return the forecast of a run as the end of a sentence, or nothing.

    Training ends at `end_s` and began `prepared_s` after the run.
    """
    varied_s = forecast_varied_s(history)
    if varied_s is None:
        return ""
    minutes = math.ceil((prepared_s + varied_s) / 60)
    shown = f"{minutes} minute" if minutes == 1 else f"{minutes} minutes"
    if varied_s > end_s:
        return f"; varied images would take about {shown}, more than this run has"
    return f"; expect varied images from about {shown} on"
