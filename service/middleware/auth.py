"""Authentication by API keys."""

import base64
import hashlib
import hmac
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
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


@dataclass(frozen=True, slots=True)
class APIKeyGrant:
    """An API key and its rate limit; None means no limit."""

    key: APIKey
    bucket: TokenBucket | None = None


def create_grants(settings: Settings, metrics: Metrics, folder: Path | None) -> list[APIKeyGrant]:
    """Return a grant for every key of the settings.

    Several workers share their token buckets in a folder, which is None for a single process.
    """
    rejected = metrics.rejections.labels("rate-limited")
    grants = []
    for key in settings.keys:
        rate = key.images_per_second or settings.images_per_second
        path = None if folder is None else folder / f"{key.name}.bucket"
        bucket = TokenBucket(rate, settings.burst_images, rejected, path) if rate else None
        grants.append(APIKeyGrant(key, bucket))
    return grants


class APIKeyMiddleware:
    """ASGI middleware that admits requests with a valid API key.

    A missing, a malformed and a wrong key get the same response after the same time. A browser
    cannot send a bearer token when it opens a page, so it may send the key as the password of any
    user name, but not from another site, which could otherwise spend the key.
    """

    def __init__(self, app: ASGIApp, grants: Sequence[APIKeyGrant]) -> None:
        self._app, self._grants = app, grants

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on with the name and the token bucket of its key, or answer 401."""
        if scope["type"] != "http" or scope["path"] in PUBLIC_PATHS:
            await self._app(scope, receive, send)
            return
        grant = self._authenticate(scope)
        if grant is None:
            # `Basic` makes a browser ask its user for a password, so only navigation gets it.
            navigates = _header(scope, b"sec-fetch-mode") == b"navigate"
            headers = {"WWW-Authenticate": _BASIC if navigates else _BEARER}
            problem = Problem(401, "unauthorized", _KEY_REQUIRED, headers=headers)
            await problem_response(problem, scope)(scope, receive, send)
            return
        state = scope.setdefault("state", {})
        state["key"], state["token_bucket"] = grant.key.name, grant.bucket
        await self._app(scope, receive, send)

    def _authenticate(self, scope: Scope) -> APIKeyGrant | None:
        digest = hashlib.sha256(_token(scope)).digest()
        authenticated = None
        for grant in self._grants:  # all of them, so that the time does not depend on the key
            if hmac.compare_digest(digest, grant.key.digest):
                authenticated = grant
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
