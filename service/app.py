"""The app: wires the parts together."""

import asyncio
import math
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from fastapi import FastAPI
from starlette.types import ASGIApp, Lifespan, Receive, Scope, Send

from service import errors
from service.api import datasets, generate, health, models, open_inference, openai, pages
from service.api.respond import Responder
from service.api.routing import NotFound
from service.encoding.timeslice import TimeSlicedEncoder
from service.failure import ServiceError
from service.generation import Generation
from service.inference.batcher import Batcher
from service.inference.devices import free_memory
from service.inference.health import Readiness, run_self_tests
from service.inference.reload import Reloader
from service.inference.repository import ModelRepository
from service.middleware.access_log import AccessLogMiddleware
from service.middleware.auth import PUBLIC_PATHS, APIKeyMiddleware, create_buckets
from service.middleware.decompress import DecompressMiddleware
from service.settings import Settings
from service.telemetry.metrics import Metrics
from training.machine import available_cores

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

DISTRIBUTION = "cgan-service"
DESCRIPTION = """\
Labelled synthetic images on demand. The same model, label, seed and index always give the same
image.
"""
_SECURITY_SCHEMES = {
    "key": {"type": "http", "scheme": "bearer"},
    "password": {
        "type": "http",
        "scheme": "basic",
        "description": "for browsers: any name, and the key as the password",
    },
}


class App(FastAPI):
    """FastAPI with a shorter way to `/generate`.

    Its schema names the errors of the protocol and of authentication.
    """

    endpoint: ASGIApp  # of `/generate`
    auth_required = False
    prefix = ""  # stripped from paths below it

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request.

        The layers and the router of FastAPI take longer than generating a small image.
        """
        if self.prefix and scope["type"] == "http" and scope["path"].startswith(f"{self.prefix}/"):
            scope["path"] = scope["path"].removeprefix(self.prefix)
        is_generate = scope["type"] == "http" and scope["path"] == generate.PATH
        await (self.endpoint if is_generate else super().__call__)(scope, receive, send)

    def wrap(self, middleware: Callable[..., ASGIApp], **options: object) -> None:
        """Put a middleware around everything."""
        self.add_middleware(middleware, **options)
        self.endpoint = middleware(self.endpoint, **options)

    def openapi(self) -> dict[str, Any]:
        """Return the schema."""
        if self.openapi_schema is None:
            schema = super().openapi()
            for path, operations in schema["paths"].items():
                needs_key = self.auth_required and path not in PUBLIC_PATHS
                for operation in operations.values():
                    responses = errors.error_responses(*errors.PROTOCOL_ERRORS, path=path)
                    responses |= operation["responses"]
                    if needs_key:
                        responses |= errors.error_responses(*errors.AUTH_ERRORS, path=path)
                        operation["security"] = [{name: []} for name in _SECURITY_SCHEMES]
                    operation["responses"] = responses
            if self.auth_required:
                schema["components"]["securitySchemes"] = _SECURITY_SCHEMES
        assert self.openapi_schema is not None
        return self.openapi_schema


def create_app(
    settings: Settings,
    repository: ModelRepository,
    metrics: Metrics | None = None,
    shared_dir: Path | None = None,
    processes: int = 1,
) -> FastAPI:
    """Create an app that serves the models of a repository.

    Several `processes` divide the cores, and share the use of keys in `shared_dir`.

    Raises:
        ServiceError: tracing is requested, and its packages are not installed.
    """
    metrics = metrics or Metrics()
    readiness = Readiness(metrics)
    batcher = Batcher(settings.max_queue_images, settings.timeout_s, metrics)
    encoder = TimeSlicedEncoder(max(1, available_cores() // processes))
    reloader = Reloader(repository, metrics)
    buckets = create_buckets(settings, metrics, shared_dir)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        batcher.start(readiness.lose)
        metrics.ready.set_function(lambda: readiness.problem is None)
        _add_gauges(metrics, batcher, settings, repository)
        reloader.start()
        interval_s = settings.self_test_interval_s
        testing = asyncio.ensure_future(
            run_self_tests(repository, batcher, readiness, metrics, interval_s)
        )
        try:
            yield
        finally:
            readiness.drain()
            testing.cancel()
            await reloader.close()
            await batcher.close()
            await asyncio.to_thread(encoder.close)
            if app.state.tracer_provider is not None:
                await asyncio.to_thread(app.state.tracer_provider.shutdown)

    responder = Responder(Generation(repository, batcher, metrics), encoder, metrics)
    app = _create_routes(responder, readiness, lifespan, settings)
    if settings.metrics_port is None:
        app.include_router(health.create_metrics_router(metrics.registry))
    app.auth_required, app.prefix = bool(buckets), settings.root_path or ""
    app.state.metrics = metrics
    app.state.readiness = readiness
    app.state.batcher = batcher
    app.state.reloader = reloader
    app.state.error_app = AccessLogMiddleware(errors.send_error, metrics)  # for the protocol
    # From the inside out.
    app.endpoint = generate.GenerateEndpoint(responder)
    app.wrap(DecompressMiddleware)
    if buckets:
        app.wrap(APIKeyMiddleware, buckets=buckets)
    app.wrap(AccessLogMiddleware, metrics=metrics)
    app.state.tracer_provider = _add_tracing(app, settings.otlp_endpoint)
    return app


def _create_routes(
    responder: Responder, readiness: Readiness, lifespan: Lifespan[FastAPI], settings: Settings
) -> App:
    app = App(
        title=DISTRIBUTION,
        description=DESCRIPTION,
        version=version(DISTRIBUTION),
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        servers=[{"url": "."}],  # relative to the schema, so that it works behind a prefix
    )
    app.router.default = NotFound(app.router)
    errors.add_exception_handlers(app)
    app.include_router(generate.create_router())
    app.include_router(models.create_router(responder))
    app.include_router(datasets.create_router(responder))
    any_model = settings.openai_unknown_model == "default"
    app.include_router(openai.create_router(responder, any_model=any_model))
    app.include_router(open_inference.create_router(responder, readiness))
    app.include_router(health.create_router(readiness))
    app.include_router(pages.create_router())
    return app


def _add_tracing(app: App, endpoint: str | None) -> "TracerProvider | None":
    if endpoint is None:
        return None
    try:
        from service.middleware import tracing  # noqa: PLC0415  (of an extra)
    except ModuleNotFoundError as error:
        raise ServiceError(
            "--otlp-endpoint needs optional dependencies; run: pip install -e '.[traces]'"
        ) from error
    provider = tracing.create_tracer_provider(endpoint)
    app.wrap(tracing.TracingMiddleware, provider=provider, batch_spans=WeakKeyDictionary())
    return provider


def _add_gauges(
    metrics: Metrics, batcher: Batcher, settings: Settings, repository: ModelRepository
) -> None:
    """Report the queue, and the memory of GPUs, whenever metrics are scraped."""
    metrics.queue_images.set_function(lambda: batcher.queued_rows)
    metrics.queue_limit_images.set(settings.max_queue_images)
    for device in {model.engine.device for model in repository} - {"cpu"}:
        memory = partial(metrics.device_memory.labels, device)
        memory("used").set_function(partial(_used_memory, device))
        memory("total").set(free_memory(device)[1])


def _used_memory(device: str) -> float:
    try:
        free, total = free_memory(device)
    except RuntimeError:  # the device is lost; the scrape must still succeed
        return math.nan
    return total - free
