"""Several worker processes behind one port: started, watched, replaced and stopped together.

Nothing is polled. A worker reports once on its stdout, the operating system tells when it ends, and
its stdin is a pipe that closes with the supervisor, however that ends, so that no worker outlives
it. Uvicorn's own supervisor looks twice a second instead, starts what dies again for ever, and has
no second signal.
"""

import asyncio
import json
import logging
import signal
import sys
import tempfile
from asyncio.subprocess import PIPE, Process
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from service.server.accepting import Occupancy
from service.settings import Settings
from service.startup import ServiceError, address_of, serving
from service.telemetry.logging import configure_logging
from service.telemetry.metrics import SupervisorMetrics
from service.telemetry.multiprocess import mark_worker_dead

STABLE_S = 30.0  # a worker that served for so long did not die of how it was started
MAX_EARLY_ENDS = 5  # so many workers may end before that, in a row, and are replaced

log = logging.getLogger("service.server.supervisor")


def supervise(settings: Settings, arguments: Sequence[str], say: Callable[[str], None]) -> None:
    """Serve with several workers, which read the same arguments, until told to stop.

    Raises:
        ServiceError: the port is taken, a worker cannot start, or workers keep ending.
    """
    configure_logging(settings.log_level)
    with tempfile.TemporaryDirectory(prefix="cgan-metrics-") as folder:
        asyncio.run(_supervise(settings, arguments, Path(folder), say))


async def _supervise(
    settings: Settings, arguments: Sequence[str], folder: Path, say: Callable[[str], None]
) -> None:
    loop = asyncio.get_running_loop()
    try:
        # Bound as uvicorn binds for one process. The workers listen, each when its models are
        # loaded: until then a client is refused, and does not wait for what may never start.
        port = await loop.create_server(
            asyncio.Protocol, settings.host, settings.port, start_serving=False
        )
    except OSError as error:
        raise ServiceError(str(error)) from error
    metrics = SupervisorMetrics(settings.workers, folder)
    metrics_port = None
    if settings.metrics_port is not None:
        from service.server.metrics_port import open_metrics_port  # noqa: PLC0415  (most need no FastAPI here)

        metrics_port = await open_metrics_port(settings, metrics.registry)
    supervisor = Supervisor(settings.workers, arguments, folder, port, say, metrics, metrics_port)
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, supervisor.on_signal)
    loop.add_signal_handler(signal.SIGHUP, supervisor.on_hangup)
    await supervisor.run()


@dataclass
class _Worker:
    """A running worker process, and what it reported: nothing until it serves or fails."""

    process: Process
    report: dict[str, Any] = field(default_factory=dict)

    @property
    def serves(self) -> bool:
        return "device" in self.report

    def signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):  # it ended, and its keeper is about to be told
            self.process.send_signal(number)


