import socket
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from service.failure import ServiceError
from service.server.sockets import (
    find_free_port,
    open_sockets,
    open_unix_socket,
    remove_socket_file,
    reserve_port,
    url_of,
)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "::"])
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


def test_every_interface_of_ipv6_is_every_interface_of_ipv4_too() -> None:
    (reserved,) = reserve_port("::", 0)
    with reserved:
        (listening,) = open_sockets("::", reserved.getsockname()[1], reuse_port=True)
        with listening:
            port = listening.getsockname()[1]
            assert url_of(listening) == f"http://[::]:{port}"
            for address in ("127.0.0.1", "::1"):
                socket.create_connection((address, port)).close()
            for taken in ("127.0.0.1", "0.0.0.0", "::1"):
                with pytest.raises(ServiceError, match="Address already in use"):
                    open_sockets(taken, port)


def test_an_address_of_another_machine_is_named_with_what_is_allowed() -> None:
    for open_at in (open_sockets, reserve_port):
        with pytest.raises(
            ValueError, match=r"^--host .*'192\.0\.2\.1' is not .*expected an address"
        ):
            open_at("192.0.2.1", 0)


def test_a_name_is_served_at_those_of_its_addresses_that_the_machine_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`localhost` is ::1 too in a container whose interfaces have no IPv6."""
    resolve = socket.getaddrinfo

    def with_another(host: str, *arguments: object, **options: object) -> list[object]:
        assert host == "localhost"
        hosts = ("192.0.2.1", "127.0.0.1")
        return [each for name in hosts for each in resolve(name, *arguments, **options)]  # type: ignore[arg-type]

    monkeypatch.setattr(socket, "getaddrinfo", with_another)
    (listening,) = open_sockets("localhost", 0)
    with listening:
        assert listening.getsockname()[0] == "127.0.0.1"


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "::", "localhost"])
def test_a_free_port_is_found_at_every_address_of_a_host(host: str) -> None:
    for each in open_sockets(host, find_free_port(host)):
        each.close()


# Unix sockets -------------------------------------------------------------------------------------


def listens(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as client:
        return client.connect_ex(str(path)) == 0


def test_every_user_may_connect_to_a_unix_socket_until_its_file_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "cgan.sock"
    with open_unix_socket(path) as listening:
        assert url_of(listening) == f"unix:{path}"
        assert path.is_socket()
        assert path.stat().st_mode & 0o777 == 0o666
        assert listens(path)
        remove_socket_file(listening)
        assert list(tmp_path.iterdir()) == []
        remove_socket_file(listening)


def test_what_a_killed_service_left_is_replaced_and_what_another_one_uses_is_not(
    tmp_path: Path,
) -> None:
    path = tmp_path / "cgan.sock"
    open_unix_socket(path).close()
    assert path.exists()
    with open_unix_socket(path):
        with pytest.raises(ServiceError, match=f"Unix socket {path}: Address already in use$"):
            open_unix_socket(path)
        assert listens(path)


def test_a_unix_socket_in_use_is_not_taken_while_its_backlog_is_full(tmp_path: Path) -> None:
    path = tmp_path / "cgan.sock"
    with ExitStack() as stack:
        listening = stack.enter_context(open_unix_socket(path))
        listening.listen(0)
        codes = [0]
        while codes[-1] == 0:
            client = stack.enter_context(socket.socket(socket.AF_UNIX))
            client.setblocking(False)
            codes.append(client.connect_ex(str(path)))
        with pytest.raises(ServiceError, match="Address already in use"):
            open_unix_socket(path)
        assert path.exists()


def test_a_path_that_no_unix_socket_can_have_is_named_and_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("of somebody")
    for path, cause in {
        file: "another file is there",
        tmp_path: "another file is there",
        tmp_path / "missing" / "cgan.sock": "No such file or directory",
        file / "cgan.sock": "Not a directory",
    }.items():
        with pytest.raises(ServiceError, match=f"cannot open the Unix socket {path}: {cause}$"):
            open_unix_socket(path)
    assert file.read_text() == "of somebody"
