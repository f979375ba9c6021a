"""The command line: `python -m service`."""

import sys

from service.settings import Settings, parse_settings
from service.startup import ServiceError, printable


def main() -> int:
    """Serve until told to stop; returns the exit status."""
    try:
        settings = parse_settings(sys.argv[1:])
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    try:
        return _run(settings)
    except ServiceError as error:
        print(printable(str(error)), file=sys.stderr)
        return 1


def _run(settings: Settings) -> int:
    # Imported only here: a supervisor, which lives as long as its workers, needs no PyTorch.
    if settings.workers == 1:
        from service.server import serve  # noqa: PLC0415

        return serve(settings, _say)
    from service.supervisor import supervise  # noqa: PLC0415

    supervise(settings, sys.argv[1:], _say)
    return 0


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
