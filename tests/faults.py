"""Fault injection: faults done to real services, compared with the guarantees, as a table.

    python -m tests.faults [NAME]... [--markdown]

A row is a function with `@fault(done, expected)` above it: its docstring is the fault, `done` says
what is done to the service, and it returns what it observed as findings, each a text with figures
of this very run and whether that is as promised. To add one, write one; nothing else lists them.
Exit status 1 if a finding is not as promised. Needs Linux, and two cores to keep the load off the
service's.
"""

import argparse
import asyncio
import itertools
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from service.settings import MAX_IMAGES, Settings
from tests.benchmarks.load import Sample, closed_loop, open_loop, post, run
from tests.conftest import make_artifact
from tests.support.clients import (
    MALFORMED,
    TIMEOUT_S,
    Answer,
    Client,
    Held,
    at_rest,
    children,
    held,
    leave,
    metric,
    percentile,
    port_of,
    scrape,
)
from tests.support.faulty_engines import FITS, LOST, MEMORY, NAN, SLOW
from tests.support.malicious_files import Payload, torch_saved
from tests.support.serving import ServiceProcess, refused

WEIGHTS = Settings().models / "mnist-mlp.safetensors"
PATIENT = ("--max-queue-images", "1000000", "--timeout-s", "600")

OVERLOAD_ROUNDS, OVERLOAD_S = 3, 30.0
ROUNDS = 5  # of a measurement alone and beside something else, in turn; medians are compared

Findings = list[tuple[str, bool]]  # what was seen, and whether it is as promised
Scene = Callable[[], Awaitable[Findings]]


@dataclass(frozen=True)
class Fault:
    """A row of the table."""

    name: str  # of its function
    what: str
    done: str
    expected: str
    scene: Scene


@dataclass(frozen=True)
class Outcome:
    """The outcome of a row."""

    fault: Fault
    findings: Findings

    @property
    def ok(self) -> bool:
        """True if there are findings and all of them are as promised."""
        return bool(self.findings) and all(good for _, good in self.findings)

    @property
    def observed(self) -> str:
        """The findings in words; what is not as promised is marked."""
        return "; ".join(
            text if good else f"NOT AS PROMISED: {text}" for text, good in self.findings
        )


FAULTS: list[Fault] = []


def fault(done: str, expected: str) -> Callable[[Scene], Scene]:
    """Make a function a row of the table."""

    def add(scene: Scene) -> Scene:
        name, what = scene.__name__, (scene.__doc__ or "").strip().rstrip(".")
        FAULTS.append(Fault(name, what, done, expected, scene))
        return scene

    return add


@contextmanager
def served(
    *arguments: str,
    cores: int = 1,
    weights: Path = WEIGHTS,
    module: str = "service",
    environment: Mapping[str, str] = {},
) -> Iterator[ServiceProcess]:
    """The document's MLP, on the first cores of this machine; this process takes the others."""
    all_cores = sorted(os.sched_getaffinity(0))
    apart = len(all_cores) > cores
    if apart:
        os.sched_setaffinity(0, all_cores[:cores])  # which a child inherits
    try:
        with ServiceProcess(
            *("--models", str(weights), "--log-level", "warning", *arguments),
            environment={"OMP_NUM_THREADS": "1", **environment},
            module=module,
        ) as service:
            if apart:
                os.sched_setaffinity(0, all_cores[cores:])
            yield service
    finally:
        os.sched_setaffinity(0, all_cores)


def requests(n: int, form: str = "png") -> Iterator[bytes]:
    """Endless requests for n images of each class in turn."""
    targets = [f"/generate?label={label}&n={n}&format={form}" for label in range(10)]
    return itertools.cycle(map(post, targets))


async def no_error_logged(service: ServiceProcess) -> tuple[str, bool]:
    """A finding: what its log says is an error."""
    errors = sum('"level": "error"' in line for line in service.errors)
    return f"{errors} errors in its log", errors == 0


