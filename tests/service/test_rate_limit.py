from pathlib import Path
from threading import Thread

import pytest

from service.errors import Problem
from service.middleware.auth import create_buckets
from service.rate_limit import TokenBucket, burst_limit, consume
from service.settings import parse_settings
from service.telemetry.metrics import Metrics

REJECTED = Metrics().rejections.labels("rate-limited")


class Clock:
    """A clock that stands still until a test advances it."""

    def __init__(self) -> None:
        self.now = 1e6 / 7

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def retry_after(bucket: TokenBucket, images: int) -> int:
    with pytest.raises(Problem) as caught:
        bucket.consume(images)
    assert caught.value.status == 429
    assert f"retry in {caught.value.headers['Retry-After']} s" in caught.value.detail
    return int(caught.value.headers["Retry-After"])


def test_the_bucket_refills_at_its_rate_and_no_further(clock: Clock) -> None:
    bucket = TokenBucket(3.0, 10, REJECTED, clock=clock)
    bucket.consume(10)
    assert retry_after(bucket, 10) == 4
    assert retry_after(bucket, 1) == 1
    clock.now += 1.01  # three are available again: rejected requests took none
    assert retry_after(bucket, 4) == 1
    bucket.consume(3)
    clock.now += 1000
    bucket.consume(10)
    assert retry_after(bucket, 1) == 1


@pytest.mark.parametrize("rate", [0.3, 3.0, 7.0, 1e3 / 7])
def test_a_full_bucket_always_holds_its_burst(clock: Clock, rate: float) -> None:
    bucket = TokenBucket(rate, 10, REJECTED, clock=clock)
    for _ in range(100):
        bucket.consume(10)
        clock.now += 11 / rate


def test_more_than_the_burst_is_422(clock: Clock) -> None:
    with pytest.raises(Problem) as caught:
        TokenBucket(3.0, 10, REJECTED, clock=clock).consume(11)
    assert caught.value.status == 422


def test_buckets_of_one_file_share_their_images(clock: Clock, tmp_path: Path) -> None:
    buckets = [TokenBucket(1.0, 40, REJECTED, tmp_path / "alice", clock) for _ in range(4)]
    taken: list[int] = []

    def take(bucket: TokenBucket) -> None:
        for _ in range(20):
            try:
                bucket.consume(1)
            except Problem:
                continue
            taken.append(1)

    threads = [Thread(target=take, args=(bucket,)) for bucket in buckets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(taken) == 40
    assert retry_after(TokenBucket(1.0, 40, REJECTED, tmp_path / "alice", clock), 5) == 5


def test_each_key_has_its_own_limit_or_that_of_the_settings() -> None:
    keys = f"alice:{'a' * 16},bob:{'b' * 16}:2"
    settings = parse_settings(["--api-keys", keys, "--burst-images", "5"])
    buckets = create_buckets(settings, Metrics(), None)
    assert [key.name for key in buckets] == ["alice", "bob"]
    alice, bob = buckets.values()
    assert alice is None
    for bucket in (alice, bob):
        scope = {"state": {"token_bucket": bucket}}
        consume(scope, 5)
        assert burst_limit(scope) == (float("inf") if bucket is None else 5)
    with pytest.raises(Problem):
        consume({"state": {"token_bucket": bob}}, 5)
