"""What is forked does as `python` does."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable

import pytest

from tests.support.processes import REPOSITORY, Forked, Running, run, start

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="nothing is forked here")

CODES = {
    "it prints": "import sys; print(sys.argv[1:]); print('no', file=sys.stderr)",
    "it has a status": "import sys; print('yes'); sys.exit(3)",
    "it ends in words": "import sys; sys.exit('no')",
    "it is killed": "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
    "it ends at once": "import os; print('yes', flush=True); os._exit(4)",
    "it has a folder and a name": "import os; print(os.getcwd(), __name__)",
    "it is interrupted": "import signal; print(signal.getsignal(signal.SIGINT))",
}


@pytest.mark.parametrize("code", CODES.values(), ids=CODES)
def test_a_forked_process_ends_as_python_does(code: str) -> None:
    command = ("-c", code, "one", "two")
    real = subprocess.run(
        [sys.executable, *command], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    forked = run(*command)
    assert (forked.returncode, forked.stdout) == (real.returncode, real.stdout)
    assert forked.stderr == real.stderr


PARENT = """
import asyncio, sys
from asyncio.subprocess import PIPE
from pathlib import Path

async def main(module, given):
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-m", module, stdin=PIPE, stdout=PIPE, stderr=PIPE
    )
    # While it waits for what it is given: one that has ended has no command line any more.
    print("forkserver" in Path(f"/proc/{child.pid}/cmdline").read_text(), file=sys.stderr)
    print(await child.communicate(given.encode()), child.returncode)

asyncio.run(main(*sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("module", "given"),
    [("json.tool", "[1, 2]"), ("json.tool", "[1, 2"), ("tokenize", "(")],
    ids=["it works", "it ends in words", "it has a status"],
)
def test_what_it_starts_is_forked_from_it_and_ends_as_python_does(module: str, given: str) -> None:
    command = ("-c", PARENT, module, given)
    real = subprocess.run(
        [sys.executable, *command], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    forked = run(*command)
    assert (real.stderr, forked.stderr) == ("False\n", "True\n")
    assert forked.stdout == real.stdout


def test_settings_reach_it_and_what_a_library_might_have_read_is_not_forked() -> None:
    code = "import os; print(os.environ.get('CGAN_PORT'), os.environ.get('OMP_NUM_THREADS'))"

    def started(**more: str) -> Running:
        return start("-c", code, environment={**os.environ, **more})

    forked, real = started(CGAN_PORT="7"), started(OMP_NUM_THREADS="77")
    assert isinstance(forked, Forked)
    assert isinstance(real, subprocess.Popen)
    assert forked.communicate(timeout=60)[0].split()[0] == "7"
    assert real.communicate(timeout=60)[0].split()[1] == "77"


@pytest.mark.parametrize(
    ("end", "status"),
    [(lambda it: it.send_signal(signal.SIGTERM), -signal.SIGTERM), (Forked.kill, -signal.SIGKILL)],
)
def test_a_signal_ends_it(end: Callable[[Forked], None], status: int) -> None:
    process = start("-c", "print(1, flush=True)\nimport time; time.sleep(600)")
    assert isinstance(process, Forked)
    assert process.stdout.readline() == "1\n"
    assert process.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.0)
    end(process)
    assert process.wait(60) == process.returncode == status
    assert process.communicate(timeout=60) == ("", "")
    end(process)  # which has nobody to reach
