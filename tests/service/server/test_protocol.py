import asyncio
import http.client
import json
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from service.server.protocol import (
    MAX_PIPELINED,
    MAX_UNREAD_BYTES,
    WriteCoalescingTransport,
    enforce_timeouts,
)
from tests.conftest import make_artifact
from tests.support.serving import ServiceProcess
from tests.support.wire import LAST, TIMEOUT_S, Client, address, ask, drain, wait_until


class Transport:
    """Remembers what it is told to do."""

    def __init__(self) -> None:
        self.calls: list[object] = []
        self.closing = False

    def write(self, data: bytes) -> None:
        self.calls.append(data)

    def write_eof(self) -> None:
        self.calls.append("end")

    def resume_reading(self) -> None:
        self.calls.append("read on")

    def close(self) -> None:
        self.calls.append("close")
        self.closing = True

    def is_closing(self) -> bool:
        return self.closing

    def get_extra_info(self, name: str) -> str:
        return f"the {name}"


def calls_after(act: Callable[[WriteCoalescingTransport], None]) -> list[object]:
    """Return the calls of a transport one turn of the event loop after `act`."""

    async def scene() -> list[object]:
        transport = Transport()
        act(WriteCoalescingTransport(cast(Any, transport), asyncio.get_running_loop()))
        await asyncio.sleep(0)
        return transport.calls

    return asyncio.run(scene())


def test_what_is_written_in_one_turn_is_sent_together() -> None:
    def act(joining: WriteCoalescingTransport) -> None:
        for part in (b"head", b"body", b""):
            joining.write(part)

    assert calls_after(act) == [b"headbody"]


def test_closing_sends_first_what_is_left() -> None:
    def act(joining: WriteCoalescingTransport) -> None:
        joining.write(b"last words")
        joining.close()

    assert calls_after(act) == [b"last words", "read on", "end"]


def test_nothing_is_sent_after_the_end() -> None:
    def act(joining: WriteCoalescingTransport) -> None:
        joining.close()
        joining.close()
        joining.write(b"too late")
        assert joining.is_closing()

    assert calls_after(act) == ["read on", "end"]


def test_nothing_is_sent_to_a_client_that_has_gone() -> None:
    def act(joining: WriteCoalescingTransport) -> None:
        joining.write(b"too late")
        joining._transport.close()

    assert calls_after(act) == ["close"]


def test_all_else_is_the_transports_own() -> None:
    async def scene() -> object:
        joining = WriteCoalescingTransport(cast(Any, Transport()), asyncio.get_running_loop())
        return joining.get_extra_info("peername")

    assert asyncio.run(scene()) == "the peername"


def test_answers_of_one_connection_come_whole_and_in_order(service: ServiceProcess) -> None:
    for label in range(10):
        answer = service.client.post(f"/generate?label={label}&n=1000&seed=1&format=zip")
        assert len(answer.content) == int(answer.headers["Content-Length"])
        assert answer.content.startswith(b"PK")


# Slow clients ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def strict(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    """A service that waits a second for its clients."""
    path = make_artifact(tmp_path_factory.mktemp("weights") / "small.safetensors")
    patient = ("--max-queue-images", "1000000", "--timeout-s", "60")
    arguments = ("--models", str(path), "--client-timeout-s", "1", *patient)
    with ServiceProcess(*arguments) as running:
        yield running
        assert healthy(running)
        running.signal()
        assert running.wait() == 0
    lines = [json.loads(line) for line in running.errors]
    assert [line for line in lines if line["level"] != "info" or line.get("status") == 500] == []


def healthy(service: ServiceProcess) -> bool:
    return all(answer.status == 200 for answer in ask(service, GOOD))


GOOD = b"POST /generate?label=cat HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n"
LARGE = b"POST /generate?label=cat&n=1024&scale=8&format=json HTTP/1.1\r\nHost: test\r\n\r\n"


