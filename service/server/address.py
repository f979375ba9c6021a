"""Addresses of servers, and the message that states them."""

import socket
from collections.abc import Sequence

Address = tuple[str, int]


def startup_message(
    names: Sequence[str], address: Address, devices: str, metrics: Address | None = None
) -> str:
    """Return the line that states what is served, and where."""
    line = f"Serving {', '.join(names)} at {_url(address)} on {devices}"
    return line if metrics is None else f"{line}, metrics at {_url(metrics)}/metrics"


def address_of(bound: socket.socket) -> Address:
    """Return the host and port of a socket."""
    host, port = bound.getsockname()[:2]
    return host, port


def _url(address: Address) -> str:
    host, port = address
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