def _counts(statuses: Counter[int]) -> str:
    return ", ".join(f"{count} {status or 'closed'}" for status, count in statuses.items())


def left_over(before: Held, after: Held) -> Findings:
    """Findings: files and threads that were not given back."""
    return [
        (f"files {before.files} before, {after.files} after", after.files <= before.files),
        (
            f"threads {before.threads} before, {after.threads} after",
            after.threads <= before.threads,
        ),
    ]


# Too much ----------------------------------------------------------------------------------------


async def _warm_up(service: ServiceProcess) -> Held:
    port = port_of(service)
    await closed_loop(port, requests(64), connections=32, seconds=1.0)
    await closed_loop(port, requests(MAX_IMAGES, "zip"), connections=4, seconds=1.0)
    # These make the threads that are only made when they are needed.
    await _ask(port, f"/generate?label=1&n={MAX_IMAGES}&scale=4")
    service.signal(signal.SIGHUP)
    return await at_rest(service)


async def _peak_memory(service: ServiceProcess, work: Awaitable[Sample]) -> tuple[Sample, float]:
    """Run a loop; return its sample and the service's peak memory during it in MB."""
    task, most = asyncio.ensure_future(work), 0.0
    while not task.done():
        most = max(most, held(service).memory_mb)
        await asyncio.wait({task}, timeout=0.2)
    return task.result(), most


async def _overload(n: int, timeout_s: float, *arguments: str, cores: int = 1) -> Findings:
    """Requests for n images at ten times the peak, which is taken again between the rounds.

    On one core a refusal waits for the products of a batch; with two none has to.
    """
    prompt = 50 if cores == 1 else 99  # percentile of the refusals that must be prompt
    idle = ("--client-timeout-s", "600")  # not all connections are used all the time
    limit = ("--timeout-s", f"{timeout_s:g}")
    with served(*arguments, *idle, *limit, cores=cores) as service:
        port = port_of(service)
        before = await _warm_up(service)
        peaks = [await _peak(port, n)]
        shares: list[float] = []
        refusals: list[float] = []
        admitted, late, most_mb = 0, 0.0, 0.0
        for _ in range(OVERLOAD_ROUNDS):
            rate, earlier = 10 * peaks[-1], await _late(port)
            load = open_loop(port, requests(n), rate=rate, seconds=OVERLOAD_S, connections=1024)
            sample, held_mb = await _peak_memory(service, load)
            late, most_mb = late + await _late(port) - earlier, max(most_mb, held_mb)
            admitted, refusals = admitted + len(sample.latencies), refusals + sample.refusals
            peaks.append(await _peak(port, n))
            shares.append(sample.rate / statistics.mean(peaks[-2:]))
        after = await at_rest(service)
        goodput, peak = statistics.median(shares), statistics.median(peaks)
        refuse_ms = 1e3 * percentile(refusals, 50), 1e3 * percentile(refusals, 99)
        return [
            (f"goodput {goodput:.0%} of the peak of {peak:.0f} requests/s", goodput >= 0.9),
            (f"{late:.0f} of {admitted:,} admitted missed their deadline", late == 0),
            (f"{len(refusals):,} refused", len(refusals) > 0),
            (
                f"in {refuse_ms[0]:.1f} ms (median; 99 %: {refuse_ms[1]:.0f} ms)",
                1e3 * percentile(refusals, prompt) < 10.0,
            ),
            (f"memory {most_mb - before.memory_mb:+.0f} MB", most_mb - before.memory_mb <= 200),
            *left_over(before, after),
        ]


async def _peak(port: int, n: int) -> float:
    """Requests for n images that are answered in a second, if no more than four wait."""
    return (await closed_loop(port, requests(n), connections=4, seconds=4.0)).rate


async def _late(port: int) -> float:
    return metric(await scrape(port), "cgan_rejections_total", 'reason="deadline-exceeded"')


