"""What Prometheus scrapes: one registry per app, base units, bounded labels, histograms.

The instruments of several worker processes live in files of a folder they share, and whichever
worker is scraped adds up all of them.
"""

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from statistics import mean
from threading import Lock
from typing import Any, NamedTuple

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, values
from prometheus_client.gc_collector import GCCollector
from prometheus_client.metrics_core import Metric
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

_SECONDS = (
    *(0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05),
    *(0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0),
)
QUALITY_METRICS = (
    *("gan_test", "gan_train", "precision", "recall", "density", "coverage"),
    "frechet_distance",
)
_ROWS = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256, 512, 1024, 2048, 4096)


def share(folder: Path, name: str) -> None:
    """Let this process count in files of a folder, together with others of other names.

    Called before the first instrument is made. The files go by the name instead of the process id,
    so whoever replaces a process goes on from its counts, and the folder does not grow.
    """
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(folder)
    values.ValueClass = _value_class(name)
    (folder / f"{name}.pid").write_text(str(os.getpid()))


def _value_class(name: str) -> type:
    """What holds one number of this process's in its files."""
    base: Any = values.MultiProcessValue(process_identifier=lambda: name)

    class SharedValue(base):  # type: ignore[misc]
        """A number that is counted up by one aligned store, which nobody sees half of.

        The base takes one lock for all numbers, and looks for its place and packs it every time. A
        request counts in twelve places: for one image, a worker answered 6 % less with it.
        """

        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            at = self._file._positions[self._key]
            # A file that grows is mapped again, and what was mapped of it before stays.
            self._stored = memoryview(self._file._m)[at : at + 8].cast("d")
            self._alone = Lock()

        def inc(self, amount: float) -> None:
            with self._alone:
                self._value += amount
                self._stored[0] = self._value

        def set(self, value: float, timestamp: float | None = None) -> None:
            with self._alone:
                super().set(value, timestamp)

    return SharedValue


def forget(folder: Path, name: str) -> None:
    """Take back what only counts while a process lives, now that it has ended."""
    mark_process_dead(name, folder)


def shared_registry(folder: Path) -> CollectorRegistry:
    """What all processes that share a folder count, added up."""
    registry = _LoadedModels()
    registry.register(_WorkerProcesses(folder))
    MultiProcessCollector(registry, folder)
    return registry


class ModelLabels(NamedTuple):
    """What tells a model from others."""

    model: str
    sha256: str
    device: str
    dtype: str


def _figures(certificate: Mapping[str, Any] | None) -> dict[str, float]:
    """The figures of a certificate that are reported."""
    if certificate is None:
        return {}
    found = {name: certificate["generated"].get(name) for name in QUALITY_METRICS}
    train = certificate.get("gan_train")
    if train is not None:
        found["gan_train"] = mean(train["accuracies"])
    return {name: float(value) for name, value in found.items() if value is not None}


