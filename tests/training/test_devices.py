import pytest
import torch

from training.devices import (
    describe,
    has_native_bfloat16,
    limit_threads,
    resolve_device,
)
from training.machine import DeviceError


def test_auto_is_cuda_where_there_is_one_and_else_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("auto") == torch.device("cuda")
    assert resolve_device("cuda:1") == torch.device("cuda:1")


def test_a_missing_device_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(DeviceError, match=r"cuda:1 is missing: PyTorch .* sees 1 CUDA devices"):
        resolve_device("cuda:1")


@pytest.mark.parametrize("name", ["", "tpu", "CPU", "cpu:0", "cuda:", "cuda:x", "cuda:-1", "meta"])
def test_an_unknown_device_is_an_error_that_names_the_known_ones(name: str) -> None:
    with pytest.raises(DeviceError, match=f"'{name}'; expected auto, cpu, cuda or cuda:N"):
        resolve_device(name)


def test_a_device_has_a_name_for_people() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert describe(torch.device("cpu")) == "the CPU, 1 thread"
        torch.set_num_threads(2)
        assert describe(torch.device("cpu")) == "the CPU, 2 threads"
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("supported", [True, False])
def test_bfloat16_of_the_cpu_depends_on_its_instructions(
    supported: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if torch.cpu.get_capabilities()["architecture"] == "x86_64":
        assert "avx512_bf16" in torch.cpu.get_capabilities()
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": supported})
    assert has_native_bfloat16(torch.device("cpu")) is supported
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    assert not has_native_bfloat16(torch.device("cpu"))


@pytest.mark.parametrize(("threads", "cores", "expected"), [(8, 16, 8), (8, 3, 3)])
def test_threads_are_at_most_the_cores_of_the_process(
    threads: int, cores: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits: list[int] = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(torch, "set_num_threads", limits.append)
    monkeypatch.setattr("training.devices.available_cores", lambda: cores)
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    limit_threads()
    assert limits == []
    monkeypatch.delenv("OMP_NUM_THREADS")
    limit_threads()
    assert limits == [expected]
