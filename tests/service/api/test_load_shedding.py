"""What is refused at the door, and what is not: an app on a real socket whose engine waits."""

import json
import logging
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest

from service.api.load_shedding import Plain, read_head, read_plain
from service.app import create_app
from service.inference.repository import Model, ModelRepository
from service.settings import Settings
from tests.service.test_app import GatedEngine, build, metric, post, wait_until
from tests.support.serving import serving
from tests.support.wire import parse
from training.artifact import Artifact


@dataclass
class Full:
    """A service whose queue has no room for more than 16 images at a time."""

    client: httpx.Client
    engine: GatedEngine
    shed: list[int] = field(default_factory=list)  # statuses of what was refused at the door

    def exchange(self, data: bytes, until: int) -> list[Any]:
        """Send bytes; so many answers."""
        url = self.client.base_url
        with socket.create_connection((url.host, url.port), timeout=60) as wire:
            wire.sendall(data)
            received = b""
            while received.count(b"HTTP/1.1 ") < until or not received.endswith(b"}"):
                received += wire.recv(1 << 16)
        return list(parse(received))


def exchange(wire: socket.socket, data: bytes) -> bytes:
    """Send bytes; an answer that is a problem."""
    wire.sendall(data)
    received = b""
    while not received.endswith(b"}"):
        received += wire.recv(1 << 16)
    return received


