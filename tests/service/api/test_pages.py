"""The pages, and the headers that restrict them."""

import json
import re

import httpx
import pytest

PAGES = ("/", "/docs")


@pytest.mark.parametrize("path", PAGES)
def test_a_page_comes_from_the_service_alone(client: httpx.Client, path: str) -> None:
    page = client.get(path)
    assert page.headers["Content-Type"] == "text/html; charset=utf-8"
    addresses = re.findall(r'(?:src|href)="([^"#]+)"', page.text)
    assert len(addresses) > 3
    for address in addresses:
        if address.startswith("data:"):
            continue
        found = client.get(page.url.join(address))
        assert found.status_code == 200, address
        assert "//" not in address
        if address.startswith(("docs/", "playground/")):
            assert found.headers["X-Content-Type-Options"] == "nosniff"


def test_the_documentation_is_of_this_api(client: httpx.Client) -> None:
    assert 'url: "openapi.json"' in client.get("/docs/start.js").text
    assert client.get("/openapi.json").json()["paths"].keys() >= {"/generate", "/models"}
    assert client.get("/redoc").status_code == 404


@pytest.mark.parametrize("path", PAGES)
def test_a_page_runs_no_script_that_the_service_did_not_send(
    client: httpx.Client, path: str
) -> None:
    page = client.get(path)
    policy = dict(
        part.strip().partition(" ")[::2]
        for part in page.headers["Content-Security-Policy"].split(";")
    )
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == "'self'"
    assert policy["frame-ancestors"] == "'none'"
    assert re.findall(r"<script>|<script [^>]*>[^<]|\son\w+=|\sstyle=|<style", page.text) == []
    assert page.headers["X-Content-Type-Options"] == "nosniff"
    assert page.headers["Referrer-Policy"] == "no-referrer"


def test_every_reference_in_the_schema_leads_somewhere(client: httpx.Client) -> None:
    """A reference that leads nowhere is an error at the top of the page."""
    whole = client.get("/openapi.json").json()
    found = re.findall(r'"\$ref": ?"#/([^"]+)"', json.dumps(whole))
    assert found
    for reference in found:
        part = whole
        for name in reference.split("/"):
            part = part[name]


@pytest.mark.parametrize("path", ["/docs", "/models", "/openapi.json", "/no"])
def test_no_other_origin_is_let_in(client: httpx.Client, path: str) -> None:
    origin = {"Origin": "http://elsewhere.example"}
    preflight = {**origin, "Access-Control-Request-Method": "POST"}
    for answer in (
        client.get(path, headers=origin),
        client.options(path, headers=preflight),
        client.options("/generate", headers=preflight),
        client.post("/generate?label=7", headers=origin),
    ):
        assert [name for name in answer.headers if name.startswith("access-control")] == []


@pytest.mark.parametrize("path", ["/docs", "/livez", "/metrics", "/no", "/generate"])
def test_no_answer_says_what_it_is_made_of(client: httpx.Client, path: str) -> None:
    answer = client.get(path)
    assert "server" not in answer.headers
    assert "x-powered-by" not in answer.headers
    if answer.is_error:
        assert not re.search(r"uvicorn|starlette|fastapi|python|\d\.\d", answer.text, re.IGNORECASE)
