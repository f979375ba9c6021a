"""Counters and histograms that one thread writes: the event loop, for every request.

Those of prometheus_client take one lock or two for each value. Any thread may read these.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from typing import Generic, TypeVar

from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

Series = TypeVar("Series")


class Count:
    """A number that is counted up or down."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0

    def inc(self, amount: int = 1) -> None:
        """Add an amount."""
        self.value += amount


class Distribution:
    """The sum of the observed values, and how many of them are in each bucket.

    `bounds` ascend; each is the largest value of its bucket.
    """

    __slots__ = ("_bounds", "_counts", "_sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds, self._counts, self._sum = bounds, [0] * (len(bounds) + 1), 0.0

    def observe(self, value: float) -> None:
        """Add a value."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def add_to(self, family: HistogramMetricFamily, labels: Sequence[str]) -> None:
        """Add the buckets, with all smaller values in each, and the sum."""
        counts, total, buckets = self._counts.copy(), 0, []
        for bound, count in zip((*self._bounds, float("inf")), counts, strict=True):
            total += count
            buckets.append((floatToGoString(bound), float(total)))
        family.add_metric(labels, buckets, self._sum)


class _Labelled(Generic[Series]):
    """The series of one name."""

    def __init__(self, create: Callable[[], Series]) -> None:
        self._create = create
        self._series: dict[tuple[str, ...], Series] = {}

    def labels(self, *values: object) -> Series:
        """Return the series of these values of the labels."""
        key = tuple(map(str, values))
        if key not in self._series:
            self._series[key] = self._create()
        return self._series[key]


class UnlockedCounter(_Labelled[Count], Collector):
    """Counter with labels."""

    def __init__(
        self, name: str, documentation: str, labels: Sequence[str], registry: CollectorRegistry
    ) -> None:
        super().__init__(Count)
        self._describe = name, documentation, labels
        registry.register(self)

    def collect(self) -> Iterator[Metric]:
        """Return the current values."""
        name, documentation, labels = self._describe
        family = CounterMetricFamily(name, documentation, labels=labels)
        for values, count in self._series.copy().items():
            family.add_metric(values, count.value)
        yield family


class UnlockedHistogram(_Labelled[Distribution], Collector):
    """Histogram with labels; `buckets` are the bounds of a `Distribution`."""

    def __init__(
        self,
        name: str,
        documentation: str,
        labels: Sequence[str],
        registry: CollectorRegistry,
        buckets: Sequence[float],
    ) -> None:
        super().__init__(lambda: Distribution(buckets))
        self._describe = name, documentation, labels
        registry.register(self)

    def collect(self) -> Iterator[Metric]:
        """Return the current values."""
        name, documentation, labels = self._describe
        family = HistogramMetricFamily(name, documentation, labels=labels)
        for values, distribution in self._series.copy().items():
            distribution.add_to(family, values)
        yield family
