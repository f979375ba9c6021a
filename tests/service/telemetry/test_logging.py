"""Lines of the log: their form, their order, and readers that stall."""

import asyncio
import json
import logging
import os
import select
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest

from service.telemetry.logging import MAX_WRITE_BYTES, JSONFormatter, LineHandler, log_members
from tests.support.processes import run
from tests.support.wire import wait_until

MEMBERS = '"path": "/\\u00e9", "status": 200, "duration_ms": 1.5, "client": null'
FIELDS = {"path": "/é", "status": 200, "duration_ms": 1.5, "client": None}


class Keeper(logging.Handler):
    """Keeps the records that it gets."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


@contextmanager
def stderr_of_a_pipe() -> Iterator[tuple[LineHandler, int]]:
    """A handler that writes to a pipe, and the pipe's other end."""
    reading, writing = os.pipe()
    with os.fdopen(writing, "w", buffering=1) as stream:
        handler = LineHandler()
        handler.setStream(stream)
        yield handler, reading
    os.close(reading)


@pytest.fixture
def log() -> logging.Logger:
    """A logger of its own, at level info."""
    logger = logging.Logger("service.test", logging.INFO)
    logger.propagate = False
    return logger


class Writes:
    """A stream that keeps each write."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def write(self, text: str) -> None:
        self.texts.append(text)

    def flush(self) -> None:
        pass


def handler_of(stream: Any) -> LineHandler:
    handler = LineHandler()
    handler.setStream(stream)
    return handler


def on_a_loop(*calls: Any) -> None:
    """Call functions in one turn of an event loop."""

    async def turn() -> None:
        for call in calls:
            call()

    asyncio.run(turn())


def test_a_line_without_a_record_is_the_one_of_its_record(log: logging.Logger) -> None:
    writes, keeper = Writes(), Keeper()
    log.addHandler(handler_of(writes))
    on_a_loop(lambda: log_members(log, logging.INFO, "request", MEMBERS))
    log.handlers = [keeper]
    on_a_loop(lambda: log_members(log, logging.INFO, "request", MEMBERS))
    (record,) = keeper.records
    assert record.__dict__["fields"] == FIELDS
    (line,) = writes.texts
    record.created = 0.0
    of_record = JSONFormatter().format(record)
    before, after = of_record.split("1970-01-01T00:00:00.000Z")
    assert line.startswith(before)
    assert line.endswith(after + "\n")
    assert len(line) == len(of_record) + 1


def test_another_handler_or_a_filter_gets_records(log: logging.Logger) -> None:
    writes, keeper = Writes(), Keeper()
    log.addHandler(handler_of(writes))
    log.addHandler(keeper)
    on_a_loop(lambda: log_members(log, logging.INFO, "both", MEMBERS))
    log.removeHandler(keeper)
    log.addFilter(lambda record: record.getMessage() != "filtered")
    on_a_loop(lambda: log_members(log, logging.INFO, "filtered", MEMBERS))
    assert [each.getMessage() for each in keeper.records] == ["both"]
    (line,) = writes.texts
    assert {**json.loads(line), **FIELDS} == json.loads(line)


def test_lines_of_one_turn_are_few_writes_that_a_pipe_takes_whole() -> None:
    writes = Writes()
    handler = handler_of(writes)
    lines = [f"{number:0{300 + number}}\n" for number in range(64)]
    long = "x" * 2 * MAX_WRITE_BYTES + "\n"
    written = [*lines, long, *lines]
    on_a_loop(*(partial(handler.write_soon, line) for line in written))
    assert "".join(writes.texts) == "".join(written)
    assert all(len(each) <= MAX_WRITE_BYTES or each == long for each in writes.texts)
    assert len(writes.texts) < len(written) / 8


def test_records_of_other_loggers_and_threads_keep_their_place(log: logging.Logger) -> None:
    writes = Writes()
    log.addHandler(handler_of(writes))

    def on_thread() -> None:
        thread = threading.Thread(target=log.warning, args=("a thread",))
        thread.start()
        thread.join()

    def access() -> None:
        log_members(log, logging.INFO, "request", MEMBERS)

    on_a_loop(access, lambda: log.error("an error"), access, on_thread, access)
    messages = [json.loads(line)["message"] for line in "".join(writes.texts).splitlines()]
    assert messages == ["request", "an error", "request", "a thread", "request"]


def test_a_reader_that_stalls_holds_the_process_and_loses_no_line() -> None:
    lines = [f"{number:0999}\n" for number in range(200)]  # more than a pipe takes
    with stderr_of_a_pipe() as (handler, reading):
        written = threading.Event()

        def write() -> None:
            async def turns() -> None:
                for line in lines:
                    handler.write_soon(line)
                    await asyncio.sleep(0)

            asyncio.run(turns())
            handler.stream.close()
            written.set()

        thread = threading.Thread(target=write, daemon=True)
        thread.start()
        wait_until(lambda: not select.select([], [handler.stream], [], 0)[1], "the pipe is full")
        assert not written.is_set()
        with os.fdopen(os.dup(reading)) as reader:
            assert reader.readlines() == lines
        thread.join()


def test_a_stream_that_fails_ends_neither_the_loop_nor_the_log(
    capsys: pytest.CaptureFixture[str],
) -> None:
    handler = handler_of(None)
    on_a_loop(lambda: handler.write_soon("lost\n"))
    assert "AttributeError" in capsys.readouterr().err
    writes = Writes()
    handler.setStream(writes)  # type: ignore[arg-type]
    on_a_loop(lambda: handler.write_soon("kept\n"))
    assert writes.texts == ["kept\n"]


EXITS = """
import asyncio, logging, os
from service.telemetry.logging import configure_logging, flush_logs, log_members
async def main():
    log_members(logging.getLogger("service.access"), logging.INFO, "request", '"number": 1')
    {}
configure_logging("info")
asyncio.run(main())
"""


@pytest.mark.parametrize(
    "end", ["flush_logs(); os._exit(0)", "raise SystemExit", "raise ValueError", "return"]
)
def test_a_line_is_written_before_the_process_ends(end: str) -> None:
    line = run("-c", EXITS.format(end)).stderr.splitlines()[0]
    assert json.loads(line)["number"] == 1
