"""The README is the front door: what it says must be so."""

import re

from service.settings import Settings
from tests.serving import REPOSITORY, ServiceProcess
from training.config import PRESETS

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")


def test_its_two_commands_are_complete() -> None:
    commands = re.findall(r"^    (python3 -m venv .*)$", README, re.MULTILINE)
    assert commands == [
        "python3 -m venv .venv && .venv/bin/pip install -e . && .venv/bin/python -m service",
        "python3 -m venv .venv && .venv/bin/pip install -e '.[test]' && .venv/bin/pytest",
    ]


def test_its_request_is_answered(service: ServiceProcess) -> None:
    (query,) = re.findall(r"curl -X POST 'localhost:8000(/generate\S+)'", README)
    answer = service.client.post(query)
    assert answer.status_code == 200
    assert answer.headers["Content-Type"] == "image/png"


def test_it_lists_every_option_with_its_default() -> None:
    section = README[README.index("| option |") : README.index("With `--workers 4`")]
    flags = set(re.findall(r"`--([a-z-]+)`", section))
    assert flags == {name.replace("_", "-") for name in Settings.model_fields}
    for name in ("host", "port", "max_batch", "max_queue", "timeout_ms", "burst_images"):
        assert str(Settings.model_fields[name].default) in section


def test_it_lists_every_parameter(service: ServiceProcess) -> None:
    operation = service.client.get("/openapi.json").json()["paths"]["/generate"]["post"]
    section = README[README.index("| parameter |") : README.index("`Accept: image/png`")]
    listed = re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)
    assert sorted(listed) == sorted(each["name"] for each in operation["parameters"])


def test_it_lists_every_preset() -> None:
    section = README[README.index("| preset |") : README.index("A run begins with")]
    assert set(re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)) == PRESETS.keys()
