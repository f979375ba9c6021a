"""HTTP/1.1 connections: joined writes, and an end to clients that are slow or hostile.

Uvicorn writes an answer's head and body as they come, which is one more system call, one more
packet, and one more time that the client wakes up, for every answer. And it waits for a client, and
keeps what one sends, without a bound; nor does it tell a request that its client has gone.
"""

import asyncio
import logging
import resource
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

import httptools
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import (
    HttpToolsProtocol,
    RequestResponseCycle,
)
from uvicorn.server import ServerState

from service.errors import Problem
from service.generation import CLIENT, Client

MAX_TARGET_BYTES = 1 << 14  # 16 KiB: 1024 labels with long names
MAX_HEAD_BYTES = 1 << 16
MAX_HEADERS = 128
MAX_BODY_BYTES = 1 << 20
MAX_PIPELINED = 64  # requests of one connection that wait for the answers before theirs
MAX_UNREAD_BYTES = 1 << 28  # of the answers that clients have yet to read, all together

TIMEOUT_CHECK_S = 1.0  # between two looks for clients that keep the server waiting
_SWEPT_AT_ONCE = 16  # connections
_LINGER_S = 2.0  # for a client that was told of the end to end it too
_BEYOND = 256  # connections above the limit that are told so; beyond these, none is
_OTHER_FILES = 512  # that the process may need besides connections

log = logging.getLogger("service.server.protocol")


@dataclass
class ConnectionLimits:
    """What holds for all connections of a server.

    Attributes:
        refusal: answers in place of the app, with the `problem` of the scope.
        client_timeout_s: how long a client may keep the server waiting.
        max_connections: most that are open at a time; more are answered 503 and closed.
        draining: whether every answer is the last one of its connection.
        on_lost: called when a connection has ended.
    """

    refusal: ASGIApp
    client_timeout_s: float
    max_connections: int
    draining: bool = False
    on_lost: Callable[[], object] = lambda: None


class WriteCoalescingTransport:
    """A transport that joins what is written in one turn of the event loop."""

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport, self._loop = transport, loop
        self._pending: list[bytes] = []
        self.closed = False  # on our side; the client may yet have to read, and to end its own

    def write(self, data: bytes) -> None:
        """Send data at the end of this turn of the event loop."""
        if not self._pending:
            self._loop.call_soon(self._flush)
        self._pending.append(data)

    def close(self) -> None:
        """Send what is left and the end, and let the client close the connection.

        Closed outright, the kernel would reset a connection on which the client still sends, and
        the client might lose the answer.
        """
        self._flush()
        if not self.is_closing():
            self.closed = True
            self._transport.resume_reading()
            self._transport.write_eof()

    def is_closing(self) -> bool:
        """Whether nothing can be sent any more."""
        return self.closed or self._transport.is_closing()

    def _flush(self) -> None:
        if self._pending:
            data = b"".join(self._pending) if len(self._pending) > 1 else self._pending[0]
            self._pending.clear()
            if not self.is_closing():  # else nobody reads it
                self._transport.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


