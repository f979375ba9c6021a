"""What Prometheus scrapes: one registry per app, base units, bounded labels, histograms."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.gc_collector import GCCollector
from prometheus_client.process_collector import ProcessCollector

_SECONDS = (
    *(0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05),
    *(0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0),
)
_ROWS = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256, 512, 1024, 2048, 4096)


class Metrics:
    """The instruments of one app."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        GCCollector(registry=self.registry)
        self.requests = Counter(
            "cgan_requests_total",
            "Requests answered, by route template, method and status.",
            ["route", "method", "status"],
            registry=self.registry,
        )
        self.request_seconds = Histogram(
            "cgan_request_duration_seconds",
            "Time from a request's arrival to the last byte of its answer.",
            ["route"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.requests_in_progress = Gauge(
            "cgan_requests_in_progress", "Requests that are being answered.", registry=self.registry
        )
        self.stage_seconds = Histogram(
            "cgan_stage_duration_seconds",
            "Where an image request spends its time: queue, forward or encode.",
            ["stage"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.batch_rows = Histogram(
            "cgan_batch_rows",
            "Images of each forward.",
            buckets=_ROWS,
            registry=self.registry,
        )
        self.batch_seconds = Histogram(
            "cgan_batch_duration_seconds",
            "Time of each forward, copies included.",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.images = Counter(
            "cgan_images_total",
            "Images sent, by model and class index.",
            ["model", "label"],
            registry=self.registry,
        )
        self.rejections = Counter(
            "cgan_rejections_total",
            "Image requests that ended without an image, by the kind of problem.",
            ["reason"],
            registry=self.registry,
        )
        self.queue_rows = Gauge(
            "cgan_queue_rows", "Images admitted and not yet started.", registry=self.registry
        )
        self.ready = Gauge(
            "cgan_ready", "1 while new work is taken, 0 while draining.", registry=self.registry
        )
        self.model = Gauge(
            "cgan_model_info",
            "Always 1; its labels say which models are loaded.",
            ["model", "sha256", "device", "dtype"],
            registry=self.registry,
        )

    def observe_queue(self, rows: Callable[[], float]) -> None:
        """Read the queue's length whenever it is scraped."""
        self.queue_rows.set_function(rows)

    def batch(self, rows: int, forward_s: float) -> None:
        """Count one forward."""
        self.batch_rows.observe(rows)
        self.batch_seconds.observe(forward_s)
