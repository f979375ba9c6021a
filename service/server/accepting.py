"""Which of several workers takes a new connection: one that has few of them.

All that share a port wake up for a connection, and the first one takes it. Of 64 that came one
after another, two idle workers had 31 and 33 at one time, 54 and 10 at another; and a client that
keeps its connections keeps to the busier worker for good.
"""

import asyncio
import logging
import mmap
import socket
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

PATIENCE_S = 0.001  # for a worker with fewer connections to take one
# So many times as many as another's may a worker's connections be, both counted with the one that
# comes. Where every request has a connection of its own, they are even on the whole by themselves,
# and waiting for each other whenever they are not took 11 % of what two workers answered.
TOLERANCE = 1.5
RETRY_S = 1.0  # where no connection can be taken at all, as too many files are open

log = logging.getLogger("service.server.accepting")


class Occupancy:
    """How many connections one of several workers has, and the fewest that one of them has.

    Args:
        folder: of the file that they share.
        workers: how many there are.
        worker: which one this is, from 0.
    """

    def __init__(self, folder: Path, workers: int, worker: int) -> None:
        size = 8 * workers
        with (folder / "connections").open("a+b") as file:
            file.truncate(size)
            memory = mmap.mmap(file.fileno(), size)
        self._each = memoryview(memory).cast("q")  # one more than it has; 0 while it takes none
        self._worker = worker

    def set(self, connections: int) -> None:
        """Tell the others how many this one has."""
        self._each[self._worker] = connections + 1

    def leave(self) -> None:
        """Tell the others that this one takes none; also when it has ended, by its supervisor."""
        self._each[self._worker] = 0

    @property
    def fewest(self) -> int:
        """The fewest that a worker has, of those that take any."""
        return min((each for each in self._each if each), default=1) - 1


class Acceptor:
    """Takes new connections for one of several workers, after those that have far fewer.

    It leaves them a moment to be faster, and then takes one that still waits.

    Args:
        sockets: those that all of them listen on.
        protocol: makes the protocol of a connection.
        connections: those that this worker has, with `protocol.connection_made` and until
            `protocol.connection_lost`; `count` is to be called when one was lost.
        occupancy: this worker's.
    """

    def __init__(
        self,
        sockets: Sequence[socket.socket],
        protocol: Callable[[], asyncio.Protocol],
        connections: Collection[object],
        occupancy: Occupancy,
    ) -> None:
        self._sockets, self._protocol = sockets, protocol
        self._connections, self._occupancy = connections, occupancy
        self._loop = asyncio.get_running_loop()
        self._beginning: set[asyncio.Task[None]] = set()  # accepted, and not among those yet
        self._paused: dict[socket.socket, asyncio.TimerHandle] = {}
        self._closed = False
        for each in sockets:
            each.setblocking(False)
            self._loop.add_reader(each, self._on_waiting, each)
        self.count()

    def count(self) -> int:
        """Tell the other workers how many connections this one has."""
        held = len(self._connections) + len(self._beginning)
        if not self._closed:
            self._occupancy.set(held)
        return held

    def close(self) -> None:
        """Take no more."""
        self._closed = True
        for each in self._sockets:
            self._loop.remove_reader(each)
        for pause in self._paused.values():
            pause.cancel()
        self._occupancy.leave()

    def _on_waiting(self, listening: socket.socket) -> None:
        """Take the connection that waits, unless another worker should."""
        if self.count() + 1 > TOLERANCE * (self._occupancy.fewest + 1):
            self._pause(listening, PATIENCE_S)
        else:
            self._take(listening)

    def _pause(self, listening: socket.socket, seconds: float) -> None:
        self._loop.remove_reader(listening)
        self._paused[listening] = self._loop.call_later(seconds, self._resume, listening)

    def _resume(self, listening: socket.socket) -> None:
        del self._paused[listening]
        self._loop.add_reader(listening, self._on_waiting, listening)
        self._take(listening)

    def _take(self, listening: socket.socket) -> None:
        try:
            taken, _ = listening.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return  # another worker was faster, or the client has gone
        except OSError:
            log.exception("no connection can be taken for now")
            self._pause(listening, RETRY_S)
            return
        beginning = self._loop.create_task(self._begin(taken))
        self._beginning.add(beginning)
        beginning.add_done_callback(self._on_begun)
        self.count()

    async def _begin(self, taken: socket.socket) -> None:
        try:
            await self._loop.connect_accepted_socket(self._protocol, taken)
        except OSError:  # the client has gone
            taken.close()

    def _on_begun(self, beginning: asyncio.Task[None]) -> None:
        self._beginning.discard(beginning)
        self.count()
