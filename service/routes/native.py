"""The front door: `POST /generate` and the list of models."""

import base64
import io
import json
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Annotated, Any, Literal
from urllib.parse import parse_qsl

import mimeparse
from fastapi import APIRouter, Query, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.types import Receive, Scope, Send

from service.access import charge
from service.generation import CLIENT, Client, Disconnected, Generation, Images, Order, Steps
from service.png import contact_sheet, encode_png, enlarge
from service.problems import MEDIA_TYPE as PROBLEM_TYPE
from service.problems import Problem, answer, schema, wrong_value, wrong_values
from service.registry import Model
from service.settings import MAX_IMAGES, MAX_TIMEOUT_MS

RawHeaders = list[tuple[bytes, bytes]]
Format = Literal["png", "zip", "json"]
MEDIA_TYPES: dict[Format, str] = {
    "png": "image/png",
    "zip": "application/zip",
    "json": "application/json",
}
# Ties go to the last one, so that */* means a picture.
_OFFERED = ["application/json", "application/zip", "image/png"]
MAX_SEED = 2**64 - 1
MAX_PIXELS = 1 << 24  # of one answer, enlargement included
CLIENT_GONE = 499  # nobody reads this answer; the log and the metrics do


class GenerateQuery(BaseModel):
    """The parameters of `POST /generate`."""

    model_config = ConfigDict(extra="forbid")

    label: list[str] = Field(
        min_length=1,
        max_length=MAX_IMAGES,
        examples=[["7"]],
        description="class index or class name; may repeat",
    )
    n: int = Field(
        1, ge=1, le=MAX_IMAGES, description=f"images of each label; at most {MAX_IMAGES} in all"
    )
    seed: int | None = Field(
        None,
        ge=0,
        le=MAX_SEED,
        description="the same seed gives the same images; drawn where none is given",
    )
    model: str | None = Field(None, description="name of a model; the default one if not given")
    format: Format | None = Field(None, description="goes before the Accept header")
    scale: int = Field(1, ge=1, le=16, description="enlarge by whole pixels")
    timeout_ms: int | None = Field(
        None,
        ge=1,
        le=MAX_TIMEOUT_MS,
        description="milliseconds until the images are of no use; what cannot be made by then is "
        "refused, and the service may allow less",
    )


# Whichever way a value is wrong, the error says what is allowed.
_ALLOWED = {
    "label": f"must be given once to {MAX_IMAGES} times, each a class index or a class name",
    "n": f"must be an integer from 1 to {MAX_IMAGES}",
    "seed": f"must be an integer from 0 to {MAX_SEED}",
    "format": f"must be one of {', '.join(MEDIA_TYPES)}",
    "scale": "must be an integer from 1 to 16",
    "timeout_ms": f"must be an integer from 1 to {MAX_TIMEOUT_MS}",
}


def parse_query(query: bytes) -> GenerateQuery:
    """The parameters in a query string.

    Raises:
        Problem: 422, naming every wrong value and what is allowed.
    """
    values: dict[str, str | list[str]] = {}
    labels: list[str] = []
    for name, value in parse_qsl(query.decode("latin-1"), keep_blank_values=True):
        if name == "label":
            labels.append(value)
        else:
            values[name] = value
    if labels:
        values["label"] = labels
    try:
        return GenerateQuery.model_validate(values)
    except ValidationError as error:
        raise wrong_values(error.errors(), _ALLOWED) from error


class ImageEntry(BaseModel):
    """One image and what it was made from."""

    label: int
    class_name: str
    seed: int
    index: int
    png: str = Field(description="the PNG file, base64")


class GeneratedImages(BaseModel):
    """The answer as JSON."""

    model: str
    sha256: str
    seed: int
    images: list[ImageEntry]


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


_PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {
        "description": words,
        "content": {PROBLEM_TYPE: {"schema": schema()}},
    }
    for status, words in {
        401: "No API key, or a wrong one, where the service has any",
        404: "Unknown model",
        406: "No format that the Accept header allows",
        422: "A wrong value; the body names the field and what is allowed",
        429: "Overloaded, or over the limit of the API key; Retry-After says when to come back",
        503: "Shutting down, or the device failed",
        504: "The images took longer than the service allows",
    }.items()
}
_IMAGES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "One image, or a contact sheet of several; or the single images.",
        "model": GeneratedImages,
        "content": {
            "image/png": {"schema": {"type": "string", "format": "binary"}},
            "application/zip": {"schema": {"type": "string", "format": "binary"}},
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


class FrontDoor:
    """`POST /generate`, as an ASGI application.

    A framework's way from a request to a function and back takes longer than all that is left to do
    here, for one small image.
    """

    path = "/generate"

    def __init__(self, generation: Generation) -> None:
        self._generation = generation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        scope["route"] = self  # its path is what metrics and the log go by
        try:
            headers, body = await self._generate(scope)
        except Problem as problem:
            await answer(problem, scope, send)
            return
        except Disconnected:
            await Response(status_code=CLIENT_GONE)(scope, receive, send)
            return
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _generate(self, scope: Scope) -> tuple[RawHeaders, bytes]:
        generation = self._generation
        accept = _read_headers(scope["headers"])
        query = parse_query(scope["query_string"])
        chosen = query.format or negotiate(accept)
        order = generation.order(labels=query.label, n=query.n, seed=query.seed, model=query.model)
        pixels = _count_pixels(order, query.scale)
        charge(scope, len(order.labels))
        client: Client = scope.get(CLIENT) or Client()
        timeout_s = None if query.timeout_ms is None else query.timeout_ms / 1e3
        images = await generation.fulfil(order, client, timeout_s)
        body, encode_s = await generation.encode(
            _encoder(chosen, order, images, query.scale), pixels=pixels
        )
        generation.count(order, client)
        return _headers(chosen, order, images, encode_s, len(body)), body


def front_door_schema() -> APIRoute:
    """What `FrontDoor` takes and gives, for the schema; nothing is ever routed to it."""

    def generate(query: Annotated[GenerateQuery, Query()]) -> None:
        raise AssertionError(query)

    return APIRoute(
        FrontDoor.path,
        generate,
        methods=["POST"],
        response_class=Response,
        responses=_IMAGES | _PROBLEMS,
        summary="Generate images of the requested classes",
    )


def create_router(generation: Generation) -> APIRouter:
    """The routes of this module."""
    router = APIRouter()

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


def negotiate(accept: str | None) -> Format:
    """The format that an Accept header prefers (RFC 9110, 12.5.1); a picture where there is none.

    Raises:
        Problem: 406, nothing on offer matches or the header makes no sense.
    """
    if not accept or accept == "*/*":
        return "png"
    try:
        best = mimeparse.best_match(_OFFERED, accept)
    except (mimeparse.MimeTypeParseException, ValueError):
        best = ""
    for name, media_type in MEDIA_TYPES.items():
        if media_type == best:
            return name
    offered = ", ".join(MEDIA_TYPES.values())
    problem = wrong_value("Accept", accept, f"nothing matches; on offer are {offered}", status=406)
    problem.kind = "not-acceptable"
    raise problem


def _read_headers(headers: RawHeaders) -> str | None:
    """The Accept header.

    Raises:
        Problem: 422, there is a body.
    """
    accept = None
    for name, value in headers:
        if name == b"accept":
            more = value.decode("latin-1")
            accept = more if accept is None else f"{accept}, {more}"  # lines of one list
        elif (name == b"content-length" and value != b"0") or name == b"transfer-encoding":
            message = "no body is allowed; the parameters go into the query string"
            raise wrong_value("body", (b"%b: %b" % (name, value)).decode("latin-1"), message)
    return accept


def _count_pixels(order: Order, scale: int) -> int:
    """All pixels of an answer.

    Raises:
        Problem: 422, they are too many.
    """
    height, width, _ = order.model.engine.image_shape
    pixels: int = len(order.labels) * height * width * scale**2
    if pixels > MAX_PIXELS:
        message = f"{pixels} pixels in all; at most {MAX_PIXELS} are allowed"
        raise wrong_value("scale", scale, message)
    return pixels


def _headers(
    chosen: Format, order: Order, images: Images, encode_s: float, length: int
) -> RawHeaders:
    timing = (
        f"queue;dur={1e3 * images.queue_s:.3f}, forward;dur={1e3 * images.forward_s:.3f}, "
        f"encode;dur={1e3 * encode_s:.3f}"
    )
    return [
        (b"content-type", MEDIA_TYPES[chosen].encode()),
        (b"content-length", b"%d" % length),
        (b"x-seed", b"%d" % order.seed),
        (b"x-model", order.model.identity),
        (b"server-timing", timing.encode()),
    ]


def _encoder(
    chosen: Format, order: Order, images: Images, scale: int
) -> Callable[[], bytes] | Steps:
    if chosen == "png":
        return lambda: encode_sheet(order, images, scale)
    return (encode_zip if chosen == "zip" else encode_json)(order, images, scale)


def encode_sheet(order: Order, images: Images, scale: int) -> bytes:
    """One image as itself, several as a contact sheet."""
    if len(order.labels) == 1:
        return next(_single_pngs(order, images, scale))
    recipe = {
        "model": order.model.name,
        "sha256": order.model.sha256,
        "labels": order.labels.tolist(),
        "seed": order.seed,
        "indices": order.indices.tolist(),
    }
    return encode_png(enlarge(contact_sheet(images.pixels), scale), recipe)


def encode_zip(order: Order, images: Images, scale: int) -> Steps:
    """Single PNGs named by label and index, and `manifest.json`; always the same bytes."""
    lines = []
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:  # PNGs are compressed already
        for position, png in enumerate(_single_pngs(order, images, scale)):
            recipe = order.recipe(position)
            name = f"{recipe['label']:04d}-{recipe['index']:04d}.png"
            # A line for each; the encoder's own way to indent takes as long as the packing.
            lines.append(json.dumps({"file": name, **recipe}))
            archive.writestr(zipfile.ZipInfo(name), png)  # ZipInfo's date is fixed: 1980
            yield
        manifest = ",\n".join(lines)
        archive.writestr(zipfile.ZipInfo("manifest.json"), f'{{"images": [\n{manifest}\n]}}\n')
        yield
    return buffer.getvalue()


def encode_json(order: Order, images: Images, scale: int) -> Steps:
    """Single PNGs in base64, each with its recipe."""
    names = order.model.info.class_names
    entries = []
    for label, index, png in zip(
        order.labels, order.indices, _single_pngs(order, images, scale), strict=True
    ):
        entry = ImageEntry(
            label=int(label),
            class_name=names[label],
            seed=order.seed,
            index=int(index),
            png=base64.b64encode(png).decode(),
        )
        entries.append(entry)
        yield
    answer = GeneratedImages(
        model=order.model.name, sha256=order.model.sha256, seed=order.seed, images=entries
    )
    return answer.model_dump_json().encode()


def _single_pngs(order: Order, images: Images, scale: int) -> Iterator[bytes]:
    for position, pixels in enumerate(images.pixels):
        yield encode_png(enlarge(pixels, scale), order.recipe(position))


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
