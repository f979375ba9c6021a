"""The queue of one engine: the size of a batch, its slices, and the cost of a row."""

import asyncio
from collections.abc import Iterator

import numpy as np
import pytest

from service.inference.latents import SamplingOptions
from service.inference.scheduling import (
    MIN_SPLIT_ROWS,
    ROWS_PER_WAITING_REQUEST,
    SMALL_REQUEST_ROWS,
    TARGET_FORWARD_FACTOR,
    TARGET_FORWARD_S,
    BatchRecord,
    EngineQueue,
    PendingRequest,
    scatter,
)
from tests.support.engines import EngineStub, paint_rows

ENGINE = EngineStub(max_batch=256)


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


@pytest.fixture
def queue() -> EngineQueue:
    return EngineQueue()


def add(
    queue: EngineQueue,
    loop: asyncio.AbstractEventLoop,
    *sizes: int,
    options: SamplingOptions | None = None,
) -> list[PendingRequest]:
    requests = []
    for rows in sizes:
        seeds, numbers = np.full(rows, 5, np.uint64), np.arange(rows)
        request = PendingRequest(
            ENGINE, queue, seeds, numbers, numbers, options, rows, loop.create_future(), 9.0, 0.0
        )
        queue.add(request)
        requests.append(request)
    return requests


@pytest.mark.parametrize(
    ("sizes", "overloaded", "expected"),
    [
        ([1], False, 16),
        ([100], False, SMALL_REQUEST_ROWS),
        ([100], True, 256),
        ([MIN_SPLIT_ROWS], False, MIN_SPLIT_ROWS),
        ([100] * 9, False, 9 * ROWS_PER_WAITING_REQUEST),
        ([100] * 99, False, 256),
        ([100, 3], False, SMALL_REQUEST_ROWS),
        ([100, 16, 16], False, 64),
        ([100, 3], True, SMALL_REQUEST_ROWS),
    ],
)
def test_the_size_of_a_batch_depends_on_the_requests_that_wait(
    queue: EngineQueue,
    loop: asyncio.AbstractEventLoop,
    sizes: list[int],
    overloaded: bool,
    expected: int,
) -> None:
    add(queue, loop, *sizes)
    assert queue.batch_size(ENGINE.max_batch, overloaded=overloaded) == expected


def test_a_batch_takes_about_the_target_duration(
    queue: EngineQueue, loop: asyncio.AbstractEventLoop
) -> None:
    add(queue, loop, 1000)
    row_s = TARGET_FORWARD_S / 40
    queue.record(64, 64, forward_s=64 * row_s, total_s=64 * row_s)
    assert queue.batch_size(256, overloaded=False) == 48  # a multiple of 16
    queue.record(1, 16, forward_s=TARGET_FORWARD_S, total_s=TARGET_FORWARD_S)
    assert queue.batch_size(256, overloaded=False) == TARGET_FORWARD_FACTOR * 40


def test_only_a_full_batch_proves_what_a_row_costs(queue: EngineQueue) -> None:
    queue.record(1, 10, forward_s=1.0, total_s=2.0)
    assert (queue.forward_row_s, queue.row_s) == (None, None)
    queue.record(10, 10, forward_s=1.0, total_s=2.0)
    assert (queue.forward_row_s, queue.row_s) == (0.1, 0.2)
    queue.record(1, 10, forward_s=1.0, total_s=2.0)
    assert (queue.forward_row_s, queue.row_s) == (0.1, 0.2)
    queue.record(5, 10, forward_s=0.1, total_s=0.1)  # cheaper than assumed
    assert queue.forward_row_s == pytest.approx(0.1 - 0.2 * 0.08)
    assert queue.row_s == pytest.approx(0.2 - 0.2 * 0.18)


def test_the_completion_of_a_request_is_estimated_from_what_precedes_it(
    queue: EngineQueue, loop: asyncio.AbstractEventLoop
) -> None:
    add(queue, loop, 10, 100)
    assert queue.estimated_completion_s(5) == 0.0
    queue.row_s = 1.0
    assert queue.estimated_completion_s(5) == 5 + 10 + 15  # as many of the large one, in turn
    assert queue.estimated_completion_s(50) == 2 * (50 + 100)  # small ones may arrive


def test_a_batch_is_halved_by_rows(queue: EngineQueue, loop: asyncio.AbstractEventLoop) -> None:
    first, second = add(queue, loop, 3, 6)
    batch = queue.take_batch(overloaded=False)
    left, right = batch.halves()
    assert left.slices == [(first, 0, 3), (second, 0, 1)]
    assert right.slices == [(second, 1, 6)]
    (lone,) = add(queue, loop, 1)
    batch = queue.take_batch(overloaded=False)
    assert batch.slices == [(lone, 0, 1)]
    assert batch.halves() == ()


def test_rows_of_a_batch_belong_to_their_requests(
    queue: EngineQueue, loop: asyncio.AbstractEventLoop
) -> None:
    options = SamplingOptions(truncation=0.5)
    (plain,) = add(queue, loop, 3)
    (other,) = add(queue, loop, 4, options=options)
    batch = queue.take_batch(overloaded=False)
    assert (queue.queued_rows, queue.small_rows) == (0, 0)
    assert batch.row_options() == [(slice(3, 7), slice(0, 4), options)]
    assert batch.slices_with(np.arange(7) == 2) == [(plain, 0, 3)]
    assert batch.slices_with(np.arange(7) > 5) == [(other, 0, 4)]
    seeds, indices, labels = batch.columns()
    assert indices.tolist() == labels.tolist() == [0, 1, 2, 0, 1, 2, 3]

    plain.cancelled = True
    pixels = paint_rows(seeds, indices, labels)
    ((future, result),) = scatter(batch, pixels, BatchRecord(7, 2.0, 5.0))
    assert future is other.future
    assert not isinstance(result, Exception)
    assert (result.queue_s, result.forward_s) == (2.0, 3.0)
    assert np.array_equal(result.pixels, pixels[3:])


def test_what_is_removed_leaves_the_others_in_their_order(
    queue: EngineQueue, loop: asyncio.AbstractEventLoop
) -> None:
    first, second, third = add(queue, loop, 2, 100, 4)
    queue.remove(first)
    queue.remove(second)
    assert (queue.queued_rows, queue.small_rows) == (4, 4)
    assert queue.take_batch(overloaded=False).slices == [(third, 0, 4)]
    queue.remove(third)  # all of it is in a batch
    assert (queue.queued_rows, queue.small_rows) == (0, 0)
