"""What orchestrators and Prometheus ask: liveness, readiness, metrics."""

from fastapi import APIRouter, Request, Response
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from pydantic import BaseModel, Field

from service.errors import answers
from service.inference.health import Readiness


class Health(BaseModel):
    """The answer of a health check."""

    status: str = Field(examples=["ready"])


def create_router(readiness: Readiness) -> APIRouter:
    """The health checks."""
    router = APIRouter()

    @router.get("/livez", summary="Whether the process answers")
    async def livez() -> Health:
        return Health(status="alive")

    @router.get(
        "/readyz",
        summary="Whether new work is taken",
        responses=answers({"503": "Shutting down, or the device failed"}),
    )
    async def readyz() -> Health:
        if readiness.problem is not None:
            raise readiness.problem
        return Health(status="ready")

    return router


def create_metrics_router(registry: CollectorRegistry) -> APIRouter:
    """Return the route that Prometheus scrapes."""
    router = APIRouter()

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
