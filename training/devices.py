"""Devices of PyTorch by name, and the precision they compute in natively."""

import os

import torch

from training.machine import DeviceError, available_cores


def resolve_device(name: str) -> torch.device:
    """Return the device that an option names: `auto`, `cpu`, `cuda` or `cuda:N`.

    `auto` is CUDA if PyTorch sees a CUDA device, else the CPU. A device that is named explicitly
    is never replaced by another one.

    Raises:
        DeviceError: the name is unknown, or the device is missing.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    kind, _, index = name.partition(":")
    if kind != "cuda" or (name != "cuda" and not (index.isascii() and index.isdecimal())):
        raise DeviceError(f"unknown device {name!r}; expected auto, cpu, cuda or cuda:N")
    count = torch.cuda.device_count()
    if int(index or 0) >= count:
        raise DeviceError(
            f"device {name} is missing: PyTorch {torch.__version__} sees {count} CUDA devices; "
            "use --device cpu or auto, or with Docker Compose api-cpu or train-cpu"
        )
    return torch.device(name)


def describe(device: torch.device) -> str:
    """Return a device's name for people."""
    if device.type == "cuda":
        return f"{device}, {torch.cuda.get_device_name(device)}"
    threads = torch.get_num_threads()
    return f"the CPU, {threads} thread{'' if threads == 1 else 's'}"


def has_native_bfloat16(device: torch.device) -> bool:
    """Return True if the device multiplies bfloat16 matrices faster than float32 ones."""
    if device.type == "cuda":
        native: bool = torch.cuda.is_bf16_supported(including_emulation=False)
        return native
    return bool(torch.cpu.get_capabilities().get("avx512_bf16", False))


def limit_threads() -> None:
    """Limit PyTorch's threads to the cores of this process, unless OMP_NUM_THREADS is set."""
    if "OMP_NUM_THREADS" not in os.environ:
        # Its default is the physical cores of the machine.
        torch.set_num_threads(min(torch.get_num_threads(), available_cores()))
