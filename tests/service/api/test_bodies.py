"""Compressed bodies, empty ones, and forms, on every route that reads a body."""

import asyncio
import gzip
import json
import shutil
import subprocess
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.wire import LAST, ask

TENSORS = [
    {"name": name, "shape": [1], "datatype": "INT64", "data": [value]}
    for name, value in (("LABEL", 7), ("SEED", 1))
]
JSON: dict[str, Any] = {
    "/generate": {"label": 7, "seed": 1},
    "/v1/images/generations": {"prompt": "a seven", "seed": 1},
    "/v2/models/mnist/infer": {"inputs": TENSORS, "outputs": [{"name": "PNG"}]},
}
PATHS = [*JSON, "/verify"]


def body_of(client: httpx.Client, path: str) -> bytes:
    if path == "/verify":
        return client.post("/generate?label=7&seed=1").content
    return json.dumps(JSON[path]).encode()


def send(client: httpx.Client, path: str, body: bytes, encoding: str = "") -> httpx.Response:
    kind = "image/png" if path == "/verify" else "application/json"
    headers = {"Content-Type": kind, **({"Content-Encoding": encoding} if encoding else {})}
    return client.post(path, content=body, headers=headers)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("encoding", "compress"),
    [
        ("gzip", gzip.compress),
        ("X-GZIP", gzip.compress),
        ("deflate", zlib.compress),
        ("identity", bytes),
    ],
)
def test_a_compressed_body_is_read_like_a_plain_one(
    client: httpx.Client, path: str, encoding: str, compress: Callable[[bytes], bytes]
) -> None:
    body = body_of(client, path)
    plain, compressed = send(client, path, body), send(client, path, compress(body), encoding)
    assert plain.status_code == compressed.status_code == 200, compressed.text
    if path == "/v1/images/generations":  # its other field is the time
        assert compressed.json()["data"] == plain.json()["data"]
    else:
        assert compressed.content == plain.content


@pytest.mark.parametrize("path", PATHS)
def test_a_compressed_body_is_held_to_the_bounds_of_a_plain_one(
    client: httpx.Client, path: str
) -> None:
    prefixed = path.startswith("/v") and path != "/verify"
    invalid = 400 if prefixed else 422
    for body, encoding, status in (
        (zlib.compress(bytes(1 << 28)), "deflate", 413),
        (gzip.compress(bytes((1 << 20) + 1)), "gzip", 413),
        (zlib.compress(b"{}")[:-1], "deflate", invalid),
        (b"{}", "gzip", invalid),
        (b"{}", "br", 415),
        (gzip.compress(gzip.compress(b"{}")), "gzip, gzip", 415),
    ):
        answer = send(client, path, body, encoding)
        assert answer.status_code == status, (encoding, answer.text)
    assert answer.headers["Accept-Encoding"] == "gzip, deflate"
    assert "Content-Encoding: must be gzip, deflate or identity" in answer.text


def test_aiohttp_may_compress_what_it_sends(client: httpx.Client) -> None:
    aiohttp = pytest.importorskip("aiohttp")

    async def post(path: str, body: object) -> int:
        async with (
            aiohttp.ClientSession(str(client.base_url)) as session,
            session.post(path, json=body, compress="gzip") as answer,
        ):
            status: int = answer.status
            return status

    assert [asyncio.run(post(path, JSON[path])) for path in JSON] == [200, 200, 200]


@pytest.mark.parametrize("encoding", [b"", b"Content-Encoding: gzip\r\n"])
def test_a_chunked_body_of_no_bytes_is_no_body(service: Any, encoding: bytes) -> None:
    expected, _ = ask(service, b"POST /generate?label=7&seed=1 HTTP/1.1\r\n\r\n", LAST)
    for method in (b"POST", b"GET"):
        head = method + b" /generate?label=7&seed=1 HTTP/1.1\r\nTransfer-Encoding: chunked\r\n"
        answer, last = ask(service, head + encoding + b"\r\n0\r\n\r\n", LAST)
        assert (answer.status, last.status) == (200, 200)
        assert answer.body == expected.body


def curl(client: httpx.Client, path: str, *arguments: str) -> tuple[int, str]:
    """The status and the body that curl gets."""
    program = shutil.which("curl")
    if program is None:
        pytest.skip("needs curl")
    command = [program, "-sS", "-w", "\n%{http_code}", *arguments, f"{client.base_url}/{path}"]
    ended = subprocess.run(command, check=True, capture_output=True, timeout=60)
    body, _, status = ended.stdout.rpartition(b"\n")
    return int(status), body.decode("latin-1")


@pytest.mark.parametrize("form", [("-d", "label=7"), ("-F", "label=7")])
def test_a_form_is_415_with_what_to_send_instead(
    client: httpx.Client, form: tuple[str, str]
) -> None:
    status, text = curl(client, "generate", *form)
    assert status == 415
    assert "must be application/json" in text
    assert "curl -X POST 'URL?label=7'" in text
    status, text = curl(client, "v1/images/generations", *form)
    assert status == 415
    assert "must be application/json" in text


def test_the_remedies_of_a_415_work(client: httpx.Client, tmp_path: Path) -> None:
    json_type = ("-H", "Content-Type: application/json", "-d")
    assert curl(client, "generate", *json_type, '{"label": 7}')[0] == 200
    assert curl(client, "generate?label=7", "-X", "POST")[0] == 200
    assert curl(client, "v1/images/generations", *json_type, '{"prompt": "7"}')[0] == 200
    png = tmp_path / "seven.png"
    png.write_bytes(client.post("/generate?label=7").content)
    status, text = curl(client, "verify", "-F", f"file=@{png}")
    assert status == 415
    assert "--data-binary @FILE.png" in text
    assert curl(client, "verify", "--data-binary", f"@{png}")[0] == 200
    assert curl(client, "v2/models/mnist/infer", "-F", "label=7")[0] == 415
