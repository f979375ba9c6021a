import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from queue import Queue

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from service.settings import parse_settings
from tests.support.serving import ServiceProcess


class Collector:
    """A collector that receives spans by OTLP over HTTP on a loopback port."""

    def __init__(self) -> None:
        self._spans: Queue[Span] = Queue()
        self.service_names: set[str] = set()
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                assert self.path == "/v1/traces"
                body = self.rfile.read(int(self.headers["Content-Length"]))
                for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                    for attribute in resource.resource.attributes:
                        if attribute.key == "service.name":
                            collector.service_names.add(attribute.value.string_value)
                    for scope in resource.scope_spans:
                        for span in scope.spans:
                            collector._spans.put(span)
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *args: object) -> None:
                """Write nothing to stderr."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    def spans(self, *, requests: int) -> list[Span]:
        """Return the spans since the last call, once this number of requests is among them."""
        found: list[Span] = []
        while sum(span.kind == Span.SPAN_KIND_SERVER for span in found) < requests:
            found.append(self._spans.get(timeout=60))
        return found

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def traced(collector: Collector, bundled: Path, *arguments: str) -> ServiceProcess:
    return ServiceProcess(
        *("--models", str(bundled), "--otlp-endpoint", collector.url, *arguments),
        environment={"OTEL_BSP_SCHEDULE_DELAY": "20"},  # ms between exports
    )


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    collector.close()


@pytest.fixture(scope="module")
def service(collector: Collector, bundled: Path) -> Iterator[ServiceProcess]:
    with traced(collector, bundled) as service:
        yield service


def attributes(span: Span) -> dict[str, object]:
    return {each.key: each.value.string_value or each.value.int_value for each in span.attributes}


def test_a_request_is_a_span_with_its_stages_and_a_link_to_its_batch(
    collector: Collector, service: ServiceProcess
) -> None:
    answer = service.client.post("/generate?label=7&n=16", headers={"X-Request-ID": "mine"})
    assert answer.status_code == 200
    spans = {span.name: span for span in collector.spans(requests=1)}
    assert set(spans) == {"POST /generate", "queue", "forward", "encode", "batch"}
    assert collector.service_names == {"cgan-service"}

    request = spans["POST /generate"]
    assert not request.parent_span_id
    assert request.kind == Span.SPAN_KIND_SERVER
    assert attributes(request) == {
        "http.request.method": "POST",
        "http.route": "/generate",
        "http.response.status_code": 200,
        "url.path": "/generate",
        "cgan.request_id": "mine",
    }
    ends = request.start_time_unix_nano
    for name in ("queue", "forward", "encode"):
        assert spans[name].parent_span_id == request.span_id
        assert spans[name].trace_id == request.trace_id
        # One after the other, allowing for the rounding of two clocks.
        assert spans[name].start_time_unix_nano >= ends - 100_000
        ends = spans[name].end_time_unix_nano
        assert spans[name].start_time_unix_nano <= ends
    assert ends <= request.end_time_unix_nano + 100_000

    batch = spans["batch"]
    assert batch.trace_id != request.trace_id
    assert attributes(batch) == {"cgan.batch.images": 16}
    (link,) = spans["forward"].links
    assert (link.trace_id, link.span_id) == (batch.trace_id, batch.span_id)


def test_requests_that_share_a_batch_link_to_the_same_span(
    collector: Collector, service: ServiceProcess
) -> None:
    paths = ["/generate?label=1&n=1024&format=zip"]  # the others queue during it
    paths += [f"/generate?label={label}&n=16" for label in range(10)]
    with ThreadPoolExecutor(len(paths)) as clients:
        answers = list(clients.map(service.client.post, paths))
    assert all(answer.status_code == 200 for answer in answers)
    spans = collector.spans(requests=len(paths))
    images = {s.span_id: attributes(s)["cgan.batch.images"] for s in spans if s.name == "batch"}
    linked = [link.span_id for span in spans for link in span.links]
    assert set(linked) == set(images)
    assert len(linked) > len(images)  # some batches have rows of several requests
    assert sum(map(int, map(str, images.values()))) == 1024 + 10 * 16


def test_the_trace_of_a_client_continues(collector: Collector, service: ServiceProcess) -> None:
    trace, parent = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
    for sent in (f"00-{trace}-{parent}-01", f"00-{trace}-{parent}-00", "nonsense"):
        answer = service.client.post("/generate?label=7", headers={"traceparent": sent})
        assert answer.status_code == 200
    spans = collector.spans(requests=2)
    requests = [span for span in spans if span.kind == Span.SPAN_KIND_SERVER]
    # The second client did not sample; the third one's trace has no id.
    assert [span.trace_id.hex() == trace for span in requests] == [True, False]
    assert [span.parent_span_id.hex() for span in requests] == [parent, ""]
    assert sum(f'"trace_id": "{trace}"' in line for line in service.errors) == 2


def test_failures_are_traced_and_probes_are_not(
    collector: Collector, service: ServiceProcess
) -> None:
    for path in ("/livez", "/readyz", "/metrics", "/models", "/none"):
        service.client.get(path)
    service.client.post("/generate?label=99")
    service.client.get("/dataset?per_class=200&seed=1&format=webdataset")
    spans = collector.spans(requests=4)
    statuses = {
        span.name: attributes(span)["http.response.status_code"]
        for span in spans
        if span.kind == Span.SPAN_KIND_SERVER
    }
    assert statuses == {
        "GET /models": 200,
        "GET": 404,  # of no route
        "POST /generate": 422,
        "GET /dataset": 200,
    }
    assert 2 < len([span for span in spans if span.kind != Span.SPAN_KIND_SERVER]) < 1000


def test_an_unreachable_collector_fails_no_request(bundled: Path) -> None:
    collector = Collector()
    collector.close()
    with traced(collector, bundled) as service:
        assert service.client.post("/generate?label=7").status_code == 200
        service.signal()
        assert service.wait() == 0
    assert any("opentelemetry" in line for line in service.errors)


def test_workers_send_the_remaining_spans_at_the_end(bundled: Path) -> None:
    collector = Collector()
    with ServiceProcess(
        *("--models", str(bundled), "--otlp-endpoint", collector.url, "--workers", "2"),
        environment={"OTEL_BSP_SCHEDULE_DELAY": "3600000", "OTEL_SERVICE_NAME": "mine"},
    ) as service:
        assert service.client.post("/generate?label=7").status_code == 200
        service.signal()
        assert service.wait() == 0
    assert "POST /generate" in {span.name for span in collector.spans(requests=1)}
    assert collector.service_names == {"mine"}
    collector.close()


def test_an_invalid_endpoint_is_rejected() -> None:
    message = "must begin with http:// or https:// and a host, not 'host:4318'"
    with pytest.raises(ValueError, match=f"^--otlp-endpoint .*: {message}"):
        parse_settings(["--otlp-endpoint", "host:4318"])
