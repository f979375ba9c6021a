"""The service beside other ways to serve the same generator, on two cores of this machine.

    python -m tests.benchmarks.serving [--rounds 5] [--seconds 2] [--beside CHECKOUT]

Every server is pinned to one core and the load generator to another; all serve `mnist-mlp`, the
document's MLP, as the same contact sheets, without an access log. Rounds of all servers are
interleaved, and medians over the rounds are printed. Run nothing else.

The closed loop has a number of connections, each of which asks again when it is answered. The open
loop asks at a constant rate, and latency counts from the time a request was due; a constant answer
is asked for at the same rate, for what client and machine add; the client sleeps until a request is
due, and then goes before the machine's other processes, where that is allowed. Bulk compares a
large zip over HTTP with the same images made and packed without it, and two processes that do so
with one, for what the second core adds.
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from service.settings import Settings
from tests.benchmarks.baselines import BASELINES
from tests.benchmarks.load import Sample, closed_loop, open_loop, post, precedence, run
from tests.benchmarks.unpinned import Build, compare
from tests.support.processes import REPOSITORY

WEIGHTS = Settings().models / "mnist-mlp.safetensors"
SERVER_CORE, CLIENT_CORE = 0, 1
OURS, PLAIN, BATCHING = "service", "plain", "batching"
CHECKED, FLOOR, BARE = "checked", "constant", "bare"
ABOUT = {
    OURS: "this service",
    PLAIN: "FastAPI, a forward per request",
    BATCHING: "FastAPI, the textbook's batcher",
    CHECKED: "FastAPI, checks, a constant PNG",
    FLOOR: "FastAPI, a constant PNG",
    BARE: "bare ASGI, a constant PNG",
}
SIZES = (1, 16, 64)
BULK = 1024
HTTP, NO_HTTP, TWO = "over HTTP", "without HTTP", "without HTTP, on both cores"


class Server:
    """A server in a process of its own, on some of the cores."""

    def __init__(self, name: str, *, cores: Iterable[int] = (SERVER_CORE,), workers: int = 1):
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port: int = free.getsockname()[1]
        if name == OURS:
            command = ["service", "--log-level", "warning", "--workers", str(workers)]
        else:
            command = ["tests.benchmarks.baselines", name]
        command += ["--port", str(self.port), "--models", str(WEIGHTS)]
        self._process = subprocess.Popen(
            [sys.executable, "-m", *command],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
        )
        os.sched_setaffinity(self._process.pid, set(cores))  # its threads will inherit it
        self._await_port()

    def _await_port(self) -> None:
        until = time.monotonic() + 120
        while True:
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", self.port)).close()
                return
            if self._process.poll() is not None or time.monotonic() > until:
                raise SystemExit("a server did not start")
            time.sleep(0.05)

    @property
    def pid(self) -> int:
        """Its process."""
        return self._process.pid

    @property
    def cpu_s(self) -> float:
        """Processor time that it has used."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def __enter__(self) -> "Server":
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: object, _trace: TracebackType | None
    ) -> None:
        self._process.terminate()
        self._process.wait()


def requests(n: int, **parameters: object) -> Iterator[bytes]:
    """Endless requests for n images of each class in turn."""
    extra = "".join(f"&{name}={value}" for name, value in parameters.items())
    return itertools.cycle([post(f"/generate?label={label}&n={n}{extra}") for label in range(10)])


@dataclasses.dataclass
class Row:
    """Medians over the rounds of one case."""

    case: str
    server: str
    rate: float  # good answers a second
    p50_ms: float
    p99_ms: float
    cpu_s_per_1000: float = float("nan")
    refused_share: float = 0.0
    refused_p99_ms: float = float("nan")
    of_saturation: float = float("nan")  # good answers, of those of 64 connections just before

    def __str__(self) -> str:
        refused = f"{self.refused_share:8.1%}" if self.refused_share else " " * 8
        return (
            f"{self.case:<24} {ABOUT[self.server]:<32}{self.rate:>9,.0f}{self.p50_ms:>9.2f}"
            f"{self.p99_ms:>9.2f}{self.cpu_s_per_1000:>10.3f}{refused}"
        )


def median_row(case: str, server: str, found: list[tuple[Sample, float]]) -> Row:
    """The medians of several rounds: samples, and the processor time that each took."""

    def median(of: Callable[[Sample], float]) -> float:
        return statistics.median(of(sample) for sample, _ in found)

    other = sum(sample.other for sample, _ in found)
    if other:
        raise SystemExit(f"{case}, {ABOUT[server]}: {other} requests failed")

    def refused(sample: Sample) -> float:
        asked = len(sample.refusals) + len(sample.latencies)
        return len(sample.refusals) / asked

    late = [latency for sample, _ in found for latency in sample.refusals]
    return Row(
        case,
        server,
        median(lambda sample: sample.rate),
        median(lambda sample: sample.percentile(50)),
        median(lambda sample: sample.percentile(99)),
        statistics.median(1e3 * cpu_s / len(sample.latencies) for sample, cpu_s in found),
        median(refused),
        1e3 * statistics.quantiles(late, n=100)[98] if len(late) > 1 else float("nan"),
    )