def test_slow_clients_are_closed_while_the_others_are_served(strict: ServiceProcess) -> None:
    memory_before = memory(strict)
    silent, dripping = [Client(strict) for _ in range(100)], [begin(strict) for _ in range(100)]
    much = LARGE * 4  # asks for more than the system keeps for a connection
    deaf = [begin(strict, much, window=4096) for _ in range(10)]
    clients = [*silent, *dripping, *deaf]
    began, sent = time.monotonic(), 1
    while kept(strict, clients):
        elapsed = time.monotonic() - began
        assert elapsed < TIMEOUT_S, "some were never closed"
        if elapsed > 0.1 * sent:  # ten bytes a second, of a head that has more than ten
            for client in dripping:
                client.send(GOOD[sent : sent + 1])
            sent += 1
        assert healthy(strict)
        assert memory(strict) - memory_before < MAX_UNREAD_BYTES
    drain(clients)
    assert {bytes(client.received) for client in silent} == {b""}
    for client in dripping:
        (answer,) = client.answers()
        assert answer.status == 408
        assert "within 1 s" in answer.problem["detail"]
    for client in deaf:
        assert client.received.startswith(b"HTTP/1.1 200 OK\r\n"), bytes(client.received[:1000])
        with pytest.raises(http.client.IncompleteRead):
            client.answers()


def begin(service: ServiceProcess, data: bytes = GOOD[:1], window: int | None = None) -> Client:
    """A client that sends something at once: one that has sent nothing is closed without a word."""
    client = Client(service, window)
    client.send(data)
    return client


def kept(service: ServiceProcess, clients: list[Client]) -> int:
    """Return the number of connections of these clients that a service has or will accept."""
    port, theirs = address(service)[1], {each.socket.getsockname()[1] for each in clients}
    found = 0
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        local, remote, state = fields[1:4]
        ends = int(local.rpartition(":")[2], 16), int(remote.rpartition(":")[2], 16)
        # What only the system has, to send the rest of it, is nobody's and is closing.
        is_open = fields[9] != "0" or state in {"01", "08"}
        found += ends[0] == port and ends[1] in theirs and is_open
    return found


def memory(service: ServiceProcess) -> int:
    """Resident bytes."""
    pages = Path(f"/proc/{service.process.pid}/statm").read_text().split()[1]
    return int(pages) * resource.getpagesize()


def test_a_connection_that_is_not_used_again_is_closed(strict: ServiceProcess) -> None:
    (answer,) = ask(strict, b"GET /livez HTTP/1.1\r\nHost: test\r\n\r\n")
    assert answer.status == 200
    assert "connection" not in answer.headers


def test_a_body_that_does_not_come_ends_the_connection(strict: ServiceProcess) -> None:
    (answer,) = ask(strict, b"POST /generate?label=cat HTTP/1.1\r\nContent-Length: 5\r\n\r\nab")
    assert answer.status == 422  # and no second answer


def test_time_that_the_service_takes_is_not_the_clients(strict: ServiceProcess) -> None:
    patient = ("--client-timeout-s", "1", "--timeout-s", "60")
    with ServiceProcess(*patient, "--max-batch", "1", "--dtype", "float32") as slow:
        client = Client(slow)
        for _ in range(3):
            client.send(b"POST /generate?label=7&n=1024&format=json HTTP/1.1\r\n\r\n")
        client.send(LAST)
        answers = client.wait()
    assert [answer.status for answer in answers] == [200] * 4


class FakeConnection:
    """A connection whose client has yet to read some bytes."""

    def __init__(self, unread: int) -> None:
        self.unread, self.transport, self.aborted = unread, self, False
        self.checked_at: list[float] = []

    def check_timeout(self, now: float) -> int:
        self.checked_at.append(now)
        return self.unread

    def abort(self) -> None:
        self.aborted = True


def test_responses_that_are_not_read_hold_a_bounded_part_of_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("service.server.protocol.MAX_UNREAD_BYTES", 100)
    connections = [FakeConnection(unread) for unread in (0, 70, 20, 60, 10)]
    asyncio.run(enforce_timeouts(cast(Any, connections), lambda: 0.0))
    assert [each.aborted for each in connections] == [False, True, False, False, False]
    asyncio.run(enforce_timeouts(cast(Any, connections[2:]), lambda: 0.0))
    assert not connections[3].aborted


