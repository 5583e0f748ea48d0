"""Log probabilities in the two shapes of OpenAI's API. Knows the vocabulary by ``ServedModel``; no sampling."""

from __future__ import annotations

from collections.abc import Sequence

from proto.errors import LocalFault
from proto.request import TokenLogprobs, TokenOut
from router.tokenizer import ServedModel

FLOOR = -9999.0
"""JSON has no infinity."""


def completion_logprobs(
    model: ServedModel, tokens: Sequence[TokenOut], *, as_ids: bool, offset: int
) -> dict[str, object]:
    """The completions shape. ``offset`` is the number of characters of this choice before ``tokens``."""
    shown = [_name(model, out.token, as_ids) for out in tokens]
    offsets: list[int] = []
    for text in shown:
        offsets.append(offset)
        offset += len(text)
    return {
        "text_offset": offsets,
        "token_logprobs": [max(_of(out).logprob, FLOOR) for out in tokens],
        "tokens": shown,
        "top_logprobs": [_top_by_name(model, out, as_ids) for out in tokens],
    }


def _top_by_name(model: ServedModel, out: TokenOut, as_ids: bool) -> dict[str, float]:
    """Most likely first; the chosen token is always there. Of two tokens with one name, the likelier counts."""
    named: dict[str, float] = {}
    for token, logprob in (*_of(out).top, (out.token, _of(out).logprob)):
        named.setdefault(_name(model, token, as_ids), max(logprob, FLOOR))
    return named


def chat_logprobs(model: ServedModel, tokens: Sequence[TokenOut], *, as_ids: bool) -> dict[str, object]:
    """The chat shape."""
    content = [
        {
            **_entry(model, out.token, _of(out).logprob, as_ids),
            "top_logprobs": [_entry(model, token, logprob, as_ids) for token, logprob in _of(out).top],
        }
        for out in tokens
    ]
    return {"content": content, "refusal": None}


def text_length(model: ServedModel, tokens: Sequence[TokenOut], *, as_ids: bool) -> int:
    """Characters that ``tokens`` take in ``text_offset``'s count."""
    return sum(len(_name(model, out.token, as_ids)) for out in tokens)


def _entry(model: ServedModel, token: int, logprob: float, as_ids: bool) -> dict[str, object]:
    return {
        "token": _name(model, token, as_ids),
        "logprob": max(logprob, FLOOR),
        "bytes": list(model.token_bytes(token)),
    }


def _name(model: ServedModel, token: int, as_ids: bool) -> str:
    return f"token_id:{token}" if as_ids else model.token_text(token)


def _of(out: TokenOut) -> TokenLogprobs:
    if out.logprobs is None:
        raise LocalFault("A worker sent a token without the log probabilities that were asked for.")
    return out.logprobs
