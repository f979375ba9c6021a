"""`/metrics` on a port of its own."""

import threading

import uvicorn
from fastapi import FastAPI
from prometheus_client import CollectorRegistry

from service import errors
from service.api import health
from service.middleware.auth import APIKeyMiddleware
from service.server.sockets import open_sockets, url_of
from service.settings import Settings


def open_metrics_port(settings: Settings, registry: CollectorRegistry) -> str | None:
    """Serve `/metrics` and nothing else, on a thread that ends with the process.

    A client must send an API key if the settings have any.

    Returns:
        its URL, or None if the settings name no port.

    Raises:
        ServiceError: the port is taken.
        ValueError: no address of the host is one of this machine.
    """
    if settings.metrics_port is None:
        return None
    app = FastAPI(openapi_url=None)
    errors.add_exception_handlers(app)
    app.include_router(health.create_metrics_router(registry))
    if settings.keys:
        app.add_middleware(APIKeyMiddleware, buckets=dict.fromkeys(settings.keys))
    config = uvicorn.Config(
        app,
        loop="asyncio",
        workers=1,  # or uvicorn would parse WEB_CONCURRENCY
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        lifespan="off",
    )
    sockets = open_sockets(settings.host, settings.metrics_port)
    server = uvicorn.Server(config)  # handles signals on the main thread only
    threading.Thread(target=server.run, args=(sockets,), name="metrics", daemon=True).start()
    return url_of(sockets[0])
