"""HTTP/1.1 connections with limits, timeouts and coalesced writes.

Uvicorn writes the head and the body of a response separately, which costs a system call and a
packet more. It limits neither the size of a request nor the time that a client takes to send one or
to read the response, and it does not tell a request that its client has disconnected.

The names of uvicorn that this module relies on are listed in tests/service/server/
test_private_names.py.
"""

import asyncio
import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import httptools
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from service.disconnect import CLIENT, Client
from service.errors import Problem

try:
    import resource
except ModuleNotFoundError:  # on Windows, which does not limit open files so
    resource = None  # type: ignore[assignment]

MAX_TARGET_BYTES = 1 << 14  # 16 KiB: 1024 labels with long names
MAX_HEAD_BYTES = 1 << 16
MAX_HEADERS = 128
MAX_BODY_BYTES = 1 << 20
MAX_PIPELINED = 64  # queued requests of one connection
MAX_UNREAD_BYTES = 1 << 28  # responses that clients have yet to read, of all connections

TIMEOUT_CHECK_S = 1.0  # interval of `enforce_timeouts`
CHECK_BATCH = 16  # connections that it checks between two turns of the event loop
LINGER_S = 2.0  # time for the client to close its side after the server closed its own
EXCESS_CONNECTIONS = 256  # over the limit, that still get a 503; any further ones are reset
OTHER_FILES = 512  # file descriptors for everything but connections

_UNENCODED = (
    "the request target has a character that must be percent-encoded, such as a space or a letter "
    "beyond ASCII; let the client encode it: curl -G --data-urlencode 'label=猫' URL"
)

log = logging.getLogger("service.server.protocol")


@dataclass
class ConnectionLimits:
    """Settings and state that all connections of a server share."""

    error_app: ASGIApp  # sends the `problem` of the scope
    client_timeout_s: float  # that a client may keep the server waiting
    max_connections: int  # open ones; any more get a 503
    draining: bool = False  # close every connection after its next response


class WriteCoalescingTransport:
    """Transport that joins the data written in one turn of the event loop."""

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport, self._loop = transport, loop
        self._pending: list[bytes] = []
        self.closed = False  # by the server; the client may yet read, and close its own side

    def write(self, data: bytes) -> None:
        """Send data at the end of this turn of the event loop."""
        if not self._pending:
            self._loop.call_soon(self._flush)
        self._pending.append(data)

    def close(self) -> None:
        """Send pending data and EOF, then wait for the client to close the connection.

        The kernel resets a connection that is closed while the client still sends, and the client
        could lose the response.
        """
        self._flush()
        if not self.is_closing():
            self.closed = True
            self._transport.resume_reading()
            self._transport.write_eof()

    def is_closing(self) -> bool:
        """Return True if nothing can be sent any more."""
        return self.closed or self._transport.is_closing()

    def _flush(self) -> None:
        if self._pending:
            data = b"".join(self._pending) if len(self._pending) > 1 else self._pending[0]
            self._pending.clear()
            if not self.is_closing():
                self._transport.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


