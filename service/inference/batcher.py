"""Merges the rows of concurrent requests into batches for an engine.

A row is one image to generate: (seed, index, label), and the variation, if any, of its request.
Requests are admitted on the event loop and computed turn by turn, each of which takes whatever
waits as soon as the last one is done: nothing here sleeps, polls or holds a batch back in the hope
of more.

    wait for work -> collect a batch, small requests first -> forward -> scatter -> answer

Turns run on one thread, named "engine". Where the process has a single core and the engine computes
on it, that thread could only take the core from the event loop, and be interrupted by every arrival
in turn; there the event loop takes the turns itself, when it has nothing else to do.

The lock covers the queue only. It is held to admit, to collect and to withdraw, never during a
forward. Futures belong to the event loop and are only ever touched there.
"""
# ruff: noqa: N818  (the exceptions are named for what happened: Overloaded, Draining)

import asyncio
import math
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import NamedTuple, Protocol
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from service.inference.errors import CorruptRows, DeviceLost, OutOfMemory
from service.inference.latents import RowOptions, SamplingOptions

SMALL = 16  # rows of a small request at most
GROWTH = 8  # rows by which every request that waits makes the next batch larger
# About how long a forward takes while few requests wait, in seconds or, where the least one takes
# long, in times of that: what comes meanwhile waits for no more than two, and needs one itself.
SHORT_S, SHORT_TIMES = 0.0015, 2.0
WHOLE = 64  # rows that are not split, for which parts would take about twice as long
COST_WEIGHT = 0.2  # of the newest batch in the moving averages of seconds per row
HASTE = 0.8  # of the time it may take, a request is expected to need at most so much: rates vary
MIN_RETRY_AFTER_S = 0.01
# On the event loop, what was answered is sent within so many of its rounds, and what has arrived by
# then is admitted within `QUIET_ROUNDS` of the last arrival.
SENDING_ROUNDS, QUIET_ROUNDS = 3, 2
HEARING = 1.0  # in times of a batch, for which what comes may keep a full one waiting there

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
        varied: Sequence[RowOptions] = (),
    ) -> NDArray[np.uint8]:  # (B, H, W, C)
        """Generate one image per row, on the engine thread.

        The returned array is the caller's own: the answers are views of it, so the engine must
        never write to it again. The arguments are only lent for the call and are not written to.

        Raises:
            OutOfMemory: fewer rows may fit.
            CorruptRows: some rows are wrong, the others are in the exception.
            DeviceLost: it will never compute again.
            Exception: anything else failed this batch, and says nothing of the next one.
        """
        ...


class Observer(Protocol):
    """Where the batcher reports what the metrics count."""

    def batch(self, rows: int, forward_s: float) -> None:
        """One forward succeeded; called between two forwards, so it must be quick."""
        ...

    def wasted(self, rows: int) -> None:
        """Rows were computed that nobody waits for any more; from any thread."""
        ...


class Draining(Exception):
    """The batcher takes no work: it is shutting down, or was never started."""


class Overloaded(Exception):
    """The request would not fit, or not in time; worth another try after `retry_after_s`."""

    def __init__(self, queued_rows: int, retry_after_s: float) -> None:
        super().__init__(queued_rows, retry_after_s)  # words would take longer than the refusal
        self.retry_after_s = retry_after_s


class DeadlineExceeded(Exception):
    """The answer was not complete in time."""


class ForwardFailed(Exception):
    """A batch with rows of this request failed; `__cause__` is what the engine raised."""


@dataclass(slots=True, weakref_slot=True, eq=False)
class BatchRecord:
    """One batch that was computed, which requests may share; times are of `perf_counter`."""

    rows: int
    started_at: float
    done_at: float


@dataclass(slots=True)
class GenerationResult:
    """The images of one request and the time they took."""

    pixels: NDArray[np.uint8]  # (n, H, W, C), in the order of the request's rows
    queue_s: float  # from admission until the first row started in a forward
    forward_s: float  # from there until the last row was done
    forwards: Sequence[BatchRecord] = ()  # that had rows of it, in their order


