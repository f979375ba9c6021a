"""Conditional requests (RFC 9110, section 13) and Cache-Control."""

import hashlib
from typing import Any
from weakref import WeakKeyDictionary

from numpy.typing import NDArray
from starlette.types import Scope

from service.encoding.png import ENCODER_VERSION, encode_contact_sheet
from service.generation import ResolvedRequest
from service.inference.engine import Engine
from service.inference.repository import Model

_YEAR_S = 31_536_000
_fingerprints: WeakKeyDictionary[Engine, bytes] = WeakKeyDictionary()


def _fingerprint(model: Model) -> bytes:
    """Return a digest of the model's reference images as a file.

    The artifact alone does not determine the bytes of a response: another kind of device rounds
    differently, and another version of the encoder compresses differently.
    """
    known = _fingerprints.get(model.engine)
    if known is None:
        determining = {"sha256": model.sha256, "encoder": ENCODER_VERSION}
        sheet = encode_contact_sheet(model.engine.reference.pixels, determining)
        known = _fingerprints[model.engine] = hashlib.sha256(sheet).digest()
    return known


def entity_tag(model: Model, *parts: bytes) -> str:
    """Return a strong ETag of what a model and some parts of a request determine."""
    digest = hashlib.sha256(_fingerprint(model))
    for part in parts:
        digest.update(part)
    return f'"{digest.hexdigest()[:32]}"'


def request_tag(request: ResolvedRequest, description: str) -> str:
    """Return the ETag of the images of a request, encoded as described."""
    arrays: list[NDArray[Any]] = [request.seeds, request.labels, request.indices]
    options = request.options
    if options is not None:
        description += repr((options.truncation, options.to_seed))
        arrays += [each for each in (options.at, options.mix) if each is not None]
    description += "".join(f" {len(array)}" for array in arrays)
    return entity_tag(request.model, *(array.tobytes() for array in arrays), description.encode())


def cache_control(scope: Scope, tag: str | None, model: str | None) -> str:
    """Return the Cache-Control of a response.

    Without a tag, the response cannot be repeated. The parameter `model` may pin a file.
    """
    if tag is None:
        return "no-store"
    if model is None or "@" not in model:
        return "no-cache"
    visibility = "private" if "key" in scope["state"] else "public"
    return f"{visibility}, max-age={_YEAR_S}, immutable"


def matches(if_none_match: str | None, tag: str) -> bool:
    """Return true if an If-None-Match header names a tag (weak comparison, RFC 9110)."""
    if if_none_match is None:
        return False
    named = [each.strip().removeprefix("W/") for each in if_none_match.split(",")]
    return "*" in named or tag in named
