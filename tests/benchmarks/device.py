"""One device: a forward, the engine, and the service with more and more workers.

    python -m tests.benchmarks.device [--device cuda] [--weights FILE] [--workers 1 4 12]

First in this process, by batch size: the forward alone (on a GPU the replay of its captured graph,
by the device's own clock), and a call of the engine, which draws latents, copies both ways and
makes pixels. Where a call's time goes is shown by PyTorch's profiler with --profile. Then over
HTTP, as contact sheets: images a second, latencies, and the memory that each worker takes on the
device. Several processes make the load, because one in Python is slower than several workers.
"""

import argparse
import dataclasses
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from service.inference import devices as service_devices
from service.inference.cuda import TorchNetwork
from service.inference.engine import Engine
from service.inference.latents import draw_latents
from tests.benchmarks.load import Sample, closed_loop, run
from tests.benchmarks.serving import WEIGHTS, requests
from tests.support.serving import ServiceProcess
from training.devices import describe, resolve_device
from training.loading import load_artifact

BATCHES = (8, 16, 64, 128, 256)
SIZES = (1, 16, 64)
CONNECTIONS = 64  # for each worker


@dataclasses.dataclass(frozen=True)
class Step:
    """Medians of one batch size, in microseconds."""

    rows: int
    latents_us: float
    forward_us: float
    call_us: float

    def __str__(self) -> str:
        images_s = 1e6 * self.rows / self.call_us
        return (
            f"{self.rows:>6}{self.latents_us:>12,.0f}{self.forward_us:>12,.0f}"
            f"{self.call_us:>12,.0f}{images_s:>14,.0f}"
        )


def microseconds(function: Callable[[], object], seconds: float) -> float:
    """Return the median time of a call, over as many calls as fit into `seconds`, at least five."""
    for _ in range(3):
        function()
    found: list[float] = []
    end = time.perf_counter() + seconds
    while len(found) < 5 or time.perf_counter() < end:
        began = time.perf_counter()
        function()
        found.append(time.perf_counter() - began)
    return 1e6 * statistics.median(found)


def forward_alone(engine: Engine, rows: int, seconds: float) -> float:
    """Return the time of a forward of `rows` rows alone, in microseconds."""
    captured = engine._network._captured if isinstance(engine._network, TorchNetwork) else None
    if captured is None:
        seeds, numbers = np.full(rows, 5, np.uint64), np.arange(rows)
        inputs = engine._inputs(seeds, numbers, numbers % len(engine._embedding))
        return microseconds(partial(engine._network, *inputs), seconds)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    found: list[float] = []
    with torch.cuda.stream(captured._stream):
        for _ in range(50):
            events[0].record()
            captured._graph.replay()
            events[1].record()
            events[1].synchronize()
            found.append(1e3 * events[0].elapsed_time(events[1]))
    return statistics.median(found)


def rows_of(engine: Engine, rows: int) -> Callable[[], object]:
    """Return the time of an engine call for a number of images."""
    seeds, numbers = np.full(rows, 5, np.uint64), np.arange(rows)
    return partial(engine, seeds, numbers, numbers % engine.artifact.info.network.num_classes)


def steps(weights: Path, device: torch.device, seconds: float, profiled: bool) -> list[Step]:
    """All batch sizes, each as the largest of an engine of its own."""
    artifact, found = load_artifact(weights), []
    print(f"{'rows':>6}{'latents us':>12}{'forward us':>12}{'call us':>12}{'images/s':>14}")
    name = service_devices.resolve_device(str(device))
    for rows in BATCHES:
        engine = Engine(artifact, device=name, dtype="auto", max_batch=rows)
        seeds, numbers = np.full(rows, 5, np.uint64), np.arange(rows)
        latents = partial(draw_latents, seeds, numbers, artifact.info.network.latent_dim)
        step = Step(
            rows,
            microseconds(latents, seconds),
            forward_alone(engine, rows, seconds),
            microseconds(rows_of(engine, rows), seconds),
        )
        print(step)
        found.append(step)
    if profiled:
        show_profile(rows_of(engine, rows), device)
    return found


def show_profile(call: Callable[[], object], device: torch.device) -> None:
    """Print what a call of the engine spends its time on."""
    activities = [ProfilerActivity.CPU]
    order = "self_cpu_time_total"
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
        order = "self_device_time_total"
    with profile(activities=activities) as profiler:
        for _ in range(20):
            call()
    print(profiler.key_averages().table(sort_by=order, row_limit=12, max_name_column_width=50))


