import json
import pickle
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import safetensors.torch
import torch
from torch import Tensor

from service.__main__ import main
from service.server.sizing import choose_workers
from service.settings import Settings
from tests.conftest import make_artifact
from tests.support.clients import children
from tests.support.malicious_files import Payload
from tests.support.processes import run
from tests.support.serving import ServiceProcess, refused


def test_it_prints_one_line_with_the_address(bundled: Path) -> None:
    with ServiceProcess("--models", str(bundled), "--log-level", "warning") as service:
        assert service.first_line.startswith("Serving mnist at http://127.0.0.1:")
        service.signal()
        assert service.process.stdout is not None
        assert service.process.stdout.read() == ""
        assert service.wait() == 0
    assert service.errors == []


def test_the_default_command_serves_with_a_process_for_each_core(bundled: Path) -> None:
    """Ctrl-C once ends all of them."""
    workers = choose_workers(Settings())
    with ServiceProcess("--models", str(bundled), "--workers", "auto") as service:
        assert ("workers)" in service.first_line) == (workers > 1)
        assert len(children(service)) == (workers if workers > 1 else 0)
        image = service.client.post("/generate?label=7&seed=1").raise_for_status().content
        for _ in range(4):  # whichever process answers
            answer = httpx.post(service.client.base_url.join("/generate?label=7&seed=1"))
            assert answer.content == image
        service.signal(signal.SIGINT)
        assert service.wait() == 0
    assert {json.loads(line)["level"] for line in service.errors} == {"info"}


def test_ctrl_c_while_it_starts_ends_it_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(_: Settings) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("service.server.sizing.choose_workers", interrupt)
    monkeypatch.setattr(sys, "argv", ["service"])
    assert main() == 130
    assert capsys.readouterr() == ("", "")


def test_a_folder_of_artifacts_is_served_by_name(bundled: Path, tmp_path: Path) -> None:
    for name in ("b", "a"):
        (tmp_path / f"{name}.safetensors").write_bytes(bundled.read_bytes())
    link = {"CGAN_METRICS_PORT": "tcp://10.96.0.7:80"}  # of a Service `cgan-metrics` of Kubernetes
    with ServiceProcess(environment={"CGAN_MODELS": str(tmp_path), **link}) as service:
        assert "metrics at" not in service.first_line
        models = service.client.get("/models").json()["models"]
        assert [(model["name"], model["default"]) for model in models] == [
            ("a", True),
            ("b", False),
        ]
        answer = service.client.post("/generate?label=1&seed=1&model=b")
        assert answer.headers["X-Model"].startswith("b@sha256:")
    assert service.errors[0].startswith("ignored CGAN_METRICS_PORT=tcp://10.96.0.7:80, ")


def test_a_file_that_is_no_artifact_ends_in_one_line_with_path_and_cause(tmp_path: Path) -> None:
    path = tmp_path / "mnist.safetensors"
    torch.save({"weight": torch.zeros(3)}, path)
    for workers in ("1", "auto"):
        message = refused("--models", str(path), "--workers", workers)
        assert message.count("\n") == 1
        assert str(path) in message
        assert "pickle" in message


def test_an_artifact_cut_short_is_refused(bundled: Path, tmp_path: Path) -> None:
    path = tmp_path / "mnist.safetensors"
    path.write_bytes(bundled.read_bytes()[:-1])
    message = refused("--models", str(path))
    assert message.count("\n") == 1
    assert str(path) in message


def test_weights_that_are_not_there_are_named(tmp_path: Path) -> None:
    assert str(tmp_path / "none") in refused("--models", str(tmp_path / "none"))
    assert "holds no *.safetensors file" in refused("--models", str(tmp_path))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_device_that_is_absent_is_refused_and_not_replaced() -> None:
    message = refused("--device", "cuda")
    assert message.count("\n") == 1
    assert "device cuda is missing" in message


def test_a_wrong_option_is_one_line() -> None:
    assert refused("--max-batch", "0") == (
        "--max-batch (or CGAN_MAX_BATCH): Input should be greater than or equal to 1, not '0'\n"
    )


