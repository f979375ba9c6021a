"""A large data set beside small requests: `python -m tests.benchmarks.dataset [--format idx]`.

Streams a set of a million images of `mnist-mlp` from a service on one core, while another client
asks for one image at a time. Prints how fast the set came, how much memory the service had when a
tenth and when all of it was sent, and how long small requests took, alone and beside it.
"""

import argparse
import asyncio
import os
import time
from pathlib import Path

from tests.benchmarks.load import Sample, closed_loop, run
from tests.benchmarks.serving import CLIENT_CORE, OURS, Server, requests

CLASSES = 10
ALONE_S = 10.0


class Memory:
    """Resident memory of a process, in MB, while a share of something is done."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self.tenth = 0.0
        self.most = 0.0

    def note(self, share: float) -> None:
        """Look at it."""
        status = Path(f"/proc/{self._pid}/status").read_text()
        resident = int(status.partition("VmRSS:")[2].split()[0]) / 1024
        if share <= 0.1:
            self.tenth = max(self.tenth, resident)
        self.most = max(self.most, resident)


async def download(port: int, target: str, memory: Memory) -> float:
    """Read a whole answer, and how many seconds that took."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    began = time.perf_counter()
    writer.write(f"GET {target} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())
    head = await reader.readuntil(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 200"):
        raise SystemExit(head.decode())
    length = left = int(head.lower().partition(b"content-length:")[2].split()[0])
    noted = began
    while left:
        block = await reader.read(1 << 20)
        if not block:
            raise SystemExit("the set was cut off")
        left -= len(block)
        if (now := time.perf_counter()) > noted + 0.5 or not left:
            noted = now
            memory.note(1.0 - left / length)
    writer.close()
    return time.perf_counter() - began


async def beside(port: int, target: str, memory: Memory) -> tuple[float, Sample]:
    """The download, and small requests in its first minute."""
    task = asyncio.ensure_future(download(port, target, memory))
    sample = await closed_loop(port, requests(1), connections=1, seconds=60.0)
    return await task, sample


def main() -> None:
    """Run it, and print what came out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--format", default="idx", choices=["zip", "webdataset", "idx", "npz"])
    parser.add_argument("--images", type=int, default=1_000_000)
    options = parser.parse_args()
    os.sched_setaffinity(0, {CLIENT_CORE})
    per_class = options.images // CLASSES
    target = f"/dataset?per_class={per_class}&seed=0&format={options.format}"
    with Server(OURS) as server:
        alone = run(closed_loop(server.port, requests(1), connections=1, seconds=ALONE_S))
        memory = Memory(server.pid)
        seconds, sample = run(beside(server.port, target, memory))
    if alone.other + sample.other:
        raise SystemExit("a small request failed")
    print(
        f"{options.images:,} images as {options.format} in {seconds:.0f} s, "
        f"{options.images / seconds:,.0f} a second"
    )
    print(f"memory: {memory.tenth:.0f} MB by a tenth, {memory.most:.0f} MB at most")
    for name, found in (("alone", alone), ("beside", sample)):
        print(
            f"one image, {name}: median {found.percentile(50):.2f} ms, "
            f"p99 {found.percentile(99):.2f} ms, {len(found.latencies):,} answered, "
            f"{len(found.refusals)} refused"
        )


if __name__ == "__main__":
    main()
