"""Everything at once against a real service, for as long as one likes, and what that did to it.

    python -m tests.soak [--minutes 5] [--workers 1] [--out FOLDER]

Steady clients, bursts above the queue, large zips, clients that leave while they wait and while
they are answered, clients that send a byte a second, broken HTTP, wrong values, artifacts replaced
in place, scrapes and probes. Every answer is checked: its status against what its client may get,
its digest against the files that ever were in place, its bytes against the first answer to the same
request. Prints a line every few seconds, then a table and the verdicts; the folder gets those and a
plot. Exit status 1 if a verdict is bad. Needs Linux.
"""

import argparse
import asyncio
import hashlib
import itertools
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw

from service.settings import Settings
from tests.conftest import make_artifact
from tests.support.clients import (
    MALFORMED,
    Answer,
    Client,
    Held,
    at_rest,
    held,
    leave,
    metric,
    percentile,
    port_of,
    scrape,
)
from tests.support.serving import ServiceProcess

BUNDLED = Settings().models / "mnist-mlp.safetensors"
STEADY, SLOW, BURST, SEEDS = 4, 20, 300, 12
EVERY_S = 5.0
MAX_GROWTH_MB_PER_HOUR = 10.0
NOISE_MB = 5.0  # what resident memory wavers by, however short the time is
NO_IMAGE = frozenset({400, 404, 405, 406, 422})


@dataclass(frozen=True)
class Point:
    """An observation at one time, or since the time before."""

    at_s: float
    memory_mb: float
    files: int
    threads: int
    queue_rows: float
    requests_per_s: float
    steady_p50_ms: float
    steady_p99_ms: float

    def __str__(self) -> str:
        return (
            f"{self.at_s:6.0f} s{self.memory_mb:8.1f} MB{self.files:5} files{self.threads:4} "
            f"threads{self.queue_rows:6.0f} rows{self.requests_per_s:7.0f} req/s   steady "
            f"{self.steady_p50_ms:.1f} / {self.steady_p99_ms:.1f} ms"
        )


@dataclass(frozen=True)
class VerificationResult:
    """One thing that must hold at the end."""

    good: bool
    text: str

    def __str__(self) -> str:
        return f"{'ok ' if self.good else 'BAD'} {self.text}"


