import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families


def samples(client: httpx.Client) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    text = client.get("/metrics").text
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def total(found: dict[tuple[str, tuple[tuple[str, str], ...]], float], name: str) -> float:
    return sum(value for (each, _), value in found.items() if each == name)


def test_a_running_service_is_alive_and_ready(client: httpx.Client) -> None:
    assert client.get("/livez").json() == {"status": "alive"}
    assert client.get("/readyz").json() == {"status": "ready"}


def test_metrics_count_what_was_done(client: httpx.Client) -> None:
    before = samples(client)
    client.post("/generate?label=7&label=seven&label=2&n=5")
    client.post("/generate?label=none")
    client.get("/not/there")
    after = samples(client)

    def grown(name: str, **labels: str) -> float:
        key = (name, tuple(sorted(labels.items())))
        return after.get(key, 0.0) - before.get(key, 0.0)

    assert grown("cgan_images_total", model="mnist", label="7") == 10
    assert grown("cgan_images_total", model="mnist", label="2") == 5
    assert grown("cgan_batch_images_sum") == 15
    assert grown("cgan_batch_images_count") == 1
    generate = {"route": "/generate", "method": "POST"}
    assert grown("cgan_requests_total", **generate, status="200") == 1
    assert grown("cgan_requests_total", **generate, status="422") == 1
    assert grown("cgan_requests_total", route="unmatched", method="any", status="404") == 1
    assert grown("cgan_request_duration_seconds_count", route="/generate") == 2
    for stage in ("queue", "forward", "encode"):
        assert grown("cgan_stage_duration_seconds_count", stage=stage) == 1
    assert after[("cgan_queue_images", ())] == 0
    assert after[("cgan_ready", ())] == 1
    assert total(after, "cgan_model_info") == len(client.get("/models").json()["models"])
    assert total(after, "process_resident_memory_bytes") > 0


def test_labels_of_metrics_stay_bounded_whatever_is_asked_for(client: httpx.Client) -> None:
    client.get("/made/up/1")
    client.request("BREW", "/made/up/2")
    client.request("BREW", "/generate")
    before = {key for key in samples(client) if key[0].startswith("cgan_requests")}
    for number in range(20):
        client.get(f"/made/up/{number}")
        client.request(f"BREW{number}", "/made/up")
        client.request(f"BREW{number}", "/generate")
        client.post(f"/generate?label=made-up-{number}")
    after = {key for key in samples(client) if key[0].startswith("cgan_requests")}
    assert len(after - before) <= 1  # the first 422


def test_metrics_are_served_in_the_format_that_is_asked_for(client: httpx.Client) -> None:
    accept = "application/openmetrics-text; version=1.0.0"
    answer = client.get("/metrics", headers={"Accept": accept})
    assert answer.headers["Content-Type"].startswith("application/openmetrics-text")
    assert answer.text.rstrip().endswith("# EOF")


@pytest.mark.parametrize(
    ("method", "path", "status", "words"),
    [
        ("GET", "/nothing", 404, "Nothing is served at /nothing"),
        ("PUT", "/generate", 405, "allowed: GET, HEAD, POST"),
        ("DELETE", "/models", 405, "allowed: GET"),
    ],
)
def test_a_wrong_path_or_method_is_a_problem(
    client: httpx.Client, method: str, path: str, status: int, words: str
) -> None:
    answer = client.request(method, path)
    assert answer.status_code == status
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert words in answer.json()["detail"]
