"""Devices by name; a CPU needs no PyTorch."""

import logging
from importlib.util import find_spec

from training.machine import DeviceError, count_cuda_devices

log = logging.getLogger("service")

_INSTALL = "run: pip install -e '.[gpu]'"


def resolve_device(name: str) -> str:
    """Return the device that an option names: `cpu`, or `cuda:N`.

    `auto` is CUDA if there is a CUDA device and PyTorch can use it, else the CPU. A device that is
    named explicitly is never replaced by another one.

    Raises:
        DeviceError: the name is unknown, or the device or PyTorch is missing.
    """
    if name == "auto" and count_cuda_devices() and not has_pytorch():
        log.warning("the CPU is used: the GPU needs PyTorch, which is not installed; %s", _INSTALL)
    if name == "cpu" or (name == "auto" and not is_gpu(name)):
        return "cpu"
    if name != "auto" and name.partition(":")[0] != "cuda":
        raise DeviceError(f"unknown device {name!r}; expected auto, cpu, cuda or cuda:N")
    if not has_pytorch():
        raise DeviceError(f"device {name} needs PyTorch, which is not installed; {_INSTALL}")
    from training import devices  # noqa: PLC0415  (it imports PyTorch)

    device = devices.resolve_device(name)
    return "cpu" if device.type == "cpu" else f"cuda:{device.index or 0}"


def is_gpu(name: str) -> bool:
    """Return True if an option names a GPU, as far as this is known without PyTorch."""
    if name == "auto":
        # In this order: a process that has asked the driver cannot be forked any more.
        return has_pytorch() and count_cuda_devices() > 0
    return name.startswith("cuda")


def describe_device(device: str) -> str:
    """Return a device's name for people."""
    if device == "cpu":
        return "the CPU"
    from training import devices  # noqa: PLC0415

    return devices.describe(devices.resolve_device(device))


def has_native_bfloat16(device: str) -> bool:
    """Return True if a GPU multiplies bfloat16 matrices faster than float32 ones."""
    from training import devices  # noqa: PLC0415

    return devices.has_native_bfloat16(devices.resolve_device(device))


def free_memory(device: str) -> tuple[int, int]:
    """Return the free and the total memory of a GPU in bytes.

    Raises:
        RuntimeError: the device is lost.
    """
    import torch  # noqa: PLC0415

    return torch.cuda.mem_get_info(device)


def has_pytorch() -> bool:
    """Return True if PyTorch is installed."""
    return find_spec("torch") is not None
