"""The images and models endpoints of the OpenAI API: `/v1`."""

import base64
import re
import time
from typing import Annotated, Literal

from fastapi import Depends, Path, Request, Response
from pydantic import BaseModel, Field, Strict

from service.api.bodies import require_json
from service.api.parameters import MAX_SCALE, Seed, Truncation
from service.api.respond import Responder, count_pixels
from service.api.routing import Router
from service.encoding.images import single_pngs
from service.encoding.timeslice import IncrementalEncoder
from service.errors import GENERATION_ERRORS, error_responses, invalid_value
from service.generation import GenerationRequest, ResolvedRequest
from service.inference.repository import Model
from service.inference.scheduling import GenerationResult
from service.settings import MAX_IMAGES

PREFIX = "/v1"
_WORD = re.compile(r"[^\W_]+")


class ImageRequest(BaseModel, extra="forbid"):
    """The body of a request for images."""

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
        description=f"auto, or the model's own size times 1 to {MAX_SCALE}: 28x28, 56x56 and so on",
        examples=["auto"],
    )
    response_format: Literal["b64_json"] | None = Field(
        None, description="PNGs in base64; images are not stored, so URLs are not available"
    )
    user: str | None = Field(None, description="accepted for compatibility and ignored")
    seed: Annotated[Seed, Strict()] = None
    truncation: Truncation | None = None


class ImageData(BaseModel):
    """One image."""

    b64_json: str = Field(description="the PNG in base64")
    revised_prompt: str = Field(description="the class that the prompt names")


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


def _require_json(request: Request) -> None:
    require_json(request.headers, """for example with curl --json '{"prompt": "7"}'""")


def create_router(responder: Responder) -> Router:
    """Create the routes of this module."""
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
        model = generation.get_or_404(body.model)
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
        encoded = await responder.respond(
            resolved,
            request.scope,
            lambda result: _encode(resolved, result, scale),
            pixels=count_pixels(resolved, scale, "size"),
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


def _encode(request: ResolvedRequest, result: GenerationResult, scale: int) -> IncrementalEncoder:
    name = request.model.info.class_names[int(request.labels[0])]
    data = []
    for png in single_pngs(request, result, scale):
        data.append(ImageData(b64_json=base64.b64encode(png).decode(), revised_prompt=name))
        yield
    return ImagesResponse(created=int(time.time()), data=data).model_dump_json().encode()


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
    """Return the factor by which a size enlarges the images of a model.

    Raises:
        Problem: 422, naming the allowed sizes.
    """
    own = model.info.network.image_size
    scales = {f"{own * scale}x{own * scale}": scale for scale in range(1, MAX_SCALE + 1)}
    if size == "auto":
        return 1
    if size in scales:
        return scales[size]
    message = (
        f"must be auto, or {own}x{own} times 1 to {MAX_SCALE}: {own}x{own}, {2 * own}x{2 * own}, "
        f"up to {MAX_SCALE * own}x{MAX_SCALE * own}"
    )
    raise invalid_value("size", size, message)


def _model(model: Model) -> ModelObject:
    return ModelObject(id=model.name, created=int(model.stats.since), owned_by="cgan-service")
