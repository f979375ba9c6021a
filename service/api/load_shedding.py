"""Refusals at the door: what too much waits for already is told so before it becomes a request.

Under overload most of what comes is refused. As a request that costs about as much as a small image
does, so that refusing would take the time in which the others are to be answered; here it costs
little more than to read it. The answer is the one that `routes.native` would give.
"""

import time
from functools import lru_cache
from typing import NamedTuple

import httptools
from starlette.types import Scope

from service.api.generate import GenerateEndpoint, RawHeaders, read_headers
from service.api.parameters import parse_query
from service.encoding.images import negotiate
from service.errors import Problem, describe
from service.generation import Generation
from service.middleware.access_log import AccessLogMiddleware, request_id_of
from service.settings import MAX_IMAGES

# A head of more bytes or headers is looked at more closely: what is remembered of heads is small.
_MAX_BYTES, _MAX_HEADERS = 2048, 64


class Plain(NamedTuple):
    """What is asked for, where it is nothing but images of some classes."""

    labels: list[str]
    n: int
    model: str | None
    timeout_s: float | None


class PlainRequest(NamedTuple):
    """A request that asks for no more than that."""

    asked: Plain
    query: bytes
    headers: RawHeaders


class Shedder:
    """Refuses requests to the front door, as long as the batcher refuses them."""

    def __init__(self, generation: Generation, observe: AccessLogMiddleware) -> None:
        self._generation, self._observe = generation, observe

    def __call__(
        self, data: bytes, client: tuple[str, int] | None
    ) -> tuple[int, bytes, bytes] | None:
        """Refuse a POST without a body.

        Args:
            data: a request's head, up to the empty line that ends it.
            client: sends it.

        Returns:
            status, lines of headers, and body, counted and logged as of any request; None where the
            request is not to be refused, or not for want of room, or has to be looked at more
            closely.
        """
        if not self._generation.crowded:
            return None
        began = time.perf_counter()
        plain = read_head(data) if len(data) <= _MAX_BYTES else None
        problem = None if plain is None else self._find_problem(plain.asked)
        if plain is None or problem is None:
            return None
        request_id = request_id_of(plain.headers)
        scope: Scope = {
            "route": GenerateEndpoint,
            "method": "POST",
            "path": GenerateEndpoint.path,
            "query_string": plain.query,
            "client": client,
            "state": {"request_id": request_id},
        }
        status, media_type, body = describe(problem, scope)
        lines = f"content-type: {media_type}\r\ncontent-length: {len(body)}\r\n"
        for name, value in problem.headers.items():
            lines += f"{name.lower()}: {value}\r\n"
        lines += f"x-request-id: {request_id}\r\n"
        seconds = time.perf_counter() - began
        self._observe.report(scope, request_id, status, len(body), seconds)
        return status, lines.encode(), body

    def _find_problem(self, asked: Plain) -> Problem | None:
        try:
            model = self._generation.find(asked.model)
        except Problem:  # another one
            return None
        if not model.labels.keys() >= set(asked.labels):
            return None
        return self._generation.refusal(model, asked.n * len(asked.labels), asked.timeout_s)


class _Reader:
    """What a parser finds in a head."""

    def __init__(self, data: bytes) -> None:
        self.target = b""
        self.headers: RawHeaders = []
        self._begun = self._complete = 0
        self._keeps_alive = False
        self._parser = httptools.HttpRequestParser(self)
        self._parser.feed_data(data)

    def on_message_begin(self) -> None:
        self._begun += 1

    def on_url(self, part: bytes) -> None:
        self.target += part

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        self._keeps_alive = self._parser.should_keep_alive()  # later the parser has forgotten it

    def on_message_complete(self) -> None:
        self._complete += 1

    @property
    def simple(self) -> bool:
        """Whether it is one POST without a body, after which the next one may come."""
        return (
            self._begun == self._complete == 1
            and self._keeps_alive
            and self._parser.get_method() == b"POST"
            and self._parser.get_http_version() == "1.1"
            and len(self.headers) <= _MAX_HEADERS
            and all(name != b"expect" for name, _ in self.headers)
        )


@lru_cache(maxsize=1024)  # under overload the same is asked again and again
def read_head(data: bytes) -> PlainRequest | None:
    """The request of a head, without its last line; None where it is not plain, or not right."""
    try:
        reader = _Reader(data + b"\r\n\r\n")
    except (httptools.HttpParserError, httptools.HttpParserUpgrade):
        return None
    head = read_headers(reader.headers)
    if not reader.simple or head.body is not None:
        return None
    asked = read_plain(reader.target, head.accept)
    if asked is None:
        return None
    return PlainRequest(asked, reader.target.partition(b"?")[2], reader.headers)


@lru_cache(maxsize=4096)  # of requests whose ids differ, too
def read_plain(target: bytes, accept: str | None) -> Plain | None:
    """What a target asks for; None where it is not plain, or not right."""
    path, _, query = target.partition(b"?")
    if path != GenerateEndpoint.path.encode() or b"#" in query:
        return None
    try:
        asked = parse_query(query)
        if asked.format is None:
            negotiate(accept)
    except Problem:
        return None
    varied = (asked.mix, asked.to_seed, asked.steps, asked.at)
    if asked.label is None or any(each is not None for each in varied):
        return None
    if asked.scale != 1 or asked.index or asked.n * len(asked.label) > MAX_IMAGES:
        return None
    timeout_s = None if asked.timeout_ms is None else asked.timeout_ms / 1e3
    return Plain(asked.label, asked.n, asked.model, timeout_s)
