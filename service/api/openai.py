"""The images and models endpoints of the OpenAI API: `/v1`."""

import base64
import re
import time
from typing import Annotated, Any, Literal
from urllib.parse import urlencode

from fastapi import Depends, Path, Request, Response
from pydantic import (
    BaseModel,
    Field,
    Strict,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)
from pydantic_core import PydanticCustomError

from service.api import generate as generate_api
from service.api.bodies import require_json
from service.api.parameters import MAX_SCALE, Seed, Truncation
from service.api.respond import Encoded, Responder, count_pixels, image_headers
from service.api.routing import Router
from service.encoding.images import single_pngs
from service.encoding.timeslice import IncrementalEncoder
from service.errors import GENERATION_ERRORS, error_responses, invalid_value
from service.generation import Generation, GenerationRequest, ResolvedRequest
from service.inference.repository import Model
from service.inference.scheduling import GenerationResult
from service.settings import MAX_IMAGES

PREFIX = "/v1"
_WORD = re.compile(r"[^\W_]+")
_SIZE = re.compile(r"([1-9]\d{0,4})x([1-9]\d{0,4})")


def _allowed(message: str) -> WrapValidator:
    """Return a validator that replaces pydantic's message."""

    def check(value: object, validate: ValidatorFunctionWrapHandler) -> Any:
        try:
            return validate(value)
        except ValidationError:
            raise PydanticCustomError("not_allowed", "{message}", {"message": message}) from None

    return WrapValidator(check)


_Background = Annotated[
    Literal["auto", "opaque"] | None,
    _allowed("must be auto or opaque; the images have no transparent pixels"),
]
_OutputFormat = Annotated[
    Literal["png"] | None, _allowed("must be png; other formats are not available")
]
_ResponseFormat = Annotated[
    Literal["b64_json", "url"] | None, _allowed("must be b64_json or url; both if not given")
]
_Stream = Annotated[
    Literal[False] | None, _allowed("must be false; images are sent when all are complete")
]


class ImageRequest(BaseModel):
    """The body of a request for images.

    Other fields of the OpenAI API are ignored, because no value of them changes an image: quality,
    style, moderation, output_compression, user and so on.
    """

    prompt: str = Field(
        max_length=1000,
        description="a label as on /generate, or a phrase with exactly one",
        examples=["a seven"],
    )
    model: str | None = Field(None, description="as on /generate; the default model if not given")
    n: Annotated[int, Field(strict=True, ge=1, le=MAX_IMAGES)] | None = Field(
        None, description="number of images; 1 if not given"
    )
    size: Annotated[str, Field(max_length=20)] | None = Field(
        None,
        description="auto for the model's own size, or WIDTHxHEIGHT: the images have the nearest "
        f"multiple of that size, 1 to {MAX_SCALE} times",
        examples=["auto"],
    )
    response_format: _ResponseFormat = Field(
        None, description="b64_json: PNGs in base64; url: permanent links; both if not given"
    )
    background: _Background = None
    output_format: _OutputFormat = None
    stream: _Stream = None
    seed: Annotated[Seed, Strict()] = None
    truncation: Truncation | None = None


class ImageData(BaseModel):
    """One image."""

    b64_json: str | None = Field(None, description="the PNG in base64")
    url: str | None = Field(None, description="generates the same PNG again, byte by byte")
    revised_prompt: str = Field(description="the class that the prompt names")


class ImagesResponse(BaseModel):
    """The images."""

    created: int = Field(description="seconds since 1970")
    data: list[ImageData]
    size: str = Field(description="WIDTHxHEIGHT of each image")
    output_format: Literal["png"] = "png"
    background: Literal["opaque"] = "opaque"


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


def _require_json(request: Request) -> None:
    require_json(request.headers, """for example with curl --json '{"prompt": "7"}'""")


def create_router(responder: Responder, *, any_model: bool = False) -> Router:
    """Create the routes of this module.

    With `any_model`, the default model stands in for models that are not loaded.
    """
    router = Router(prefix=PREFIX, tags=["OpenAI"])
    generation = responder.generation

    @router.post(
        "/images/generations",
        summary="Generate images of the class that a prompt names",
        response_model=ImagesResponse,
        responses=error_responses(415, *GENERATION_ERRORS, path=PREFIX),
        dependencies=[Depends(_require_json)],
    )
    async def generate(request: Request, body: ImageRequest) -> Response:
        model = _find_model(generation, body.model, any_model)
        scale = _scale(model, body.size or "auto")
        resolved = generation.resolve(
            GenerationRequest(
                labels=[find_class(model, body.prompt)],
                n=body.n or 1,
                seed=body.seed,
                truncation=body.truncation or 1.0,
                model=model.versioned_name,
            )
        )
        pixels = count_pixels(resolved, scale, "size")
        links = body.response_format != "b64_json"
        images = _describe(request, resolved, scale, links=links)
        if body.response_format == "url":  # a link generates its image when it is followed
            return Encoded(_to_json(images), image_headers(resolved)).response("application/json")
        encoded = await responder.respond(
            resolved,
            request.scope,
            lambda result: _encode(images, resolved, result, scale),
            pixels=pixels,
        )
        return encoded.response("application/json")

    @router.get("/models", summary="List the loaded models")
    async def models() -> ModelObjects:
        return ModelObjects(data=[_model(each) for each in generation.repository])

    @router.get(
        "/models/{model}",
        summary="Describe a loaded model",
        responses=error_responses(404, path=PREFIX),
    )
    async def model(model: Annotated[str, Path(description="name of a model")]) -> ModelObject:
        return _model(generation.get_or_404(model))

    return router