def test_many_connections_are_checked_in_batches_between_turns_of_the_loop() -> None:
    connections = [FakeConnection(0) for _ in range(100)]
    clock = iter(range(1000))

    async def scenario() -> tuple[int, FakeConnection]:
        check = asyncio.ensure_future(enforce_timeouts(cast(Any, connections), lambda: next(clock)))
        await asyncio.sleep(0)
        checked = sum(bool(each.checked_at) for each in connections)
        lost = connections.pop()
        await check
        return checked, lost

    checked, lost = asyncio.run(scenario())
    assert 0 < checked < 20
    assert [each.checked_at for each in connections] == [[number] for number in range(99)]
    assert not lost.checked_at


# Bounds ------------------------------------------------------------------------------------------


def test_connections_beyond_the_limit_are_told_so(tmp_path: Path) -> None:
    path = make_artifact(tmp_path / "small.safetensors")
    with ServiceProcess("--models", str(path), "--max-connections", "5") as service:
        clients = [Client(service) for _ in range(5)]
        for client in clients:
            client.send(b"GET /livez HTTP/1.1\r\n\r\n")
            client.receive()
        (answer,) = ask(service, LAST)
        assert answer.status == 503
        assert answer.headers["retry-after"] == "1"
        assert answer.problem["type"] == "urn:cgan:problem:too-many-connections"
        clients[0].send(LAST)
        assert [each.status for each in clients[0].wait()] == [200, 200]
        wait_until(lambda: ask(service, LAST)[0].status == 200, "there is room again")
        for client in clients[1:]:
            client.send(LAST)
        drain(clients[1:])


A = b"a" * 70_000
UPGRADES = (
    b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n",
    b"Upgrade: websocket\r\nConnection: keep-alive, Upgrade\r\n",
)


@pytest.mark.parametrize(
    ("request_", "status", "kind"),
    [
        (b"GET /" + A + b" HTTP/1.1\r\n\r\n", 414, "target-too-long"),
        (b"GET /" + A, 414, "target-too-long"),
        (b"GET /?" + A, 414, "target-too-long"),
        (b"GET / HTTP/1.1\r\nA: " + A + b"\r\n\r\n", 431, "head-too-large"),
        (b"GET / HTTP/1.1\r\n" + A + b": a\r\n\r\n", 431, "head-too-large"),
        (b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 129 + b"\r\n", 431, "head-too-large"),
        (b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 130, 431, "head-too-large"),
        (b"POST /models HTTP/1.1\r\nContent-Length: 1048577\r\n\r\n", 413, "body-too-large"),
        (b"POST /generate?label=cat HTTP/1.1\r\nContent-Length: 99999999\r\n\r\n" + A, 413, None),
        (b"GET /livez HTTP/2.0\r\n\r\n", 505, "http-version"),
        (b"GET /livez\r\n\r\n", 505, "http-version"),
        (b"GET /livez HTTP/1.1\nHost: test\n\n", 400, "malformed-request"),
        (b"get /livez HTTP/1.1\r\n\r\n", 400, "malformed-request"),
        (b"GET /\xff HTTP/1.1\r\n\r\n", 400, "malformed-request"),
        (b"GET /livez HTTP/1.1\r\nA: \x00\r\n\r\n", 400, "malformed-request"),
        (b"CONNECT test:80 HTTP/1.1\r\n\r\n", 400, "malformed-request"),
        (b"CONNECT /livez HTTP/1.1\r\n\r\n", 400, "malformed-request"),
        (b"CONNECT * HTTP/1.1\r\n" + UPGRADES[0] + b"\r\n", 400, "malformed-request"),
        (b"POST / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\na", 400, None),
        (b"POST / HTTP/1.1\r\nContent-Length: -1\r\n\r\na", 400, None),
        (
            b"POST / HTTP/1.1\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            400,
            None,
        ),
        (
            b"POST /generate?label=cat HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nno\r\n",
            400,
            "malformed-request",
        ),
    ],
)
def test_what_breaks_a_bound_or_is_no_http_is_a_problem_after_the_answers_that_are_due(
    strict: ServiceProcess, request_: bytes, status: int, kind: str | None
) -> None:
    due = b"POST /generate?label=cat&n=20 HTTP/1.1\r\n\r\n"
    for before, count in ((b"", 0), (due, 1), (due * 3, 3)):
        *earlier, answer = ask(strict, before + request_)
        assert [each.status for each in earlier] == [200] * count
        assert answer.status == status
        assert answer.headers["connection"] == "close"
        assert kind is None or answer.problem["type"] == f"urn:cgan:problem:{kind}"


