"""The endpoint `/dataset`: whole data sets, streamed."""

import asyncio
import logging
import re
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from random import getrandbits
from typing import Annotated, Any, NamedTuple

from fastapi import Query, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import Field
from starlette.types import Scope, Send

from service.api.caching import cache_control, entity_tag, matches
from service.api.parameters import SamplingFields
from service.api.respond import BINARY, HEADERS, NOT_MODIFIED, Responder
from service.api.routing import Router
from service.disconnect import Disconnected
from service.encoding.datasets import (
    ALL,
    MEDIA_TYPES,
    Batch,
    DatasetFormat,
    GeneratedDataset,
    Shard,
)
from service.encoding.layouts import LAYOUT_VERSION, SegmentRange, lay_out
from service.encoding.timeslice import IncrementalEncoder
from service.errors import GENERATION_ERRORS, Problem, error_responses, invalid_value
from service.generation import Generation
from service.inference.repository import Model
from service.inference.scheduling import GenerationResult
from service.rate_limit import burst_limit

log = logging.getLogger("service")

PATH = "/dataset"
MAX_PER_CLASS = 1_000_000
MAX_DATASET_IMAGES = 10_000_000
_PER_CLASS = f"images of each class; at most {MAX_DATASET_IMAGES} in all"
_FORMAT = (
    "zip: a folder of PNGs for each class; webdataset: a tar of samples; idx: a tar of MNIST's two "
    "files, of grey images; npz: arrays for NumPy"
)
_START = "number of the first image, a multiple of the number of classes; leaves out earlier ones"
_SHARD = "3of8 is the third of eight parts of the set, each a file of its own (default: all in one)"
_SHARD_NAME = re.compile(r"([1-9][0-9]{0,6})of([1-9][0-9]{0,6})")
_MAX_BATCH_IMAGES = 256  # generated at once, unless a single block has more
_RANGE = re.compile(r"bytes=(\d{0,19})-(\d{0,19})")


class DatasetQuery(SamplingFields, extra="forbid"):
    """The parameters of `/dataset`."""

    per_class: int = Field(ge=1, le=MAX_PER_CLASS, description=_PER_CLASS, examples=[1000])
    format: DatasetFormat = Field("zip", description=_FORMAT)
    start: int = Field(0, ge=0, description=_START)
    shard: str | None = Field(
        None,
        description=_SHARD,
        examples=["3of8"],
        json_schema_extra={"pattern": f"^{_SHARD_NAME.pattern}$"},
    )

    def dataset(self, generation: Generation) -> GeneratedDataset:
        """Check the parameters against the models and return the data set.

        Raises:
            Problem: 404 or 422, naming the parameter.
        """
        model = generation.get_or_404(self.model)
        classes = len(model.info.class_names)
        images = self.per_class * classes
        if images > MAX_DATASET_IMAGES:
            message = f"{images} images in all; at most {MAX_DATASET_IMAGES} are allowed"
            raise invalid_value("per_class", self.per_class, message)
        if self.format == "idx":
            _check_idx(model)
        if self.start % classes or self.start >= images:
            message = (
                f"must be a multiple of {classes}, the number of classes, and less than {images}, "
                "the number of images"
            )
            raise invalid_value("start", self.start, message)
        seed = getrandbits(53) if self.seed is None else self.seed
        start = self.start // classes
        shard = self._parse_shard(self.per_class - start)
        return GeneratedDataset(model, seed, start, self.per_class, self.truncation, shard)

    def _parse_shard(self, blocks: int) -> Shard:
        """Return the shard, of at most as many as the set has blocks.

        Raises:
            Problem: 422, the set has no such shard.
        """
        if self.shard is None:
            return ALL
        if self.seed is None:
            message = "needs a seed such as seed=0, as each request without one makes another set"
            raise invalid_value("shard", self.shard, message)
        found = _SHARD_NAME.fullmatch(self.shard)
        if found is not None:
            shard = Shard(*map(int, found.groups()))
            if shard.number <= shard.total <= blocks:
                return shard
        message = (
            "must be NUMBERofSHARDS such as 3of8, where the number is at most that of the shards "
            f"and the shards are at most {blocks}, the number of images of each class"
        )
        raise invalid_value("shard", self.shard, message)


def _check_idx(model: Model) -> None:
    """Check that readers of MNIST can read the images of a model.

    Raises:
        Problem: 422, naming the formats that hold them.
    """
    classes = len(model.info.class_names)
    instead = "take format=npz for arrays or format=zip for files"
    if model.engine.image_shape[2] != 1:
        message = f"holds grey images, and {model.name} makes colour images; {instead}"
        raise invalid_value("format", "idx", message)
    if classes > 256:
        message = f"holds at most 256 classes, and {model.name} has {classes}; {instead}"
        raise invalid_value("format", "idx", message)


_FILE: dict[str, Any] = {
    "content": dict.fromkeys(sorted(set(MEDIA_TYPES.values())), BINARY),
    "headers": {name: HEADERS[name] for name in ("X-Images", "X-Seed", "X-Model")},
}
_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {"description": "The file", **_FILE},
    206: {"description": "The bytes that Range names", **_FILE},
    **NOT_MODIFIED,
    **error_responses(416, *GENERATION_ERRORS),
}


def create_router(responder: Responder) -> Router:
    """Create the routes of this module."""
    router = Router()

    @router.get(
        PATH,
        summary="Download a balanced, labelled data set as a file",
        response_class=Response,
        responses=_RESPONSES,
    )
    async def dataset(request: Request, query: Annotated[DatasetQuery, Query()]) -> Response:
        return await _respond(responder, request, query)

    return router


