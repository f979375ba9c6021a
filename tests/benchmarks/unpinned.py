"""The service as users run it: default options, both cores, the access log on, an API key set.

    python -m tests.benchmarks.unpinned [NAME=CHECKOUT ...] [--rounds 5] [--seconds 1.5]
    python -m tests.benchmarks.unpinned --settings

Each NAME=CHECKOUT is a working tree of this project. Without any, this tree is compared with two
common servers of the same generator (`tests.benchmarks.baselines`). Servers and load share the
cores; nothing is pinned. `--settings` compares the default options of this tree with other numbers
of workers, and with processes that are pinned. Each round starts all servers anew, because two
processes of one build may differ by a tenth, and runs all loads against each. Medians of the rounds
are printed with the ratio to the first server. Run nothing else.
"""

import argparse
import asyncio
import itertools
import json
import os
import socket
import statistics
import subprocess
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from tests.benchmarks.load import Sample, closed_loop, run
from tests.support.processes import REPOSITORY

MODELS = ("mnist", "mnist-mlp")
SIZES = (1, 16, 64)
CONNECTIONS = (64, 1)
KEY = "a-secret-for-this-benchmark"
BASELINES = ("plain", "batching")
START_S = 120.0


class Case(NamedTuple):
    """One load.

    Attributes:
        model: name of the model.
        n: images of each request.
        connections: clients, each of which has one request in flight.
        zip_clients: further clients, each of which keeps requesting zips of 256 images meanwhile.
    """

    model: str
    n: int
    connections: int
    zip_clients: int = 0

    def __str__(self) -> str:
        beside = f" beside {self.zip_clients}" if self.zip_clients else ""
        return f"{self.model}, n={self.n}, c={self.connections}{beside}"


def requests(model: str, n: int, extra: str = "") -> Iterator[bytes]:
    """Return endless requests for images of each class in turn."""
    extra += f"&model={model}" if model != MODELS[0] else ""
    return itertools.cycle(
        [
            (
                f"POST /generate?label={label}&n={n}{extra} HTTP/1.1\r\nHost: 127.0.0.1\r\n"
                f"Authorization: Bearer {KEY}\r\nContent-Length: 0\r\n\r\n"
            ).encode()
            for label in range(10)
        ]
    )


class Build(NamedTuple):
    """A working tree, and how it is started.

    Attributes:
        name: of the row.
        checkout: folder of the working tree.
        arguments: options of the service.
        pinned: to one core, while the load has the others; or each worker to a core of its own.
    """

    name: str
    checkout: Path
    arguments: Sequence[str] = ()
    pinned: Literal["", "one core", "a core each"] = ""


def other_settings(checkout: Path) -> list[Build]:
    """Return the default options of a working tree, and everything that might be faster."""
    cores = len(os.sched_getaffinity(0))
    builds = [Build("default", checkout)]
    builds += [
        Build(f"--workers {count}", checkout, ("--workers", str(count)))
        for count in sorted({1, cores, cores + 1, 2 * cores})
    ]
    return [
        *builds,
        Build("pinned to one core", checkout, pinned="one core"),
        Build("a core for each worker", checkout, pinned="a core each"),
    ]


