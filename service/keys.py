"""Parsing of API keys: `name:secret` or `name:secret:images-per-second`.

Only the digest of a secret is kept, and no error message repeats a secret.
"""

import hashlib
import math
import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

MIN_LENGTH = 16  # characters of a secret

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_SECRET = re.compile(r"[A-Za-z0-9._~+/-]+=*")  # a bearer token (RFC 6750, section 2.1)
_FORM = "must be name:secret or name:secret:images-per-second"


@dataclass(frozen=True, slots=True)
class APIKey:
    """An API key."""

    name: str  # shown in the log; not secret
    digest: bytes = field(repr=False)  # SHA-256 of the secret
    images_per_second: float | None = None  # None for the limit of the settings


def parse_keys(text: object) -> tuple[APIKey, ...]:
    """Parse keys separated by commas.

    Raises:
        ValueError: the text holds no key, or a malformed one, which is named by its number.
    """
    parts = text.split(",") if isinstance(text, str) and text.strip() else []
    return _parse("key", enumerate(parts, start=1))


def read_keys(path: object) -> tuple[APIKey, ...]:
    """Read a file with one key a line; empty lines and lines that begin with # are skipped.

    Raises:
        ValueError: the file is unreadable or empty, or a line is malformed; it is named by number.
    """
    try:
        # Invalid UTF-8 is replaced, and the replacement is then rejected with its line number.
        text = Path(str(path)).read_text(encoding="utf-8-sig", errors="replace")
        lines = enumerate(map(str.strip, text.split("\n")), start=1)
        return _parse("line", (each for each in lines if each[1] and each[1][0] != "#"))
    except OSError as error:
        raise ValueError(f"{str(path)!r} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{str(path)!r}: {error}") from error


def require_distinct(keys: Iterable[APIKey]) -> None:
    """Check that no two keys have the same name or secret.

    Raises:
        ValueError: two have; the message names them.
    """
    by_name: dict[str, APIKey] = {}
    by_digest: dict[bytes, APIKey] = {}
    for key in keys:
        if key.name in by_name:
            raise ValueError(f"two API keys have the name {key.name!r}")
        other = by_digest.get(key.digest)
        if other is not None:
            raise ValueError(f"the API keys {other.name!r} and {key.name!r} have the same secret")
        by_name[key.name] = by_digest[key.digest] = key


def _parse(unit: str, numbered: Iterable[tuple[int, str]]) -> tuple[APIKey, ...]:
    keys = []
    for number, text in numbered:
        try:
            keys.append(_parse_key(*text.strip().split(":")))
        except ValueError as error:
            raise ValueError(f"{unit} {number}: {error}") from None
    if not keys:
        raise ValueError(f"found no API key; each {_FORM}")
    return tuple(keys)


def _parse_key(name: str, secret: str = "", *rates: str) -> APIKey:
    if not secret or len(rates) > 1:
        raise ValueError(_FORM)
    if not _NAME.fullmatch(name):  # not repeated: it may be a misplaced secret
        raise ValueError(
            "the name must be 1 to 64 letters (A-Z, a-z), digits, '.', '_' or '-', and begin with "
            "a letter or digit"
        )
    if len(secret) < MIN_LENGTH or not _SECRET.fullmatch(secret):
        raise ValueError(
            f"the secret of {name!r} must be at least {MIN_LENGTH} letters (A-Z, a-z), digits or "
            "characters of ._~+/-, optionally followed by ="
        )
    digest = hashlib.sha256(secret.encode()).digest()
    return APIKey(name, digest, _parse_rate(rates[0]) if rates else None)


def _parse_rate(text: str) -> float:
    with suppress(ValueError):
        rate = float(text)
        if 0 < rate < math.inf:
            return rate
    raise ValueError("images-per-second must be a number above 0")
