"""Conditional requests (RFC 9110, 13): what an answer is called, and whether a client has it."""

import hashlib
from typing import Any

from numpy.typing import NDArray

from service.generation import Order


def entity_tag(order: Order, form: str) -> str:
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


def is_known(if_none_match: str | None, tag: str) -> bool:
    """Whether an If-None-Match header names a tag; compared weakly, as RFC 9110 wants it here."""
    if if_none_match is None:
        return False
    named = [each.strip().removeprefix("W/") for each in if_none_match.split(",")]
    return "*" in named or tag in named
