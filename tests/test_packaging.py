"""The wheel, the console scripts, the version, and the optional dependencies."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

from tests.support.processes import REPOSITORY

PYPROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]

# Runs a module as `python -m` does, as if the hidden packages were not installed.
WITHOUT = """
import runpy, sys
sys.modules.update(dict.fromkeys({hidden}))
sys.argv[1:] = {arguments}
runpy.run_module({module!r}, run_name="__main__", alter_sys=True)
"""


def tracked(*folders: str) -> list[str]:
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", *folders],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    return [name for name in listed.stdout.split("\0") if name and (REPOSITORY / name).exists()]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the files of the wheel, as an installer unpacks them."""
    source = tmp_path_factory.mktemp("source")
    for name in tracked("pyproject.toml", "README.md", "service", "training", "weights"):
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(REPOSITORY / name, target)
    build = "from setuptools import build_meta; build_meta.build_wheel('wheel')"
    subprocess.run(
        [sys.executable, "-c", build], cwd=source, check=True, capture_output=True, timeout=120
    )
    (wheel,) = (source / "wheel").glob("*.whl")
    folder = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def test_the_wheel_holds_the_code_the_models_and_the_data(installed: Path) -> None:
    modules = {name for name in tracked("service", "training") if name.endswith(".py")}
    data = {*tracked("service/playground", "training/quality/classifiers")}
    models = {f"service/{name}" for name in tracked("weights") if name.endswith(".safetensors")}
    assert len(modules) > 50
    assert models
    found = {str(path.relative_to(installed)) for path in installed.rglob("*") if path.is_file()}
    assert {name for name in found if ".dist-info/" not in name} == modules | data | models


def test_an_installed_service_finds_its_models_from_any_folder(
    installed: Path, tmp_path: Path
) -> None:
    (tmp_path / "weights").mkdir()  # a folder of the user's
    code = (
        f"import sys; sys.path.insert(0, {str(installed)!r})\n"
        "from service.settings import Settings; print(Settings().models)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert ended.stdout == f"{installed / 'service' / 'weights'}\n"


def test_the_console_scripts_are_the_commands(installed: Path) -> None:
    assert PROJECT["scripts"] == {
        "cgan-service": "service.__main__:main",
        "cgan-train": "training.__main__:main",
    }
    for target in PROJECT["scripts"].values():
        module, _, function = target.partition(":")
        spec = importlib.util.find_spec(module)
        assert spec is not None
        assert spec.origin is not None
        assert f"def {function}(" in Path(spec.origin).read_text()
    (distribution,) = metadata.distributions(path=[str(installed)])
    assert {each.name for each in distribution.entry_points} == PROJECT["scripts"].keys()
    assert distribution.version == PROJECT["version"]


@pytest.mark.parametrize("module", ["service", "training"])
def test_version_is_that_of_the_installed_distribution(module: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", module, "--version"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    assert metadata.version("cgan-service") in ended.stdout


def test_the_version_stands_in_pyproject_alone() -> None:
    version = re.compile(rf"[\"'=:]\s?{re.escape(PROJECT['version'])}(?![\d.])")
    files = [
        *("Dockerfile", "docker-compose.yml", ".ci", ".github"),
        *("service", "training", "tests/container.py"),
    ]
    text = {".py", ".yml", ".yaml", ".html", ".js", ""}  # a page lists the changes of each version
    found = [
        name
        for name in tracked(*files)
        if Path(name).suffix in text and version.search((REPOSITORY / name).read_text())
    ]
    assert found == []


@pytest.mark.parametrize(
    ("extra", "hidden", "command"),
    [
        ("train", {"click"}, "training --help"),
        ("train", {"pooch", "tensorboard", "tqdm"}, "training sample"),
        ("fetch", {"httpx"}, "service fetch-dataset http://localhost/dataset?seed=0 --out ."),
        ("fetch", {"tqdm"}, "service fetch-dataset http://localhost/dataset?seed=0 --out ."),
        ("cluster", {"ray"}, "service cluster"),
        # FastAPI itself installs the rest of OpenTelemetry.
        ("traces", {"opentelemetry.sdk"}, "service --otlp-endpoint http://localhost:4318"),
    ],
)
def test_a_command_without_its_extra_names_the_command_that_installs_it(
    extra: str, hidden: set[str], command: str
) -> None:
    module, *arguments = command.split()
    code = WITHOUT.format(hidden=hidden, arguments=arguments, module=module)
    ended = subprocess.run(
        [sys.executable, "-c", code],
        cwd=REPOSITORY,
        env={**os.environ, "CGAN_MODELS": str(REPOSITORY / "weights" / "mnist.safetensors")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 1
    assert "Traceback" not in ended.stderr
    assert ended.stderr.splitlines()[-1].endswith(f"run: pip install -e '.[{extra}]'")
