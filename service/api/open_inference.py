"""The Open Inference Protocol, version 2, as Triton's and KServe's clients speak it: `/v2`."""

import gzip
import zlib
from typing import Annotated, Any

from fastapi import APIRouter, Path, Request, Response
from pydantic import BaseModel, Field
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect

from service.api.generate import CLIENT_CLOSED_REQUEST, generation_headers
from service.api.open_inference_codec import (
    LENGTH_HEADER,
    InferenceRequest,
    InferenceResponse,
    ParsedRequest,
    ResponseEncoder,
    TensorDescription,
    decompress,
    describe_outputs,
    parse,
)
from service.errors import answers, inline
from service.generation import CLIENT, Client, Disconnected, Generation
from service.inference.health import Readiness
from service.inference.repository import Model
from service.rate_limit import consume

PREFIX = "/v2"
LIVE_PATH = f"{PREFIX}/health/live"
EXTENSIONS = ["binary_tensor_data", "model_repository", "statistics"]
_BINARY = "application/octet-stream"

_Name = Annotated[str, Path(description="name of a model")]
_Version = Annotated[str, Path(description="SHA-256 of its artifact, in hexadecimal digits")]


class ServerMetadata(BaseModel):
    """What the service is."""

    name: str
    version: str
    extensions: list[str]


class ModelMetadata(BaseModel):
    """What a model takes and gives."""

    name: str
    versions: list[str] = Field(description="the SHA-256 of its artifact")
    platform: str
    inputs: list[TensorDescription] = Field(description="all but LABEL may be left out")
    outputs: list[TensorDescription]


class IndexEntry(BaseModel):
    """A model that is served."""

    name: str
    version: str
    state: str
    reason: str


class StatisticDuration(BaseModel):
    """How often something happened, and how long that took in all."""

    count: int
    ns: int


class InferenceStatistics(BaseModel):
    """Where the time of a model's requests went; no time is taken up by inputs or outputs apart."""

    success: StatisticDuration
    fail: StatisticDuration
    queue: StatisticDuration
    compute_input: StatisticDuration
    compute_infer: StatisticDuration
    compute_output: StatisticDuration


class ModelStatistics(BaseModel):
    """What a model did since it was loaded, over all interfaces, in the worker that answers."""

    name: str
    version: str
    last_inference: int = Field(description="milliseconds since 1970, 0 for never")
    inference_count: int = Field(description="images")
    execution_count: int = Field(description="forwards")
    inference_stats: InferenceStatistics
    batch_stats: list[Any] = Field(description="not kept; /metrics has histograms of batches")


class Statistics(BaseModel):
    """What the models did."""

    model_stats: list[ModelStatistics]


_UNKNOWN = {"404": "Unknown model, or unknown version of it"}
_BAD = answers(
    {
        **_UNKNOWN,
        "413": "The body is too large, maybe once it is decompressed",
        "415": "A Content-Encoding that is neither gzip nor deflate",
        "422": "A wrong value; the error names it and what is allowed",
        "429": "Overloaded, or over the limit of the API key; Retry-After says when to come back",
        "503": "Shutting down, or the device failed",
        "504": "The images took longer than the service, or the timeout, allows",
    },
    PREFIX,
)
_NOT_THERE = answers(_UNKNOWN, PREFIX)
_NOT_READY = answers({"503": "Shutting down, or the device failed"}, PREFIX)
_TENSORS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The tensors that were asked for. Binary ones follow after the JSON, whose "
        f"length is then in the header {LENGTH_HEADER}.",
        "model": InferenceResponse,
        "content": {_BINARY: {"schema": {"type": "string", "format": "binary"}}},
        "headers": {
            LENGTH_HEADER: {
                "description": "bytes of JSON, where binary tensors follow",
                "schema": {"type": "integer"},
            }
        },
    }
}
_REQUEST_BODY = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": inline(InferenceRequest.model_json_schema())}},
    }
}


def create_router(generation: Generation, readiness: Readiness) -> APIRouter:
    """The routes of this module."""
    router = APIRouter(prefix=PREFIX, tags=["Open Inference Protocol"])
    _add_health(router, generation, readiness)
    _add_models(router, generation)

    @router.post(
        "/models/{name}/infer",
        summary="Generate an image of each label",
        openapi_extra=_REQUEST_BODY,
        response_class=Response,
        responses={**_TENSORS, **_BAD},
    )
    async def infer(request: Request, name: _Name) -> Response:
        return await _answer(generation, request, name)

    @router.post(
        "/models/{name}/versions/{version}/infer",
        summary="The same, of one version of a model",
        openapi_extra=_REQUEST_BODY,
        response_class=Response,
        responses={**_TENSORS, **_BAD},
    )
    async def infer_version(request: Request, name: _Name, version: _Version) -> Response:
        return await _answer(generation, request, f"{name}@sha256:{version}")

    return router


def _add_health(router: APIRouter, generation: Generation, readiness: Readiness) -> None:
    @router.get("", summary="What the service is")
    async def metadata(request: Request) -> ServerMetadata:
        app = request.app
        return ServerMetadata(name=app.title, version=app.version, extensions=EXTENSIONS)

    @router.get("/health/live", summary="Whether the process answers", response_class=Response)
    async def live() -> Response:
        return Response()

    def check() -> Response:
        if readiness.problem is not None:
            raise readiness.problem
        return Response()

    @router.get(
        "/health/ready",
        summary="Whether new work is taken",
        response_class=Response,
        responses=_NOT_READY,
    )
    async def ready() -> Response:
        return check()

    @router.get(
        "/models/{name}/ready",
        summary="Whether a model takes new work",
        response_class=Response,
        responses={**_NOT_THERE, **_NOT_READY},
    )
    async def model_ready(name: _Name) -> Response:
        generation.find(name)
        return check()

    @router.get(
        "/models/{name}/versions/{version}/ready",
        summary="Whether a version of a model takes new work",
        response_class=Response,
        responses={**_NOT_THERE, **_NOT_READY},
    )
    async def version_ready(name: _Name, version: _Version) -> Response:
        generation.find(f"{name}@sha256:{version}")
        return check()


