"""Logging of the process as JSON lines."""

import asyncio
import json
import logging
import time
from collections import deque
from functools import lru_cache
from typing import Any, TextIO

# A pipe of Linux takes this much in one piece, however full it is. The lines of several workers,
# which share stderr, could be mixed in a larger write.
MAX_WRITE_BYTES = 4096


class JSONFormatter(logging.Formatter):
    """Formatter that writes one JSON object a line, so that no client can forge a second line."""

    def format(self, record: logging.LogRecord) -> str:
        """Return a record with its `fields`, and with its traceback if it has one."""
        line: dict[str, Any] = {
            "time": _timestamp(record.created),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


class LineHandler(logging.StreamHandler[TextIO]):
    """Handler that writes JSON lines to stderr, in the order in which it gets them.

    A record is written at once, and the lines that wait before it. A process whose lines nobody
    reads waits as soon as the pipe is full: no line is dropped, and few are kept in memory.
    """

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(JSONFormatter())
        self._lines: deque[str] = deque()

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record."""
        try:
            self._lines.append(self.format(record) + "\n")
        except Exception:
            self.handleError(record)
        self.flush()

    def write_soon(self, line: str) -> None:
        """Write a line, in ASCII, together with others of this turn of the running event loop."""
        self._lines.append(line)
        if len(self._lines) == 1:  # else the flush of the one before it is yet to come
            asyncio.get_running_loop().call_soon(self.flush)

    def flush(self) -> None:
        """Write the lines that wait."""
        self.acquire()
        try:
            while self._lines:
                text = self._lines.popleft()
                while self._lines and len(text) + len(self._lines[0]) <= MAX_WRITE_BYTES:
                    text += self._lines.popleft()
                try:
                    self.stream.write(text)
                    self.stream.flush()
                except Exception:
                    self.handleError(logging.makeLogRecord({"msg": text}))
        finally:
            self.release()


def log_members(logger: logging.Logger, level: int, message: str, members: str) -> None:
    """Log a message with the members of a JSON object, in ASCII, as its `fields`.

    Call it on the event loop, and only if the logger is enabled for the level. Where a
    `LineHandler` is the only handler, no record is made, which takes longer than writing the line.
    """
    handler = _line_handler(logger, level)
    if handler is None:
        logger.log(level, message, extra={"fields": json.loads(f"{{{members}}}")})
    else:
        head = _head(level, logger.name, message)
        handler.write_soon(f'{{"time": "{_timestamp(time.time())}", {head}, {members}}}\n')


def flush_logs() -> None:
    """Write the lines that wait, before an exit that runs no more code."""
    for handler in logging.getLogger().handlers:
        handler.flush()


def configure_logging(level: str) -> None:
    """Send every logger of the process to stderr as JSON lines."""
    logging.basicConfig(level=level.upper(), handlers=[LineHandler()], force=True)
    logging.captureWarnings(True)
    for name in ("uvicorn", "uvicorn.error", "watchfiles"):
        # The service reports its own start, end and reloads; of these, only warnings matter.
        logging.getLogger(name).setLevel(max(logging.WARNING, logging.getLevelName(level.upper())))


def _line_handler(logger: logging.Logger, level: int) -> LineHandler | None:
    """Return the handler that gets every record of a logger and a level, if it is the only one."""
    handlers: list[logging.Handler] = []
    each: logging.Logger | None = logger
    while each is not None:
        handlers += each.handlers
        each = each.parent if each.propagate else None
    if len(handlers) == 1 and not logger.filters:
        (only,) = handlers
        if isinstance(only, LineHandler) and not only.filters and only.level <= level:
            return only
    return None


@lru_cache
def _head(level: int, logger: str, message: str) -> str:
    """Return the members that records of a kind share."""
    shared = {
        "level": logging.getLevelName(level).lower(),
        "logger": logger,
        "message": message,
    }
    return json.dumps(shared)[1:-1]


def _timestamp(created: float) -> str:
    second = int(created)
    return f"{_format_second(second)}.{int(1e3 * (created - second)):03d}Z"


@lru_cache(maxsize=2)
def _format_second(second: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))
