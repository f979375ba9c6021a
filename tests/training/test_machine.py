import ctypes
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from training.machine import available_cores, count_cuda_devices


@pytest.mark.parametrize(("status", "expected"), [(0, 3), (100, 0)])
def test_cuda_devices_are_counted_by_the_driver(
    status: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def count(pointer: object) -> int:
        pointer._obj.value = 3  # type: ignore[attr-defined]
        return 0

    driver = SimpleNamespace(cuInit=lambda _flags: status, cuDeviceGetCount=count)
    monkeypatch.setattr(ctypes, "CDLL", lambda _name: driver)
    assert count_cuda_devices() == expected


def test_without_a_driver_there_is_no_cuda_device(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> object:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", absent)
    assert count_cuda_devices() == 0


# The cores of a process -----------------------------------------------------------------------

V2 = "30 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate"
V1 = "32 31 0:29 {} /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct"
V1_MEMORY = "35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory"


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A root folder of a machine on which 16 cores are this process's by affinity."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    (tmp_path / "proc/self").mkdir(parents=True)
    return tmp_path


def describe_process(root: Path, cgroup: str, *mounts: str) -> None:
    (root / "proc/self/cgroup").write_text(f"{cgroup}\n")
    (root / "proc/self/mountinfo").write_text("".join(f"{mount}\n" for mount in mounts))


def limit(root: Path, group: str, **files: str) -> None:
    folder = root / "sys/fs/cgroup" / group
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / f"cpu.{name}").write_text(f"{text}\n")


def test_without_control_groups_the_cores_are_those_of_the_affinity(root: Path) -> None:
    assert available_cores(root) == 16


@pytest.mark.parametrize(
    ("quota", "cores"),
    [
        ("max 100000", 16),
        ("200000 100000", 2),
        ("250000 100000", 3),
        ("5000 100000", 1),
        ("9900000 100000", 16),
        ("", 16),
        ("many 100000", 16),
        ("200000", 16),
        ("100000 0", 16),
        ("-1 100000", 16),
    ],
)
def test_a_quota_of_cgroup_v2_limits_the_cores(root: Path, quota: str, cores: int) -> None:
    describe_process(root, "0::/", V2)
    limit(root, ".", max=quota)
    assert available_cores(root) == cores


def test_the_smallest_quota_of_a_group_and_its_parents_counts(root: Path) -> None:
    describe_process(root, "0::/pods/pod/container", V2)
    limit(root, "pods", max="800000 100000")
    limit(root, "pods/pod", max="300000 100000")
    limit(root, "pods/pod/container", max="max 100000")
    limit(root, "pods/other", max="100000 100000")
    assert available_cores(root) == 3


@pytest.mark.parametrize(("quota", "cores"), [("-1", 16), ("150000", 2), ("100000", 1)])
def test_a_quota_of_cgroup_v1_limits_the_cores(root: Path, quota: str, cores: int) -> None:
    describe_process(root, "9:memory:/m\n4:cpu,cpuacct:/job\n0::/", V1_MEMORY, V1.format("/"), V2)
    limit(root, "cpu,cpuacct/job", cfs_quota_us=quota, cfs_period_us="100000")
    limit(root, "memory/m", cfs_quota_us="100000", cfs_period_us="100000")
    assert available_cores(root) == cores


def test_the_root_of_a_mount_may_be_the_groups_own(root: Path) -> None:
    describe_process(root, "4:cpu,cpuacct:/docker/0123", V1.format("/docker/0123"))
    limit(root, "cpu,cpuacct", cfs_quota_us="400000", cfs_period_us="100000")
    assert available_cores(root) == 4


@pytest.mark.parametrize("mount", ["", "30", "30 23 - cgroup2", "30 23 0:26 / x - cgroup2 cgroup2"])
def test_files_that_cannot_be_parsed_mean_no_limit(root: Path, mount: str) -> None:
    describe_process(root, "0::/", mount)
    limit(root, ".", max="100000 100000")
    assert available_cores(root) == 16
    (root / "proc/self/cgroup").write_bytes(b"\xff")
    assert available_cores(root) == 16


def test_the_cores_of_this_process_are_at_least_one() -> None:
    assert 1 <= available_cores() <= (os.cpu_count() or 1)
