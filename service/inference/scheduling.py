"""Scheduling of one engine's requests, as pure functions of the queue: no clock, lock or thread.

A row is one image to generate: (seed, index, label) and the sampling options of its request.
"""

import asyncio
import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from service.inference.engine import Engine
from service.inference.errors import DeviceLost, ForwardFailed
from service.inference.latents import RowOptions, SamplingOptions

SMALL_REQUEST_ROWS = 16  # a request of at most this many rows is small
ROWS_PER_WAITING_REQUEST = 8  # added to the size of the next batch for each waiting request
# Target duration of a forward under light load: 1.5 ms, or twice a forward of small requests if
# that is longer. A new request then waits for at most two forwards, its own included.
TARGET_FORWARD_S, TARGET_FORWARD_FACTOR = 0.0015, 2.0
MIN_SPLIT_ROWS = 64  # fewer rows are not split: that would about double their time
EMA_ALPHA = 0.2  # weight of the newest batch in the moving averages


@dataclass(slots=True, weakref_slot=True, eq=False)
class BatchRecord:
    """One computed batch, which requests may share; times are those of `perf_counter`."""

    rows: int
    started_at: float
    done_at: float


@dataclass(slots=True)
class GenerationResult:
    """The images of one request and the time they took."""

    pixels: NDArray[np.uint8]  # (n, H, W, C), in the order of the request's rows
    queue_s: float  # from admission until the first row started in a forward
    forward_s: float  # from there until the last row was done
    forwards: Sequence[BatchRecord] = ()  # the batches with rows of the request, in their order


@dataclass(slots=True, eq=False)
class PendingRequest:
    """An admitted request. Cancelling `future` withdraws it."""

    engine: Engine
    queue: "EngineQueue"
    seeds: NDArray[np.uint64]  # (n,)
    indices: NDArray[np.int64]  # (n,)
    labels: NDArray[np.int64]  # (n,)
    options: SamplingOptions | None
    rows: int
    future: "asyncio.Future[GenerationResult]"
    timeout_s: float
    admitted_at: float
    next_row: int = 0  # the first row that is not in a batch yet
    rows_done: int = 0  # computed before the request was cancelled
    cancelled: bool = False  # withdrawn by the caller, or failed
    forwards: tuple[BatchRecord, ...] = ()
    pixels: NDArray[np.uint8] | None = None  # (n, H, W, C); views of a batch if one holds all rows


class Slice(NamedTuple):
    """Rows start:stop of a request: its part of one batch."""

    request: PendingRequest
    start: int
    stop: int


class Batch(NamedTuple):
    """Slices of one engine's requests."""

    queue: "EngineQueue"
    engine: Engine
    size: int  # number of rows that would have made a full batch
    slices: list[Slice]  # at most one per request

    def halves(self) -> "tuple[Batch, ...]":
        """Return two batches of half the rows, or none if there is only one row."""
        middle = sum(stop - start for _, start, stop in self.slices) // 2
        if not middle:
            return ()
        first: list[Slice] = []
        second: list[Slice] = []
        for request, start, stop in self.slices:
            cut = min(stop, start + middle)
            middle -= cut - start
            if cut > start:
                first.append(Slice(request, start, cut))
            if stop > cut:
                second.append(Slice(request, cut, stop))
        return self._replace(slices=first), self._replace(slices=second)

    def placed_slices(self) -> Iterator[tuple[slice, Slice]]:
        """Yield the slices, each after its place in the batch."""
        end = 0
        for part in self.slices:
            begin, end = end, end + part.stop - part.start
            yield slice(begin, end), part

    def slices_with(self, rows: NDArray[np.bool_]) -> list[Slice]:
        """Return the slices that contain any of the selected rows (B,)."""
        return [part for place, part in self.placed_slices() if rows[place].any()]

    def columns(self) -> tuple[NDArray[np.uint64], NDArray[np.int64], NDArray[np.int64]]:
        """Return seeds (B,), indices (B,) and labels (B,)."""
        slices = self.slices
        return (
            np.concatenate([request.seeds[start:stop] for request, start, stop in slices]),
            np.concatenate([request.indices[start:stop] for request, start, stop in slices]),
            np.concatenate([request.labels[start:stop] for request, start, stop in slices]),
        )

    def row_options(self) -> list[RowOptions]:
        """Return the sampling options of the rows that have any."""
        return [
            RowOptions(place, slice(start, stop), request.options)
            for place, (request, start, stop) in self.placed_slices()
            if request.options is not None
        ]


Outcome = tuple["asyncio.Future[GenerationResult]", GenerationResult | ForwardFailed | DeviceLost]


