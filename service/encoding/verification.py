"""Whether an image is what it says it is: its recipe, made again."""

import io
import struct
from typing import Annotated, Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from service.encoding.images import encode_sheet
from service.encoding.png import RECIPE_KEYWORD, SIGNATURE, contact_sheet, enlarge
from service.errors import Problem, wrong_value, wrong_values
from service.generation import GeneratedImages, GenerationRequest, weigh
from service.inference.latents import SamplingOptions
from service.inference.repository import Model, ModelRepository
from service.settings import MAX_IMAGES, MAX_PIXELS

T = TypeVar("T")
_MODES = {"L": 1, "RGB": 3}

_Seed = Annotated[int, Field(ge=0, lt=2**64)]
_Index = Annotated[int, Field(ge=0, lt=2**53)]
_Label = Annotated[int, Field(ge=0, lt=2**31)]
_Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
_Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_Several = Field(min_length=1, max_length=MAX_IMAGES)


class Recipe(BaseModel):
    """What one image, or every image of a sheet, was made from; as it stands in a PNG."""

    model_config = ConfigDict(extra="forbid", strict=True)

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
    at: _Share | Annotated[list[_Share], _Several] | None = None
    truncation: float = Field(1.0, gt=0, le=1, allow_inf_nan=False)


class Found(NamedTuple):
    """A PNG that was read: its recipe, its (H, W, C) uint8 pixels, and the file."""

    recipe: Recipe
    pixels: NDArray[np.uint8]
    file: bytes


class VerificationResult(BaseModel):
    """Whether a PNG is what its recipe makes."""

    same_pixels: bool = Field(description="every pixel is what the recipe makes")
    same_file: bool = Field(description="so is every byte of the file")
    detail: str = Field(description="the same in words")
    model: str = Field(description="name@sha256:digest of the model that made it again")
    recipe: dict[str, Any]


def read_png(file: bytes) -> Found:
    """The recipe and the pixels of a PNG.

    Raises:
        Problem: 422, it is no PNG, or has no recipe that is one.
    """
    # Before anything is made of them.
    width, height = struct.unpack(">II", file[16:24].ljust(8, b"\0"))
    if file.startswith(SIGNATURE) and width * height > MAX_PIXELS:
        raise _wrong(f"has {width}x{height} pixels; at most {MAX_PIXELS} in all are allowed")
    try:
        with Image.open(io.BytesIO(file), formats=["PNG"]) as image:
            if image.mode not in _MODES:
                raise _wrong("is neither grey nor RGB, so it is none of ours")
            image.load()
            text = image.info.get(RECIPE_KEYWORD)
            pixels = np.asarray(image).reshape(image.height, image.width, _MODES[image.mode])
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, OverflowError) as error:
        raise _wrong("is no PNG file, or a damaged one") from error
    if not isinstance(text, str):
        raise _wrong(f"has no text chunk named {RECIPE_KEYWORD}")
    try:
        recipe = Recipe.model_validate_json(text)
    except ValidationError as error:
        raise wrong_values(error.errors()) from error
    return Found(recipe, pixels, file)


def repeat(recipe: Recipe, registry: ModelRepository) -> GenerationRequest:
    """The order that a recipe was an answer to.

    Raises:
        Problem: 404, its model is not loaded; 422, it makes no sense.
    """
    for model in registry:
        if model.sha256 == recipe.sha256:
            break
    else:
        known = ", ".join(each.identity.decode() for each in registry)
        message = f"the model that made it is not loaded; loaded are {known}"
        raise wrong_value("sha256", recipe.sha256, message, status=404)
    indices = _one_of("index", recipe.index, recipe.indices)
    count = len(indices)
    variation, labels = _vary(recipe, model, count)
    seeds = np.full(count, recipe.seed, dtype=np.uint64)
    return GenerationRequest(model, seeds, labels, np.array(indices, dtype=np.int64), {}, variation)


def _vary(
    recipe: Recipe, model: Model, count: int
) -> tuple[SamplingOptions | None, NDArray[np.int64]]:
    """The variation of a recipe, and the label (N,) of each of its images."""
    weights = None
    if recipe.mix is not None:
        weights = weigh(model, list(recipe.mix.items()))
        labels = [int(weights.argmax())] * count
    else:
        labels = _one_of("label", recipe.label, recipe.labels)
        classes = len(model.info.class_names)
        if max(labels) >= classes:
            raise wrong_value("label", max(labels), f"must be from 0 to {classes - 1}")
    at = None
    if recipe.to_seed is not None:
        one, several = (None, recipe.at) if isinstance(recipe.at, list) else (recipe.at, None)
        at = np.array(_one_of("at", one, several))
    for name, values in (("label", labels), ("at", at)):
        if values is not None and len(values) != count:
            raise wrong_value(name, len(values), f"there must be one for each of {count} images")
    plain = weights is None and at is None and recipe.truncation == 1.0
    variation = None if plain else SamplingOptions(recipe.truncation, recipe.to_seed, at, weights)
    return variation, np.array(labels, dtype=np.int64)


def _one_of(name: str, one: T | None, several: list[T] | None) -> list[T]:
    if one is not None and several is None:
        return [one]
    if several is not None and one is None:
        return several
    raise wrong_value(name, None, "must be given for one image, or as a list for several")


def compare(found: Found, order: GenerationRequest, images: GeneratedImages) -> VerificationResult:
    """Hold a PNG against the images that its recipe makes now."""
    sheet = contact_sheet(images.pixels)
    scale = max(1, found.pixels.shape[1] // sheet.shape[1])
    made = enlarge(sheet, scale)
    same_size = made.shape == found.pixels.shape
    differing = int((made != found.pixels).any(axis=-1).sum()) if same_size else 0
    same_file = same_size and encode_sheet(order, images, scale) == found.file
    if not same_size:
        detail = f"The recipe makes {_size(made)} pixels, and the file has {_size(found.pixels)}."
    elif differing:
        detail = f"{differing} of {made.shape[0] * made.shape[1]} pixels differ."
    elif same_file:
        detail = "It is the very same file."
    else:
        detail = "Every pixel is the same; the file was written by another encoder."
    return VerificationResult(
        same_pixels=same_size and not differing,
        same_file=same_file,
        detail=detail,
        model=order.model.identity.decode(),
        recipe=found.recipe.model_dump(exclude_none=True, exclude_defaults=True, by_alias=True),
    )


def _size(pixels: NDArray[np.uint8]) -> str:
    return f"{pixels.shape[1]}x{pixels.shape[0]}"


def _wrong(message: str) -> Problem:
    return wrong_value("body", None, message)