@dataclasses.dataclass(frozen=True)
class Served:
    """Medians of a number of workers under requests for n images."""

    workers: int
    n: int
    requests_s: float
    p50_ms: float
    p99_ms: float
    memory_mb: float  # of the device, for each worker

    def __str__(self) -> str:
        return (
            f"{self.workers:>8}{self.n:>5}{self.requests_s:>12,.0f}"
            f"{self.n * self.requests_s:>12,.0f}{self.p50_ms:>9.2f}{self.p99_ms:>9.2f}"
            f"{self.memory_mb:>14,.0f}"
        )


def load(port: int, n: int, connections: int, seconds: float) -> Sample:
    """One process of the load."""
    return run(closed_loop(port, requests(n), connections=connections, seconds=seconds))


def used_mb(device: torch.device) -> float:
    """Return the device's memory in use by all processes in MB; 0 for a CPU."""
    if device.type != "cuda":
        return float("nan")
    free, total = torch.cuda.mem_get_info(device)
    return (total - free) / 1e6


def served(
    weights: Path, device: torch.device, workers: int, rounds: int, seconds: float
) -> list[Served]:
    """Measure a service with a number of workers, all sizes in turn."""
    before = used_mb(device)
    share = max(1, (os.cpu_count() or 1) - workers)  # processes that make the load
    share = min(share, 4)
    connections = CONNECTIONS * workers // share
    options = ["--models", str(weights), "--device", str(device), "--workers", str(workers)]
    options += ["--max-queue-images", "1000000", "--timeout-s", "60", "--log-level", "warning"]
    found: dict[int, list[Sample]] = {n: [] for n in SIZES}
    with (
        ServiceProcess(*options) as service,
        ProcessPoolExecutor(share) as pool,
    ):
        port = service.client.base_url.port
        assert port is not None
        _await_workers(service.client, workers)
        memory = (used_mb(device) - before) / workers
        for n in SIZES:
            for number in range(rounds + 1):
                runs = [pool.submit(load, port, n, connections, seconds) for _ in range(share)]
                samples = [each.result() for each in runs]
                if number:  # the first round warms up
                    found[n].append(merged(samples))
    rows = [_medians(workers, n, found[n], memory) for n in SIZES]
    for row in rows:
        print(row)
    return rows


def _await_workers(client: httpx.Client, workers: int) -> None:
    """Wait until all take requests: the port is open as soon as one does."""
    until = time.monotonic() + 120
    while f"cgan_ready {workers}.0" not in client.get("/metrics").text:
        if time.monotonic() > until:
            raise SystemExit(f"{workers} workers did not start")
        time.sleep(0.1)


def merged(samples: Sequence[Sample]) -> Sample:
    """Merge the samples of several processes into one."""
    whole = Sample(seconds=statistics.mean(sample.seconds for sample in samples))
    for sample in samples:
        whole.good += sample.good
        whole.latencies += sample.latencies
        whole.refusals += sample.refusals
        whole.other += sample.other
    return whole


def _medians(workers: int, n: int, samples: Sequence[Sample], memory_mb: float) -> Served:
    lost = sum(sample.other + len(sample.refusals) for sample in samples)
    if lost:
        raise SystemExit(f"{workers} workers, n={n}: {lost} requests were refused or failed")
    return Served(
        workers,
        n,
        statistics.median(sample.rate for sample in samples),
        statistics.median(sample.percentile(50) for sample in samples),
        statistics.median(sample.percentile(99) for sample in samples),
        memory_mb,
    )


def main() -> None:
    """Measure all, print it, and write it down."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="an artifact")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each loop in each round")
    parser.add_argument("--profile", action="store_true", help="of a call of the engine")
    parser.add_argument("--json", type=Path, help="where to write all figures")
    options = parser.parse_args()
    device = resolve_device(options.device)
    print(f"{describe(device)}, torch {torch.__version__}, {options.weights.stem}")
    alone = steps(options.weights, device, options.seconds / 4, options.profile)
    print(
        f"{'workers':>8}{'n':>5}{'requests/s':>12}{'images/s':>12}{'p50 ms':>9}{'p99 ms':>9}"
        f"{'MB a worker':>14}"
    )
    over_http = [
        row
        for workers in options.workers
        for row in served(options.weights, device, workers, options.rounds, options.seconds)
    ]
    if options.json is not None:
        figures: dict[str, Any] = {
            "engine": [dataclasses.asdict(step) for step in alone],
            "service": [dataclasses.asdict(row) for row in over_http],
        }
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