def _find_model(generation: Generation, name: str | None, any_model: bool) -> Model:
    """Return the model of a name, or the default one.

    Raises:
        Problem: 404, no such model is loaded, and the default one does not stand in for it.
    """
    if any_model and name and "@" not in name and generation.repository.get(name) is None:
        return generation.repository.default
    return generation.get_or_404(name or None)


def _describe(
    request: Request, resolved: ResolvedRequest, scale: int, *, links: bool
) -> ImagesResponse:
    """Return a response without PNGs; links have the address that the client used."""
    data = []
    for position in range(len(resolved.labels)):
        recipe = resolved.recipe(position)
        query = {"model": resolved.model.versioned_name, "label": recipe["class"]}
        query |= {name: recipe[name] for name in ("seed", "index")}
        query |= {"truncation": recipe.get("truncation", 1), "scale": scale, "format": "png"}
        path = generate_api.PATH.removeprefix("/")
        url = f"{request.base_url}{path}?{urlencode(query, safe='@:')}" if links else None
        data.append(ImageData(url=url, revised_prompt=str(recipe["class"])))
    height, width, _ = resolved.model.engine.image_shape
    size = f"{width * scale}x{height * scale}"
    return ImagesResponse(created=int(time.time()), data=data, size=size)


def _encode(
    images: ImagesResponse, request: ResolvedRequest, result: GenerationResult, scale: int
) -> IncrementalEncoder:
    for image, png in zip(images.data, single_pngs(request, result, scale), strict=True):
        image.b64_json = base64.b64encode(png).decode()
        yield
    return _to_json(images)


def _to_json(images: ImagesResponse) -> bytes:
    return images.model_dump_json(exclude_none=True).encode()


def find_class(model: Model, prompt: str) -> str:
    """Return the name of the class that a prompt names.

    The prompt is a label, or a phrase that contains one: a class name or, if no class has that
    name, an index. Names match in any case and in the plural. A name within a longer matching name
    does not count: "t-shirt" does not match "shirt".

    Raises:
        Problem: 422, the prompt names no class or several.
    """
    classes = model.info.class_names
    exact = model.labels.get(prompt.strip())
    if exact is not None:
        return classes[exact]
    words = _WORD.findall(prompt.casefold())
    spans = [
        (first, first + len(name), label)
        for text, label in model.labels.items()
        if (name := _WORD.findall(text.casefold()))
        for first in range(len(words) - len(name) + 1)
        if _matches(words[first : first + len(name)], name)
    ]
    found = {
        label
        for first, last, label in spans
        if not any(a <= first and last <= b and b - a > last - first for a, b, _ in spans)
    }
    if len(found) == 1:
        return classes[found.pop()]
    if found:
        names = ", ".join(classes[label] for label in sorted(found))
        raise invalid_value("prompt", prompt, f"names several classes ({names}); name one")
    message = f"names no class of {model.name}; name one of {', '.join(classes)}, or its index"
    raise invalid_value("prompt", prompt, message)


def _matches(words: list[str], name: list[str]) -> bool:
    *before, last = name
    return words[:-1] == before and words[-1] in (last, f"{last}s", f"{last}es")


def _scale(model: Model, size: str) -> int:
    """Return the factor, 1 to 16, that enlarges the images of a model to about a size.

    Raises:
        Problem: 422, it is not a size.
    """
    if size == "auto":
        return 1
    height, width, _ = model.engine.image_shape
    found = _SIZE.fullmatch(size)
    if found is None:
        message = (
            f"must be auto, or WIDTHxHEIGHT in pixels; images have {width}x{height} pixels times "
            f"1 to {MAX_SCALE}, whichever is nearest"
        )
        raise invalid_value("size", size, message)
    scale = round(min(int(found[1]) / width, int(found[2]) / height))
    return min(MAX_SCALE, max(1, scale))


def _model(model: Model) -> ModelObject:
    return ModelObject(id=model.name, created=int(model.stats.since), owned_by="cgan-service")
