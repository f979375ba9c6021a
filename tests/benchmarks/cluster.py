"""A Ray cluster beside workers that share a port, on one machine.

    python -m tests.benchmarks.cluster [--rounds 5] [--seconds 3]

Both have two processes with the models, and share all cores with the load: closed loops of 64
connections, rounds interleaved, medians printed. Run nothing else.
"""

import argparse
import os
import socket
import statistics
import subprocess
import sys
from contextlib import ExitStack

from tests.benchmarks.load import Sample, closed_loop, run
from tests.benchmarks.serving import SIZES, WEIGHTS, requests

COMMANDS = {
    "service, two workers": ["service", "--workers", "2"],
    "Ray, two replicas": [
        *("service", "cluster", "--device", "cpu", "--min-replicas", "2", "--max-replicas", "2")
    ],
}


def start(stack: ExitStack, command: list[str]) -> int:
    """Start a service of two processes; returns its port."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
    options = ["--port", str(port), "--models", str(WEIGHTS), "--log-level", "warning"]
    process = subprocess.Popen(
        [sys.executable, "-m", *command, *options],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    stack.callback(process.wait)
    stack.callback(process.terminate)
    assert process.stdout is not None
    if not process.stdout.readline():  # it says where it serves, once it does
        raise SystemExit(f"{' '.join(command)} did not start")
    return port


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each round")
    options = parser.parse_args()
    samples: dict[tuple[str, int, int], list[Sample]] = {}
    with ExitStack() as stack:
        ports = {name: start(stack, command) for name, command in COMMANDS.items()}
        for _ in range(options.rounds):
            for n in SIZES:
                for connections in (64, 1):
                    for name, port in ports.items():
                        load = closed_loop(
                            port, requests(n), connections=connections, seconds=options.seconds
                        )
                        samples.setdefault((name, n, connections), []).append(run(load))
    print(f"{'':<24}{'n':>4}{'connections':>13}{'requests/s':>12}{'p50 ms':>9}{'p99 ms':>9}")
    for (name, n, connections), found in samples.items():
        rate, half, most = (
            statistics.median(values)
            for values in (
                [sample.rate for sample in found],
                [sample.percentile(50) for sample in found],
                [sample.percentile(99) for sample in found],
            )
        )
        print(f"{name:<24}{n:>4}{connections:>13}{rate:>12,.0f}{half:>9.2f}{most:>9.2f}")


if __name__ == "__main__":
    main()