def test_a_request_in_the_place_of_a_connection_is_counted_and_logged(
    strict: ServiceProcess,
) -> None:
    ask(strict, b"rubbish\r\n\r\n")
    counted = 'cgan_requests_total{method="any",route="unmatched",status="400"}'
    assert counted in strict.client.get("/metrics").text


def test_headers_of_proxies_are_not_trusted(strict: ServiceProcess) -> None:
    headers = {"X-Forwarded-For": "203.0.113.7", "X-Request-ID": "forwarded"}
    strict.client.get("/models", headers=headers).raise_for_status()

    def clients() -> list[str]:
        lines = map(json.loads, list(strict.errors))
        return [line["client"] for line in lines if line.get("request_id") == "forwarded"]

    wait_until(lambda: bool(clients()), "it is logged")
    assert clients() == ["127.0.0.1"]


def test_a_body_in_chunks_without_end_is_not_kept(strict: ServiceProcess) -> None:
    before = memory(strict)
    for path, status in (("/generate?label=cat", 422), ("/livez", 200)):
        client = Client(strict)
        method = "GET" if status == 200 else "POST"
        client.send(f"{method} {path} HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
        for _ in range(500):
            client.send(b"10000\r\n" + b"x" * 0x10000 + b"\r\n")
        (answer,) = client.wait()
        assert answer.status == status
    assert memory(strict) - before < 16 << 20


def test_a_small_body_leaves_the_connection_in_order(strict: ServiceProcess) -> None:
    body = b"POST /generate?label=cat HTTP/1.1\r\nContent-Length: 3\r\n\r\nGET"
    assert [answer.status for answer in ask(strict, body, body, LAST)] == [422, 422, 200]


def test_a_client_that_waits_for_100_is_refused_before_it_sends(strict: ServiceProcess) -> None:
    head = b"POST /generate?label=cat HTTP/1.1\r\nContent-Length: 3\r\nExpect: 100-continue\r\n\r\n"
    for more in (b"", b"abc" + LAST):
        (answer,) = ask(strict, head + more)
        assert answer.status == 422
        assert answer.headers["connection"] == "close"


JSON = b'{"label": "cat", "n": 3, "seed": 5}'
IN_CHUNKS = b"5\r\n" + JSON[:5] + b"\r\n%x\r\n" % len(JSON[5:]) + JSON[5:] + b"\r\n0\r\n\r\n"
WITH_BODY = (
    b"Content-Length: %d\r\n\r\n" % len(JSON) + JSON,
    b"Transfer-Encoding: chunked\r\n\r\n" + IN_CHUNKS,
)


@pytest.mark.parametrize("upgrade", UPGRADES)
@pytest.mark.parametrize("body", WITH_BODY)
def test_a_request_that_offers_an_upgrade_is_read_as_one_that_does_not(
    strict: ServiceProcess, upgrade: bytes, body: bytes
) -> None:
    head = b"POST /generate HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\n"
    expected = ask(strict, head + body + LAST)[0].gist
    offers = head + upgrade + body
    for stream in (offers + LAST, offers * 3 + head + body + offers + LAST):
        *answers, last = ask(strict, stream)
        assert last.status == 200
        assert {each.gist for each in answers} == {expected}
        assert all("connection" not in each.headers for each in answers)
    assert expected[0] == 200


@pytest.mark.parametrize("upgrade", UPGRADES)
def test_an_offer_without_a_body_leaves_the_connection_open(
    strict: ServiceProcess, upgrade: bytes
) -> None:
    offer = b"GET /livez HTTP/1.1\r\n" + upgrade + b"\r\n"
    assert [each.status for each in ask(strict, offer * 2 + LAST)] == [200] * 3
    *_, answer = ask(strict, offer.replace(b"HTTP/1.1", b"HTTP/1.0"))
    assert (answer.status, answer.headers["connection"]) == (200, "close")
    first, second = ask(strict, offer, b"\x81\x85")  # not HTTP, although nothing was accepted
    assert (first.status, second.status) == (200, 400)


def test_an_offer_is_held_to_the_bounds_of_every_request(strict: ServiceProcess) -> None:
    head = b"POST /generate HTTP/1.1\r\n" + UPGRADES[0]
    for rest, status in (
        (b"Content-Length: 1048577\r\n\r\n", 413),
        (b"A: " + A + b"\r\n\r\n", 431),
        (b"Transfer-Encoding: chunked\r\n\r\nno\r\n", 400),
    ):
        (answer,) = ask(strict, head + rest)
        assert answer.status == status


@pytest.mark.parametrize(
    "target", ["/generate?label=猫", "/猫", "/generate?label=ankle boot", "/a\tb", "猫"]
)
def test_a_target_that_is_not_encoded_is_told_how_to_encode_it(
    strict: ServiceProcess, target: str
) -> None:
    (answer,) = ask(strict, f"GET {target} HTTP/1.1\r\nHost: test\r\n\r\n".encode())
    assert answer.status == 400
    assert "percent-encoded" in answer.problem["detail"]
    assert "curl -G --data-urlencode 'label=猫'" in answer.problem["detail"]


def test_http_2_without_an_upgrade_is_505(strict: ServiceProcess) -> None:
    (answer,) = ask(strict, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
    assert answer.status == 505


def test_pipelined_requests_are_answered_in_order_up_to_a_bound(strict: ServiceProcess) -> None:
    mixed = [
        f"POST /generate?label={label}&n={n}&seed=1 HTTP/1.1\r\nHost: test\r\n\r\n".encode()
        for label, n in (("cat", 500), ("dog", 1), ("none", 1), ("emu", 50))
    ]
    alone = [ask(strict, each, LAST)[0].gist for each in mixed]
    together = ask(strict, b"".join(mixed) * 3 + LAST)
    assert [each.gist for each in together[:-1]] == alone * 3
    answers = ask(strict, b"GET /livez HTTP/1.1\r\n\r\n" * 5000)
    assert [answer.status for answer in answers] == [200] * (MAX_PIPELINED + 1) + [429]


# Whatever comes ----------------------------------------------------------------------------------

ENDING = [
    GOOD,
    LAST,
    LAST + LAST,
    b"\r\n\r\n" + LAST,
    b"GET /livez HTTP/1.1\r\nHost: test\r\n\r\nPOST /generate?label=dog&seed=3 HTTP/1.0\r\n\r\n",
    b"POST /generate?label=cat HTTP/1.1\r\nContent-Length: 4\r\n\r\nGET " + LAST,
    b"POST /generate HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n0\r\nT: x\r\n\r\n"
    + LAST,
    b"GET http://elsewhere/livez HTTP/1.1\r\nConnection: close\r\n\r\n",
    b"GET /livez HTTP/1.1\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n" + LAST,
    b"GET /livez HTTP/1.1\r\nHost: test\nA: b\r\n\r\n",
    b"GET /%ff%00?label=\xc3\xa9 HTTP/1.1\r\n\r\n",
    b"POST /generate HTTP/1.1\r\nContent-Type: application/json\r\n"
    + UPGRADES[0]
    + WITH_BODY[1]
    + LAST,
]


@pytest.mark.parametrize("stream", ENDING)
def test_it_does_not_matter_where_a_stream_is_split(strict: ServiceProcess, stream: bytes) -> None:
    stream = stream.replace(b"label=cat", b"label=cat&seed=5")
    whole = [answer.gist for answer in ask(strict, stream)]
    assert whole
    clients = [Client(strict) for _ in stream]  # the last one gets a byte at a time
    for count, client in enumerate(clients[:-1], start=1):
        client.send(stream[:count])
    for byte in stream:
        clients[-1].send(bytes([byte]))
        assert len(clients) > 1
    for count, client in enumerate(clients[:-1], start=1):
        client.send(stream[count:])
    drain(clients)
    for client in clients:
        assert [answer.gist for answer in client.answers()] == whole


def lines(*choices: bytes) -> st.SearchStrategy[bytes]:
    return st.sampled_from(choices) | st.binary(max_size=12)


TARGETS = lines(
    *(
        b"/livez",
        b"/generate?label=cat",
        b"/generate?label=%ff&n=2",
        b"/docs",
        b"*",
        b"//",
        b"/../",
    ),
    *(
        b"http://elsewhere/livez",
        b"http://[",
        b"/\xc3\xa9",
        b"/%00",
        b"/a" * 9000,
        b"?",
        b"/#",
        b"",
    ),
)
HEADERS = lines(
    *(b"Host: test", b"Content-Length: 3", b"Content-Length: 3, 3", b"Content-Length: +3"),
    *(b"Transfer-Encoding: chunked", b"Transfer-Encoding: gzip, chunked", b"Connection: close"),
    *(b"Connection: upgrade", b"Upgrade: websocket", b"Expect: 100-continue", b"Accept: \xff"),
    *(
        b"X-Request-ID: \xff",
        b" folded",
        b"A : b",
        b"A: \x00",
        b": b",
        b"A: " + A,
        b"a: b\r\n" * 200,
    ),
)
REQUESTS = st.builds(
    lambda method, target, version, headers, end, body: end.join(
        (b" ".join((method, target, version)), *headers, b"", body)
    ),
    lines(*(b"GET", b"POST", b"HEAD", b"OPTIONS", b"get", b"BREW", b"CONNECT", b"PRI", b"\x00")),
    TARGETS,
    lines(*(b"HTTP/1.1", b"HTTP/1.0", b"HTTP/0.9", b"HTTP/2.0", b"HTTP/1.12", b"")),
    st.lists(HEADERS, max_size=5),
    st.sampled_from((b"\r\n", b"\r\n", b"\n", b"\r")),
    lines(*(b"", b"abc", b"3\r\nabc\r\n0\r\n\r\n", b"zz\r\n", b"fffffffffffffffff\r\n", b"-1\r\n")),
)
STREAMS = st.tuples(st.lists(REQUESTS, max_size=4).map(b"".join), st.integers(0, 400))


@settings(max_examples=4, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(STREAMS, min_size=60, max_size=120))
def test_whatever_is_sent_is_answered_in_http_or_not_at_all_and_ends(
    strict: ServiceProcess, streams: list[tuple[bytes, int]]
) -> None:
    clients = [Client(strict) for _ in streams]
    for client, (stream, split) in zip(clients, streams, strict=True):
        client.send(stream[:split])
    for client, (stream, split) in zip(clients, streams, strict=True):
        client.send(stream[split:])
    drain(clients)
    for client, (stream, _) in zip(clients, streams, strict=True):
        assert not client.was_reset
        if b"HEAD" in stream:  # http.client would have to know which answers have no body
            continue
        for answer in client.answers():
            assert answer.status in {
                200,
                307,
                400,
                404,
                405,
                406,
                408,
                413,
                414,
                422,
                429,
                431,
                505,
            }
            if answer.status >= 400:
                assert answer.problem["detail"]
    assert healthy(strict)
