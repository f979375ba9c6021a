"""Tests of the images, built and run by a real engine through docker-compose.yml.

    pytest tests/container.py

`pytest` alone does not run them, because they need a Docker engine with Compose, disk space and
minutes. `.ci/engine` finds or starts an engine.
"""

import io
import json
import os
import socket
import subprocess
import time
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from PIL import Image

from tests.support.processes import REPOSITORY

PROJECT = f"cgan-test-{os.getpid()}"
START_S = 180.0  # for a service to load its models on a busy machine
VERSION = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["version"]
IMAGES = "cgan-service-cpu", "cgan-training"
# Of the image without PyTorch, which is to have at most 600 MB: the base image may take a third.
MAX_ADDED_BYTES = 400_000_000
LABELS = {"SOURCE": "https://example.org/cgan", "REVISION": "abc", "VERSION": VERSION}


def compose(
    *arguments: str, check: bool = True, **environment: str
) -> subprocess.CompletedProcess[str]:
    ended = subprocess.run(
        ["docker", "compose", "--project-name", PROJECT, *arguments],
        cwd=REPOSITORY,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    if check and ended.returncode:
        raise AssertionError(f"{arguments} ended with {ended.returncode}:\n{ended.stderr}")
    return ended


def inspect(kind: str, name: str) -> dict[str, object]:
    found = subprocess.run(["docker", kind, "inspect", name], capture_output=True, check=True)
    (one,) = json.loads(found.stdout)
    assert isinstance(one, dict)
    return one


@pytest.fixture(scope="module")
def images() -> dict[str, object]:
    compose("build", "api-cpu", "train-cpu", **LABELS)
    return {name: inspect("image", name)["Id"] for name in IMAGES}


@pytest.fixture(scope="module")
def port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return str(free.getsockname()[1])


@pytest.fixture(scope="module")
def client(images: dict[str, object], port: str) -> Iterator[httpx.Client]:
    """`docker compose up api-cpu`, healthy."""
    try:
        wait = f"{START_S:.0f}"
        started = compose(
            *("up", "--detach", "--wait", "--wait-timeout", wait, "api-cpu"),
            check=False,
            CGAN_PORT=port,
        )
        assert not started.returncode, started.stderr + compose("logs", "api-cpu").stdout
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as asking:
            yield asking
    finally:
        compose("--profile", "*", "down", "--volumes", check=False)


@pytest.mark.parametrize("name", IMAGES)
def test_the_program_in_an_image_has_the_version_of_the_project(
    images: dict[str, object], name: str
) -> None:
    said = subprocess.run(
        ["docker", "run", "--rm", name, "--version"], capture_output=True, text=True, check=True
    )
    assert VERSION in said.stdout


def inside(*command: str) -> subprocess.CompletedProcess[str]:
    return compose("exec", "-T", "api-cpu", *command, check=False)


def test_all_of_the_composition_is_valid() -> None:
    compose("--profile", "*", "config", "--quiet")


def test_built_again_nothing_changes(images: dict[str, object]) -> None:
    compose("build", "api-cpu", "train-cpu", **LABELS)
    assert {name: inspect("image", name)["Id"] for name in images} == images


@pytest.mark.parametrize("name", IMAGES)
def test_an_image_says_what_it_was_built_from(images: dict[str, object], name: str) -> None:
    config = inspect("image", name)["Config"]
    assert isinstance(config, dict)
    assert config["Labels"]["org.opencontainers.image.source"] == "https://example.org/cgan"
    assert config["Labels"]["org.opencontainers.image.revision"] == "abc"
    assert config["Labels"]["org.opencontainers.image.version"] == VERSION
    assert config["User"] == "10001:10001"


def added_bytes(image: str) -> int:
    """Return the size of what the Dockerfile adds to its base image, which differs by engine."""
    columns = "{{.Size}} {{.CreatedBy}}"
    listed = subprocess.run(
        ["docker", "history", "--human=false", "--no-trunc", "--format", columns, image],
        capture_output=True,
        text=True,
        check=True,
    )
    added, base, _ = listed.stdout.partition("useradd")  # the first step; the newest is above
    assert base
    return sum(int(line.split()[0]) for line in added.splitlines())


@pytest.mark.usefixtures("images")
def test_the_image_for_the_cpu_is_small_and_has_no_pytorch() -> None:
    assert 50_000_000 < added_bytes("cgan-service-cpu") <= MAX_ADDED_BYTES
    command = ("--entrypoint", "python", "cgan-service-cpu", "-c", "import torch")
    ended = subprocess.run(
        ["docker", "run", "--rm", *command], capture_output=True, text=True, check=False
    )
    assert "No module named 'torch'" in ended.stderr


def test_the_container_serves_the_bundled_models(client: httpx.Client) -> None:
    answer = client.post("/generate", params={"label": 7, "n": 16, "seed": 1})
    assert answer.status_code == 200
    with Image.open(io.BytesIO(answer.content)) as sheet:
        assert sheet.size == (4 * 28, 4 * 28)
    names = {model["name"] for model in client.get("/models").json()["models"]}
    bundled = {path.stem for path in (REPOSITORY / "weights").glob("*.safetensors")}
    assert names == bundled


def test_the_container_may_do_nothing_but_serve(client: httpx.Client) -> None:
    assert inside("id", "-u").stdout.strip() == "10001"
    status = inside("cat", "/proc/1/status").stdout
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert int(fields["CapEff"], 16) == int(fields["CapBnd"], 16) == 0
    assert fields["NoNewPrivs"] == "1"
    for path in ("/app/new", "/app/weights/new", "/opt/venv/new"):
        refused = inside("touch", path)
        assert refused.returncode
        assert "Read-only file system" in refused.stderr
    assert not inside("touch", "/tmp/new").returncode
    for tool in ("gcc", "cc", "make"):
        assert inside("sh", "-c", f"command -v {tool}").returncode


def test_without_a_gpu_the_default_service_ends_with_the_error_in_the_readme(
    client: httpx.Client,
) -> None:
    drivers = subprocess.run(
        ["docker", "info", "--format", "{{json .Runtimes}}"], capture_output=True, check=True
    )
    if b"nvidia" in drivers.stdout:
        pytest.skip("this engine has a driver for GPUs")
    with socket.create_server(("127.0.0.1", 0)) as free:
        other = str(free.getsockname()[1])
    ended = compose("up", "api", check=False, CGAN_PORT=other)
    assert ended.returncode
    quoted = 'could not select device driver "nvidia"'
    assert quoted in ended.stderr
    assert quoted in " ".join((REPOSITORY / "README.md").read_text().split())


def test_what_the_training_container_publishes_is_served_without_a_restart(
    client: httpx.Client, tmp_path: Path
) -> None:
    began = inside("cat", "/proc/1/stat").stdout
    made = client.get("/dataset", params={"per_class": 60, "seed": 0, "format": "zip"})
    with zipfile.ZipFile(io.BytesIO(made.content)) as pictures:
        pictures.extractall(tmp_path / "digits")
    for path in (tmp_path, *tmp_path.rglob("*")):
        path.chmod(0o755)  # the container's user is another
    compose(
        *(
            "run",
            "--rm",
            "train-cpu",
            "train",
            "/data/digits",
            "--preset",
            "mlp",
            "--minutes",
            "2",
        ),
        *("--export-to", "weights/trained.safetensors"),
        CGAN_DATA_DIR=str(tmp_path),
    )
    deadline = time.monotonic() + 60
    while "trained" not in {model["name"] for model in client.get("/models").json()["models"]}:
        assert time.monotonic() < deadline, client.get("/models").json()
        time.sleep(0.2)
    answer = client.post("/generate", params={"model": "trained", "label": 0, "seed": 1})
    assert answer.status_code == 200
    assert answer.headers["X-Model"].startswith("trained@sha256:")
    assert inside("cat", "/proc/1/stat").stdout.split()[21] == began.split()[21]  # when it started


def test_the_container_stops_in_good_order(client: httpx.Client) -> None:
    container = compose("ps", "--all", "--quiet", "api-cpu").stdout.strip()
    compose("stop", "api-cpu")
    state = inspect("container", container)["State"]
    assert isinstance(state, dict)
    assert state["ExitCode"] == 0
    assert not state["OOMKilled"]
