"""Which device an option names, and what it computes in natively."""

import torch


class DeviceError(Exception):
    """A device that is not there, or no device at all; says what was asked for."""


def resolve_device(name: str) -> torch.device:
    """The device that an option names: `auto`, `cpu`, `cuda` or `cuda:N`.

    `auto` is CUDA where there is one, else the CPU. A device asked for by name is never replaced by
    another one.

    Raises:
        DeviceError: it is not there, or the name is no device's.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    kind, _, index = name.partition(":")
    if kind != "cuda" or (name != "cuda" and not (index.isascii() and index.isdecimal())):
        raise DeviceError(f"device: {name!r} is none; allowed are auto, cpu, cuda, cuda:N")
    count = torch.cuda.device_count()
    if int(index or 0) >= count:
        raise DeviceError(
            f"device: {name} was asked for, but PyTorch {torch.__version__} sees {count} CUDA "
            "devices here; use --device cpu, or auto, or with Docker Compose api-cpu or train-cpu"
        )
    return torch.device(name)


def describe(device: torch.device) -> str:
    """A device in words."""
    if device.type == "cuda":
        return f"{device}, {torch.cuda.get_device_name(device)}"
    threads = torch.get_num_threads()
    return f"the CPU, {threads} thread{'' if threads == 1 else 's'}"


def has_native_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 matrices faster than float32 ones."""
    if device.type == "cuda":
        native: bool = torch.cuda.is_bf16_supported(including_emulation=False)
        return native
    # The one question that PyTorch answers; without these instructions bfloat16 is slower.
    native = torch.cpu._is_avx512_bf16_supported()
    return native
