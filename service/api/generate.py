"""The front door, `/generate`; what becomes of its images, `/verify`; and the list of models."""

from collections.abc import Iterable
from dataclasses import asdict
from typing import Annotated, Any, NamedTuple

from fastapi import APIRouter, Body, Query, Request, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel, Field
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from service.api.caching import caching_rule, entity_tag, is_known
from service.api.parameters import GenerateBody, GenerateQuery, parse_body, parse_query
from service.encoding.images import (
    CONTENT_TYPES,
    MEDIA_TYPES,
    ImageList,
    encoder,
    negotiate,
)
from service.encoding.verification import VerificationResult, compare, read_png, repeat
from service.errors import Problem, answer, answers, wrong_value
from service.generation import (
    CLIENT,
    Client,
    Disconnected,
    GeneratedImages,
    Generation,
    GenerationRequest,
)
from service.inference.repository import Model
from service.rate_limit import consume
from service.settings import MAX_PIXELS

RawHeaders = list[tuple[bytes, bytes]]
CLIENT_CLOSED_REQUEST = 499  # nobody reads this answer; the log and the metrics do


class ModelEntry(BaseModel):
    """A loaded model."""

    name: str
    default: bool
    sha256: str = Field(description="digest of the artifact's file; the model's identity")
    classes: list[str] = Field(description="class names, in the order of their indices")
    image_size: int = Field(description="height and width in pixels")
    channels: int
    device: str
    dtype: str
    images_seen: int = Field(description="real images shown during training")
    source_commit: str | None
    network: dict[str, Any]
    training: dict[str, Any]
    certificate: dict[str, Any] | None = Field(description="measured quality")


class RefusedFile(BaseModel):
    """A file that came into the weights while the service ran, and could not be served."""

    file: str
    cause: str


class ModelList(BaseModel):
    """All loaded models."""

    models: list[ModelEntry]
    refused: list[RefusedFile] = Field(
        description="files that are not served as they are now; a model of that name, if there is "
        "one, is of an earlier file"
    )


_PROBLEMS = answers(
    {
        "404": "Unknown model",
        "406": "No format that the Accept header allows",
        "422": "A wrong value; the body names the field and what is allowed",
        "429": "Overloaded, or over the limit of the API key; Retry-After says when to come back",
        "503": "Shutting down, or the device failed",
        "504": "The images took longer than the service, or timeout_ms, allows",
    }
)
_VERIFY_PROBLEMS = answers(
    {
        "404": "The model that made it is not loaded",
        "422": "It is no PNG, or has no recipe that makes sense",
        "429": "Overloaded, or over the limit of the API key; Retry-After says when to come back",
        "503": "Shutting down, or the device failed",
        "504": "The images took longer than the service allows",
    }
)
_PROBLEMS_OF_BODIES = answers({"415": "A body that is not JSON"})
_NOT_MODIFIED: dict[int | str, dict[str, Any]] = {
    304: {"description": "The client has it: If-None-Match names its ETag"}
}
_IMAGES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "One image, or a contact sheet of several; or the single images.",
        "model": ImageList,
        "content": {
            media_type: {"schema": {"type": "string", "format": "binary"}}
            for media_type in MEDIA_TYPES.values()
            if media_type != "application/json"  # which the model describes
        },
        "headers": {
            name: {"description": words, "schema": {"type": "string"}}
            for name, words in {
                "X-Seed": "the seed, also when it was drawn",
                "X-Model": "name@sha256:digest of the model",
                "X-Request-ID": "the id in the service's log",
                "Server-Timing": "milliseconds in queue, forward and encode",
            }.items()
        },
    }
}


class Head(NamedTuple):
    """What matters of a request's headers."""

    accept: str | None
    content_type: bytes
    body: str | None  # the header that announces one
    if_none_match: str | None


