"""The wired app on a real socket, with an engine that waits until it is told to go on."""

import math
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from fastapi import FastAPI

from service import app as app_module
from service.app import create_app
from service.inference.errors import DeviceLost
from service.inference.repository import Model, ModelRepository
from service.settings import Settings
from tests.support.engines import GatedEngine
from tests.support.serving import serving
from training.artifact import Artifact


@pytest.fixture
def engine(small_artifact: Artifact) -> GatedEngine:
    return GatedEngine(small_artifact)


def build(
    engine: GatedEngine,
    *,
    max_queue: int = 1024,
    timeout_ms: int = 60_000,
    self_check_s: float = 3600.0,
) -> FastAPI:
    settings = Settings(
        max_queue_images=max_queue, timeout_s=timeout_ms / 1e3, self_test_interval_s=self_check_s
    )
    return create_app(settings, ModelRepository([Model("small", engine)], "small"))


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as threads:
        yield threads


def post(client: httpx.Client, query: str) -> httpx.Response:
    return client.post(f"/generate?{query}")


def metric(client: httpx.Client, line: str) -> float:
    for each in client.get("/metrics").text.splitlines():
        if each.startswith(line + " "):
            return float(each.rsplit(" ", 1)[1])
    return 0.0


def wait_until(client: httpx.Client, line: str, value: float) -> None:
    """Poll a metric; the test's own time limit is the HTTP client's."""
    for _ in range(20_000):
        if metric(client, line) == value:
            return
    raise AssertionError(f"{line} never was {value}")


def problem(answer: httpx.Response) -> dict[str, object]:
    assert answer.headers["Content-Type"] == "application/problem+json"
    return dict(answer.json())


def test_what_does_not_fit_the_queue_is_429_with_a_time_to_come_back(
    engine: GatedEngine, pool: ThreadPoolExecutor
) -> None:
    with serving(build(engine)) as client:
        running = pool.submit(post, client, "label=cat&n=8")
        engine.started.acquire()
        waiting = pool.submit(post, client, "label=cat&n=1024")
        wait_until(client, "cgan_queue_images", 1024)
        refused = post(client, "label=cat&n=17")  # fewer would still find room
        assert refused.status_code == 429
        assert int(refused.headers["Retry-After"]) >= 1
        assert problem(refused)["type"] == "urn:cgan:problem:overloaded"
        assert metric(client, 'cgan_rejections_total{reason="overloaded"}') == 1
        engine.gate.set()
        assert running.result().status_code == 200
        assert waiting.result().status_code == 200
        assert post(client, "label=cat").status_code == 200


def test_what_takes_too_long_is_504_and_what_waited_is_never_computed(
    engine: GatedEngine, pool: ThreadPoolExecutor
) -> None:
    with serving(build(engine, timeout_ms=200)) as client:
        running = pool.submit(post, client, "label=cat&n=8")
        engine.started.acquire()
        late = post(client, "label=cat&n=5")
        assert late.status_code == 504
        assert problem(late)["type"] == "urn:cgan:problem:deadline-exceeded"
        assert running.result().status_code == 504
        assert metric(client, "cgan_queue_images") == 0
        engine.gate.set()
        assert post(client, "label=cat").status_code == 200
    assert sum(engine.sizes) == 9


def test_a_failed_forward_is_503_without_its_cause_and_the_next_works(
    engine: GatedEngine, caplog: pytest.LogCaptureFixture
) -> None:
    engine.gate.set()
    engine.failure = RuntimeError("secret device address")
    with serving(build(engine)) as client:
        failed = post(client, "label=cat")
        assert failed.status_code == 503
        assert "secret" not in failed.text
        assert problem(failed)["type"] == "urn:cgan:problem:forward-failed"
        engine.failure = None
        assert post(client, "label=cat").status_code == 200
    assert "secret device address" in caplog.text


def test_a_client_that_goes_away_frees_its_rows(
    engine: GatedEngine, pool: ThreadPoolExecutor
) -> None:
    with serving(build(engine)) as client:
        running = pool.submit(post, client, "label=cat&n=8")
        engine.started.acquire()
        address = (client.base_url.host, client.base_url.port or 0)
        with socket.create_connection(address) as gone:
            gone.sendall(b"POST /generate?label=cat&n=1000 HTTP/1.1\r\nHost: test\r\n\r\n")
            wait_until(client, "cgan_queue_images", 1000)
        wait_until(client, "cgan_queue_images", 0)
        engine.gate.set()
        assert running.result().status_code == 200
        wait_until(client, 'cgan_requests_total{method="POST",route="/generate",status="499"}', 1)
    assert sum(engine.sizes) == 8