class Supervisor:
    """The workers of one service.

    Args:
        count: how many workers to keep.
        arguments: what `python -m service` was called with.
        folder: where the workers share their metrics, and how many connections each has.
        port: the bound sockets they share.
        say: told where the service is, once every worker serves.
        metrics: count the restarts.
        metrics_port: where this process serves the metrics of all of them, if anywhere.
    """

    def __init__(
        self,
        count: int,
        arguments: Sequence[str],
        folder: Path,
        port: asyncio.Server,
        say: Callable[[str], None],
        metrics: SupervisorMetrics,
        metrics_port: asyncio.Server | None = None,
    ) -> None:
        self._count = count
        self._arguments = arguments
        self._folder = folder
        self._port = port
        self._say = say
        self._metrics_address = None if metrics_port is None else address_of(metrics_port)
        self._metrics = metrics
        self._workers: dict[int, _Worker] = {}
        self._early_ends: Counter[int] = Counter()  # by worker, since one was stable
        self._started = self._stopping = self._killed = False
        self._error: ServiceError | None = None

    async def run(self) -> None:
        """Keep the workers running until told to stop, and return when all have ended.

        Raises:
            ServiceError: a worker cannot start, workers keep ending, or one failed to drain.
        """
        await asyncio.gather(*map(self._keep, range(self._count)))
        if self._error is not None:
            raise self._error

    def on_signal(self) -> None:
        """Drain on the first signal, end at once on the second."""
        if not self._stopping:
            self._stop()
            return
        self._killed = True
        for worker in self._workers.values():
            worker.signal(signal.SIGKILL)

    def on_hangup(self) -> None:
        """Have the models read again; a worker that does not serve yet only just reads them."""
        for worker in self._workers.values():
            if worker.serves:
                worker.signal(signal.SIGHUP)

    async def _keep(self, index: int) -> None:
        """Run one worker, and another one whenever it ends, until the service stops."""
        while not self._stopping:
            worker = self._workers[index] = await self._start(index)
            assert worker.process.stdout is not None
            worker.report = json.loads(await worker.process.stdout.readline() or b"{}")
            if worker.serves:
                self._on_serving(index, worker)
            stable = worker.serves and await _outlives(worker.process, STABLE_S)
            if stable:
                self._early_ends[index] = 0
            status = await worker.process.wait()
            del self._workers[index]
            mark_worker_dead(self._folder, str(index))
            Occupancy(self._folder, self._count, index).leave()
            if not stable:
                self._early_ends[index] += 1
            self._on_end(index, worker, status)

    async def _start(self, index: int) -> _Worker:
        sockets = [each.fileno() for each in self._port.sockets]
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "service.server.worker"),
            *(str(index), str(self._folder), ",".join(map(str, sockets))),
            *self._arguments,
            stdin=PIPE,
            stdout=PIPE,
            pass_fds=sockets,
            start_new_session=True,  # Ctrl-C is for the supervisor, which passes it on once
        )
        worker = _Worker(process)
        if self._stopping:
            worker.signal(signal.SIGKILL)
        return worker

    def _on_serving(self, index: int, worker: _Worker) -> None:
        fields = {"worker": index, "pid": worker.process.pid, "device": worker.report["device"]}
        log.info("a worker serves", extra={"fields": fields})
        reports = [each.report for each in self._workers.values() if each.serves]
        if self._started or len(reports) < self._count:
            return
        self._started = True
        devices = " and ".join(dict.fromkeys(report["device"] for report in reports))
        where = f"{devices} ({self._count} workers)"
        address = address_of(self._port)
        self._say(serving(worker.report["names"], address, where, self._metrics_address))

    def _on_end(self, index: int, worker: _Worker, status: int) -> None:
        cause = worker.report.get("error") or _in_words(status)
        if self._stopping:
            if worker.serves and status != 0 and not self._killed:
                self._error = self._error or ServiceError(f"worker {index} {cause} while draining")
            return
        if not self._started:
            self._fail(worker.report.get("error") or f"worker {index} {cause} while starting")
            return
        fields = {"worker": index, "pid": worker.process.pid, "cause": cause}
        log.error("a worker ended", extra={"fields": fields})
        if self._early_ends.total() > MAX_EARLY_ENDS:
            self._fail(
                f"workers keep ending within {STABLE_S:g} s of serving; the last one {cause}"
            )
        else:
            self._metrics.count_restart()

    def _fail(self, error: str) -> None:
        """End the service for a reason, the first one of which is told."""
        self._error = self._error or ServiceError(error)
        self._stop()

    def _stop(self) -> None:
        """Let workers drain, and end those at once that have nothing to drain yet."""
        self._stopping = True
        self._port.close()  # for the last worker to close it for good
        for worker in self._workers.values():
            worker.signal(signal.SIGTERM if worker.serves else signal.SIGKILL)


async def _outlives(process: Process, seconds: float) -> bool:
    try:
        async with asyncio.timeout(seconds):
            await process.wait()
    except TimeoutError:
        return True
    return False


def _in_words(status: int) -> str:
    return f"ended by {signal.Signals(-status).name}" if status < 0 else f"ended with {status}"