def _add_models(router: APIRouter, generation: Generation) -> None:
    @router.post("/repository/index", summary="The loaded models")
    async def index() -> list[IndexEntry]:
        return [
            IndexEntry(name=each.name, version=each.sha256, state="READY", reason="")
            for each in generation.registry
        ]

    @router.get("/models/stats", summary="What all models did")
    async def all_statistics() -> Statistics:
        return Statistics(
            model_stats=[_statistics(generation, each) for each in generation.registry]
        )

    @router.get("/models/{name}", summary="What a model takes and gives", responses=_NOT_THERE)
    async def model(name: _Name) -> ModelMetadata:
        return _metadata(generation.find(name))

    @router.get(
        "/models/{name}/versions/{version}",
        summary="What a version of a model takes and gives",
        responses=_NOT_THERE,
    )
    async def model_version(name: _Name, version: _Version) -> ModelMetadata:
        return _metadata(generation.find(f"{name}@sha256:{version}"))

    @router.get("/models/{name}/stats", summary="What a model did", responses=_NOT_THERE)
    async def statistics(name: _Name) -> Statistics:
        return Statistics(model_stats=[_statistics(generation, generation.find(name))])

    @router.get(
        "/models/{name}/versions/{version}/stats",
        summary="What a version of a model did",
        responses=_NOT_THERE,
    )
    async def version_statistics(name: _Name, version: _Version) -> Statistics:
        found = generation.find(f"{name}@sha256:{version}")
        return Statistics(model_stats=[_statistics(generation, found)])


async def _answer(generation: Generation, request: Request, name: str) -> Response:
    try:
        return await _infer(generation, request, name)
    except (ClientDisconnect, Disconnected):
        return Response(status_code=CLIENT_CLOSED_REQUEST)


async def _infer(generation: Generation, request: Request, name: str) -> Response:
    headers = request.headers
    body = decompress(await request.body(), headers.get("content-encoding"))
    asked = parse(body, headers.get(LENGTH_HEADER))
    parameters = asked.request.parameters
    order = generation.rows(
        generation.find(name), asked.labels, asked.seeds, asked.indices, parameters.truncation
    )
    consume(request.scope, len(order.labels))
    client: Client = request.scope.get(CLIENT) or Client()
    timeout_s = None if parameters.timeout is None else parameters.timeout / 1e6
    images = await generation.fulfil(order, client, timeout_s)
    reply = ResponseEncoder(asked, order, images)
    content, encode_s = await generation.encode(reply.encode(), pixels=images.pixels.size)
    generation.count(order, client)
    answer = Response(content, media_type=_media_type(asked))
    answer.raw_headers += generation_headers(order, images, encode_s)
    if answer.media_type == _BINARY:
        answer.headers[LENGTH_HEADER] = str(reply.head_bytes)
    return await _compress(answer, headers.get("accept-encoding", ""))


def _media_type(asked: ParsedRequest) -> str:
    return _BINARY if any(asked.outputs.values()) else "application/json"


async def _compress(answer: Response, accepted: str) -> Response:
    """Compress an answer as a client asks, who has to name gzip or deflate."""
    wanted = [each.strip().lower() for each in accepted.split(",")]
    for encoding, compress in (("gzip", _gzip), ("deflate", _deflate)):
        if encoding in wanted:
            body = await run_in_threadpool(compress, bytes(answer.body))
            headers = {**answer.headers, "content-length": str(len(body))}
            return Response(body, headers={**headers, "content-encoding": encoding})
    return answer


def _gzip(body: bytes) -> bytes:
    return gzip.compress(body, compresslevel=1, mtime=0)  # always the same bytes


def _deflate(body: bytes) -> bytes:
    return zlib.compress(body, 1)


def _metadata(model: Model) -> ModelMetadata:
    inputs = [
        TensorDescription(name=name, datatype="INT64", shape=[-1])
        for name in ("LABEL", "SEED", "INDEX")
    ]
    return ModelMetadata(
        name=model.name,
        versions=[model.sha256],
        platform="pytorch",
        inputs=inputs,
        outputs=list(describe_outputs(model.engine.image_shape).values()),
    )


def _statistics(generation: Generation, model: Model) -> ModelStatistics:
    tally = model.tally
    queue_ns, forward_ns = int(1e9 * tally.queue_s), int(1e9 * tally.forward_s)
    nothing = StatisticDuration(count=0, ns=0)
    return ModelStatistics(
        name=model.name,
        version=model.sha256,
        last_inference=int(1e3 * tally.last_at),
        inference_count=tally.images,
        execution_count=generation.forwards(model),
        inference_stats=InferenceStatistics(
            success=StatisticDuration(count=tally.answered, ns=queue_ns + forward_ns),
            fail=StatisticDuration(count=tally.failed, ns=int(1e9 * tally.failed_s)),
            queue=StatisticDuration(count=tally.answered, ns=queue_ns),
            compute_input=nothing,
            compute_infer=StatisticDuration(count=tally.answered, ns=forward_ns),
            compute_output=nothing,
        ),
        batch_stats=[],
    )
