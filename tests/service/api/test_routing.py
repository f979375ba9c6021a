"""`HEAD` on every route, and addresses behind a proxy."""

import re
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from fastapi import APIRouter

from tests.support.proxy import PREFIX, prefixed
from tests.support.serving import LocalService, serve_here

QUERIES = {"/generate": "label=7&n=2&seed=1", "/dataset": "per_class=1&seed=1"}
VARYING = {"date", "server-timing", "x-request-id"}


@pytest.fixture(scope="module")
def walked() -> Iterator[tuple[LocalService, set[str]]]:
    """A service, and the path of every route of it that answers GET."""
    paths = set()

    def recorded(
        add: Callable[..., None], router: APIRouter, path: str, *rest: Any, **options: Any
    ) -> None:
        if "GET" in (options.get("methods") or ["GET"]):
            paths.add(router.prefix + path)
        add(router, path, *rest, **options)

    with pytest.MonkeyPatch.context() as patch:
        for name in ("add_api_route", "add_route"):
            add = getattr(APIRouter, name)
            patch.setattr(APIRouter, name, lambda *a, add=add, **o: recorded(add, *a, **o))
        with serve_here("--self-test-interval-s", "3600") as service:
            yield service, paths


def test_every_route_that_answers_get_answers_head_alike_without_a_body(
    walked: tuple[LocalService, set[str]],
) -> None:
    service, paths = walked
    assert paths >= {"/", "/docs", "/openapi.json", "/livez", "/readyz", "/metrics", "/models"}
    assert paths >= {"/v1/models", "/v2/health/live", "/v2/health/ready", "/generate", "/dataset"}
    model = service.repository.default
    for path in sorted(paths):
        target = path.format(name=model.name, model=model.name, version=model.sha256)
        target += f"?{QUERIES[path]}" if path in QUERIES else ""
        get, head = service.client.get(target), service.client.head(target)
        assert (get.status_code, head.status_code) == (200, 200), path
        assert head.content == b"", path
        expected, found = dict(get.headers), dict(head.headers)
        assert expected["content-length"] == str(len(get.content)), path
        if path == "/metrics":  # it counts the first of the two requests
            expected.pop("content-length")
            assert int(found.pop("content-length")) >= len(get.content)
        for name in VARYING:
            assert (name in expected) == (name in found), path
            expected.pop(name, None)
            found.pop(name, None)
        assert found == expected, path


def test_an_answer_of_405_lists_head_beside_get(walked: tuple[LocalService, set[str]]) -> None:
    service, _ = walked
    answer = service.client.post("/models")
    assert (answer.status_code, answer.headers["Allow"]) == (405, "GET, HEAD")
    assert service.client.head("/verify").headers["Allow"] == "POST"


def test_the_schema_lists_get_alone(walked: tuple[LocalService, set[str]]) -> None:
    service, _ = walked
    schema = service.client.get("/openapi.json").json()
    assert not any("head" in operations for operations in schema["paths"].values())


# Behind a proxy ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def behind(walked: tuple[LocalService, set[str]]) -> Iterator[httpx.Client]:
    """A client of a proxy that serves the service below a path, and strips the path."""
    service, _ = walked
    with (
        prefixed(str(service.client.base_url)) as url,
        httpx.Client(base_url=url, timeout=60) as client,
    ):
        yield client


@pytest.mark.parametrize("page", ["", "docs"])
def test_every_link_of_a_page_works_behind_a_proxy(behind: httpx.Client, page: str) -> None:
    found = behind.get(page)
    links = re.findall(r'(?:src|href)="([^"#]+)"', found.text)
    links = [each for each in links if not each.startswith("data:")]
    links += re.findall(r'url: "([^"]+)"', behind.get("docs/start.js").text)
    assert len(links) > 3
    for link in links:
        assert behind.get(found.url.join(link)).status_code == 200, link


def test_the_schema_names_the_address_that_it_was_read_from(behind: httpx.Client) -> None:
    answer = behind.get("openapi.json")
    (server,) = answer.json()["servers"]
    assert answer.url.join(server["url"]) == behind.base_url


@pytest.mark.parametrize(
    ("path", "query"),
    [
        ("docs", ""),
        ("models", ""),
        ("generate", "?label=7&seed=1"),
        ("v2/models/mnist", ""),
        ("playground/playground.js", ""),
    ],
)
def test_a_slash_too_many_is_redirected_to_the_same_service(
    behind: httpx.Client, walked: tuple[LocalService, set[str]], path: str, query: str
) -> None:
    service, _ = walked
    for client in (behind, service.client):
        answer = client.get(f"{path}/{query}")
        assert answer.status_code == 307
        assert answer.headers["Location"].startswith("../")
        assert client.get(f"{path}/{query}", follow_redirects=True).status_code == 200
    posted = behind.post("generate/?label=7", follow_redirects=True)
    assert posted.headers["Content-Type"] == "image/png"


@pytest.mark.parametrize("path", ["/no/", "/models//", "//elsewhere.example/", "/no"])
def test_nothing_else_is_redirected(walked: tuple[LocalService, set[str]], path: str) -> None:
    service, _ = walked
    url = f"{service.client.base_url}{path}"
    assert service.client.get(url).status_code == 404


def test_a_proxy_that_strips_nothing_works_with_its_path_as_an_option() -> None:
    with serve_here("--root-path", PREFIX, "--self-test-interval-s", "3600") as service:
        direct = service.client
        with (
            prefixed(str(direct.base_url), strip=False) as url,
            httpx.Client(base_url=url, timeout=60) as proxied,
        ):
            for path in ("", "docs", "docs/start.js", "models", "v2/health/ready", "readyz"):
                assert proxied.get(path).content == direct.get(f"/{path}").content, path
            assert proxied.post("generate?label=7").headers["Content-Type"] == "image/png"
            assert proxied.get("docs/", follow_redirects=True).status_code == 200
            assert proxied.post("v1/images/generations", json={}).json()["error"]["param"]
        assert direct.get(f"{PREFIX}else/models").status_code == 404
