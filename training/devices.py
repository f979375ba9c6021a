"""Devices by name, the precision they compute in natively, and the cores of this process."""

import math
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import torch


class DeviceError(Exception):
    """An unknown or missing device; the message names the one that was requested."""


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


def available_cores(root: Path = Path("/")) -> int:
    """Return the number of cores that this process may use, at least 1.

    That is the smallest of the scheduling affinity and the CPU quotas of the process's control
    groups (v1 and v2), which limit containers; a fraction of a core counts as one. A quota that
    cannot be read or parsed counts as no limit. `root` holds the folders `proc` and `sys`.
    """
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    try:
        quotas = [_cpu_quota(folder) for folder in _cpu_cgroups(root)]
    except (OSError, ValueError):
        return cores
    return max(1, min([cores, *(math.ceil(quota) for quota in quotas if quota is not None)]))


def limit_threads(processes: int = 1) -> None:
    """Limit PyTorch's threads to a process's share of the cores, unless OMP_NUM_THREADS is set."""
    if "OMP_NUM_THREADS" not in os.environ:
        threads = min(torch.get_num_threads(), available_cores())  # its default is physical cores
        torch.set_num_threads(max(1, threads // processes))


def _cpu_cgroups(root: Path) -> Iterator[Path]:
    """Yield the folders of the control groups whose CPU quotas limit this process.

    See cgroups(7) and proc_pid_mountinfo(5) for the two files that name them.
    """
    groups = (root / "proc/self/cgroup").read_text().splitlines()
    mounts = (root / "proc/self/mountinfo").read_text().splitlines()
    paths: dict[str, PurePosixPath] = {}  # by controller; that of v2 is ""
    for group in groups:
        _, _, controllers_and_path = group.partition(":")
        controllers, _, group_path = controllers_and_path.partition(":")
        paths.update(dict.fromkeys(controllers.split(","), PurePosixPath(group_path)))
    for mount in mounts:
        fields, _, filesystem = mount.partition(" - ")
        kind, _, options = (*filesystem.split(" "), "", "", "")[:3]
        controller = {"cgroup2": "", "cgroup": "cpu"}.get(kind)
        if controller not in paths or (controller and controller not in options.split(",")):
            continue
        mounted, point = map(PurePosixPath, fields.split(" ")[3:5])
        path = paths[controller]
        folder = root / point.relative_to("/")
        yield folder
        # A container may see its own group as the root of the mount.
        inside = path.relative_to(mounted) if path.is_relative_to(mounted) else PurePosixPath()
        for part in inside.parts:
            folder /= part
            yield folder


def _cpu_quota(cgroup: Path) -> float | None:
    """Return the cores that a control group may use; None without a limit."""
    for names in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
        try:
            quota, period = " ".join((cgroup / name).read_text() for name in names).split()
            if float(quota) > 0:
                return float(quota) / float(period)
        except (OSError, ValueError, ZeroDivisionError):  # missing, "max" or unreadable
            continue
    return None
