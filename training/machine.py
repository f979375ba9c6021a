"""The machine, without PyTorch: the cores of this process, and its CUDA devices."""

import ctypes
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath


class DeviceError(Exception):
    """An unknown or missing device; the message names the one that was requested."""


def count_cuda_devices() -> int:
    """Return the number of CUDA devices that this process may use; 0 without a driver."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    failed = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
    return 0 if failed else count.value


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
