"""Metrics that several processes share through files."""

import threading
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.gc_collector import GCCollector

from service.telemetry.multiprocess import SharedMetrics, mark_worker_dead


class Process:
    """The instruments of one process, of a name, in a folder."""

    def __init__(self, folder: Path, name: str) -> None:
        registry = CollectorRegistry()
        GCCollector(registry)
        self.count = Counter("done_total", "Done.", ["kind"], registry=registry)
        self.sizes = Histogram("size", "Sizes.", buckets=(1, 2), registry=registry)
        self.waiting = Gauge("waiting", "Waiting.", registry=registry)
        self.largest = Gauge("largest", "Largest.", registry=registry)
        self.shared = SharedMetrics(registry, folder, name, {"largest"})

    def scrape(self) -> dict[str, float]:
        text = generate_latest(self.shared).decode()
        lines = (line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
        return {name: float(value) for name, value in lines}


@pytest.fixture
def first(tmp_path: Path) -> Process:
    return Process(tmp_path, "0")


@pytest.fixture
def second(tmp_path: Path) -> Process:
    return Process(tmp_path, "1")


def test_any_process_returns_the_sum_of_all(first: Process, second: Process) -> None:
    first.count.labels('a"\n').inc(2)
    first.sizes.observe(1.5)
    first.waiting.set(3)
    first.largest.set(3)
    second.count.labels('a"\n').inc(5)
    second.count.labels("b").inc()
    second.sizes.observe(0.5)
    second.waiting.set_function(lambda: 4)
    second.largest.set(4)
    first.shared.write_snapshot()
    second.shared.write_snapshot()
    for process in (first, second):
        found = process.scrape()
        assert found['done_total{kind="a\\"\\n"}'] == 7
        assert found['done_total{kind="b"}'] == 1
        assert found['size_bucket{le="1.0"}'] == 1
        assert found['size_bucket{le="2.0"}'] == found['size_bucket{le="+Inf"}'] == 2
        assert (found["size_count"], found["size_sum"]) == (2, 2.0)
        assert (found["waiting"], found["largest"]) == (7, 4)
        assert not any("_created" in name for name in found)


def test_metrics_about_a_process_are_labelled_by_worker(first: Process, second: Process) -> None:
    first.shared.write_snapshot()
    names = [name for name in second.scrape() if name.startswith("python_gc_collections_total")]
    for worker in ("0", "1"):
        assert sum(f'worker="{worker}"' in name for name in names) == 3  # generations


def test_no_scrape_of_another_process_shows_less(first: Process, second: Process) -> None:
    first.shared.write_snapshot()
    first.count.labels("a").inc()
    assert first.scrape()['done_total{kind="a"}'] == 1
    assert second.scrape()['done_total{kind="a"}'] == 1


def test_an_ended_process_leaves_its_counts_and_no_gauge(
    first: Process, second: Process, tmp_path: Path
) -> None:
    first.count.labels("a").inc(2)
    first.sizes.observe(1)
    first.waiting.set(1)
    first.shared.write_snapshot()
    mark_worker_dead(tmp_path, "0")
    found = second.scrape()
    assert (found['done_total{kind="a"}'], found["size_count"], found["waiting"]) == (2, 1, 0)
    assert not any('worker="0"' in name for name in found)


def test_a_replacement_continues_the_counts_of_its_predecessors(
    first: Process, second: Process, tmp_path: Path
) -> None:
    process = first
    for generation in range(1, 4):
        process.count.labels("a").inc(2)
        process.shared.write_snapshot()
        mark_worker_dead(tmp_path, "0")
        process = Process(tmp_path, "0")
        assert second.scrape()['done_total{kind="a"}'] == 2 * generation
        assert process.scrape()['done_total{kind="a"}'] == 2 * generation
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.prom", "1.prom"]


def test_a_process_that_ends_before_its_first_snapshot_leaves_nothing(
    second: Process, tmp_path: Path
) -> None:
    mark_worker_dead(tmp_path, "0")
    assert second.scrape()["waiting"] == 0


def test_no_reader_sees_half_of_a_snapshot(first: Process, second: Process) -> None:
    for label in range(50):
        first.count.labels(str(label)).inc()
    first.shared.write_snapshot()

    def write() -> None:
        for _ in range(10):
            first.shared.write_snapshot()

    threads = [threading.Thread(target=write) for _ in range(2)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert sum(name.startswith("done_total{") for name in second.scrape()) == 50
    for thread in threads:
        thread.join()
