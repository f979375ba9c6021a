"""The Open Inference Protocol, version 2, as clients of Triton and KServe use it: `/v2`."""

import gzip
import zlib
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Annotated, Any, Literal

from fastapi import Depends, Path, Request, Response
from pydantic import BaseModel, Field
from starlette.concurrency import run_in_threadpool

from service.api import open_inference_codec as codec
from service.api.bodies import refuse_forms
from service.api.respond import BINARY, Responder
from service.api.routing import Router
from service.errors import GENERATION_ERRORS, error_responses, inline_refs
from service.generation import Generation
from service.inference.health import Readiness
from service.inference.repository import Model

PREFIX = "/v2"
EXTENSIONS = ["binary_tensor_data", "model_repository", "statistics"]
_OCTETS = "application/octet-stream"
_COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": partial(gzip.compress, compresslevel=1, mtime=0),  # always the same bytes
    "deflate": partial(zlib.compress, level=1),
}


_Name = Annotated[str, Path(description="name of a model")]
_Version = Annotated[str, Path(description="SHA-256 of its artifact, in hexadecimal")]


class ServerMetadata(BaseModel):
    """A description of the service."""

    name: str
    version: str
    extensions: list[str]


class ServerLiveness(BaseModel):
    """The liveness of the service."""

    live: Literal[True] = True


class ServerReadiness(BaseModel):
    """The readiness of the service; status 503 if it is not ready."""

    ready: Literal[True] = True


class ModelReadiness(ServerReadiness):
    """The readiness of a model."""

    name: str


class ModelMetadata(BaseModel):
    """The inputs and outputs of a model."""

    name: str
    versions: list[str] = Field(description="the SHA-256 of its artifact")
    platform: str
    inputs: list[codec.TensorDescription] = Field(description="all but LABEL are optional")
    outputs: list[codec.TensorDescription]


class IndexEntry(BaseModel):
    """A loaded model."""

    name: str
    version: str
    state: str
    reason: str


class StatisticDuration(BaseModel):
    """The number of occurrences of an event, and their total duration."""

    count: int
    ns: int


class ModelStatistics(BaseModel):
    """The statistics of a model since it was loaded: all APIs, but only the worker that answers."""

    name: str
    version: str
    last_inference: int = Field(description="milliseconds since 1970; 0 for never")
    inference_count: int = Field(description="images")
    execution_count: int = Field(description="forwards")
    inference_stats: dict[str, StatisticDuration]
    batch_stats: list[Any] = Field(description="always empty; /metrics has histograms of batches")


class Statistics(BaseModel):
    """The statistics of some models."""

    model_stats: list[ModelStatistics]


_TENSORS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The requested tensors. Binary ones follow the JSON, whose length is then "
        f"in the header {codec.LENGTH_HEADER}.",
        "model": codec.InferenceResponse,
        "content": {_OCTETS: BINARY},
        "headers": {
            codec.LENGTH_HEADER: {
                "description": "bytes of JSON, if binary tensors follow",
                "schema": {"type": "integer"},
            }
        },
    }
}
_REQUEST_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {"schema": inline_refs(codec.InferenceRequest.model_json_schema())}
        },
    }
}


def create_router(responder: Responder, readiness: Readiness) -> Router:
    """Create the routes of this module."""
    router = Router(prefix=PREFIX, tags=["Open Inference Protocol"])
    generation = responder.generation

    @router.get("", summary="Describe the service")
    async def metadata(request: Request) -> ServerMetadata:
        app = request.app
        return ServerMetadata(name=app.title, version=app.version, extensions=EXTENSIONS)

    @router.get("/health/live", summary="Liveness")
    async def live() -> ServerLiveness:
        return ServerLiveness()

    @router.get(
        "/health/ready",
        summary="Readiness",
        responses=error_responses(503, path=PREFIX),
    )
    async def ready() -> ServerReadiness:
        readiness.check()
        return ServerReadiness()

    @router.post("/repository/index", summary="List the loaded models")
    async def index() -> list[IndexEntry]:
        return [
            IndexEntry(name=each.name, version=each.sha256, state="READY", reason="")
            for each in generation.repository
        ]

    @router.get("/models/stats", summary="Statistics of all models")
    async def all_statistics() -> Statistics:
        models = generation.repository
        return Statistics(model_stats=[_statistics(generation, each) for each in models])

    async def by_name(name: _Name) -> Model:
        return generation.get_or_404(name)

    async def by_version(name: _Name, version: _Version) -> Model:
        return generation.get_or_404(f"{name}@sha256:{version}")

    versions = "/models/{name}/versions/{version}"
    _add_model_routes(router, "/models/{name}", by_name, responder, readiness)
    _add_model_routes(router, versions, by_version, responder, readiness)
    return router


