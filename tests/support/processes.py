"""Python programs as processes of their own."""

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

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
