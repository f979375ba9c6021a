"""The formats of images in a response: names, media types and encoders."""

import base64
import io
import json
import zipfile
from collections.abc import Iterator
from functools import partial
from typing import Any, Literal

import mimeparse
import numpy as np
from pydantic import BaseModel, Field

from service.encoding.png import encode_contact_sheet, encode_png, enlarge
from service.encoding.timeslice import Encoder, IncrementalEncoder
from service.errors import invalid_value
from service.generation import ResolvedRequest
from service.inference.latents import mix_shares
from service.inference.scheduling import GenerationResult

Format = Literal["png", "zip", "json", "multipart", "npz"]
MEDIA_TYPES: dict[Format, str] = {
    "png": "image/png",
    "zip": "application/zip",
    "json": "application/json",
    "multipart": "multipart/mixed",
    "npz": "application/x-npz",
}
# Ties go to the last one: a PNG for */*.
_OFFERED = [*reversed(MEDIA_TYPES.values())]
# It cannot occur in our PNGs: their text is on one line, and the rest is compressed.
_BOUNDARY = "cgan-image"
CONTENT_TYPES = {name: media_type.encode() for name, media_type in MEDIA_TYPES.items()}
CONTENT_TYPES["multipart"] += f'; boundary="{_BOUNDARY}"'.encode()


class ImageEntry(BaseModel):
    """An image and its recipe."""

    label: int | None = Field(description="class index; null for a mixture")
    class_name: str | None
    seed: int
    index: int
    recipe: dict[str, Any] = Field(description="everything that determines the image")
    png: str = Field(description="the PNG file in base64")


class ImageList(BaseModel):
    """Images as JSON."""

    model: str
    sha256: str
    seed: int
    images: list[ImageEntry]


def negotiate(accept: str) -> Format:
    """Return the format that an Accept header prefers (RFC 9110, section 12.5.1).

    Raises:
        Problem: 406, it allows no format, or is malformed.
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
    message = f"allows no available format; available: {', '.join(MEDIA_TYPES.values())}"
    raise invalid_value("Accept", accept, message, status=406, kind="not-acceptable")


def encoder(
    image_format: Format, request: ResolvedRequest, result: GenerationResult, scale: int
) -> Encoder:
    """Return the encoder of the body of a response."""
    if image_format == "png":
        return partial(encode_sheet, request, result, scale)
    if image_format == "npz":
        return partial(encode_npz, request, result, scale)
    incremental = {"zip": encode_zip, "json": encode_json, "multipart": encode_multipart}
    return incremental[image_format](request, result, scale)


def encode_sheet(request: ResolvedRequest, result: GenerationResult, scale: int) -> bytes:
    """Encode one image as a PNG, or several as one contact sheet."""
    if len(request.labels) == 1:
        return next(single_pngs(request, result, scale))
    return encode_contact_sheet(enlarge(result.pixels, scale), request.recipe())


def encode_zip(
    request: ResolvedRequest, result: GenerationResult, scale: int
) -> IncrementalEncoder:
    """Encode single PNGs named by label and index, and `manifest.json`; always the same bytes."""
    lines = []
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:  # PNGs are compressed already
        for position, png in enumerate(single_pngs(request, result, scale)):
            name = _file_name(request, position)
            # One line an image: json's own indentation takes as long as the archive.
            lines.append(json.dumps({"file": name, **request.recipe(position)}))
            archive.writestr(zipfile.ZipInfo(name), png)  # ZipInfo's date is fixed: 1980
            yield
        manifest = ",\n".join(lines)
        archive.writestr(zipfile.ZipInfo("manifest.json"), f'{{"images": [\n{manifest}\n]}}\n')
        yield
    return buffer.getvalue()


def encode_json(
    request: ResolvedRequest, result: GenerationResult, scale: int
) -> IncrementalEncoder:
    """Encode single PNGs in base64, each with its recipe."""
    entries = []
    for position, png in enumerate(single_pngs(request, result, scale)):
        recipe = request.recipe(position)
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
    model = request.model
    images = ImageList(model=model.name, sha256=model.sha256, seed=request.seed, images=entries)
    return images.model_dump_json().encode()


def encode_multipart(
    request: ResolvedRequest, result: GenerationResult, scale: int
) -> IncrementalEncoder:
    """Encode single PNGs one after the other (RFC 2046, section 5.1.3), named as in a zip."""
    parts = []
    for position, png in enumerate(single_pngs(request, result, scale)):
        head = (
            f"--{_BOUNDARY}\r\nContent-Type: image/png\r\nContent-Length: {len(png)}\r\n"
            f'Content-Disposition: attachment; filename="{_file_name(request, position)}"\r\n\r\n'
        )
        parts += [head.encode(), png, b"\r\n"]
        yield
    parts.append(f"--{_BOUNDARY}--\r\n".encode())
    return b"".join(parts)


def encode_npz(request: ResolvedRequest, result: GenerationResult, scale: int) -> bytes:
    """Encode arrays for NumPy: `images` (N, H, W, C) uint8, and what determines each image.

    `labels`, `seeds` and `indices` are (N,). A mixture has `mix` (N, num_classes), the share of
    each class, in place of labels. An interpolation also has `at` (N,).
    """
    arrays: dict[str, Any] = {
        "images": enlarge(result.pixels, scale),
        "seeds": request.seeds,
        "indices": request.indices,
        "class_names": np.array(request.model.info.class_names),
    }
    options = request.options
    if options is None or options.mix is None:
        arrays["labels"] = request.labels
    else:
        arrays["mix"] = np.tile(mix_shares(options.mix), (len(request.labels), 1))
    if options is not None and options.at is not None:
        arrays["at"] = options.at
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    return buffer.getvalue()


def _file_name(request: ResolvedRequest, position: int) -> str:
    """Name a file by label and index; in an interpolation, by the position as well."""
    options, index = request.options, request.indices[position]
    if options is None:
        return f"{request.labels[position]:04d}-{index:04d}.png"
    label = "mix" if options.mix is not None else f"{request.labels[position]:04d}"
    suffix = "" if options.at is None else f"-{position:04d}"
    return f"{label}-{index:04d}{suffix}.png"


def single_pngs(request: ResolvedRequest, result: GenerationResult, scale: int) -> Iterator[bytes]:
    """Yield each image as a PNG with its recipe."""
    for position, pixels in enumerate(result.pixels):
        yield encode_png(enlarge(pixels, scale), request.recipe(position))