@fault(
    f"{OVERLOAD_ROUNDS} times {OVERLOAD_S:.0f} s of requests for 512 images at ten times the rate "
    "it can answer, the median round",
    "goodput above 90 % of the peak; nothing that was admitted is late; half of the refusals take "
    "less than 10 ms; memory bounded",
)
async def overload() -> Findings:
    """Overload"""
    return await _overload(512, 10.0)


@fault(
    "the same with two cores for the service",
    "the same, but 99 % of the refusals take less than 10 ms",
)
async def overload_of_two_cores() -> Findings:
    """Overload of a service with a core for its event loop"""
    return await _overload(512, 10.0, cores=2)


@fault(
    f"requests for {MAX_IMAGES:,}, the most that one may ask for, on one core",
    "goodput above 90 % of the peak; nothing that was admitted is late; half of the refusals take "
    "less than 10 ms; memory bounded",
)
async def overload_of_large_requests() -> Findings:
    """Overload of the largest requests"""
    return await _overload(MAX_IMAGES, 10.0)


@fault(
    "512 again, on one core, with room for 1,000,000 images and 500 ms for each request",
    "goodput above 90 % of the peak; nothing that was admitted is late; half of the refusals take "
    "less than 10 ms; memory bounded",
)
async def overload_by_deadline() -> Findings:
    """Overload that only deadlines bound"""
    return await _overload(512, 0.5, "--max-queue-images", "1000000")


@fault(
    "16 images with 100 ms to be made, behind one that takes half a second",
    "504 on time, and none of its rows is ever computed",
)
async def deadline() -> Findings:
    """A deadline that passes while queued"""
    with served(module="tests.support.faulty_engines", cores=2) as service:
        port = port_of(service)
        slow = asyncio.ensure_future(_ask(port, f"/generate?label={SLOW}"))
        await _until(port, lambda text: metric(text, "cgan_requests_in_progress") == 1)
        began = time.perf_counter()
        late = await _ask(port, "/generate?label=2&n=16&timeout_ms=100")
        after_ms = 1e3 * (time.perf_counter() - began)
        first = (await slow).status
        await at_rest(service)
        rows, _ = await _batches(port)
        return [
            (f"{late.status} after {after_ms:.0f} ms", late.status == 504 and after_ms < 200),
            (f"{rows:.0f} computed in all, the other: {first}", rows == 1 and first == 200),
        ]


async def _beside(port: int, other: Callable[[float], Awaitable[object]]) -> tuple[Sample, Sample]:
    """One client that asks for one image at a time, alone and beside something else.

    Args:
        port: of the service.
        other: the load beside it, for a number of seconds.
    """
    alone, beside = Sample(), Sample()
    for _ in range(ROUNDS):
        await _ask_alone(port, alone)
        task = asyncio.ensure_future(_void(other(3.0)))
        await asyncio.sleep(0.5)
        await _ask_alone(port, beside)
        await task
    return alone, beside


async def _ask_alone(port: int, sample: Sample) -> None:
    found = await closed_loop(port, requests(1), connections=1, seconds=2.0)
    sample.latencies += found.latencies
    sample.refusals += found.refusals
    sample.other += found.other


async def _void(work: Awaitable[object]) -> None:
    await work


def _unharmed(alone: Sample, beside: Sample, most: float) -> Findings:
    """Findings: a client was answered about as fast as when it was alone."""
    ratio = beside.percentile(99) / alone.percentile(99)
    return [
        (f"alone: median {alone.percentile(50):.2f} ms, p99 {alone.percentile(99):.2f} ms", True),
        (
            f"beside: median {beside.percentile(50):.2f} ms, p99 {beside.percentile(99):.2f} ms, "
            f"{ratio:.2f} times",
            ratio <= most,
        ),
        (
            f"{len(beside.refusals) + beside.other} refused or failed, "
            f"{len(beside.latencies):,} answered",
            not beside.refusals and not beside.other and len(beside.latencies) > 50,
        ),
    ]


