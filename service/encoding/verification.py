"""Verification of a PNG: its recipe is executed again and the images are compared."""

import io
import struct
from typing import Annotated, Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from pydantic import BaseModel, Field, ValidationError

from service.encoding.images import encode_sheet
from service.encoding.png import RECIPE_KEYWORD, SIGNATURE, contact_sheet, enlarge
from service.errors import Problem, invalid_value, invalid_values
from service.generation import ResolvedRequest, mix_weights
from service.inference.latents import SamplingOptions
from service.inference.repository import Model, ModelRepository
from service.inference.scheduling import GenerationResult
from service.settings import MAX_IMAGES, MAX_PIXELS

T = TypeVar("T")
_MODES = {"L": 1, "RGB": 3}

_Seed = Annotated[int, Field(ge=0, lt=2**64)]
_Index = Annotated[int, Field(ge=0, lt=2**53)]
_Label = Annotated[int, Field(ge=0, lt=2**31)]
_At = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
_Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_Several = Field(min_length=1, max_length=MAX_IMAGES)


class Recipe(BaseModel, extra="forbid", strict=True):
    """The recipe of an image, or of all images of a contact sheet, as stored in a PNG."""

    model: str
    sha256: str
    label: _Label | None = None
    labels: Annotated[list[_Label], _Several] | None = None
    class_name: str | None = Field(None, alias="class")
    mix: Annotated[dict[str, _Weight], Field(min_length=1)] | None = None
    seed: _Seed
    index: _Index | None = None
    indices: Annotated[list[_Index], _Several] | None = None
    to_seed: _Seed | None = None
    at: _At | Annotated[list[_At], _Several] | None = None
    truncation: float = Field(1.0, gt=0, le=1, allow_inf_nan=False)


class ParsedPNG(NamedTuple):
    """The recipe of a PNG, its pixels (H, W, C) uint8, and the file."""

    recipe: Recipe
    pixels: NDArray[np.uint8]
    file: bytes


class VerificationResult(BaseModel):
    """The result of a verification."""

    same_pixels: bool = Field(description="the recipe gives exactly these pixels")
    same_file: bool = Field(description="it also gives exactly these bytes")
    detail: str = Field(description="the result in words")
    model: str = Field(description="name@sha256:digest of the model that was used")
    recipe: dict[str, Any]


def read_png(file: bytes) -> ParsedPNG:
    """Parse a PNG with a recipe.

    Raises:
        Problem: 422, it is not a PNG, or has no valid recipe.
    """
    # Checked before memory for the pixels is allocated.
    width, height = struct.unpack(">II", file[16:24].ljust(8, b"\0"))
    if file.startswith(SIGNATURE) and width * height > MAX_PIXELS:
        raise _invalid(f"has {width}x{height} pixels; at most {MAX_PIXELS} in all are allowed")
    try:
        with Image.open(io.BytesIO(file), formats=["PNG"]) as image:
            if image.mode not in _MODES:
                raise _invalid("must be grey or RGB, like every image of this service")
            image.load()
            text = image.info.get(RECIPE_KEYWORD)
            pixels = np.asarray(image).reshape(image.height, image.width, _MODES[image.mode])
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, OverflowError) as error:
        raise _invalid("is not a PNG file, or a damaged one") from error
    if not isinstance(text, str):
        raise _invalid(f"has no text chunk named {RECIPE_KEYWORD}")
    try:
        recipe = Recipe.model_validate_json(text)
    except ValidationError as error:
        raise invalid_values(error.errors()) from error
    return ParsedPNG(recipe, pixels, file)


def request_from_recipe(recipe: Recipe, repository: ModelRepository) -> ResolvedRequest:
    """Return the request whose response has a recipe.

    Raises:
        Problem: 404, its model is not loaded; 422, the recipe is invalid.
    """
    model = next((each for each in repository if each.sha256 == recipe.sha256), None)
    if model is None:
        loaded = ", ".join(each.versioned_name for each in repository)
        message = f"is the digest of a model that is not loaded; loaded: {loaded}"
        raise invalid_value("sha256", recipe.sha256, message, status=404)
    indices = _one_of("index", recipe.index, recipe.indices)
    count = len(indices)
    options, labels = _sampling_options(recipe, model, count)
    seeds = np.full(count, recipe.seed, dtype=np.uint64)
    rows = np.array(indices, dtype=np.int64)
    return ResolvedRequest(model, seeds, labels, rows, options, counted=False)


def _sampling_options(
    recipe: Recipe, model: Model, count: int
) -> tuple[SamplingOptions | None, NDArray[np.int64]]:
    """Return the options of a recipe, and the label (N,) of each of its images."""
    weights = None
    if recipe.mix is not None:
        weights = mix_weights(model, list(recipe.mix.items()))
        labels = [int(weights.argmax())] * count
    else:
        labels = _one_of("label", recipe.label, recipe.labels)
        classes = len(model.info.class_names)
        if max(labels) >= classes:
            raise invalid_value("label", max(labels), f"must be from 0 to {classes - 1}")
    at = None
    if recipe.to_seed is not None:
        one, several = (None, recipe.at) if isinstance(recipe.at, list) else (recipe.at, None)
        at = np.array(_one_of("at", one, several))
    for name, values in (("label", labels), ("at", at)):
        if values is not None and len(values) != count:
            message = f"must have one value for each of {count} images"
            raise invalid_value(name, len(values), message)
    plain = weights is None and at is None and recipe.truncation == 1.0
    options = None if plain else SamplingOptions(recipe.truncation, recipe.to_seed, at, weights)
    return options, np.array(labels, dtype=np.int64)


def _one_of(name: str, one: T | None, several: list[T] | None) -> list[T]:
    if one is not None and several is None:
        return [one]
    if several is not None and one is None:
        return several
    raise invalid_value(name, None, "must be given once, or as a list for several images")


def compare(
    png: ParsedPNG, request: ResolvedRequest, result: GenerationResult
) -> VerificationResult:
    """Compare a PNG with the images of its recipe."""
    sheet = contact_sheet(result.pixels)
    scale = max(1, png.pixels.shape[1] // sheet.shape[1])
    height, width = scale * sheet.shape[0], scale * sheet.shape[1]
    same_pixels = same_file = False
    if (height, width, sheet.shape[2]) != png.pixels.shape:
        # The images are not enlarged: a file of another shape could ask for more than any memory.
        size = f"{png.pixels.shape[1]}x{png.pixels.shape[0]}"
        detail = f"The recipe gives {width}x{height} pixels; the file has {size}."
    elif differing := int((enlarge(sheet, scale) != png.pixels).any(axis=-1).sum()):
        engine = request.model.engine
        device = f"computed in {engine.dtype} on {engine.device}"
        detail = f"{differing} of {width * height} pixels differ ({device})."
    else:
        same_pixels, same_file = True, encode_sheet(request, result, scale) == png.file
        other = "All pixels are identical; another encoder wrote the file."
        detail = "The file is identical." if same_file else other
    return VerificationResult(
        same_pixels=same_pixels,
        same_file=same_file,
        detail=detail,
        model=request.model.versioned_name,
        recipe=png.recipe.model_dump(exclude_none=True, exclude_defaults=True, by_alias=True),
    )


def _invalid(message: str) -> Problem:
    return invalid_value("body", None, message)