class Soak:
    """The clients, and what they have seen."""

    def __init__(self, service: ServiceProcess, weights: Path, until: float) -> None:
        self.service, self.port, self.until = service, port_of(service), until
        self.outcomes: Counter[tuple[str, str]] = Counter()  # by client and status
        self.unexpected: list[str] = []
        self.answered = 0
        self.steady_s: list[float] = []  # since they were last reported
        self._weights = weights
        self._swaps = [path.read_bytes() for path in sorted(weights.glob("*.new"))]
        self._digests = {_sha256(path.read_bytes()) for path in weights.glob("*.safetensors")}
        self._bytes: dict[tuple[str, str], str] = {}  # digest of the body by model and request

    # What came back

    def note(self, who: str, answer: Answer, allowed: frozenset[int], target: str = "") -> None:
        """Count an answer, and check it."""
        self.answered += 1
        self.outcomes[who, str(answer.status or "closed")] += 1
        if answer.status not in allowed:
            self.blame(who, f"{answer.status} {answer.body[:200]!r} to {target}")
        elif answer.status == 200 and "x-model" in answer.headers:
            self._check_image(who, answer, target)
        elif answer.status == 429 and int(answer.headers.get("retry-after", 0)) < 1:
            self.blame(who, "429 without Retry-After")

    def blame(self, who: str, what: str) -> None:
        """Note what nobody expects."""
        self.outcomes[who, "UNEXPECTED"] += 1
        self.unexpected.append(f"{time.strftime('%H:%M:%S')} {who}: {what}")

    @property
    def models(self) -> str:
        """Return the number of files that answered, and of all."""
        answered = {model.rpartition(":")[2] for model, _ in self._bytes}
        return f"{len(answered)} artifacts answered, of {len(self._digests)} that were in place"

    def _check_image(self, who: str, answer: Answer, target: str) -> None:
        model, body = answer.headers["x-model"], _sha256(answer.body)
        if model.rpartition(":")[2] not in self._digests:
            self.blame(who, f"{model} was never in place")
        if "seed=" in target and self._bytes.setdefault((model, target), body) != body:
            self.blame(who, f"other bytes than before for {target} of {model}")

    # The clients: each acts once, and `forever` says when it acts again

    async def forever(self, who: str, act: Callable[[], Awaitable[None]], pause_s: float) -> None:
        """Act, pause for about `pause_s`, and so on until the end."""
        while time.monotonic() < self.until:
            try:
                await act()
            except (OSError, EOFError, TimeoutError) as error:
                self.blame(who, f"{type(error).__name__} {error}")
            await asyncio.sleep(pause_s * (0.5 + random.random()))

    async def steady(self) -> None:
        """A few small images on connections that are kept; refused only beside a burst."""
        client = Client(self.port)

        async def act() -> None:
            name, labels = random.choice((("mnist-mlp", "0123456789"), ("small", "012")))
            target = _target(name, random.choice(labels), random.choice((1, 1, 4)))
            began = time.perf_counter()
            answer = await client.ask(target)
            self.steady_s.append(time.perf_counter() - began)
            self.note("steady", answer, frozenset({200, 429}), target)

        await self.forever("steady", act, 0.02)
        client.close()

    async def bursts(self) -> None:
        """Several times what the queue holds, at once."""

        async def one() -> None:
            client = Client(self.port)
            target = _target("mnist-mlp", "7", 64)
            self.note("burst", await client.ask(target), frozenset({200, 429}), target)
            client.close()

        async def act() -> None:
            await asyncio.gather(*(one() for _ in range(BURST)))

        await self.forever("burst", act, 10.0)

    async def large(self) -> None:
        """As much as one request may ask for."""
        client = Client(self.port)

        async def act() -> None:
            target = _target("mnist-mlp", "3", 1024, random.choice(("zip", "json")))
            self.note("large", await client.ask(target), frozenset({200, 429}), target)

        await self.forever("large", act, 3.0)
        client.close()

    async def leavers(self) -> None:
        """Go away while queued, and while an answer of several hundred kilobytes is on its way."""

        async def act() -> None:
            target = _target("mnist-mlp", "5", 1024, "json")
            read_bytes = random.choice((0, 0, 1000))
            await leave(self.port, target, after_s=0.3, read_bytes=read_bytes)
            self.outcomes["leaver", "left while answered" if read_bytes else "left"] += 1

        await self.forever("leaver", act, 0.5)

    async def slow(self) -> None:
        """A byte a second: in turn of all the request, which takes too long, and of its end."""
        client = Client(self.port)
        whole = itertools.cycle((True, False))

        async def act() -> None:
            target = _target("small", "1", 1)
            request = f"POST {target} HTTP/1.1\r\nHost: s\r\n\r\n".encode()
            at_once, expected = len(request) - 10, frozenset({200, 429})
            if next(whole):
                at_once, expected = 0, frozenset({408})
            sending = client.send_slowly(request, pause_s=1.0, at_once=at_once)
            try:
                async with asyncio.timeout(max(0.1, self.until - time.monotonic())):
                    self.note("slow", await sending, expected, target)
            except TimeoutError:
                if time.monotonic() < self.until:  # the end of the soak is not a fault
                    raise

        await self.forever("slow", act, 1.0)
        client.close()

    async def wrong(self) -> None:
        """Send requests that must be rejected: broken HTTP, wrong values, unknown names."""
        client = Client(self.port)
        asks = (
            ("/generate?label=99", "POST", "", 422),
            ("/generate?label=1&n=0", "POST", "", 422),
            ("/generate?label=1&n=1025", "POST", "", 422),
            ("/generate?label=1&seed=-1&colour=red", "POST", "", 422),
            ("/generate?label=1&model=none", "POST", "", 404),
            ("/nowhere", "GET", "", 404),
            ("/generate?label=1", "POST", "Accept: text/html\r\n", 406),
            ("/generate?label=1", "DELETE", "", 405),
        )
        turns = itertools.cycle(range(len(asks) + len(MALFORMED)))

        async def act() -> None:
            turn = next(turns)
            if turn < len(asks):
                target, method, headers, status = asks[turn]
                answer = await client.ask(target, method, headers)
                self.note("wrong", answer, frozenset({status}), target)
            else:
                broken = MALFORMED[turn - len(asks)]
                answer = await client.send_raw(broken)
                self.note("malformed", answer, NO_IMAGE | {0}, repr(broken))

        await self.forever("wrong", act, 0.1)
        client.close()

    async def swaps(self) -> None:
        """Put another artifact in the place of one that is served."""
        turns = itertools.cycle(self._swaps)

        async def act() -> None:
            contents = next(turns)
            self._digests.add(_sha256(contents))
            beside = self._weights / "small.part"
            beside.write_bytes(contents)
            beside.replace(self._weights / "small.safetensors")
            self.outcomes["swap", "done"] += 1

        await self.forever("swap", act, 5.0)

    async def probes(self) -> None:
        """Ask as an orchestrator and a browser do."""
        client = Client(self.port)

        async def act() -> None:
            for path in ("/livez", "/readyz", "/models"):
                self.note("probe", await client.ask(path, "GET"), frozenset({200}), path)

        await self.forever("probe", act, 1.0)
        client.close()

    def clients(self) -> list[Awaitable[None]]:
        """All of them."""
        once = (self.bursts, self.large, self.wrong, self.swaps, self.probes)
        many = [self.steady] * STEADY + [self.leavers] * 2 + [self.slow] * SLOW
        return [start() for start in (*once, *many)]

    # What is seen from outside

    async def watch(self) -> list[Point]:
        """Scrape, and print a line, every few seconds until the end."""
        points: list[Point] = []
        began = last = time.monotonic()
        while (now := time.monotonic()) < self.until:
            await asyncio.sleep(min(EVERY_S, max(0.1, self.until - now)))
            now, latencies, answered = time.monotonic(), self.steady_s, self.answered
            self.steady_s, self.answered = [], 0
            text = await scrape(self.port)
            seen = held(self.service)
            point = Point(
                at_s=now - began,
                memory_mb=seen.memory_mb,
                files=seen.files,
                threads=seen.threads,
                queue_rows=metric(text, "cgan_queue_images"),
                requests_per_s=answered / (now - last),
                steady_p50_ms=1e3 * percentile(latencies, 50),
                steady_p99_ms=1e3 * percentile(latencies, 99),
            )
            last = now
            points.append(point)
            print(point, flush=True)
        return points


