"""Who is let in, and how much of the service each of them gets."""

import base64
import fcntl
import hashlib
import hmac
import math
import mmap
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from prometheus_client import Counter
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from service.errors import Problem, respond, wrong_value
from service.keys import Key
from service.settings import Settings
from service.telemetry.metrics import Metrics

# They say nothing but that the process answers, to whoever has to restart it.
PUBLIC_PATHS = frozenset({"/livez", "/v2/health/live"})
_NEEDED = "A valid API key is needed, as `Authorization: Bearer KEY`."
# A browser that opens a page asks its user where it is challenged so, and nothing else does.
_CHALLENGES = {
    True: 'Basic realm="API key as the password", charset="UTF-8"',
    False: "Bearer",
}


class TokenBucket:
    """A bucket of images that refills at a constant rate, for one key.

    Its whole state is the time at which it will be full again, so it fits into eight bytes that
    several workers share: a limit of each worker would not be the limit of the key, and libraries
    share their buckets through a database or not at all.

    Args:
        rate: images a second.
        burst: images that it holds when full.
        rejected: counts refusals.
        path: a file of the workers that share it; None for a single process.

    Attributes:
        burst: images that it holds when full.
    """

    def __init__(self, rate: float, burst: int, rejected: Counter, path: Path | None) -> None:
        self._rate, self.burst, self._rejected = rate, burst, rejected
        self._file = None if path is None else path.open("a+b")
        if self._file is not None:
            self._file.truncate(8)
        memory = mmap.mmap(-1 if self._file is None else self._file.fileno(), 8)
        self._full_at = memoryview(memory).cast("d")  # of the clock that all processes share

    def take(self, images: int) -> None:
        """Take images out.

        Raises:
            Problem: 429, they are not there yet; 422, they will never be.
        """
        if images > self.burst:
            message = f"{images} images in all; the limit of this key allows {self.burst} at once"
            raise wrong_value("n", images, message)
        wait_s = self._take(images)
        if wait_s > 0:
            self._rejected.inc()
            seconds = max(1, math.ceil(wait_s))
            raise Problem(
                429,
                "rate-limited",
                f"This key may have {self._rate:g} images a second; try again in {seconds} s.",
                headers={"Retry-After": str(seconds)},
            )

    def _take(self, images: int) -> float:
        """Take images out if they are there; returns the seconds until they are."""
        if self._file is None:
            return self._take_alone(images)
        fcntl.flock(self._file, fcntl.LOCK_EX)
        try:
            return self._take_alone(images)
        finally:
            fcntl.flock(self._file, fcntl.LOCK_UN)

    def _take_alone(self, images: int) -> float:
        now = time.monotonic()
        filling_s = max(0.0, self._full_at[0] - now) + images / self._rate
        wait_s = filling_s - self.burst / self._rate
        if wait_s <= 0:
            self._full_at[0] = now + filling_s
        return max(0.0, wait_s)


@dataclass(frozen=True, slots=True)
class APIKeyGrant:
    """A key and what it may have; an allowance of None is no limit."""

    key: Key
    allowance: TokenBucket | None = None


def create_grants(settings: Settings, metrics: Metrics, folder: Path | None) -> list[APIKeyGrant]:
    """What every key of the settings may have; empty where none is set.

    Args:
        settings: hold the keys and the limits.
        metrics: count what is refused.
        folder: where several workers share how much is used; None for a single process.
    """
    grants = []
    for key in settings.keys:
        rate = key.images_per_second or settings.images_per_second
        path = None if folder is None else folder / f"{key.name}.allowance"
        if rate is None:
            grants.append(APIKeyGrant(key))
        else:
            rejected = metrics.rejections.labels("rate-limited")
            grants.append(
                APIKeyGrant(key, TokenBucket(rate, settings.burst_images, rejected, path))
            )
    return grants


def charge(scope: Scope, images: int) -> None:
    """Take the images of a request from what its key may have.

    Raises:
        Problem: 429 over the limit, 422 more than it ever allows at once.
    """
    allowance = scope["state"].get("allowance")
    if allowance is not None:
        allowance.take(images)


def burst_of(scope: Scope) -> float:
    """How many images the key of a request may have at once."""
    allowance = scope["state"].get("allowance")
    return math.inf if allowance is None else allowance.burst


class APIKeyMiddleware:
    """ASGI middleware that lets in who sends a key.

    Whether it is missing, malformed or wrong, the answer is the same and takes as long. A browser
    cannot send a bearer token when it opens a page, so it may send the key as a password, under any
    name; but not on behalf of another site, which could otherwise spend it.
    """

    def __init__(self, app: ASGIApp, grants: Sequence[APIKeyGrant]) -> None:
        self._app, self._grants = app, grants

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, with the name and the allowance of its key, or refuse it."""
        if scope["type"] != "http" or scope["path"] in PUBLIC_PATHS:
            await self._app(scope, receive, send)
            return
        grant = self._find(scope)
        if grant is None:
            challenge = _CHALLENGES[_header(scope, b"sec-fetch-mode") == b"navigate"]
            headers = {"WWW-Authenticate": challenge}
            problem = Problem(401, "unauthorized", _NEEDED, headers=headers)
            await respond(Request(scope), problem)(scope, receive, send)
            return
        state = scope.setdefault("state", {})
        state["key"], state["allowance"] = grant.key.name, grant.allowance
        await self._app(scope, receive, send)

    def _find(self, scope: Scope) -> APIKeyGrant | None:
        digest = hashlib.sha256(_token(scope)).digest()
        found = None
        for grant in self._grants:  # all of them, whichever it is
            if hmac.compare_digest(digest, grant.key.digest):
                found = grant
        return found


def _token(scope: Scope) -> bytes:
    """The key that a request sends; empty where there is none, or more than one."""
    scheme, _, token = _header(scope, b"authorization").partition(b" ")
    if scheme.lower() == b"bearer":
        return token.strip(b" ")
    if scheme.lower() == b"basic" and _header(scope, b"sec-fetch-site") != b"cross-site":
        with suppress(ValueError):
            return base64.b64decode(token.strip(b" "), validate=True).partition(b":")[2]
    return b""


def _header(scope: Scope, name: bytes) -> bytes:
    """The value of a header; empty where there is none, or more than one."""
    sent: list[bytes] = [value for each, value in scope["headers"] if each == name]
    return sent[0] if len(sent) == 1 else b""
