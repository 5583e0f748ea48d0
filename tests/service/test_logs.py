"""Text and JSON logs."""

from __future__ import annotations

import io
import json
import logging
import os
from collections.abc import Iterator

import pytest

from proto.settings import LogSettings
from service import logs


@pytest.fixture(autouse=True)
def _as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("GRPC_VERBOSITY", "")
    monkeypatch.delenv("GRPC_VERBOSITY")
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def written(settings: LogSettings, *, error: bool = False) -> str:
    stream = io.StringIO()
    logs.setup(settings, stream=stream)
    logger = logging.getLogger("decode.intake")
    logger.debug("not shown")
    try:
        if error:
            raise ValueError("inner")
        logger.info("adopted %d blocks", 3, extra={"request": "r.1", "num_bytes": 5})
    except ValueError:
        logger.exception("failed", extra={"request": "r.1"})
    return stream.getvalue()


def test_text_is_one_line_with_the_fields_at_its_end() -> None:
    line = written(LogSettings(log_format="text"))
    assert line.endswith("INFO    decode.intake: adopted 3 blocks request=r.1 num_bytes=5\n")
    assert line.count("\n") == 1


def test_json_is_one_object_per_line_with_the_fields_beside_the_message() -> None:
    entry = json.loads(written(LogSettings(log_format="json")))
    assert entry.pop("time").endswith("Z")
    assert entry == {
        "level": "info",
        "logger": "decode.intake",
        "message": "adopted 3 blocks",
        "request": "r.1",
        "num_bytes": 5,
    }


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_an_exception_is_written_with_its_traceback(log_format: str) -> None:
    text = written(LogSettings(log_format=log_format), error=True)
    assert "ValueError: inner" in text
    if log_format == "json":
        assert "Traceback" in json.loads(text)["exception"]


def test_setting_up_again_replaces_what_was() -> None:
    first = io.StringIO()
    logs.setup(LogSettings(), stream=first)
    assert "adopted" in written(LogSettings())
    assert first.getvalue() == ""


def test_the_level_holds_for_every_logger_and_libraries_are_quiet() -> None:
    stream = io.StringIO()
    logs.setup(LogSettings(log_level="debug"), stream=stream)
    logging.getLogger("urllib3.connectionpool").info("connection pool is full of news")
    logging.getLogger("engine.core").debug("a step")
    assert "a step" in stream.getvalue()
    assert "news" not in stream.getvalue()


def test_grpc_keeps_quiet_unless_somebody_wants_to_hear_it(monkeypatch: pytest.MonkeyPatch) -> None:
    logs.setup(LogSettings(), stream=io.StringIO())
    assert os.environ["GRPC_VERBOSITY"] == "ERROR"
    monkeypatch.setenv("GRPC_VERBOSITY", "DEBUG")
    logs.setup(LogSettings(), stream=io.StringIO())
    assert os.environ["GRPC_VERBOSITY"] == "DEBUG"
