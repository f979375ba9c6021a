"""The endpoint `/generate`."""

from typing import Annotated, Any

from fastapi import Body, Query
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from service.api.bodies import require_json
from service.api.caching import cache_control, matches, request_tag
from service.api.parameters import GenerateBody, GenerateQuery, parse_body, parse_query
from service.api.respond import (
    BINARY,
    HEADERS,
    NOT_MODIFIED,
    RawHeaders,
    Responder,
    count_pixels,
)
from service.api.routing import Router
from service.encoding.images import CONTENT_TYPES, MEDIA_TYPES, ImageList, encoder, negotiate
from service.errors import (
    GENERATION_ERRORS,
    Problem,
    error_responses,
    invalid_value,
    method_not_allowed,
    problem_response,
)

PATH = "/generate"
METHODS = ("GET", "HEAD", "POST")
_REMEDY = (
    """for example with curl --json '{"label": 7}'; or send no body and the parameters in """
    "the query string: curl -X POST 'URL?label=7'"
)

_ERRORS = error_responses(406, *GENERATION_ERRORS)
_IMAGES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "One image, or a contact sheet of several; or the single images.",
        "model": ImageList,  # describes JSON
        "content": {each: BINARY for each in MEDIA_TYPES.values() if each != "application/json"},
        "headers": {name: HEADERS[name] for name in HEADERS if name != "X-Images"},
    }
}


class GenerateEndpoint:
    """ASGI app that answers `/generate`."""

    path = PATH  # as of a route, for metrics and the log

    def __init__(self, responder: Responder) -> None:
        self._responder = responder

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        try:
            if scope["method"] not in METHODS:
                raise method_not_allowed(scope["method"], PATH, METHODS)
            scope["route"] = self
            status, headers, body = await self._generate(Request(scope, receive))
        except Problem as problem:
            await problem_response(problem, scope)(scope, receive, send)
            return
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _generate(self, sent: Request) -> tuple[int, RawHeaders, bytes]:
        headers, scope = sent.headers, sent.scope
        body = await _read_body(sent)
        parameters = parse_body(body) if body else parse_query(scope["query_string"])
        image_format = parameters.format or negotiate(", ".join(headers.getlist("accept")))
        request = self._responder.generation.resolve(parameters.request)
        scale = parameters.scale
        pixels = count_pixels(request, scale)
        caching: RawHeaders = []
        if scope["method"] != "POST":
            tag = (
                None if parameters.seed is None else request_tag(request, f"{image_format} {scale}")
            )
            caching = _caching_headers(scope, parameters, tag)
            if tag is not None and matches(", ".join(headers.getlist("if-none-match")), tag):
                return 304, [*caching, (b"x-model", request.model.versioned_name.encode())], b""
        encoded = await self._responder.respond(
            request,
            scope,
            lambda result: encoder(image_format, request, result, scale),
            pixels=pixels,
            timeout_s=None if parameters.timeout_ms is None else parameters.timeout_ms / 1e3,
        )
        length = (b"content-length", b"%d" % len(encoded.body))
        content_type = (b"content-type", CONTENT_TYPES[image_format])
        return 200, [content_type, length, *encoded.headers, *caching], encoded.body


def create_router() -> Router:
    """Create routes that describe `GenerateEndpoint` in the schema; no request reaches them."""
    router = Router()

    @router.post(
        PATH,
        summary="Generate images of the requested classes",
        response_class=Response,
        responses={**_IMAGES, **_ERRORS, **error_responses(415)},
    )
    def generate(
        query: Annotated[GenerateQuery, Query()],
        body: Annotated[
            GenerateBody | None, Body(description="in place of the query string")
        ] = None,
    ) -> None:
        raise AssertionError(query, body)

    @router.get(
        PATH,
        summary="Generate images that may be cached: with a seed, the same ones each time",
        response_class=Response,
        responses={**_IMAGES, **NOT_MODIFIED, **_ERRORS},
    )
    def generate_cacheable(query: Annotated[GenerateQuery, Query()]) -> None:
        raise AssertionError(query)

    return router


async def _read_body(sent: Request) -> bytes:
    """Return the body of a request; empty if it has none. The server bounds its size.

    Raises:
        Problem: 415 for another type than JSON, 422 where no body is allowed.
    """
    body = b""
    if sent.headers.get("content-length", "0") != "0":
        _check_body(sent)  # before the client sends it, if it waits for that
    elif "transfer-encoding" not in sent.headers:
        return body
    async for chunk in sent.stream():
        if chunk and not body:
            _check_body(sent)
        body += chunk
    return body


def _check_body(sent: Request) -> None:
    headers, query = sent.headers, sent.scope["query_string"]
    if sent.method != "POST":
        name = "transfer-encoding" if "transfer-encoding" in headers else "content-length"
        reason = "is not allowed; send the parameters in the query string"
        raise invalid_value("body", f"{name}: {headers[name]}", reason)
    if query:
        query = query.decode("latin-1")
        raise invalid_value("query", query, "must be empty if the body has the parameters")
    require_json(headers, _REMEDY)


def _caching_headers(
    scope: Scope, parameters: GenerateQuery | GenerateBody, tag: str | None
) -> RawHeaders:
    headers = [(b"cache-control", cache_control(scope, tag, parameters.model).encode())]
    if tag is not None:
        headers.append((b"etag", tag.encode()))
    if parameters.format is None:
        headers.append((b"vary", b"accept"))
    return headers
