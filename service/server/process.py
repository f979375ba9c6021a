"""One process that serves: it loads the models, opens the port, and drains before it exits."""

import asyncio
import logging
import os
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import prometheus_client
import uvicorn
from fastapi import FastAPI

from service.app import create_app
from service.failure import ServiceError
from service.inference.devices import describe_device, is_gpu
from service.inference.repository import ModelRepository, load_repository
from service.server import protocol
from service.server.metrics_port import open_metrics_port
from service.server.sockets import (
    open_sockets,
    open_unix_socket,
    remove_socket_file,
    startup_message,
    url_of,
)
from service.settings import Settings
from service.telemetry.logging import configure_logging, flush_logs
from service.telemetry.metrics import Metrics
from training.artifact import ArtifactError
from training.machine import DeviceError, count_cuda_devices

log = logging.getLogger("service.server.process")

EX_TEMPFAIL = 75  # of sysexits.h: a new process may succeed; `os.EX_TEMPFAIL` is Unix only
CLOSE_GRACE_S = 0.2  # for requests in transit when the port closes: to arrive and be answered


class Server(uvicorn.Server):
    """Uvicorn that drains before it stops.

    On the first SIGTERM or SIGINT the service reports that it is not ready, serves on for the drain
    delay, answers the requests that it has admitted, closes the port and exits with status 0; a
    second signal ends it at once. SIGHUP reloads all models. When a device is lost, the process
    answers the requests that it has and exits with status 75 (EX_TEMPFAIL).

    It calls `on_started` once it serves. If it is `supervised`, the second signal is left to the
    supervisor: a signal to a group of processes reaches a worker twice, directly and by its
    supervisor.
    """

    def __init__(
        self,
        app: FastAPI,
        settings: Settings,
        sockets: list[socket.socket],
        on_started: Callable[[], None],
        *,
        supervised: bool = False,
    ) -> None:
        self._limits = protocol.ConnectionLimits(
            app.state.error_app,
            settings.client_timeout_s,
            protocol.raise_nofile_limit(settings.max_connections),
        )
        http: Any = partial(protocol.HTTPProtocol, self._limits)
        super().__init__(
            uvicorn.Config(
                app,
                http=http,
                workers=1,  # or uvicorn would parse WEB_CONCURRENCY
                ws="none",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                lifespan="on",
                timeout_graceful_shutdown=5,
            )
        )
        app.state.readiness.on_device_lost = self._on_device_lost
        self._state = app.state
        self._drain_delay_s = settings.drain_delay_s
        self._sockets, self._supervised = sockets, supervised
        self._report_started = on_started
        self._connections: Any = self.server_state.connections  # of `HTTPProtocol`

    def run_until_stopped(self) -> int:
        """Serve until a signal stops the process or its device is lost.

        Returns:
            the exit status; not 0 if another process should take its place.
        """
        self.run(self._sockets)
        if self._state.readiness.lost:
            return EX_TEMPFAIL
        return 0 if self.started else 1

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start the app, accept connections, and report it."""
        await super().startup(sockets)
        if self.started:
            self._ticking = asyncio.ensure_future(self._tick())
            self._write_snapshot()
            self._report_started()

    def _write_snapshot(self) -> None:
        try:
            self._state.metrics.write_snapshot()
        except OSError:  # a full disk must end neither the timeouts of clients nor the process
            log.exception("the snapshot of the metrics was not written")

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(protocol.TIMEOUT_CHECK_S)
            self._write_snapshot()
            await protocol.enforce_timeouts(self._connections, asyncio.get_running_loop().time)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle signals until the event loop ends; uvicorn would close the port at once."""
        handlers: dict[str, Callable[[], object]] = {
            **dict.fromkeys(("SIGTERM", "SIGINT", "SIGBREAK"), self._on_signal),  # Ctrl-Break
            "SIGHUP": self._state.reloader.on_sighup,
        }
        loop = asyncio.get_running_loop()
        previous = {}
        for name, handler in handlers.items():
            # Not by the event loop, which handles no signals on Windows.
            if (number := getattr(signal, name, None)) is not None:
                wake = partial(loop.call_soon_threadsafe, handler)
                previous[number] = signal.signal(number, lambda *_, wake=wake: wake())
        try:
            yield
        finally:
            for number, previous_handler in previous.items():
                signal.signal(number, previous_handler)

    def _on_signal(self) -> None:
        readiness = self._state.readiness
        if not readiness.draining and not readiness.lost:
            readiness.drain()
            self._draining = asyncio.ensure_future(self._drain(self._drain_delay_s))
        elif not self._supervised:
            flush_logs()
            os._exit(0)  # at once, whatever the threads do; no file is ever left half written

    def _on_device_lost(self) -> None:
        self._draining = asyncio.ensure_future(self._drain(0.0))

    async def _drain(self, delay_s: float) -> None:
        self._limits.draining = True  # so that clients open their next connection elsewhere
        for connection in self._connections:
            connection.drain()
        await asyncio.sleep(delay_s)
        await self._state.batcher.close()
        self.should_exit = True  # uvicorn shuts down, and waits for the responses being sent

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close the port, shortly after that idle connections, and wait for the others."""
        for each in self._sockets:
            remove_socket_file(each)
        for server in self.servers:
            server.close()
        for each in self._sockets:
            each.close()
        await asyncio.sleep(CLOSE_GRACE_S)
        await super().shutdown(sockets)
        self._ticking.cancel()
        self._write_snapshot()


def load(settings: Settings) -> ModelRepository:
    """Load and check the models of this process, after it has set up the log.

    Raises:
        ServiceError: a model or the device cannot be used.
    """
    configure_logging(settings.log_level)
    prometheus_client.disable_created_metrics()  # a second series for each, which nobody reads
    try:
        return load_repository(settings)
    except (ArtifactError, DeviceError) as error:
        raise ServiceError(str(error)) from error


def create_server(settings: Settings, announce: Callable[[str], None]) -> Server:
    """Return the server of a service of one process, with its models loaded.

    Once it serves, it calls `announce` with the line that says where.

    Raises:
        ServiceError: it cannot start.
    """
    repository = load(settings)
    metrics = Metrics()
    app = create_app(settings, repository, metrics)
    metrics_url = open_metrics_port(settings, metrics.registry)
    if settings.unix_socket is None:
        sockets = open_sockets(settings.host, settings.port)
    else:
        sockets = [open_unix_socket(settings.unix_socket)]
    device = describe_device(repository.default.engine.device)
    line = startup_message(repository.names, url_of(sockets[0]), device, metrics_url)
    return Server(app, settings, sockets, partial(announce, line))


@dataclass(frozen=True)
class WorkerPlace:
    """The place of a worker among those of its supervisor.

    Attributes:
        index: number of the worker, from 0.
        count: number of all workers.
        folder: shared by the workers for metrics and rate limits.
        port: reserved by the supervisor.
    """

    index: int
    count: int
    folder: Path
    port: int


def create_worker(
    settings: Settings, place: WorkerPlace, report: Callable[[object], None]
) -> Server:
    """Return the server of one of several processes, with its models loaded.

    Once it serves, it calls `report` with the names of the models and the device.

    Raises:
        ServiceError: it cannot start.
    """
    repository = load(assign_device(settings, place.index))
    metrics = Metrics(place.folder, str(place.index))
    app = create_app(settings, repository, metrics, place.folder, processes=place.count)
    sockets = open_sockets(settings.host, place.port, reuse_port=True)
    device = describe_device(repository.default.engine.device)
    on_started = partial(report, {"names": repository.names, "device": device})
    return Server(app, settings, sockets, on_started, supervised=True)


def assign_device(settings: Settings, index: int) -> Settings:
    """Return the settings of a worker: its own GPU, if it may choose from several."""
    choosable = settings.device in ("auto", "cuda") and is_gpu(settings.device)
    if not choosable or (count := count_cuda_devices()) < 2:
        return settings
    return settings.model_copy(update={"device": f"cuda:{index % count}"})
