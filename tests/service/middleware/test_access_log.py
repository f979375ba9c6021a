import asyncio
import json
import logging
import socket
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI

from service.middleware.access_log import AccessLogMiddleware
from service.server.sockets import open_sockets
from service.telemetry.logging import JSONFormatter, configure_logging
from service.telemetry.metrics import Metrics
from tests.support.serving import ServiceProcess, refused, serving

PROBES = {"/livez", "/readyz", "/metrics"}


@pytest.fixture(scope="module")
def logged(bundled: Path) -> list[str]:
    """The log of a service at level debug, after requests that try to forge a line of it."""
    forged = b'\n{"level": "error", "message": "forged"}\n'
    requests = [
        b"GET /a\x1b[31mb\x7f HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /%0A%7B%1B%00%C2%85%E2%80%A8 HTTP/1.1\r\nHost: x\r\n\r\n",
        b"POST /generate?label=%0a%1b&\xff\x85=\xc2\x85 HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /no HTTP/1.1\r\nHost: x\r\nX-Request-ID: \x1b[31m\xc2\x85\r\n\r\n",
        b"GET /no HTTP/1.1\r\nHost: x\r\nX-Request-ID: a" + forged + b"\r\n\r\n",
        b"GET /no HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: \x1bws\r\n\r\n",
        b"GET /no" + forged + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\x16\x03\x01" + forged,
    ]
    with ServiceProcess("--models", str(bundled), "--log-level", "debug") as service:
        headers = {"X-Request-ID": "abc-1.2_3"}
        answer = service.client.post("/generate?label=7&n=2", headers=headers)
        assert answer.headers["X-Request-ID"] == "abc-1.2_3"
        service.client.get("/nothing", headers={"X-Request-ID": f"{len(answer.content)}-bytes"})
        service.client.get("/x%0a%7B%22level%22:%22error%22%7D?q=%0a\u2028")
        for path in PROBES:
            assert service.client.get(path).status_code == 200
        address = (service.client.base_url.host, service.client.base_url.port or 0)
        for each in requests:
            with socket.create_connection(address, timeout=60) as connection:
                connection.sendall(each)
                assert connection.recv(1 << 16).startswith(b"HTTP/1.1 4")
        service.signal()
        assert service.wait() == 0
    return service.errors


def test_a_client_of_ipv4_is_logged_as_such_on_a_socket_of_both_versions(
    caplog: pytest.LogCaptureFixture,
) -> None:
    app = FastAPI()
    app.state.error_app = app
    app.add_middleware(AccessLogMiddleware, metrics=Metrics())
    (listening,) = open_sockets("::", 0)
    with caplog.at_level(logging.INFO, "service.access"), serving(app, listening) as client:
        assert client.get("/nothing").status_code == 404
    (record,) = caplog.records
    assert record.__dict__["fields"]["client"] == "127.0.0.1"


def test_a_request_is_one_line_with_its_id(logged: list[str]) -> None:
    access = {line["request_id"]: line for line in map(json.loads, logged)}
    line = access["abc-1.2_3"]
    assert (line["method"], line["path"], line["query"]) == ("POST", "/generate", "label=7&n=2")
    assert (line["level"], line["status"]) == ("info", 200)
    assert access[f"{line['bytes']}-bytes"]["status"] == 404
    assert line["duration_ms"] > 0
    assert line["client"] == "127.0.0.1"


def test_no_request_forges_a_line(logged: list[str]) -> None:
    lines = [json.loads(line) for line in logged]
    assert len(lines) == 3 + len(PROBES) + 8
    assert {line["level"] for line in lines} <= {"debug", "info", "warning"}
    assert {line["logger"] for line in lines} == {"service.access"}
    for line in logged:
        assert line.endswith("}\n")
        assert line[:-1].isascii()
        assert line[:-1].isprintable()


def test_probes_and_scrapes_are_logged_at_debug(logged: list[str]) -> None:
    debug = [line["path"] for line in map(json.loads, logged) if line["level"] == "debug"]
    assert sorted(debug) == sorted(PROBES)


def test_an_unsafe_id_is_replaced(service: ServiceProcess) -> None:
    for unsafe in (b"a b", b'x"}', b"a" * 65, "é".encode("latin-1"), b""):
        answer = service.client.get("/livez", headers={b"X-Request-ID": unsafe})
        assert len(answer.headers["X-Request-ID"]) == 16


def test_requests_get_ids_of_their_own(service: ServiceProcess) -> None:
    ids = {service.client.get("/livez").headers["X-Request-ID"] for _ in range(20)}
    assert len(ids) == 20


def test_a_path_with_a_newline_does_not_make_a_second_line(tmp_path: Path) -> None:
    path = tmp_path / "a\n\x1b[31mb.safetensors"
    path.write_bytes(b"nothing")
    for workers in ("1", "2"):
        message = refused("--models", str(path), "--workers", workers)
        assert "a\\n\\x1b[31mb.safetensors" in message
        assert all(
            line.isprintable() and (line.startswith((str(tmp_path), "{")))
            for line in message.splitlines()
        )


# In this process ---------------------------------------------------------------------------------


@pytest.fixture
def _logging() -> Iterator[None]:
    """Restore the log of the tests after `configure_logging`."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(False)


def ask(path: str) -> httpx.Response:
    app = FastAPI()
    app.add_middleware(AccessLogMiddleware, metrics=Metrics())

    def fail() -> None:
        raise RuntimeError("a defect\nof two lines")

    def succeed() -> str:
        return "ok"

    app.add_api_route("/livez", succeed)
    app.add_api_route("/models", succeed)
    app.add_api_route("/fail", fail)

    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.get(path)

    return asyncio.run(send())


@pytest.mark.usefixtures("_logging")
@pytest.mark.parametrize(
    ("level", "paths"), [("debug", ["/livez", "/models"]), ("info", ["/models"]), ("warning", [])]
)
def test_the_level_selects_the_requests_that_are_logged(
    level: str, paths: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    configure_logging(level)
    for path in ("/livez", "/models"):
        assert ask(path).status_code == 200
    lines = map(json.loads, capfd.readouterr().err.splitlines())
    assert [line["path"] for line in lines if line["logger"] == "service.access"] == paths


@pytest.mark.usefixtures("_logging")
def test_a_defect_is_a_500_and_one_line_with_its_traceback(
    capfd: pytest.CaptureFixture[str],
) -> None:
    configure_logging("info")
    answer = ask("/fail")
    assert answer.status_code == 500
    assert "a defect" not in answer.text
    lines = map(json.loads, capfd.readouterr().err.splitlines())
    defect, access = (line for line in lines if line["logger"].startswith("service"))
    assert "RuntimeError: a defect\nof two lines" in defect["traceback"]
    assert defect["request_id"] == access["request_id"] == answer.headers["X-Request-ID"]
    assert access["status"] == 500


def test_a_traceback_stays_on_its_line() -> None:
    error = ValueError("two\nlines")
    record = logging.getLogger().makeRecord(
        "n", logging.ERROR, "f", 1, "failed", (), (ValueError, error, None)
    )
    line = JSONFormatter().format(record)
    assert "\n" not in line
    assert "two\nlines" in json.loads(line)["traceback"]
