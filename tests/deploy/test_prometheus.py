"""A real Prometheus server scraping a real service."""

import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.support.serving import ServiceProcess

DEADLINE_S = 60.0

pytestmark = pytest.mark.skipif(
    shutil.which("prometheus") is None, reason="needs prometheus and promtool on the PATH"
)


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


@pytest.fixture
def prometheus(service: ServiceProcess, tmp_path: Path) -> Iterator[httpx.Client]:
    target = f"{service.client.base_url.host}:{service.client.base_url.port}"
    config = tmp_path / "prometheus.yml"
    config.write_text(
        "global: {scrape_interval: 1s}\n"
        f"scrape_configs: [{{job_name: cgan, static_configs: [{{targets: ['{target}']}}]}}]\n"
    )
    address = f"127.0.0.1:{free_port()}"
    process = subprocess.Popen(
        [
            "prometheus",
            f"--config.file={config}",
            f"--storage.tsdb.path={tmp_path / 'data'}",
            f"--web.listen-address={address}",
        ],
        stderr=subprocess.DEVNULL,
    )
    try:
        with httpx.Client(base_url=f"http://{address}") as client:
            yield client
    finally:
        process.terminate()
        process.wait(timeout=30)


def query(client: httpx.Client, expression: str) -> float | None:
    """The one value of an instant query; None while there is none, or the server still starts."""
    try:
        answer = client.get("/api/v1/query", params={"query": expression})
    except httpx.TransportError:
        return None
    if answer.status_code == httpx.codes.SERVICE_UNAVAILABLE:
        return None
    result = answer.json()["data"]["result"]
    return float(result[0]["value"][1]) if result else None


def test_prometheus_scrapes_the_service_and_knows_its_request_rate(
    service: ServiceProcess, prometheus: httpx.Client
) -> None:
    rate = 'sum(rate(cgan_requests_total{route="/generate",status="200"}[10s]))'
    images = 'sum(rate(cgan_images_total{model="mnist",label="7"}[10s]))'
    deadline = time.monotonic() + DEADLINE_S
    while not ((query(prometheus, rate) or 0.0) > 0 and (query(prometheus, images) or 0.0) > 0):
        assert time.monotonic() < deadline, "Prometheus never saw a request"
        service.client.post("/generate?label=7&n=4")
    assert query(prometheus, 'up{job="cgan"}') == 1
    p99 = "histogram_quantile(0.99, sum by (le) (cgan_request_duration_seconds_bucket))"
    assert 0 < (query(prometheus, p99) or 0.0) < 30


def test_promtool_finds_nothing_wrong_with_the_metrics(service: ServiceProcess) -> None:
    service.client.post("/generate?label=7&n=4")
    assert complaints(service) == []


def test_promtool_finds_nothing_wrong_with_the_metrics_of_several_workers() -> None:
    with ServiceProcess("--workers", "2") as several:
        several.client.post("/generate?label=7&n=4")
        assert complaints(several) == []


def complaints(service: ServiceProcess) -> list[str]:
    checked = subprocess.run(
        ["promtool", "check", "metrics"],
        input=service.client.get("/metrics").text,
        capture_output=True,
        text=True,
        check=False,
    )
    return [
        line
        for line in checked.stderr.splitlines() + checked.stdout.splitlines()
        # The collectors of the client library itself are named by the Prometheus project.
        if not line.startswith(("process_", "python_"))
    ]
