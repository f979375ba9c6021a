import pytest
import torch

from service.inference import devices
from service.inference.devices import describe_device, resolve_device
from training.machine import DeviceError


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "count_cuda_devices", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


def test_auto_is_the_cpu_without_a_cuda_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "count_cuda_devices", lambda: 0)
    assert resolve_device("auto") == resolve_device("cpu") == "cpu"
    assert describe_device("cpu") == "the CPU"


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize(
    ("name", "expected"),
    [("auto", "cuda:0"), ("cuda", "cuda:0"), ("cuda:1", "cuda:1"), ("cpu", "cpu")],
)
def test_a_gpu_has_its_number(name: str, expected: str) -> None:
    assert resolve_device(name) == expected


@pytest.mark.usefixtures("two_gpus")
def test_without_pytorch_auto_is_the_cpu_and_cuda_names_the_missing_package(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(devices, "find_spec", lambda _name: None)
    assert resolve_device("auto") == "cpu"
    with pytest.raises(DeviceError, match=r"needs PyTorch.*pip install -e '.\[gpu\]'"):
        resolve_device("cuda")


@pytest.mark.parametrize("name", ["", "tpu", "CPU", "cpu:0", "meta"])
def test_an_unknown_device_is_an_error_that_names_the_known_ones(name: str) -> None:
    with pytest.raises(DeviceError, match=f"'{name}'; expected auto, cpu, cuda or cuda:N"):
        resolve_device(name)
