"""The metrics, the dashboard and the alerts, on a real Prometheus that scrapes real services."""

import json
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.conftest import make_artifact
from tests.support.processes import REPOSITORY
from tests.support.serving import ServiceProcess

DEPLOY = REPOSITORY / "service" / "deploy"
ALERTS = DEPLOY / "prometheus" / "alerts.yml"
DASHBOARD = json.loads((DEPLOY / "grafana" / "dashboards" / "cgan.json").read_text())
PANELS = {
    (panel["title"], target["expr"].replace("$__rate_interval", "10s"))
    for panel in DASHBOARD["panels"]
    for target in panel["targets"]
}
RULES = [rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]]
NEEDS_GPU = {"GPU memory"}
FREE, LIMITED = "f" * 20, "l" * 20  # keys; the limit of the second is an image a second
DEADLINE_S = 60.0

pytestmark = pytest.mark.skipif(
    shutil.which("prometheus") is None, reason="needs prometheus and promtool on the PATH"
)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    make_artifact(folder / "small.safetensors")
    return folder


@pytest.fixture(scope="module")
def workers(models: Path) -> Iterator[ServiceProcess]:
    """Two workers that need a key."""
    with ServiceProcess(
        *("--models", str(models), "--workers", "2", "--burst-images", "4"),
        environment={"CGAN_API_KEYS": f"free:{FREE},limited:{LIMITED}:1"},
    ) as running:
        yield running


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


