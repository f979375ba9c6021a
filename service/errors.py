"""Errors, in one place: problem details (RFC 9457), or what another API's clients know.

A problem says what is wrong in words a caller can act on; nothing internal ever reaches a body.
"""

import http
import json
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

_to_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
_MISSING, _UNKNOWN = "is required", "there is no such parameter"
_KEPT = {_MISSING, _UNKNOWN}  # said whatever the field
_SHOWN = 100  # characters of a wrong value that are repeated to whoever sent it


class FieldError(BaseModel):
    """One wrong value."""

    field: str = Field(description="the parameter or header")
    value: str | None = Field(description="what was sent, shortened; null where nothing was")
    message: str = Field(description="what is wrong, and what is allowed")


class ProblemDetails(BaseModel):
    """The body of every error."""

    type: str = Field(description="what kind of problem it is; stable")
    title: str = Field(description="the kind in words")
    status: int = Field(description="the HTTP status")
    detail: str = Field(description="this occurrence in words")
    request_id: str | None = Field(description="the X-Request-ID of the answer")
    errors: list[FieldError] = Field(default_factory=list, description="the wrong values")


class Problem(Exception):  # noqa: N818  (the name of RFC 9457)
    """An answer that is no image.

    Args:
        status: HTTP status.
        kind: short name that becomes the type.
        detail: one sentence for the caller.
        errors: the wrong values, where there are any.
        headers: to add to the answer.
    """

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
        self.status = status
        self.kind = kind
        self.detail = detail
        self.errors = list(errors)
        self.headers = dict(headers or {})


class OpenAIError(BaseModel):
    """What is wrong, as the OpenAI API says it."""

    message: str
    type: str
    param: str | None = Field(description="the first wrong parameter")
    code: str


class OpenAIErrorBody(BaseModel):
    """The body of every error of the OpenAI API."""

    error: OpenAIError


class InferenceErrorBody(BaseModel):
    """The body of every error of the Open Inference Protocol."""

    error: str


class Shape(NamedTuple):
    """How an API writes its errors.

    Attributes:
        media_type: of the body.
        model: describes the body.
        fill: the body of a problem, for the request of a scope.
        wrong_value_status: what stands for 422, which not every API knows.
    """

    media_type: str
    model: type[BaseModel]
    fill: Callable[[Problem, Scope], dict[str, Any]]
    wrong_value_status: int

    def status(self, problem: Problem) -> int:
        """The HTTP status that a problem has in this API."""
        return self.wrong_value_status if problem.status == 422 else problem.status

    def schema(self) -> dict[str, Any]:
        """The JSON schema of an error, which stands on its own wherever it is put."""
        return inline(self.model.model_json_schema())


def shape_of(path: str) -> Shape:
    """How errors are written at a path."""
    for prefix, shape in _SHAPES.items():
        if path == prefix or path.startswith(f"{prefix}/"):
            return shape
    return _DETAILS


def answers(words: Mapping[str, str], path: str = "/") -> dict[int | str, dict[str, Any]]:
    """Answers that are problems, for the schema: what each status means at a path."""
    shape = shape_of(path)
    schema = shape.schema()
    return {
        str(shape.wrong_value_status) if status == "422" else status: {
            "description": text,
            "content": {shape.media_type: {"schema": schema}},
        }
        for status, text in words.items()
    }


# In the schema of every operation, for whatever is asked may be asked so.
PROTOCOL_ERRORS = {
    "400": "This is no HTTP/1.1 request",
    "408": "The request was not complete in time",
    "413": "The body is too large",
    "414": "The target is too long",
    "431": "The head is too large",
}
AUTH_ERRORS = {"401": "No valid API key"}

INTERNAL_ERROR = Problem(500, "internal-error", "The service failed; it was logged by this id.")


def wrong_value(field: str, value: object, message: str, *, status: int = 422) -> Problem:
    """A problem with one value."""
    error = FieldError(field=field, value=_shorten(value), message=message)
    return Problem(status, "invalid-value", f"{field}: {message}", errors=[error])


def wrong_values(
    errors: Sequence[Mapping[str, Any]], allowed: Mapping[str, str] | None = None
) -> Problem:
    """A problem with the values that a validation found wrong.

    Args:
        errors: pydantic's description of each.
        allowed: what is allowed, by the name of the field, in place of pydantic's own words.
    """
    found = [_field_error(each) for each in errors[:20]]
    for error in found:
        if error.message not in _KEPT:
            error.message = (allowed or {}).get(error.field, error.message)
    detail = "; ".join(f"{each.field}: {each.message}" for each in found[:3])
    return Problem(422, "invalid-value", detail, errors=found)


def describe(problem: Problem, scope: Scope) -> tuple[int, str, bytes]:
    """Status, media type and body of the answer to a request that ended in a problem."""
    shape = shape_of(scope["path"])
    if shape is _DETAILS and not problem.errors:
        before, after = _around_id(problem.status, problem.kind, problem.detail)
        body = f"{before}{_to_json(_request_id(scope))}{after}".encode()
    else:
        body = _to_json(shape.fill(problem, scope)).encode()
    return shape.status(problem), shape.media_type, body


