"""OpenTelemetry traces.

A request is one span, with a child for each time that it was queued, computed and encoded. A batch
is a span without a parent, since it belongs to every request with rows in it; the forward span of
each of these requests links to it.
"""

import time
from collections.abc import MutableMapping
from typing import Any

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Link, Span, SpanContext, SpanKind, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from service.generation import Stage
from service.inference.scheduling import BatchRecord
from service.middleware.access_log import PROBE_PATHS

_propagator = TraceContextTextMapPropagator()


def create_tracer_provider(endpoint: str) -> TracerProvider:
    """Return a source of spans, which are sent to a collector in the background.

    The environment variables of the SDK apply: OTEL_SERVICE_NAME, OTEL_TRACES_SAMPLER,
    OTEL_EXPORTER_OTLP_HEADERS and so on.

    Args:
        endpoint: a collector for OTLP over HTTP, such as `http://localhost:4318`.
    """
    resource = Resource.create()
    if str(resource.attributes["service.name"]).startswith("unknown_service"):  # its default
        resource = resource.merge(Resource({"service.name": "cgan-service"}))
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    exporter = OTLPSpanExporter(endpoint=endpoint.rstrip("/") + "/v1/traces")
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return provider


class TracingMiddleware:
    """ASGI middleware that traces every request except probes and scrapes.

    It wraps `AccessLogMiddleware`, which logs the trace id and records the status.
    """

    def __init__(
        self,
        app: ASGIApp,
        provider: TracerProvider,
        batch_spans: MutableMapping[BatchRecord, SpanContext],  # shared by all requests
    ) -> None:
        self._app = app
        self._tracer = provider.get_tracer("service")
        self._batches = batch_spans

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on inside a span, in the client's trace if it sent one."""
        if scope["type"] != "http" or scope["path"] in PROBE_PATHS:
            await self._app(scope, receive, send)
            return
        span = self._tracer.start_span(
            scope["method"],
            context=_propagator.extract(Headers(scope=scope)),
            kind=SpanKind.SERVER,
            attributes={"http.request.method": scope["method"], "url.path": scope["path"]},
        )
        state: dict[str, Any] = scope.setdefault("state", {})
        state["trace_id"] = trace.format_trace_id(span.get_span_context().trace_id)
        took: list[Stage] = []
        if span.is_recording():
            state["stages"] = took
        try:
            await self._app(scope, receive, send)
        finally:
            self._end(span, scope, took)

    def _end(self, span: Span, scope: Scope, took: list[Stage]) -> None:
        """End the span of a request, with a child for each stage."""
        route = getattr(scope.get("route"), "path", None)
        if route is not None:
            span.update_name(f"{scope['method']} {route}")
            span.set_attribute("http.route", route)
        status = scope["state"]["status"]
        span.set_attribute("http.response.status_code", status)
        span.set_attribute("cgan.request_id", scope["state"]["request_id"])
        if status >= 500:
            span.set_status(StatusCode.ERROR)
        parent = trace.set_span_in_context(span)
        since_epoch = time.time() - time.perf_counter()
        for stage in took:
            links = [Link(self._batch_span(forward, since_epoch)) for forward in stage.forwards]
            child = self._tracer.start_span(
                stage.name, parent, links=links, start_time=_nanoseconds(since_epoch + stage.began)
            )
            child.end(_nanoseconds(since_epoch + stage.ended))
        span.end()

    def _batch_span(self, batch: BatchRecord, since_epoch: float) -> SpanContext:
        """Return the span of a batch; the first request of it to end creates the span."""
        context = self._batches.get(batch)
        if context is None:
            span = self._tracer.start_span(
                "batch",
                context=trace.set_span_in_context(trace.INVALID_SPAN),
                attributes={"cgan.batch.images": batch.rows},
                start_time=_nanoseconds(since_epoch + batch.started_at),
            )
            span.end(_nanoseconds(since_epoch + batch.done_at))
            context = self._batches[batch] = span.get_span_context()
        return context


def _nanoseconds(seconds: float) -> int:
    return int(1e9 * seconds)
