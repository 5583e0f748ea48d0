"""The model that is served when none is named: so small that it is part of the package. Made by ``training/``.

What it knows, how well, and what it is for is told in ``builtin/README.md``.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from proto.settings import EngineSettings

NAME = "tandem-builtin"
"""The name clients use for it."""

FOLDER = Path(__file__).with_name("builtin")
DRAFT_FOLDER = FOLDER / "draft"
"""A smaller one of the same tokens, to guess what the first will say."""

NOTICE = (
    "No model was named: serving the built-in one, which knows a few small things. "
    "Give a folder or hub name to serve your own."
)


def with_some_model(engine: EngineSettings) -> EngineSettings:
    """``engine``; where it names no model, with the built-in one."""
    if engine.model.model is not None:
        return engine
    names = engine.model.served_model_name or (NAME,)
    return replace(engine, model=replace(engine.model, model=str(FOLDER), served_model_name=names))