def respond(request: Request, problem: Problem) -> Response:
    """The answer to a request that ended in a problem."""
    status, media_type, body = describe(problem, request.scope)
    return Response(body, status, headers=problem.headers, media_type=media_type)


async def answer(problem: Problem, scope: Scope, send: Send) -> None:
    """Answer with a problem, past the framework, which an overloaded service has no time for."""
    status, media_type, body = describe(problem, scope)
    headers = [(b"content-type", media_type.encode()), (b"content-length", b"%d" % len(body))]
    for name, value in problem.headers.items():
        headers.append((name.lower().encode(), value.encode()))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def refuse(scope: Scope, _receive: Receive, send: Send) -> None:
    """Answer with the problem of a scope; an ASGI application."""
    await answer(scope["problem"], scope, send)


def install(app: FastAPI) -> None:
    """Answer every expected error of an app as a problem."""

    @app.exception_handler(Problem)
    async def problem(request: Request, error: Problem) -> Response:
        return respond(request, error)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return respond(request, wrong_values(error.errors()))

    @app.exception_handler(HTTPException)
    async def plain(request: Request, error: HTTPException) -> Response:
        phrase = http.HTTPStatus(error.status_code).phrase
        kind = phrase.lower().replace(" ", "-")
        return respond(
            request,
            Problem(error.status_code, kind, _detail(request, error), headers=error.headers),
        )


def _detail(request: Request, error: HTTPException) -> str:
    path = _shorten(request.url.path)
    if error.status_code == 404:
        return f"There is nothing at {path}; see /docs."
    if error.status_code == 405:
        allow = (error.headers or {}).get("Allow", "another method")
        allowed = ", ".join(sorted(allow.split(", ")))  # it comes in any order
        return f"{request.method} is not allowed at {path}; allowed is {allowed}."
    return str(error.detail)


@lru_cache(maxsize=256)  # under overload the same is said again and again
def _around_id(status: int, kind: str, detail: str) -> tuple[str, str]:
    """The body of a problem without wrong values, before and after the request's id."""
    name = '"request_id":'  # never in a text, where quotes are escaped
    body = _to_json(_fill_details(Problem(status, kind, detail), {}))
    before, _, after = body.partition(f"{name}null")
    return before + name, after


def _request_id(scope: Scope) -> str | None:
    found: str | None = scope.get("state", {}).get("request_id")
    return found


def _fill_details(problem: Problem, scope: Scope) -> dict[str, Any]:
    return {
        "type": f"urn:cgan:problem:{problem.kind}",
        "title": problem.kind.replace("-", " ").capitalize(),
        "status": problem.status,
        "detail": problem.detail,
        "request_id": _request_id(scope),
        "errors": [error.model_dump() for error in problem.errors],
    }


def _fill_openai(problem: Problem, _scope: Scope) -> dict[str, Any]:
    kinds = {401: "authentication_error", 429: "rate_limit_error"}
    other = "server_error" if problem.status >= 500 else "invalid_request_error"
    error = OpenAIError(
        message=problem.detail,
        type=kinds.get(problem.status, other),
        param=problem.errors[0].field if problem.errors else None,
        code=problem.kind.replace("-", "_"),
    )
    return {"error": error.model_dump()}


def _fill_inference(problem: Problem, _scope: Scope) -> dict[str, Any]:
    return {"error": problem.detail}


_DETAILS = Shape("application/problem+json", ProblemDetails, _fill_details, 422)
# By what their paths begin with.
_SHAPES = {
    "/v1": Shape("application/json", OpenAIErrorBody, _fill_openai, 400),
    "/v2": Shape("application/json", InferenceErrorBody, _fill_inference, 400),
}


def inline(schema: dict[str, Any]) -> dict[str, Any]:
    """A schema with what it refers to in its place."""
    known = schema.pop("$defs", {})

    def resolve(node: Any) -> Any:
        if isinstance(node, list):
            return [resolve(each) for each in node]
        if not isinstance(node, dict):
            return node
        if "$ref" in node:
            return resolve(known[node["$ref"].rpartition("/")[2]])
        return {key: resolve(value) for key, value in node.items()}

    whole: dict[str, Any] = resolve(schema)
    return whole


def _field_error(error: Mapping[str, Any]) -> FieldError:
    where = [str(part) for part in error["loc"] if not isinstance(part, int)]
    field = where[-1] if where else ""
    message = str(error["msg"])
    value = error["input"]
    if error["type"] == "missing":
        value, message = None, _MISSING
    elif error["type"] == "extra_forbidden":
        message = _UNKNOWN
    elif isinstance(value, list):
        value = f"{len(value)} values"
    return FieldError(field=_shorten(field) or "", value=_shorten(value), message=message)


def _shorten(value: object) -> str | None:
    if value is None:
        return None
    text = str(value)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "…"
