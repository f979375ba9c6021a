"""Python in processes of their own, which need not each import PyTorch.

That takes more than half of a service's start, and tests start many. So, where `prepare` was
called, a process is forked from one that has imported what the service imports, and goes on as
`python` would have; elsewhere, and where its environment might matter to a library, it is `python`.
The workers that it starts in turn are forked from it.
"""

import asyncio
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import threading
import traceback
from asyncio.subprocess import Process
from collections.abc import Collection, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TextIO, TypeAlias

REPOSITORY = Path(__file__).parents[2]

Ended = subprocess.CompletedProcess[str]
Running: TypeAlias = "subprocess.Popen[str] | Forked"

_forks = multiprocessing.get_context("forkserver" if sys.platform == "linux" else None)
_prepared_with: dict[str, str] | None = None


def prepare() -> None:
    """Fork from now on, where libraries bear it."""
    global _prepared_with  # noqa: PLW0603
    if sys.platform == "linux":
        _forks.set_forkserver_preload(["service.server.process"])
        _prepared_with = _of_libraries(os.environ)


def start(*arguments: str, environment: Mapping[str, str] | None = None) -> Running:
    """Python in the repository, with pipes for its output.

    Args:
        arguments: `-m` and a module or `-c` and code, then what it is given.
        environment: instead of this process's.
    """
    environment = {**os.environ} if environment is None else {**environment}
    if _of_libraries(environment) == _prepared_with:
        return Forked(arguments, environment)
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=REPOSITORY,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(*arguments: str, environment: Mapping[str, str] | None = None) -> Ended:
    """The same, to its end."""
    process = start(*arguments, environment=environment)
    output, errors = process.communicate(timeout=120)
    return Ended(process.args, process.wait(), output, errors)


class Forked:
    """What `subprocess.Popen` is, as far as tests go."""

    def __init__(self, arguments: Sequence[str], environment: Mapping[str, str]) -> None:
        self.args = list(arguments)
        (output, its_output), (errors, its_errors) = (_forks.Pipe(duplex=False) for _ in range(2))
        given = (self.args, environment, its_output, its_errors)
        self._process = _forks.Process(target=_become, args=given, daemon=True)
        self._process.start()
        self.stdout, self.stderr = map(_reader, (output, errors))
        its_output.close()
        its_errors.close()
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        """Its exit status, or less than zero, the signal that ended it; None while it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
        return self._process.exitcode

    def communicate(self, timeout: float) -> tuple[str, str]:
        """What is left of its output and of its errors; after so many seconds it is killed."""
        killer = threading.Timer(timeout, self.kill)
        killer.start()
        with self.stdout, self.stderr, ThreadPoolExecutor(2) as readers:
            output, errors = readers.map(lambda pipe: pipe.read(), (self.stdout, self.stderr))
        self.wait()
        killer.cancel()
        return output, errors


def _of_libraries(environment: Mapping[str, str]) -> dict[str, str]:
    """What may have been read on import already.

    That is all but what this project and pytest read, where PyTorch's compiler, which tells its own
    children so on first use, keeps its cache, and what ONNX Runtime is told before its first use.
    """
    later = ("CGAN_", "PYTEST_", "TORCHINDUCTOR_", "ORT_DISABLE_TELEMETRY")
    return {name: value for name, value in environment.items() if not name.startswith(later)}


def _reader(connection: Connection) -> TextIO:
    with connection:
        return os.fdopen(os.dup(connection.fileno()))


def _become(
    arguments: list[str], environment: Mapping[str, str], output: Connection, errors: Connection
) -> None:
    for descriptor, connection in ((1, output), (2, errors)):
        os.dup2(connection.fileno(), descriptor)
        connection.close()
    os.chdir(REPOSITORY)
    os.environ.clear()
    os.environ.update(environment)
    asyncio.create_subprocess_exec = partial(_fork_python, asyncio.create_subprocess_exec)
    _go_on(arguments)


def _go_on(arguments: Sequence[str]) -> None:
    kind, what, *sys.argv[1:] = arguments
    if kind == "-m":
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        exec(what, {"__name__": "__main__"})


def _fork_python(
    create: Any, program: str, *arguments: str, pass_fds: Collection[int] = (), **options: Any
) -> Coroutine[Any, Any, Process]:
    """`asyncio.create_subprocess_exec`, whose child is this Python where it would be another."""
    if program == sys.executable and arguments[0] == "-m":
        options["preexec_fn"] = partial(_instead_of_exec, arguments, {0, 1, 2, *pass_fds})
    process: Coroutine[Any, Any, Process] = create(
        program, *arguments, pass_fds=pass_fds, **options
    )
    return process


def _instead_of_exec(arguments: Sequence[str], kept: Collection[int]) -> None:
    """Go on as `python` would, in the child of a process that runs an event loop, to its end.

    What exec would close is replaced, so that no object of the parent's, when it is collected,
    closes what is opened under its number.
    """
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in [int(path.name) for path in Path("/proc/self/fd").iterdir()]:
        if descriptor not in kept and descriptor != nothing:
            os.dup2(nothing, descriptor)
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    asyncio._set_running_loop(None)
    sys.stdin = os.fdopen(0, closefd=False)
    status = 0
    try:
        _go_on(arguments)
    except SystemExit as ended:
        status = _status(ended.code)
    except BaseException:
        traceback.print_exc()
        status = 1
    threading._shutdown()  # type: ignore[attr-defined]
    for stream in (sys.stdout, sys.stderr):
        if not stream.closed:
            stream.flush()
    os._exit(status)


def _status(code: object) -> int:
    """What `sys.exit` was given, said where it is words."""
    if isinstance(code, int):
        return code
    if code is not None:
        sys.stderr.write(f"{code}\n")
    return int(code is not None)