@dataclass(slots=True, eq=False)
class _EngineQueue:
    """The waiting requests of one engine. It outlives its work, to remember what a row costs.

    Small requests go before large ones, which take long anyway. While both wait, each kind has
    half of every batch, and within its kind a request is served in the order of arrival: what
    comes later never takes time from what was promised to be done by its deadline.
    """

    small: "deque[PendingRequest]" = field(default_factory=deque)  # of at most SMALL rows
    large: "deque[PendingRequest]" = field(default_factory=deque)
    small_rows: int = 0  # queued
    queued_rows: int = 0  # of small and large ones
    # Seconds per row while batches are full, of the forward alone and of all that happens from one
    # batch to the next; None until measured.
    forward_row_s: float | None = None
    row_s: float | None = None
    least_s: float = 0.0  # seconds of a forward of small requests; 0 until measured
    forwards: int = 0  # that succeeded

    def finish_s(self, rows: int) -> float:
        """How long it will take until another request is done; 0 where nothing is known."""
        if rows <= SMALL:
            rows += self.small_rows
            rows += min(rows, self.queued_rows - self.small_rows)  # of large ones, in turn
        else:
            rows += self.queued_rows - self.small_rows
            rows *= 2  # small ones may come
        return rows * (self.row_s or 0.0)


@dataclass(slots=True, eq=False)
class PendingRequest:
    """A request that was admitted. For callers: cancelling `future` withdraws it."""

    engine: Engine
    lane: _EngineQueue
    seeds: NDArray[np.uint64]  # (n,)
    indices: NDArray[np.int64]  # (n,)
    labels: NDArray[np.int64]  # (n,)
    rows: int
    future: "asyncio.Future[GenerationResult]"
    timeout_s: float
    admitted_at: float
    variation: SamplingOptions | None
    next_row: int = 0  # the first row that was not yet put into a batch
    filled: int = 0  # rows that were computed while somebody waited for them
    gone: bool = False  # nobody waits any more, or one of its rows failed
    forwards: tuple[BatchRecord, ...] = ()  # that had rows of it
    pixels: NDArray[np.uint8] | None = None  # (n, H, W, C), only when more than one batch fills it


class _Slice(NamedTuple):
    """Rows start:stop of a request: its part of one batch."""

    request: PendingRequest
    start: int
    stop: int


_Answer = tuple["asyncio.Future[GenerationResult]", GenerationResult | ForwardFailed | DeviceLost]