@fault(
    "8 clients ask for zips of 1,024 images without a pause, one for a single image",
    "the 99th percentile of the one stays within 3 times what it is alone; nothing is refused",
)
async def flood() -> Findings:
    """A flood of large requests beside a small one"""
    with served() as service:
        port = port_of(service)
        await _warm_up(service)

        def zips(seconds: float) -> Awaitable[object]:
            load = requests(MAX_IMAGES, "zip")
            return closed_loop(port, load, connections=8, seconds=seconds)

        return _unharmed(*await _beside(port, zips), 3.0)


# Clients -----------------------------------------------------------------------------------------

LEAVERS, WAVE = 10_000, 250
# The allocator would keep now 50 and now 250 MB of what is free, in which no leak could be seen.
GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


@fault(
    "10,000 clients ask for 1,024 images each, 250 at a time, and leave while their rows wait",
    "all their rows are withdrawn; no file, thread or row is left over",
)
async def disconnects() -> Findings:
    """Disconnects while queued."""
    with served(*PATIENT, environment=GIVES_BACK) as service:
        port = port_of(service)
        before = await _warm_up(service)
        most_rows = 0.0
        grown = []  # MB after each fifth
        for fifth in range(1, 6):
            while _left(await scrape(port)) < LEAVERS * fifth / 5:
                most_rows = max(most_rows, await _wave(port))
            after = await at_rest(service)
            grown.append(after.memory_mb - before.memory_mb)
        text = await scrape(port)
        left = _left(text)
        return [
            (f"{left:,.0f} left before their answer", left >= LEAVERS),
            (f"up to {most_rows:,.0f} rows waited", most_rows > 0),
            (
                f"{metric(text, 'cgan_queue_images'):.0f} rows wait",
                metric(text, "cgan_queue_images") == 0,
            ),
            (
                f"memory after each fifth {', '.join(f'{more:+.0f}' for more in grown)} MB",
                max(grown) <= min(grown) + 10,
            ),
            *left_over(before, after),
            await no_error_logged(service),
        ]


async def _wave(port: int) -> float:
    """Some ask, wait until all have been admitted, and leave; how many rows waited then."""
    before = _arrived(await scrape(port))
    clients = [Client(port) for _ in range(WAVE)]
    for client in clients:
        _, writer = await client.connect()
        writer.write(post(f"/generate?label=1&n={MAX_IMAGES}&format=zip"))
    # A few are answered before the last one comes.
    rows = await _until(port, lambda text: _arrived(text) >= before + WAVE)
    for client in clients:
        client.abort()
    await _until(port, lambda text: metric(text, "cgan_queue_images") == 0)
    return rows


def _arrived(text: str) -> float:
    """Return the number of requests received."""
    answered = metric(text, "cgan_requests_total", 'route="/generate"')
    return answered + metric(text, "cgan_requests_in_progress")


def _left(text: str) -> float:
    """Return the number of clients that left before their answer."""
    return metric(text, "cgan_requests_total", 'status="499"')


async def _until(port: int, reached: Callable[[str], bool]) -> float:
    """Scrape until something is so; the rows that waited then."""
    async with asyncio.timeout(TIMEOUT_S):
        while not reached(text := await scrape(port)):
            pass
    return metric(text, "cgan_queue_images")


@fault(
    "16 requests for 16 images each, 20 times, beside 16 that leave after up to 0.3 s",
    "the bytes of every answer are those of a quiet run",
)
async def neighbours() -> Findings:
    """A disconnect in a shared batch."""
    with served(*PATIENT) as service:
        port = port_of(service)
        targets = [f"/generate?label={i % 10}&n=16&seed={i}&format=zip" for i in range(16)]
        clients = [Client(port) for _ in targets]
        quiet = [
            (await client.ask(each)).body for client, each in zip(clients, targets, strict=True)
        ]
        rows, batches = await _batches(port)
        same = answered = 0
        for _ in range(20):
            leavers = [leave(port, "/generate?label=3&n=1024", after_s=0.3) for _ in targets]
            leaving = asyncio.gather(*leavers)
            while not leaving.done():
                answers = await asyncio.gather(*map(Client.ask, clients, targets))
                same += sum(a.body == b for a, b in zip(answers, quiet, strict=True))
                answered += len(answers)
            await leaving
        departed = metric(await scrape(port), "cgan_requests_total", 'status="499"')
        more_rows, more_batches = await _batches(port)
        mean = (more_rows - rows) / (more_batches - batches)
        for client in clients:
            client.close()
        return [
            (f"{same:,} of {answered:,} answers are the same bytes", same == answered > 0),
            (f"{departed:.0f} of 320 left before their answer", departed > 0),
            (f"{mean:.0f} images in a batch, on average", mean > 16),
        ]


