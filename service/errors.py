"""Errors as HTTP responses: problem details (RFC 9457), or the format of another API.

A problem tells the caller what to change. Nothing internal ever reaches a body.
"""

import http
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from service.disconnect import CLIENT_CLOSED_REQUEST, Disconnected

_MAX_VALUE_CHARS = 100  # of an invalid value that is repeated in the response
_MAX_FIELD_ERRORS = 20


class FieldError(BaseModel):
    """One invalid value."""

    field: str = Field(description="the parameter or header")
    value: str | None = Field(description="the value sent, shortened; null if none was sent")
    message: str = Field(description="why it is invalid and what is allowed")


class ProblemDetails(BaseModel):
    """The body of every error."""

    type: str = Field(description="the kind of problem; stable")
    title: str = Field(description="the kind in words")
    status: int = Field(description="the HTTP status")
    detail: str = Field(description="this occurrence in words")
    request_id: str | None = Field(description="the X-Request-ID of the response")
    errors: list[FieldError] = Field(default_factory=list, description="the invalid values")


class Problem(Exception):  # noqa: N818  (the name of RFC 9457)
    """An error for the caller: its HTTP status, a short name for its type, and one sentence."""

    def __init__(
        self,
        status: int,
        kind: str,
        detail: str,
        *,
        errors: Sequence[FieldError] = (),
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(detail)
        self.status, self.kind, self.detail = status, kind, detail
        self.errors = list(errors)
        self.headers = dict(headers or {})


class OpenAIErrorBody(BaseModel):
    """The body of every error of the OpenAI API."""

    class Error(BaseModel):
        """An error."""

        message: str
        type: str
        param: str | None = Field(description="the first invalid parameter")
        code: str

    error: Error


class InferenceErrorBody(BaseModel):
    """The body of every error of the Open Inference Protocol."""

    error: str


class ErrorFormat(NamedTuple):
    """The format in which an API writes its errors."""

    media_type: str
    model: type[BaseModel]  # describes the body
    body: Callable[[Problem, str | None], BaseModel]  # with the request id
    invalid_value_status: int  # in place of 422, which some APIs do not know


def _details(problem: Problem, request_id: str | None) -> ProblemDetails:
    return ProblemDetails(
        type=f"urn:cgan:problem:{problem.kind}",
        title=problem.kind.replace("-", " ").capitalize(),
        status=problem.status,
        detail=problem.detail,
        request_id=request_id,
        errors=problem.errors,
    )


def _openai_error(problem: Problem, _request_id: str | None) -> OpenAIErrorBody:
    types = {401: "authentication_error", 429: "rate_limit_error"}
    other = "server_error" if problem.status >= 500 else "invalid_request_error"
    error = OpenAIErrorBody.Error(
        message=problem.detail,
        type=types.get(problem.status, other),
        param=problem.errors[0].field if problem.errors else None,
        code=problem.kind.replace("-", "_"),
    )
    return OpenAIErrorBody(error=error)


def _inference_error(problem: Problem, _request_id: str | None) -> InferenceErrorBody:
    return InferenceErrorBody(error=problem.detail)


_DETAILS = ErrorFormat("application/problem+json", ProblemDetails, _details, 422)
_FORMATS = {  # by path prefix
    "/v1": ErrorFormat("application/json", OpenAIErrorBody, _openai_error, 400),
    "/v2": ErrorFormat("application/json", InferenceErrorBody, _inference_error, 400),
}

_DESCRIPTIONS = {
    400: "Malformed HTTP/1.1 request",
    401: "Missing or invalid API key",
    404: "Unknown model",
    406: "The Accept header allows none of the formats",
    408: "The request was not received in time",
    413: "The body is too large, possibly after decompression",
    414: "The request target is too long",
    415: "Unsupported Content-Type or Content-Encoding",
    416: "The range begins after the last byte; Content-Range states the length",
    422: "Invalid value; the body names it and what is allowed",
    429: "Overloaded, or over the rate limit of the API key; Retry-After states when to retry",
    431: "The headers are too large",
    503: "Shutting down, or the device failed",
    504: "The images were not complete before the deadline",
}
PROTOCOL_ERRORS = (400, 408, 413, 414, 431)  # of any request
AUTH_ERRORS = (401,)
GENERATION_ERRORS = (404, 422, 429, 503, 504)


def format_for(path: str) -> ErrorFormat:
    """Return the format of errors at a path."""
    for prefix, error_format in _FORMATS.items():
        if path == prefix or path.startswith(f"{prefix}/"):
            return error_format
    return _DETAILS


def error_responses(*statuses: int, path: str = "/") -> dict[int | str, dict[str, Any]]:
    """Return the `responses` of an operation at a path that may end in these errors."""
    error_format = format_for(path)
    schema = inline_refs(error_format.model.model_json_schema())
    return {
        str(error_format.invalid_value_status if status == 422 else status): {
            "description": _DESCRIPTIONS[status],
            "content": {error_format.media_type: {"schema": schema}},
        }
        for status in statuses
    }


def invalid_value(
    field: str, value: object, message: str, *, status: int = 422, kind: str = "invalid-value"
) -> Problem:
    """Return a problem with one value."""
    error = FieldError(field=field, value=_shorten(value), message=message)
    return Problem(status, kind, f"{field}: {message}", errors=[error])


def unsupported_media_type(field: str, value: object, message: str, accept: str) -> Problem:
    """Return a problem with the Content-Type or Content-Encoding of a body.

    `accept` lists the ones that are accepted, as a header.
    """
    problem = invalid_value(field, value, message, status=415, kind="unsupported-media-type")
    problem.headers[field.replace("Content", "Accept").removesuffix("-Type")] = accept
    return problem


def invalid_values(
    errors: Sequence[Mapping[str, Any]], allowed: Mapping[str, str] | None = None
) -> Problem:
    """Return a problem with the values of pydantic's `errors`; `allowed` replaces its messages."""
    found = [_field_error(each, allowed or {}) for each in errors[:_MAX_FIELD_ERRORS]]
    detail = "; ".join(f"{each.field}: {each.message}" for each in found[:3])
    return Problem(422, "invalid-value", detail, errors=found)


def _field_error(error: Mapping[str, Any], allowed: Mapping[str, str]) -> FieldError:
    names = [str(part) for part in error["loc"] if not isinstance(part, int)]
    field = names[-1] if names else ""
    value = error["input"]
    message = allowed.get(field, str(error["msg"]))
    if error["type"] == "missing":
        value, message = None, "is required"
    elif error["type"] == "extra_forbidden":
        message = "unknown parameter"
    elif isinstance(value, list):
        value = f"{len(value)} values"
    return FieldError(field=_shorten(field) or "", value=_shorten(value), message=message)


def _shorten(value: object) -> str | None:
    if value is None:
        return None
    text = str(value)
    return text if len(text) <= _MAX_VALUE_CHARS else text[:_MAX_VALUE_CHARS] + "…"


def problem_response(problem: Problem, scope: Scope) -> Response:
    """Return the response to a request with a problem."""
    error_format = format_for(scope["path"])
    body = error_format.body(problem, scope.get("state", {}).get("request_id"))
    return Response(
        body.model_dump_json(),
        error_format.invalid_value_status if problem.status == 422 else problem.status,
        problem.headers,
        error_format.media_type,
    )


async def send_error(scope: Scope, receive: Receive, send: Send) -> None:
    """Send the problem of a scope; an ASGI application."""
    await problem_response(scope["problem"], scope)(scope, receive, send)


def add_exception_handlers(app: FastAPI) -> None:
    """Let an app answer every expected exception."""

    @app.exception_handler(Problem)
    async def on_problem(request: Request, error: Problem) -> Response:
        return problem_response(error, request.scope)

    @app.exception_handler(RequestValidationError)
    async def on_invalid_values(request: Request, error: RequestValidationError) -> Response:
        return problem_response(invalid_values(error.errors()), request.scope)

    @app.exception_handler(HTTPException)
    async def on_http_exception(request: Request, error: HTTPException) -> Response:
        return problem_response(_http_problem(request, error), request.scope)

    @app.exception_handler(Disconnected)
    @app.exception_handler(ClientDisconnect)
    async def on_disconnect(_request: Request, _error: Exception) -> Response:
        return Response(status_code=CLIENT_CLOSED_REQUEST)


def _http_problem(request: Request, error: HTTPException) -> Problem:
    path = _shorten(request.url.path) or "/"
    headers = error.headers or {}
    if error.status_code == 405:
        return method_not_allowed(request.method, path, headers.get("Allow", "").split(", "))
    detail = str(error.detail)
    if error.status_code == 404:
        detail = f"Nothing is served at {path}; see /docs."
    kind = http.HTTPStatus(error.status_code).phrase.lower().replace(" ", "-")
    return Problem(error.status_code, kind, detail, headers=headers)


def method_not_allowed(method: str, path: str, allowed: Sequence[str]) -> Problem:
    """Return a problem with the method of a request."""
    allow = ", ".join(sorted({*allowed, "HEAD"} if "GET" in allowed else allowed))
    detail = f"{method} is not allowed at {path}; allowed: {allow}."
    return Problem(405, "method-not-allowed", detail, headers={"Allow": allow})


def inline_refs(schema: dict[str, Any]) -> dict[str, Any]:
    """Return a JSON schema with its references replaced by their definitions."""
    definitions = schema.pop("$defs", {})

    def resolve(node: Any) -> Any:
        if isinstance(node, list):
            return [resolve(each) for each in node]
        if not isinstance(node, dict):
            return node
        if "$ref" in node:
            return resolve(definitions[node["$ref"].rpartition("/")[2]])
        return {key: resolve(value) for key, value in node.items()}

    resolved: dict[str, Any] = resolve(schema)
    return resolved