class Batcher:
    """Admits requests on the event loop and runs their rows, batch by batch.

    Args:
        max_queue: rows, over all engines, that may be admitted and not yet started; small requests
            may exceed it by an eighth.
        timeout_s: the longest that a request may take from admission to its last row.
        observer: told of every successful forward, and of what was computed in vain.
        threaded: whether turns run on a thread of their own, or on the event loop.
    """

    def __init__(
        self, max_queue: int, timeout_s: float, observer: Observer, *, threaded: bool = True
    ) -> None:
        self._max_queue = max_queue
        self._timeout_s = timeout_s
        self._observer = observer
        self.threaded = threaded
        self._thread: threading.Thread | None = None
        self._stopped = asyncio.Event()
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)  # notified when an empty queue gets work
        # Under the lock:
        self._accepting = False
        self._lost: DeviceLost | None = None
        self._lanes: WeakKeyDictionary[Engine, _EngineQueue] = WeakKeyDictionary()
        self._turns: deque[_EngineQueue] = deque()  # the lanes with work, the next one first
        # Written between forwards alone, as are the costs of the lanes; read for estimates.
        self._running_until = 0.0  # when the current batch should be done, by perf_counter
        self._ready_at = 0.0  # since when there was work and no forward
        self._turn_s = 0.0  # how long the last forward took
        # On the event loop alone; the first is read by others, too:
        self.small_at = -math.inf  # when the last small request came, by perf_counter
        self.crowded = False  # whether one found no room, or no time, since nothing waited
        self._rounds_left = 0  # of the event loop, before the next turn
        self._turning = False

    # On the event loop

    def start(self, on_lost: Callable[[DeviceLost], object] | None = None) -> None:
        """Begin to take work; called once, on the event loop that will submit.

        Args:
            on_lost: called on the event loop when an engine says that its device is lost. Nothing
                is admitted from then on, and all that waited has been rejected.
        """
        self._loop = asyncio.get_running_loop()
        self._on_lost = on_lost
        self._accepting = True
        if self.threaded:
            self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
            self._thread.start()

    async def close(self) -> None:
        """Refuse new work, finish what was admitted, and end."""
        with self._lock:
            self._accepting = False
            self._work.notify()
        if self._thread is not None:
            await self._stopped.wait()
            self._thread.join()  # has only to return: its last act was to say that it stopped
        elif self._turning:
            await self._stopped.wait()

    def lose(self, error: DeviceLost) -> None:
        """Reject all that waits, and whatever comes, because a device computes wrong images."""
        _answer(self._lose([], error))

    @property
    def queued_rows(self) -> int:
        """Rows admitted and not yet started; from any thread."""
        with self._lock:
            return sum(lane.queued_rows for lane in self._turns)

    def forwards(self, engine: Engine) -> int:
        """Batches that an engine has computed, as long as it is known here."""
        lane = self._lanes.get(engine)
        return 0 if lane is None else lane.forwards

    async def submit(
        self,
        engine: Engine,
        seeds: NDArray[np.uint64],  # (n,), n >= 1
        indices: NDArray[np.int64],  # (n,)
        labels: NDArray[np.int64],  # (n,)
    ) -> GenerationResult:
        """Generate one image per row: `admit`, then `wait`."""
        return await self.wait(self.admit(engine, seeds, indices, labels))

    async def wait(self, ticket: "PendingRequest") -> GenerationResult:
        """The images of an admitted request; called once for each, on the event loop.

        Cancelling this, or the ticket, frees the rows that were not started.

        Raises:
            DeadlineExceeded: its time passed; rows not yet started are never computed.
            ForwardFailed: the engine failed on some of the rows; the others are dropped.
            DeviceLost: the engine's device is lost, with all that waited for it.
        """
        future = ticket.future
        timer = self._loop.call_later(ticket.timeout_s, self._expire, ticket)
        try:
            generated = await future
        except BaseException:
            with self._lock:
                self._withdraw(ticket)
            raise
        else:
            return generated
        finally:
            timer.cancel()
            # An exception holds this frame by its traceback, and the future holds the exception.
            del ticket, future

    def admit(
        self,
        engine: Engine,
        seeds: NDArray[np.uint64],
        indices: NDArray[np.int64],
        labels: NDArray[np.int64],
        timeout_s: float | None = None,
        variation: SamplingOptions | None = None,
    ) -> "PendingRequest":
        """Queue one row per image; called on the event loop. The arrays must not change.

        Args:
            engine: computes them.
            seeds: (n,), n >= 1.
            indices: (n,).
            labels: (n,).
            timeout_s: the longest that it may take, if that is shorter than the batcher's own.
            variation: what makes the rows other than plain draws of a class.

        Raises:
            ValueError: the arrays are not one row each of the right type; nothing was queued.
            DeviceLost: nothing can be computed any more; nothing was queued.
            Draining: no new work is taken; nothing was queued.
            Overloaded: no room, or no time, for the request; nothing was queued.
        """
        _check_rows(seeds, indices, labels)
        rows = len(seeds)
        timeout_s = self._bounded(timeout_s)
        now = self._hear(engine)
        with self._lock:
            if not self._accepting:
                raise self._lost or Draining("no new work is taken")
            lane = self._lanes.get(engine)
            if lane is None:
                lane = self._lanes[engine] = _EngineQueue()
            error = self._find_excess(lane, rows, timeout_s, now)
            if error is not None:
                raise error
            if not self._turns:
                self.crowded = False

            future: asyncio.Future[GenerationResult] = self._loop.create_future()
            ticket = PendingRequest(
                engine, lane, seeds, indices, labels, rows, future, timeout_s, now, variation
            )
            if not self._turns and self.threaded:
                self._work.notify()
            if not lane.queued_rows:
                self._turns.append(lane)
            if rows <= SMALL:
                self.small_at = now
                lane.small.append(ticket)
                lane.small_rows += rows
            else:
                lane.large.append(ticket)
            lane.queued_rows += rows
            if not self.threaded:
                self._await_quiet(lane.queued_rows < engine.max_batch)
        return ticket

    def _bounded(self, timeout_s: float | None) -> float:
        return self._timeout_s if timeout_s is None else min(timeout_s, self._timeout_s)

    def _find_excess(
        self, lane: _EngineQueue, rows: int, timeout_s: float, now: float
    ) -> Overloaded | None:
        """What is wrong unless `rows` more fit the queue and can be done in time.

        With an empty queue the time does not count: only trying corrects an estimate that is
        too slow. A request of more than `max_queue` rows never fits.
        """
        queued = sum(other.queued_rows for other in self._turns)
        if not queued and rows <= self._max_queue:
            return None
        room = self._max_queue + (self._max_queue // 8 if rows <= SMALL else 0) - queued
        busy = len(self._turns) + (lane not in self._turns)  # lanes that take turns
        running_s = max(0.0, self._running_until - now)
        late_s = running_s + busy * lane.finish_s(rows) - HASTE * timeout_s
        if rows <= room and late_s <= 0.0:
            return None

        room_s = self._timeout_s  # by then all that waits now is answered or gone
        backlog_s = sum(other.queued_rows * (other.row_s or 0.0) for other in self._turns)
        if backlog_s > 0.0:
            excess = rows - room
            fits_s = running_s + backlog_s * min(1.0, excess / queued) if excess > 0 else 0.0
            room_s = min(room_s, max(fits_s, late_s))
        self.crowded = True
        return Overloaded(queued, max(room_s, MIN_RETRY_AFTER_S))

    def _expire(self, ticket: "PendingRequest") -> None:
        if not ticket.future.done():
            late = DeadlineExceeded(f"not complete within {ticket.timeout_s:g} s")
            ticket.future.set_exception(late)

    # On the event loop, where it takes the turns

    def _hear(self, engine: Engine) -> float:
        """Take a turn before a request, if a full batch has waited for long enough; the time.

        A round of the loop hears all that has come, and a refusal costs time as well: where more
        comes than can be refused, the loop would do nothing else.
        """
        now = perf_counter()
        if self.threaded or now - self._ready_at <= HEARING * self._turn_s:
            return now
        if self._turns and self._turns[0].queued_rows >= engine.max_batch:
            self._take_turn()
        return now

    def _await_quiet(self, more_fits: bool) -> None:
        if not self._turning:
            self._turning = True
            self._ready_at = perf_counter()
            self._rounds_left = QUIET_ROUNDS
            self._loop.call_soon(self._pass_round)
        elif more_fits and self._rounds_left < QUIET_ROUNDS:
            self._rounds_left = QUIET_ROUNDS

    def _pass_round(self) -> None:
        """Take a turn when the loop has sent what was answered, and nothing more has come.

        Once a full batch waits, what comes does not hold it back.
        """
        self._rounds_left -= 1
        if self._rounds_left <= 0:
            if not self._turns:  # withdrawn, or done
                self._turning = False
                if not self._accepting:
                    self._stopped.set()
                return
            self._take_turn()
            self._rounds_left = SENDING_ROUNDS
        self._loop.call_soon(self._pass_round)

    # On either thread, under the lock

    def _withdraw(self, request: PendingRequest) -> None:
        """Free the rows that were not started. Linear in the queue, but few requests need it."""
        if request.gone:
            return
        request.gone = True
        if request.filled:
            self._observer.wasted(request.filled)
        left = request.rows - request.next_row
        if left == 0:
            return
        request.next_row = request.rows
        lane = request.lane
        lane.queued_rows -= left
        if request.rows <= SMALL:
            lane.small_rows -= left
            lane.small.remove(request)
        else:
            lane.large.remove(request)
        if not lane.queued_rows and lane in self._turns:
            self._turns.remove(lane)

    # Where the engine runs

    def _run(self) -> None:
        try:
            while not self._loop.is_closed() and self._wait_for_work():
                self._take_turn()
        finally:
            self._on_loop(self._stopped.set)

    def _wait_for_work(self) -> bool:
        """False once drained."""
        with self._lock:
            while not self._turns:
                if not self._accepting:
                    return False
                self._work.wait()
                self._ready_at = perf_counter()
        return True

    def _take_turn(self) -> None:
        """Run one batch, if there is any work.

        No local of a turn is alive during the wait of the next one, so an idle thread keeps
        neither an engine nor pixels in memory.
        """
        with self._lock:
            if not self._turns:
                return
            lane = self._turns.popleft()
            engine = (lane.small or lane.large)[0].engine
            full = _full_batch(lane, engine, self.crowded)
            batch = _collect(lane, full)
            if lane.queued_rows:
                self._turns.append(lane)

        answers = self._compute(engine, lane, batch, full)
        if answers:
            self._on_loop(_answer, answers)
        # A failure holds this frame by its traceback; it is not to hold itself by the batch.
        batch.clear()
        del answers

    def _compute(
        self,
        engine: Engine,
        lane: _EngineQueue,
        batch: list[_Slice],
        full: int,
        *,
        again: bool = False,
    ) -> list[_Answer]:
        """Run one batch; the answers are those of the requests that it completed or failed."""
        try:
            return self._forward(engine, lane, batch, full)
        except OutOfMemory as error:
            halves = () if again else _halve(batch)
            if not halves:
                return self._reject(batch, error)
            answers: list[_Answer] = []
            for half in halves:
                answers += self._compute(engine, lane, half, full, again=True)
            return answers
        except DeviceLost as error:
            return self._lose(batch, error)
        except Exception as error:
            return self._reject(batch, error)

    def _forward(
        self, engine: Engine, lane: _EngineQueue, batch: list[_Slice], full: int
    ) -> list[_Answer]:
        if len(batch) == 1:
            seeds, indices, labels = _columns(batch[0])
        else:
            columns = zip(*map(_columns, batch), strict=True)
            seeds, indices, labels = map(np.concatenate, columns)
        rows = len(seeds)

        started_at = perf_counter()
        self._running_until = started_at + rows * (lane.forward_row_s or 0.0)
        corrupt: CorruptRows | None = None
        try:
            pixels = engine(seeds, indices, labels, _varied(batch))  # (B, H, W, C)
        except CorruptRows as error:
            corrupt, pixels = error, error.pixels
        done_at = perf_counter()
        if pixels.ndim != 4 or len(pixels) != rows or pixels.dtype != np.uint8:
            raise ValueError(
                f"the engine returned {pixels.dtype} {pixels.shape} for {rows} rows, "
                f"expected uint8 ({rows}, H, W, C)"
            )
        forward_s = done_at - started_at
        lane.forward_row_s = _measure(lane.forward_row_s, rows, full, forward_s)
        lane.row_s = _measure(lane.row_s, rows, full, done_at - self._ready_at)
        if rows <= SMALL:
            lane.least_s += COST_WEIGHT * (forward_s - lane.least_s) if lane.least_s else forward_s
        self._ready_at, self._turn_s = done_at, forward_s
        lane.forwards += 1
        self._observer.batch(rows, forward_s)
        answers = [] if corrupt is None else self._reject(_hit(batch, corrupt.rows), corrupt)
        self._count(batch)
        return answers + _scatter(batch, pixels, BatchRecord(rows, started_at, done_at))

    def _count(self, batch: list[_Slice]) -> None:
        """Tell the rows that somebody still waits for from the others."""
        wasted = 0
        with self._lock:
            for request, start, stop in batch:
                if request.gone:
                    wasted += stop - start
                else:
                    request.filled += stop - start
        if wasted:
            self._observer.wasted(wasted)

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

    def _lose(self, batch: list[_Slice], error: DeviceLost) -> list[_Answer]:
        requests = {request for request, _, _ in batch}
        with self._lock:
            if self._lost is None and self._on_lost is not None:
                self._on_loop(self._on_lost, error)
            self._accepting, self._lost = False, error
            self._work.notify()
            for lane in self._turns:
                requests.update(lane.small, lane.large)
            for request in requests:
                self._withdraw(request)
        return [(request.future, DeviceLost(str(error))) for request in requests]

    def _on_loop(self, callback: Callable[..., object], *args: object) -> None:
        if not self.threaded:
            callback(*args)
            return
        try:
            self._loop.call_soon_threadsafe(callback, *args)
        except RuntimeError:
            if not self._loop.is_closed():  # closed: nobody is left to be told
                raise


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


def _full_batch(lane: _EngineQueue, engine: Engine, crowded: bool) -> int:
    """How many rows the lane's next batch takes at most.

    Large batches cost less per row, and with many requests waiting nobody waits longer for them.
    With few, a request that comes now would: it has to wait for the end of the batch. While it is
    crowded, most of what comes is refused, so what was admitted is not split for its sake. Large
    requests, for which small ones have waited already, add to those no more than as many rows. No
    small rest is left over, which would take about as long as a batch, and what is not large in all
    is not split.
    """
    if lane.small and lane.large:
        full = max(SMALL, 2 * lane.small_rows)
    elif crowded:
        full = engine.max_batch
    else:
        short_s = max(SHORT_S, SHORT_TIMES * lane.least_s)
        short = math.ceil(short_s / (lane.forward_row_s or short_s) / SMALL) * SMALL
        full = max(short, GROWTH * (len(lane.small) + len(lane.large)))
    if full < lane.queued_rows <= max(WHOLE, full + full // 2):
        full = lane.queued_rows
    return min(engine.max_batch, full)


def _collect(lane: _EngineQueue, full: int) -> list[_Slice]:
    """Take the lane's next batch, one slice per request; under the lock."""
    starts: dict[PendingRequest, int] = {}
    small = _take(lane.small, full - full // 2 if lane.large else full, starts)
    large = _take(lane.large, full - small, starts)
    small += _take(lane.small, full - small - large, starts)
    lane.small_rows -= small
    lane.queued_rows -= small + large
    return [_Slice(request, start, request.next_row) for request, start in starts.items()]


def _take(waiting: "deque[PendingRequest]", room: int, starts: dict[PendingRequest, int]) -> int:
    """Rows that requests give in turn, up to `room`; notes the first row of each."""
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


def _halve(batch: list[_Slice]) -> tuple[list[_Slice], ...]:
    """A batch as two of half the rows; nothing where there is only one row."""
    middle = sum(stop - start for _, start, stop in batch) // 2
    if not middle:
        return ()
    first: list[_Slice] = []
    second: list[_Slice] = []
    for request, start, stop in batch:
        cut = min(stop, start + middle)
        middle -= cut - start
        if cut > start:
            first.append(_Slice(request, start, cut))
        if stop > cut:
            second.append(_Slice(request, cut, stop))
    return first, second


def _hit(batch: list[_Slice], rows: NDArray[np.bool_]) -> list[_Slice]:
    """The slices of a batch that have any of some rows (B,)."""
    hit: list[_Slice] = []
    offset = 0
    for part in batch:
        end = offset + part.stop - part.start
        if rows[offset:end].any():
            hit.append(part)
        offset = end
    return hit


def _columns(part: _Slice) -> tuple[NDArray[np.uint64], NDArray[np.int64], NDArray[np.int64]]:
    request, start, stop = part
    if stop - start == request.rows:
        return request.seeds, request.indices, request.labels
    return request.seeds[start:stop], request.indices[start:stop], request.labels[start:stop]


def _varied(batch: list[_Slice]) -> Sequence[RowOptions]:
    """Which rows of a batch have a variation."""
    varied = []
    offset = 0
    for request, start, stop in batch:
        end = offset + stop - start
        if request.variation is not None:
            part = RowOptions(slice(offset, end), slice(start, stop), request.variation)
            varied.append(part)
        offset = end
    return varied


def _measure(row_s: float | None, rows: int, full: int, spent_s: float) -> float | None:
    """Learn what a row costs while the engine is busy, which only a full batch tells.

    A forward of fixed shape takes as long for one row as for all, so a batch with room left only
    says that a row costs no more than this. Without that, light traffic would look like a slow
    engine and the first burst would be refused.
    """
    newest_s = spent_s / rows
    if row_s is None:
        return newest_s if rows == full else None
    if rows == full or newest_s < row_s:
        return row_s + COST_WEIGHT * (newest_s - row_s)
    return row_s


def _scatter(batch: list[_Slice], pixels: NDArray[np.uint8], forward: BatchRecord) -> list[_Answer]:
    """Hand out the pixels (B, H, W, C) of a batch: views, and copies for what is split."""
    answers: list[_Answer] = []
    offset = 0
    for request, start, stop in batch:
        part = pixels[offset : offset + stop - start]
        offset += stop - start
        if request.gone:
            continue
        request.forwards += (forward,)
        if stop - start == request.rows:
            request.pixels = part
        else:
            if request.pixels is None:
                request.pixels = np.empty((request.rows, *pixels.shape[1:]), np.uint8)
            request.pixels[start:stop] = part
        if stop == request.rows:
            began = request.forwards[0].started_at
            generated = GenerationResult(
                request.pixels,
                began - request.admitted_at,
                forward.done_at - began,
                request.forwards,
            )
            answers.append((request.future, generated))
    return answers


def _answer(answers: list[_Answer]) -> None:
    """Resolve the requests that a batch finished; on the event loop."""
    for future, outcome in answers:
        if future.done():  # cancelled, or its deadline passed
            continue
        if isinstance(outcome, GenerationResult):
            future.set_result(outcome)
        else:
            future.set_exception(outcome)