async def _batches(port: int) -> tuple[float, float]:
    text = await scrape(port)
    return metric(text, "cgan_batch_images_sum"), metric(text, "cgan_batch_images_count")


@fault(
    "100 clients send a byte a second, 100 send nothing, 100 read nothing of a zip; one asks as "
    "always; --client-timeout-s 8",
    "the 99th percentile of the one rises by 20 % at most; all 300 are closed",
)
async def slow_clients() -> Findings:
    """Slow clients"""
    with served("--client-timeout-s", "8") as service:
        port = port_of(service)
        before = await _warm_up(service)
        alone, beside = Sample(), Sample()
        for _ in range(ROUNDS):
            await _ask_alone(port, alone)
            slow = [Client(port) for _ in range(300)]
            for client in slow:
                await client.connect()
            for client in slow[::3]:
                client.deafen()
                client.drip(post("/generate?label=1&n=256&scale=8&format=zip"))
            await _until(port, lambda text: metric(text, "cgan_requests_in_progress") == 0)
            crawling = asyncio.ensure_future(_crawl(slow[1::3], b"POST /"))
            await _ask_alone(port, beside)
            await crawling
        closed_in = time.perf_counter()
        while held(service).files > before.files:
            await asyncio.sleep(0.1)
            if time.perf_counter() > closed_in + 60:
                break
        after = await at_rest(service)
        return [*_unharmed(alone, beside, 1.2), *left_over(before, after)]


async def _crawl(clients: list[Client], request: bytes) -> None:
    for position in range(3):
        for client in clients:
            client.drip(request[position : position + 1])
        await asyncio.sleep(1.0)


@fault(
    f"{len(MALFORMED)} kinds of broken HTTP, 20 times each, beside a client that asks properly",
    "broken requests get 400, 505 or a closed connection; the other client never notices",
)
async def malformed() -> Findings:
    """Malformed requests among good ones."""
    with served() as service:
        port = port_of(service)
        target = "/generate?label=4&n=4&seed=9"
        good = Client(port)
        expected = (await good.ask(target)).body
        statuses: Counter[int] = Counter()
        same = 0
        for broken in MALFORMED * 20:
            bad, answer = await asyncio.gather(Client(port).send_raw(broken), good.ask(target))
            statuses[bad.status] += 1
            same += answer.body == expected
        good.close()
        return [
            (f"broken: {_counts(statuses)}", set(statuses) <= {0, 400, 505}),
            (
                f"{same} of {statuses.total()} good answers are the same bytes",
                same == statuses.total(),
            ),
            await no_error_logged(service),
        ]


# The device --------------------------------------------------------------------------------------


@fault(
    "a network that returns NaN for one class, in batches with 20 other requests",
    "503 for the requests of that class, the same bytes as ever for the others",
)
async def not_a_number() -> Findings:
    """NaN in some rows"""
    with served(module="tests.support.faulty_engines") as service:
        port = port_of(service)
        targets = [f"/generate?label={label}&n=4&seed=1" for label in (3, NAN)]
        quiet = await _ask(port, targets[0])
        answers = await asyncio.gather(*(_ask(port, each) for each in targets * 20))
        same = sum(answer.body == quiet.body for answer in answers[::2])
        statuses = Counter(answer.status for answer in answers[1::2])
        return [
            (f"{same} of 20 neighbours are the same bytes", same == 20 and quiet.status == 200),
            (f"the others: {_counts(statuses)}", set(statuses) == {503}),
        ]