class GenerateEndpoint:
    """`/generate`, as an ASGI application.

    A framework's way from a request to a function and back takes longer than all that is left to do
    here, for one small image.
    """

    path = "/generate"
    methods = frozenset({"GET", "HEAD", "POST"})

    def __init__(self, generation: Generation) -> None:
        self._generation = generation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        scope["route"] = self  # its path is what metrics and the log go by
        try:
            status, headers, body = await self._generate(scope, receive)
        except Problem as problem:
            await answer(problem, scope, send)
            return
        except Disconnected:
            await Response(status_code=CLIENT_CLOSED_REQUEST)(scope, receive, send)
            return
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _generate(self, scope: Scope, receive: Receive) -> tuple[int, RawHeaders, bytes]:
        generation = self._generation
        head = read_headers(scope["headers"])
        asked: GenerateQuery | GenerateBody
        if head.body is None:
            asked = parse_query(scope["query_string"])
        else:
            asked = parse_body(await _read_body(head, scope, receive))
        chosen = asked.format or negotiate(head.accept)
        order = asked.order(generation)
        pixels = count_pixels(order, asked.scale)
        caching: RawHeaders = []
        if scope["method"] != "POST":
            repeatable = asked.seed is not None
            tag = entity_tag(order, f"{chosen} {asked.scale}") if repeatable else None
            caching = _caching(scope, asked, tag)
            if tag is not None and is_known(head.if_none_match, tag):
                return 304, [*caching, (b"x-model", order.model.identity)], b""
        consume(scope, len(order.labels))
        client: Client = scope.get(CLIENT) or Client()
        timeout_s = None if asked.timeout_ms is None else asked.timeout_ms / 1e3
        images = await generation.fulfil(order, client, timeout_s)
        body, encode_s = await generation.encode(
            encoder(chosen, order, images, asked.scale), pixels=pixels
        )
        generation.count(order, client)
        headers = [
            (b"content-type", CONTENT_TYPES[chosen]),
            (b"content-length", b"%d" % len(body)),
            *generation_headers(order, images, encode_s),
            *caching,
        ]
        return 200, headers, body


def openapi_routes() -> list[APIRoute]:
    """What `GenerateEndpoint` takes and gives, for the schema; nothing is ever routed to it."""

    def generate(
        query: Annotated[GenerateQuery, Query()],
        body: Annotated[
            GenerateBody | None, Body(description="in place of the query string, which is empty")
        ] = None,
    ) -> None:
        raise AssertionError(query, body)

    def repeat(query: Annotated[GenerateQuery, Query()]) -> None:
        raise AssertionError(query)

    post = APIRoute(
        GenerateEndpoint.path,
        generate,
        methods=["POST"],
        response_class=Response,
        responses={**_IMAGES, **_PROBLEMS, **_PROBLEMS_OF_BODIES},
        summary="Generate images of the requested classes",
    )
    get = APIRoute(
        GenerateEndpoint.path,
        repeat,
        methods=["GET"],
        response_class=Response,
        responses={**_IMAGES, **_NOT_MODIFIED, **_PROBLEMS},
        summary="The same, to be kept: with a seed it always gives the same",
    )
    return [post, get]


def create_router(generation: Generation) -> APIRouter:
    """The routes of this module."""
    router = APIRouter()

    @router.post(
        "/verify",
        summary="Whether an image is what its recipe says",
        openapi_extra={
            "requestBody": {
                "required": True,
                "content": {"image/png": {"schema": {"type": "string", "format": "binary"}}},
            }
        },
        response_model=VerificationResult,
        responses=_VERIFY_PROBLEMS,
    )
    async def verify(request: Request) -> Any:
        try:
            return await _verify(generation, request)
        except (ClientDisconnect, Disconnected):
            return Response(status_code=CLIENT_CLOSED_REQUEST)

    @router.get("/models", summary="The loaded models")
    async def models() -> ModelList:
        registry = generation.registry
        return ModelList(
            models=[_entry(each, each is registry.default) for each in registry],
            refused=[
                RefusedFile(file=name, cause=each.cause) for name, each in registry.refused.items()
            ],
        )

    return router


