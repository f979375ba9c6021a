"""Python programs as processes of their own."""

import os
import platform
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]

Ended = subprocess.CompletedProcess[str]
Running = subprocess.Popen[str]


def start(*arguments: str, environment: Mapping[str, str] | None = None) -> Running:
    """Start Python in the repository, with pipes for its output.

    Args:
        arguments: `-m` and a module or `-c` and code, then its arguments.
        environment: replaces this process's.
    """
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=REPOSITORY,
        env=None if environment is None else dict(environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(*arguments: str, environment: Mapping[str, str] | None = None) -> Ended:
    """Run Python in the repository to its end."""
    process = start(*arguments, environment=environment)
    try:
        output, errors = process.communicate(timeout=120)
    except BaseException:
        process.kill()
        process.communicate()
        raise
    return Ended(process.args, process.returncode, output, errors)


def emulate(processor: str, *arguments: str) -> Ended:
    """Run Python in the repository on an x86-64 processor that QEMU emulates, or skip the test."""
    emulator = shutil.which("qemu-x86_64")
    if emulator is None or platform.machine() != "x86_64":
        pytest.skip("needs qemu-x86_64 (Debian: qemu-user) on x86-64")
    return subprocess.run(
        [emulator, "-cpu", processor, sys.executable, *arguments],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )


@contextmanager
def torchrun(
    script: Path, *arguments: str, logs: Path, environment: Mapping[str, str] | None = None
) -> Iterator[Running]:
    """Start a Python script in two processes with torchrun, and end all of them on leaving.

    torchrun starts each process in a session of its own, so no signal to torchrun or to its group
    ends them for certain. The script calls `end_with_input` instead, and ends when the standard
    input that it inherits does: on leaving, and when the
    process of the tests is killed. `communicate` would close it at once: use `wait`.

    Args:
        script: its folder is the first entry of `sys.path`.
        arguments: of the script.
        logs: folder of the outputs, `*/attempt_0/RANK/stdout.log` and `stderr.log`.
        environment: added to this process's.
    """
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", "2", "--redirects", "3", "--log-dir", str(logs)),
            *(str(script), *arguments),
        ],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), **(environment or {})},
        stdin=subprocess.PIPE,
        text=True,
    )
    with process:  # closes the standard input and waits
        try:
            yield process
        finally:
            process.kill()


def end_with_input() -> None:
    """End this process when its standard input ends, even if it hangs elsewhere."""

    def watch() -> None:
        while os.read(0, 1):  # not sys.stdin: a daemon thread must not hold its lock at exit
            pass
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
