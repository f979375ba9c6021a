"""Metrics of several processes, added up through files in a folder that they share.

Every process counts in an ordinary registry of its own and writes a snapshot of it to
FOLDER/NAME.prom: once a second, and whenever it is scraped, so that no scrape of another process
can show less. A scrape of any process adds up the snapshots of all. Counts of the last second
before a process is killed can be lost.
"""

from collections.abc import Collection, Iterable, Iterator
from itertools import chain
from operator import add
from pathlib import Path
from threading import Lock

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

_PER_PROCESS = ("process_", "python_")  # prefixes of metrics that are not added up


class SharedMetrics(Collector):
    """The metrics of all processes that share a folder.

    Counters and histograms are summed. Gauges are summed over the live processes, or the largest
    value is taken. Metrics about one process (`process_*`, `python_*`) get the label `worker`.

    A process continues the counts of an ended process of the same name. `max_gauges` names the
    gauges of which the largest value is taken.
    """

    def __init__(
        self, registry: CollectorRegistry, folder: Path, name: str, max_gauges: Collection[str] = ()
    ) -> None:
        self._registry, self._folder, self._max_gauges = registry, folder, max_gauges
        self._path = folder / f"{name}.prom"
        self._lock = Lock()  # a scrape may come from another thread than the snapshot of a second
        self._inherited = _counts(self._path) if self._path.exists() else b""

    def write_snapshot(self) -> None:
        """Write the current values for the other processes to read."""
        with self._lock:
            _replace(self._path, generate_latest(self._registry) + self._inherited)

    def collect(self) -> Iterable[Metric]:
        """Return the metrics of all processes, added up."""
        self.write_snapshot()
        snapshots = chain.from_iterable(map(_read, sorted(self._folder.glob("*.prom"))))
        return _combine(snapshots, self._max_gauges)


def mark_worker_dead(folder: Path, name: str) -> None:
    """Keep the counts of a process that has ended, and drop its gauges."""
    path = folder / f"{name}.prom"
    if path.exists():
        _replace(path, _counts(path))


class _Families(Collector):
    """Metric families that are already collected."""

    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


def _counts(path: Path) -> bytes:
    """Return the part of a snapshot that outlives its process."""
    kept = [each for each in _read(path) if each.type in ("counter", "histogram")]
    shared = [each for each in kept if not each.name.startswith(_PER_PROCESS)]
    return generate_latest(_Families(_combine(shared)))


def _read(path: Path) -> Iterator[Metric]:
    """Parse a snapshot; creation times, which have no sum, are left out."""
    for family in text_string_to_metric_families(path.read_text("utf-8")):
        if family.name.endswith("_created"):
            continue
        if family.name.startswith(_PER_PROCESS):
            for sample in family.samples:
                sample.labels["worker"] = path.stem
        yield family


def _combine(families: Iterable[Metric], max_gauges: Collection[str] = ()) -> list[Metric]:
    """Merge families of the same name, sample by sample."""
    merged: dict[str, Metric] = {}
    values: dict[str, dict[tuple[str, tuple[tuple[str, str], ...]], float]] = {}
    for family in families:
        merged.setdefault(family.name, Metric(family.name, family.documentation, family.type))
        found = values.setdefault(family.name, {})
        combine = max if family.name in max_gauges else add
        for sample in family.samples:
            key = sample.name, tuple(sample.labels.items())
            found[key] = combine(found[key], sample.value) if key in found else sample.value
    for name, found in values.items():
        for (sample_name, labels), value in found.items():
            merged[name].add_sample(sample_name, dict(labels), value)
    return list(merged.values())


def _replace(path: Path, text: bytes) -> None:
    """Write a file so that no reader sees half of it."""
    beside = path.with_suffix(".new")
    beside.write_bytes(text)
    beside.replace(path)
