"""The front door for people: the command line, offline ``LLM``, and all tiers on one machine.

``from tandem import LLM, SamplingParams`` works, and loads torch only then: the command line stays instant.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from proto.version import __version__

if TYPE_CHECKING:
    from proto.request import SamplingParams
    from tandem.llm import LLM
    from tandem.outputs import CompletionOutput, Logprob, RequestOutput

__all__ = ["LLM", "CompletionOutput", "Logprob", "RequestOutput", "SamplingParams", "__version__"]

_HOMES = {
    "LLM": "tandem.llm",
    "SamplingParams": "proto.request",
    "CompletionOutput": "tandem.outputs",
    "Logprob": "tandem.outputs",
    "RequestOutput": "tandem.outputs",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
