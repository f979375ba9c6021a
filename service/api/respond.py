"""The path that all requests for images share: rate limit, generate, encode, record, headers."""

import asyncio
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from starlette.responses import Response
from starlette.types import Scope

from service.disconnect import client_of
from service.encoding.timeslice import Encoder, TimeSlicedEncoder
from service.errors import Problem, invalid_value
from service.generation import Generation, ResolvedRequest, Stage
from service.inference.scheduling import GenerationResult
from service.rate_limit import consume
from service.settings import MAX_PIXELS
from service.telemetry.metrics import Metrics

RawHeaders = list[tuple[bytes, bytes]]
# Parts of the schemas of several endpoints.
BINARY = {"schema": {"type": "string", "format": "binary"}}
HEADERS = {
    name: {"description": text, "schema": {"type": "string"}}
    for name, text in {
        "X-Seed": "the seed, also if it was drawn",
        "X-Model": "name@sha256:digest of the model",
        "X-Images": "number of images in the file",
        "X-Request-ID": "the request id in the service's log",
        "Server-Timing": "milliseconds in queue, forward and encode",
    }.items()
}
NOT_MODIFIED: dict[int | str, dict[str, Any]] = {
    304: {"description": "If-None-Match names the current ETag"}
}
_MAX_STAGES = 128  # kept of one request; a data set has thousands


class Encoded(NamedTuple):
    """The body of a response, and the headers that describe its images."""

    body: bytes
    headers: RawHeaders

    def response(self, media_type: str) -> Response:
        """Return the response."""
        response = Response(self.body, media_type=media_type)
        response.raw_headers += self.headers
        return response


class Responder:
    """Answers requests for images."""

    def __init__(
        self, generation: Generation, encoder: TimeSlicedEncoder, metrics: Metrics
    ) -> None:
        self.generation = generation
        self.encoder = encoder
        self._encode_seconds = metrics.stage_seconds.labels("encode")

    async def respond(
        self,
        request: ResolvedRequest,
        scope: Scope,
        encode: Callable[[GenerationResult], Encoder],
        *,
        pixels: int | None = None,
        timeout_s: float | None = None,
    ) -> Encoded:
        """Generate and encode the images of a request.

        Args:
            request: the images.
            scope: of the request.
            encode: return the encoder of the images.
            pixels: number of pixels that are encoded; those of the images if None.
            timeout_s: deadline, if shorter than the service's own.

        Raises:
            Problem: 422, 429, 503 or 504, no images.
            Disconnected: the client disconnected first.
        """
        result = await self.draw(request, scope, timeout_s)
        return await self.encode(request, scope, result, encode(result), pixels)

    async def draw(
        self,
        request: ResolvedRequest,
        scope: Scope,
        timeout_s: float | None = None,
        *,
        retry: bool = False,
    ) -> GenerationResult:
        """Do the first half of `respond`: rate limit and generate.

        With `retry`, wait and try again instead of raising a problem of status 429 or 504.
        """
        client, consumed = client_of(scope), False
        while True:
            try:
                if not consumed:
                    consume(scope, len(request.labels))
                    consumed = True
                result = await self.generation.generate(request, client, timeout_s)
                break
            except Problem as problem:
                if not retry or problem.status not in (429, 504):
                    raise
                await asyncio.sleep(float(problem.headers.get("Retry-After", "1")))
        started = result.forwards[0].started_at
        _trace(
            scope,
            Stage("queue", started - result.queue_s, started),
            Stage("forward", started, started + result.forward_s, result.forwards),
        )
        return result

    async def encode(
        self,
        request: ResolvedRequest,
        scope: Scope,
        result: GenerationResult,
        encoder: Encoder,
        pixels: int | None = None,
    ) -> Encoded:
        """Do the second half of `respond`: encode, record and describe the images."""
        began = time.perf_counter()
        body = await self.encoder.run(encoder, request.pixels if pixels is None else pixels)
        ended = time.perf_counter()
        self._encode_seconds.observe(ended - began)
        _trace(scope, Stage("encode", began, ended))
        self.generation.record_sent(request, client_of(scope))
        return Encoded(body, _generation_headers(request, result, ended - began))


def _trace(scope: Scope, *stages: Stage) -> None:
    """Record stages of a request that is traced."""
    recorded: list[Stage] | None = scope["state"].get("stages")
    if recorded is not None and len(recorded) < _MAX_STAGES:
        recorded += stages


def count_pixels(request: ResolvedRequest, scale: int, field: str = "scale") -> int:
    """Return the number of pixels of a response whose images are enlarged by a factor.

    Raises:
        Problem: 422, too many; it names `field`.
    """
    pixels = request.pixels * scale**2
    if pixels > MAX_PIXELS:
        message = f"{pixels} pixels in all; at most {MAX_PIXELS} are allowed"
        raise invalid_value(field, scale, message)
    return pixels


def image_headers(request: ResolvedRequest) -> RawHeaders:
    """Return the headers that say what determines the images of a response."""
    return [
        (b"x-seed", b"%d" % request.seed),
        (b"x-model", request.model.versioned_name.encode()),
    ]


def _generation_headers(
    request: ResolvedRequest, result: GenerationResult, encode_s: float
) -> RawHeaders:
    timing = (
        f"queue;dur={1e3 * result.queue_s:.3f}, forward;dur={1e3 * result.forward_s:.3f}, "
        f"encode;dur={1e3 * encode_s:.3f}"
    )
    return [*image_headers(request), (b"server-timing", timing.encode())]
