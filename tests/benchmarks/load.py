"""A load generator: closed and open loops over plain HTTP/1.1 connections to this machine.

Written here because a client in Python has to be cheap to keep up with a server on one core, and
because few tools count an open loop's latency from the time a request was due, without which a
server that stalls looks fast (Tene, "How NOT to measure latency").
"""

import asyncio
import itertools
import os
import statistics
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter, sleep
from typing import Any, TypeVar, cast

import uvloop

T = TypeVar("T")
EARLY_S = (
    5e-5  # a thread's sleep may last this much longer; a timer of an event loop, a millisecond
)


@dataclass
class Sample:
    """The results of one loop.

    Attributes:
        seconds: from the first request to the end of the loop.
        good: answers with status 200 in that time.
        latencies: of the answers with status 200, in seconds.
        refusals: latencies of the answers with status 429 or 503.
        other: answers with another status, connections that broke, answers that never came.
    """

    seconds: float = 0.0
    good: int = 0
    latencies: list[float] = field(default_factory=list)
    refusals: list[float] = field(default_factory=list)
    other: int = 0

    @property
    def rate(self) -> float:
        """Good answers a second."""
        return self.good / self.seconds

    def percentile(self, percent: int) -> float:
        """A percentile of the good answers' latencies, in milliseconds."""
        if len(self.latencies) < 2:
            return float("nan")
        return 1e3 * statistics.quantiles(self.latencies, n=100, method="inclusive")[percent - 1]

    def count(self, status: int, latency_s: float) -> None:
        """Note an answer; 0 stands for none."""
        if status == 200:
            self.latencies.append(latency_s)
        elif status in {429, 503}:
            self.refusals.append(latency_s)
        else:
            self.other += 1


class Connection(asyncio.Protocol):
    """One keep-alive connection; one request at a time."""

    def __init__(self, done: "Callable[[Connection, int], None]") -> None:
        self._done = done  # called with the status of each answer, 0 for a broken connection
        self._answer = bytearray()
        self._missing = -1  # bytes of the body that have not come; -1 before the head is complete
        self._status = 0
        self.due = 0.0  # when the request in flight was due
        self.busy = self.closed = False
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is not a subclass of it

    def send(self, request: bytes, due: float) -> None:
        """Send a whole request."""
        assert self.transport is not None
        self.due, self.busy = due, True
        self.transport.write(request)

    def data_received(self, data: bytes) -> None:
        if self._missing < 0:
            self._answer += data
            end = self._answer.find(b"\r\n\r\n")
            if end < 0:
                return
            head = bytes(self._answer[:end]).lower()
            self._status = int(head[9:12])
            start = head.index(b"content-length:") + 15
            stop = head.find(b"\r\n", start)
            length = int(head[start : stop if stop > 0 else None])
            self._missing = length - (len(self._answer) - end - 4)
            self._answer.clear()
        else:
            self._missing -= len(data)
        if self._missing == 0:
            self._missing, self.busy = -1, False
            self._done(self, self._status)

    def connection_lost(self, _error: Exception | None) -> None:
        self.closed = True
        if self.busy:
            self.busy = False
            self._done(self, 0)


def post(target: str) -> bytes:
    """The bytes of a POST without a body."""
    return (f"POST {target} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 0\r\n\r\n").encode()


async def _connect(port: int, done: Callable[[Connection, int], None]) -> Connection:
    loop = asyncio.get_running_loop()
    _, connection = await loop.create_connection(lambda: Connection(done), "127.0.0.1", port)
    return connection


async def closed_loop(
    port: int, requests: Iterator[bytes], *, connections: int, seconds: float
) -> Sample:
    """Run a number of clients, each of which sends its next request when it has its answer."""
    sample = Sample()
    finished = asyncio.Event()
    running = connections
    end = perf_counter() + seconds

    def done(connection: Connection, status: int) -> None:
        nonlocal running
        now = perf_counter()
        sample.count(status, now - connection.due)
        sample.good += status == 200
        if now < end and not connection.closed:
            connection.send(next(requests), now)
            return
        running -= 1
        if running == 0:
            finished.set()

    opened = [await _connect(port, done) for _ in range(connections)]
    began = perf_counter()
    end = began + seconds
    for connection in opened:
        connection.send(next(requests), perf_counter())
    await asyncio.wait_for(finished.wait(), seconds + 60)
    sample.seconds = perf_counter() - began
    for connection in opened:
        assert connection.transport is not None
        connection.transport.close()
    return sample


@contextmanager
def precedence() -> Iterator[bool]:
    """Give this thread, and those it starts, a core whenever they want one, where that is allowed.

    A client that waits for its core takes the wait for the server's latency. The server needs
    another core: a client with work without end never leaves its own.

    Yields:
        whether it is allowed.
    """
    before = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    except PermissionError:
        yield False
        return
    try:
        yield True
    finally:
        os.sched_setscheduler(0, *before)


async def open_loop(
    port: int,
    requests: Iterator[bytes],
    *,
    rate: float,
    seconds: float,
    connections: int,
    warmup_s: float = 1.0,
    on_counting: Callable[[], object] = lambda: None,
) -> Sample:
    """Requests at fixed times, whether or not the earlier ones are answered.

    Latency counts from the time a request was due, so what waits here for a free connection is part
    of it. Until then this sleeps, and leaves its core to the machine's other processes, which would
    interrupt it or the server else. The first `warmup_s` do not count: the server is still busy
    with the new connections. After that, when `on_counting` is called, every request that was
    due in `seconds` counts, and is waited for; the rate is that of the good answers that came in
    them.
    """
    sample = Sample(seconds=seconds)
    free: list[Connection] = []  # the last one used is the next one used, as in clients' pools
    waiting: deque[float] = deque()
    counting, counted, end = False, 0, 0.0

    def done(connection: Connection, status: int) -> None:
        nonlocal counted
        now = perf_counter()
        sample.good += status == 200 and end - seconds <= now < end
        if end - seconds <= connection.due < end:
            counted -= 1
            sample.count(status, now - connection.due)
        if connection.closed:
            return
        if waiting:
            connection.send(next(requests), waiting.popleft())
        else:
            free.append(connection)

    free.extend([await _connect(port, done) for _ in range(connections)])
    opened = list(free)
    began = perf_counter()
    end = began + warmup_s + seconds
    for number in itertools.count():
        due = began + number / rate
        if due >= end:
            break
        if due >= end - seconds:
            if not counting:
                counting = True
                on_counting()
            counted += 1
        while (left := due - perf_counter()) > 0.0:
            early = left - EARLY_S
            await (asyncio.to_thread(sleep, early) if early > 0 else asyncio.sleep(0))
        if number % 16 == 0:
            await asyncio.sleep(0)  # behind time or not, answers must be read
        if free:
            free.pop().send(next(requests), due)
        else:
            waiting.append(due)
    while counted and perf_counter() < end + 60.0:
        await asyncio.sleep(0.01)
    sample.other += counted
    for connection in opened:
        connection.busy = False
        assert connection.transport is not None
        connection.transport.abort()
    return sample


def run(work: Awaitable[T]) -> T:
    """Run a loop to its end."""

    async def main() -> Any:
        return await work

    result: T = uvloop.run(main())
    return result
