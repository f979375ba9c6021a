"""What is seen of every request: an id, a line in the log, the metrics, and what went wrong."""

import json
import logging
import re
import time
from collections.abc import Iterable
from random import getrandbits
from typing import Any

from prometheus_client import Counter, Histogram
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service import errors
from service.telemetry.metrics import Metrics

log = logging.getLogger("service")
access_log = logging.getLogger("service.middleware.auth")

_SAFE_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
PROBE_PATHS = frozenset({"/livez", "/readyz", "/metrics", "/v2/health/live", "/v2/health/ready"})
_SHOWN = 300  # characters of a path or query in the log


class JSONFormatter(logging.Formatter):
    """One JSON object a line, so that nothing a client sends can forge a second one."""

    def format(self, record: logging.LogRecord) -> str:
        """A record with its `fields`, and the traceback where there is one."""
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
            + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


def configure_logging(level: str) -> None:
    """Send every logger of the process to stderr as JSON lines."""
    handler = logging.StreamHandler()
    handler.setFormatter(JSONFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.captureWarnings(True)
    for name in ("uvicorn", "uvicorn.error", "watchfiles"):
        # What happens is ours to tell; uvicorn's access log is replaced by the one here.
        logging.getLogger(name).setLevel(max(logging.WARNING, logging.getLevelName(level.upper())))


class AccessLogMiddleware:
    """ASGI middleware around everything else; it never touches a body."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics
        self._known: dict[tuple[str, str, int], tuple[Counter, Histogram]] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and report when its answer is complete.

        What nobody expected is logged with its traceback and answered as a bare 500.
        """
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()
        status, sent_bytes, started = 500, 0, False
        request_id = request_id_of(scope["headers"])
        scope.setdefault("state", {})["request_id"] = request_id

        async def observed_send(message: Message) -> None:
            nonlocal status, sent_bytes, started
            if message["type"] == "http.response.body":
                sent_bytes += len(message.get("body", b""))
            elif message["type"] == "http.response.start":
                status, started = message["status"], True
                id_header = (b"x-request-id", request_id.encode())
                message["headers"] = [*message.get("headers", ()), id_header]
            await send(message)

        in_progress = self._metrics.requests_in_progress
        counted = int(scope["path"] not in PROBE_PATHS)
        in_progress.inc(counted)
        try:
            await self._app(scope, receive, observed_send)
        except Exception:
            log.exception("a request failed", extra={"fields": {"request_id": request_id}})
            if started:
                raise  # too late for an answer: the server has to cut the connection
            answer = errors.respond(Request(scope), errors.INTERNAL_ERROR)
            await answer(scope, receive, observed_send)
        finally:
            in_progress.dec(counted)
            self.report(scope, request_id, status, sent_bytes, time.perf_counter() - began)

    def report(
        self, scope: Scope, request_id: str, status: int, sent_bytes: int, seconds: float
    ) -> None:
        """Count and log a request that was answered."""
        # The template and not the path: a label may only take values that we chose.
        route = getattr(scope.get("route"), "path", "unmatched")
        method = scope["method"] if route != "unmatched" else "any"
        known = self._known.get((route, method, status))
        if known is None:
            known = self._known[route, method, status] = (
                self._metrics.requests.labels(route, method, str(status)),
                self._metrics.request_seconds.labels(route),
            )
        counter, histogram = known
        counter.inc()
        histogram.observe(seconds)
        # Probes and scrapes come every few seconds for ever, and would bury the rest.
        level = logging.DEBUG if route in PROBE_PATHS else logging.INFO
        if not access_log.isEnabledFor(level):
            return
        client = scope.get("client")
        fields = {
            "request_id": request_id,
            "method": scope["method"],
            "path": scope["path"][:_SHOWN],
            "query": scope["query_string"][:_SHOWN].decode("latin-1"),
            "status": status,
            "bytes": sent_bytes,
            "duration_ms": round(1e3 * seconds, 3),
            "client": client[0] if client else None,
        }
        for name in ("key", "trace_id"):  # the name of a key, not its secret
            if name in scope["state"]:
                fields[name] = scope["state"][name]
        access_log.log(level, "request", extra={"fields": fields})


def request_id_of(headers: Iterable[tuple[bytes, bytes]]) -> str:
    """The caller's own id where it is a harmless one, else a new one."""
    for name, value in headers:
        if name == b"x-request-id":
            sent: str = value.decode("latin-1")
            if _SAFE_ID.fullmatch(sent):
                return sent
            break
    return f"{getrandbits(64):016x}"