class HTTPProtocol(HttpToolsProtocol):
    """Uvicorn's HTTP/1.1 protocol over a `WriteCoalescingTransport`, with limits.

    A timer per request would cost as much as parsing it. `enforce_timeouts` compares each
    connection with its state of a second before instead.
    """

    transport: WriteCoalescingTransport  # type: ignore[assignment]

    def __init__(
        self,
        limits: ConnectionLimits,
        config: uvicorn.Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._limits = limits
        self._request_complete = True  # every request that began was received completely
        self._partial_bytes = 0  # size of the incomplete request, approximately
        self._requests = 0
        self._unanswered: list[RequestResponseCycle] = []  # in the order of the requests
        self._ignore_input = False
        self._last_state: object = None  # at the last check of timeouts that saw any progress
        self._last_progress = 0.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin a connection; refuse it over the limit."""
        self._client = Client()
        super().connection_made(WriteCoalescingTransport(transport, self.loop))  # type: ignore[arg-type]
        limit = self._limits.max_connections
        excess = len(self.connections) - limit
        if excess > EXCESS_CONNECTIONS:
            self._ignore_input = True
            self.transport.abort()
        elif excess > 0:
            detail = f"All {limit} connections are in use; try again later."
            headers = {"Retry-After": "1"}
            self._send_error(Problem(503, "too-many-connections", detail, headers=headers))

    def connection_lost(self, error: Exception | None) -> None:
        """End the connection and cancel its requests."""
        super().connection_lost(error)
        for cycle in self._unanswered:  # uvicorn tells the latest one only
            if not cycle.response_complete:
                cycle.disconnected = True
                cycle.message_event.set()
        self._client.disconnect()

    def drain(self) -> None:
        """Close the connection after the response to its latest request."""
        if self.cycle is not None:
            self.cycle.keep_alive = False

    def shutdown(self) -> None:
        """Close the connection as soon as the client has its responses."""
        if self._responding:
            self.drain()
        elif not self._request_complete:
            self._abort_request(Problem(503, "draining", "The service is shutting down."))
        elif self.transport.get_write_buffer_size():
            self.transport.close()
        else:
            self.transport.abort()

    def timeout_keep_alive_handler(self) -> None:
        """Do nothing: `enforce_timeouts` closes idle connections."""

    @property
    def _responding(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def data_received(self, data: bytes) -> None:
        """Parse data of the client; called by the transport."""
        if self._ignore_input or self.transport.closed:
            return
        begun = self._requests
        try:
            self._parse(memoryview(data))
        except httptools.HttpParserError as error:
            if not self._ignore_input:
                self._abort_request(_parser_problem(error))
        if not self._request_complete:
            self._check_partial(len(data) if begun == self._requests else None)

    def _parse(self, data: memoryview) -> None:
        """Parse data, and read every request that offers an upgrade as if it did not.

        The parser ends a request with such an offer at its head. A client that makes the offer
        (`Upgrade: h2c`) sends the body and further requests in HTTP/1.1 until a server accepts it.

        Raises:
            HttpParserError: malformed HTTP.
        """
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            if not self._ignore_input:
                head = self._head_without_upgrade()
                self.parser = httptools.HttpRequestParser(self)
                # As uvicorn does: ignore what follows a request with `Connection: close`.
                self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
                self.parser.feed_data(head)
                self._parse(data[upgrade.args[0] :])  # at most MAX_PIPELINED times

    def _head_without_upgrade(self) -> bytes:
        method, version = self.parser.get_method(), self.parser.get_http_version()
        headers = [b"%s: %s" % each for each in self.headers if each[0] != b"upgrade"]
        request_line = b"%s %s HTTP/%s" % (method, self.url, version.encode())
        return b"\r\n".join((request_line, *headers, b"", b""))

    def on_message_begin(self) -> None:
        """Begin a request; called by the parser, like the following methods."""
        if not self._ignore_input:
            super().on_message_begin()
            self.scope[CLIENT] = self._client  # type: ignore[literal-required]
            self._request_complete = False
            self._requests += 1

    def on_headers_complete(self) -> None:
        """Pass a request to the app, unless its head breaks a limit."""
        if self._ignore_input or self._offers_upgrade:
            return
        problem = self._check_head()
        if problem is not None:
            self._send_error(problem)
            return
        super().on_headers_complete()
        unanswered = [each for each in self._unanswered if not each.response_complete]
        self._unanswered = [*unanswered, self.cycle]
        # A client may omit a body that it announced with Expect: 100-continue, so that nobody knows
        # where its next request begins.
        if self._limits.draining or self.expect_100_continue:
            self.drain()

    def on_message_complete(self) -> None:
        """End a request."""
        if not self._reading_head:  # the parser calls this for an offer to upgrade too
            self._request_complete = True
            super().on_message_complete()

    @property
    def _offers_upgrade(self) -> bool:
        # To the parser, CONNECT is an upgrade too.
        return self.parser.should_upgrade() and self.parser.get_method() != b"CONNECT"

    def _check_head(self) -> Problem | None:
        """Return the problem of a complete head."""
        for name, value in self.headers:
            if name == b"content-length" and int(value) > MAX_BODY_BYTES:
                return _body_too_large()
        if self.parser.get_method() == b"CONNECT":
            return _malformed("CONNECT is for proxies, and this service is not one")
        if self.parser.get_http_version() not in {"1.1", "1.0"}:
            return _unsupported_version()
        if len(self.pipeline) >= MAX_PIPELINED:
            detail = f"More than {MAX_PIPELINED} requests are queued on this connection."
            return Problem(429, "too-many-pipelined", detail, headers={"Retry-After": "1"})
        return self._check_head_size(self._head_bytes())

    def _check_head_size(self, head_bytes: int) -> Problem | None:
        if len(self.url) > MAX_TARGET_BYTES:
            detail = f"The request target may have at most {MAX_TARGET_BYTES} bytes."
            return Problem(414, "target-too-long", detail)
        if len(self.headers) > MAX_HEADERS or head_bytes > MAX_HEAD_BYTES:
            detail = f"At most {MAX_HEADERS} headers and {MAX_HEAD_BYTES} bytes are allowed."
            return Problem(431, "head-too-large", detail)
        return None

    def _head_bytes(self) -> int:
        return len(self.url) + sum(len(name) + len(value) for name, value in self.headers)

    def _check_partial(self, received: int | None) -> None:
        """Limit the size of an incomplete request.

        `received` bytes of it have just come, or None if they came together with others.
        """
        if self._ignore_input:
            return
        if received is None:
            self._partial_bytes = self._head_bytes()
        else:
            self._partial_bytes += received
        if self._reading_head:
            problem = self._check_head_size(self._partial_bytes)
            if problem is not None:
                self._send_error(problem)
        elif self._partial_bytes > MAX_HEAD_BYTES + MAX_BODY_BYTES:  # a chunked body
            self._abort_request(_body_too_large())

    @property
    def _reading_head(self) -> bool:
        return self.cycle is None or self.cycle.scope is not self.scope

    def _abort_request(self, problem: Problem) -> None:
        """Send an error in place of the response to the latest request, if it is incomplete."""
        if not self._request_complete and not self._reading_head:
            if self.cycle.response_started:  # too late for another one
                self._ignore_input = self._request_complete = True
                self.drain()
                if self.cycle.response_complete:
                    self.transport.close()
                return
            if self.pipeline:
                self.pipeline.popleft()  # where uvicorn puts the latest request
            else:
                self.cycle.disconnected = True  # so that the app stops and sends nothing
                self.cycle.message_event.set()
                self.cycle = None  # type: ignore[assignment]
        self._send_error(problem)

    def _send_error(self, problem: Problem) -> None:
        """Send an error after the responses to earlier requests, and close the connection.

        For uvicorn it is one more request, to an app that sends the error.
        """
        path = self.url.decode("latin-1") if self.scope is not None else ""
        self._ignore_input = self._request_complete = True
        super().on_message_begin()
        error_app: Any = self._limits.error_app
        self.app, self.url = error_app, b"/"
        super().on_headers_complete()
        self.drain()
        scope: Any = self.scope
        scope |= {"method": "-", "path": path, "query_string": b"", "problem": problem}

    def check_timeout(self, now: float) -> int:
        """Close the connection if its client has kept the server waiting for too long.

        Returns:
            bytes of responses that the client has yet to read.
        """
        unread: int = self.transport.get_write_buffer_size()
        state = (self._requests, self._request_complete, self.transport.closed, unread)
        if state != self._last_state or (not unread and self._server_is_busy):
            self._last_state, self._last_progress = state, now
            return unread
        lingers = self.transport.closed and not unread
        timeout_s = self._limits.client_timeout_s
        if now - self._last_progress >= (LINGER_S if lingers else timeout_s):
            if unread or self._request_complete:
                self.transport.abort()
            else:
                detail = f"The request was not received within {timeout_s:g} s."
                self._abort_request(Problem(408, "request-timeout", detail))
        return unread

    @property
    def _server_is_busy(self) -> bool:
        return self.flow.read_paused or (self._request_complete and self._responding)


async def enforce_timeouts(
    connections: Collection[HTTPProtocol], clock: Callable[[], float]
) -> None:
    """Close the connections that kept the server waiting for too long, and limit unread responses.

    If clients leave more than `MAX_UNREAD_BYTES` unread, those with the most are cut off first.
    The connections may change while this runs. A check takes about 5 us and there may be
    thousands, so requests have their turn after every few.
    """
    unread = {}
    for number, connection in enumerate(list(connections), 1):
        if connection in connections:
            unread[connection] = connection.check_timeout(clock())
        if number % CHECK_BATCH == 0:
            await asyncio.sleep(0)
    excess = sum(unread.values()) - MAX_UNREAD_BYTES
    if excess <= 0:
        return
    for connection in sorted(unread, key=unread.__getitem__, reverse=True):
        connection.transport.abort()
        excess -= unread[connection]
        if excess <= 0:
            break
    log.warning("dropped responses that clients did not read")


def raise_nofile_limit(connections: int) -> int:
    """Raise the limit of open files as far as the connections need it and the system allows.

    Returns:
        the connections, at most as asked, that it allows.
    """
    if resource is None:
        return connections
    needed = connections + OTHER_FILES + EXCESS_CONNECTIONS
    files, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    while files != resource.RLIM_INFINITY and wanted > files:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            files = wanted
        except (OSError, ValueError):  # macOS allows less than its hard limit
            wanted = (files + wanted) // 2
    if files == resource.RLIM_INFINITY or files >= needed:
        return connections
    allowed = max(1, files - OTHER_FILES - EXCESS_CONNECTIONS)
    fields = {"open_files": files, "max_connections": allowed}
    log.warning("the limit of open files lowers --max-connections", extra={"fields": fields})
    return allowed


def _parser_problem(error: httptools.HttpParserError) -> Problem:
    reason = str(error)
    if reason == "Pause on PRI/Upgrade":  # the first bytes of HTTP/2
        return _unsupported_version()
    after_space = reason.startswith("Expected HTTP/")
    if isinstance(error, httptools.HttpParserInvalidURLError) or after_space:
        reason = _UNENCODED
    elif isinstance(error, httptools.HttpParserCallbackError):  # names one of our callbacks
        reason = "invalid request target"
    return _malformed(reason)


def _malformed(reason: str) -> Problem:
    return Problem(400, "malformed-request", f"Malformed HTTP/1.1 request: {reason}.")


def _unsupported_version() -> Problem:
    return Problem(505, "http-version", "Only HTTP/1.1 and HTTP/1.0 are supported.")


def _body_too_large() -> Problem:
    detail = f"The request body may have at most {MAX_BODY_BYTES} bytes."
    return Problem(413, "body-too-large", detail)
