"""Metrics on a port of their own."""

import asyncio

import uvicorn
from fastapi import FastAPI
from prometheus_client import CollectorRegistry
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from service import errors
from service.api import health
from service.middleware.auth import APIKeyGrant, APIKeyMiddleware
from service.settings import Settings
from service.startup import ServiceError


async def open_metrics_port(settings: Settings, registry: CollectorRegistry) -> asyncio.Server:
    """Serve `/metrics`, and nothing else, on the port that the settings name for it.

    Uvicorn's protocol without its server, which would take the signals of the process.

    Raises:
        ServiceError: the port is taken.
    """
    app = FastAPI(openapi_url=None)
    errors.install(app)
    app.include_router(health.create_metrics_router(registry))
    if settings.keys:
        app.add_middleware(APIKeyMiddleware, grants=[APIKeyGrant(key) for key in settings.keys])
    config = uvicorn.Config(app, log_config=None, access_log=False, lifespan="off")
    state = ServerState()
    loop = asyncio.get_running_loop()
    try:
        return await loop.create_server(
            lambda: HttpToolsProtocol(config, state, {}), settings.host, settings.metrics_port
        )
    except OSError as error:
        raise ServiceError(f"the metrics port cannot be opened: {error}") from error
