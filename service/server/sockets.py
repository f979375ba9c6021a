"""Listening TCP sockets, of one process or of several that share a port, and their URLs."""

import socket
from collections.abc import Sequence
from contextlib import ExitStack

from service.errors import ServiceError

BACKLOG = 2048  # connections that the kernel holds until they are accepted


def open_sockets(host: str, port: int, *, reuse_port: bool = False) -> list[socket.socket]:
    """Listen at every address of a host, at all of them on one port.

    Args:
        host: a name, or an address of IPv4 or IPv6.
        port: 0 for a free one.
        reuse_port: share the port with other sockets of this user that set the option.

    Raises:
        ServiceError: the host is unknown, or the port is taken.
    """
    sockets = []
    with ExitStack() as opened:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            for family, *_, address in dict.fromkeys(found):
                own = (address[0], port, *address[2:])
                each = socket.create_server(
                    own, family=family, backlog=BACKLOG, reuse_port=reuse_port
                )
                sockets.append(opened.enter_context(each))
                port = each.getsockname()[1]
        except OSError as error:
            reason = str(error.strerror).partition(" (while")[0]  # without the address again
            raise ServiceError(f"cannot open port {port} on {host}: {reason}") from error
        opened.pop_all()
    return sockets


def reserve_port(host: str, port: int) -> list[socket.socket]:
    """Bind sockets that keep a port for the workers of this service, and never listen.

    A client is refused until a worker listens.

    Raises:
        ServiceError: the host is unknown, or the port is taken.
    """
    reserved = []
    for probe in open_sockets(host, port):  # SO_REUSEPORT alone would join another service
        with probe:
            address = probe.getsockname()
        each = socket.socket(probe.family)
        each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # despite TIME_WAIT
        each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if probe.family == socket.AF_INET6:
            each.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        each.bind(address)
        each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)  # or another service could bind
        reserved.append(each)
    return reserved


def startup_message(
    names: Sequence[str], url: str, devices: str, metrics_url: str | None = None
) -> str:
    """Return the line that states what is served, and where."""
    line = f"Serving {', '.join(names)} at {url} on {devices}"
    return line if metrics_url is None else f"{line}, metrics at {metrics_url}/metrics"


def url_of(bound: socket.socket) -> str:
    """Return the URL of a socket."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