def _target(model: str, label: str, n: int, form: str = "png") -> str:
    seed = random.randrange(SEEDS)
    return f"/generate?model={model}&label={label}&n={n}&seed={seed}&format={form}"


def _sha256(contents: bytes) -> str:
    return hashlib.sha256(contents).hexdigest()


# The end -----------------------------------------------------------------------------------------


def slope_per_hour(times_s: Sequence[float], values: Sequence[float]) -> float:
    """The median of the slopes between all pairs of points, which no single peak can move."""
    pairs = itertools.combinations(zip(times_s, values, strict=True), 2)
    slopes = [(b - a) / (t - s) for (s, a), (t, b) in pairs if t > s]
    return 3600 * statistics.median(slopes) if slopes else 0.0


def judge(
    points: list[Point], before: Held, after: Held, unexpected: int
) -> list[VerificationResult]:
    """The verdicts: memory by its slope while it ran, files and threads by what was left over.

    The bound on memory is 10 MB an hour; in a short run, what would be 5 MB over its two thirds.
    """
    late = [point for point in points if point.at_s >= points[-1].at_s / 3]
    times = [point.at_s for point in late]
    hours = (times[-1] - times[0]) / 3600
    bound = max(MAX_GROWTH_MB_PER_HOUR, NOISE_MB / hours if hours else float("inf"))
    slope = slope_per_hour(times, [point.memory_mb for point in late])
    return [
        VerificationResult(
            slope <= bound,
            f"memory: {slope:+.1f} MB an hour over the last two thirds, at most {bound:.1f}",
        ),
        VerificationResult(
            after.files <= before.files, f"files: {before.files} before, {after.files} after"
        ),
        VerificationResult(
            after.threads <= before.threads,
            f"threads: {before.threads} before, {after.threads} after",
        ),
        VerificationResult(unexpected == 0, f"unexpected outcomes: {unexpected}"),
    ]


def table(outcomes: Counter[tuple[str, str]]) -> str:
    """Counts by client and outcome."""
    return "\n".join(
        f"{who:<10} {outcome:<20}{count:>9,}" for (who, outcome), count in sorted(outcomes.items())
    )


# The plot ----------------------------------------------------------------------------------------

WIDTH, PANEL, LEFT, TOP = 1000, 150, 70, 24
COLOURS = ("#1f5fa8", "#c8502d")


