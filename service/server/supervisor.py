"""Several worker processes behind one port: started, watched, replaced and stopped together.

The first workers are forked, and those that replace others are programs of their own. A worker
reports once on its stdout, the operating system reports its end, and its stdin is a pipe that ends
with the supervisor, however that happens, so that no worker outlives it. Uvicorn's supervisor polls
twice a second, restarts a crashing worker without limit, and has no second signal.

Every worker opens the port by itself (SO_REUSEPORT), and the kernel spreads connections over the
workers. Connections that a worker has not accepted when it ends are reset, unless the sysctl
net.ipv4.tcp_migrate_req is 1 (Linux 5.14).
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
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from service.failure import ServiceError
from service.server.forking import ForkedProcess, Forker
from service.server.sockets import reserve_port, startup_message, url_of
from service.server.worker import main
from service.settings import Settings
from service.telemetry.logging import configure_logging

if TYPE_CHECKING:
    from service.telemetry.metrics import SupervisorMetrics

MEMORY_FOLDER = "/dev/shm"  # of Linux; writable in most containers whose disk is not
STABLE_S = 30.0  # a worker that has served for this time did not exit because of its start
MAX_EARLY_EXITS = 5  # workers that may exit before that, in a row, and are replaced

log = logging.getLogger("service.server.supervisor")


def supervise(
    settings: Settings, workers: int, arguments: Sequence[str], announce: Callable[[str], None]
) -> None:
    """Serve with several workers until stopped.

    The workers get the command line that the settings are from. Once all of them serve, `announce`
    is called with the line that says where.

    Raises:
        ServiceError: the port is taken, no folder is writable, a worker cannot start, or workers
            keep exiting.
        ValueError: no address of the host is one of this machine.
    """
    configure_logging(settings.log_level)
    reserved = reserve_port(settings.host, settings.port)
    metrics_url = None
    with create_shared_folder() as folder, Forker() as forker:

        def create_metrics() -> "SupervisorMetrics":
            nonlocal metrics_url
            from service.telemetry.metrics import SupervisorMetrics  # noqa: PLC0415

            metrics = SupervisorMetrics(workers, Path(folder))
            if settings.metrics_port is not None:
                from service.server.metrics_port import open_metrics_port  # noqa: PLC0415

                metrics_url = open_metrics_port(settings, metrics.registry)
            return metrics

        def on_ready(names: Sequence[str], devices: str) -> None:
            announce(startup_message(names, url_of(reserved[0]), devices, metrics_url))

        arguments = [str(workers), folder, str(reserved[0].getsockname()[1]), *arguments]
        # Before any thread and event loop of this process exists.
        forked = [forker.fork(main, [str(index), *arguments]) for index in range(workers)]
        asyncio.run(Supervisor(forked, arguments, create_metrics, on_ready).run())
    for each in reserved:
        each.close()


def create_shared_folder() -> "tempfile.TemporaryDirectory[str]":
    """Create the folder of the files that workers share, in memory if no disk is writable.

    Raises:
        ServiceError: neither is possible.
    """
    for parent in (None, MEMORY_FOLDER):
        with suppress(OSError):
            # Others may remove it first, as programs do that remove old temporary files.
            return tempfile.TemporaryDirectory(
                prefix="cgan-metrics-", dir=parent, ignore_cleanup_errors=True
            )
    raise ServiceError(
        "several workers need a folder for temporary files, and none is writable: make /tmp "
        "writable, set TMPDIR to a writable folder, or use --workers 1"
    )


@dataclass
class _Worker:
    """A running worker process and its report: empty until it serves or fails."""

    process: Process | ForkedProcess
    report: dict[str, Any] = field(default_factory=dict)

    @property
    def serves(self) -> bool:
        return "device" in self.report

    def signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):  # it has just exited
            self.process.send_signal(number)


class Supervisor:
    """The workers of one service, which have the same arguments.

    The first ones are forked already: their process ids, and the pipes of their stdout.
    `create_metrics` is called once they run, because what it imports takes time. Once every worker
    serves, `on_ready` is called with the names of the models and the devices.
    """

    def __init__(
        self,
        forked: Sequence[tuple[int, int]],
        arguments: Sequence[str],
        create_metrics: Callable[[], "SupervisorMetrics"],
        on_ready: Callable[[Sequence[str], str], None],
    ) -> None:
        self._forked, self._count, self._arguments = forked, len(forked), arguments
        self._create_metrics, self._report_ready = create_metrics, on_ready
        self._metrics: SupervisorMetrics | None = None
        self._workers: dict[int, _Worker] = {}
        self._early_exits: Counter[int] = Counter()  # by worker, since one was stable
        self._started = self._stopping = self._killed = False
        self._error: ServiceError | None = None

    async def run(self) -> None:
        """Keep the workers running until a signal stops them; return when all have exited.

        Raises:
            ServiceError: a worker cannot start, workers keep exiting, or one failed to drain.
        """
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)
        loop.add_signal_handler(signal.SIGHUP, self._on_sighup)
        threads = ThreadPoolExecutor(self._count, thread_name_prefix="wait")
        for index, (pid, output) in enumerate(self._forked):
            process = ForkedProcess(pid, output, threads)
            self._workers[index] = _Worker(process)
            await process.connect()
        try:
            self._metrics = self._create_metrics()
        except ServiceError as error:
            self._fail(str(error))
        await asyncio.gather(*map(self._run_worker, range(self._count)))
        if self._error is not None:
            raise self._error

    def _on_signal(self) -> None:
        """Drain on the first signal, exit at once on the second."""
        if not self._stopping:
            self._stop()
            return
        self._killed = True
        for worker in self._workers.values():
            worker.signal(signal.SIGKILL)

    def _on_sighup(self) -> None:
        """Let the workers reload their models; one that is starting loads them anyway."""
        for worker in self._workers.values():
            if worker.serves:
                worker.signal(signal.SIGHUP)

    async def _run_worker(self, index: int) -> None:
        """Watch one worker, and start another one whenever it exits, until the service stops."""
        while (worker := self._workers.get(index)) is not None:
            assert worker.process.stdout is not None
            worker.report = json.loads(await worker.process.stdout.readline() or b"{}")
            if worker.serves:
                self._on_ready(index, worker)
            stable = worker.serves and await _survives(worker.process, STABLE_S)
            if stable:
                self._early_exits[index] = 0
            status = await worker.process.wait()
            del self._workers[index]
            if self._metrics is not None:
                self._metrics.worker_exited(str(index))
            if not stable:
                self._early_exits[index] += 1
            self._on_exit(index, worker, status)
            await self._start(index)

    async def _start(self, index: int) -> None:
        """Start a worker, unless the service stops."""
        if self._stopping:
            return
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "service.server.worker", str(index), *self._arguments),
            stdin=PIPE,
            stdout=PIPE,
            start_new_session=True,  # Ctrl-C reaches the supervisor only, which passes it on once
        )
        worker = self._workers[index] = _Worker(process)
        if self._stopping:  # since
            worker.signal(signal.SIGKILL)

    def _on_ready(self, index: int, worker: _Worker) -> None:
        fields = {"worker": index, "pid": worker.process.pid, "device": worker.report["device"]}
        log.info("worker ready", extra={"fields": fields})
        reports = [each.report for each in self._workers.values() if each.serves]
        if self._started or len(reports) < self._count:
            return
        self._started = True
        devices = " and ".join(dict.fromkeys(report["device"] for report in reports))
        self._report_ready(worker.report["names"], f"{devices} ({self._count} workers)")

    def _on_exit(self, index: int, worker: _Worker, status: int) -> None:
        cause = worker.report.get("error") or _describe_exit(status)
        if self._stopping:
            if worker.serves and status != 0 and not self._killed:
                self._error = self._error or ServiceError(f"worker {index} {cause} while draining")
            return
        if not self._started:
            self._fail(worker.report.get("error") or f"worker {index} {cause} while starting")
            return
        fields = {"worker": index, "pid": worker.process.pid, "cause": cause}
        log.error("worker exited", extra={"fields": fields})
        if self._early_exits.total() > MAX_EARLY_EXITS:
            self._fail(
                f"workers keep exiting within {STABLE_S:g} s of their start; the last one: {cause}"
            )
        elif self._metrics is not None:
            self._metrics.count_restart()

    def _fail(self, error: str) -> None:
        """Stop the service because of an error; the first one is reported."""
        self._error = self._error or ServiceError(error)
        self._stop()

    def _stop(self) -> None:
        """Drain the workers; kill those that do not serve yet."""
        self._stopping = True
        for worker in self._workers.values():
            worker.signal(signal.SIGTERM if worker.serves else signal.SIGKILL)


async def _survives(process: Process | ForkedProcess, seconds: float) -> bool:
    try:
        async with asyncio.timeout(seconds):
            await process.wait()
    except TimeoutError:
        return True
    return False


def _describe_exit(status: int) -> str:
    if status < 0:
        return f"was killed by {signal.Signals(-status).name}"
    return f"exited with status {status}"
