"""Logging of the process as JSON lines."""

import json
import logging
import time
from typing import Any


class JSONFormatter(logging.Formatter):
    """Formatter that writes one JSON object a line, so that no client can forge a second line."""

    def format(self, record: logging.LogRecord) -> str:
        """Return a record with its `fields`, and with its traceback if it has one."""
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
            + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


def configure_logging(level: str) -> None:
    """Send every logger of the process to stderr as JSON lines."""
    handler = logging.StreamHandler()
    handler.setFormatter(JSONFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.captureWarnings(True)
    for name in ("uvicorn", "uvicorn.error", "watchfiles"):
        # The service reports its own start, end and reloads; of these, only warnings matter.
        logging.getLogger(name).setLevel(max(logging.WARNING, logging.getLevelName(level.upper())))
