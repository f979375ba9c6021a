"""Listening sockets of TCP, of one process or of several that share a port, and of Unix."""

import errno
import socket
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from service.failure import ServiceError
from service.settings import ALLOWED_HOSTS

BACKLOG = 2048  # connections that the kernel holds until they are accepted
# As where the kernel has IPv6 but no interface has an address of it, as in some containers.
_UNAVAILABLE = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)


def open_sockets(host: str, port: int, *, reuse_port: bool = False) -> list[socket.socket]:
    """Listen at every address of a host that this machine has, at all of them on one port.

    Args:
        host: a name, or an address of IPv4 or IPv6; `::` is every interface, of IPv4 too.
        port: 0 for a free one.
        reuse_port: share the port with other sockets of this user that set the option.

    Raises:
        ServiceError: the host is unknown, or the port is taken.
        ValueError: no address of the host is one of this machine.
    """
    sockets: list[socket.socket] = []
    with ExitStack() as opened:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            for family, *_, address in dict.fromkeys(found):
                own = (address[0], port, *address[2:])
                every = address[0] == "::" and socket.has_dualstack_ipv6()
                try:
                    each = socket.create_server(
                        own,
                        family=family,
                        backlog=BACKLOG,
                        reuse_port=reuse_port,
                        dualstack_ipv6=every,
                    )
                except OSError as error:
                    if error.errno not in _UNAVAILABLE:
                        raise
                    continue
                sockets.append(opened.enter_context(each))
                port = each.getsockname()[1]
        except OSError as error:
            reason = str(error.strerror).partition(" (while")[0]  # without the address again
            raise ServiceError(f"cannot open port {port} on {host}: {reason}") from error
        opened.pop_all()
    if not sockets:
        raise ValueError(
            f"--host (or CGAN_HOST): {host!r} is not an address of this machine; {ALLOWED_HOSTS}"
        )
    return sockets


def open_unix_socket(path: Path) -> socket.socket:
    """Listen at a path of the file system, for every user of this machine, as at a port.

    A file that an ended service left at the path is replaced; `remove_socket_file` removes it.

    Raises:
        ServiceError: another service listens there, another file is there, or the folder is missing
            or not writable.
    """
    listening = socket.socket(socket.AF_UNIX)
    try:
        if path.is_socket() and _is_stale(path):
            path.unlink()
        elif path.exists() and not path.is_socket():
            raise FileExistsError(errno.EEXIST, "another file is there")
        listening.bind(str(path))
        path.chmod(0o666)
        listening.listen(BACKLOG)
    except OSError as error:
        listening.close()
        raise ServiceError(f"cannot open the Unix socket {path}: {error.strerror}") from error
    return listening


def _is_stale(path: Path) -> bool:
    """Return True if no process listens at a Unix socket."""
    with socket.socket(socket.AF_UNIX) as client:
        client.setblocking(False)  # it would wait while the backlog is full
        return client.connect_ex(str(path)) == errno.ECONNREFUSED


def remove_socket_file(listening: socket.socket) -> None:
    """Remove the file of a Unix socket that is about to be closed; other sockets have none.

    Another service can take the path once the socket is closed, so nothing may remove it later.
    """
    if not isinstance(path := listening.getsockname(), tuple):
        Path(path).unlink(missing_ok=True)


def reserve_port(host: str, port: int) -> list[socket.socket]:
    """Bind sockets that keep a port for the workers of this service, and never listen.

    A client is refused until a worker listens.

    Raises:
        ServiceError: the host is unknown, or the port is taken.
        ValueError: no address of the host is one of this machine.
    """
    reserved = []
    for probe in open_sockets(host, port):  # SO_REUSEPORT alone would join another service
        each = socket.socket(probe.family)
        with probe:
            address = probe.getsockname()
            if probe.family == socket.AF_INET6:
                only = probe.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY)
                each.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, only)
        each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # despite TIME_WAIT
        each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        each.bind(address)
        each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)  # or another service could bind
        reserved.append(each)
    return reserved


def find_free_port(host: str) -> int:
    """Return a port that is free at every address of a host.

    Raises:
        ValueError: no address of the host is one of this machine.
    """
    with ExitStack() as opened:
        sockets = [opened.enter_context(each) for each in open_sockets(host, 0)]
        port: int = sockets[0].getsockname()[1]
        return port


def startup_message(
    names: Sequence[str], url: str, devices: str, metrics_url: str | None = None
) -> str:
    """Return the line that states what is served, and where."""
    line = f"Serving {', '.join(names)} at {url} on {devices}"
    return line if metrics_url is None else f"{line}, metrics at {metrics_url}/metrics"


def url_of(bound: socket.socket) -> str:
    """Return the URL of a socket; `unix:PATH` for one of Unix."""
    if not isinstance(name := bound.getsockname(), tuple):
        return f"unix:{name}"
    return format_url(*name[:2])


def format_url(host: str, port: int) -> str:
    """Return the URL of a port."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
