"""The end of a service, under load, over raw connections."""

import http.client
import json
import re
import resource
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.server.protocol import EXCESS_CONNECTIONS, OTHER_FILES, raise_nofile_limit
from service.settings import Settings
from tests.conftest import make_artifact
from tests.support.clients import metric
from tests.support.other_systems import WINDOWS
from tests.support.serving import ServiceProcess
from tests.support.wire import LAST, TIMEOUT_S, Client, address, drain, wait_until
from tests.support.workers import client_of, pids

TARGET = "/generate?label=cat&n=64&format=zip"
COMPLETE, REFUSED, UNREACHABLE = "complete", "refused with 503", "no connection"


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_artifact(tmp_path_factory.mktemp("weights") / "small.safetensors"))


def get(service: ServiceProcess, path: str) -> httpx.Response:
    """An answer over a connection of its own."""
    return httpx.get(service.client.base_url.join(path), timeout=TIMEOUT_S)


def drains(client: httpx.Client) -> bool:
    return client.get("/readyz").status_code == 503


class Load(threading.Thread):
    """A client that asks again and again over a connection that it keeps, to the very end."""

    def __init__(self, service: ServiceProcess) -> None:
        super().__init__()
        self.connection = http.client.HTTPConnection(*address(service), timeout=TIMEOUT_S)
        self.outcomes: list[str] = []

    def run(self) -> None:
        while not self.outcomes or self.outcomes[-1] in {COMPLETE, REFUSED}:
            self.outcomes.append(self.ask())

    def ask(self) -> str:
        fresh = self.connection.sock is None
        try:
            self.connection.request("POST", TARGET)
            answer = self.connection.getresponse()
        except ConnectionError as error:
            self.connection.close()
            # Not accepted before the port was closed, if never a byte came over it.
            return UNREACHABLE if fresh else f"lost: {error!r}"
        try:
            body = answer.read()
        except http.client.IncompleteRead as error:
            return f"cut: {error!r}"
        if answer.status == 200 and body.startswith(b"PK"):
            return COMPLETE
        kind = answer.getheader("Content-Type")
        clean = answer.status == 503 and kind == "application/problem+json"
        return REFUSED if clean and b"draining" in body else f"{answer.status}: {body!r}"


@pytest.mark.parametrize("workers", ["1", "2"])
def test_under_load_every_request_is_answered_or_refused_and_none_is_cut(
    artifact: str, workers: str
) -> None:
    arguments = ("--models", artifact, "--workers", workers, "--drain-delay-s", "0.3")
    with ServiceProcess(*arguments, "--log-level", "warning") as service:
        load = [Load(service) for _ in range(24)]
        for each in load:
            each.start()
        wait_until(lambda: all(len(each.outcomes) > 3 for each in load), "everybody is served")
        service.signal()
        for each in load:
            each.join()
        assert service.wait() == 0
    outcomes = {outcome for each in load for outcome in each.outcomes}
    assert outcomes <= {COMPLETE, REFUSED, UNREACHABLE}
    assert {each.outcomes[-1] for each in load} == {UNREACHABLE}
    assert service.errors == []


@pytest.mark.parametrize(("workers", "number"), [("1", signal.SIGINT), ("2", signal.SIGTERM)])
def test_a_draining_service_serves_on_until_a_second_signal_ends_it(
    artifact: str, workers: str, number: signal.Signals
) -> None:
    patient = ("--max-queue-images", "1000000", "--timeout-s", "600", "--max-batch", "1")
    arguments = ("--models", artifact, "--workers", workers, "--drain-delay-s", "600")
    with ServiceProcess(*arguments, *patient) as service:
        processes = [service.process.pid] if workers == "1" else pids(service)
        kept = [client_of(service, pid) for pid in processes]
        service.signal(number)
        for client in kept:
            with closing(client):
                wait_until(partial(drains, client), "it is not ready")
        answered = set()
        for _ in range(4):
            answer = httpx.post(service.client.base_url.join(TARGET), timeout=TIMEOUT_S)
            assert answer.status_code == 200
            assert answer.headers["Connection"] == "close"
            answered.add(answer.headers["X-Request-ID"])
        busy = [Client(service) for _ in range(200)]  # for minutes
        for each in busy:
            each.send(b"POST /generate?label=cat&n=1024 HTTP/1.1\r\n\r\n")
        service.signal(number)
        assert service.wait() == 0
        drain(busy)
    assert answered <= {json.loads(line).get("request_id") for line in service.errors}


def test_an_answer_that_is_read_late_is_still_whole_and_what_was_begun_is_refused(
    artifact: str,
) -> None:
    with ServiceProcess("--models", artifact) as service:
        late, partial, idle = (Client(service) for _ in range(3))
        late.send(b"POST /generate?label=cat&n=1024&scale=8&format=json HTTP/1.1\r\n\r\n")
        partial.send(b"POST /generate?label=cat HTTP/1.1\r\n")
        wait_until(lambda: b"cgan_images_total{" in get(service, "/metrics").content, "it is made")
        service.signal()
        assert idle.wait() == []
        (refused,) = partial.wait()
        assert refused.problem["type"] == "urn:cgan:problem:draining"
        (answer,) = late.wait()
        assert answer.status == 200
        assert len(answer.body) == int(answer.headers["content-length"]) > 1_000_000
        assert service.wait() == 0