class HTTPProtocol(HttpToolsProtocol):
    """Uvicorn's HTTP protocol over a `WriteCoalescingTransport`, with bounds.

    Time is not measured by a timer per request, which would cost as much as parsing it: `sweep`
    compares every connection with what it was a second before.
    """

    transport: WriteCoalescingTransport  # type: ignore[assignment]

    def __init__(
        self,
        terms: ConnectionLimits,
        config: uvicorn.Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._terms = terms
        self._whole = True  # every request that began has come to its end
        self._partial_bytes = 0  # of the one that has not, roughly
        self._requests = 0
        self._deaf = False  # what else the client sends means nothing
        self._progress: object = None  # when the sweep last saw any
        self._since = 0.0

    # The beginning and the end ------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin a connection."""
        self._client = Client()
        super().connection_made(WriteCoalescingTransport(transport, self.loop))  # type: ignore[arg-type]
        beyond = len(self.connections) - self._terms.max_connections
        if beyond > _BEYOND:
            self._deaf = True
            self.transport.abort()
        elif beyond > 0:
            detail = f"All {self._terms.max_connections} connections are taken; try again later."
            self._refuse(Problem(503, "too-many-connections", detail, headers={"Retry-After": "1"}))

    def connection_lost(self, error: Exception | None) -> None:
        """End the connection, and the request that was being answered."""
        super().connection_lost(error)
        self._client.gone = True
        if self._client.on_gone is not None:
            self._client.on_gone()
        self._terms.on_lost()

    def drain(self) -> None:
        """Let the answer under way be the last one of this connection."""
        if self.cycle is not None:
            self.cycle.keep_alive = False

    def shutdown(self) -> None:
        """End the connection once nothing is owed to the client."""
        if self._answering:
            self.drain()
        elif not self._whole:
            self._give_up(Problem(503, "draining", "The service is shutting down."))
        elif self.transport.get_write_buffer_size():
            self.transport.close()
        else:
            self.transport.abort()

    @property
    def _answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    # What comes ---------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        """Take what the client sends."""
        if self._deaf or self.transport.closed:
            return
        begun = self._requests
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            # Answered as plain HTTP. What follows is in no protocol that is spoken here.
            self._deaf = True
            self.cycle.keep_alive = False
        except httptools.HttpParserError as error:
            if not self._deaf:
                self._give_up(_malformed(error))
        if not self._whole:
            self._check_partial(len(data) if begun == self._requests else None)

    def on_message_begin(self) -> None:
        """Begin a request."""
        if not self._deaf:
            super().on_message_begin()
            self.scope[CLIENT] = self._client  # type: ignore[literal-required]
            self._whole = False
            self._requests += 1

    def on_headers_complete(self) -> None:
        """Hand a request on to the app, unless its head breaks a bound."""
        if self._deaf:
            return
        problem = self._find_problem()
        if problem is not None:
            self._refuse(problem)
            return
        super().on_headers_complete()
        # After a body that may never come, nobody could tell where the next request begins.
        if self._terms.draining or self.expect_100_continue:
            self.cycle.keep_alive = False

    def on_message_complete(self) -> None:
        """End a request."""
        self._whole = True
        super().on_message_complete()

    def _find_problem(self) -> Problem | None:
        """Which bound a complete head breaks."""
        for name, value in self.headers:
            if name == b"content-length" and int(value) > MAX_BODY_BYTES:
                return _body_too_large()
        if self.parser.get_http_version() not in {"1.1", "1.0"}:
            return Problem(505, "http-version", "HTTP/1.1 and HTTP/1.0 are spoken here.")
        if len(self.pipeline) >= MAX_PIPELINED:
            detail = f"More than {MAX_PIPELINED} requests wait on this connection."
            return Problem(429, "too-many-pipelined", detail, headers={"Retry-After": "1"})
        return self._find_excess(self._count_head())

    def _find_excess(self, head_bytes: int) -> Problem | None:
        """Which bound the part of a head breaks that has come."""
        if len(self.url) > MAX_TARGET_BYTES:
            return Problem(
                414, "target-too-long", f"A target of at most {MAX_TARGET_BYTES} bytes is allowed."
            )
        if len(self.headers) > MAX_HEADERS or head_bytes > MAX_HEAD_BYTES:
            limits = f"{MAX_HEADERS} headers and {MAX_HEAD_BYTES} bytes"
            return Problem(431, "head-too-large", f"A head of at most {limits} is allowed.")
        return None

    def _count_head(self) -> int:
        return len(self.url) + sum(len(name) + len(value) for name, value in self.headers)

    def _check_partial(self, more: int | None) -> None:
        """Bound a request that has not come to its end.

        Args:
            more: bytes of it that came just now; None if they came together with its predecessors'.
        """
        if self._deaf:
            return
        self._partial_bytes = self._count_head() if more is None else self._partial_bytes + more
        if self._in_head:
            problem = self._find_excess(self._partial_bytes)
            if problem is not None:
                self._refuse(problem)
        elif self._partial_bytes > MAX_HEAD_BYTES + MAX_BODY_BYTES:  # in chunks
            self._give_up(_body_too_large())

    def _give_up(self, problem: Problem) -> None:
        """Refuse what is coming in, be it a head or the body of a request that the app has."""
        if not self._whole and not self._in_head:
            self.cycle.keep_alive = False
            if self.cycle.response_started:  # which was the answer
                self._deaf = self._whole = True
                if self.cycle.response_complete:
                    self.transport.close()
                return
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self._refuse(problem)

    @property
    def _in_head(self) -> bool:
        return self.cycle is None or self.cycle.scope is not self.scope

    def _refuse(self, problem: Problem) -> None:
        """Answer with a problem, after the answers that are due before, and close."""
        self._deaf = self._whole = True
        path = self.url.decode("latin-1") if self.scope is not None else ""
        before = self.cycle
        super().on_message_begin()
        scope: Any = self.scope
        scope |= {"method": "-", "path": path, "query_string": b"", "problem": problem}
        self.cycle = RequestResponseCycle(
            scope=scope,
            transport=self.transport,  # type: ignore[arg-type]
            flow=self.flow,
            logger=self.logger,
            access_logger=self.access_logger,
            access_log=False,
            default_headers=self.server_state.default_headers,
            message_event=asyncio.Event(),
            expect_100_continue=False,
            keep_alive=False,
            on_response=self.on_response_complete,
        )
        refusal: Any = self._terms.refusal
        if before is None or before.response_complete or before.disconnected:
            self._start_asgi_task(self.cycle, refusal)
        else:
            self.pipeline.appendleft((self.cycle, refusal))

    # What goes ----------------------------------------------------------------------------------

    def on_response_complete(self) -> None:
        """Go on with the next request; the sweep sees to it that there is one."""
        self.server_state.total_requests += 1
        if not self.transport.is_closing():
            self.flow.resume_reading()
            if self.pipeline:
                self._start_asgi_task(*self.pipeline.pop())

    # Time ---------------------------------------------------------------------------------------

    def sweep(self, now: float) -> int:
        """End the connection if its client has kept the server waiting for too long.

        Returns:
            how many bytes of answers the client has yet to read.
        """
        unread: int = self.transport.get_write_buffer_size()
        progress = (self._requests, self._whole, self.transport.closed, unread)
        if progress != self._progress or (not unread and self._is_our_turn()):
            self._progress, self._since = progress, now
            return unread
        lingers = self.transport.closed and not unread
        if now - self._since >= (_LINGER_S if lingers else self._terms.client_timeout_s):
            self._time_out(unread)
        return unread

    def _is_our_turn(self) -> bool:
        return self.flow.read_paused or (self._whole and self._answering)

    def _time_out(self, unread: int) -> None:
        if unread or self._whole:
            self.transport.abort()
            return
        detail = f"The request was not complete after {self._terms.client_timeout_s:g} s."
        self._give_up(Problem(408, "request-timeout", detail))


def sweep(connections: Collection[HTTPProtocol], clock: Callable[[], float]) -> Iterator[None]:
    """End the connections that waited too long for their clients, and those that hold too much.

    Memory that waits for clients is bounded: those that have the most to read are cut off first.

    Args:
        connections: that are open, also those that are made or lost meanwhile.
        clock: of the event loop.

    Yields:
        after every few, so that others have their turn: a look takes some 5 us, and there may be
        thousands.
    """
    unread = {}
    for number, connection in enumerate(list(connections), 1):
        if connection in connections:
            unread[connection] = connection.sweep(clock())
        if number % _SWEPT_AT_ONCE == 0:
            yield
    excess = sum(unread.values()) - MAX_UNREAD_BYTES
    if excess <= 0:
        return
    for connection in sorted(unread, key=unread.__getitem__, reverse=True):
        connection.transport.abort()
        excess -= unread[connection]
        if excess <= 0:
            break
    log.warning("answers that clients did not read were dropped")


def raise_nofile_limit(connections: int) -> int:
    """Raise the process's limit of open files; how many of so many connections it has room for."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    room = max(1, most - _OTHER_FILES - _BEYOND)
    if most == resource.RLIM_INFINITY or room >= connections:
        return connections
    fields = {"open_files": most, "max_connections": room}
    log.warning("few files may be open, so fewer connections are taken", extra={"fields": fields})
    return room


def _malformed(error: httptools.HttpParserError) -> Problem:
    inner = isinstance(error, httptools.HttpParserCallbackError)  # said in terms of our own code
    reason = "the target makes no sense" if inner else str(error)
    return Problem(400, "malformed-request", f"This is no HTTP/1.1 request: {reason}.")


def _body_too_large() -> Problem:
    return Problem(
        413, "body-too-large", f"A body of at most {MAX_BODY_BYTES} bytes is allowed here."
    )
