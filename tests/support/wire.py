"""Clients that speak to a service in bytes, for what no HTTP library would send."""

import io
import json
import select
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from http.client import HTTPException, HTTPResponse
from typing import Any, cast

from tests.support.serving import Service

TIMEOUT_S = 60.0
LAST = b"GET /livez HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n"


@dataclass
class Answer:
    """One answer, as it came."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def problem(self) -> dict[str, Any]:
        assert self.headers["content-type"] == "application/problem+json"
        found: dict[str, Any] = json.loads(self.body)
        assert found["status"] == self.status
        assert found["request_id"] == self.headers["x-request-id"]
        return found

    @property
    def gist(self) -> tuple[int, bytes]:
        """The part of an answer that equal requests share."""
        own = self.headers.get("x-request-id", "none").encode()
        return self.status, self.body.replace(own, b"")


@dataclass
class Client:
    """A connection, and all that came over it."""

    service: Service
    window: int | None = None  # bytes that may wait here to be read; None: as many as usual
    received: bytearray = field(default_factory=bytearray)
    ended: bool = False  # by the service
    was_reset: bool = False

    def __post_init__(self) -> None:
        self.socket = socket.socket()
        self.socket.settimeout(TIMEOUT_S)
        if self.window is not None:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self.window)
        self.socket.connect(address(self.service))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, data: bytes) -> None:
        """Send what the service still takes."""
        try:
            self.socket.sendall(data)
        except OSError:
            self.was_reset = True

    def receive(self) -> None:
        """Take what has come, or wait for something to come."""
        try:
            data = self.socket.recv(1 << 20)
        except ConnectionResetError:
            data, self.was_reset = b"", True
        self.received += data
        if not data:
            self.ended = True
            self.socket.close()

    def wait(self) -> list[Answer]:
        """All answers, once the service has ended the connection."""
        while not self.ended:
            self.receive()
        return self.answers()

    def answers(self) -> list[Answer]:
        """All answers, which have to be complete."""
        return parse(bytes(self.received))


def wait_until(reached: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not reached():
        assert time.monotonic() < deadline, f"never happened: {what}"
        time.sleep(0.005)  # for threads of this process, which may be what it waits for


def address(service: Service) -> tuple[str, int]:
    return service.client.base_url.host, service.client.base_url.port or 0


def ask(service: Service, *parts: bytes) -> list[Answer]:
    """The answers to bytes sent in parts, by a service that then ends the connection."""
    client = Client(service)
    for part in parts:
        client.send(part)
    return client.wait()


def drain(clients: Sequence[Client], patience_s: float = TIMEOUT_S) -> None:
    """Read until the service has ended every connection."""
    deadline = time.monotonic() + patience_s
    while left := {client.socket: client for client in clients if not client.ended}:
        poll = select.poll()
        numbers = {each.fileno(): client for each, client in left.items()}
        for number in numbers:
            poll.register(number, select.POLLIN)
        ready = poll.poll(1e3 * max(0.0, deadline - time.monotonic()))
        assert ready, f"not ended: {[bytes(client.received) for client in left.values()][:3]}"
        for number, _ in ready:
            numbers[number].receive()


class _Open(io.BytesIO):
    """Bytes that one answer after the other is read from."""

    def close(self) -> None:
        pass

    def makefile(self, *_: object) -> "_Open":
        return self


def parse(received: bytes) -> list[Answer]:
    """Answers one after the other; the last one has to be complete.

    Raises:
        http.client.HTTPException: malformed HTTP.
    """
    source, answers = _Open(received), []
    while source.tell() < len(received):
        response = HTTPResponse(cast(socket.socket, source))
        response.begin()
        body = response.read()
        headers = {name.lower(): value for name, value in response.getheaders()}
        if "content-length" not in headers:
            raise HTTPException(f"no length: {headers}")
        answers.append(Answer(response.status, headers, body))
    return answers
