"""Clients that disconnect, which is never an error of the service."""

import gc
import logging
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass

import httpx
import pytest

from service.app import create_app
from service.disconnect import CLIENT, Client, client_of
from service.inference.repository import Model, ModelRepository
from service.settings import Settings
from tests.support.clients import metric
from tests.support.engines import GatedEngine
from tests.support.serving import serving
from tests.support.wire import wait_until
from training.artifact import Artifact


def test_a_connection_raises_the_flag_of_the_request_it_carries() -> None:
    client = Client()
    calls: list[bool] = []
    client.on_disconnect = lambda: calls.append(client.disconnected)
    assert client_of({CLIENT: client}) is client
    client.disconnect()
    assert calls == [True]


def test_under_a_foreign_server_no_client_disconnects() -> None:
    client = client_of({"type": "http"})
    assert not client.disconnected


# On a real socket --------------------------------------------------------------------------------

LAST_INDEX = 99  # of the images of each class of a data set
SENT_FIRST = 85  # images of each class: 255 of 3 classes, in a batch of up to 256
DATASET = f"GET /dataset?per_class={LAST_INDEX + 1}&seed=1&format={{}} HTTP/1.1\r\nHost: test\r\n"
FORMATS = ("zip", "webdataset", "idx", "npz")
FIN, RST = b"", struct.pack("ii", 1, 0)  # of SO_LINGER


class Log(logging.Handler):
    """Keeps the records of this process."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)

    def above_info(self) -> list[str]:
        return [each.getMessage() for each in self.records if each.levelno > logging.INFO]

    def statuses(self) -> list[int]:
        """The statuses of all requests that are logged."""
        lines = [each for each in self.records if each.name == "service.access"]
        return [each.__dict__["fields"]["status"] for each in lines]


@dataclass
class Watched:
    """A service whose engine can be held, and its log."""

    client: httpx.Client
    engine: GatedEngine
    log: Log

    def count(self) -> float:
        return metric(self.client.get("/metrics").text, "cgan_requests_total", '"499"')

    def held(self) -> None:
        """Wait until the engine is held."""
        assert self.engine.started.acquire(timeout=60)


@pytest.fixture(scope="module")
def server(small_artifact: Artifact) -> Iterator[Watched]:
    engine, log, root = GatedEngine(small_artifact), Log(), logging.getLogger()
    settings = Settings(timeout_s=60, self_test_interval_s=3600.0)
    app = create_app(settings, ModelRepository([Model("small", engine)], "small"))
    level = root.level
    root.setLevel(logging.INFO)
    root.addHandler(log)
    with serving(app) as client:
        yield Watched(client, engine, log)
        engine.gate.set()
    gc.collect()  # a task whose exception nobody reads logs it at its end
    root.removeHandler(log)
    root.setLevel(level)
    assert log.above_info() == []


@pytest.fixture
def watched(server: Watched) -> Iterator[Watched]:
    """The service; what it logs of a client that leaves is one line with status 499."""
    server.engine.gate.clear()
    server.engine.held_from = 0
    server.log.records.clear()
    before = server.count()
    yield server
    server.engine.gate.set()
    assert server.client.post("/generate?label=cat").status_code == 200
    assert server.log.above_info() == []
    assert server.log.statuses().count(499) == 1
    assert server.count() == before + 1


class Leaver:
    """A client on a raw socket."""

    def __init__(self, watched: Watched, request: str) -> None:
        self.watched = watched
        self.socket = socket.socket()
        self.socket.settimeout(60)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        url = watched.client.base_url
        self.socket.connect((url.host, url.port))
        self.socket.sendall(request.encode())

    def leave(self, how: bytes) -> None:
        """Close the connection, with a FIN or an RST, and wait until status 499 is logged."""
        before = self.watched.count()
        if how == RST:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RST)
        self.socket.close()
        wait_until(lambda: self.watched.count() > before, "status 499 is counted")
        self.watched.client.get("/livez")  # answered after the line is written


ways = pytest.mark.parametrize("how", [FIN, RST], ids=["FIN", "RST"])


@ways
@pytest.mark.parametrize("dataset_format", FORMATS)
@pytest.mark.parametrize("index", [0, SENT_FIRST, LAST_INDEX])
def test_who_leaves_a_data_set_is_499_in_the_log_at_whichever_image(
    watched: Watched, dataset_format: str, index: int, how: bytes
) -> None:
    watched.engine.held_from = index
    leaver = Leaver(watched, DATASET.format(dataset_format) + "\r\n")
    watched.held()
    if index >= SENT_FIRST:
        assert leaver.socket.recv(12) == b"HTTP/1.1 200"
    leaver.leave(how)


@ways
@pytest.mark.parametrize("dataset_format", ["zip", "npz"])
def test_who_leaves_while_a_file_is_made_again_for_its_checksums_is_499_in_the_log(
    watched: Watched, dataset_format: str, how: bytes
) -> None:
    watched.engine.held_from = LAST_INDEX
    leaver = Leaver(watched, DATASET.format(dataset_format) + "Range: bytes=-40\r\n\r\n")
    watched.held()
    leaver.leave(how)


@ways
def test_who_leaves_images_is_499_in_the_log(watched: Watched, how: bytes) -> None:
    leaver = Leaver(watched, "POST /generate?label=cat&n=8 HTTP/1.1\r\nHost: test\r\n\r\n")
    watched.held()
    leaver.leave(how)


@ways
def test_who_pipelines_data_sets_and_leaves_is_499_in_the_log(watched: Watched, how: bytes) -> None:
    watched.engine.held_from = LAST_INDEX
    leaver = Leaver(watched, (DATASET.format("idx") + "\r\n") * 3)
    watched.held()
    leaver.leave(how)


@ways
@pytest.mark.parametrize(
    ("path", "content_type"),
    [
        ("/generate", "application/json"),
        ("/verify", "image/png"),
        ("/v1/images/generations", "application/json"),
        ("/v2/models/small/infer", "application/json"),
    ],
)
@pytest.mark.parametrize(
    "body", ["Content-Length: 1000\r\n", "Transfer-Encoding: chunked\r\n", "gzip"]
)
def test_who_leaves_in_the_middle_of_a_body_is_499_in_the_log(
    watched: Watched, path: str, content_type: str, body: str, how: bytes
) -> None:
    head = f"POST {path} HTTP/1.1\r\nHost: test\r\nContent-Type: {content_type}\r\n"
    length = "Content-Length: 1000\r\nContent-Encoding: gzip\r\n" if body == "gzip" else body
    leaver = Leaver(watched, f"{head}{length}Expect: 100-continue\r\n\r\n")
    assert leaver.socket.recv(12) == b"HTTP/1.1 100"  # it waits for the body
    leaver.socket.sendall(b'5\r\n{"lab')
    leaver.leave(how)


@ways
@pytest.mark.parametrize("path", ["/docs/swagger-ui-bundle.js", "/dataset?per_class=30000&seed=1"])
def test_who_stops_reading_and_leaves_is_499_in_the_log(
    watched: Watched, path: str, how: bytes
) -> None:
    watched.engine.gate.set()
    watched.engine.max_batch = 256
    # More than the system keeps for a connection.
    leaver = Leaver(watched, f"GET {path} HTTP/1.1\r\nHost: test\r\n\r\n" * 8)
    assert leaver.socket.recv(12) == b"HTTP/1.1 200"
    leaver.leave(how)
