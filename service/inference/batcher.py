"""Dynamic batching: merge the rows of concurrent requests into batches for an engine.

Requests are admitted on the event loop. One thread, named "engine", computes batch after batch,
each of the rows that wait when the batch before it is done: nothing here sleeps, polls or delays a
batch in the hope of more.

    wait for work -> take a batch, small requests first -> forward -> scatter -> resolve futures

A lock covers the queues only. It is held to admit, to take a batch and to withdraw, never during a
forward. Futures belong to the event loop and are only touched there.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from threading import Condition, Lock, Thread
from time import perf_counter
from typing import Protocol
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from service.inference import errors
from service.inference.engine import Engine
from service.inference.latents import SamplingOptions
from service.inference.scheduling import (
    SMALL_REQUEST_ROWS,
    Batch,
    BatchRecord,
    EngineQueue,
    GenerationResult,
    Outcome,
    PendingRequest,
    Slice,
    scatter,
)

# Admit a request only if it should finish within 80 % of its deadline; the rest absorbs estimation
# error.
DEADLINE_UTILISATION = 0.8
MIN_RETRY_AFTER_S = 0.01

_UINT64, _INT64 = np.dtype(np.uint64), np.dtype(np.int64)


class Observer(Protocol):
    """Receiver of the counts that metrics are made of."""

    def batch(self, rows: int, forward_s: float) -> None:
        """Count a successful forward. Called between two forwards, so it must be quick."""
        ...

    def wasted(self, rows: int) -> None:
        """Count rows that were computed for cancelled requests. Called from any thread."""
        ...


class Batcher:
    """A queue of requests, and the thread that computes them batch by batch.

    Args:
        max_queue: maximum number of rows, over all engines, that are admitted and not yet started;
            small requests may exceed it by an eighth.
        timeout_s: maximum duration of a request, from admission to its last row.
        observer: counts batches and wasted rows.
    """

    def __init__(self, max_queue: int, timeout_s: float, observer: Observer) -> None:
        self._max_queue = max_queue
        self._timeout_s = timeout_s
        self._observer = observer
        self._thread: Thread | None = None
        self._stopped = asyncio.Event()
        self._lock = Lock()
        self._work = Condition(self._lock)  # notified when an empty queue gets work
        # Under the lock:
        self._accepting = False
        self._lost: errors.DeviceLost | None = None
        self._queues: WeakKeyDictionary[Engine, EngineQueue] = WeakKeyDictionary()
        self._ready_queues: deque[EngineQueue] = deque()  # with work, in the order of their turns
        self._overloaded = False  # a request was rejected since the queues were last empty
        # Written by the engine thread between forwards; read for estimates.
        self._running_until = 0.0  # when the current batch should be done, by perf_counter
        self._ready_at = 0.0  # since when there has been work and no forward

    def start(self, on_device_lost: Callable[[errors.DeviceLost], object] | None = None) -> None:
        """Start to admit requests, on the running event loop. Call this once.

        Args:
            on_device_lost: called on the event loop when an engine raises `DeviceLost`. By then all
                waiting requests are rejected; new ones are rejected from then on.
        """
        self._loop = asyncio.get_running_loop()
        self._on_device_lost = on_device_lost
        self._accepting = True
        self._thread = Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    async def close(self) -> None:
        """Reject new requests, finish the admitted ones, and end the thread."""
        with self._lock:
            self._accepting = False
            self._work.notify()
        if self._thread is not None:
            await self._stopped.wait()
            self._thread.join()  # returns at once: setting the event is the thread's last act

    def fail_all(self, error: errors.DeviceLost) -> None:
        """Reject all waiting and all new requests. Call this on the event loop."""
        _resolve_futures(self._fail_all([], error))

    @property
    def queued_rows(self) -> int:
        """Rows that are admitted and not yet started; readable from any thread."""
        with self._lock:
            return sum(queue.queued_rows for queue in self._ready_queues)

    def forwards(self, engine: Engine) -> int:
        """Return the number of batches that an engine has computed."""
        queue = self._queues.get(engine)
        return 0 if queue is None else queue.forwards

    async def wait(self, request: PendingRequest) -> GenerationResult:
        """Return the images of an admitted request. Call this once per request.

        Cancelling this call, or the request, withdraws the rows that are not started.

        Raises:
            DeadlineExceeded: the deadline passed; rows that are not started are never computed.
            ForwardFailed: the engine failed on some of the rows; the others are dropped.
            DeviceLost: the device failed, with everything that waited for it.
        """
        future = request.future
        timer = self._loop.call_later(request.timeout_s, _expire, request)
        try:
            return await future
        except BaseException:
            with self._lock:
                self._withdraw(request)
            raise
        finally:
            timer.cancel()
            # An exception holds this frame by its traceback, and the future holds the exception.
            del request, future

    def admit(
        self,
        engine: Engine,
        seeds: NDArray[np.uint64],  # (n,), n >= 1
        indices: NDArray[np.int64],  # (n,)
        labels: NDArray[np.int64],  # (n,)
        timeout_s: float | None = None,  # if shorter than the batcher's
        options: SamplingOptions | None = None,
    ) -> PendingRequest:
        """Queue one row per image. Call this on the event loop; the arrays must not change.

        Raises:
            ValueError: the arrays have wrong shapes or types.
            DeviceLost: a device failed.
            Draining: the batcher is shutting down or was never started.
            Overloaded: the queue has no room, or not enough time, for the request.
        """
        _check_rows(seeds, indices, labels)
        rows = len(seeds)
        timeout_s = self._timeout_s if timeout_s is None else min(timeout_s, self._timeout_s)
        now = perf_counter()
        with self._lock:
            if not self._accepting:
                raise self._lost or errors.Draining("no new requests are admitted")
            queue = self._queues.get(engine)
            if queue is None:
                queue = self._queues[engine] = EngineQueue()
            error = self._admission_error(queue, rows, timeout_s, now)
            if error is not None:
                self._overloaded = True
                raise error

            future: asyncio.Future[GenerationResult] = self._loop.create_future()
            request = PendingRequest(
                engine, queue, seeds, indices, labels, options, rows, future, timeout_s, now
            )
            if not self._ready_queues:
                self._overloaded = False
                self._work.notify()
            if not queue.queued_rows:
                self._ready_queues.append(queue)
            queue.add(request)
        return request

    def _admission_error(
        self, queue: EngineQueue, rows: int, timeout_s: float, now: float
    ) -> errors.Overloaded | None:
        """Return an error unless `rows` more fit the queue and can meet their deadline.

        With an empty queue the deadline does not count: only another forward corrects an estimate
        that is too slow. A request of more than `max_queue` rows never fits.
        """
        queued = sum(other.queued_rows for other in self._ready_queues)
        if not queued and rows <= self._max_queue:
            return None
        extra = self._max_queue // 8 if rows <= SMALL_REQUEST_ROWS else 0
        excess = queued + rows - self._max_queue - extra
        busy = len(self._ready_queues) + (queue not in self._ready_queues)  # queues that take turns
        running_s = max(0.0, self._running_until - now)
        completion_s = running_s + busy * queue.estimated_completion_s(rows)
        late_s = completion_s - DEADLINE_UTILISATION * timeout_s
        if excess <= 0 and late_s <= 0.0:
            return None

        retry_after_s = self._timeout_s  # by then every waiting request is answered or expired
        backlog_s = sum(other.queued_rows * (other.row_s or 0.0) for other in self._ready_queues)
        if backlog_s > 0.0:
            fits_s = running_s + backlog_s * min(1.0, excess / queued) if excess > 0 else 0.0
            retry_after_s = min(retry_after_s, max(fits_s, late_s))
        return errors.Overloaded(max(retry_after_s, MIN_RETRY_AFTER_S))

    def _withdraw(self, request: PendingRequest) -> None:
        """Drop the rows of a request that are not started; called under the lock."""
        if request.cancelled:
            return
        request.cancelled = True
        if request.rows_done:
            self._observer.wasted(request.rows_done)
        request.queue.remove(request)
        if not request.queue.queued_rows and request.queue in self._ready_queues:
            self._ready_queues.remove(request.queue)

    def _run(self) -> None:
        """Compute batches until the batcher is closed and its queues are empty."""
        try:
            while not self._loop.is_closed() and self._wait_for_work():
                self.run_next_batch()
        finally:
            self._call_on_loop(self._stopped.set)

    def _wait_for_work(self) -> bool:
        """Return True when there is work, and False when the batcher is drained."""
        with self._lock:
            while not self._ready_queues:
                if not self._accepting:
                    return False
                self._work.wait()
                self._ready_at = perf_counter()
        return True

    def run_next_batch(self) -> None:
        """Run one batch if a request is queued; called by the engine thread.

        No local of this call is alive while the thread waits for work, so an idle thread keeps
        neither an engine nor pixels in memory.
        """
        with self._lock:
            if not self._ready_queues:
                return
            queue = self._ready_queues.popleft()
            batch = queue.take_batch(overloaded=self._overloaded)
            if queue.queued_rows:
                self._ready_queues.append(queue)

        outcomes = self._compute(batch)
        if outcomes:
            self._call_on_loop(_resolve_futures, outcomes)
        # An exception holds this frame by its traceback, and the slices hold the exception.
        batch.slices.clear()
        del outcomes

    def _compute(self, batch: Batch, *, retry: bool = True) -> list[Outcome]:
        """Run one batch, as two halves if it does not fit; return what it completed or failed."""
        try:
            return self._forward(batch)
        except errors.OutOfMemory as error:
            halves = batch.halves() if retry else ()
            if not halves:
                return self._fail_requests(batch.slices, error)
            outcomes: list[Outcome] = []
            for half in halves:
                outcomes += self._compute(half, retry=False)
            return outcomes
        except errors.DeviceLost as error:
            return self._fail_all(batch.slices, error)
        except Exception as error:
            return self._fail_requests(batch.slices, error)

    def _forward(self, batch: Batch) -> list[Outcome]:
        seeds, indices, labels = batch.columns()
        rows = len(seeds)

        started_at = perf_counter()
        self._running_until = started_at + rows * (batch.queue.forward_row_s or 0.0)
        corrupt: errors.CorruptRows | None = None
        try:
            pixels = batch.engine(seeds, indices, labels, batch.row_options())  # (B, H, W, C)
        except errors.CorruptRows as error:
            corrupt, pixels = error, error.pixels
        done_at = perf_counter()
        if pixels.ndim != 4 or len(pixels) != rows or pixels.dtype != np.uint8:
            raise ValueError(
                f"the engine returned {pixels.dtype} {pixels.shape} for {rows} rows; "
                f"expected uint8 ({rows}, H, W, C)"
            )
        forward_s, total_s = done_at - started_at, done_at - self._ready_at
        batch.queue.record(rows, batch.size, forward_s=forward_s, total_s=total_s)
        self._ready_at = done_at
        self._observer.batch(rows, forward_s)
        outcomes: list[Outcome] = []
        if corrupt is not None:
            outcomes += self._fail_requests(batch.slices_with(corrupt.rows), corrupt)
        with self._lock:
            for request, start, stop in batch.slices:
                request.rows_done += stop - start
                if request.cancelled:
                    self._observer.wasted(stop - start)
        return outcomes + scatter(batch, pixels, BatchRecord(rows, started_at, done_at))

    def _fail_requests(self, slices: list[Slice], error: Exception) -> list[Outcome]:
        outcomes: list[Outcome] = []
        for request, _, _ in slices:
            with self._lock:
                self._withdraw(request)
            message = "the forward of a batch with rows of this request failed"
            failure = errors.ForwardFailed(message)
            failure.__cause__ = error
            outcomes.append((request.future, failure))
        return outcomes

    def _fail_all(self, slices: list[Slice], error: errors.DeviceLost) -> list[Outcome]:
        requests = {request for request, _, _ in slices}
        with self._lock:
            if self._lost is None and self._on_device_lost is not None:
                self._call_on_loop(self._on_device_lost, error)
            self._accepting, self._lost = False, error
            self._work.notify()
            for queue in self._ready_queues:
                requests.update(queue.small, queue.large)
            for request in requests:
                self._withdraw(request)
        return [(request.future, errors.DeviceLost(str(error))) for request in requests]

    def _call_on_loop(self, callback: Callable[..., object], *args: object) -> None:
        try:
            self._loop.call_soon_threadsafe(callback, *args)
        except RuntimeError:
            if not self._loop.is_closed():  # a closed loop has no requests that wait
                raise


def _check_rows(
    seeds: NDArray[np.uint64], indices: NDArray[np.int64], labels: NDArray[np.int64]
) -> None:
    """Raise ValueError for wrong types, which concatenation would spread to other requests."""
    if not (
        seeds.shape == indices.shape == labels.shape
        and seeds.ndim == 1
        and seeds.size
        and (seeds.dtype, indices.dtype, labels.dtype) == (_UINT64, _INT64, _INT64)
    ):
        raise ValueError(
            f"seeds {seeds.dtype} {seeds.shape}, indices {indices.dtype} {indices.shape}, "
            f"labels {labels.dtype} {labels.shape}; expected uint64, int64, int64 (n,), n >= 1"
        )


def _expire(request: PendingRequest) -> None:
    if not request.future.done():
        late = errors.DeadlineExceeded(f"not complete within {request.timeout_s:g} s")
        request.future.set_exception(late)


def _resolve_futures(outcomes: list[Outcome]) -> None:
    """Resolve the futures of the requests that a batch completed or failed."""
    for future, outcome in outcomes:
        if future.done():  # cancelled, or expired
            continue
        if isinstance(outcome, GenerationResult):
            future.set_result(outcome)
        else:
            future.set_exception(outcome)
