"""Logs on stderr, as text for people or as JSON for machines. What a caller gives as ``extra`` becomes fields.

log.info("adopted", extra={"request": request_id})

text    12:00:01.123 INFO  decode.intake: adopted request=4f2a.17
json    {"time": "2026-01-01T12:00:01.123Z", "level": "info", "logger": "decode.intake", "message": "adopted", ...}
"""

from __future__ import annotations

import datetime
import json
import logging
import os
import sys
from typing import TextIO

from proto.settings import LogSettings

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "color_message"}
_CHATTY = ("grpc", "asyncio", "urllib3", "httpcore", "httpx", "huggingface_hub", "uvicorn.access", "uvicorn.error")


def setup(settings: LogSettings, *, stream: TextIO | None = None) -> None:
    """Sends every logger of the process to ``stream`` (default: stderr), replacing what was set before.

    Call it before the first gRPC channel: its C++ core writes to stderr on its own, and is told here to keep to errors.
    """
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter() if settings.log_format == "json" else TextFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(settings.log_level.upper())
    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.WARNING)
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True


def _fields(record: logging.LogRecord) -> dict[str, object]:
    return {name: value for name, value in vars(record).items() if name not in _STANDARD}


class TextFormatter(logging.Formatter):
    """One line per record; a traceback follows on lines of its own."""

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.datetime.fromtimestamp(record.created).strftime("%H:%M:%S.%f")[:-3]
        parts = [f"{time} {record.levelname:<7} {record.name}: {record.getMessage()}"]
        parts += (f"{name}={value}" for name, value in _fields(record).items())
        line = " ".join(parts)
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class JsonFormatter(logging.Formatter):
    """One JSON object per line."""

    def format(self, record: logging.LogRecord) -> str:
        when = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        entry: dict[str, object] = {
            "time": when.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_fields(record),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str, ensure_ascii=False)
