"""HTTP/1.1 connections, as uvicorn's, with what serving images needs beyond.

An answer's head and body are sent together: uvicorn writes the two as they come, which is one more
system call, one more packet, and one more time that the client wakes up, for every answer. And a
request is told at once when its client has gone, instead of asking for it in a task of its own.
"""

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from service.generation import CLIENT, Client


class JoiningTransport:
    """A transport that joins what is written in one turn of the event loop."""

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport, self._loop = transport, loop
        self._pending: list[bytes] = []

    def write(self, data: bytes) -> None:
        """Send data at the end of this turn of the event loop."""
        if not self._pending:
            self._loop.call_soon(self._flush)
        self._pending.append(data)

    def close(self) -> None:
        """Send what is left, and close."""
        self._flush()
        self._transport.close()

    def _flush(self) -> None:
        if self._pending:
            data = b"".join(self._pending) if len(self._pending) > 1 else self._pending[0]
            self._pending.clear()
            if not self._transport.is_closing():  # else nobody reads it
                self._transport.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


class JoiningProtocol(HttpToolsProtocol):
    """Uvicorn's HTTP protocol over a `JoiningTransport`, with a `Client`."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin a connection."""
        self._client = Client()
        super().connection_made(JoiningTransport(transport, self.loop))  # type: ignore[arg-type]

    def on_message_begin(self) -> None:
        """Begin a request."""
        super().on_message_begin()
        self.scope[CLIENT] = self._client  # type: ignore[literal-required]

    def connection_lost(self, error: Exception | None) -> None:
        """End the connection, and the request that was being answered."""
        super().connection_lost(error)
        self._client.gone = True
        if self._client.on_gone is not None:
            self._client.on_gone()
