"""The command line of the service: `python -m service`, or `cgan-service` once installed."""

import io
import signal
import sys
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

from service.failure import ServiceError
from service.server.loading import loading
from service.settings import (
    ClusterSettings,
    CommandSettings,
    FetchSettings,
    Settings,
    VerifySettings,
    parse,
)


class _Command(NamedTuple):
    """A command: its options, the module whose `run` executes it, and its extra."""

    settings: type[CommandSettings]
    module: str = ""
    extra: str = ""


COMMANDS = {
    "serve": _Command(Settings),
    "verify": _Command(VerifySettings, "service.commands.verify"),
    "fetch-dataset": _Command(FetchSettings, "service.commands.fetch", "fetch"),
    "cluster": _Command(ClusterSettings, "service.commands.cluster", "cluster"),
}


def main() -> int:
    """Run a command and return the exit status."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # As stderr is: a path may have characters that the encoding of a pipe or log file lacks.
        sys.stdout.reconfigure(errors="backslashreplace")
    arguments = sys.argv[1:]
    named = bool(arguments) and not arguments[0].startswith("-")
    name = arguments.pop(0) if named else "serve"
    try:
        return _run(name, arguments)
    except ValueError as error:  # of an option
        sys.stderr.write(f"{error}\n")
        return 2
    except ServiceError as error:
        sys.stderr.write(_printable(str(error)) + "\n")
        return 1
    except KeyboardInterrupt:  # while it starts; later, Ctrl-C drains it
        return 128 + signal.SIGINT


def _run(name: str, arguments: list[str]) -> int:
    if name not in COMMANDS:
        raise ValueError(f"unknown command {name!r}; expected {', '.join(COMMANDS)}")
    command = COMMANDS[name]
    prog = Path(sys.argv[0]).name
    if prog == "__main__.py":
        prog = "python -m service"
    settings = parse(
        command.settings,
        arguments,
        prog=prog if name == "serve" else f"{prog} {name}",
        epilog=_list_commands(prog) if name == "serve" else "",
        warn=lambda line: sys.stderr.write(f"{line}\n"),
    )
    if isinstance(settings, Settings):
        return _serve(settings, arguments)
    try:
        status: int = import_module(command.module).run(settings)
    except ModuleNotFoundError as error:
        if not command.extra:
            raise
        install = f"pip install -e '.[{command.extra}]'"
        raise ServiceError(f"{name} needs {error.name}; run: {install}") from error
    return status


def _printable(text: str) -> str:
    """Return a text as one line for a terminal; a file name may contain any character."""
    return "".join(
        each if each.isprintable() else each.encode("unicode_escape").decode() for each in text
    )


def _list_commands(prog: str) -> str:
    rows = [f"  {name:15}{each.settings.__doc__}".split("\n")[0] for name, each in COMMANDS.items()]
    rows[0] += " This is the default."
    help_line = f"Run `{prog} COMMAND --help` for the options of a command."
    return "\n".join(["commands:", *rows, "", help_line, ""])


def _serve(settings: Settings, arguments: list[str]) -> int:
    # Imported here because a supervisor, which lives as long as its workers, needs little of it.
    from service.server.sizing import choose_workers  # noqa: PLC0415

    workers = choose_workers(settings)
    if workers == 1:
        with loading():
            from service.server.process import create_server  # noqa: PLC0415

            server = create_server(settings, _print)
        return server.run_until_stopped()
    from service.server.supervisor import supervise  # noqa: PLC0415

    supervise(settings, workers, arguments, _print)
    return 0


def _print(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
