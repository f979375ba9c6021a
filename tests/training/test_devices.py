import os
from pathlib import Path

import pytest
import torch

from training.devices import (
    DeviceError,
    available_cores,
    describe,
    has_native_bfloat16,
    limit_threads,
    resolve_device,
)


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


@pytest.mark.parametrize(
    ("threads", "cores", "processes", "expected"),
    [(8, 16, 1, 8), (8, 3, 1, 3), (8, 16, 2, 4), (8, 16, 3, 2), (8, 6, 2, 3), (8, 8, 16, 1)],
)
def test_processes_share_the_threads(
    threads: int, cores: int, processes: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits: list[int] = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(torch, "set_num_threads", limits.append)
    monkeypatch.setattr("training.devices.available_cores", lambda: cores)
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    limit_threads(processes)
    assert limits == []
    monkeypatch.delenv("OMP_NUM_THREADS")
    limit_threads(processes)
    assert limits == [expected]
