"""Liveness, readiness and metrics, for orchestrators and Prometheus."""

from fastapi import Request, Response
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from pydantic import BaseModel, Field

from service.api.routing import Router
from service.errors import error_responses
from service.inference.health import Readiness


class Health(BaseModel):
    """The response of a health check."""

    status: str = Field(examples=["ready"])


def create_router(readiness: Readiness) -> Router:
    """Create the health checks."""
    router = Router()

    @router.get("/livez", summary="Liveness")
    async def livez() -> Health:
        return Health(status="alive")

    @router.get("/readyz", summary="Readiness", responses=error_responses(503))
    async def readyz() -> Health:
        readiness.check()
        return Health(status="ready")

    return router


def create_metrics_router(registry: CollectorRegistry) -> Router:
    """Create the route that Prometheus scrapes."""
    router = Router()

    @router.get(
        "/metrics",
        summary="Metrics for Prometheus",
        response_class=Response,
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
    )
    # On a thread: parsing the snapshots of several workers takes tens of milliseconds.
    def scrape(request: Request) -> Response:
        encode, media_type = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(registry), headers={"Content-Type": media_type})

    return router