async def _respond(responder: Responder, request: Request, query: DatasetQuery) -> Response:
    dataset = query.dataset(responder.generation)
    layout = lay_out(dataset, query.format)
    file_tag = _entity_tag(dataset, query.format)
    file_name = dataset.file_name(query.format, file_tag[1:13])
    tag = None if query.seed is None else file_tag  # else the next request draws another seed
    headers = {
        "X-Images": str(dataset.images),
        "X-Seed": str(dataset.seed),
        "X-Model": dataset.model.versioned_name,
        "Content-Disposition": f'attachment; filename="{file_name}"',
        "Cache-Control": cache_control(request.scope, tag, query.model),
    }
    if tag is not None:
        headers |= {"ETag": tag, "Accept-Ranges": "bytes"}
        if matches(request.headers.get("if-none-match"), tag):
            return Response(status_code=304, headers=headers)
    byte_range = _parse_range(request, tag, layout.length)
    start, stop = byte_range or (0, layout.length)
    headers["Content-Length"] = str(stop - start)
    if byte_range:
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{layout.length}"
    status, media_type = 206 if byte_range else 200, MEDIA_TYPES[query.format]
    if request.method == "HEAD":
        return Response(status_code=status, headers=headers, media_type=media_type)
    batch_images = int(min(_MAX_BATCH_IMAGES, burst_limit(request.scope)))
    parts = layout.ranges(start, stop, max(1, batch_images // dataset.classes))
    content = await _Download(responder, request.scope, dataset, parts, start, stop).begin()
    return _CutOffResponse(content, status, headers, media_type)


def _entity_tag(dataset: GeneratedDataset, file_format: DatasetFormat) -> str:
    """Return the ETag of a file; those of the shards of a set begin alike."""
    start, per_class, truncation = dataset.start, dataset.per_class, dataset.truncation
    determining = (file_format, LAYOUT_VERSION, dataset.seed, start, per_class, truncation)
    tag = entity_tag(dataset.model, repr(determining).encode())
    number, shards = dataset.shard
    return tag if shards == 1 else f'{tag[:-1]}-{number}of{shards}"'


def _parse_range(request: Request, tag: str | None, length: int) -> tuple[int, int] | None:
    """Return the requested bytes start:stop; None for all.

    A server may ignore several ranges at once and malformed ones (RFC 9110, section 14.2).

    Raises:
        Problem: 416, the range begins after the last byte.
    """
    found = _RANGE.fullmatch(request.headers.get("range", ""))
    condition = request.headers.get("if-range", tag)
    if found is None or tag is None or condition != tag or found.groups() == ("", ""):
        return None
    first, last = found.groups()
    if not first:  # the last bytes
        start, stop = max(0, length - int(last)), length
    else:
        start, stop = int(first), min(length, int(last or length) + 1)
        if last and int(last) < start:
            return None
    if start >= stop:
        detail = f"The range begins after the last of {length} bytes."
        headers = {"Content-Range": f"bytes */{length}"}
        raise Problem(416, "range-not-satisfiable", detail, headers=headers)
    return start, stop


class _Drawn(NamedTuple):
    """A range of a segment, and the images generated for it, if it needs any."""

    part: SegmentRange
    batch: Batch
    result: GenerationResult | None = None


@dataclass
class _Download:
    """The bytes start:stop of a data set, of which a few ranges are in memory at a time."""

    responder: Responder
    scope: Scope
    dataset: GeneratedDataset
    parts: Iterator[SegmentRange]
    start: int
    stop: int

    async def begin(self) -> AsyncIterator[bytes]:
        """Generate the first images, then return the bytes.

        Raises:
            Problem: the first images cannot be generated.
        """
        return self._stream(await self._draw(next(self.parts), retry=False))

    async def _stream(self, drawn: _Drawn) -> AsyncIterator[bytes]:
        drawing = None
        try:
            while True:
                following = next(self.parts, None)
                if following is not None:  # generated while this range is encoded and sent
                    drawing = asyncio.ensure_future(self._draw(following, retry=True))
                part, content = drawn.part, await self._encode(drawn)
                if self._is_sent(part):
                    yield content[max(0, self.start - part.offset) : self.stop - part.offset]
                if following is None or drawing is None:
                    return
                drawn = await drawing
        finally:
            if drawing is not None:
                drawing.cancel()
                with suppress(asyncio.CancelledError, Disconnected, Problem):
                    await drawing

    def _is_sent(self, part: SegmentRange) -> bool:
        """Return false for a range that is only made for its checksum."""
        return part.offset + part.length > self.start

    async def _draw(self, part: SegmentRange, *, retry: bool) -> _Drawn:
        """Generate the images of a range, with retries once the response has begun."""
        request = self.dataset.request(part.first, part.last)
        batch = Batch(part.first * self.dataset.classes, request)
        if not part.segment.needs_pixels:
            return _Drawn(part, batch)
        if not self._is_sent(part):
            request = replace(request, counted=False)
        result = await self.responder.draw(request, self.scope, retry=retry)
        return _Drawn(part, Batch(batch.first, request, result.pixels), result)

    async def _encode(self, drawn: _Drawn) -> bytes:
        part, batch, result = drawn
        encoder = _join(part.segment.make(batch))
        if result is None:
            return await self.responder.encoder.run(encoder, batch.request.pixels)
        encoded = await self.responder.encode(batch.request, self.scope, result, encoder)
        return encoded.body


class _CutOffResponse(StreamingResponse):
    """A response that ends in a lost connection where it cannot be completed."""

    async def stream_response(self, send: Send) -> None:
        """Send the response."""
        try:
            with suppress(Disconnected):
                await super().stream_response(send)
        except Problem as problem:
            log.warning("a data set was cut off: %s", problem.detail)


def _join(pieces: Iterable[bytes]) -> IncrementalEncoder:
    made = []
    for piece in pieces:
        made.append(piece)
        yield
    return b"".join(made)