def closed(servers: dict[str, Server], rounds: int, seconds: float) -> list[Row]:
    """The closed loop: all servers, 64 connections and one, n of 1, 16 and 64."""
    cases = {(n, c): [OURS, PLAIN, BATCHING] for c in (64, 1) for n in SIZES}
    for c in (64, 1):
        cases[1, c] += [CHECKED, FLOOR, BARE]
    found: dict[tuple[int, int, str], list[tuple[Sample, float]]] = {}
    for _ in range(rounds):
        for (n, c), names in cases.items():
            for name in names:
                server = servers[name]
                run(closed_loop(server.port, requests(n), connections=c, seconds=0.3))
                before = server.cpu_s
                sample = run(closed_loop(server.port, requests(n), connections=c, seconds=seconds))
                found.setdefault((n, c, name), []).append((sample, server.cpu_s - before))
    return [median_row(f"n={n}, c={c}", name, each) for (n, c, name), each in found.items()]


def opened(servers: dict[str, Server], n: int, rounds: int, seconds: float) -> list[Row]:
    """The open loop, below and above what the service can do; below, a floor beside it.

    What it can do is measured again before each, as the machine may be faster or slower by then.
    """
    found: dict[tuple[float, str], list[tuple[Sample, float]]] = {}
    reached: dict[tuple[float, str], list[float]] = {}
    for _ in range(rounds):
        for share, names in ((0.6, (OURS, CHECKED)), (1.5, (OURS,))):
            loop = closed_loop(servers[OURS].port, requests(n), connections=64, seconds=seconds / 2)
            saturation = run(loop).rate
            for name in names:
                sample, cpu_s = _open(servers[name], n, share * saturation, seconds)
                found.setdefault((share, name), []).append((sample, cpu_s))
                reached.setdefault((share, name), []).append(sample.rate / saturation)
    rows = []
    for (share, name), samples in found.items():
        row = median_row(f"n={n}, open, {share:.0%}", name, samples)
        row.of_saturation = statistics.median(reached[share, name])
        rows.append(row)
    return rows


def _open(server: Server, n: int, rate: float, seconds: float) -> tuple[Sample, float]:
    """An open loop, and the processor time that the server took for what counts of it."""
    at: list[float] = []
    loop = open_loop(
        server.port,
        requests(n),
        rate=rate,
        seconds=seconds,
        connections=512,
        on_counting=lambda: at.append(server.cpu_s),
    )
    with precedence():
        sample = run(loop)
    return sample, server.cpu_s - at[0]


def two_workers(n: int, rounds: int, seconds: float) -> dict[str, float]:
    """One worker on one core beside two on both, where the load generator is on both, too."""
    found: dict[int, list[float]] = {1: [], 2: []}
    cores = (SERVER_CORE, CLIENT_CORE)
    with (
        Server(OURS) as one,
        Server(OURS, cores=cores, workers=2) as two,
    ):
        for _ in range(rounds):
            for workers, server in ((1, one), (2, two)):
                os.sched_setaffinity(0, {CLIENT_CORE} if workers == 1 else set(cores))
                run(closed_loop(server.port, requests(n), connections=64, seconds=0.5))
                sample = run(closed_loop(server.port, requests(n), connections=64, seconds=seconds))
                found[workers].append(sample.rate)
    os.sched_setaffinity(0, {CLIENT_CORE})
    return {f"{workers} workers": statistics.median(rates) for workers, rates in found.items()}


_COMPUTE = """
import os, sys, time
os.sched_setaffinity(0, {int(sys.argv[4])})
import numpy as np
from pathlib import Path
from service.inference.engine import Engine
from service.encoding.images import encode_zip
from service.encoding.timeslice import finish
from service.generation import ResolvedRequest
from service.inference.scheduling import GenerationResult
from service.inference.repository import Model
from training.artifact import read_artifact
n = int(sys.argv[2])
artifact = read_artifact(Path(sys.argv[1]))
engine = Engine(artifact, device="cpu", dtype="auto", max_batch=256)
model = Model("mnist-mlp", engine)
labels, indices = np.full(n, 7), np.arange(n)
seeds = np.full(n, 1, np.uint64)
request = ResolvedRequest(model, seeds, labels, indices)
def make():
    batches = [slice(first, first + 64) for first in range(0, n, 64)]
    made = [engine(seeds[b], indices[b], labels[b]) for b in batches]
    return finish(encode_zip(request, GenerationResult(np.concatenate(made), 0.0, 0.0), 1))
make()
print("ready", flush=True)
sys.stdin.readline()
began, made = time.perf_counter(), 0
while time.perf_counter() - began < float(sys.argv[3]):
    make()
    made += n
print(made / (time.perf_counter() - began))
"""


