"""Authentication by API keys."""

import base64
import hashlib
import hmac
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from starlette.types import ASGIApp, Receive, Scope, Send

from service.errors import Problem, problem_response
from service.keys import APIKey
from service.rate_limit import TokenBucket
from service.settings import Settings
from service.telemetry.metrics import Metrics

PUBLIC_PATHS = frozenset({"/livez", "/v2/health/live"})  # they reveal only that the process runs

_KEY_REQUIRED = "This path requires an API key, sent as `Authorization: Bearer KEY`."
_BEARER = "Bearer"
_BASIC = 'Basic realm="API key as the password", charset="UTF-8"'


def create_buckets(
    settings: Settings, metrics: Metrics, folder: Path | None
) -> dict[APIKey, TokenBucket | None]:
    """Return the token bucket of every key of the settings, or None for a key without a limit.

    Several workers share their token buckets in a folder, which is None for a single process.
    """
    rejected = metrics.rejections.labels("rate-limited")
    buckets: dict[APIKey, TokenBucket | None] = {}
    for key in settings.keys:
        rate = key.images_per_second or settings.images_per_second
        path = None if folder is None else folder / f"{key.name}.bucket"
        bucket = TokenBucket(rate, settings.burst_images, rejected, path) if rate else None
        buckets[key] = bucket
    return buckets


class APIKeyMiddleware:
    """ASGI middleware that admits requests with a valid API key.

    A missing, a malformed and a wrong key get the same response after the same time. A browser
    cannot send a bearer token when it opens a page, so it may send the key as the password of any
    user name, but not from another site, which could otherwise spend the key.
    """

    def __init__(self, app: ASGIApp, buckets: Mapping[APIKey, TokenBucket | None]) -> None:
        self._app, self._buckets = app, buckets

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on with the name and the token bucket of its key, or answer 401."""
        if scope["type"] != "http" or scope["path"] in PUBLIC_PATHS:
            await self._app(scope, receive, send)
            return
        key = self._authenticate(scope)
        if key is None:
            # `Basic` makes a browser ask its user for a password, so only navigation gets it.
            navigates = _header(scope, b"sec-fetch-mode") == b"navigate"
            headers = {"WWW-Authenticate": _BASIC if navigates else _BEARER}
            problem = Problem(401, "unauthorized", _KEY_REQUIRED, headers=headers)
            await problem_response(problem, scope)(scope, receive, send)
            return
        state = scope.setdefault("state", {})
        state["key"], state["token_bucket"] = key.name, self._buckets[key]
        await self._app(scope, receive, send)

    def _authenticate(self, scope: Scope) -> APIKey | None:
        digest = hashlib.sha256(_token(scope)).digest()
        authenticated = None
        for key in self._buckets:  # all of them, so that the time does not depend on the key
            if hmac.compare_digest(digest, key.digest):
                authenticated = key
        return authenticated


def _token(scope: Scope) -> bytes:
    """Return the key that a request sends; empty if it sends none or more than one."""
    scheme, _, token = _header(scope, b"authorization").partition(b" ")
    if scheme.lower() == b"bearer":
        return token.strip(b" ")
    if scheme.lower() == b"basic" and _header(scope, b"sec-fetch-site") != b"cross-site":
        with suppress(ValueError):
            return base64.b64decode(token.strip(b" "), validate=True).partition(b":")[2]
    return b""


def _header(scope: Scope, name: bytes) -> bytes:
    """Return the value of a header; empty if it is sent never or more than once."""
    sent: list[bytes] = [value for each, value in scope["headers"] if each == name]
    return sent[0] if len(sent) == 1 else b""
