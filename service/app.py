"""The app: wires the parts together, and owns start-up and drain."""

import asyncio
import math
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from service import errors
from service.api import datasets, generate, health, open_inference, openai, pages
from service.api.generate import GenerateEndpoint
from service.generation import Generation
from service.inference.batcher import Batcher
from service.inference.health import Readiness, SelfTest
from service.inference.reload import Reloader
from service.inference.repository import ModelRepository
from service.middleware.access_log import AccessLogMiddleware
from service.middleware.auth import PUBLIC_PATHS, APIKeyGrant, APIKeyMiddleware, create_grants
from service.settings import Settings
from service.startup import ServiceError
from service.telemetry.metrics import Metrics
from training.devices import available_cores

if TYPE_CHECKING:
    from service.middleware.tracing import Tracing

DESCRIPTION = """\
Labelled synthetic images on demand. The same model, label, seed and index always give the same
image, whatever else the service is doing.
"""


class App(FastAPI):
    """A FastAPI app with a front door of its own.

    What FastAPI and Starlette wrap around every route takes longer than a small image, so requests
    to the front door do not pass it.
    """

    front_door: ASGIApp
    needs_key = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or take part in the server's start and end."""
        path, method = scope.get("path"), scope.get("method")
        if path == GenerateEndpoint.path and method in GenerateEndpoint.methods:
            await self.front_door(scope, receive, send)
        else:
            await super().__call__(scope, receive, send)

    def openapi(self) -> dict[str, Any]:
        """The schema, with the one route that FastAPI does not know."""
        if self.openapi_schema is None:
            self.openapi_schema = get_openapi(
                title=self.title,
                version=self.version,
                description=self.description,
                routes=[*generate.openapi_routes(), *self.routes],
            )
            for path, operations in self.openapi_schema["paths"].items():
                of_the_wire = errors.answers(errors.PROTOCOL_ERRORS, path)
                of_the_key = errors.answers(errors.AUTH_ERRORS, path)
                for operation in operations.values():
                    operation["responses"] = of_the_wire | operation["responses"]
                    if self.needs_key and path not in PUBLIC_PATHS:
                        operation["responses"] |= of_the_key
                        operation["security"] = [{"key": []}, {"password": []}]
            if self.needs_key:
                schemes = {
                    "key": {"type": "http", "scheme": "bearer"},
                    "password": {
                        "type": "http",
                        "scheme": "basic",
                        "description": "for browsers: any name, and the key as the password",
                    },
                }
                self.openapi_schema["components"]["securitySchemes"] = schemes
        return self.openapi_schema


def create_app(
    settings: Settings,
    registry: ModelRepository,
    metrics: Metrics | None = None,
    folder: Path | None = None,
) -> FastAPI:
    """An app that serves the models of a registry.

    Starting it starts the engine thread and the watch over the models' files; stopping it finishes
    what was admitted.

    Args:
        settings: what the command line said.
        registry: the models.
        metrics: its instruments; made here if not given.
        folder: where several workers share what each key has used; None for a single process.
    """
    metrics = metrics or Metrics()
    readiness = Readiness(metrics)
    cores = max(1, available_cores() // settings.workers)
    batcher = Batcher(settings.max_queue_images, settings.timeout_s, metrics)
    encoders = ThreadPoolExecutor(cores, thread_name_prefix="encoder")
    reloader = Reloader(registry, metrics)
    tracing = _create_tracing(settings.otlp_endpoint)
    prover = SelfTest(registry, batcher, readiness, metrics, settings.self_test_interval_s)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        batcher.start(readiness.lose)
        metrics.queue_images.set_function(lambda: batcher.queued_rows)
        metrics.queue_limit_images.set(settings.max_queue_images)
        for device in {model.engine.device for model in registry}:
            _watch_memory(metrics, device)
        readiness.refresh()
        reloader.start()
        proving = asyncio.ensure_future(prover.run())
        try:
            yield
        finally:
            readiness.drain()
            proving.cancel()
            await reloader.close()
            await batcher.close()
            await asyncio.to_thread(encoders.shutdown)
            if tracing is not None:
                await asyncio.to_thread(tracing.close)

    app = App(
        title="cgan-service",
        description=DESCRIPTION,
        version=version("cgan-service"),
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
    )
    app.state.readiness = readiness
    app.state.batcher = batcher
    app.state.reloader = reloader
    errors.install(app)
    generation = Generation(registry, batcher, metrics, encoders)
    front_door = GenerateEndpoint(generation)
    # For other methods than its own, which get 405.
    app.router.routes.append(
        Route(GenerateEndpoint.path, front_door, methods=GenerateEndpoint.methods)
    )
    app.include_router(generate.create_router(generation))
    app.include_router(datasets.create_router(generation))
    app.include_router(openai.create_router(generation))
    app.include_router(open_inference.create_router(generation, readiness))
    app.include_router(health.create_router(readiness))
    app.include_router(pages.create_router())
    if settings.metrics_port is None:
        app.include_router(health.create_metrics_router(metrics.registry))
    grants = create_grants(settings, metrics, folder)
    app.needs_key = bool(grants)
    _surround(app, front_door, grants, metrics, tracing)
    app.state.error_app = AccessLogMiddleware(errors.refuse, metrics)  # for the protocol
    return app


def _surround(
    app: App,
    front_door: ASGIApp,
    grants: list[APIKeyGrant],
    metrics: Metrics,
    tracing: "Tracing | None",
) -> None:
    """Put around both ways in, from the inside out, what lets in, what watches, and what traces."""
    if grants:
        front_door = APIKeyMiddleware(front_door, grants)
        app.add_middleware(APIKeyMiddleware, grants=grants)
    app.front_door = AccessLogMiddleware(front_door, metrics)
    app.add_middleware(AccessLogMiddleware, metrics=metrics)
    if tracing is not None:
        app.front_door = tracing.wrap(app.front_door)
        app.add_middleware(tracing.wrap)


def _create_tracing(endpoint: str | None) -> "Tracing | None":
    """What makes traces and sends them to a collector, if there is one.

    Raises:
        ServiceError: the packages for it are not installed.
    """
    if endpoint is None:
        return None
    try:
        from service.middleware.tracing import Tracing  # noqa: PLC0415  (of an extra)
    except ModuleNotFoundError as error:
        raise ServiceError(
            "--otlp-endpoint needs optional dependencies; run: pip install -e '.[traces]'"
        ) from error
    return Tracing(endpoint)


def _watch_memory(metrics: Metrics, device: torch.device) -> None:
    """Report the memory of a GPU whenever metrics are scraped; a CPU has none of its own."""
    if device.type != "cuda":
        return

    def used() -> float:
        try:
            free, total = torch.cuda.mem_get_info(device)
        except RuntimeError:  # the device is lost; until the end, a scrape is answered all the same
            return math.nan
        return total - free

    metrics.device_memory.labels(str(device), "used").set_function(used)
    total = torch.cuda.mem_get_info(device)[1]
    metrics.device_memory.labels(str(device), "total").set(total)
