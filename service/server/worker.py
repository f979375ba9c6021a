"""One of several serving processes, forked or started by a supervisor.

    python -m service.server.worker INDEX COUNT FOLDER PORT [OPTION]...

INDEX numbers the COUNT workers from 0, FOLDER holds the files that they share, and PORT is reserved
by the supervisor; the options are those of `python -m service`. The worker writes one line of JSON
to stdout: the names of its models and its device once it serves, or the error that prevents it. Its
stdin is a pipe that closes when the supervisor ends.
"""

import json
import os
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from service.failure import ServiceError
from service.server.loading import loading
from service.settings import parse_settings


def main(arguments: list[str]) -> int:
    """Serve until stopped; return the exit status."""
    report = _take_stdout()
    threading.Thread(target=_exit_with_supervisor, name="supervisor", daemon=True).start()
    index, count, folder, port, *options = arguments
    try:
        with loading():
            from service.server.process import WorkerPlace, create_worker  # noqa: PLC0415

            settings = parse_settings(options)
            place = WorkerPlace(int(index), int(count), Path(folder), int(port))
            server = create_worker(settings, place, report)
        return server.run_until_stopped()
    except ServiceError as error:  # always before the worker has reported anything
        report({"error": str(error)})
        return 1


def _take_stdout() -> Callable[[object], None]:
    """Return a function that writes one line of JSON to stdout; redirect other output to stderr.

    The supervisor reads one line only, so that other output would fill the pipe in the end.
    """
    descriptor = os.dup(1)
    with suppress(OSError):  # stderr is closed
        os.dup2(2, 1)

    def report(content: object) -> None:
        with os.fdopen(descriptor, "w") as pipe:
            pipe.write(json.dumps(content) + "\n")

    return report


def _exit_with_supervisor() -> None:
    """Exit at once when the supervisor has ended, because nothing else would stop this process."""
    # Not through sys.stdin: this daemon thread would hold its lock, and a clean exit would abort.
    os.read(0, 1)
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
