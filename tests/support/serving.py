"""Real services for tests: the command line in a process, or an app on a socket of this process."""

import asyncio
import os
import re
import signal
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
from service.settings import parse_settings
from tests.support.processes import REPOSITORY, run, start

MODEL = REPOSITORY / "weights" / "mnist.safetensors"


def _environment() -> dict[str, str]:
    """Return an environment with one model and one thread, with which a service starts fast.

    Services of several tests share the cores: threads that wait for each other would spin.
    """
    clean = {k: v for k, v in os.environ.items() if not k.startswith("CGAN_")}
    return {"OMP_NUM_THREADS": "1", **clean, "CGAN_MODELS": str(MODEL)}


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
    ) -> None:
        commands = [command] if module == "service" else []
        everything = {**_environment(), **(environment or {})}
        self.process = start(
            "-m", module, *commands, "--port", "0", *arguments, environment=everything
        )
        self.errors: list[str] = []
        self._reader = threading.Thread(target=self._read_errors)
        self._reader.start()
        assert self.process.stdout is not None
        self.first_line = self.process.stdout.readline()
        found = re.search(r"http://[\d.]+:\d+", self.first_line)
        if found is None:
            self.wait()
            raise AssertionError(f"did not start: {self.errors}")
        self.client = httpx.Client(base_url=found.group(), timeout=60)

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
def serving(app: FastAPI) -> Iterator[httpx.Client]:
    """An app on a real socket, served by uvicorn in a thread of this process."""
    http: Any = partial(HTTPProtocol, ConnectionLimits(app.state.error_app, 60.0, 1000))
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            port=0,
            http=http,
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
        )
    )
    started = threading.Event()

    async def serve() -> None:
        task = asyncio.ensure_future(server.serve())
        while not server.started and not task.done():
            await asyncio.sleep(0)
        started.set()
        await task

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    started.wait()
    host, port = server.servers[0].sockets[0].getsockname()
    try:
        with httpx.Client(base_url=f"http://{host}:{port}", timeout=60) as client:
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
