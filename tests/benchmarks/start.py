"""The start of the service to its first picture, and the memory that it holds then.

    python -m tests.benchmarks.start [NAME=CHECKOUT ...] [--rounds 5] [-- OPTION ...]

Each NAME=CHECKOUT is a working tree of this project; without any, this one is measured. The
service starts by its default command, with the bundled models and the OPTIONs. Rounds are
interleaved, and the first one, which fills the caches of the disk, does not count. Memory is that
after the first picture, once all workers serve: of the process that holds the most (resident), and
of all processes together, with pages that they share counted once (proportional). Run nothing else.
"""

import argparse
import http.client
import os
import socket
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter, sleep
from typing import NamedTuple

from tests.support.processes import REPOSITORY

POLL_S = 0.005
START_S = 120.0
TARGET = "/generate?label=7"


class Start(NamedTuple):
    """One start."""

    picture_s: float  # from the start of the command to the first picture
    serving_s: float  # to the line that says that all workers serve
    largest_mb: float  # resident memory of the largest process
    together_mb: float  # proportional memory of all processes

    def __str__(self) -> str:
        return (
            f"{self.picture_s:>10.2f}{self.serving_s:>10.2f}"
            f"{self.largest_mb:>12.0f}{self.together_mb:>12.0f}"
        )


def first_picture(process: subprocess.Popen[bytes], port: int) -> None:
    """Ask for a picture until the service answers.

    Raises:
        SystemExit: it exits, or does not answer within two minutes.
    """
    deadline = perf_counter() + START_S
    while process.poll() is None and perf_counter() < deadline:
        connection = http.client.HTTPConnection("127.0.0.1", port)
        try:
            connection.request("POST", TARGET)
            if connection.getresponse().read().startswith(b"\x89PNG"):
                return
        except OSError:
            sleep(POLL_S)
        finally:
            connection.close()
    raise SystemExit("the service did not start")


def memory_mb(pid: int, name: str) -> float:
    """Return a value of smaps_rollup, `Rss` or `Pss`, of one process."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith(f"{name}:")]
    return int(line.split()[1]) / 1024


def measure(checkout: Path, options: Sequence[str]) -> Start:
    """Start a working tree once, and stop it."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
    began = perf_counter()
    with subprocess.Popen(
        [sys.executable, "-m", "service", "--port", str(port), *options],
        cwd=checkout,
        env={**os.environ, "PYTHONPATH": str(checkout)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as process:
        try:
            first_picture(process, port)
            picture_s = perf_counter() - began
            assert process.stdout is not None
            process.stdout.readline()
            serving_s = perf_counter() - began
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            pids = [process.pid, *map(int, children)]
            largest = max(memory_mb(pid, "Rss") for pid in pids)
            return Start(picture_s, serving_s, largest, sum(memory_mb(pid, "Pss") for pid in pids))
        finally:
            process.terminate()


def main() -> None:
    """Measure all working trees in turn, and print the medians."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("builds", nargs="*", metavar="NAME=CHECKOUT")
    parser.add_argument("--rounds", type=int, default=5)
    own, _, given = " ".join(sys.argv[1:]).partition(" -- ")
    options, service_options = parser.parse_args(own.split()), given.split()
    named = [build.partition("=")[::2] for build in options.builds]
    builds = {name: Path(path).resolve() for name, path in named} or {"this tree": REPOSITORY}
    found: dict[str, list[Start]] = {name: [] for name in builds}
    for number in range(options.rounds + 1):
        for name, checkout in builds.items():
            start = measure(checkout, service_options)
            if number:
                found[name].append(start)
    print(f"{'':<20}{'picture s':>10}{'serving s':>10}{'largest MB':>12}{'together MB':>12}")
    for name, starts in found.items():
        print(f"{name:<20}{Start(*map(statistics.median, zip(*starts, strict=True)))}")


if __name__ == "__main__":
    main()
