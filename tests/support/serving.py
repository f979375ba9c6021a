"""Real services for tests: the command line in a process, or an app on a socket of this process."""

import asyncio
import os
import re
import signal
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, Protocol

import httpx
import uvicorn
from fastapi import FastAPI

from service.app import create_app
from service.inference.repository import ModelRepository, load_repository
from service.server.protocol import ConnectionLimits, HTTPProtocol
from service.server.sockets import open_sockets, url_of
from service.settings import parse_settings
from tests.support.other_systems import as_on
from tests.support.processes import REPOSITORY, run, start

MODEL = REPOSITORY / "weights" / "mnist.safetensors"


def _environment() -> dict[str, str]:
    """Return an environment with one model, process and thread, so that a service starts fast.

    Services of several tests share the cores: threads that wait for each other would spin.
    """
    clean = {k: v for k, v in os.environ.items() if not k.startswith("CGAN_")}
    return {"OMP_NUM_THREADS": "1", **clean, "CGAN_MODELS": str(MODEL), "CGAN_WORKERS": "1"}


def _client(url: str, unix_socket: str | None = None) -> httpx.Client:
    if unix_socket is None:
        return httpx.Client(base_url=url, timeout=60)
    transport = httpx.HTTPTransport(uds=unix_socket)
    return httpx.Client(base_url="http://localhost", transport=transport, timeout=60)


class Service(Protocol):
    """A running service, wherever it runs."""

    client: httpx.Client


class ServiceProcess:
    """`python -m service` on a free port, as a context manager."""

    def __init__(
        self,
        *arguments: str,
        environment: Mapping[str, str] | None = None,
        module: str = "service",
        command: str = "serve",
        system: str | None = None,  # another one, of `other_systems`
    ) -> None:
        commands = [command] if module == "service" else []
        everything = {**_environment(), **(environment or {})}
        program = ("-m", module) if system is None else as_on(system, module)
        self.process = start(*program, *commands, "--port", "0", *arguments, environment=everything)
        self.errors: list[str] = []
        self._reader = threading.Thread(target=self._read_errors)
        self._reader.start()
        assert self.process.stdout is not None
        self.first_line = self.process.stdout.readline()
        found = re.search(r" at (http://\S+|unix:(\S+))", self.first_line)
        if found is None:
            self.wait()
            raise AssertionError(f"did not start: {self.errors}")
        self.client = _client(*found.groups())

    def _read_errors(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.errors.append(line)

    def signal(self, number: signal.Signals = signal.SIGTERM) -> None:
        self.process.send_signal(number)

    def wait(self) -> int:
        """The exit status; everything it logged is then in `errors`."""
        status = self.process.wait(timeout=60)
        self._reader.join()
        for pipe in (self.process.stdout, self.process.stderr):
            assert pipe is not None
            pipe.close()
        return status

    def __enter__(self) -> "ServiceProcess":
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: object, _trace: TracebackType | None
    ) -> None:
        self.client.close()
        if self.process.returncode is None:
            self.signal()
            self.wait()


def refused(*arguments: str) -> str:
    """Start a service that must not start; return its stderr."""
    ended = run("-m", "service", "--port", "0", *arguments, environment=_environment())
    assert ended.returncode != 0
    assert ended.stdout == ""
    return ended.stderr


@contextmanager
def serving(app: FastAPI, listening: socket.socket | None = None) -> Iterator[httpx.Client]:
    """An app on a real socket, served by uvicorn in a thread of this process.

    Without a socket it is one of IPv4; the client connects to a dual-stack one by IPv4.
    """
    (listening,) = [listening] if listening is not None else open_sockets("127.0.0.1", 0)
    url = url_of(listening).replace("[::]", "127.0.0.1")
    http: Any = partial(HTTPProtocol, ConnectionLimits(app.state.error_app, 60.0, 1000))
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            http=http,
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
        )
    )
    started = threading.Event()

    async def serve() -> None:
        task = asyncio.ensure_future(server.serve([listening]))
        while not server.started and not task.done():
            await asyncio.sleep(0)
        started.set()
        await task

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    started.wait()
    try:
        with _client(url, url.removeprefix("unix:") if url.startswith("unix:") else None) as client:
            yield client
    finally:
        server.should_exit = True
        thread.join()


@dataclass
class LocalService:
    """A service in this process."""

    client: httpx.Client
    repository: ModelRepository


@contextmanager
def serve_here(*arguments: str) -> Iterator[LocalService]:
    """Serve in this process, with the options of `ServiceProcess`: no interpreter has to start."""
    settings = parse_settings(["--models", str(MODEL), *arguments])
    repository = load_repository(settings)
    with serving(create_app(settings, repository)) as client:
        yield LocalService(client, repository)