@pytest.fixture(scope="module")
def prometheus(
    service: ServiceProcess,
    workers: ServiceProcess,
    models: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[httpx.Client]:
    """A Prometheus that scrapes one process and two workers, with data for every panel."""
    folder = tmp_path_factory.mktemp("prometheus")
    clients = (service.client, workers.client)
    targets = [f"'127.0.0.1:{client.base_url.port}'" for client in clients]
    config = folder / "prometheus.yml"
    config.write_text(
        "global: {scrape_interval: 1s, evaluation_interval: 1s}\n"
        f"rule_files: ['{ALERTS}']\n"
        f"scrape_configs: [{{job_name: cgan, authorization: {{credentials: {FREE}}}, "
        f"static_configs: [{{targets: [{', '.join(targets)}]}}]}}]\n"
    )
    address = f"127.0.0.1:{free_port()}"
    process = subprocess.Popen(
        [
            "prometheus",
            f"--config.file={config}",
            f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address={address}",
        ],
        stderr=subprocess.DEVNULL,
    )
    try:
        with httpx.Client(base_url=f"http://{address}", timeout=30) as client:
            deadline = time.monotonic() + DEADLINE_S
            while missing(client):
                assert time.monotonic() < deadline, missing(client)
                assert post(service.client, "label=7") == 200
                assert post(workers.client, "label=cat") == 200
                assert post(workers.client, "label=cat", LIMITED) in {200, 429}
            (models / "broken.safetensors").write_bytes(b"no artifact")
            yield client
    finally:
        process.terminate()
        process.wait(timeout=30)


def post(client: httpx.Client, query: str, key: str = FREE) -> int:
    headers = {"Authorization": f"Bearer {key}"}
    return client.post(f"/generate?n=4&{query}", headers=headers).status_code


def ask(client: httpx.Client, expression: str) -> list[Any]:
    answer = client.get("/api/v1/query", params={"query": expression})
    assert answer.status_code == 200, f"{expression}: {answer.text}"
    result: list[Any] = answer.json()["data"]["result"]
    return result


def missing(client: httpx.Client) -> list[str]:
    """Return the queries of the dashboard that have no result."""
    try:
        client.get("/-/ready").raise_for_status()
    except httpx.HTTPError:
        return ["Prometheus"]
    return [
        f"{title}: {expression}"
        for title, expression in sorted(PANELS)
        if title not in NEEDS_GPU and not ask(client, expression)
    ]


def test_every_panel_shows_something(prometheus: httpx.Client) -> None:
    assert len(PANELS) > 20
    assert missing(prometheus) == []
    for title, expression in PANELS:
        if title in NEEDS_GPU:
            ask(prometheus, expression)  # it is valid


def test_prometheus_computes_the_rate_and_latency_of_requests(
    service: ServiceProcess, prometheus: httpx.Client
) -> None:
    def value(expression: str) -> float:
        return sum(float(each["value"][1]) for each in ask(prometheus, expression))

    rate = 'rate(cgan_requests_total{route="/generate",status="200"}[1m])'
    images = 'rate(cgan_images_total{model="mnist",label="7"}[1m])'
    deadline = time.monotonic() + DEADLINE_S
    while not (value(rate) > 0 and value(images) > 0):
        assert time.monotonic() < deadline, "Prometheus saw no request"
        assert post(service.client, "label=7") == 200
    assert value('up{job="cgan"}') == 2
    p99 = "histogram_quantile(0.99, sum by (le) (cgan_request_duration_seconds_bucket))"
    assert 0 < value(p99) < 30


@pytest.mark.parametrize("name", ["service", "workers"])
def test_promtool_finds_nothing_wrong_with_the_metrics(
    name: str, request: pytest.FixtureRequest
) -> None:
    client = request.getfixturevalue(name).client
    assert post(client, "label=0") == 200
    text = client.get("/metrics", headers={"Authorization": f"Bearer {FREE}"}).text
    checked = subprocess.run(
        ["promtool", "check", "metrics"], input=text, capture_output=True, text=True, check=False
    )
    lines = checked.stderr.splitlines() + checked.stdout.splitlines()
    # The collectors of the client library itself are named by the Prometheus project.
    assert [line for line in lines if not line.startswith(("process_", "python_"))] == []


def test_every_alert_can_be_evaluated_and_none_fires_by_mistake(prometheus: httpx.Client) -> None:
    for rule in RULES:
        ask(prometheus, rule["expr"])
    rules = prometheus.get("/api/v1/rules").json()["data"]["groups"]
    found = [rule for group in rules for rule in group["rules"]]
    assert len(found) == len(RULES)
    assert {rule["health"] for rule in found} <= {"ok", "unknown"}
    active = {rule["name"] for rule in found if rule.get("state") in ("pending", "firing")}
    assert active <= {"CganReloadFailed"}


def test_an_alert_fires_on_a_real_cause(prometheus: httpx.Client) -> None:
    """A file that cannot be loaded was added to the models."""
    (alert,) = [rule for rule in RULES if rule.get("alert") == "CganReloadFailed"]
    deadline = time.monotonic() + DEADLINE_S
    while not ask(prometheus, alert["expr"]):
        assert time.monotonic() < deadline


@pytest.mark.parametrize(
    "arguments",
    [
        ("check", "rules", "prometheus/alerts.yml"),
        ("check", "config", "prometheus/prometheus.yml"),
        ("test", "rules", "prometheus/alerts_test.yml"),
    ],
)
def test_promtool_accepts_the_files(arguments: tuple[str, ...]) -> None:
    checked = subprocess.run(
        ["promtool", *arguments], cwd=DEPLOY, capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_every_alert_is_tested_and_is_in_the_runbook() -> None:
    names = {rule["alert"] for rule in RULES if "alert" in rule}
    tests = yaml.safe_load((DEPLOY / "prometheus" / "alerts_test.yml").read_text())["tests"]
    tested = {each["alertname"] for test in tests for each in test["alert_rule_test"]}
    assert tested == names
    runbook = (DEPLOY / "README.md").read_text()
    for rule in RULES:
        if "alert" in rule:
            path, _, anchor = rule["annotations"]["runbook"].partition("#")
            assert Path(path) == Path("service/deploy/README.md")
            assert anchor == rule["alert"].lower()
            assert f"### {rule['alert']}\n" in runbook
