"""The command line: `python -m service`, and the commands that may follow."""

import gc
import sys
from collections.abc import Callable

from service.settings import parse_settings
from service.startup import ServiceError, status_of


def main() -> int:
    """Do what the command line says; returns the exit status."""
    command = _COMMANDS.get(sys.argv[1]) if len(sys.argv) > 1 else None
    if command is not None:
        return status_of(lambda: command(sys.argv[2:]))
    return status_of(lambda: _serve(sys.argv[1:]))


def _serve(arguments: list[str]) -> int:
    """Serve until told to stop."""
    settings = parse_settings(arguments)
    # Imported only here: a supervisor, which lives as long as its workers, needs no PyTorch.
    if settings.workers == 1:
        gc.disable()  # until all is loaded, which leaves hardly any garbage and looks for it often
        from service.server.process import serve  # noqa: PLC0415

        return serve(settings, _say)
    from service.server.supervisor import supervise  # noqa: PLC0415

    supervise(settings, arguments, _say)
    return 0


def _verify(arguments: list[str]) -> int:
    from service.commands.verify import main  # noqa: PLC0415

    return main(arguments)


def _fetch(arguments: list[str]) -> int:
    try:
        from service.commands.fetch import main  # noqa: PLC0415
    except ModuleNotFoundError as error:
        raise ServiceError(f"pip install 'cgan-service[fetch]': {error}") from error
    return main(arguments)


_COMMANDS: dict[str, Callable[[list[str]], int]] = {"verify": _verify, "fetch-dataset": _fetch}


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