@dataclass(slots=True, eq=False)
class EngineQueue:
    """The waiting requests of one engine, and the measured cost of its rows.

    Small requests precede large ones. While both wait, each kind gets half of every batch. Within
    its kind a request is served in the order of arrival, so a later arrival never takes time from
    one that was admitted because it could meet its deadline.
    """

    small: deque[PendingRequest] = field(default_factory=deque)  # up to SMALL_REQUEST_ROWS rows
    large: deque[PendingRequest] = field(default_factory=deque)
    small_rows: int = 0  # queued
    queued_rows: int = 0  # of small and large requests
    # Seconds per row of full batches, for the forward alone and from one batch to the next; None
    # until measured.
    forward_row_s: float | None = None
    row_s: float | None = None
    small_batch_s: float = 0.0  # seconds of a forward of small requests; 0 until measured
    forwards: int = 0  # successful ones

    def estimated_completion_s(self, rows: int) -> float:
        """Return the seconds until a new request would be done; 0 without measurements."""
        if rows <= SMALL_REQUEST_ROWS:
            rows += self.small_rows
            rows += min(rows, self.queued_rows - self.small_rows)  # of large ones, in turn
        else:
            rows += self.queued_rows - self.small_rows
            rows *= 2  # small ones may arrive and take half of every batch
        return rows * (self.row_s or 0.0)

    def add(self, request: PendingRequest) -> None:
        """Append a request."""
        if request.rows <= SMALL_REQUEST_ROWS:
            self.small.append(request)
            self.small_rows += request.rows
        else:
            self.large.append(request)
        self.queued_rows += request.rows

    def remove(self, request: PendingRequest) -> None:
        """Remove the rows of a request that are not in a batch yet, in time linear in the queue."""
        rows = request.rows - request.next_row
        if not rows:
            return
        request.next_row = request.rows
        self.queued_rows -= rows
        if request.rows <= SMALL_REQUEST_ROWS:
            self.small_rows -= rows
            self.small.remove(request)
        else:
            self.large.remove(request)

    def batch_size(self, max_batch: int, *, overloaded: bool) -> int:
        """Return the size of the next batch.

        Large batches cost less per row, and with many requests waiting nobody waits longer for
        them. With few, a request that arrives now has to wait for the end of the batch. While the
        queue is overloaded, most arrivals are rejected, so admitted requests are not split for
        their sake. Large requests that small ones wait with get at most as many rows as these. No
        small remainder is left, which would take about as long as a batch.
        """
        if self.small and self.large:
            size = max(SMALL_REQUEST_ROWS, 2 * self.small_rows)
        elif overloaded:
            size = max_batch
        else:
            target_s = max(TARGET_FORWARD_S, TARGET_FORWARD_FACTOR * self.small_batch_s)
            quanta = target_s / (self.forward_row_s or target_s) / SMALL_REQUEST_ROWS
            waiting = len(self.small) + len(self.large)
            size = max(math.ceil(quanta) * SMALL_REQUEST_ROWS, ROWS_PER_WAITING_REQUEST * waiting)
        if size < self.queued_rows <= max(MIN_SPLIT_ROWS, size + size // 2):
            size = self.queued_rows
        return min(max_batch, size)

    def take_batch(self, *, overloaded: bool) -> Batch:
        """Remove the next batch from a queue that is not empty, one slice per request."""
        engine = (self.small or self.large)[0].engine
        size = self.batch_size(engine.max_batch, overloaded=overloaded)
        starts: dict[PendingRequest, int] = {}
        small = _take(self.small, size - size // 2 if self.large else size, starts)
        large = _take(self.large, size - small, starts)
        small += _take(self.small, size - small - large, starts)
        self.small_rows -= small
        self.queued_rows -= small + large
        slices = [Slice(request, start, request.next_row) for request, start in starts.items()]
        return Batch(self, engine, size, slices)

    def record(self, rows: int, size: int, *, forward_s: float, total_s: float) -> None:
        """Learn from a successful forward of some rows, where `size` would have been a full batch.

        `forward_s` is the time of the forward alone, and `total_s` that since the end of the batch
        before it, or since the arrival of work.
        """
        self.forwards += 1
        self.forward_row_s = _update_row_s(self.forward_row_s, rows, size, forward_s)
        self.row_s = _update_row_s(self.row_s, rows, size, total_s)
        if rows <= SMALL_REQUEST_ROWS:
            self.small_batch_s = _update_ema(self.small_batch_s or forward_s, forward_s)


def _take(waiting: deque[PendingRequest], room: int, starts: dict[PendingRequest, int]) -> int:
    """Take up to `room` rows of requests in turn; note the first row of each, return the count."""
    left = room
    while left and waiting:
        request = waiting[0]
        starts.setdefault(request, request.next_row)
        rows = min(left, request.rows - request.next_row)
        left -= rows
        request.next_row += rows
        if request.next_row == request.rows:
            waiting.popleft()
    return room - left


def _update_ema(average: float, newest: float) -> float:
    return average + EMA_ALPHA * (newest - average)


def _update_row_s(row_s: float | None, rows: int, size: int, spent_s: float) -> float | None:
    """Return the updated cost of a row in a busy engine.

    A forward of fixed shape takes as long for one row as for all, so a batch that is not full only
    proves that a row costs no more than this. Without that rule, light traffic would look like a
    slow engine, and the first burst would be rejected.
    """
    newest_s = spent_s / rows
    if row_s is None:
        return newest_s if rows == size else None
    return _update_ema(row_s, newest_s) if rows == size or newest_s < row_s else row_s


def scatter(batch: Batch, pixels: NDArray[np.uint8], record: BatchRecord) -> list[Outcome]:
    """Hand the pixels (B, H, W, C) of a batch to its requests; return those that are complete.

    A request that one batch holds gets a view, a split request a copy.
    """
    outcomes: list[Outcome] = []
    for place, (request, start, stop) in batch.placed_slices():
        if request.cancelled:
            continue
        request.forwards += (record,)
        if stop - start == request.rows:
            request.pixels = pixels[place]
        else:
            if request.pixels is None:
                request.pixels = np.empty((request.rows, *pixels.shape[1:]), np.uint8)
            request.pixels[start:stop] = pixels[place]
        if stop == request.rows:
            started_at = request.forwards[0].started_at
            queue_s, forward_s = started_at - request.admitted_at, record.done_at - started_at
            result = GenerationResult(request.pixels, queue_s, forward_s, request.forwards)
            outcomes.append((request.future, result))
    return outcomes
