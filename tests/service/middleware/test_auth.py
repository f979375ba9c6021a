"""API keys, on a real service."""

import asyncio
import base64
import hmac
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from starlette.types import Message, Receive, Scope, Send

from service.keys import parse_keys
from service.middleware.auth import APIKeyMiddleware
from tests.conftest import make_artifact
from tests.service.api.test_health import samples
from tests.support.serving import ServiceProcess

ALICE, BOB, CAROL = "a" * 20, "b" * 20 + "==", "c" * 20
PATHS = ("/", "/readyz", "/metrics", "/models", "/docs", "/docs/start.js", "/openapi.json", "/no")


def bearer(secret: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {secret}"}


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_artifact(tmp_path_factory.mktemp("weights") / "small.safetensors")


@pytest.fixture(scope="module")
def locked(artifact: Path) -> Iterator[ServiceProcess]:
    """Alice has no limit; Bob and Carol have 50 images, which refill within hours."""
    keys = f"alice:{ALICE},bob:{BOB}:0.001,carol:{CAROL}:0.001"
    with ServiceProcess(
        *("--models", str(artifact), "--burst-images", "50"), environment={"CGAN_API_KEYS": keys}
    ) as running:
        yield running


@pytest.fixture
def client(locked: ServiceProcess) -> httpx.Client:
    return locked.client


def password(secret: str) -> str:
    return base64.b64encode(f"anybody:{secret}".encode()).decode()


def requests(client: httpx.Client, headers: dict[str, str]) -> Iterator[httpx.Response]:
    for path in PATHS:
        yield client.get(path, headers=headers)
    yield client.post("/generate?label=cat", headers=headers)
    yield client.get("/generate", headers=headers)
    yield client.options("/generate", headers=headers)


# Keys --------------------------------------------------------------------------------------------


def test_only_liveness_requires_no_key(client: httpx.Client) -> None:
    assert client.get("/livez").status_code == 200
    for answer in requests(client, {}):
        assert answer.status_code == 401
        assert answer.headers["WWW-Authenticate"] == "Bearer"
        assert answer.headers["Content-Type"] == "application/problem+json"
        assert answer.json()["type"] == "urn:cgan:problem:unauthorized"
        assert answer.json()["request_id"] == answer.headers["X-Request-ID"]


def test_the_schema_states_where_a_key_is_required(client: httpx.Client) -> None:
    schema = client.get("/openapi.json", headers=bearer(ALICE)).json()
    schemes = schema["components"]["securitySchemes"]
    assert {name: each["scheme"] for name, each in schemes.items()} == {
        "key": "bearer",
        "password": "basic",
    }
    for path, operations in schema["paths"].items():
        for operation in operations.values():
            needed = path not in {"/livez", "/v2/health/live"}
            assert ("401" in operation["responses"]) == needed
            assert operation.get("security") == (
                [{"key": []}, {"password": []}] if needed else None
            )


def test_with_a_key_every_path_works(client: httpx.Client) -> None:
    statuses = [answer.status_code for answer in requests(client, bearer(ALICE))]
    assert statuses == [200, 200, 200, 200, 200, 200, 200, 404, 200, 422, 405]


@pytest.mark.parametrize("scheme", ["bearer ", "BEARER ", "Bearer   "])
def test_the_scheme_is_case_insensitive(client: httpx.Client, scheme: str) -> None:
    assert client.get("/models", headers={"Authorization": scheme + BOB}).status_code == 200


def test_a_browser_sends_a_key_as_a_password(client: httpx.Client) -> None:
    basic = {"Authorization": f"Basic {password(BOB)}"}
    for site in ({}, {"Sec-Fetch-Site": "none"}, {"Sec-Fetch-Site": "same-origin"}):
        assert client.get("/", headers=basic | site).status_code == 200
    assert client.get("/", headers=basic | {"Sec-Fetch-Site": "cross-site"}).status_code == 401


def test_only_navigation_asks_for_a_password(client: httpx.Client) -> None:
    page = client.get("/", headers={"Sec-Fetch-Mode": "navigate"})
    assert page.headers["WWW-Authenticate"].startswith("Basic realm=")
    script = client.get("/models", headers={"Sec-Fetch-Mode": "cors"})
    assert script.headers["WWW-Authenticate"] == "Bearer"


@pytest.mark.parametrize(
    "sent",
    [
        [],
        [""],
        ["Bearer"],
        [ALICE],
        [f"Basic {ALICE}"],
        [f"Basic {password(ALICE[:-1])}"],
        [f"Basic {password(ALICE)}x"],
        [f"Bearer{ALICE}"],
        [f"Bearer {ALICE[:-1]}"],
        [f"Bearer {ALICE}a"],
        [f"Bearer {ALICE.upper()}"],
        [f"Bearer alice:{ALICE}"],
        [f"Bearer {ALICE}", f"Bearer {ALICE}"],
        ["Bearer é"],
    ],
)
def test_every_invalid_key_gets_the_same_answer(client: httpx.Client, sent: list[str]) -> None:
    headers = [(b"X-Request-ID", b"same")]
    headers += [(b"Authorization", each.encode("latin-1")) for each in sent]
    answer = client.post("/generate?label=cat", headers=headers)
    expected = client.post("/generate?label=cat", headers={"X-Request-ID": "same"})
    assert answer.status_code == expected.status_code == 401
    assert answer.content == expected.content
    assert answer.headers.keys() == expected.headers.keys()


def test_every_key_is_compared_whatever_was_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    passed: list[str] = []

    async def app(scope: Scope, _receive: Receive, _send: Send) -> None:
        passed.append(scope["state"]["key"])

    async def receive() -> Message:
        raise AssertionError

    async def send(_message: Message) -> None:
        pass

    keys = parse_keys(f"alice:{ALICE},bob:{BOB}")
    middleware = APIKeyMiddleware(app, dict.fromkeys(keys))
    compared = []

    def compare(a: bytes, b: bytes) -> bool:
        compared.append((len(a), len(b)))
        return a == b

    monkeypatch.setattr(hmac, "compare_digest", compare)
    sent = (b"", b"Bearer", b"Basic x", b"Bearer x", f"Bearer {ALICE}".encode(), None)
    for value in sent:
        headers = [] if value is None else [(b"authorization", value)]
        scope = {"type": "http", "method": "GET", "path": "/models", "headers": headers}
        asyncio.run(middleware(scope, receive, send))
    assert compared == [(32, 32)] * 2 * len(sent)
    assert passed == ["alice"]


# Limits ------------------------------------------------------------------------------------------


def test_over_the_limit_is_429(client: httpx.Client) -> None:
    bob = bearer(BOB)
    assert client.post("/generate?label=cat&label=dog&n=25", headers=bob).status_code == 200
    for n in (50, 1):
        refused = client.post(f"/generate?label=cat&n={n}", headers=bob)
        assert refused.status_code == 429
        assert refused.json()["type"] == "urn:cgan:problem:rate-limited"
        assert 1 <= int(refused.headers["Retry-After"]) <= n / 0.001
    assert client.post("/generate?label=cat&n=50", headers=bearer(CAROL)).status_code == 200
    assert client.post("/generate?label=cat&n=200", headers=bearer(ALICE)).status_code == 200
    with httpx.Client(base_url=client.base_url, headers=bearer(ALICE)) as prometheus:
        found = samples(prometheus)
    assert found["cgan_rejections_total", (("reason", "rate-limited"),)] == 2


def test_more_than_the_burst_of_a_key_is_422(client: httpx.Client) -> None:
    answer = client.post("/generate?label=cat&label=dog&n=26", headers=bearer(BOB))
    assert answer.status_code == 422
    (error,) = answer.json()["errors"]
    assert (error["field"], error["value"]) == ("n", "52")
    assert "at once" in error["message"]
    assert "50" in error["message"]


def test_workers_share_the_limit_of_a_key_and_log_its_name(artifact: Path, tmp_path: Path) -> None:
    """Each request is on a connection of its own, which any worker may accept."""
    file = tmp_path / "keys"
    file.write_text(f"alice:{ALICE}\nbob:{BOB}\n")
    with ServiceProcess(
        *("--models", str(artifact), "--workers", "2", "--log-level", "debug"),
        *("--burst-images", "40", "--images-per-second", "0.001", "--api-keys-file", str(file)),
    ) as service:
        url = service.client.base_url.join("/generate?label=cat&n=4")
        for secret in (ALICE, BOB, "w" * 20):
            statuses = [
                httpx.post(url, headers=bearer(secret), timeout=60).status_code for _ in range(20)
            ]
            valid = secret != "w" * 20
            assert statuses == ([200] * 10 + [429] * 10 if valid else [401] * 20)
        service.signal()
        assert service.wait() == 0
    written = service.first_line + "".join(service.errors)
    for secret in (ALICE, BOB, "w" * 20):
        assert secret not in written
    lines = [json.loads(line) for line in service.errors]
    names = Counter((line["status"], line.get("key")) for line in lines if "status" in line)
    expected = {(200, "alice"): 10, (200, "bob"): 10, (429, "alice"): 10, (429, "bob"): 10}
    assert names == expected | {(401, None): 20}
