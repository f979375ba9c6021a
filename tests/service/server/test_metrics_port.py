"""Metrics on a port of their own."""

import re

import httpx
import pytest

from service.failure import ServiceError
from service.server.metrics_port import open_metrics_port
from service.settings import Settings
from service.telemetry.metrics import Metrics
from tests.service.api.test_health import samples, total
from tests.support.serving import ServiceProcess
from tests.support.wire import wait_until

SECRET = "s" * 20


def test_metrics_of_all_workers_are_on_their_port_and_nothing_else_is() -> None:
    with ServiceProcess("--metrics-port", "0", "--workers", "2") as service:
        (address,) = re.findall(r"metrics at (http://\S+)/metrics\n", service.first_line)
        with httpx.Client(base_url=address, timeout=60) as client:
            assert service.client.get("/metrics").status_code == 404
            assert service.client.post("/generate?label=7&n=7").status_code == 200
            wait_until(lambda: total(samples(client), "cgan_images_total") == 7, "7 images")
            found = samples(client)
            assert total(found, "cgan_ready") == 2
            assert total(found, "process_resident_memory_bytes") > 0
            for path in ("/", "/models", "/docs", "/openapi.json"):
                answer = client.get(path)
                assert answer.status_code == 404
                assert answer.headers["Content-Type"] == "application/problem+json"
                assert "server" not in answer.headers
        service.signal()
        assert service.wait() == 0
    assert all('"level": "info"' in line for line in service.errors)


def test_a_key_is_required_there_too() -> None:
    settings = Settings.model_validate({"metrics_port": 0, "api_keys": f"prometheus:{SECRET}"})
    url = open_metrics_port(settings, Metrics().registry)
    assert url is not None
    with httpx.Client(base_url=url) as client:
        assert client.get("/metrics").status_code == 401
        key = {"Authorization": f"Bearer {SECRET}"}
        assert client.get("/metrics", headers=key).status_code == 200
        assert client.head("/metrics", headers=key).status_code == 200


def test_a_port_that_is_taken_is_an_error(service: ServiceProcess) -> None:
    port = service.client.base_url.port
    with pytest.raises(ServiceError, match=f"cannot open port {port} on 127.0.0.1"):
        open_metrics_port(Settings(metrics_port=port), Metrics().registry)