def test_64_clients_may_request_64_images_each_with_default_options(artifact: str) -> None:
    """One process holds them all, because the kernel may give it the connections of all clients.

    As many clients have disconnected just before, and their images may still wait.
    """
    request = b"POST /generate?label=cat&n=64 HTTP/1.1\r\n\r\n"
    with ServiceProcess("--models", artifact) as service:
        left, clients = ([Client(service) for _ in range(64)] for _ in range(2))
        for each in left:
            each.send(request)
            each.socket.close()
        for each in clients:
            each.send(3 * request + LAST)
        drain(clients)
    assert {answer.status for each in clients for answer in each.answers()} == {200}


@pytest.fixture(scope="module")
def service(artifact: str) -> Iterator[ServiceProcess]:
    """A service that was started with a low limit of open files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(200, hard), hard))
    try:
        running = ServiceProcess("--models", artifact, "--metrics-port", "0")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    with running:
        yield running


def test_garbage_is_collected_where_objects_become_many(service: ServiceProcess) -> None:
    (url,) = re.findall(r"metrics at (\S+)", service.first_line)

    def collections_after(lists: int) -> float:
        before = metric(httpx.get(url).text, "python_gc_collections_total")
        body = f"[{', '.join(lists * ['[]'])}]"
        is_json = {"Content-Type": "application/json"}
        answer = service.client.post("/v1/images/generations", content=body, headers=is_json)
        assert answer.status_code == 400
        return metric(httpx.get(url).text, "python_gc_collections_total") - before

    assert collections_after(2_000) == collections_after(5_000) == 0  # as many as requests may have
    assert collections_after(100_000) > 0


def test_the_limit_of_open_files_is_raised_to_what_the_connections_need(
    service: ServiceProcess,
) -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    limits = Path(f"/proc/{service.process.pid}/limits").read_text()
    (line,) = [line for line in limits.splitlines() if line.startswith("Max open files")]
    needed = Settings().max_connections + OTHER_FILES + EXCESS_CONNECTIONS
    assert line.split()[3:5] == [str(min(needed, hard)), str(hard)]


INFINITE, OF_MACOS = resource.RLIM_INFINITY, 10_240


@pytest.mark.parametrize(
    ("soft", "hard", "room"),
    [
        (256, INFINITE, 4096),
        (256, 100_000, 4096),
        (INFINITE, INFINITE, 4096),
        (100_000, 100_000, 4096),
        (1000, 1024, 256),
        (5, 10, 1),
    ],
)
def test_no_more_connections_are_taken_than_files_may_be_open(
    soft: int,
    hard: int,
    room: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    raised: list[Any] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: raised.append(limits))
    assert raise_nofile_limit(4096) == room
    needed = 4096 + OTHER_FILES + EXCESS_CONNECTIONS
    is_enough = soft in (INFINITE, 100_000)
    assert raised == [] if is_enough else [(needed if room == 4096 else hard, hard)]
    assert (caplog.text != "") == (room < 4096)


@pytest.mark.parametrize("error", [ValueError("current limit exceeds maximum limit"), OSError(1)])
def test_the_limit_of_open_files_is_raised_as_far_as_macos_allows(
    error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It has an infinite hard limit, and refuses more than the kernel's own."""
    files = 256

    def set_limit(_: int, limits: tuple[int, int]) -> None:
        nonlocal files
        if limits[0] > OF_MACOS:
            raise error
        files = limits[0]

    monkeypatch.setattr(resource, "getrlimit", lambda _: (files, INFINITE))
    monkeypatch.setattr(resource, "setrlimit", set_limit)
    assert raise_nofile_limit(4096) == 4096
    assert caplog.text == ""
    room = raise_nofile_limit(100_000)
    assert OF_MACOS / 2 < files <= OF_MACOS
    assert room == files - OTHER_FILES - EXCESS_CONNECTIONS
    assert "the limit of open files lowers --max-connections" in caplog.text


# Other systems -----------------------------------------------------------------------------------


def test_one_process_serves_on_windows_until_a_signal_drains_it(artifact: str) -> None:
    key = "a" * 20
    options = ("--api-keys", f"alice:{key}:100000", "--drain-delay-s", "600")
    with ServiceProcess("--models", artifact, *options, system=WINDOWS) as service:
        service.client.headers["Authorization"] = f"Bearer {key}"
        assert service.client.post(TARGET).status_code == 200
        service.signal()
        wait_until(partial(drains, service.client), "it is not ready")
        assert service.client.post(TARGET).headers["Connection"] == "close"
        service.signal(signal.SIGINT)
        assert service.wait() == 0
    assert "Traceback" not in "".join(service.errors)


# Unix sockets ------------------------------------------------------------------------------------


def test_a_unix_socket_is_served_to_curl_and_its_file_is_removed_at_the_end(
    artifact: str, tmp_path: Path
) -> None:
    path = tmp_path / "cgan.sock"
    with ServiceProcess("--models", artifact, "--unix-socket", str(path)) as service:
        assert f" at unix:{path} on " in service.first_line
        image = service.client.post("/generate?label=cat&seed=1").raise_for_status().content
        if curl := shutil.which("curl"):
            url = "http://localhost/generate?label=cat&seed=1"
            command = [curl, "--silent", "--fail", "--unix-socket", str(path), url]
            assert subprocess.run(command, capture_output=True, check=True).stdout == image
        service.signal()
        assert service.wait() == 0
        assert list(tmp_path.iterdir()) == []
    clients = {json.loads(line)["client"] for line in service.errors}
    assert clients == {"unix"}