@fault(
    f"a device that holds at most {FITS} images of one class at a time, asked for 8 and for 16",
    "8 are made in two halves; 16 get 503; the next request is answered",
)
async def out_of_memory() -> Findings:
    """Out of memory"""
    with served(module="tests.support.faulty_engines") as service:
        port = port_of(service)
        sizes = (2 * FITS, 4 * FITS, 1)
        statuses = [(await _ask(port, f"/generate?label={MEMORY}&n={n}")).status for n in sizes]
        return [
            (f"8: {statuses[0]}, 16: {statuses[1]}, 1: {statuses[2]}", statuses == [200, 503, 200])
        ]


@fault(
    "a request on which the device is lost, with 50 others for 1,024 images waiting",
    "503 for everyone within a second, and the process ends with status 75",
)
async def lost_device() -> Findings:
    """A lost device"""
    with served(*PATIENT, module="tests.support.faulty_engines") as service:
        port = port_of(service)
        waiting = asyncio.gather(*(_ask(port, "/generate?label=1&n=1024") for _ in range(50)))
        await _until(port, lambda text: _arrived(text) == 50)
        began = time.perf_counter()
        last = await _ask(port, f"/generate?label={LOST}")
        statuses = Counter(answer.status for answer in await waiting)
        told_s = time.perf_counter() - began
        status, seconds = await _exit(service)
        return [
            (f"{last.status} and {_counts(statuses)}", last.status == 503 and statuses[503] > 40),
            (f"all within {told_s:.2f} s", told_s <= 1.0 and set(statuses) <= {200, 503}),
            (f"exit status {status} after {seconds:.1f} s", status == os.EX_TEMPFAIL),
        ]


# Artifacts ---------------------------------------------------------------------------------------


