"""The number of processes that `--workers auto` chooses."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from service.inference import devices
from service.server import sizing
from service.server.sizing import MAX_AUTO_WORKERS, available_memory, choose_workers
from service.settings import Settings

GIB = 1 << 30
Machine = Callable[..., None]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Return a function that simulates a machine."""

    def simulate(*, cores: int, memory: int = 1024 * GIB, gpu: bool = False) -> None:
        monkeypatch.setattr(sizing, "available_cores", lambda: cores)
        monkeypatch.setattr(sizing, "available_memory", lambda: memory)
        monkeypatch.setattr(devices, "count_cuda_devices", lambda: int(gpu))

    return simulate


@pytest.mark.parametrize(
    ("cores", "memory", "expected"),
    [
        (1, 8 * GIB, 1),
        (2, 8 * GIB, 2),
        (8, 16 * GIB, 8),
        (8, 2 * GIB, 4),
        (8, GIB // 4, 1),
        (64, 256 * GIB, MAX_AUTO_WORKERS),
    ],
)
def test_auto_is_one_process_for_each_core_as_far_as_the_memory_suffices(
    cores: int, memory: int, expected: int, machine: Machine
) -> None:
    machine(cores=cores, memory=memory)
    assert choose_workers(Settings()) == expected


@pytest.mark.parametrize(
    ("device", "gpu", "expected"),
    [
        ("auto", True, 1),
        ("auto", False, 8),
        ("cuda", True, 1),
        ("cuda:1", True, 1),
        ("cpu", True, 8),
    ],
)
def test_auto_is_one_process_on_a_gpu(
    device: str, gpu: bool, expected: int, machine: Machine
) -> None:
    machine(cores=8, gpu=gpu)
    assert choose_workers(Settings(device=device)) == expected


def test_auto_is_one_process_where_several_cannot_share_a_port(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(cores=8)
    assert choose_workers(Settings(unix_socket=Path("/run/cgan.sock"))) == 1
    for system in ("darwin", "win32"):
        monkeypatch.setattr(sys, "platform", system)
        assert choose_workers(Settings()) == 1


def test_a_number_that_is_given_is_used(machine: Machine) -> None:
    machine(cores=2, memory=GIB)
    assert choose_workers(Settings(workers=40)) == 40


@pytest.mark.parametrize(
    "name", ["sys/fs/cgroup/memory.max", "sys/fs/cgroup/memory/memory.limit_in_bytes"]
)
def test_the_memory_is_that_of_the_container(name: str, tmp_path: Path) -> None:
    all_of_it = available_memory(tmp_path)
    assert all_of_it > 0
    limit = tmp_path / name
    limit.parent.mkdir(parents=True)
    for text, expected in (("1073741824\n", GIB), ("max\n", all_of_it)):
        limit.write_text(text)
        assert available_memory(tmp_path) == expected
