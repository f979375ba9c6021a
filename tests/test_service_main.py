from pathlib import Path

import pytest
import torch

from tests.serving import ServiceProcess, refused


def test_it_prints_one_line_with_the_address(bundled: Path) -> None:
    with ServiceProcess("--weights", str(bundled), "--log-level", "warning") as service:
        assert service.first_line.startswith("Serving mnist at http://127.0.0.1:")
        service.signal()
        assert service.process.stdout is not None
        assert service.process.stdout.read() == ""
        assert service.wait() == 0
    assert service.errors == []


def test_a_folder_of_artifacts_is_served_by_name(bundled: Path, tmp_path: Path) -> None:
    for name in ("b", "a"):
        (tmp_path / f"{name}.safetensors").write_bytes(bundled.read_bytes())
    with ServiceProcess(environment={"CGAN_WEIGHTS": str(tmp_path)}) as service:
        models = service.client.get("/models").json()["models"]
        assert [(model["name"], model["default"]) for model in models] == [
            ("a", True),
            ("b", False),
        ]
        answer = service.client.post("/generate?label=1&seed=1&model=b")
        assert answer.headers["X-Model"].startswith("b@sha256:")


def test_a_file_that_is_no_artifact_ends_in_one_line_with_path_and_cause(tmp_path: Path) -> None:
    path = tmp_path / "mnist.safetensors"
    torch.save({"weight": torch.zeros(3)}, path)
    message = refused("--weights", str(path))
    assert message.count("\n") == 1
    assert str(path) in message
    assert "pickle" in message


def test_an_artifact_cut_short_is_refused(bundled: Path, tmp_path: Path) -> None:
    path = tmp_path / "mnist.safetensors"
    path.write_bytes(bundled.read_bytes()[:-1])
    message = refused("--weights", str(path))
    assert message.count("\n") == 1
    assert str(path) in message


def test_weights_that_are_not_there_are_named(tmp_path: Path) -> None:
    assert str(tmp_path / "none") in refused("--weights", str(tmp_path / "none"))
    assert "holds no *.safetensors file" in refused("--weights", str(tmp_path))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_device_that_is_absent_is_refused_and_not_replaced() -> None:
    message = refused("--device", "cuda")
    assert message.count("\n") == 1
    assert "cuda was asked for" in message


def test_a_wrong_option_is_one_line() -> None:
    assert refused("--max-batch", "0") == (
        "--max-batch (or CGAN_MAX_BATCH): Input should be greater than or equal to 1, not '0'\n"
    )


def test_a_port_that_is_taken_is_said_and_ends_it(bundled: Path) -> None:
    with ServiceProcess() as service:
        port = str(service.client.base_url.port)
        message = refused("--port", port)
    assert f"127.0.0.1:{port}" in message or "address already in use" in message
    assert "Traceback" not in message