def _bad_artifacts(folder: Path) -> dict[str, Path]:
    """Files that no service may start with."""
    good = make_artifact(folder / "good.safetensors")
    contents = {
        "a pickle that runs code": torch_saved(Payload(folder / "executed")),
        "cut short": good.read_bytes()[:-1],
        "empty": b"",
        "a header of 2^63 bytes": b"\xff" * 7 + b"\x7f" + good.read_bytes()[8:],
    }
    found = {}
    for number, (what, written) in enumerate(contents.items()):
        found[what] = folder / f"bad{number}.safetensors"
        found[what].write_bytes(written)
    found["NaN weights"] = folder / "nan.safetensors"
    with safe_open(good, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        next(iter(tensors.values())).view(-1)[0] = torch.nan
        save_file(tensors, found["NaN weights"], file.metadata())
    found["absent"] = folder / "none.safetensors"
    return found


@fault(
    "started with a pickle that runs code, a file cut short, an empty one, an absurd header, NaN "
    "weights, none at all",
    "ends before the port opens, with one line that names the file; runs nothing",
)
async def bad_artifacts() -> Findings:
    """Bad artifacts at start-up."""
    with tempfile.TemporaryDirectory() as folder:
        bad = _bad_artifacts(Path(folder))
        starts = [asyncio.to_thread(refused, "--models", str(path)) for path in bad.values()]
        messages = dict(zip(bad, await asyncio.gather(*starts), strict=True))
        good = sum(
            messages[what].count("\n") == 1 and str(path) in messages[what]
            for what, path in bad.items()
        )
        executed = (Path(folder) / "executed").exists()
        return [
            (f"{good} of {len(bad)} refused in one line with their path", good == len(bad)),
            ("code was run" if executed else "no code was run", not executed),
        ]


SWAPS = 200


@fault(
    f"two artifacts renamed into one place in turn, {SWAPS} times, under 4 clients",
    "no request fails, each answer has the bytes of the artifact that it names; memory is flat",
)
async def swaps() -> Findings:
    """Artifacts replaced under load"""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "model.safetensors"
        sources = [make_artifact(Path(folder) / f"{i}.source", seed=i) for i in range(2)]
        shutil.copy(sources[0], target)
        with served(weights=target) as service:
            return await _swap(service, target, sources)


async def _swap(service: ServiceProcess, target: Path, sources: list[Path]) -> Findings:
    port = port_of(service)
    bodies: dict[str, set[bytes]] = {}
    statuses: Counter[int] = Counter()
    running = True

    async def client() -> None:
        own = Client(port)
        while running:
            answer = await own.ask("/generate?label=1&n=16&seed=1")
            statuses[answer.status] += 1
            bodies.setdefault(answer.headers.get("x-model", ""), set()).add(answer.body)
        own.close()

    clients = asyncio.gather(*(client() for _ in range(4)))
    memory_mb = []
    for number in range(SWAPS):
        fresh = target.with_suffix(".fresh")
        shutil.copy(sources[(number + 1) % 2], fresh)
        fresh.rename(target)
        await _until(port, lambda text: metric(text, "cgan_reloads_total") > number)  # noqa: B023
        memory_mb.append(held(service).memory_mb)
    running = False
    await clients
    grown = memory_mb[-1] - memory_mb[SWAPS // 4]
    own = sum(len(each) == 1 for each in bodies.values())
    return [
        (f"{_counts(statuses)}", set(statuses) == {200}),
        (f"{len(bodies)} artifacts named, {own} with one picture", own == len(bodies) == 2),
        (f"memory {grown:+.1f} MB over the last {SWAPS * 3 // 4} swaps", grown <= 10),
        await no_error_logged(service),
    ]


# Ends --------------------------------------------------------------------------------------------


async def _ask(port: int, target: str) -> Answer:
    """A request on a connection of its own; status 0 if the connection breaks, or is refused."""
    client = Client(port)
    try:
        return await client.ask(target)
    except (OSError, EOFError):
        return Answer(0)
    finally:
        client.close()


async def _exit(service: ServiceProcess) -> tuple[int, float]:
    """Its exit status, and the seconds until then."""
    began = time.perf_counter()
    status = await asyncio.to_thread(service.wait)
    return status, time.perf_counter() - began


@fault(
    "SIGTERM while 16 zips of 1,024 images are under way, then 8 more requests",
    "what was admitted is answered in full, what is new soon gets 503, exit status 0",
)
async def sigterm() -> Findings:
    """SIGTERM under load."""
    with served(*PATIENT) as service:
        port = port_of(service)
        target = f"/generate?label=1&n={MAX_IMAGES}&format=zip"
        admitted = asyncio.gather(*(_ask(port, target) for _ in range(16)))
        await _until(port, lambda text: metric(text, "cgan_requests_in_progress") == 16)
        service.signal()
        exiting = asyncio.ensure_future(_exit(service))
        late = Counter([(await _ask(port, "/generate?label=1")).status for _ in range(8)])
        whole = sum(_is_whole(answer) for answer in await admitted)
        status, seconds = await exiting
        return [
            (f"{whole} of 16 admitted answered in full", whole == 16),
            (f"new ones: {_counts(late)}", set(late) <= {200, 503} and late[503] > 0),
            (f"exit status {status} after {seconds:.1f} s", status == 0),
            await no_error_logged(service),
        ]


def _is_whole(answer: Answer) -> bool:
    if answer.status != 200:
        return False
    with zipfile.ZipFile(BytesIO(answer.body)) as archive:
        return len(archive.namelist()) == MAX_IMAGES + 1 and archive.testzip() is None


@fault(
    "SIGTERM with 400 requests for 1,024 images queued, and again 0.3 s later",
    "ends within 2 s of the second signal; no request gets a 500, and no error is logged",
)
async def second_signal() -> Findings:
    """A second signal while draining."""
    with served(*PATIENT) as service:
        port = port_of(service)
        target = f"/generate?label=1&n={MAX_IMAGES}&format=zip"
        asked = asyncio.gather(*(_ask(port, target) for _ in range(400)))
        await _until(port, lambda text: _arrived(text) == 400)
        service.signal()
        await asyncio.sleep(0.3)
        running = service.process.poll() is None
        service.signal()
        status, seconds = await _exit(service)
        statuses = Counter(answer.status for answer in await asked)
        return [
            ("it was draining" if running else "it had ended already", running),
            (f"exit status {status}, {seconds:.2f} s after the second signal", seconds <= 2.0),
            (f"of 400 requests: {_counts(statuses)}", statuses[200] < 400 and not statuses[500]),
            await no_error_logged(service),
        ]


@fault(
    "SIGKILL to one of two workers under 16 clients that ask on new connections",
    "only what it was answering is lost, at most 16; it is replaced and counted",
)
async def killed_worker() -> Findings:
    """A worker killed."""
    with served("--workers", "2", cores=2) as service:
        port = port_of(service)
        statuses: Counter[int] = Counter()
        after: Counter[int] = Counter()
        killed_at = replaced_at = 0.0
        running = True

        async def client() -> None:
            while running:
                began = time.perf_counter()
                answer = await _ask(port, "/generate?label=1&n=16")
                statuses[answer.status] += 1
                if killed_at and began > killed_at + 1.0:
                    after[answer.status] += 1

        clients = asyncio.gather(*(client() for _ in range(16)))
        await asyncio.sleep(1.0)
        os.kill(random.choice(children(service)), signal.SIGKILL)
        killed_at = time.perf_counter()
        await _until(port, lambda text: metric(text, "cgan_worker_restarts_total") == 1)
        await _until(port, lambda text: metric(text, "cgan_ready") == 2)
        replaced_at = time.perf_counter()
        await asyncio.sleep(1.0)
        running = False
        await clients
        lost = statuses.total() - statuses[200]
        return [
            (f"{lost} of {statuses.total():,} requests lost", lost <= 16),
            (
                f"{after.total() - after[200]} of those from a second later on",
                after.total() == after[200],
            ),
            (f"two serve again {replaced_at - killed_at:.1f} s later, 1 restart counted", True),
        ]


# The table ---------------------------------------------------------------------------------------


def observe(row: Fault) -> Outcome:
    """Run one row; a scene that breaks off is a finding, too."""
    try:
        findings = run(row.scene())
    except Exception as error:
        findings = [(f"{type(error).__name__}: {error}", False)]
    return Outcome(row, findings)


def markdown(outcomes: list[Outcome]) -> str:
    """The table for the README."""
    rows = [("fault", "what was done", "expected", "observed", "ok"), ("---",) * 5]
    for each in outcomes:
        row = each.fault
        cells = (row.what, row.done, row.expected, each.observed, "yes" if each.ok else "**no**")
        rows.append(tuple(cell.replace("|", "\\|") for cell in cells))  # type: ignore[arg-type]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def plain(outcome: Outcome) -> str:
    """One row for a terminal."""
    row = outcome.fault
    return (
        f"{'ok ' if outcome.ok else 'BAD'} {row.what} ({row.name})\n    done:     {row.done}\n"
        f"    expected: {row.expected}\n    observed: {outcome.observed}"
    )


def main(arguments: list[str] | None = None) -> int:
    """Run the rows; returns the exit status."""
    names = [row.name for row in FAULTS]
    parser = argparse.ArgumentParser(
        prog="python -m tests.faults", description=__doc__.split("\n")[0]
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(names)}")
    parser.add_argument("--markdown", action="store_true", help="print the table for the README")
    options = parser.parse_args(arguments)
    for name in options.names:
        if name not in names:
            parser.error(f"unknown fault {name!r}; allowed are {', '.join(names)}")
    outcomes = []
    for row in FAULTS:
        if not options.names or row.name in options.names:
            outcomes.append(observe(row))
            if not options.markdown:
                print(plain(outcomes[-1]), flush=True)
    if options.markdown:
        print(markdown(outcomes))
    return 0 if all(outcome.ok for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
