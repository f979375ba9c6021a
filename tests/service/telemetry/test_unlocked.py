"""Counters and histograms without locks, beside those of prometheus_client."""

import prometheus_client
import pytest
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest

from service.telemetry.unlocked import UnlockedCounter, UnlockedHistogram

BOUNDS = (0.5, 1, 2.5)
VALUES = (0.0, 0.5, 0.500001, 1, 2.5, 2.6, 1e9)


@pytest.fixture(autouse=True)
def _no_creation_times() -> None:
    prometheus_client.disable_created_metrics()


def test_a_scrape_is_that_of_the_instruments_with_locks() -> None:
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    counters = (
        UnlockedCounter("done_total", "Done.", ["kind", "status"], ours),
        Counter("done_total", "Done.", ["kind", "status"], registry=theirs),
    )
    histograms = (
        UnlockedHistogram("took_seconds", "Took.", ["stage"], ours, BOUNDS),
        Histogram("took_seconds", "Took.", ["stage"], registry=theirs, buckets=BOUNDS),
    )
    assert generate_latest(ours) == generate_latest(theirs)
    for counter in counters:
        counter.labels('a"\n', 200).inc()
        counter.labels('a"\n', "200").inc(2)
        counter.labels("b", 404)
    for histogram in histograms:
        for value in VALUES:
            histogram.labels("queue").observe(value)
        histogram.labels("encode")
    text = generate_latest(ours)
    assert text == generate_latest(theirs)
    assert b'took_seconds_bucket{le="2.5",stage="queue"} 5.0\n' in text
    assert b'done_total{kind="a\\"\\n",status="200"} 3.0\n' in text


def test_a_scrape_has_every_value_that_was_counted_before() -> None:
    registry = CollectorRegistry()
    count = UnlockedCounter("done_total", "Done.", ["kind"], registry).labels("a")
    for expected in (1.0, 2.0):
        count.inc()
        assert registry.get_sample_value("done_total", {"kind": "a"}) == expected
