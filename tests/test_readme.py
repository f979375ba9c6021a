"""The README is the front door: what it says must be so."""

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from service.settings import Settings
from tests.support.processes import REPOSITORY
from tests.support.serving import ServiceProcess
from training.config import PRESETS

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")


def test_its_two_commands_are_complete() -> None:
    commands = re.findall(r"^    (python3 -m venv .*)$", README, re.MULTILINE)
    assert commands == [
        "python3 -m venv .venv && .venv/bin/pip install -e . && .venv/bin/python -m service",
        "python3 -m venv .venv && .venv/bin/pip install -e '.[test]' && .venv/bin/pytest -n 2",
    ]


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
@pytest.mark.parametrize(
    "line", re.findall(r"^    (curl .*localhost:8000.*)$", README, re.MULTILINE)
)
def test_its_requests_are_answered(service: ServiceProcess, tmp_path: Path, line: str) -> None:
    command = line.replace("localhost:8000", f"localhost:{service.client.base_url.port}")
    subprocess.run(
        ["bash", "-c", f"{command} --silent --show-error --fail"],
        cwd=tmp_path,
        check=True,
        timeout=60,
    )
    (path,) = tmp_path.iterdir()
    assert path.name in line
    if path.suffix == ".zip":
        with zipfile.ZipFile(path) as opened:
            assert opened.testzip() is None
    else:
        with Image.open(path) as image:
            image.verify()


@pytest.mark.parametrize(
    "code", re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
)
def test_its_examples_run(service: ServiceProcess, tmp_path: Path, code: str) -> None:
    address = f"localhost:{service.client.base_url.port}"
    assert "localhost:8000" in code
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code.replace("localhost:8000", address)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout or any(tmp_path.iterdir())


def test_its_picture_for_a_page_is_answered(service: ServiceProcess) -> None:
    (path,) = re.findall(r'<img src="http://localhost:8000(\S+)"', README)
    answer = service.client.get(path)
    assert answer.status_code == 200
    assert answer.headers["Content-Type"] == "image/png"
    assert "ETag" in answer.headers


def test_it_lists_every_option_with_its_default() -> None:
    section = README[README.index("| option |") : README.index("With `--workers 4`")]
    flags = set(re.findall(r"`--([a-z-]+)`", section))
    assert flags == {name.replace("_", "-") for name in Settings.model_fields}
    for name in ("host", "port", "max_batch", "max_queue_images", "burst_images"):
        assert str(Settings.model_fields[name].default) in section


def test_it_lists_every_parameter(service: ServiceProcess) -> None:
    operation = service.client.get("/openapi.json").json()["paths"]["/generate"]["post"]
    section = README[README.index("| parameter |") : README.index("`Accept: image/png`")]
    listed = re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)
    assert sorted(listed) == sorted(each["name"] for each in operation["parameters"])


def test_it_lists_every_preset() -> None:
    section = README[README.index("| preset |") : README.index("A run begins with")]
    assert set(re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)) == PRESETS.keys()
