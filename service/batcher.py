"""Merges the rows of concurrent requests into batches for an engine.

A row is one image to generate: (seed, index, label). Requests are admitted on the event loop and
computed on one thread, named "engine", which takes whatever waits as soon as it is free: nothing
here sleeps, polls or holds a batch back in the hope of more.

A turn of the thread:

    wait for work -> collect one engine's batch, round-robin -> forward -> scatter -> answer

The lock covers the queue only. It is held to admit, to collect and to withdraw, never during a
forward. Futures belong to the event loop and are only ever touched there.
"""
# ruff: noqa: N818  (the exceptions are named for what happened: Overloaded, Draining)

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from time import perf_counter
from typing import NamedTuple, Protocol
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

QUANTUM = 16  # rows that a request gives before the next one has its turn
LEAST_FULL = 64  # rows of a full batch, however few requests wait
COST_WEIGHT = 0.2  # of the newest batch in the moving average of seconds per row
MIN_RETRY_AFTER_S = 0.01

_UINT64, _INT64 = np.dtype(np.uint64), np.dtype(np.int64)


class Engine(Protocol):
    """What the batcher asks of a loaded model.

    An engine is told apart by identity and referred to weakly while it has no work, so a plain
    object will do and a model that was replaced is not kept alive from here.
    """

    max_batch: int

    def __call__(
        self,
        seeds: NDArray[np.uint64],  # (B,), 1 <= B <= max_batch
        indices: NDArray[np.int64],  # (B,)
        labels: NDArray[np.int64],  # (B,)
    ) -> NDArray[np.uint8]:  # (B, H, W, C)
        """Generate one image per row, on the engine thread.

        The returned array is the caller's own: the answers are views of it, so the engine must
        never write to it again. The arguments are only lent for the call and are not written to.
        """
        ...


class Observer(Protocol):
    """Where the batcher reports what the metrics count."""

    def batch(self, rows: int, forward_s: float) -> None:
        """One forward succeeded; called on the engine thread, so it must be quick."""
        ...


class Draining(Exception):
    """The batcher takes no work: it is shutting down, or was never started."""


