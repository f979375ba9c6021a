"""One process that serves: its models, its port, its beginning and its end."""

import asyncio
import gc
import os
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import prometheus_client
import torch
import uvicorn
from fastapi import FastAPI

from service.app import create_app
from service.inference.repository import ModelRepository, load_repository
from service.server.accepting import Acceptor, Occupancy
from service.server.metrics_port import open_metrics_port
from service.server.protocol import (
    TIMEOUT_CHECK_S,
    ConnectionLimits,
    HTTPProtocol,
    raise_nofile_limit,
    sweep,
)
from service.settings import Settings
from service.startup import Address, ServiceError, address_of, serving
from service.telemetry.logging import configure_logging
from service.telemetry.metrics import Metrics
from training.artifact import ArtifactError
from training.devices import DeviceError, describe, limit_threads

# For requests that are on their way when the port closes: time to arrive and to be answered.
_LAST_MOMENT_S = 0.2
# So many more objects than were freed since the last look are looked through for garbage. Requests
# that are admitted together are thousands, at Python's 700 each batch of them would be gone through
# several times while it waits; and hardly anything here is garbage that only a look can find.
_GARBAGE = 50_000
_BACKLOG = 2048  # connections that wait to be accepted, as many as uvicorn lets wait


class Server(uvicorn.Server):
    """Uvicorn with our own beginning and end.

    On SIGTERM or SIGINT readiness falls, requests are served on for the drain delay, those that
    were admitted are answered while the port stays open, and the process ends with status 0; a
    second signal ends it at once. On SIGHUP all models are read again. When a device is lost, what
    waits for it is answered, and the process ends with status 75 (EX_TEMPFAIL).

    Args:
        app: what is served.
        settings: say where, unless `run` is given sockets.
        on_started: called once the port is open.
        occupancy: of a worker among others. It leaves it to its supervisor to end the process at
            once: whoever stops a whole group of processes signals a worker as its supervisor does,
            so a second signal means nothing.
        every_second: called about that often.
        metrics: served on the port that the settings name for them, if they name one; None leaves
            it to a supervisor.
    """

    def __init__(
        self,
        app: FastAPI,
        settings: Settings,
        on_started: Callable[[], None],
        *,
        occupancy: Occupancy | None = None,
        every_second: Callable[[], None] | None = None,
        metrics: Metrics | None = None,
    ) -> None:
        async def on_tick() -> None:
            if every_second is not None:
                every_second()

        self._terms = ConnectionLimits(
            app.state.refusal,
            settings.client_timeout_s,
            raise_nofile_limit(settings.max_connections),
        )
        http: Any = partial(HTTPProtocol, self._terms)
        super().__init__(
            uvicorn.Config(
                app,
                host=settings.host,
                port=settings.port,
                http=http,
                ws="none",
                log_config=None,
                access_log=False,
                server_header=False,
                lifespan="on",
                timeout_graceful_shutdown=5,
                callback_notify=on_tick,
                timeout_notify=0,
            )
        )
        self._app = app
        app.state.readiness.on_lost = self._on_lost
        self._drain_delay_s = settings.drain_delay_s
        self._settings = settings
        self._metrics = metrics
        self._metrics_server: asyncio.Server | None = None
        self._on_started = on_started
        self._occupancy = occupancy
        self._acceptor: Acceptor | None = None

    @property
    def address(self) -> Address:
        """Where it listens."""
        return address_of(self.servers[0])

    @property
    def metrics_address(self) -> Address | None:
        """Where it serves metrics alone, if anywhere."""
        return None if self._metrics_server is None else address_of(self._metrics_server)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Open the ports, then say so.

        Raises:
            ServiceError: the port of the metrics is taken.
        """
        if self._metrics is not None and self._settings.metrics_port is not None:
            self._metrics_server = await open_metrics_port(self._settings, self._metrics.registry)
        # Uvicorn's servers would take whatever comes, however many there are already.
        await super().startup(sockets if self._occupancy is None else [])
        if not self.started:
            return
        if self._occupancy is not None:
            self._accept(sockets or [], self._occupancy)
        # What has been loaded stays: looking through it for garbage would hold up every request.
        gc.collect()
        gc.freeze()
        gc.set_threshold(_GARBAGE, *gc.get_threshold()[1:])
        gc.enable()  # it was off while all of that was loaded
        self._sweep()
        self._on_started()

    def _accept(self, sockets: list[socket.socket], occupancy: Occupancy) -> None:
        """Take connections, as one of several workers."""
        http: Any = self.config.http_protocol_class  # typed as one that takes no arguments
        protocol = partial(
            http,
            config=self.config,
            server_state=self.server_state,
            app_state=self.lifespan.state,
        )
        self._acceptor = Acceptor(sockets, protocol, self._connections, occupancy)
        self._terms.on_lost = self._acceptor.count

    def _sweep(self, steps: Iterator[None] | None = None) -> None:
        """Look after the connections, some in each round of the loop."""
        loop = asyncio.get_running_loop()
        steps = steps or sweep(self._connections, loop.time)
        try:
            next(steps)
        except StopIteration:
            loop.call_later(TIMEOUT_CHECK_S, self._sweep)
        else:
            loop.call_soon(self._sweep, steps)

    @property
    def _connections(self) -> set[HTTPProtocol]:
        connections: Any = self.server_state.connections  # uvicorn knows only its own protocols
        return connections  # type: ignore[no-any-return]

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Drain on the first signal; uvicorn's own handler would close the port at once."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)
        loop.add_signal_handler(signal.SIGHUP, self._app.state.reloader.on_hangup)
        try:
            yield
        finally:
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                loop.remove_signal_handler(number)

    def _on_signal(self) -> None:
        readiness = self._app.state.readiness
        if not readiness.draining and not readiness.lost:
            readiness.drain()
            self._draining = asyncio.ensure_future(self._drain(self._drain_delay_s))
        elif self._occupancy is None:
            os._exit(0)  # whatever a thread is at; nothing is written that could be left in pieces

    def _on_lost(self) -> None:
        self._draining = asyncio.ensure_future(self._drain(0.0))

    @property
    def status(self) -> int:
        """The exit status of the process; not 0 where another one should take its place."""
        if self._app.state.readiness.lost:
            return os.EX_TEMPFAIL
        return 0 if self.started else 1

    async def _drain(self, delay_s: float) -> None:
        self._terms.draining = True  # so that clients that keep connections go elsewhere
        for connection in self._connections:
            connection.drain()
        await asyncio.sleep(delay_s)
        await self._app.state.batcher.close()
        self.should_exit = True  # uvicorn now waits for the answers that are still being sent

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close the port, a moment later what is idle, and wait for what is not."""
        if self._acceptor is not None:
            self._acceptor.close()
        for each in (*self.servers, *(sockets or ())):
            each.close()
        await asyncio.sleep(_LAST_MOMENT_S)
        await super().shutdown(sockets)
        if self._metrics_server is not None:
            self._metrics_server.close()


