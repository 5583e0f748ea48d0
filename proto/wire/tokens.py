"""The tokens of one engine step as columns: the one message on the hot path.

A request's id is written once however many tokens it got, and the rare properties (an end, log probabilities) cost
nothing where they are absent.
"""

from __future__ import annotations

from proto.control import Tokens
from proto.errors import RemoteProtocolError
from proto.gen import tandem_pb2 as pb
from proto.ids import Generation, RequestId
from proto.request import FinishReason, TokenLogprobs, TokenOut
from proto.wire.envelope import EnumCodec, column, same_length

_FINISHES = EnumCodec(FinishReason, pb.FinishReason, "FINISH_REASON")


def fill_tokens(message: pb.Tokens, tokens: Tokens) -> None:
    requests = [request for request, _ in tokens.generation_of]
    places = {request: place for place, request in enumerate(requests)}
    for out in tokens.tokens:
        if places.setdefault(out.request, len(requests)) == len(requests):
            requests.append(out.request)
    message.requests.extend(requests)
    message.generation.extend(generation for _, generation in tokens.generation_of)
    message.request_at.extend(places[out.request] for out in tokens.tokens)
    message.choice.extend(out.choice for out in tokens.tokens)
    message.position.extend(out.position for out in tokens.tokens)
    message.token.extend(out.token for out in tokens.tokens)
    for index, out in enumerate(tokens.tokens):
        if out.finish is not None:
            message.finish_at.append(index)
            message.finish.append(_FINISHES.encode(out.finish))  # type: ignore[arg-type]
        if out.stop_token is not None:
            message.stop_at.append(index)
            message.stop_token.append(out.stop_token)
        if out.logprobs is not None:
            message.logprobs_at.append(index)
            _fill_logprobs(message.logprobs.add(), out.logprobs)


def _fill_logprobs(message: pb.TokenLogprobs, logprobs: TokenLogprobs) -> None:
    message.logprob = logprobs.logprob
    message.rank = logprobs.rank
    message.top_token.extend(token for token, _ in logprobs.top)
    message.top_logprob.extend(logprob for _, logprob in logprobs.top)


def read_tokens(message: pb.Tokens) -> Tokens:
    """Raises RemoteProtocolError when the columns do not fit together."""
    same_length(message, "request_at", "choice", "position", "token")
    same_length(message, "finish_at", "finish")
    same_length(message, "stop_at", "stop_token")
    same_length(message, "logprobs_at", "logprobs")
    requests = [RequestId(request) for request in message.requests]
    if not all(requests) or len(message.generation) > len(requests):
        raise RemoteProtocolError("Tokens without the ids of its requests")
    if max(message.request_at, default=-1) >= len(requests):
        raise RemoteProtocolError("a token of a request that is not listed")
    num_tokens = len(message.token)
    finishes = dict(
        zip(
            column("finish_at", message.finish_at, num_tokens),
            (_FINISHES.decode(number) for number in message.finish),
            strict=True,
        )
    )
    stops = dict(zip(column("stop_at", message.stop_at, num_tokens), message.stop_token, strict=True))
    logprobs = dict(
        zip(
            column("logprobs_at", message.logprobs_at, num_tokens),
            (_read_logprobs(entry) for entry in message.logprobs),
            strict=True,
        )
    )
    columns = zip(message.request_at, message.choice, message.position, message.token, strict=True)
    return Tokens(
        tuple(
            (request, Generation(generation)) for request, generation in zip(requests, message.generation, strict=False)
        ),
        tuple(
            TokenOut(
                requests[place], choice, position, token, logprobs.get(index), finishes.get(index), stops.get(index)
            )
            for index, (place, choice, position, token) in enumerate(columns)
        ),
    )


def _read_logprobs(message: pb.TokenLogprobs) -> TokenLogprobs:
    same_length(message, "top_token", "top_logprob")
    return TokenLogprobs(message.logprob, message.rank, tuple(zip(message.top_token, message.top_logprob, strict=True)))