class Overloaded(Exception):
    """The request would not fit, or not in time; worth another try after `retry_after_s`."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class DeadlineExceeded(Exception):
    """The answer was not complete in time."""


class ForwardFailed(Exception):
    """A batch with rows of this request failed; `__cause__` is what the engine raised."""


@dataclass(slots=True)
class Generated:
    """The images of one request and the time they took."""

    pixels: NDArray[np.uint8]  # (n, H, W, C), in the order of the request's rows
    queue_s: float  # from admission until the first row started in a forward
    forward_s: float  # from there until the last row was done


@dataclass(slots=True, eq=False)
class _Lane:
    """The waiting requests of one engine. It outlives its work, to remember what a row costs."""

    waiting: "deque[Ticket]" = field(default_factory=deque)
    queued_rows: int = 0
    row_s: float | None = None  # seconds per row at full batches; None until one was measured


@dataclass(slots=True, eq=False)
class Ticket:
    """A request that was admitted. For callers: cancelling `future` withdraws it."""

    engine: Engine
    lane: _Lane
    seeds: NDArray[np.uint64]  # (n,)
    indices: NDArray[np.int64]  # (n,)
    labels: NDArray[np.int64]  # (n,)
    rows: int
    future: "asyncio.Future[Generated]"
    admitted_at: float
    next_row: int = 0  # the first row that was not yet put into a batch
    credit: int = QUANTUM  # rows it may still give before it goes to the tail
    first_forward_at: float = 0.0
    pixels: NDArray[np.uint8] | None = None  # (n, H, W, C), only when more than one batch fills it


class _Slice(NamedTuple):
    """Rows start:stop of a request: its part of one batch."""

    request: Ticket
    start: int
    stop: int


_Answer = tuple["asyncio.Future[Generated]", Generated | ForwardFailed]


class Batcher:
    """Admits requests on the event loop and runs their rows, batch by batch, on one thread.

    Args:
        max_queue: rows, over all engines, that may be admitted and not yet started.
        timeout_s: the longest that a request may take from admission to its last row.
        observer: told of every successful forward.
    """

    def __init__(self, max_queue: int, timeout_s: float, observer: Observer) -> None:
        self._max_queue = max_queue
        self._timeout_s = timeout_s
        self._observer = observer
        self._thread: threading.Thread | None = None
        self._stopped = asyncio.Event()
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)  # notified when an empty queue gets work
        # Under the lock:
        self._accepting = False
        self._lanes: WeakKeyDictionary[Engine, _Lane] = WeakKeyDictionary()
        self._turns: deque[_Lane] = deque()  # the lanes with work, the next one first
        # Written by the engine thread alone, as are the costs of the lanes; read for estimates.
        self._running_until = 0.0  # when the current batch should be done, by perf_counter

    # On the event loop

    def start(self) -> None:
        """Start the engine thread; called once, on the event loop that will submit."""
        loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._run, args=(loop,), name="engine", daemon=True)
        self._accepting = True
        self._thread.start()

    async def close(self) -> None:
        """Refuse new work, finish what was admitted, and end the thread."""
        with self._lock:
            self._accepting = False
            self._work.notify()
        if self._thread is not None:
            await self._stopped.wait()
            self._thread.join()  # has only to return: its last act was to say that it stopped

    @property
    def queued_rows(self) -> int:
        """Rows admitted and not yet started; from any thread."""
        with self._lock:
            return sum(lane.queued_rows for lane in self._turns)

    async def submit(
        self,
        engine: Engine,
        seeds: NDArray[np.uint64],  # (n,), n >= 1
        indices: NDArray[np.int64],  # (n,)
        labels: NDArray[np.int64],  # (n,)
    ) -> Generated:
        """Generate one image per row: `admit`, then `wait`."""
        return await self.wait(self.admit(engine, seeds, indices, labels))

    async def wait(self, ticket: "Ticket") -> Generated:
        """The images of an admitted request; called once for each, on the event loop.

        Cancelling this, or the ticket, frees the rows that were not started.

        Raises:
            DeadlineExceeded: `timeout_s` passed; rows not yet started are never computed.
            ForwardFailed: the engine failed on some of the rows; the others are dropped.
        """
        future = ticket.future
        timer = future.get_loop().call_later(self._timeout_s, self._expire, future)
        try:
            return await future
        finally:
            timer.cancel()
            if ticket.next_row < ticket.rows:
                with self._lock:
                    self._withdraw(ticket)
            # An exception holds this frame by its traceback, and the future holds the exception.
            del ticket, future

    def admit(
        self,
        engine: Engine,
        seeds: NDArray[np.uint64],
        indices: NDArray[np.int64],
        labels: NDArray[np.int64],
    ) -> "Ticket":
        """Queue one row per image; called on the event loop. The arrays must not change.

        Raises:
            ValueError: the arrays are not one row each of the right type; nothing was queued.
            Draining: no new work is taken; nothing was queued.
            Overloaded: no room, or no time, for the request; nothing was queued.
        """
        _check_rows(seeds, indices, labels)
        rows = len(seeds)
        future: asyncio.Future[Generated] = asyncio.get_running_loop().create_future()
        now = perf_counter()
        with self._lock:
            if not self._accepting:
                raise Draining("no new work is taken")
            lane = self._lanes.get(engine)
            if lane is None:
                lane = self._lanes[engine] = _Lane()
            self._check_room(lane, rows, now)

            ticket = Ticket(engine, lane, seeds, indices, labels, rows, future, now)
            if not self._turns:
                self._work.notify()
            if not lane.waiting:
                self._turns.append(lane)
            lane.waiting.append(ticket)
            lane.queued_rows += rows
        return ticket

    def _check_room(self, lane: _Lane, rows: int, now: float) -> None:
        """Raise Overloaded unless `rows` more fit the queue and the whole backlog fits the time.

        With an empty queue the time does not count: only trying corrects an estimate that is
        too slow. A request of more than `max_queue` rows never fits.
        """
        queued = 0
        backlog_s = 0.0
        for other in self._turns:
            queued += other.queued_rows
            backlog_s += other.queued_rows * (other.row_s or 0.0)
        excess = queued + rows - self._max_queue
        running_s = max(0.0, self._running_until - now)
        late_s = running_s + backlog_s + rows * (lane.row_s or 0.0) - self._timeout_s
        if excess <= 0 and (late_s <= 0.0 or not queued):
            return

        room_s = self._timeout_s  # by then all that waits now is answered or gone
        if backlog_s > 0.0:
            fits_s = running_s + backlog_s * min(1.0, excess / queued) if excess > 0 else 0.0
            room_s = min(room_s, max(fits_s, late_s))
        raise Overloaded(
            f"{queued} rows are queued (at most {self._max_queue}), about {backlog_s:.2f} s of "
            f"work (at most {self._timeout_s:g} s): no room for {rows} more",
            retry_after_s=max(room_s, MIN_RETRY_AFTER_S),
        )

    def _expire(self, future: "asyncio.Future[Generated]") -> None:
        if not future.done():
            future.set_exception(DeadlineExceeded(f"not complete within {self._timeout_s:g} s"))

    # On either thread, under the lock

    def _withdraw(self, request: Ticket) -> None:
        """Free the rows that were not started. Linear in the queue, but few requests need it."""
        left = request.rows - request.next_row
        if left == 0:
            return
        request.next_row = request.rows
        lane = request.lane
        lane.queued_rows -= left
        lane.waiting.remove(request)
        if not lane.waiting:
            self._turns.remove(lane)

    # On the engine thread

    def _run(self, loop: asyncio.AbstractEventLoop) -> None:
        try:
            while self._take_turn(loop) and not loop.is_closed():
                pass
        finally:
            _call_soon(loop, self._stopped.set)

    def _take_turn(self, loop: asyncio.AbstractEventLoop) -> bool:
        """Wait for work and run one batch; False once drained.

        No local of a turn is alive during the wait of the next one, so an idle thread keeps
        neither an engine nor pixels in memory.
        """
        with self._lock:
            while not self._turns:
                if not self._accepting:
                    return False
                self._work.wait()
            lane = self._turns.popleft()
            engine = lane.waiting[0].engine
            full = _full_batch(lane, engine)
            batch = _collect(lane, full)
            if lane.waiting:
                self._turns.append(lane)

        answers: list[_Answer]
        try:
            answers = self._forward(engine, lane, batch, full)
        except Exception as error:
            answers = self._reject(batch, error)
        if answers:
            _call_soon(loop, _answer, answers)
        # A failure holds this frame by its traceback; it is not to hold itself by the batch.
        batch.clear()
        del answers
        return True

    def _forward(
        self, engine: Engine, lane: _Lane, batch: list[_Slice], full: int
    ) -> list[_Answer]:
        """Run one batch; the answers are those of the requests that it completed."""
        if len(batch) == 1:
            seeds, indices, labels = _columns(batch[0])
        else:
            columns = zip(*map(_columns, batch), strict=True)
            seeds, indices, labels = map(np.concatenate, columns)
        rows = len(seeds)

        started_at = perf_counter()
        self._running_until = started_at + rows * (lane.row_s or 0.0)
        pixels = engine(seeds, indices, labels)  # (B, H, W, C)
        done_at = perf_counter()
        if pixels.ndim != 4 or len(pixels) != rows or pixels.dtype != np.uint8:
            raise ValueError(
                f"the engine returned {pixels.dtype} {pixels.shape} for {rows} rows, "
                f"expected uint8 ({rows}, H, W, C)"
            )
        _measure(lane, rows, full, done_at - started_at)
        self._observer.batch(rows, done_at - started_at)
        return _scatter(batch, pixels, started_at, done_at)

    def _reject(self, batch: list[_Slice], error: Exception) -> list[_Answer]:
        answers: list[_Answer] = []
        with self._lock:
            for request, _, _ in batch:
                self._withdraw(request)
        for request, _, _ in batch:
            failure = ForwardFailed("the forward of a batch with rows of this request failed")
            failure.__cause__ = error
            answers.append((request.future, failure))
        return answers


def _check_rows(
    seeds: NDArray[np.uint64], indices: NDArray[np.int64], labels: NDArray[np.int64]
) -> None:
    """Raise ValueError for what would reach the neighbours: concatenation widens types."""
    if not (
        seeds.shape == indices.shape == labels.shape
        and seeds.ndim == 1
        and seeds.size
        and (seeds.dtype, indices.dtype, labels.dtype) == (_UINT64, _INT64, _INT64)
    ):
        raise ValueError(
            f"seeds {seeds.dtype} {seeds.shape}, indices {indices.dtype} {indices.shape}, "
            f"labels {labels.dtype} {labels.shape}: expected uint64, int64, int64 (n,), n >= 1"
        )


def _full_batch(lane: _Lane, engine: Engine) -> int:
    """How many rows the lane's next batch takes at most: a quantum of each request that waits.

    Large batches cost less per row, and with many requests waiting nobody waits longer for them.
    With few, a request that comes now would: it has to wait for the end of the batch.
    """
    return min(engine.max_batch, max(LEAST_FULL, QUANTUM * len(lane.waiting)))


def _collect(lane: _Lane, full: int) -> list[_Slice]:
    """Take the lane's next batch by deficit round-robin, one slice per request; under the lock.

    A request that the end of the batch cuts off stays at the head with the rest of its credit:
    a fresh quantum would starve the others, the tail would cost it rows.
    """
    waiting = lane.waiting
    starts: dict[Ticket, int] = {}
    room = full
    while room and waiting:
        request = waiting[0]
        starts.setdefault(request, request.next_row)
        rows = min(room, request.credit, request.rows - request.next_row)
        room -= rows
        request.next_row += rows
        request.credit -= rows
        if request.next_row == request.rows:
            waiting.popleft()
        elif not request.credit:
            request.credit = QUANTUM
            waiting.rotate(-1)
    lane.queued_rows -= full - room
    return [_Slice(request, start, request.next_row) for request, start in starts.items()]


def _columns(part: _Slice) -> tuple[NDArray[np.uint64], NDArray[np.int64], NDArray[np.int64]]:
    request, start, stop = part
    if stop - start == request.rows:
        return request.seeds, request.indices, request.labels
    return request.seeds[start:stop], request.indices[start:stop], request.labels[start:stop]


def _measure(lane: _Lane, rows: int, full: int, forward_s: float) -> None:
    """Learn what a row costs while the engine is busy, which only a full batch tells.

    A forward of fixed shape takes as long for one row as for all, so a batch with room left only
    says that a row costs no more than this. Without that, light traffic would look like a slow
    engine and the first burst would be refused.
    """
    row_s = forward_s / rows
    if lane.row_s is None:
        if rows == full:
            lane.row_s = row_s
    elif rows == full or row_s < lane.row_s:
        lane.row_s += COST_WEIGHT * (row_s - lane.row_s)


def _scatter(
    batch: list[_Slice], pixels: NDArray[np.uint8], started_at: float, done_at: float
) -> list[_Answer]:
    """Hand out the pixels (B, H, W, C) of a batch: views, and copies for what is split."""
    answers: list[_Answer] = []
    offset = 0
    for request, start, stop in batch:
        part = pixels[offset : offset + stop - start]
        offset += stop - start
        if start == 0:
            request.first_forward_at = started_at
        if stop - start == request.rows:
            request.pixels = part
        else:
            if request.pixels is None:
                request.pixels = np.empty((request.rows, *pixels.shape[1:]), np.uint8)
            request.pixels[start:stop] = part
        if stop == request.rows:
            queue_s = request.first_forward_at - request.admitted_at
            forward_s = done_at - request.first_forward_at
            answers.append((request.future, Generated(request.pixels, queue_s, forward_s)))
    return answers


def _answer(answers: list[_Answer]) -> None:
    """Resolve the requests that a batch finished; on the event loop."""
    for future, outcome in answers:
        if future.done():  # cancelled, or its deadline passed
            continue
        if isinstance(outcome, ForwardFailed):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)


def _call_soon(
    loop: asyncio.AbstractEventLoop, callback: Callable[..., object], *args: object
) -> None:
    try:
        loop.call_soon_threadsafe(callback, *args)
    except RuntimeError:
        if not loop.is_closed():  # closed: nobody is left to be told
            raise
