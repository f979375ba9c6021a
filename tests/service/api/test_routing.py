"""`HEAD` on every route."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fastapi import APIRouter

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
