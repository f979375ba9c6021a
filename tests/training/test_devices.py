import pytest
import torch

from training.devices import DeviceError, describe, has_native_bfloat16, resolve_device


def test_auto_is_cuda_where_there_is_one_and_else_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("auto") == torch.device("cuda")
    assert resolve_device("cuda:1") == torch.device("cuda:1")


def test_a_device_asked_for_and_absent_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(DeviceError, match=r"cuda:1 was asked for, but PyTorch .* sees 1 CUDA dev"):
        resolve_device("cuda:1")


@pytest.mark.parametrize("name", ["", "tpu", "CPU", "cpu:0", "cuda:", "cuda:x", "cuda:-1", "meta"])
def test_what_is_no_device_is_refused_with_what_is_allowed(name: str) -> None:
    with pytest.raises(DeviceError, match="allowed are auto, cpu, cuda, cuda:N"):
        resolve_device(name)


def test_a_device_is_described_in_words() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert describe(torch.device("cpu")) == "the CPU, 1 thread"
        torch.set_num_threads(2)
        assert describe(torch.device("cpu")) == "the CPU, 2 threads"
    finally:
        torch.set_num_threads(before)


def test_bfloat16_of_the_cpu_is_a_matter_of_its_instructions() -> None:
    assert isinstance(has_native_bfloat16(torch.device("cpu")), bool)