def start(
    stack: ExitStack, command: Sequence[str], checkout: Path, cores: Collection[int] = ()
) -> tuple[int, int]:
    """Start a server of a working tree on some cores; return its port and its process id."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
    environment = {**os.environ, "CGAN_API_KEYS": f"benchmark:{KEY}", "PYTHONPATH": str(checkout)}
    own_cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores or own_cores)  # which a child inherits
    process = subprocess.Popen(
        [sys.executable, "-m", *command, "--port", str(port)],
        cwd=checkout,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,  # the access log is formatted and written, but not kept
    )
    os.sched_setaffinity(0, own_cores)
    stack.enter_context(process)
    stack.callback(process.terminate)
    if command[0] == "service":  # it prints a line when all workers serve
        assert process.stdout is not None
        process.stdout.readline()
    for _ in range(int(START_S / 0.1)):
        if process.poll() is not None:
            break
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return port, process.pid
        with suppress(subprocess.TimeoutExpired):
            process.wait(0.1)
    raise SystemExit(f"{' '.join(command)} in {checkout} did not start")


def start_build(stack: ExitStack, build: Build) -> int:
    """Start a build as it says; return its port."""
    cores = [min(os.sched_getaffinity(0))] if build.pinned == "one core" else []
    command = ["service", *build.arguments]
    port, pid = start(stack, command, build.checkout.resolve(), cores)
    if build.pinned == "a core each":
        workers = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        for worker, core in zip(workers, itertools.cycle(os.sched_getaffinity(0))):
            for thread in Path(f"/proc/{worker}/task").iterdir():
                os.sched_setaffinity(int(thread.name), [core])
    return port


def measure_round(
    ports: dict[tuple[str, str], int],
    cases: Sequence[Case],
    seconds: float,
    apart: Collection[str],
) -> Iterator[tuple[str, Case, Sample]]:
    """Run all cases against all servers; yields name, case and what was measured.

    The load leaves the first core to the servers in `apart`.
    """
    cores = sorted(os.sched_getaffinity(0))
    for case in cases:
        for name in dict.fromkeys(name for name, _ in ports):
            port = ports.get((name, case.model), ports.get((name, "")))
            assert port is not None
            os.sched_setaffinity(0, cores[1:] if name in apart else cores)
            run(_load(port, case, 0.3))
            sample = run(_load(port, case, seconds))
            os.sched_setaffinity(0, cores)
            if sample.other or sample.refusals:
                raise SystemExit(f"{case}, {name}: requests failed")
            yield name, case, sample


async def _load(port: int, case: Case, seconds: float) -> Sample:
    small = requests(case.model, case.n)
    loads = [closed_loop(port, small, connections=case.connections, seconds=seconds)]
    if case.zip_clients:
        zips = requests(case.model, 256, "&format=zip")
        loads.append(closed_loop(port, zips, connections=case.zip_clients, seconds=seconds))
    return (await asyncio.gather(*loads))[0]


def report(found: dict[tuple[str, Case], list[Sample]], path: Path | None) -> None:
    """Print medians, and the ratio of each rate to that of the first server."""
    print(f"{'':<28}{'server':<20}{'req/s':>9}{'p50 ms':>9}{'p99 ms':>9}{'ratio':>7}")
    first = next(iter(found))[0]
    rows = []
    for case in dict.fromkeys(case for _, case in found):
        reference = statistics.median(sample.rate for sample in found[first, case])
        for name, of in found:
            if of != case:
                continue
            samples = found[name, case]
            rate = statistics.median(sample.rate for sample in samples)
            p50, p99 = (statistics.median(s.percentile(p) for s in samples) for p in (50, 99))
            print(
                f"{case!s:<28}{name:<20}{rate:>9,.0f}{p50:>9.2f}{p99:>9.2f}{rate / reference:>7.2f}"
            )
            rows.append({"case": str(case), "server": name, "rate": rate, "p50": p50, "p99": p99})
    if path is not None:
        path.write_text(json.dumps(rows, indent=1) + "\n")


def compare(
    builds: Sequence[Build],
    *,
    models: Sequence[str] = MODELS,
    sizes: Sequence[int] = SIZES,
    connections: Sequence[int] = CONNECTIONS,
    zip_clients: int = 0,
    rounds: int = 5,
    seconds: float = 1.5,
    path: Path | None = None,
) -> None:
    """Measure working trees, or, without any, this one beside the baselines; print a table.

    Args:
        builds: working trees; the first one is the reference.
        models: names of models to ask for.
        sizes: images of each request.
        connections: numbers of clients.
        zip_clients: further clients, which request zips meanwhile.
        rounds: interleaved rounds, of which medians are taken.
        seconds: duration of each loop of each round.
        path: file for the rows as JSON.
    """
    cases = [Case(*each, zip_clients) for each in itertools.product(models, sizes, connections)]
    apart = {build.name for build in builds if build.pinned == "one core"}
    found: dict[tuple[str, Case], list[Sample]] = {}
    for number in range(rounds):
        with ExitStack() as stack:
            ports = {}
            for build in builds or [Build("this service", REPOSITORY)]:
                ports[build.name, ""] = start_build(stack, build)
            if not builds:
                for name, model in itertools.product(BASELINES, models):
                    weights = REPOSITORY / "weights" / f"{model}.safetensors"
                    baseline = ["tests.benchmarks.baselines", name, "--weights", str(weights)]
                    ports[name, model], _ = start(stack, baseline, REPOSITORY)
            if number % 2:
                ports = dict(reversed(ports.items()))
            for name, case, sample in measure_round(ports, cases, seconds, apart):
                found.setdefault((name, case), []).append(sample)
    report(found, path)


def main() -> None:
    """Read the command line, and compare."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("builds", nargs="*", metavar="NAME=CHECKOUT")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.5, help="of each loop in each round")
    parser.add_argument("--workers", help="of each build")
    parser.add_argument("--settings", action="store_true", help="other settings of this tree")
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--connections", type=int, nargs="+", default=CONNECTIONS)
    parser.add_argument("--zip-clients", type=int, default=0, help="clients that request zips")
    parser.add_argument("--json", type=Path, help="where to write the rows")
    options = parser.parse_args()
    print(f"{os.cpu_count()} cores, torch {torch.__version__}")
    arguments = () if options.workers is None else ("--workers", options.workers)
    named = [build.partition("=")[::2] for build in options.builds]
    builds = [Build(name, Path(checkout), arguments) for name, checkout in named]
    compare(
        other_settings(REPOSITORY) if options.settings else builds,
        models=options.models,
        sizes=options.sizes,
        connections=options.connections,
        zip_clients=options.zip_clients,
        rounds=options.rounds,
        seconds=options.seconds,
        path=options.json,
    )


if __name__ == "__main__":
    main()
