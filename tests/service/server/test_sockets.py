import socket
from collections.abc import Callable
from contextlib import ExitStack, closing

import pytest

from service.errors import ServiceError
from service.server.sockets import open_sockets, reserve_port


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_workers_share_a_reserved_port_and_clients_are_refused_until_one_listens(host: str) -> None:
    with ExitStack() as stack:
        reserved = [stack.enter_context(each) for each in reserve_port(host, 0)]
        address, port = reserved[0].getsockname()[:2]
        assert {each.getsockname()[1] for each in reserved} == {port}
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((address, port))
        first, second = (open_sockets(host, port, reuse_port=True) for _ in range(2))
        assert len(first) == len(second) == len(reserved)
        for each in (*first, *second):
            stack.enter_context(each)
            with closing(socket.create_connection(each.getsockname()[:2])) as client:
                assert client.getpeername()[1] == port


@pytest.mark.parametrize("taken", ["reserved", "shared", "alone"])
def test_a_port_is_not_shared_with_another_service(taken: str) -> None:
    open_first: Callable[[], list[socket.socket]] = {
        "reserved": lambda: reserve_port("127.0.0.1", 0),
        "shared": lambda: open_sockets("127.0.0.1", 0, reuse_port=True),
        "alone": lambda: open_sockets("127.0.0.1", 0),
    }[taken]
    (first,) = open_first()
    with first:
        port = first.getsockname()[1]
        message = f"cannot open port {port} on 127.0.0.1: Address already in use$"
        for open_again in (open_sockets, reserve_port):
            with pytest.raises(ServiceError, match=message):
                open_again("127.0.0.1", port)


def test_a_port_can_be_opened_again_right_after_its_connections_were_closed() -> None:
    """The closed connections keep the port in TIME_WAIT."""
    (listening,) = open_sockets("127.0.0.1", 0)
    address = listening.getsockname()[:2]
    with listening, socket.create_connection(address) as client:
        accepted, _ = listening.accept()
        accepted.close()
        assert client.recv(1) == b""
    for each in reserve_port(*address):
        each.close()


def test_an_unknown_host_is_named() -> None:
    with pytest.raises(ServiceError, match=r"cannot open port 80 on host\.invalid: "):
        open_sockets("host.invalid", 80)
