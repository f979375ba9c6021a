"""What a service says when it serves, and when it cannot."""

import socket
import sys
from collections.abc import Callable, Sequence

Address = tuple[str, int]


class ServiceError(Exception):
    """The service cannot start or cannot go on; says why to whoever started it."""


def printable(text: str) -> str:
    """A text as one line for a terminal: the name of a file can hold any character."""
    return "".join(
        each if each.isprintable() else each.encode("unicode_escape").decode() for each in text
    )


def serving(
    names: Sequence[str], address: Address, devices: str, metrics: Address | None = None
) -> str:
    """The line that says what is served, and where."""
    line = f"Serving {', '.join(names)} at {_url(address)} on {devices}"
    return line if metrics is None else f"{line}, metrics at {_url(metrics)}/metrics"


def address_of(bound: socket.socket) -> Address:
    """Return the host and port of a socket."""
    host, port = bound.getsockname()[:2]
    return host, port


def _url(address: Address) -> str:
    host, port = address
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def status_of(command: Callable[[], int]) -> int:
    """The exit status of a command; what it cannot do is said in words on stderr."""
    try:
        return command()
    except ValueError as error:  # of an option
        sys.stderr.write(f"{error}\n")
        return 2
    except ServiceError as error:
        sys.stderr.write(printable(str(error)) + "\n")
        return 1
