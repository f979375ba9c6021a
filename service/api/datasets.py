"""Whole data sets, streamed: `/dataset`."""

import asyncio
import logging
import math
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import suppress
from random import getrandbits
from typing import Annotated, Any, NamedTuple, TypeVar

import numpy as np
from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import StreamingResponse
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from starlette.types import Scope, Send

from service.api.caching import caching_rule, is_known
from service.api.parameters import MAX_SEED
from service.encoding.datasets import (
    MEDIA_TYPES,
    Chunk,
    DataSet,
    Layout,
    Part,
    SetFormat,
    Static,
    lay_out,
)
from service.errors import Problem, answers, wrong_value
from service.generation import CLIENT, Client, GeneratedImages, Generation, GenerationRequest, Steps
from service.rate_limit import burst_limit, consume

log = logging.getLogger("service")

T = TypeVar("T")
PATH = "/dataset"
MAX_PER_CLASS = 1_000_000
MAX_SET = 10_000_000  # images
_AT_ONCE = 256  # images at most, if that is a block
_RANGE = re.compile(r"bytes=(\d{0,19})-(\d{0,19})")
_NO_PIXELS = np.empty((0, 0, 0, 0), dtype=np.uint8)


class DataSetQuery(BaseModel):
    """The parameters of `/dataset`."""

    model_config = ConfigDict(extra="forbid")

    per_class: int = Field(
        ge=1,
        le=MAX_PER_CLASS,
        description=f"images of each class; at most {MAX_SET} in all",
        examples=[1000],
    )
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] | None = Field(
        None, description="the same seed gives the same bytes; drawn where none is given"
    )
    format: SetFormat = Field(
        "zip",
        description="zip: a folder of PNGs for each class; webdataset: a tar of samples; idx: a "
        "tar of the two files that MNIST has; npz: arrays for NumPy",
    )
    start: int = Field(
        0,
        ge=0,
        description="number of the first image, a multiple of the number of classes; those before "
        "it are left out",
    )
    truncation: float = Field(
        1.0,
        gt=0,
        le=1,
        allow_inf_nan=False,
        description="less is nearer to what is typical, with less variety",
    )
    model: str | None = Field(
        None,
        description="name of a model, or name@sha256:digest for that file alone; the default one "
        "if not given",
    )

    def dataset(self, generation: Generation) -> DataSet:
        """Check it against the models.

        Raises:
            Problem: 404 or 422, naming the field.
        """
        model = generation.find(self.model)
        classes = len(model.info.class_names)
        if self.per_class * classes > MAX_SET:
            message = f"{self.per_class * classes} images in all; at most {MAX_SET} are allowed"
            raise wrong_value("per_class", self.per_class, message)
        if self.format == "idx" and classes > 256:
            message = f"has one byte for a class, and {model.name} has {classes} classes"
            raise wrong_value("format", self.format, message)
        if self.start % classes or self.start >= self.per_class * classes:
            message = (
                f"must be a multiple of {classes}, the number of classes, and less than "
                f"{self.per_class * classes}, that of all images"
            )
            raise wrong_value("start", self.start, message)
        seed = getrandbits(53) if self.seed is None else self.seed
        return DataSet(model, seed, self.start // classes, self.per_class, self.truncation)


_PROBLEMS = answers(
    {
        "404": "Unknown model",
        "416": "There are no such bytes; Content-Range says how many there are",
        "422": "A wrong value; the body names the field and what is allowed",
        "429": "Overloaded, or over the limit of the API key; Retry-After says when to come back",
        "503": "Shutting down, or the device failed",
        "504": "The first images took longer than the service allows",
    },
    PATH,
)
_FILE: dict[str, Any] = {
    media_type: {"schema": {"type": "string", "format": "binary"}}
    for media_type in sorted(set(MEDIA_TYPES.values()))
}
_HEADERS = {
    name: {"description": words, "schema": {"type": "string"}}
    for name, words in {
        "X-Images": "how many images the file has",
        "X-Seed": "the seed, also when it was drawn",
        "X-Model": "name@sha256:digest of the model",
    }.items()
}
_ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {"description": "The file", "content": _FILE, "headers": _HEADERS},
    206: {"description": "The bytes that Range asks for", "content": _FILE, "headers": _HEADERS},
    304: {"description": "The client has it: If-None-Match names its ETag"},
}


def create_router(generation: Generation) -> APIRouter:
    """The routes of this module."""
    router = APIRouter()

    @router.get(
        PATH,
        summary="A balanced, labelled data set as a file",
        response_class=Response,
        responses={**_ANSWERS, **_PROBLEMS},
    )
    async def dataset(request: Request, query: Annotated[DataSetQuery, Query()]) -> Response:
        return await _answer(generation, request, query)

    @router.head(PATH, include_in_schema=False)
    async def head(request: Request, query: Annotated[DataSetQuery, Query()]) -> Response:
        return await _answer(generation, request, query)

    return router


async def _answer(generation: Generation, request: Request, query: DataSetQuery) -> Response:
    dataset = query.dataset(generation)
    layout = lay_out(dataset, query.format)
    tag = None if query.seed is None else dataset.entity_tag(query.format)
    pinned = query.model is not None and "@" in query.model
    headers = {
        "X-Images": str(dataset.images),
        "X-Seed": str(dataset.seed),
        "X-Model": dataset.model.identity.decode(),
        "Content-Disposition": f'attachment; filename="{dataset.file_name(query.format)}"',
        "Cache-Control": caching_rule(request.scope, known=tag is not None, pinned=pinned),
    }
    if tag is not None:  # another seed has other bytes
        headers |= {"ETag": tag, "Accept-Ranges": "bytes"}
        if is_known(request.headers.get("if-none-match"), tag):
            return Response(status_code=304, headers=headers)
    asked = _range(request, tag, layout.length)
    start, stop = asked or (0, layout.length)
    headers["Content-Length"] = str(stop - start)
    status = 206 if asked else 200
    if asked:
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{layout.length}"
    media_type = MEDIA_TYPES[query.format]
    if request.method == "HEAD":
        return Response(status_code=status, headers=headers, media_type=media_type)
    download = _Download(generation, request, dataset, layout)
    content = await download.begin(start, stop)
    return _Stream(content, status, headers, media_type)


