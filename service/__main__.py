"""The command line: `python -m service`."""

import asyncio
import gc
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import prometheus_client
import uvicorn
from fastapi import FastAPI

from service.app import create_app
from service.connection import JoiningProtocol
from service.observation import configure_logging
from service.registry import Registry, load_registry
from service.settings import Settings, parse_settings
from training.artifact import ArtifactError
from training.devices import DeviceError, describe


class Server(uvicorn.Server):
    """Uvicorn with our own beginning and end.

    The address is printed once the port is open. On SIGTERM or SIGINT readiness falls, requests
    that were admitted are answered while the port stays open, and the process ends with status 0; a
    second signal ends it at once.
    """

    def __init__(self, app: FastAPI, settings: Settings, registry: Registry) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                host=settings.host,
                port=settings.port,
                http=JoiningProtocol,
                log_config=None,
                access_log=False,
                server_header=False,
                lifespan="on",
                timeout_graceful_shutdown=5,
            )
        )
        self._app = app
        self._registry = registry

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Open the port, then say where."""
        await super().startup(sockets)
        if not self.started:
            return
        # What has been loaded stays: looking through it for garbage would hold up every request.
        gc.collect()
        gc.freeze()
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        host = f"[{host}]" if ":" in host else host
        names = ", ".join(self._registry.names)
        device = describe(self._registry.default.engine.device)
        print(f"Serving {names} at http://{host}:{port} on {device}", flush=True)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Drain on the first signal; uvicorn's own handler would close the port at once."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)
        try:
            yield
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)

    def _on_signal(self) -> None:
        if self._app.state.drain():
            self.force_exit = self.should_exit = True
            return
        self._app.state.drain.begin()
        self._draining = asyncio.ensure_future(self._drain())

    async def _drain(self) -> None:
        await self._app.state.batcher.close()
        self.should_exit = True  # uvicorn now waits for the answers that are still being sent


def main() -> int:
    """Load, check, and only then serve; returns the exit status."""
    try:
        settings = parse_settings(sys.argv[1:])
        configure_logging(settings.log_level)
        registry = load_registry(settings)
    except (ValueError, ArtifactError, DeviceError) as error:
        print(error, file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    prometheus_client.disable_created_metrics()  # a second series for each one, which nobody reads
    server = Server(create_app(settings, registry), settings, registry)
    server.run()
    return 0 if server.started else 1


if __name__ == "__main__":
    sys.exit(main())
