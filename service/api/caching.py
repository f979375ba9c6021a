"""Conditional requests (RFC 9110, 13): what an answer is called, and whether a client has it."""

import hashlib
from typing import Any

from numpy.typing import NDArray
from starlette.types import Scope

from service.generation import GenerationRequest

_YEAR_S = 31_536_000


def entity_tag(order: GenerationRequest, form: str) -> str:
    """A strong ETag: equal for equal bytes, whichever way they were asked for.

    Args:
        order: what is answered.
        form: how, in words.
    """
    digest = hashlib.sha256(order.model.fingerprint)
    arrays: list[NDArray[Any]] = [order.seeds, order.labels, order.indices]
    variation = order.variation
    if variation is not None:
        form += repr((variation.truncation, variation.to_seed))
        arrays += [each for each in (variation.at, variation.mix) if each is not None]
    for array in arrays:
        form += f" {len(array)}"
        digest.update(array.tobytes())
    digest.update(form.encode())
    return f'"{digest.hexdigest()[:32]}"'


def caching_rule(scope: Scope, *, known: bool, pinned: bool) -> str:
    """Who may keep an answer for how long: its Cache-Control.

    Args:
        scope: of the request.
        known: whether the same request has the same answer, as long as the model is the same.
        pinned: whether the request says which file the model is.
    """
    if not known:
        return "no-store"
    if not pinned:
        return "no-cache"
    shared = "private" if "key" in scope["state"] else "public"
    return f"{shared}, max-age={_YEAR_S}, immutable"


def is_known(if_none_match: str | None, tag: str) -> bool:
    """Whether an If-None-Match header names a tag; compared weakly, as RFC 9110 wants it here."""
    if if_none_match is None:
        return False
    named = [each.strip().removeprefix("W/") for each in if_none_match.split(",")]
    return "*" in named or tag in named