class _WorkerProcesses(Collector):
    """What the operating system knows of each worker, told apart by the label `worker`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def collect(self) -> Iterable[Metric]:
        families: dict[str, Metric] = {}
        for path in sorted(self._folder.glob("[0-9]*.pid")):
            for found in ProcessCollector(pid=path.read_text, registry=None).collect():
                family = Metric(found.name, found.documentation, found.type)
                family = families.setdefault(found.name, family)
                for sample in found.samples:
                    family.add_sample(sample.name, {"worker": path.stem}, sample.value)
        return families.values()


class _LoadedModels(CollectorRegistry):
    """A registry that says nothing of models that are no longer loaded.

    Taking their labels from the instruments would not do: the last requests for a removed model are
    counted after it, and the files that workers share keep what was once written.
    """

    def collect(self) -> Iterator[Metric]:
        families = list(super().collect())
        loaded = {
            sample.labels["model"]
            for family in families
            for sample in family.samples
            if sample.name == "cgan_model_info" and sample.value
        }
        for family in families:
            family.samples = [each for each in family.samples if _is_current(each, loaded)]
            yield family


def _is_current(sample: Sample, loaded: set[str]) -> bool:
    if sample.name == "cgan_model_info":
        return bool(sample.value)
    if sample.name == "cgan_certificate" and math.isnan(sample.value):
        return False
    return "model" not in sample.labels or sample.labels["model"] in loaded


class Metrics:
    """The instruments of one app.

    Args:
        folder: where several workers share theirs, after `share`; None for a single process.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.registry = _LoadedModels() if folder is None else shared_registry(folder)
        self._watched: list[tuple[Gauge, Callable[[], float]]] = []
        self._shared = folder is not None
        if folder is None:
            ProcessCollector(registry=self.registry)
            GCCollector(registry=self.registry)
            self._make_instruments(self.registry)
        else:
            self._make_instruments(None)  # the registry has them from the folder

    def _make_instruments(self, registry: CollectorRegistry | None) -> None:
        self.requests = Counter(
            "cgan_requests_total",
            "Requests answered, by route template, method and status.",
            ["route", "method", "status"],
            registry=registry,
        )
        self.request_seconds = Histogram(
            "cgan_request_duration_seconds",
            "Time from a request's arrival to the last byte of its answer.",
            ["route"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.requests_in_progress = Gauge(
            "cgan_requests_in_progress",
            "Requests that are being answered.",
            registry=registry,
            multiprocess_mode="livesum",
        )
        self.stage_seconds = Histogram(
            "cgan_stage_duration_seconds",
            "Where an image request spends its time: queue, forward or encode.",
            ["stage"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.batch_rows = Histogram(
            "cgan_batch_rows",
            "Images of each forward.",
            buckets=_ROWS,
            registry=registry,
        )
        self.batch_seconds = Histogram(
            "cgan_batch_duration_seconds",
            "Time of each forward, copies included.",
            buckets=_SECONDS,
            registry=registry,
        )
        self.images = Counter(
            "cgan_images_total",
            "Images sent, by model and class index.",
            ["model", "label"],
            registry=registry,
        )
        self.rejections = Counter(
            "cgan_rejections_total",
            "Image requests that ended without an image, by the kind of problem.",
            ["reason"],
            registry=registry,
        )
        self.device_checks = Counter(
            "cgan_device_checks_total",
            "Proofs of a device by known images: passed, wrong, failed, or skipped when busy.",
            ["outcome"],
            registry=registry,
        )
        self.wasted_images = Counter(
            "cgan_wasted_images_total",
            "Images computed for nobody: the client went away, or its deadline passed.",
            registry=registry,
        )
        self.queue_rows = Gauge(
            "cgan_queue_rows",
            "Images admitted and not yet started.",
            registry=registry,
            multiprocess_mode="livesum",
        )
        self.ready = Gauge(
            "cgan_ready",
            "1 while new work is taken, 0 while draining; of several workers, how many take it.",
            registry=registry,
            multiprocess_mode="livesum",
        )
        self.model = Gauge(
            "cgan_model_info",
            "Always 1; its labels say which models are loaded.",
            ["model", "sha256", "device", "dtype"],
            registry=registry,
            multiprocess_mode="livemax",
        )
        self.certificate = Gauge(
            "cgan_certificate",
            "Measured quality of each model, from its certificate; better the larger, but for the "
            "Frechet distance.",
            ["model", "measure"],
            registry=registry,
            multiprocess_mode="mostrecent",
        )
        self.queue_limit = Gauge(
            "cgan_queue_limit_rows",
            "Images that may wait.",
            registry=registry,
            multiprocess_mode="livesum",
        )
        self.device_memory = Gauge(
            "cgan_device_memory_bytes",
            "Memory of a GPU, used by whatever process or in all; none of a CPU.",
            ["device", "kind"],
            registry=registry,
            multiprocess_mode="livemax",
        )
        self.devices_lost = Counter(
            "cgan_devices_lost_total",
            "Devices that failed so that the process had to end.",
            registry=registry,
        )
        self.reloads = Counter(
            "cgan_reloads_total",
            "Models that were loaded or removed, and files that were refused, while serving.",
            ["outcome"],
            registry=registry,
        )
        for outcome in ("loaded", "removed", "refused"):
            self.reloads.labels(outcome)  # a first one is only seen to be more where there was a 0

    def model_loaded(self, labels: ModelLabels, certificate: Mapping[str, Any] | None) -> None:
        """Report a model, and what its certificate says, from now on."""
        self.model.labels(*labels).set(1)
        measured = _figures(certificate)
        for measure in QUALITY_METRICS:
            # A file that was replaced may have had a figure that the new one has not.
            value = measured.get(measure, math.nan)
            self.certificate.labels(labels.model, measure).set(value)

    def model_gone(self, labels: ModelLabels) -> None:
        """Report a model no longer."""
        self.model.labels(*labels).set(0)
        if not self._shared:
            self.model.remove(*labels)

    def watch(self, gauge: Gauge, read: Callable[[], float]) -> None:
        """Let a gauge be read when it is scraped, which costs nothing in between.

        Another worker cannot read it, so `refresh` writes it down where several share metrics.
        """
        if self._shared:
            self._watched.append((gauge, read))
        else:
            gauge.set_function(read)

    def refresh(self) -> None:
        """Write down what is watched, for the workers that do not see it; once a second or so."""
        for gauge, read in self._watched:
            gauge.set(read())

    def wasted(self, rows: int) -> None:
        """Count images that were computed and are not sent."""
        self.wasted_images.inc(rows)

    def batch(self, rows: int, forward_s: float) -> None:
        """Count one forward."""
        self.batch_rows.observe(rows)
        self.batch_seconds.observe(forward_s)


class SupervisorMetrics:
    """The instruments of a process that keeps several workers running, after `share`."""

    def __init__(self, workers: int) -> None:
        self.restarts = Counter(
            "cgan_worker_restarts_total",
            "Workers that ended while the service went on, and were replaced.",
            registry=None,
        )
        self.workers = Gauge(
            "cgan_workers",
            "How many workers there should be.",
            registry=None,
            multiprocess_mode="max",
        )
        self.workers.set(workers)
