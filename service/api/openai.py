"""The images and models of the OpenAI API, as far as they make sense here: `/v1`."""

import base64
import re
import time
from collections.abc import Iterator
from typing import Annotated, Literal

from fastapi import APIRouter, Path, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from service.api.generate import CLIENT_CLOSED_REQUEST, count_pixels, generation_headers
from service.api.parameters import MAX_SEED
from service.encoding.images import single_pngs
from service.errors import answers, wrong_value
from service.generation import (
    CLIENT,
    Client,
    Disconnected,
    GeneratedImages,
    Generation,
    GenerationRequest,
    Steps,
)
from service.inference.repository import Model
from service.rate_limit import consume
from service.settings import MAX_IMAGES

PREFIX = "/v1"
MAX_SCALE = 16
_WORD = re.compile(r"[^\W_]+")


class ImageRequest(BaseModel):
    """The body of a request for images."""

    model_config = ConfigDict(extra="forbid")

    prompt: str = Field(
        max_length=1000,
        description="a class name or index, or a phrase with exactly one of them",
        examples=["a seven"],
    )
    model: str | None = Field(None, description="as on /generate; the default one if not given")
    n: Annotated[int, Field(strict=True, ge=1, le=MAX_IMAGES)] | None = Field(
        None, description="images; 1 if not given"
    )
    size: Annotated[str, Field(max_length=20)] | None = Field(
        None,
        description=f"auto, or the model's own size times 1 to {MAX_SCALE}: 28x28, 56x56 and so on",
        examples=["auto"],
    )
    response_format: Literal["b64_json"] | None = Field(
        None, description="PNGs in base64; they are kept nowhere, so there are no URLs"
    )
    user: str | None = Field(None, description="for clients that send it; not used")
    seed: Annotated[int, Field(strict=True, ge=0, le=MAX_SEED)] | None = Field(
        None, description="as on /generate, beyond the OpenAI API"
    )
    truncation: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = Field(
        None, description="as on /generate, beyond the OpenAI API"
    )


class ImageData(BaseModel):
    """One image."""

    b64_json: str = Field(description="the PNG in base64")
    revised_prompt: str = Field(description="the class that the prompt was taken for")


class ImagesResponse(BaseModel):
    """The images."""

    created: int = Field(description="seconds since 1970")
    data: list[ImageData]


class ModelObject(BaseModel):
    """A loaded model."""

    id: str
    object: Literal["model"] = "model"
    created: int = Field(description="when it was loaded, in seconds since 1970")
    owned_by: str


class ModelObjects(BaseModel):
    """All loaded models."""

    object: Literal["list"] = "list"
    data: list[ModelObject]


_UNKNOWN = {"404": "Unknown model"}
_PROBLEMS = answers(
    {
        **_UNKNOWN,
        "422": "A wrong value; the error names it and what is allowed",
        "429": "Overloaded, or over the limit of the API key; Retry-After says when to come back",
        "503": "Shutting down, or the device failed",
        "504": "The images took longer than the service allows",
    },
    PREFIX,
)


def create_router(generation: Generation) -> APIRouter:
    """The routes of this module."""
    router = APIRouter(prefix=PREFIX, tags=["OpenAI"])

    @router.post(
        "/images/generations",
        summary="Generate images of the class that a prompt names",
        response_model=ImagesResponse,
        responses=_PROBLEMS,
    )
    async def generate(request: Request, asked: ImageRequest) -> Response:
        try:
            return await _generate(generation, request, asked)
        except Disconnected:
            return Response(status_code=CLIENT_CLOSED_REQUEST)

    @router.get("/models", summary="The loaded models")
    async def models() -> ModelObjects:
        return ModelObjects(data=[_model(each) for each in generation.registry])

    @router.get("/models/{model}", summary="A loaded model", responses=answers(_UNKNOWN, PREFIX))
    async def model(model: Annotated[str, Path(description="name of a model")]) -> ModelObject:
        return _model(generation.find(model))

    return router


async def _generate(generation: Generation, request: Request, asked: ImageRequest) -> Response:
    model = generation.find(asked.model)
    label = find_class(model, asked.prompt)
    scale = _scale(model, asked.size or "auto")
    order = generation.order(
        labels=[label],
        n=asked.n or 1,
        seed=asked.seed,
        truncation=asked.truncation or 1.0,
        model=model.identity.decode(),
    )
    pixels = count_pixels(order, scale, "size")
    consume(request.scope, len(order.labels))
    client: Client = request.scope.get(CLIENT) or Client()
    images = await generation.fulfil(order, client)
    body, encode_s = await generation.encode(_encode(order, images, scale), pixels=pixels)
    generation.count(order, client)
    answer = Response(body, media_type="application/json")
    answer.raw_headers += generation_headers(order, images, encode_s)
    return answer


def _encode(order: GenerationRequest, images: GeneratedImages, scale: int) -> Steps:
    name = order.model.info.class_names[int(order.labels[0])]
    data = []
    for png in single_pngs(order, images, scale):
        data.append(ImageData(b64_json=base64.b64encode(png).decode(), revised_prompt=name))
        yield
    return ImagesResponse(created=int(time.time()), data=data).model_dump_json().encode()


def find_class(model: Model, prompt: str) -> int:
    """The index of the class that a prompt names.

    A phrase may name it by its name in any case, also in the plural, or by its index. A name within
    a longer one that is there does not count: a t-shirt is no shirt.

    Raises:
        Problem: 422, it names none or several.
    """
    exact = model.labels.get(prompt.strip())
    if exact is not None:
        return exact
    words = _WORD.findall(prompt.casefold())
    spans = [
        (first, first + len(name), label)
        for label, name in _names(model)
        for first in range(len(words) - len(name) + 1)
        if _matches(words[first : first + len(name)], name)
    ]
    found = {
        label
        for first, last, label in spans
        if not any(a <= first and last <= b and b - a > last - first for a, b, _ in spans)
    }
    if len(found) == 1:
        return found.pop()
    classes = model.info.class_names
    if found:
        names = ", ".join(classes[label] for label in sorted(found))
        raise wrong_value("prompt", prompt, f"names several classes: {names}; one is allowed")
    known = ", ".join(classes)
    raise wrong_value(
        "prompt",
        prompt,
        f"names no class of {model.name}; allowed is one of: {known}, or its index",
    )


def _names(model: Model) -> Iterator[tuple[int, list[str]]]:
    """Each class, by its index and by its name, and the words of that."""
    for text, label in model.labels.items():
        if words := _WORD.findall(text.casefold()):
            yield label, words


def _matches(words: list[str], name: list[str]) -> bool:
    *before, last = name
    return words[:-1] == before and words[-1] in (last, f"{last}s", f"{last}es")


def _scale(model: Model, size: str) -> int:
    """By how much images are to be enlarged.

    Raises:
        Problem: 422, naming the sizes that there are.
    """
    own = model.info.network.image_size
    if size == "auto":
        return 1
    for scale in range(1, MAX_SCALE + 1):
        if size == f"{own * scale}x{own * scale}":
            return scale
    message = (
        f"must be auto, or {own}x{own} times 1 to {MAX_SCALE}: {own}x{own}, {2 * own}x{2 * own}, "
        f"up to {MAX_SCALE * own}x{MAX_SCALE * own}"
    )
    raise wrong_value("size", size, message)


def _model(model: Model) -> ModelObject:
    return ModelObject(id=model.name, created=int(model.tally.since), owned_by="cgan-service")
