"""One of several serving processes: `python -m service.server.worker`, started by a supervisor.

    python -m service.server.worker INDEX FOLDER SOCKETS [OPTION]...

INDEX numbers the workers from 0, FOLDER holds the metrics that all of them share, and SOCKETS are
the file descriptors of the sockets they share; the options are those of `python -m service`. On
stdout it writes one line of JSON: what it serves, once it does, or the error that keeps it from it.
Its stdin is the read end of a pipe that closes when the supervisor is gone.
"""

import gc
import json
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from service.settings import parse_settings
from service.startup import ServiceError


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
    gc.disable()  # until all is loaded; why, is said in `service.__main__`
    from service.server.process import serve_as_worker  # noqa: PLC0415

    return serve_as_worker(settings, index, folder, [int(each) for each in sockets], report)


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


if __name__ == "__main__":
    sys.exit(main())
