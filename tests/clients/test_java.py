"""The HTTP client of the JDK, which offers an upgrade to HTTP/2 with every request."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.serving import serve_here

JAVA = shutil.which("java")
PROGRAM = Path(__file__).with_name("Client.java")

pytestmark = pytest.mark.skipif(JAVA is None, reason="needs java, 11 or newer")


def test_the_client_of_the_jdk_gets_images_from_every_api() -> None:
    label, seed = (
        {"name": name, "shape": [1], "datatype": "INT64", "data": [value]}
        for name, value in (("LABEL", 7), ("SEED", 1))
    )
    bodies = {
        "/generate": {"label": 7, "seed": 1},
        "/v1/images/generations": {"prompt": "a seven", "seed": 1},
        "/v2/models/mnist/infer": {"inputs": [label, seed], "outputs": [{"name": "PNG"}]},
    }
    with serve_here("--self-test-interval-s", "3600") as service:
        url = str(service.client.base_url).rstrip("/")
        arguments = [
            part for path, body in bodies.items() for part in (url + path, json.dumps(body))
        ]
        assert JAVA is not None
        command = [JAVA, str(PROGRAM), *arguments]
        ended = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    lines = [line.split() for line in ended.stdout.splitlines()]
    assert [line[:3] for line in lines] == [
        *[["200", "HTTP_1_1", "image/png"]] * 2,
        *[["200", "HTTP_1_1", "application/json"]] * 4,
    ]
    assert [line[3] for line in lines[::2]] == [line[3] for line in lines[1::2]]
