"""Which worker takes a connection: several in one event loop, on real sockets."""

import asyncio
import errno
import logging
import socket
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import uvloop

from service.server import accepting
from service.server.accepting import TOLERANCE, Acceptor, Occupancy

DEADLINE_S = 60.0


class Worker:
    """One of several in this event loop, which counts its connections as uvicorn does."""

    def __init__(self, listening: socket.socket, occupancy: Occupancy) -> None:
        self.connections: set[asyncio.Protocol] = set()
        self._transports: list[asyncio.BaseTransport] = []
        self._listening = listening.dup()
        self.acceptor = Acceptor([self._listening], self._protocol, self.connections, occupancy)

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.acceptor.close()
        self._listening.close()
        for transport in self._transports:
            transport.close()

    def _protocol(self) -> asyncio.Protocol:
        worker = self

        class Protocol(asyncio.Protocol):
            def connection_made(self, transport: asyncio.BaseTransport) -> None:
                worker._transports.append(transport)
                worker.connections.add(self)

            def connection_lost(self, _error: Exception | None) -> None:
                worker.connections.discard(self)
                worker.acceptor.count()

        return Protocol()

    async def has(self, count: int) -> None:
        await until(lambda: len(self.connections) == count)


async def until(reached: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not reached():
            await asyncio.sleep(0)


def have(workers: tuple[Worker, ...], count: int) -> bool:
    return sum(len(each.connections) for each in workers) == count


async def connect(listening: socket.socket) -> socket.socket:
    client = socket.socket()
    client.setblocking(False)
    await asyncio.get_running_loop().sock_connect(client, listening.getsockname())
    return client


async def come_and_go(listening: socket.socket, worker: Worker) -> None:
    """Five clients, all of whom one worker has to take."""
    clients = [await connect(listening) for _ in range(5)]
    await worker.has(5)
    for client in clients:
        client.close()
    await worker.has(0)


def run(work: Callable[[socket.socket], Awaitable[None]]) -> None:
    """Run some work in an event loop as the workers have it, with a socket that listens."""

    async def main() -> None:
        with socket.create_server(("127.0.0.1", 0)) as listening:
            await work(listening)

    uvloop.run(main())


def test_the_fewest_are_those_of_a_worker_that_takes_some(tmp_path: Path) -> None:
    one, two, three = (Occupancy(tmp_path, 3, worker) for worker in range(3))
    assert one.fewest == 0  # of nobody yet
    two.set(7)
    assert one.fewest == two.fewest == three.fewest == 7
    three.set(5)
    assert one.fewest == 5
    one.set(0)
    assert three.fewest == 0
    Occupancy(tmp_path, 3, 0).leave()  # as a supervisor does when one has ended
    assert two.fewest == 5


def test_connections_that_come_one_by_one_are_shared(tmp_path: Path) -> None:
    async def work(listening: socket.socket) -> None:
        with (
            Worker(listening, Occupancy(tmp_path, 2, 0)) as one,
            Worker(listening, Occupancy(tmp_path, 2, 1)) as two,
        ):
            clients = []
            for count in range(1, 65):
                clients.append(await connect(listening))
                await until(partial(have, (one, two), count))
            few, many = sorted((len(one.connections), len(two.connections)))
            assert few + many == 64
            assert many <= TOLERANCE * (few + 1)
            for client in clients:
                client.close()
            await one.has(0)
            await two.has(0)
            occupancy = Occupancy(tmp_path, 2, 0)
            await until(lambda: occupancy.fewest == 0)

    run(work)


def test_a_worker_with_more_takes_what_nobody_else_takes(tmp_path: Path) -> None:
    async def work(listening: socket.socket) -> None:
        Occupancy(tmp_path, 2, 1).set(0)  # of another worker, which is held up
        with Worker(listening, Occupancy(tmp_path, 2, 0)) as worker:
            await come_and_go(listening, worker)

    run(work)


def test_a_worker_without_others_never_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accepting, "PATIENCE_S", 10 * DEADLINE_S)

    async def work(listening: socket.socket) -> None:
        Occupancy(tmp_path, 2, 1).set(0)
        Occupancy(tmp_path, 2, 1).leave()
        with Worker(listening, Occupancy(tmp_path, 2, 0)) as worker:
            await come_and_go(listening, worker)

    run(work)


def test_where_none_can_be_taken_it_says_so_and_tries_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(accepting, "RETRY_S", 0.001)
    fails = [OSError(errno.EMFILE, "Too many open files"), BlockingIOError()]
    accept = socket.socket.accept

    def failing(self: socket.socket) -> tuple[socket.socket, Any]:
        if fails:
            raise fails.pop(0)
        return accept(self)

    monkeypatch.setattr(socket.socket, "accept", failing)

    async def work(listening: socket.socket) -> None:
        with Worker(listening, Occupancy(tmp_path, 1, 0)) as worker:
            client = await connect(listening)
            await worker.has(1)
            client.close()
            await worker.has(0)

    with caplog.at_level(logging.ERROR, "service.server.accepting"):
        run(work)
    assert [each.message for each in caplog.records] == ["no connection can be taken for now"]
    assert not fails


def test_a_closed_one_takes_none_and_counts_for_nobody(tmp_path: Path) -> None:
    async def work(listening: socket.socket) -> None:
        with Worker(listening, Occupancy(tmp_path, 2, 0)) as closed:
            first = await connect(listening)
            await closed.has(1)
            closed.acceptor.close()
            with Worker(listening, Occupancy(tmp_path, 2, 1)) as other:
                clients = [await connect(listening) for _ in range(8)]
                await other.has(8)
                first.close()
                await closed.has(0)
                occupancy = Occupancy(tmp_path, 2, 0)
                await until(lambda: occupancy.fewest == 8)  # though the closed one has none
                for client in clients:
                    client.close()
                await other.has(0)

    run(work)
