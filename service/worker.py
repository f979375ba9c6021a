"""One of several processes that serve: `python -m service.worker`, which only a supervisor starts.

    python -m service.worker INDEX FOLDER SOCKETS [OPTION]...

INDEX numbers the workers from 0, FOLDER holds the metrics that all of them share, and SOCKETS are
the file descriptors of the sockets they share; the options are those of `python -m service`. On
stdout it writes one line of JSON: what it serves, once it does, or the error that keeps it from it.
Its stdin is the read end of a pipe that closes when the supervisor is gone.
"""

import json
import os
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import torch

from service.app import create_app
from service.metrics import Metrics, share
from service.server import Server, load
from service.settings import Settings, parse_settings
from service.startup import ServiceError
from training.devices import describe

_BACKLOG = 2048  # connections that wait to be accepted, as many as uvicorn lets wait


def main() -> int:
    """Serve until told to stop; returns the exit status."""
    report = _take_stdout()
    threading.Thread(target=_end_with_supervisor, name="supervisor", daemon=True).start()
    try:
        return _serve(report)
    except ServiceError as error:  # of the start, so nothing else was reported
        report({"error": str(error)})
        return 1


def _serve(report: Callable[[object], None]) -> int:
    index, folder, sockets = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3].split(",")
    settings = parse_settings(sys.argv[4:])
    share_cores(settings.workers)
    share(folder, str(index))
    registry = load(on_own_device(settings, index))
    metrics = Metrics(folder)
    device = describe(registry.default.engine.device)
    server = Server(
        create_app(settings, registry, metrics, folder),
        settings,
        lambda: report({"names": registry.names, "device": device}),
        supervised=True,
        every_second=metrics.refresh,
    )
    server.run([listening(int(each)) for each in sockets])
    return server.status


def listening(descriptor: int) -> socket.socket:
    """A socket that the supervisor bound, which listens from the first ready worker on.

    Raises:
        ServiceError: another process bound the same port meanwhile, and listens.
    """
    shared = socket.socket(fileno=descriptor)
    try:
        shared.listen(_BACKLOG)  # uvloop does so too, but says nothing when it cannot
    except OSError as error:
        shared.close()
        raise ServiceError(f"the port cannot be opened: {error.strerror}") from error
    return shared


def _take_stdout() -> Callable[[object], None]:
    """A function that writes one line of JSON to stdout; whatever else is written goes to stderr.

    The supervisor reads no more than that line, so anything else would fill the pipe in the end.
    """
    descriptor = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def report(what: object) -> None:
        with os.fdopen(descriptor, "w") as pipe:
            pipe.write(json.dumps(what) + "\n")

    return report


def _end_with_supervisor() -> None:
    """End this process at once when its supervisor is gone, and nobody would ever stop it."""
    # Not through sys.stdin: its lock, held by a daemon thread, would end a clean exit in an abort.
    os.read(0, 1)
    os._exit(1)


def share_cores(workers: int) -> None:
    """Give this worker its part of the threads that PyTorch would use for one."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, torch.get_num_threads() // workers))


def on_own_device(settings: Settings, index: int) -> Settings:
    """The settings of one worker: where there are several GPUs to choose from, it has its own."""
    if settings.device not in ("auto", "cuda") or torch.cuda.device_count() < 2:
        return settings
    return settings.model_copy(update={"device": f"cuda:{index % torch.cuda.device_count()}"})


if __name__ == "__main__":
    sys.exit(main())