def load(settings: Settings) -> ModelRepository:
    """Load and check the models of this process, with its log set up.

    Raises:
        ServiceError: a model or the device cannot be used.
    """
    configure_logging(settings.log_level)
    prometheus_client.disable_created_metrics()  # a second series for each one, which nobody reads
    limit_threads(settings.workers)
    try:
        return load_repository(settings)
    except (ArtifactError, DeviceError) as error:
        raise ServiceError(str(error)) from error


def serve(settings: Settings, say: Callable[[str], None]) -> int:
    """Load, check, and only then serve, in this process; returns its exit status.

    Raises:
        ServiceError: it cannot start.
    """
    registry = load(settings)
    device = describe(registry.default.engine.device)
    metrics = Metrics()
    server = Server(
        create_app(settings, registry, metrics),
        settings,
        lambda: say(serving(registry.names, server.address, device, server.metrics_address)),
        metrics=metrics,
    )
    server.run()
    return server.status


def serve_as_worker(
    settings: Settings,
    index: int,
    folder: Path,
    sockets: Sequence[int],
    report: Callable[[object], None],
) -> int:
    """Serve in this one of several processes; returns its exit status.

    Args:
        settings: of all of them.
        index: of this one, from 0.
        folder: where they share their metrics, and how many connections each has.
        sockets: file descriptors of the bound sockets that they share.
        report: told what is served, once it is.

    Raises:
        ServiceError: it cannot start.
    """
    registry = load(on_own_device(settings, index))
    metrics = Metrics(folder, str(index))
    device = describe(registry.default.engine.device)

    def on_started() -> None:
        metrics.write_snapshot()
        report({"names": registry.names, "device": device})

    server = Server(
        create_app(settings, registry, metrics, folder),
        settings,
        on_started,
        occupancy=Occupancy(folder, settings.workers, index),
        every_second=metrics.write_snapshot,
    )
    server.run([listening(each) for each in sockets])
    metrics.write_snapshot()
    return server.status


def listening(descriptor: int) -> socket.socket:
    """A socket that the supervisor bound, which listens from the first ready worker on.

    Raises:
        ServiceError: another process bound the same port meanwhile, and listens.
    """
    shared = socket.socket(fileno=descriptor)
    try:
        shared.listen(_BACKLOG)  # uvloop does so too, but says nothing when it cannot
    except OSError as error:
        shared.close()
        raise ServiceError(f"the port cannot be opened: {error.strerror}") from error
    return shared


def on_own_device(settings: Settings, index: int) -> Settings:
    """The settings of one worker: where there are several GPUs to choose from, it has its own."""
    if settings.device not in ("auto", "cuda") or torch.cuda.device_count() < 2:
        return settings
    return settings.model_copy(update={"device": f"cuda:{index % torch.cuda.device_count()}"})
