"""Metrics on a port of their own, of one process and of several."""

import re
from pathlib import Path

import httpx
import pytest

from tests.conftest import make_artifact
from tests.service.api.test_health import samples, total
from tests.service.server.test_workers import wait_until
from tests.support.serving import ServiceProcess, refused

SECRET = "s" * 20


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_artifact(tmp_path_factory.mktemp("weights") / "small.safetensors")


def metrics_client(service: ServiceProcess) -> httpx.Client:
    (address,) = re.findall(r"metrics at (http://\S+)/metrics\n", service.first_line)
    return httpx.Client(base_url=address, timeout=60)


@pytest.mark.parametrize("workers", ["1", "2"])
def test_metrics_are_on_their_port_and_nothing_else_is(artifact: Path, workers: str) -> None:
    arguments = ("--models", str(artifact), "--metrics-port", "0", "--workers", workers)
    with ServiceProcess(*arguments) as service, metrics_client(service) as client:
        assert service.client.get("/metrics").status_code == 404
        assert service.client.post("/generate?label=cat&n=7").status_code == 200
        # The supervisor reads what each worker wrote within the last second.
        wait_until(lambda: total(samples(client), "cgan_images_total") == 7, "7 images")
        found = samples(client)
        assert total(found, "cgan_ready") == int(workers)
        assert total(found, "process_resident_memory_bytes") > 0
        for path in ("/", "/models", "/generate", "/docs", "/openapi.json"):
            answer = client.post(path) if path == "/generate" else client.get(path)
            assert answer.status_code == 404
            assert answer.headers["Content-Type"] == "application/problem+json"
            assert "server" not in answer.headers
        service.signal()
        assert service.wait() == 0
    assert all('"level": "info"' in line for line in service.errors)


def test_they_need_a_key_there_too(artifact: Path) -> None:
    with (
        ServiceProcess(
            *("--models", str(artifact), "--metrics-port", "0"),
            environment={"CGAN_API_KEYS": f"prometheus:{SECRET}"},
        ) as service,
        metrics_client(service) as client,
    ):
        assert client.get("/metrics").status_code == 401
        key = {"Authorization": f"Bearer {SECRET}"}
        assert client.get("/metrics", headers=key).status_code == 200


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_port_that_is_taken_ends_the_start_in_one_line(
    service: ServiceProcess, artifact: Path, workers: str
) -> None:
    taken = str(service.client.base_url.port)
    message = refused("--models", str(artifact), "--metrics-port", taken, "--workers", workers)
    assert message.startswith("the metrics port cannot be opened: ")
    assert message.count("\n") == 1
