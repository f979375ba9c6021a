"""Prometheus metrics: base units, bounded labels, histograms."""

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.gc_collector import GCCollector
from prometheus_client.metrics_core import Metric
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from service.telemetry.multiprocess import SharedMetrics, mark_worker_dead
from service.telemetry.unlocked import Count, UnlockedCounter, UnlockedHistogram

QUALITY_METRICS = (
    *("gan_test", "gan_train", "precision", "recall", "density", "coverage"),
    "frechet_distance",
)
_SECONDS = (
    *(0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1),
    *(0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0),
)
_IMAGES = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256, 512, 1024, 2048, 4096)
# Several workers report the same value of these; other gauges are summed.
_MAX_GAUGES = {
    *("cgan_model_info", "cgan_model_quality", "cgan_device_memory_bytes", "cgan_workers"),
}
_DEPRECATED_NAMES = {
    "cgan_batch_images": "cgan_batch_rows",
    "cgan_queue_images": "cgan_queue_rows",
    "cgan_queue_limit_images": "cgan_queue_limit_rows",
    "cgan_model_quality": "cgan_certificate",
}


class ModelLabels(NamedTuple):
    """The labels that identify a loaded model."""

    model: str
    sha256: str
    device: str
    dtype: str


class _ExposedRegistry(CollectorRegistry):
    """A registry without unloaded models, and with renamed metrics under their old name too.

    Removing the labels of an unloaded model from the instruments is not enough: its last requests
    are counted after that, and ended workers leave their counts behind.
    """

    def __init__(self, source: Collector) -> None:
        super().__init__()
        self.register(source)

    def collect(self) -> Iterator[Metric]:
        families = list(super().collect())
        info = (each.samples for each in families if each.name == "cgan_model_info")
        loaded = {sample.labels["model"] for samples in info for sample in samples}
        for family in families:
            family.samples = [
                each
                for each in family.samples
                if "model" not in each.labels or each.labels["model"] in loaded
            ]
            yield family
            if family.name in _DEPRECATED_NAMES:
                yield _deprecated(family, _DEPRECATED_NAMES[family.name])


def _deprecated(family: Metric, old_name: str) -> Metric:
    """Return a family under its old name."""
    copy = Metric(old_name, f"Deprecated: use {family.name}.", family.type)
    for sample in family.samples:
        labels = {"measure" if k == "metric" else k: v for k, v in sample.labels.items()}
        copy.add_sample(old_name + sample.name.removeprefix(family.name), labels, sample.value)
    return copy