@pytest.fixture
def full(small_artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> Iterator[Full]:
    monkeypatch.setattr("service.app.available_cores", lambda: 2)
    engine = GatedEngine(small_artifact)
    app = build(engine)
    shedder = app.state.shed

    def watched(*arguments: Any) -> Any:
        refused = shedder(*arguments)
        if refused is not None:
            found.shed.append(refused[0])
        return refused

    app.state.shed = watched
    with serving(app) as client, ThreadPoolExecutor(2) as pool:
        found = Full(client, engine)
        running = pool.submit(post, client, "label=cat&n=8")
        engine.started.acquire()
        waiting = pool.submit(post, client, "label=cat&n=1024")
        wait_until(client, "cgan_queue_rows", 1024)
        assert post(client, "label=cat&n=17").status_code == 429
        assert found.shed == []  # the first one was an ordinary request
        try:
            yield found
        finally:
            engine.gate.set()
            assert running.result().status_code == 200
            assert waiting.result().status_code == 200


def test_the_refusal_at_the_door_is_the_one_of_the_app(full: Full) -> None:
    query = "label=cat&label=dog&n=20"
    shed = full.client.post(f"/generate?{query}")
    assert full.shed == [429]
    asked_closely = full.client.post(f"/generate?{query}&scale=2")
    assert full.shed == [429]
    for answer in (shed, asked_closely):
        assert answer.status_code == 429
        assert int(answer.headers["Retry-After"]) >= 1
        assert answer.json()["request_id"] == answer.headers["X-Request-ID"]
        assert answer.json()["type"] == "urn:cgan:problem:overloaded"
    assert list(shed.headers) == list(asked_closely.headers)
    own = [each.json() | {"request_id": None} for each in (shed, asked_closely)]
    assert own[0] == own[1]


def test_it_is_counted_and_logged_as_any_request(
    full: Full, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "service.middleware.auth")
    full.client.post("/generate?label=cat&n=20", headers={"X-Request-ID": "mine"})
    assert full.shed == [429]
    line = 'cgan_requests_total{method="POST",route="/generate",status="429"}'
    assert metric(full.client, line) == 2
    assert metric(full.client, 'cgan_rejections_total{reason="overloaded"}') == 2
    (record,) = [each for each in caplog.records if each.__dict__["fields"]["status"] == 429]
    fields = record.__dict__["fields"]
    assert fields["request_id"] == "mine"
    assert (fields["method"], fields["path"]) == ("POST", "/generate")
    assert fields["query"] == "label=cat&n=20"


@pytest.mark.parametrize(
    ("query", "status"),
    [
        ("label=wolf&n=20", 422),
        ("label=cat&n=1025", 422),
        ("label=cat&n=20&frogs=1", 422),
        ("label=cat&n=20&model=other", 404),
        ("label=cat&n=20&scale=17", 422),
        ("mix=cat:1&n=20", 429),
        ("label=cat&to_seed=1&steps=20", 429),
        ("label=cat&n=20#x", 429),
    ],
)
def test_what_is_wrong_or_not_plain_is_looked_at_closely(
    full: Full, query: str, status: int
) -> None:
    assert full.client.post(f"/generate?{query}").status_code == status
    assert full.client.post("/generate", headers={"Accept": "text/html"}).status_code != 429
    assert full.shed == ([429] if query.endswith("#x") else [])  # a client sends no fragment


@pytest.mark.parametrize(
    ("headers", "status"), [({"Accept": "text/html"}, 406), ({"Connection": "close"}, 429)]
)
def test_so_is_what_has_to_be_negotiated_or_closed(
    full: Full, headers: dict[str, str], status: int
) -> None:
    answer = full.client.post("/generate?label=cat&n=20", headers=headers)
    assert answer.status_code == status
    assert full.shed == []


def test_so_are_bodies_and_other_methods(full: Full) -> None:
    body = full.client.post("/generate", json={"label": "cat", "n": 20})
    both = full.client.post("/generate?label=cat&n=20", json={"label": "cat"})
    get = full.client.get("/generate?label=cat&n=20")
    assert [each.status_code for each in (body, both, get)] == [429, 422, 429]
    assert full.shed == []


def test_what_still_finds_room_is_admitted_and_opens_the_door(full: Full) -> None:
    with ThreadPoolExecutor(1) as pool:
        small = pool.submit(post, full.client, "label=cat&n=2")
        wait_until(full.client, "cgan_queue_rows", 1026)
        full.engine.gate.set()
        assert small.result().status_code == 200
    assert post(full.client, "label=cat&n=20").status_code == 200
    assert full.shed == []


def test_requests_that_come_together_are_refused_one_after_the_other(full: Full) -> None:
    requests = b"".join(
        b"POST /generate?label=cat&n=20 HTTP/1.1\r\nHost: t\r\nX-Request-ID: r%d\r\n\r\n" % number
        for number in range(5)
    )
    answers = full.exchange(requests, until=5)
    assert [answer.status for answer in answers] == [429] * 5
    assert [answer.problem["request_id"] for answer in answers] == [f"r{n}" for n in range(5)]
    assert full.shed == [429] * 5


def test_no_refusal_overtakes_an_answer_on_its_connection(full: Full) -> None:
    one = b"POST /generate?label=cat&n=%d&format=json HTTP/1.1\r\nHost: t\r\n\r\n"
    with ThreadPoolExecutor(1) as pool:
        both = pool.submit(full.exchange, one % 1 + one % 20, 2)
        wait_until(full.client, "cgan_queue_rows", 1025)
        full.engine.gate.set()
        first, second = both.result()
    assert first.status == 200
    assert len(json.loads(first.body)["images"]) == 1
    assert second.status in {200, 429}  # by then there may be room
    assert full.shed == []


def test_nobody_is_refused_at_the_door_before_a_key_was_seen(small_artifact: Artifact) -> None:
    registry = ModelRepository([Model("small", GatedEngine(small_artifact))], "small")
    keys = Settings(api_keys="alice:a-secret-of-16-or-more")
    assert create_app(keys, registry).state.shed is None
    assert create_app(Settings(), registry).state.shed is not None


@pytest.mark.parametrize(
    ("target", "plain"),
    [
        (b"/generate?label=7", Plain(["7"], 1, None, None)),
        (b"/generate?label=7&seed=3&truncation=0.5", Plain(["7"], 1, None, None)),
        (
            b"/generate?label=7&label=3&n=4&model=m&timeout_ms=50&format=zip",
            Plain(["7", "3"], 4, "m", 0.05),
        ),
        (b"/generate", None),
        (b"/generate/?label=7", None),
        (b"/dataset?label=7", None),
        (b"/generate?label=7&index=5", None),
        (b"/generate?label=7&n=1025", None),
        (b"/generate?label=7&label=8&n=1000", None),
        (b"/generate?label=7#label=8", None),
        (b"/generate?label=7&at=0.5", None),
        (b"/generate?mix=7:1", None),
        (b"/generate?label=7&scale=2", None),
    ],
)
def test_only_plain_targets_are_read_at_the_door(target: bytes, plain: Plain | None) -> None:
    assert read_plain(target, None) == plain


@pytest.mark.parametrize(
    ("head", "plain"),
    [
        (b"POST /generate?label=7 HTTP/1.1\r\nHost: t", True),
        (b"\r\nPOST /generate?label=7 HTTP/1.1\r\nHost: t\r\nContent-Length: 0", True),
        (b"POST /generate?label=7 HTTP/1.1\r\nAccept: image/png", True),
        (b"POST /generate?label=7 HTTP/1.1\r\nAccept: text/html", False),
        (b"POST /generate?label=7&format=zip HTTP/1.1\r\nAccept: text/html", True),
        (b"POST /generate?label=7 HTTP/1.1\r\nConnection: close", False),
        (b"POST /generate?label=7 HTTP/1.1\r\nConnection: close\r\nContent-Length: 0", False),
        (b"POST /generate?label=7 HTTP/1.0\r\nConnection: keep-alive", False),
        (b"GET /generate?label=7 HTTP/1.1\r\nHost: t", False),
        (b"POST /generate?label=7 HTTP/1.1\r\nContent-Length: 1", False),
        (b"POST /generate?label=7 HTTP/1.1\r\nTransfer-Encoding: chunked", False),
        (b"POST /generate?label=7 HTTP/1.1\r\nExpect: 100-continue", False),
        (b"POST /generate?label=7 HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: h2c", False),
        (b"POST /generate?label=7 HTTP/1.1\r\nHost t", False),
        (b"POST /generate?label=7 HTTP/1.1" + b"\r\nA: b" * 65, False),
        (b"POST /generate?label=7", False),
        (b"POST /generate?label=7 HTTP/1.1\n\nPOST /generate?label=7 HTTP/1.1", False),
        (b"", False),
    ],
)
def test_only_whole_and_simple_requests_are_read_at_the_door(head: bytes, plain: bool) -> None:
    assert (read_head(head) is not None) == plain


def test_what_is_read_of_a_head_is_its_query_and_its_headers() -> None:
    found = read_head(b"POST /generate?label=7&n=2 HTTP/1.1\r\nHOST: t\r\nX-Request-ID: Mine")
    assert found is not None
    assert found.asked == Plain(["7"], 2, None, None)
    assert found.query == b"label=7&n=2"
    assert found.headers == [(b"host", b"t"), (b"x-request-id", b"Mine")]


def test_a_long_head_is_looked_at_closely(full: Full) -> None:
    for length, shed in ((1000, [429]), (3000, [429])):
        answer = full.client.post("/generate?label=cat&n=20", headers={"X-Long": "a" * length})
        assert answer.status_code == 429
        assert full.shed == shed


def test_a_request_that_comes_in_parts_is_refused_like_any_other(full: Full) -> None:
    url = full.client.base_url
    first = b"GET /nowhere HTTP/1.1\r\nHost: t\r\n\r\n"  # an answer says that the service listens
    with socket.create_connection((url.host, url.port), timeout=60) as wire:
        received = exchange(wire, first)
        wire.sendall(b"POST /generate?label=cat&n=20 HT")
        wait_until(full.client, "cgan_queue_rows", 1024)  # a round of the loop at least
        received += exchange(wire, b"TP/1.1\r\nHost: t\r\n\r\n")
    assert [answer.status for answer in parse(received)] == [404, 429]
    assert full.shed == []


def test_what_follows_a_refusal_on_its_connection_is_answered(full: Full) -> None:
    one = b"POST /generate?label=cat&n=20 HTTP/1.1\r\nHost: t\r\n\r\n"
    wrong = b"POST /generate?label=wolf HTTP/1.1\r\nHost: t\r\n\r\n"
    answers = full.exchange(one + wrong + one, until=3)
    assert [answer.status for answer in answers] == [429, 422, 429]
    assert full.shed == [429]
