"""Clients that misbehave on purpose, and Linux's view of the service."""

import asyncio
import random
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from tests.support.serving import ServiceProcess

TIMEOUT_S = 300.0  # a hang is longer than any queue, and than a machine that stands still
KEPT_S = 3.0  # for how long an idle connection is sure to be kept; the server closes it at 5

MALFORMED = (
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",  # TLS to a plain port
    b"GET\r\n\r\n",
    b"POST /generate?label=1 HTTP/9.9\r\n\r\n",
    b"POST /generate?label=1 HTTP/1.1\r\nHost s\r\n\r\n",
    b"POST /generate HTTP/1.1\r\nHost: s\r\nContent-Length: -5\r\n\r\n",
    b"POST /generate HTTP/1.1\r\nHost: s\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
    b"POST /generate HTTP/1.1\r\nHost: s\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"\x00" * 64 + b"\r\n\r\n",
)


@dataclass(frozen=True)
class Answer:
    """A whole answer; the status is 0 where the server closed the connection without one."""

    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""


class Client:
    """One keep-alive connection, opened again where the server may close it."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._idle_since = 0.0
        self._writer: asyncio.StreamWriter | None = None

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A new connection in place of the one before."""
        self.close()
        self._idle_since = time.monotonic()
        self.reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port)
        return self.reader, self._writer

    async def ask(self, target: str, method: str = "POST", headers: str = "") -> Answer:
        """Send one request and read its answer.

        Raises:
            OSError, EOFError, TimeoutError: the answer did not come, or not whole.
        """
        if self._writer is None or time.monotonic() - self._idle_since > KEPT_S:
            await self.connect()
        assert self._writer is not None
        request = f"{method} {target} HTTP/1.1\r\nHost: s\r\nContent-Length: 0\r\n{headers}\r\n"
        self._writer.write(request.encode())
        return await self.read()

    async def read(self) -> Answer:
        """The next answer."""
        async with asyncio.timeout(TIMEOUT_S):
            head = await self.reader.readuntil(b"\r\n\r\n")
            first, *lines = head.decode("latin-1").strip().split("\r\n")
            headers = {name.lower(): value for name, value in (x.split(": ", 1) for x in lines)}
            body = await self.reader.readexactly(int(headers.get("content-length", 0)))
        if headers.get("connection") == "close":
            self.close()
        self._idle_since = time.monotonic()
        return Answer(int(first.split()[1]), headers, body)

    async def send_raw(self, data: bytes) -> Answer:
        """Send whatever this is on a new connection; what comes back before it is closed."""
        _, writer = await self.connect()
        writer.write(data)
        try:
            return await self.read()
        except (OSError, EOFError):
            return Answer(0)
        finally:
            self.close()

    async def send_slowly(self, request: bytes, *, pause_s: float, at_once: int = 0) -> Answer:
        """Send a request byte by byte, but for the first `at_once`, until it is answered."""
        _, writer = await self.connect()
        writer.write(request[:at_once])
        answer = asyncio.ensure_future(self.read())
        try:
            for position in range(at_once, len(request)):
                await asyncio.wait({answer}, timeout=pause_s)
                if answer.done():
                    break
                writer.write(request[position : position + 1])
            return await answer
        finally:
            answer.cancel()

    def deafen(self) -> None:
        """Read nothing from now on."""
        assert self._writer is not None
        cast(asyncio.Transport, self._writer.transport).pause_reading()

    def drip(self, data: bytes) -> None:
        """Send a little more, if the server still listens."""
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(data)

    def abort(self) -> None:
        """Go away without a word."""
        if self._writer is not None:
            self._writer.transport.abort()
            self._writer = None

    def close(self) -> None:
        """Close the connection, if there is one."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


async def leave(port: int, target: str, *, after_s: float, read_bytes: int = 0) -> None:
    """Ask, read some of the answer, and go away after a random part of `after_s`."""
    client = Client(port)
    reader, writer = await client.connect()
    writer.write(f"POST {target} HTTP/1.1\r\nHost: s\r\n\r\n".encode())
    try:
        if read_bytes:
            async with asyncio.timeout(TIMEOUT_S):
                await reader.read(read_bytes)
        await asyncio.sleep(after_s * random.random())
    finally:
        client.abort()


# The service as others see it --------------------------------------------------------------------


@dataclass(frozen=True)
class Held:
    """The resources of all processes of a service together."""

    memory_mb: float  # resident
    files: int
    threads: int


def held(service: ServiceProcess) -> Held:
    """Return the resources of a service now, its supervisor included."""
    found = [_held(pid) for pid in (service.process.pid, *children(service))]
    return Held(
        sum(each.memory_mb for each in found),
        sum(each.files for each in found),
        sum(each.threads for each in found),
    )


def children(service: ServiceProcess) -> list[int]:
    """The process ids of the workers, where there are several."""
    pid = service.process.pid
    return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _held(pid: int) -> Held:
    status = dict(
        line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines()
    )
    files = sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())
    return Held(int(status["VmRSS"].split()[0]) / 1024, files, int(status["Threads"]))


def port_of(service: ServiceProcess) -> int:
    """The port it said that it listens on."""
    assert service.client.base_url.port is not None
    return service.client.base_url.port


def metric(text: str, name: str, *labels: str) -> float:
    """The sum of all samples of a metric that have these labels (`status="499"`)."""
    return sum(
        float(line.rsplit(" ", 1)[1])
        for line in text.splitlines()
        if line.startswith((f"{name}{{", f"{name} ")) and all(label in line for label in labels)
    )


async def scrape(port: int) -> str:
    """Return `/metrics`, read on a connection of its own."""
    client = Client(port)
    try:
        return (await client.ask("/metrics", "GET")).body.decode()
    finally:
        client.close()


async def at_rest(service: ServiceProcess) -> Held:
    """Return the resources of a service once it is idle.

    Raises:
        TimeoutError: something is still queued, in progress or connected.
    """
    port = port_of(service)
    async with asyncio.timeout(TIMEOUT_S):
        last: tuple[int, int] | None = None
        while True:
            text = await scrape(port)
            quiet = metric(text, "cgan_queue_images") == 0
            quiet &= metric(text, "cgan_requests_in_progress") == 0
            # A connection that its client closed is closed here a moment later.
            await asyncio.sleep(0.5)
            now = held(service)
            if quiet and last == (now.files, now.threads):
                return now
            last = (now.files, now.threads)


def percentile(values: Iterable[float], percent: float) -> float:
    """A percentile of some values; 0 of none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(percent / 100 * len(ordered)))] if ordered else 0.0
