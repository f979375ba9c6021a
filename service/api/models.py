"""The endpoints `/models` and `/verify`."""

from dataclasses import asdict
from typing import Any

from fastapi import Request, Response
from pydantic import BaseModel, Field, ValidationError
from starlette.concurrency import run_in_threadpool

from service.api.bodies import refuse_forms
from service.api.respond import BINARY, Responder
from service.api.routing import Router
from service.encoding.verification import (
    VerificationResult,
    compare,
    read_png,
    request_from_recipe,
)
from service.errors import GENERATION_ERRORS, error_responses
from service.inference.repository import Model


class QuickMetrics(BaseModel):
    """Metrics of few images, compared with training images; less exact than a certificate."""

    gan_test: float = Field(
        description="share of generated images that a classifier of real images gives their label"
    )
    coverage: float = Field(
        description="share of training images with a generated image as a near neighbour"
    )
    frechet_distance: float
    images: int = Field(description="generated images that were measured")


class ModelEntry(BaseModel):
    """A loaded model."""

    name: str
    default: bool
    sha256: str = Field(description="digest of the artifact's file; the model's identity")
    classes: list[str] = Field(description="class names, in the order of their indices")
    ambiguous_labels: list[str] = Field(
        description="names of classes that are also the index of another class; as labels they "
        "stand for the class of that name"
    )
    image_size: int = Field(description="height and width in pixels")
    channels: int
    device: str
    dtype: str
    images_seen: int = Field(description="real images shown during training")
    source_commit: str | None
    network: dict[str, Any]
    training: dict[str, Any]
    certificate: dict[str, Any] | None = Field(
        description="evaluation report, stored inside the artifact"
    )
    quick_metrics: QuickMetrics | None = Field(
        description="estimate made during training; not a certificate"
    )


class LoadErrorEntry(BaseModel):
    """A file that cannot be served."""

    file: str
    error: str


class RefusedFile(BaseModel):
    """The former form of `LoadErrorEntry`."""

    file: str
    cause: str


class ModelList(BaseModel):
    """All loaded models."""

    models: list[ModelEntry]
    load_errors: list[LoadErrorEntry] = Field(
        description="files that cannot be served; a model of that name, if listed, was loaded from "
        "an earlier file"
    )
    refused: list[RefusedFile] = Field(
        deprecated="use load_errors; to be removed in the next release"
    )


def create_router(responder: Responder) -> Router:
    """Create the routes of this module."""
    router = Router()
    repository = responder.generation.repository

    @router.post(
        "/verify",
        summary="Generate the images of a PNG's recipe again and compare them",
        openapi_extra={
            "requestBody": {
                "required": True,
                "content": {"image/png": BINARY},
            }
        },
        response_model=VerificationResult,
        responses=error_responses(415, *GENERATION_ERRORS),
    )
    async def verify(request: Request) -> Response:
        remedy = "send the PNG as the body: curl --data-binary @FILE.png"
        refuse_forms(request.headers, remedy, "image/png")
        # On another thread: a small file may hold a large picture.
        png = await run_in_threadpool(read_png, await request.body())
        resolved = request_from_recipe(png.recipe, repository)
        encoded = await responder.respond(
            resolved,
            request.scope,
            lambda result: lambda: compare(png, resolved, result).model_dump_json().encode(),
            pixels=png.pixels.size,
        )
        return Response(encoded.body, media_type="application/json")

    @router.get("/models", summary="List the loaded models")
    async def models() -> ModelList:
        errors = {path.name: cause for path, cause in repository.load_errors.items()}
        return ModelList(
            models=[_entry(each, each is repository.default) for each in repository],
            load_errors=[LoadErrorEntry(file=file, error=text) for file, text in errors.items()],
            refused=[RefusedFile(file=file, cause=text) for file, text in errors.items()],
        )

    return router


def _entry(model: Model, default: bool) -> ModelEntry:
    info, engine = model.info, model.engine
    return ModelEntry(
        name=model.name,
        default=default,
        sha256=model.sha256,
        classes=list(info.class_names),
        ambiguous_labels=model.ambiguous_labels,
        image_size=info.network.image_size,
        channels=info.network.channels,
        device=engine.device,
        dtype=engine.dtype,
        images_seen=info.images_seen,
        source_commit=info.source_commit,
        network=asdict(info.network),
        training=info.training,
        certificate=info.certificate,
        quick_metrics=_quick_metrics(info.training),
    )


def _quick_metrics(training: dict[str, Any]) -> QuickMetrics | None:
    try:
        return QuickMetrics.model_validate(training.get("quick_metrics"))
    except ValidationError:
        return None  # earlier releases did not record them
