"""The worker processes of a service, and connections to each of them."""

import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx

from tests.support.serving import ServiceProcess
from tests.support.wire import TIMEOUT_S, wait_until


def logged(service: ServiceProcess, message: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in list(service.errors)]
    return [line for line in lines if line["message"] == message]


def pids(service: ServiceProcess, count: int = 2) -> list[int]:
    """Return the process ids of the workers, by index, once so many are ready."""

    def running() -> dict[int, int]:
        exited = {line["pid"] for line in logged(service, "worker exited")}
        ready = {line["worker"]: line["pid"] for line in logged(service, "worker ready")}
        return {index: pid for index, pid in ready.items() if pid not in exited}

    wait_until(lambda: len(running()) == count, f"{count} workers are ready")
    return [pid for _, pid in sorted(running().items())]


def client_of(service: ServiceProcess, pid: int) -> httpx.Client:
    """Return a client whose kept connection was accepted by one process; the kernel chooses it."""
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline:
        client = httpx.Client(
            base_url=service.client.base_url,
            timeout=TIMEOUT_S,
            limits=httpx.Limits(keepalive_expiry=None),
        )
        stream = client.get("/livez").extensions["network_stream"]
        if _inode(stream.get_extra_info("server_addr"), stream.get_extra_info("client_addr")) in (
            _sockets(pid)
        ):
            return client
        client.close()
    raise AssertionError(f"no connection was accepted by {pid}")


def _inode(service: tuple[str, int], client: tuple[str, int]) -> str:
    """Return the inode of the service's socket of a connection."""
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if [int(each.rpartition(":")[2], 16) for each in fields[1:3]] == [service[1], client[1]]:
            return fields[9]
    return ""


def _sockets(pid: int) -> set[str]:
    """Return the inodes of the sockets of a process."""
    found = set()
    for path in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):  # it has just been closed
            found.add(str(path.readlink()).removeprefix("socket:[").removesuffix("]"))
    return found


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    """Stop a process for the duration of the block."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