class Metrics:
    """The instruments of one serving process.

    Args:
        folder: where several workers share their metrics; None for a single process.
        worker: the name of this process in that folder.

    Attributes:
        registry: exposed by `/metrics`; of all processes that share the folder.
        requests_in_progress: counted by the event loop alone, as `requests`, `request_seconds`,
            `stage_seconds` and `images` are.
    """

    def __init__(self, folder: Path | None = None, worker: str = "0") -> None:
        own = CollectorRegistry()
        ProcessCollector(registry=own)
        GCCollector(registry=own)
        self._make_request_instruments(own)
        self._make_instruments(own)
        self._shared = None if folder is None else SharedMetrics(own, folder, worker, _MAX_GAUGES)
        self.registry: CollectorRegistry = _ExposedRegistry(self._shared or own)

    def _make_request_instruments(self, registry: CollectorRegistry) -> None:
        self.requests = UnlockedCounter(
            "cgan_requests_total", "Requests answered.", ["route", "method", "status"], registry
        )
        self.request_seconds = UnlockedHistogram(
            "cgan_request_duration_seconds",
            "Time from arrival to the last byte sent.",
            ["route"],
            registry,
            _SECONDS,
        )
        self.requests_in_progress = in_progress = Count()
        Gauge(
            "cgan_requests_in_progress",
            "Requests being answered, without probes and scrapes.",
            registry=registry,
        ).set_function(lambda: in_progress.value)
        self.stage_seconds = UnlockedHistogram(
            "cgan_stage_duration_seconds",
            "Time in queue, forward and encode.",
            ["stage"],
            registry,
            _SECONDS,
        )
        self.images = UnlockedCounter(
            "cgan_images_total",
            "Images sent, by model and class index.",
            ["model", "label"],
            registry,
        )

    def _make_instruments(self, registry: CollectorRegistry) -> None:
        counter = partial(Counter, registry=registry)
        gauge = partial(Gauge, registry=registry)
        histogram = partial(Histogram, registry=registry)
        self.batch_images = histogram("cgan_batch_images", "Images per forward.", buckets=_IMAGES)
        self.batch_seconds = histogram(
            "cgan_batch_duration_seconds", "Time of a forward, copies included.", buckets=_SECONDS
        )
        self.rejections = counter(
            "cgan_rejections_total", "Image requests answered with a problem.", ["reason"]
        )
        self.device_checks = counter(
            "cgan_device_checks_total",
            "Self-tests: passed, wrong, failed, or skipped while busy.",
            ["outcome"],
        )
        self.wasted_images = counter(
            "cgan_wasted_images_total",
            "Images computed but not sent: the client disconnected or the deadline passed.",
        )
        self.queue_images = gauge("cgan_queue_images", "Images admitted and not yet started.")
        self.queue_limit_images = gauge("cgan_queue_limit_images", "Limit of cgan_queue_images.")
        self.ready = gauge("cgan_ready", "Workers that accept new requests.")
        self.model_info = gauge(
            "cgan_model_info", "Always 1; the labels identify a loaded model.", ModelLabels._fields
        )
        self.model_quality = gauge(
            "cgan_model_quality",
            "From each model's certificate; higher is better, except for frechet_distance.",
            ["model", "metric"],
        )
        self.device_memory = gauge(
            "cgan_device_memory_bytes", "GPU memory: used, total.", ["device", "kind"]
        )
        self.devices_lost = counter(
            "cgan_devices_lost_total", "Devices that failed, which ends the process."
        )
        self.reloads = counter(
            "cgan_reloads_total",
            "Models loaded or removed while serving, and files that could not be loaded.",
            ["outcome"],
        )
        for outcome in ("loaded", "removed", "refused"):
            self.reloads.labels(outcome)  # increase() sees the first one only after a 0

    def write_snapshot(self) -> None:
        """Share the current values with the other workers.

        Call it once a second, before the worker reports that it is ready, and at the end.
        """
        if self._shared is not None:
            self._shared.write_snapshot()

    def model_loaded(self, labels: ModelLabels, certificate: Mapping[str, Any] | None) -> None:
        """Report a model and the quality in its certificate from now on."""
        self.model_info.labels(*labels).set(1)
        values = quality_values(certificate)
        for metric in QUALITY_METRICS:
            if metric in values:
                self.model_quality.labels(labels.model, metric).set(values[metric])
            else:  # the file that this one replaces may have had it
                self.model_quality.remove(labels.model, metric)

    def model_removed(self, labels: ModelLabels) -> None:
        """Stop reporting a model."""
        self.model_info.remove(*labels)

    def wasted(self, images: int) -> None:
        """Count images that were computed and are not sent."""
        self.wasted_images.inc(images)

    def batch(self, images: int, forward_s: float) -> None:
        """Count one forward."""
        self.batch_images.observe(images)
        self.batch_seconds.observe(forward_s)


def quality_values(certificate: Mapping[str, Any] | None) -> dict[str, float]:
    """Return the metrics of a certificate that are exported."""
    if certificate is None:
        return {}
    values = {name: certificate["generated"].get(name) for name in QUALITY_METRICS}
    gan_train = certificate.get("gan_train")
    if gan_train is not None:
        values["gan_train"] = mean(gan_train["accuracies"])
    return {name: float(value) for name, value in values.items() if value is not None}


class SupervisorMetrics:
    """The instruments of the process that keeps several workers running.

    Attributes:
        registry: the metrics of the supervisor and all workers, which share the folder.
    """

    def __init__(self, workers: int, folder: Path) -> None:
        own = CollectorRegistry()
        self._restarts = Counter(
            "cgan_worker_restarts_total",
            "Workers that exited while the service was running and were replaced.",
            registry=own,
        )
        Gauge("cgan_workers", "Number of workers to keep running.", registry=own).set(workers)
        self._shared = SharedMetrics(own, folder, "supervisor", _MAX_GAUGES)
        self._folder = folder
        self._shared.write_snapshot()
        self.registry: CollectorRegistry = _ExposedRegistry(self._shared)

    def worker_exited(self, worker: str) -> None:
        """Keep the counts of a worker, and drop its gauges."""
        mark_worker_dead(self._folder, worker)

    def count_restart(self) -> None:
        """Count a worker that exited and is replaced."""
        self._restarts.inc()
        self._shared.write_snapshot()
