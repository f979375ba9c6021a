"""API keys as they are given: `name:secret`, or `name:secret:images a second`.

Only the digest of a secret is kept, and no error repeats one.
"""

import hashlib
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

MIN_LENGTH = 16  # characters of a secret

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_SECRET = re.compile(r"[A-Za-z0-9._~+/-]+=*")  # what a bearer token may be made of (RFC 6750, 2.1)
_FORM = "must be name:secret or name:secret:images-per-second"


@dataclass(frozen=True, slots=True)
class Key:
    """Who may ask.

    Attributes:
        name: for the log, and never secret.
        digest: SHA-256 of the secret.
        images_per_second: in place of the limit that every key has; None for that limit.
    """

    name: str
    digest: bytes = field(repr=False)
    images_per_second: float | None = None


def parse_keys(text: object) -> tuple[Key, ...]:
    """Keys with commas between them.

    Raises:
        ValueError: there is none, or one is wrong; says which by number and not by content.
    """
    parts = text.split(",") if isinstance(text, str) and text.strip() else []
    return _parse("key", enumerate(parts, start=1))


def read_keys(path: object) -> tuple[Key, ...]:
    """The keys of a file, one a line; empty lines and those that begin with # are skipped.

    Raises:
        ValueError: it cannot be read or holds none, or a line is wrong; says which by number.
    """
    try:
        # What is no UTF-8 is no key either, and is refused with its line.
        text = Path(str(path)).read_text(encoding="utf-8-sig", errors="replace")
    except OSError as error:
        raise ValueError(f"{str(path)!r} cannot be read: {error.strerror}") from error
    lines = enumerate(map(str.strip, text.split("\n")), start=1)
    keys = ((number, line) for number, line in lines if line and not line.startswith("#"))
    try:
        return _parse("line", keys)
    except ValueError as error:
        raise ValueError(f"{str(path)!r}: {error}") from error


def require_distinct(keys: Iterable[Key]) -> None:
    """Refuse a name or a secret that two keys share.

    Raises:
        ValueError: two do; says which by name.
    """
    by_name: dict[str, Key] = {}
    by_digest: dict[bytes, Key] = {}
    for key in keys:
        if key.name in by_name:
            raise ValueError(f"two API keys have the name {key.name!r}")
        if key.digest in by_digest:
            raise ValueError(
                f"the API keys {by_digest[key.digest].name!r} and {key.name!r} are the same"
            )
        by_name[key.name] = by_digest[key.digest] = key


def _parse(what: str, numbered: Iterable[tuple[int, str]]) -> tuple[Key, ...]:
    keys = []
    for number, text in numbered:
        try:
            keys.append(_parse_key(text.strip()))
        except ValueError as error:
            raise ValueError(f"{what} {number}: {error}") from None
    if not keys:
        raise ValueError(f"holds no key; a key {_FORM}")
    return tuple(keys)


def _parse_key(text: str) -> Key:
    name, *rest = text.split(":")
    if len(rest) not in (1, 2):
        raise ValueError(_FORM)
    if not _NAME.fullmatch(name):  # nor is it shown: it may be a secret in the wrong place
        raise ValueError(
            "the name must be up to 64 of the letters A to Z and a to z, digits, '.', '_' and "
            "'-', the first a letter or a digit"
        )
    if len(rest[0]) < MIN_LENGTH or not _SECRET.fullmatch(rest[0]):
        raise ValueError(
            f"the secret of {name!r} must be at least {MIN_LENGTH} of the letters A to Z and a to "
            "z, digits and any of . _ ~ + / -, with any = at the end"
        )
    digest = hashlib.sha256(rest[0].encode()).digest()
    return Key(name, digest, _parse_rate(rest[1]) if len(rest) == 2 else None)


def _parse_rate(text: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = math.nan
    if not 0 < rate < math.inf:
        raise ValueError("images per second must be a number above 0")
    return rate