def compute(seconds: float, *cores: int) -> float:
    """Images a second that processes without HTTP make and pack, one on each of some cores."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _COMPUTE, str(WEIGHTS), str(BULK), str(seconds), str(core)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for core in cores
    ]
    for process in processes:
        assert process.stdout is not None
        process.stdout.readline()  # it is ready, and they begin together
    answers = [process.communicate("\n")[0] for process in processes]
    if any(process.returncode for process in processes):
        raise SystemExit("making images without HTTP failed")
    return sum(map(float, answers))


def bulk(server: Server, rounds: int, seconds: float) -> dict[str, float]:
    """Images a second in zips of 1024: over HTTP, and without it; on both cores as well."""
    found: dict[str, list[float]] = {}
    for _ in range(rounds):
        sample = run(
            closed_loop(server.port, requests(BULK, format="zip"), connections=2, seconds=seconds)
        )
        found.setdefault(HTTP, []).append(BULK * sample.rate)
        found.setdefault(NO_HTTP, []).append(compute(seconds, SERVER_CORE))
        found.setdefault(TWO, []).append(compute(seconds, SERVER_CORE, CLIENT_CORE))
    return {name: statistics.median(speeds) for name, speeds in found.items()}


def ratios(rows: list[Row], workers: dict[str, float], bulks: dict[str, float]) -> dict[str, float]:
    """Return the ratios that the pages quote."""
    by = {(row.case, row.server): row for row in rows}
    found = {
        "n=1, c=64, of FastAPI with checks": _rate(by, "n=1, c=64", OURS, CHECKED),
        "n=1, c=64, of FastAPI without": _rate(by, "n=1, c=64", OURS, FLOOR),
    }
    for n in SIZES:
        case = f"n={n}, c=64"
        found[f"{case}, rate to the batcher's"] = _rate(by, case, OURS, BATCHING)
        found[f"{case}, rate to the plain server's"] = _rate(by, case, OURS, PLAIN)
        found[f"{case}, p99 to the batcher's"] = by[case, OURS].p99_ms / by[case, BATCHING].p99_ms
        case = f"n={n}, c=1"
        found[f"{case}, p50 to the plain server's"] = by[case, OURS].p50_ms / by[case, PLAIN].p50_ms
    for row in rows:
        if row.case.endswith("open, 60%"):
            found[f"{row.case}, p99 to p50, {row.server}"] = row.p99_ms / row.p50_ms
        elif row.case.endswith("open, 150%"):
            found[f"{row.case}, rate to saturation"] = row.of_saturation
    found["two workers to one"] = workers["2 workers"] / workers["1 workers"]
    found["two processes without HTTP to one"] = bulks[TWO] / bulks[NO_HTTP]
    found["bulk, over HTTP to without"] = bulks[HTTP] / bulks[NO_HTTP]
    return found


def _rate(by: dict[tuple[str, str], Row], case: str, one: str, other: str) -> float:
    return by[case, one].rate / by[case, other].rate


def main() -> None:
    """Run everything, print it, and write it down."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each loop in each round")
    parser.add_argument("--json", type=Path, help="where to write all figures")
    parser.add_argument("--beside", type=Path, help="another checkout, in place of the baselines")
    options = parser.parse_args()
    if len(os.sched_getaffinity(0)) < 2:
        raise SystemExit("two cores are needed: one for the server, one for the load")
    os.sched_setaffinity(0, {CLIENT_CORE})
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}")
    with precedence() as allowed:
        print(
            f"the open loop's client {'goes' if allowed else 'may not go'} before other processes"
        )
    with contextlib.ExitStack() as stack:
        servers = {name: stack.enter_context(Server(name)) for name in (OURS, *BASELINES)}
        rows = closed(servers, options.rounds, options.seconds)
        for n in SIZES:
            rows += opened(servers, n, options.rounds, 2 * options.seconds)
        bulks = bulk(servers[OURS], options.rounds, options.seconds)
    workers = two_workers(16, options.rounds, options.seconds)
    report(rows, workers, bulks, options.json)
    os.sched_setaffinity(0, {SERVER_CORE, CLIENT_CORE})
    print("unpinned, default options, access log and API key")
    builds = [Build("this build", REPOSITORY)]
    if options.beside:
        builds.append(Build("other build", options.beside))
    compare(builds if options.beside else [], rounds=options.rounds)


def report(
    rows: list[Row], workers: dict[str, float], bulks: dict[str, float], path: Path | None
) -> None:
    """Print the tables; write the same as JSON."""
    print(
        f"{'':<24} {'':<32}{'req/s':>9}{'p50 ms':>9}{'p99 ms':>9}{'cpu s/1000':>10}{'refused':>8}"
    )
    for row in rows:
        print(row)
    for name, rate in workers.items():
        print(f"n=16, c=64, {name}: {rate:,.0f} req/s")
    for name, speed in bulks.items():
        print(f"zips of {BULK}, {name}: {speed:,.0f} images/s")
    found = ratios(rows, workers, bulks)
    for name, ratio in found.items():
        print(f"{name}: {ratio:.2f}")
    if path is not None:
        figures: dict[str, Any] = {
            "rows": [dataclasses.asdict(row) for row in rows],
            "workers": workers,
            "bulk": bulks,
            "ratios": found,
        }
        path.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