def test_a_port_that_is_taken_is_said_and_ends_it(bundled: Path) -> None:
    with ServiceProcess() as service:
        port = str(service.client.base_url.port)
        message = refused("--port", port)
    assert message == f"cannot open port {port} on 127.0.0.1: Address already in use\n"
    assert "Traceback" not in message


# Bad artifacts of every kind ---------------------------------------------------------------------


def flip(position: int) -> Callable[[Path], object]:
    def edit(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[position] ^= 4
        path.write_bytes(data)

    return edit


def change(edit: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], object]:
    """A file with the description of a good one and other tensors."""

    def rewrite(path: Path) -> None:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata()
        tensors = safetensors.torch.load(path.read_bytes())
        edit(tensors)
        path.write_bytes(safetensors.torch.save(tensors, metadata))

    return rewrite


def instead(make: Callable[[Path], object]) -> Callable[[Path], object]:
    def replace(path: Path) -> None:
        path.unlink()
        make(path)

    return replace


BIAS = "main.0.bias"
BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut short": (lambda it: it.write_bytes(it.read_bytes()[:-1]), "not a valid safetensors file"),
    "a bit of the weights": (flip(-3), "is damaged"),
    "a bit of the header": (flip(9), "is no"),
    "a bit of the header's length": (flip(1), "is no"),
    "a payload": (
        lambda it: it.write_bytes(pickle.dumps(Payload(it.with_name("trace")))),
        "is a pickle (a checkpoint?); nothing in it was executed",
    ),
    "a wrong shape": (change(lambda t: t.update({BIAS: torch.zeros(17)})), "is damaged"),
    "a wrong dtype": (change(lambda t: t.update({BIAS: t[BIAS].half()})), "is damaged"),
    "an extra tensor": (change(lambda t: t.update(x=torch.zeros(1))), "is damaged"),
    "a missing tensor": (change(lambda t: t.pop(BIAS)), "is damaged"),
    "not a number": (change(lambda t: t[BIAS].fill_(torch.nan)), f"{BIAS}: holds values that"),
    "other weights": (change(lambda t: t[BIAS].add_(1)), "is damaged"),
    "0 bytes": (
        lambda it: it.write_bytes(b""),
        "is an empty file; expected an artifact (.safetensors)",
    ),
    "a folder": (instead(Path.mkdir), "is a folder, not a file"),
    "links in a circle": (instead(lambda it: it.symlink_to(it)), "Too many levels of symbolic"),
    "unreadable": (instead(lambda it: it.symlink_to("/proc/self/mem")), "cannot be read"),
    "a link to nowhere": (instead(lambda it: it.symlink_to("none")), "cannot be read: No such"),
}

# One process for all of them, because starting it takes longer than all that it refuses.
RUN_ALL = """
import contextlib, io, json, sys
from service.__main__ import main
for path in sys.argv[1:]:
    sys.argv[1:] = ["--port", "0", "--models", path]
    with contextlib.redirect_stderr(io.StringIO()) as said:
        status = main()
    print(json.dumps([status, said.getvalue()]))
"""


@pytest.fixture(scope="module")
def endings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, int, str]]:
    """Of a start with each bad artifact: its path, the exit status and what was said."""
    paths = {}
    for kind, (spoil, _) in BAD.items():
        path = tmp_path_factory.mktemp("weights") / "small.safetensors"
        spoil(make_artifact(path))
        paths[kind] = path
    ended = run("-c", RUN_ALL, *(str(path.parent) for path in paths.values()))
    assert (ended.returncode, ended.stderr) == (0, "")
    lines: list[Any] = [json.loads(line) for line in ended.stdout.splitlines()]
    return {kind: (path, *line) for (kind, path), line in zip(paths.items(), lines, strict=True)}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_artifact_ends_the_start_with_its_path_and_cause(
    kind: str, endings: dict[str, tuple[Path, int, str]]
) -> None:
    path, status, said = endings[kind]
    assert status == 1
    assert said.startswith(f"{path}: ")
    assert BAD[kind][1] in said
    assert said.count("\n") == 1
    assert not path.with_name("trace").exists()


def test_a_path_that_no_file_could_have_is_one_line() -> None:
    assert refused("--models", "x" * 300) == f"{'x' * 300}: cannot be read: File name too long\n"
