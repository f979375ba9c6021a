import json
import logging
import socket
from pathlib import Path

from service.middleware.access_log import JSONFormatter
from tests.support.serving import ServiceProcess, refused


def test_a_request_is_one_line_with_its_id() -> None:
    with ServiceProcess() as service:
        answer = service.client.post("/generate?label=7&n=2", headers={"X-Request-ID": "abc-1.2_3"})
        service.client.get("/nothing", headers={"X-Request-ID": "mine"})
        service.signal()
        assert service.wait() == 0
    assert answer.headers["X-Request-ID"] == "abc-1.2_3"
    lines = [json.loads(line) for line in service.errors]
    access = {
        line["request_id"]: line for line in lines if line["logger"] == "service.middleware.auth"
    }
    line = access["abc-1.2_3"]
    assert (line["method"], line["path"], line["query"]) == ("POST", "/generate", "label=7&n=2")
    assert (line["status"], line["bytes"]) == (200, len(answer.content))
    assert line["duration_ms"] > 0
    assert line["client"] == "127.0.0.1"
    assert access["mine"]["status"] == 404


def test_an_unsafe_id_is_replaced(service: ServiceProcess) -> None:
    for unsafe in (b"a b", b'x"}', b"a" * 65, "é".encode("latin-1"), b""):
        answer = service.client.get("/livez", headers={b"X-Request-ID": unsafe})
        assert len(answer.headers["X-Request-ID"]) == 16


def test_requests_get_ids_of_their_own(service: ServiceProcess) -> None:
    ids = {service.client.get("/livez").headers["X-Request-ID"] for _ in range(20)}
    assert len(ids) == 20


def test_a_log_line_cannot_be_forged() -> None:
    with ServiceProcess() as service:
        service.client.get("/x%0a%7B%22level%22:%22error%22%7D?q=%0a\u2028")
        service.signal()
        service.wait()
    assert all(json.loads(line)["level"] == "info" for line in service.errors)


def test_raw_bytes_in_a_request_stay_on_their_line(bundled: Path) -> None:
    """Past a client that would escape them."""
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
        address = (service.client.base_url.host, service.client.base_url.port or 0)
        for each in requests:
            with socket.create_connection(address, timeout=60) as connection:
                connection.sendall(each)
                assert connection.recv(1 << 16).startswith(b"HTTP/1.1 4")
        service.signal()
        assert service.wait() == 0
    lines = [json.loads(line) for line in service.errors]
    assert {line["level"] for line in lines} <= {"debug", "info", "warning"}
    assert {line["logger"] for line in lines} == {"service.middleware.auth"}
    for line in service.errors:
        assert line.endswith("}\n")
        assert line[:-1].isascii()
        assert line[:-1].isprintable()


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


def test_probes_and_scrapes_are_logged_at_debug_only() -> None:
    for level, expected in (("info", set()), ("debug", {"/livez", "/readyz", "/metrics"})):
        with ServiceProcess("--log-level", level) as service:
            for path in ("/livez", "/readyz", "/metrics"):
                assert service.client.get(path).status_code == 200
            service.signal()
            service.wait()
        lines = [json.loads(line) for line in service.errors]
        assert {
            each["path"] for each in lines if each["logger"] == "service.middleware.auth"
        } == expected


def test_log_level_warning_is_silent_about_requests() -> None:
    with ServiceProcess("--log-level", "warning") as service:
        assert service.client.get("/models").status_code == 200
        service.signal()
        service.wait()
    assert service.errors == []


def test_a_traceback_stays_on_its_line() -> None:
    error = ValueError("two\nlines")
    record = logging.getLogger().makeRecord(
        "n", logging.ERROR, "f", 1, "failed", (), (ValueError, error, None)
    )
    line = JSONFormatter().format(record)
    assert "\n" not in line
    assert "two\nlines" in json.loads(line)["traceback"]
