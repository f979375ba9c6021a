"""Request ids, the access log, the metrics of requests, and the response to a defect."""

import logging
import re
import time
from functools import cache
from json.encoder import encode_basestring_ascii as _quote
from random import getrandbits

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.disconnect import CLIENT_CLOSED_REQUEST, Disconnected, client_of
from service.errors import Problem, problem_response
from service.telemetry.logging import log_members
from service.telemetry.metrics import Metrics

PROBE_PATHS = frozenset({"/livez", "/readyz", "/metrics", "/v2/health/live", "/v2/health/ready"})

_SAFE_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_LOGGED_CHARACTERS = 300  # of a path or query

log = logging.getLogger("service")
access_log = logging.getLogger("service.access")


class AccessLogMiddleware:
    """Outermost ASGI middleware but for tracing; it leaves bodies untouched."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._in_progress = metrics.requests_in_progress
        # Looking up a series takes longer than counting in it.
        self._requests = cache(metrics.requests.labels)
        self._seconds = cache(metrics.request_seconds.labels)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and log and count it when its response is complete.

        An unexpected exception is logged with its traceback and answered with a 500. The status is
        499 if the client disconnected before the response was complete.
        """
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started_at = time.perf_counter()
        status, sent_bytes, response_started, complete = 500, 0, False, False
        client = client_of(scope)
        request_id = _request_id(scope)
        scope.setdefault("state", {})["request_id"] = request_id

        async def observed_send(message: Message) -> None:
            nonlocal status, sent_bytes, response_started, complete
            if message["type"] == "http.response.body":
                sent_bytes += len(message.get("body", b""))
                complete = not message.get("more_body", False) and not client.disconnected
            elif message["type"] == "http.response.start":
                status, response_started = message["status"], True
                id_header = (b"x-request-id", request_id.encode())
                message["headers"] = [*message.get("headers", ()), id_header]
            await send(message)

        in_progress = int(scope["path"] not in PROBE_PATHS)
        self._in_progress.inc(in_progress)
        try:
            await self._app(scope, receive, observed_send)
        except (Disconnected, ClientDisconnect):
            if not response_started:  # nobody reads it; servers expect one
                response = Response(status_code=CLIENT_CLOSED_REQUEST)
                await response(scope, receive, observed_send)
        except Exception:
            log.exception("request failed", extra={"fields": {"request_id": request_id}})
            if response_started:
                raise  # too late for another response: the server has to cut the connection
            report = "Internal server error. Include the request id when reporting it."
            response = problem_response(Problem(500, "internal-error", report), scope)
            await response(scope, receive, observed_send)
        finally:
            self._in_progress.inc(-in_progress)
            if client.disconnected and not complete:
                status = CLIENT_CLOSED_REQUEST
            scope["state"]["status"] = status
            self._report(scope, status, sent_bytes, time.perf_counter() - started_at)

    def _report(self, scope: Scope, status: int, sent_bytes: int, seconds: float) -> None:
        # The route's template, not the path: labels must be bounded.
        route = getattr(scope.get("route"), "path", "unmatched")
        method = scope["method"] if route != "unmatched" else "any"
        self._requests(route, method, status).inc()
        self._seconds(route).observe(seconds)
        # Probes and scrapes arrive every few seconds and would bury the rest.
        level = logging.DEBUG if route in PROBE_PATHS else logging.INFO
        if not access_log.isEnabledFor(level):
            return
        members = _describe(scope, status, sent_bytes, seconds)
        log_members(access_log, level, "request", members)


def _describe(scope: Scope, status: int, sent_bytes: int, seconds: float) -> str:
    """Return what the log has about a request, as the members of a JSON object.

    Encoders of whole objects take several times as long.
    """
    state = scope["state"]
    client = _client_of(scope)
    members = (
        f'"request_id": {_quote(state["request_id"])}, '
        f'"method": {_quote(scope["method"])}, '
        f'"path": {_quote(scope["path"][:_LOGGED_CHARACTERS])}, '
        f'"query": {_quote(scope["query_string"][:_LOGGED_CHARACTERS].decode("latin-1"))}, '
        f'"status": {status}, '
        f'"bytes": {sent_bytes}, '
        f'"duration_ms": {round(1e3 * seconds, 3)}, '
        f'"client": {"null" if client is None else _quote(client)}'
    )
    for name in ("key", "trace_id"):  # `key` is the name of an API key, not its secret
        if name in state:
            members += f', "{name}": {_quote(state[name])}'
    return members


def _client_of(scope: Scope) -> str | None:
    """Return the client's address, without the prefix that IPv4 has on a socket of both versions.

    On a Unix socket it is `unix`; None if the server does not tell.
    """
    client, server = scope.get("client"), scope.get("server")
    if client:
        return str(client[0]).removeprefix("::ffff:")
    return "unix" if server and server[1] is None else None


def _request_id(scope: Scope) -> str:
    """Return the client's X-Request-ID if it is safe to log, else a new id."""
    for name, value in scope["headers"]:
        if name == b"x-request-id":
            sent: str = value.decode("latin-1")
            if _SAFE_ID.fullmatch(sent):
                return sent
            break
    return f"{getrandbits(64):016x}"
