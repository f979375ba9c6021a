import json
import logging

from service.observation import JSONFormatter
from tests.serving import ServiceProcess


def test_a_request_is_one_line_with_its_id() -> None:
    with ServiceProcess() as service:
        answer = service.client.post("/generate?label=7&n=2", headers={"X-Request-ID": "abc-1.2_3"})
        service.client.get("/nothing", headers={"X-Request-ID": "mine"})
        service.signal()
        assert service.wait() == 0
    assert answer.headers["X-Request-ID"] == "abc-1.2_3"
    lines = [json.loads(line) for line in service.errors]
    access = {line["request_id"]: line for line in lines if line["logger"] == "service.access"}
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


def test_probes_and_scrapes_are_logged_at_debug_only() -> None:
    for level, expected in (("info", set()), ("debug", {"/livez", "/readyz", "/metrics"})):
        with ServiceProcess("--log-level", level) as service:
            for path in ("/livez", "/readyz", "/metrics"):
                assert service.client.get(path).status_code == 200
            service.signal()
            service.wait()
        lines = [json.loads(line) for line in service.errors]
        assert {each["path"] for each in lines if each["logger"] == "service.access"} == expected


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
