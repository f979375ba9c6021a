"""The first workers: forked, so that they need not import again what the supervisor has imported.

A process forks only while it is small and has a single thread and no event loop: nothing that the
copy could use is then locked, half done or shared with its parent. So workers that replace others
later are started as programs of their own, and nothing of CUDA or ONNX Runtime is ever copied.
"""

import asyncio
import logging
import os
import signal
import sys
from asyncio import StreamReader, StreamReaderProtocol
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Self


class ForkedProcess:
    """A forked process, as the part of asyncio's `Process` that a supervisor uses.

    Create it on the event loop.

    Args:
        pid: of the process.
        output: the end of a pipe that the process writes its stdout to.
        threads: has a free thread, which waits for the process to end.
    """

    def __init__(self, pid: int, output: int, threads: ThreadPoolExecutor) -> None:
        self.pid, self._output = pid, output
        self.stdout: StreamReader | None = StreamReader()
        self._ended = asyncio.get_running_loop().run_in_executor(threads, os.waitpid, pid, 0)

    async def connect(self) -> None:
        """Read what the process writes from now on."""
        assert self.stdout is not None
        protocol = StreamReaderProtocol(self.stdout)
        pipe = os.fdopen(self._output, "rb")
        await asyncio.get_running_loop().connect_read_pipe(lambda: protocol, pipe)

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal, unless the process has ended."""
        if not self._ended.done():
            os.kill(self.pid, number)

    async def wait(self) -> int:
        """Return the exit status, or the negative number of a signal, once the process ends."""
        _, status = await asyncio.shield(self._ended)
        return os.waitstatus_to_exitcode(status)


class Forker:
    """Forks processes whose standard streams are those of a program that a supervisor starts.

    Their stdin ends when this process ends, or on leaving the context.
    """

    def __init__(self) -> None:
        self._stdin, self._alive = os.pipe()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._alive)

    def fork(self, main: Callable[[list[str]], int], arguments: list[str]) -> tuple[int, int]:
        """Run a function in a copy of this process; return its id and a pipe of its stdout."""
        reader, writer = os.pipe()
        pid = os.fork()
        if pid:
            os.close(writer)
            return pid, reader
        status = 1
        try:
            os.setsid()  # Ctrl-C reaches the supervisor only, which passes it on once
            sys.settrace(None)  # a debugger has the standard input of the supervisor
            os.dup2(self._stdin, 0)
            os.dup2(writer, 1)
            for descriptor in {reader, writer, self._stdin, self._alive} - {0, 1}:
                os.close(descriptor)
            status = main(arguments)
            logging.shutdown()
        except Exception:
            logging.getLogger("service.server.worker").exception("a worker failed")
        finally:
            os._exit(status)