def draw(points: list[Point], path: Path) -> None:
    """A panel for each of what was watched, over the minutes."""
    panels: list[tuple[str, list[list[float]]]] = [
        ("resident memory, MB", [[point.memory_mb for point in points]]),
        ("open files", [[float(point.files) for point in points]]),
        ("threads", [[float(point.threads) for point in points]]),
        ("queue, rows", [[point.queue_rows for point in points]]),
        ("requests a second", [[point.requests_per_s for point in points]]),
        (
            "steady clients, ms: median (blue), 99th percentile (red)",
            [[point.steady_p50_ms for point in points], [point.steady_p99_ms for point in points]],
        ),
    ]
    image = Image.new("RGB", (WIDTH, PANEL * len(panels) + TOP), "white")
    pen = ImageDraw.Draw(image)
    times = [point.at_s for point in points]
    for number, (title, lines) in enumerate(panels):
        _draw_panel(pen, PANEL * number, title, times, lines)
    pen.text((LEFT, PANEL * len(panels) + 4), f"0 to {times[-1] / 60:.1f} minutes", "black")
    image.save(path)


def _draw_panel(
    pen: ImageDraw.ImageDraw, y: int, title: str, times: list[float], lines: list[list[float]]
) -> None:
    """Every scale begins at zero, so that what looks flat is."""
    top, bottom, right = y + TOP, y + PANEL - 4, WIDTH - 10
    most = max(1.0, *map(max, lines)) * 1.05
    pen.text((LEFT, y + 8), title, "black")
    pen.rectangle((LEFT, top, right, bottom), outline="#bbbbbb")
    for share in (0.0, 0.5, 1.0):
        pen.text((4, bottom - share * (bottom - top) - 6), f"{share * most:.4g}", "#555555")
    for values, colour in zip(lines, COLOURS, strict=False):
        xy = [
            (LEFT + at / times[-1] * (right - LEFT), bottom - value / most * (bottom - top))
            for at, value in zip(times, values, strict=True)
        ]
        pen.line(xy, fill=colour, width=2)


# The command -------------------------------------------------------------------------------------


async def warm_up(service: ServiceProcess) -> Held:
    """Let it start every thread and reach its largest batches; what it then holds at rest."""
    clients = [Client(port_of(service)) for _ in range(32)]
    for _ in range(3):
        await asyncio.gather(*(client.ask("/generate?label=1&n=1024") for client in clients[:4]))
        await asyncio.gather(*(client.ask("/generate?label=1&n=64") for client in clients))
    for client in clients:
        client.close()
    # These make the threads that are only made when they are needed.
    large = [Client(port_of(service)) for _ in range(2)]
    await asyncio.gather(*(client.ask("/generate?label=1&n=1024&scale=4") for client in large))
    for client in large:
        client.close()
    service.signal(signal.SIGHUP)
    return await at_rest(service)


async def soak(service: ServiceProcess, weights: Path, minutes: float, out: Path) -> bool:
    """Run everything; whether all verdicts are good."""
    before = await warm_up(service)
    run = Soak(service, weights, time.monotonic() + 60 * minutes)
    watching = asyncio.ensure_future(run.watch())
    await asyncio.gather(watching, *run.clients())
    points = watching.result()
    after = await at_rest(service)
    errors = [line for line in service.errors if '"level": "error"' in line]
    for line in errors:
        run.blame("log", line.strip())
    verdicts = judge(points, before, after, len(run.unexpected))
    service.signal()
    verdicts.append(VerificationResult((status := service.wait()) == 0, f"exit status {status}"))
    report = "\n".join(
        [table(run.outcomes), run.models, "", *run.unexpected[:20], *map(str, verdicts)]
    )
    print(f"\n{report}")
    (out / "soak.txt").write_text("\n".join([*map(str, points), "", report, ""]))
    draw(points, out / "soak.png")
    print(f"written to {out}")
    return all(verdict.good for verdict in verdicts)


def main() -> int:
    """Start a service, soak it, and stop it; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.soak", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--out", type=Path, help="folder for the report; a new one if not given")
    options = parser.parse_args()
    if options.minutes < 0.2:
        parser.error(f"--minutes: must be at least 0.2, not {options.minutes:g}")
    out = options.out or Path(tempfile.mkdtemp(prefix="soak-"))
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="soak-weights-") as folder:
        weights = Path(folder)
        shutil.copy(BUNDLED, weights)
        make_artifact(weights / "small.safetensors")
        for seed in (1, 2, 3):
            made = make_artifact(weights / "made.safetensors", seed=seed)
            made.rename(weights / f"{seed}.new")
        arguments = ["--log-level", "warning", "--workers", str(options.workers)]
        arguments += ["--models", folder, "--default-model", "mnist-mlp"]
        # Deadlines have tests of their own; here a machine that stands still is to be no fault.
        arguments += ["--timeout-s", "600"]
        threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        with ServiceProcess(*arguments, environment=threads) as service:
            return 0 if asyncio.run(soak(service, weights, options.minutes, out)) else 1


if __name__ == "__main__":
    sys.exit(main())
