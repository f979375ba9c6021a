"""The behaviour that all commands share: messages, expected errors and renamed options."""

import io
import logging
import os
import sys
from pathlib import Path

import click
from tqdm import tqdm

from training.data.named import DataError
from training.devices import limit_threads
from training.files import FileError
from training.loop import DivergedError
from training.machine import DeviceError
from training.settings import SettingsError

# Errors that a user can fix. Any other exception is a defect of this code, with its traceback.
EXPECTED = (DataError, DeviceError, DivergedError, FileError, OSError)
# Names of the previous release; the next one drops them.
RENAMED_COMMANDS = {"judge": "train-classifier"}
RENAMED_OPTIONS = {
    "--gamma": "--r1-gamma",
    "--mismatch": "--mismatch-weight",
    "--publish": "--export-to",
    "--from": "--init-from",
    "--size": "--image-size",
}

logger = logging.getLogger("training")

FILE = click.Path(dir_okay=False, path_type=Path)
FOLDER = click.Path(file_okay=False, path_type=Path)

device_option = click.option(
    "--device",
    default="auto",
    help="auto (CUDA if available, else the CPU), cpu, cuda or cuda:N.",
)
data_dir_option = click.option(
    "--data-dir",
    type=FOLDER,
    default=None,
    help="Folder of the named data sets, which are downloaded if missing: "
    "DIR/mnist/train-images-idx3-ubyte.gz … [default: $CGAN_DATA_DIR, else a cache folder]",
)


class _TerminalHandler(logging.Handler):
    """A handler that prints warnings on stderr and the rest on stdout, above a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        stream = sys.stderr if record.levelno >= logging.WARNING else sys.stdout
        tqdm.write(self.format(record), file=stream)


class Commands(click.Group):
    """A group of commands that accepts renamed ones and reports expected errors in one line."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Prepare output and threads, and replace renamed commands and options."""
        if isinstance(sys.stdout, io.TextIOWrapper):
            # As stderr is: the encoding of a pipe or log file may lack letters of a class or path.
            sys.stdout.reconfigure(errors="backslashreplace")
        limit_threads()
        logger.setLevel(logging.INFO)
        logger.handlers = [_TerminalHandler()]
        command = [_current_name(RENAMED_COMMANDS, name) for name in args[:1]]
        options = [_current_name(RENAMED_OPTIONS, argument) for argument in args[1:]]
        return super().parse_args(ctx, command + options)

    def invoke(self, ctx: click.Context) -> object:
        """Run a command; turn expected errors into one line on stderr."""
        try:
            return super().invoke(ctx)
        except SettingsError as error:
            raise click.UsageError(str(error)) from error
        except EXPECTED as error:
            raise click.ClickException(_describe(error)) from error
        except MemoryError as error:
            cause = str(error) or "the memory does not suffice"
            raise click.ClickException(f"{cause}; free memory, or use fewer images") from error


def _describe(error: Exception) -> str:
    """Return a message; that of the operating system as a path and a cause."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror is not None:
        return f"{os.fsdecode(error.filename)}: {error.strerror}"
    return str(error)


def _current_name(renamed: dict[str, str], argument: str) -> str:
    name, separator, value = argument.partition("=")
    if name not in renamed:
        return argument
    logger.warning("%s is deprecated; use %s", name, renamed[name])
    return renamed[name] + separator + value