async def _verify(generation: Generation, request: Request) -> VerificationResult:
    # On other threads: a small file may hold a large picture.
    found = await run_in_threadpool(read_png, await request.body())
    order = repeat(found.recipe, generation.registry)
    consume(request.scope, len(order.labels))
    client: Client = request.scope.get(CLIENT) or Client()
    images = await generation.fulfil(order, client)
    generation.count(order, client)
    return await run_in_threadpool(compare, found, order, images)


def read_headers(headers: Iterable[tuple[bytes, bytes]]) -> Head:
    """What matters of the headers of a request, whose names are in lower case."""
    accept = body = known = None
    media_type = b""
    for name, value in headers:
        if name == b"accept":
            more = value.decode("latin-1")
            accept = more if accept is None else f"{accept}, {more}"  # lines of one list
        elif (name == b"content-length" and value != b"0") or name == b"transfer-encoding":
            body = (b"%b: %b" % (name, value)).decode("latin-1")
        elif name == b"content-type":
            media_type = value
        elif name == b"if-none-match":
            more = value.decode("latin-1")
            known = more if known is None else f"{known}, {more}"
    return Head(accept, media_type, body, known)


async def _read_body(head: Head, scope: Scope, receive: Receive) -> bytearray:
    """The body, which has to be JSON; the server bounds it.

    Raises:
        Problem: 415 for another type, 422 for a body where there cannot be one.
        Disconnected: the client went away before its end.
    """
    if scope["method"] != "POST":
        allowed = "no body is allowed; the parameters go into the query string"
        raise wrong_value("body", head.body, allowed)
    if scope["query_string"]:
        query = scope["query_string"].decode("latin-1")
        raise wrong_value("query", query, "has to be empty where a body has the parameters")
    if head.content_type.partition(b";")[0].strip().lower() != b"application/json":
        problem = wrong_value(
            "Content-Type",
            head.content_type.decode("latin-1"),
            "application/json is allowed, or no body and the parameters in the query string",
            status=415,
        )
        problem.kind = "unsupported-media-type"
        raise problem
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Disconnected
        body += message.get("body", b"")
        if not message.get("more_body", False):
            return body


def _caching(scope: Scope, asked: GenerateQuery | GenerateBody, tag: str | None) -> RawHeaders:
    """Who may keep an answer of this ETag for how long; nobody one that has none."""
    pinned = asked.model is not None and "@" in asked.model
    rule = caching_rule(scope, known=tag is not None, pinned=pinned)
    headers = [(b"cache-control", rule.encode())]
    if tag is not None:
        headers.append((b"etag", tag.encode()))
    if asked.format is None:
        headers.append((b"vary", b"accept"))
    return headers


def count_pixels(order: GenerationRequest, scale: int, field: str = "scale") -> int:
    """All pixels of an answer.

    Raises:
        Problem: 422, they are too many; it names the field that enlarges them.
    """
    height, width, _ = order.model.engine.image_shape
    pixels: int = len(order.labels) * height * width * scale**2
    if pixels > MAX_PIXELS:
        message = f"{pixels} pixels in all; at most {MAX_PIXELS} are allowed"
        raise wrong_value(field, scale, message)
    return pixels


def generation_headers(
    order: GenerationRequest, images: GeneratedImages, encode_s: float
) -> RawHeaders:
    """The headers that say what made the images of an answer, and how long that took."""
    timing = (
        f"queue;dur={1e3 * images.queue_s:.3f}, forward;dur={1e3 * images.forward_s:.3f}, "
        f"encode;dur={1e3 * encode_s:.3f}"
    )
    return [
        (b"x-seed", b"%d" % order.seed),
        (b"x-model", order.model.identity),
        (b"server-timing", timing.encode()),
    ]


def _entry(model: Model, default: bool) -> ModelEntry:
    info, engine = model.info, model.engine
    return ModelEntry(
        name=model.name,
        default=default,
        sha256=model.sha256,
        classes=list(info.class_names),
        image_size=info.network.image_size,
        channels=info.network.channels,
        device=str(engine.device),
        dtype=str(engine.dtype).removeprefix("torch."),
        images_seen=info.images_seen,
        source_commit=info.source_commit,
        network=asdict(info.network),
        training=info.training,
        certificate=info.certificate,
    )
