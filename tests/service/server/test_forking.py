"""Forked workers have the pipes of programs that are started."""

import signal

import pytest

from tests.support.processes import run

# Forks in a process of its own, because the one of the tests has threads.
FORKED = """
import asyncio, os, signal, sys
from concurrent.futures import ThreadPoolExecutor
from service.server.forking import ForkedProcess, Forker

def main(arguments):
    os.write(1, f"{arguments[0]} {os.getsid(0) == os.getpid()} {sys.gettrace()}\\n".encode())
    if arguments[0] == "fails":
        raise RuntimeError("a defect")
    os.read(0, 1)  # until the stdin ends
    return 7

async def watch(pid, output):
    process = ForkedProcess(pid, output, ThreadPoolExecutor(1))
    await process.connect()
    print((await process.stdout.readline()).decode().rstrip(), flush=True)
    return process

async def wait(process):
    print(await process.wait(), flush=True)
    process.send_signal(signal.SIGKILL)  # nothing, since it has ended

async def all_of(forked):
    processes = [await watch(*each) for each in forked]
    processes[1].send_signal(signal.SIGTERM)
    await wait(processes[1])
    await wait(processes[2])
    forker.__exit__()
    await wait(processes[0])

forker = Forker()
asyncio.run(all_of([forker.fork(main, [name]) for name in ("waits", "is stopped", "fails")]))
"""


@pytest.mark.parametrize("before", ["", "import os; os.close(0)"], ids=["", "stdin closed"])
def test_a_fork_has_a_session_pipes_and_the_end_of_its_own(before: str) -> None:
    ended = run("-c", f"{before}\n{FORKED}")
    assert ended.returncode == 0
    assert ended.stdout.splitlines() == [
        "waits True None",
        "is stopped True None",
        "fails True None",
        str(-signal.SIGTERM),
        "1",
        "7",
    ]
    assert "RuntimeError: a defect" in ended.stderr