def test_a_draining_service_answers_what_it_admitted_and_refuses_the_rest(
    engine: GatedEngine, pool: ThreadPoolExecutor
) -> None:
    app = build(engine)
    with serving(app) as client:
        admitted = pool.submit(post, client, "label=cat&n=20&format=json")
        engine.started.acquire()
        app.state.readiness.drain()
        answer = client.get("/readyz")
        assert answer.status_code == 503
        assert problem(answer)["type"] == "urn:cgan:problem:draining"
        assert client.get("/livez").status_code == 200
        assert metric(client, "cgan_ready") == 0
        engine.gate.set()
        assert [each["index"] for each in admitted.result().json()["images"]] == list(range(20))


def test_an_unexpected_error_is_a_500_that_tells_nothing(
    engine: GatedEngine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("secret path")

    monkeypatch.setattr("service.encoding.images.encode_png", broken)
    engine.gate.set()
    with serving(build(engine)) as client:
        answer = post(client, "label=cat")
        assert answer.status_code == 500
        assert "secret" not in answer.text
        assert problem(answer)["type"] == "urn:cgan:problem:internal-error"
        assert problem(answer)["request_id"] == answer.headers["X-Request-ID"]
        assert post(client, "label=wolf").status_code == 422
    assert "secret path" in caplog.text


def test_readiness_falls_while_known_images_cannot_be_made_and_comes_back(
    engine: GatedEngine,
) -> None:
    engine.gate.set()
    engine.failure = RuntimeError("a hiccup")
    with serving(build(engine, self_check_s=0.1)) as client:
        wait_until(client, "cgan_ready", 0)
        answer = client.get("/readyz")
        assert answer.status_code == 503
        assert problem(answer)["type"] == "urn:cgan:problem:device-failed"
        assert "hiccup" not in answer.text
        engine.failure = None
        wait_until(client, "cgan_ready", 1)
        assert client.get("/readyz").status_code == 200
        assert metric(client, 'cgan_device_checks_total{outcome="passed"}') > 0


def test_a_device_that_makes_other_images_than_before_is_lost(
    engine: GatedEngine, caplog: pytest.LogCaptureFixture
) -> None:
    engine.gate.set()
    engine.reference.pixels[1] += 1
    with serving(build(engine, self_check_s=0.1)) as client:
        wait_until(client, 'cgan_device_checks_total{outcome="wrong"}', 1)
        assert client.get("/readyz").status_code == 503
        refused = post(client, "label=cat")
        assert refused.status_code == 503
        assert problem(refused)["type"] == "urn:cgan:problem:device-lost"
        assert client.get("/livez").status_code == 200
    (record,) = [each for each in caplog.records if each.levelname == "CRITICAL"]
    assert record.__dict__["fields"] == {"cause": "the reference images of small are wrong"}


def test_the_memory_of_a_gpu_is_read_at_every_scrape_until_the_gpu_is_lost(
    engine: GatedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    readings = iter([(3, 8), (1, 8)])  # bytes free and in all

    def read(_device: str) -> tuple[int, int]:
        for reading in readings:
            return reading
        raise RuntimeError("CUDA error: device-side assert triggered")

    monkeypatch.setattr(app_module, "free_memory", read)
    engine.device = "cuda:0"
    with serving(build(engine)) as client:
        assert metric(client, 'cgan_device_memory_bytes{device="cuda:0",kind="used"}') == 7
        assert math.isnan(metric(client, 'cgan_device_memory_bytes{device="cuda:0",kind="used"}'))
        assert metric(client, 'cgan_device_memory_bytes{device="cuda:0",kind="total"}') == 8


def test_all_who_wait_for_a_lost_device_are_told_at_once(
    engine: GatedEngine, pool: ThreadPoolExecutor
) -> None:
    with serving(build(engine)) as client:
        running = pool.submit(post, client, "label=cat&n=8")
        engine.started.acquire()
        waiting = [pool.submit(post, client, f"label=cat&n={n}") for n in (1, 20, 100)]
        wait_until(client, "cgan_queue_images", 121)
        engine.failure = DeviceLost("secret address")
        engine.gate.set()
        for answer in (running, *waiting):
            assert answer.result().status_code == 503
            assert problem(answer.result())["type"] == "urn:cgan:problem:device-lost"
            assert "secret" not in answer.result().text
        assert metric(client, "cgan_ready") == 0


def test_a_request_may_have_a_deadline_of_its_own(
    engine: GatedEngine, pool: ThreadPoolExecutor
) -> None:
    with serving(build(engine)) as client:
        running = pool.submit(post, client, "label=cat&n=8")
        engine.started.acquire()
        late = post(client, "label=cat&timeout_ms=50")
        assert late.status_code == 504
        assert "within 0.05 s" in str(problem(late)["detail"])
        engine.gate.set()
        assert running.result().status_code == 200
    assert sum(engine.sizes) == 8
