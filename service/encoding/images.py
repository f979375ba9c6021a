"""The forms in which images are answered: what each is called, and how it is made."""

import base64
import io
import json
import zipfile
from collections.abc import Callable, Iterator
from typing import Any, Literal

import mimeparse
import numpy as np
from pydantic import BaseModel, Field

from service.encoding.png import encode_contact_sheet, encode_png, enlarge
from service.errors import wrong_value
from service.generation import GeneratedImages, GenerationRequest, Steps

Format = Literal["png", "zip", "json", "multipart", "npz"]
MEDIA_TYPES: dict[Format, str] = {
    "png": "image/png",
    "zip": "application/zip",
    "json": "application/json",
    "multipart": "multipart/mixed",
    "npz": "application/x-npz",
}
# Ties go to the last one, so that */* means a picture.
_OFFERED = [*reversed(MEDIA_TYPES.values())]
# Nothing in a PNG reads so: text is in one line there, and the rest is compressed.
_BOUNDARY = "cgan-image"
CONTENT_TYPES = {name: media_type.encode() for name, media_type in MEDIA_TYPES.items()}
CONTENT_TYPES["multipart"] += f'; boundary="{_BOUNDARY}"'.encode()


class ImageEntry(BaseModel):
    """One image and what it was made from."""

    label: int | None = Field(description="null for a mixture")
    class_name: str | None
    seed: int
    index: int
    recipe: dict[str, Any] = Field(description="all that it was made from")
    png: str = Field(description="the PNG file, base64")


class ImageList(BaseModel):
    """The answer as JSON."""

    model: str
    sha256: str
    seed: int
    images: list[ImageEntry]


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


def encoder(
    chosen: Format, order: GenerationRequest, images: GeneratedImages, scale: int
) -> Callable[[], bytes] | Steps:
    """What makes the body of an answer, at once or in steps."""
    if chosen == "png":
        return lambda: encode_sheet(order, images, scale)
    if chosen == "npz":
        return lambda: encode_npz(order, images, scale)
    in_steps = {"zip": encode_zip, "json": encode_json, "multipart": encode_multipart}
    return in_steps[chosen](order, images, scale)


def encode_sheet(order: GenerationRequest, images: GeneratedImages, scale: int) -> bytes:
    """One image as itself, several as a contact sheet."""
    if len(order.labels) == 1:
        return next(single_pngs(order, images, scale))
    return encode_contact_sheet(enlarge(images.pixels, scale), order.recipe_of_all())


def encode_zip(order: GenerationRequest, images: GeneratedImages, scale: int) -> Steps:
    """Single PNGs named by label and index, and `manifest.json`; always the same bytes."""
    lines = []
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:  # PNGs are compressed already
        for position, png in enumerate(single_pngs(order, images, scale)):
            name = _file_name(order, position)
            # A line for each; the encoder's own way to indent takes as long as the packing.
            lines.append(json.dumps({"file": name, **order.recipe(position)}))
            archive.writestr(zipfile.ZipInfo(name), png)  # ZipInfo's date is fixed: 1980
            yield
        manifest = ",\n".join(lines)
        archive.writestr(zipfile.ZipInfo("manifest.json"), f'{{"images": [\n{manifest}\n]}}\n')
        yield
    return buffer.getvalue()


def encode_json(order: GenerationRequest, images: GeneratedImages, scale: int) -> Steps:
    """Single PNGs in base64, each with its recipe."""
    entries = []
    for position, png in enumerate(single_pngs(order, images, scale)):
        recipe = order.recipe(position)
        entry = ImageEntry(
            label=recipe.get("label"),
            class_name=recipe.get("class"),
            seed=recipe["seed"],
            index=recipe["index"],
            recipe=recipe,
            png=base64.b64encode(png).decode(),
        )
        entries.append(entry)
        yield
    answer = ImageList(
        model=order.model.name, sha256=order.model.sha256, seed=order.seed, images=entries
    )
    return answer.model_dump_json().encode()


def encode_multipart(order: GenerationRequest, images: GeneratedImages, scale: int) -> Steps:
    """Single PNGs one after the other (RFC 2046, 5.1.3), named as in a zip."""
    parts = []
    for position, png in enumerate(single_pngs(order, images, scale)):
        head = (
            f"--{_BOUNDARY}\r\nContent-Type: image/png\r\nContent-Length: {len(png)}\r\n"
            f'Content-Disposition: attachment; filename="{_file_name(order, position)}"\r\n\r\n'
        )
        parts += [head.encode(), png, b"\r\n"]
        yield
    parts.append(f"--{_BOUNDARY}--\r\n".encode())
    return b"".join(parts)


def encode_npz(order: GenerationRequest, images: GeneratedImages, scale: int) -> bytes:
    """Arrays for NumPy: `images` (N, H, W, C) uint8, and what each was made from.

    `labels`, `seeds` and `indices` are (N,); in place of labels a mixture has `mix`
    (N, num_classes), the share of each class, and a walk has `at` (N,) as well.
    """
    arrays: dict[str, Any] = {
        "images": enlarge(images.pixels, scale),
        "seeds": order.seeds,
        "indices": order.indices,
        "class_names": np.array(order.model.info.class_names),
    }
    variation = order.variation
    if variation is None or variation.mix is None:
        arrays["labels"] = order.labels
    else:
        arrays["mix"] = np.tile(variation.mix / variation.mix.sum(), (len(order.labels), 1))
    if variation is not None and variation.at is not None:
        arrays["at"] = variation.at
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    return buffer.getvalue()


def _file_name(order: GenerationRequest, position: int) -> str:
    """By label and index; an image of a walk, by its place in the answer as well."""
    variation, index = order.variation, order.indices[position]
    if variation is None:
        return f"{order.labels[position]:04d}-{index:04d}.png"
    label = "mix" if variation.mix is not None else f"{order.labels[position]:04d}"
    place = "" if variation.at is None else f"-{position:04d}"
    return f"{label}-{index:04d}{place}.png"


def single_pngs(order: GenerationRequest, images: GeneratedImages, scale: int) -> Iterator[bytes]:
    """The PNG of each image, with its recipe."""
    for position, pixels in enumerate(images.pixels):
        yield encode_png(enlarge(pixels, scale), order.recipe(position))