def _add_model_routes(
    router: Router,
    path: str,
    find: Callable[..., Awaitable[Model]],
    responder: Responder,
    readiness: Readiness,
) -> None:
    """Add the routes of one model, or of one version of it."""
    not_found = error_responses(404, path=PREFIX)

    @router.get(path, summary="Inputs and outputs of a model", responses=not_found)
    async def metadata(model: Annotated[Model, Depends(find)]) -> ModelMetadata:
        inputs = [
            codec.TensorDescription(name=name, datatype="INT64", shape=[-1])
            for name in ("LABEL", "SEED", "INDEX")
        ]
        return ModelMetadata(
            name=model.name,
            versions=[model.sha256],
            platform="onnxruntime_onnx" if model.engine.device == "cpu" else "pytorch",
            inputs=inputs,
            outputs=list(codec.describe_outputs(model.engine.image_shape).values()),
        )

    @router.get(f"{path}/stats", summary="Statistics of a model", responses=not_found)
    async def statistics(model: Annotated[Model, Depends(find)]) -> Statistics:
        return Statistics(model_stats=[_statistics(responder.generation, model)])

    @router.get(
        f"{path}/ready",
        summary="Readiness of a model",
        responses=error_responses(404, 503, path=PREFIX),
    )
    async def ready(model: Annotated[Model, Depends(find)]) -> ModelReadiness:
        readiness.check()
        return ModelReadiness(name=model.name)

    @router.post(
        f"{path}/infer",
        summary="Generate an image for each label",
        openapi_extra=_REQUEST_BODY,
        response_class=Response,
        responses={**_TENSORS, **error_responses(413, 415, *GENERATION_ERRORS, path=PREFIX)},
    )
    async def infer(request: Request, model: Annotated[Model, Depends(find)]) -> Response:
        return await _infer(responder, request, model)


async def _infer(responder: Responder, request: Request, model: Model) -> Response:
    headers = request.headers
    refuse_forms(headers, "send the request as JSON")
    parsed = codec.parse(await request.body(), headers.get(codec.LENGTH_HEADER))
    parameters = parsed.request.parameters
    resolved = responder.generation.resolve_rows(
        model, parsed.labels, parsed.seeds, parsed.indices, parameters.truncation
    )
    encoder = codec.ResponseEncoder(parsed, resolved)
    encoded = await responder.respond(
        resolved,
        request.scope,
        encoder.encode,
        timeout_s=parameters.timeout / 1e6 if parameters.timeout else None,
    )
    binary = any(parsed.outputs.values())
    response = encoded.response(_OCTETS if binary else "application/json")
    if binary:
        response.headers[codec.LENGTH_HEADER] = str(encoder.head_bytes)
    return await _compress(response, headers.get("accept-encoding", ""))


async def _compress(response: Response, accepted: str) -> Response:
    """Compress a response if the client names gzip or deflate."""
    names = [each.strip().lower() for each in accepted.split(",")]
    for encoding, compress in _COMPRESSORS.items():
        if encoding in names:
            body = await run_in_threadpool(compress, bytes(response.body))
            headers = {**response.headers, "content-length": str(len(body))}
            return Response(body, headers={**headers, "content-encoding": encoding})
    return response


def _statistics(generation: Generation, model: Model) -> ModelStatistics:
    stats = model.stats
    durations = {
        "success": (stats.answered, stats.queue_s + stats.forward_s),
        "fail": (stats.failed, stats.failed_s),
        "queue": (stats.answered, stats.queue_s),
        "compute_input": (0, 0.0),
        "compute_infer": (stats.answered, stats.forward_s),
        "compute_output": (0, 0.0),
    }
    return ModelStatistics(
        name=model.name,
        version=model.sha256,
        last_inference=int(1e3 * stats.last_at),
        inference_count=stats.images,
        execution_count=generation.forwards(model),
        inference_stats={
            name: StatisticDuration(count=count, ns=int(1e9 * seconds))
            for name, (count, seconds) in durations.items()
        },
        batch_stats=[],
    )