def _range(request: Request, tag: str | None, length: int) -> tuple[int, int] | None:
    """The bytes start:stop that are asked for; None where all are.

    Several ranges at once, and what is no range, may be ignored (RFC 9110, 14.2).

    Raises:
        Problem: 416, the range begins after the end.
    """
    found = _RANGE.fullmatch(request.headers.get("range", ""))
    condition = request.headers.get("if-range", tag)
    if found is None or tag is None or condition != tag or found.groups() == ("", ""):
        return None
    first, last = found.groups()
    if not first:  # so many at the end
        start, stop = max(0, length - int(last)), length
    else:
        start, stop = int(first), min(length, int(last or length) + 1)
        if last and int(last) < start:
            return None
    if start >= stop:
        problem = Problem(416, "range-not-satisfiable", f"There are {length} bytes.")
        problem.headers["Content-Range"] = f"bytes */{length}"
        raise problem
    return start, stop


class _Download:
    """The bytes of a set for one client, of which a few parts are there at any time."""

    def __init__(
        self, generation: Generation, request: Request, dataset: DataSet, layout: Layout
    ) -> None:
        self._generation, self._scope = generation, request.scope
        self._dataset, self._layout = dataset, layout
        self._client: Client = request.scope.get(CLIENT) or Client()
        at_once = min(_AT_ONCE, burst_limit(request.scope))
        self._blocks = max(1, int(at_once) // dataset.classes)

    async def begin(self, start: int, stop: int) -> AsyncIterator[bytes]:
        """Bytes start:stop, of which the first are drawn before this returns.

        Raises:
            Problem: they could not be drawn.
        """
        parts = self._layout.parts(start, stop, self._blocks)
        first = next(parts)
        order = self._order(first)
        pixels = _NO_PIXELS
        if order is not None:
            consume(self._scope, len(order.labels))
            pixels = (await self._generation.fulfil(order, self._client)).pixels
        return self._stream(_Drawn(first, order, pixels), parts, start, stop)

    async def _stream(
        self, drawn: "_Drawn", parts: Iterator[Part], start: int, stop: int
    ) -> AsyncIterator[bytes]:
        drawing = None
        try:
            while True:
                following = next(parts, None)
                if following is not None:  # drawn while this one is sent
                    drawing = asyncio.ensure_future(self._draw(following))
                content = await self._make(drawn)
                skipped = max(0, start - drawn.part.offset)
                if skipped < len(content):
                    yield content[skipped : stop - drawn.part.offset]
                    if drawn.order is not None:
                        self._generation.count(drawn.order, self._client)
                if following is None or drawing is None:
                    return
                drawn = await drawing
        finally:
            if drawing is not None:
                drawing.cancel()
                with suppress(asyncio.CancelledError, Problem):
                    await drawing

    async def _draw(self, part: Part) -> "_Drawn":
        order = self._order(part)
        if order is None:
            return _Drawn(part, None, _NO_PIXELS)
        await self._insist(lambda: _charge(self._scope, len(order.labels)))
        images: GeneratedImages = await self._insist(
            lambda: self._generation.fulfil(order, self._client)
        )
        return _Drawn(part, order, images.pixels)

    async def _insist(self, attempt: Callable[[], Awaitable[T]]) -> T:
        """Wait where a request that has just begun would be refused: this one is half answered."""
        while True:
            try:
                return await attempt()
            except Problem as problem:
                if problem.status not in (429, 504):
                    raise
                await asyncio.sleep(float(problem.headers.get("Retry-After", "1")))

    def _order(self, part: Part) -> GenerationRequest | None:
        """What has to be drawn for a part."""
        if isinstance(part.piece, Static) or not part.piece.drawn:
            return None
        dataset = self._dataset
        labels = dataset.labels(part.first, part.last)
        seeds = np.full(len(labels), dataset.seed, dtype=np.uint64)
        indices = dataset.indices(part.first, part.last)
        return self._generation.rows(dataset.model, labels, seeds, indices, dataset.truncation)

    async def _make(self, drawn: "_Drawn") -> bytes:
        part, dataset = drawn.part, self._dataset
        if isinstance(part.piece, Static):
            return part.piece.make()
        chunk = Chunk(
            part.first * dataset.classes,
            dataset.labels(part.first, part.last),
            dataset.indices(part.first, part.last),
            drawn.pixels,
        )
        pixels = len(chunk.labels) * math.prod(dataset.model.engine.image_shape)
        content, _ = await self._generation.encode(_join(part.piece.make(chunk)), pixels=pixels)
        return content


class _Drawn(NamedTuple):
    """A part, and what was drawn for it."""

    part: Part
    order: GenerationRequest | None
    pixels: NDArray[np.uint8]


class _Stream(StreamingResponse):
    """An answer that is cut off where it cannot be completed, so that nobody takes it for whole."""

    async def stream_response(self, send: Send) -> None:
        """Send it."""
        try:
            await super().stream_response(send)
        except Problem as problem:
            log.warning("a data set was cut off: %s", problem.detail)


async def _charge(scope: Scope, images: int) -> None:
    consume(scope, images)


def _join(pieces: Iterator[bytes]) -> Steps:
    made = []
    for piece in pieces:
        made.append(piece)
        yield
    return b"".join(made)
