"""Requests and sampling parameters on the wire. Knows nothing of who sends them to whom."""

from __future__ import annotations

from collections.abc import Sequence

from proto.errors import InvalidRequest, RemoteProtocolError
from proto.gen import tandem_pb2 as pb
from proto.ids import RequestId
from proto.request import MAX_CHOICES, Request, SamplingParams
from proto.wire.envelope import given, has

_MASK64 = (1 << 64) - 1
_ANY_LOGPROBS = 1 << 31
"""The router's own limit on logprobs is a setting; a worker only needs the number to be one."""


def fill_request(message: pb.Request, request: Request) -> None:
    message.id = request.id
    message.prompt.extend(request.prompt)
    fill_params(message.params, request.params)
    message.cache_salt = request.cache_salt
    message.priority = request.priority
    for tokens in request.forced:
        message.forced.add().tokens.extend(tokens)


def read_request(message: pb.Request) -> Request:
    given(message, "id", "prompt")
    has(message, "params")
    params = read_params(message.params)
    if params.seed is None:
        raise RemoteProtocolError("a request without a seed")
    if message.forced and len(message.forced) != params.n:
        raise RemoteProtocolError(f"{len(message.forced)} lists of forced tokens for {params.n} choices")
    return Request(
        id=RequestId(message.id),
        prompt=tuple(message.prompt),
        params=params,
        cache_salt=message.cache_salt,
        priority=message.priority,
        forced=tuple(tuple(choice.tokens) for choice in message.forced),
    )


def fill_params(message: pb.SamplingParams, params: SamplingParams) -> None:
    """None stays apart from empty; sequences arrive as tuples, a mapping of biases as sorted pairs."""
    message.n = params.n
    message.temperature = params.temperature
    message.top_p = params.top_p
    message.top_k = params.top_k
    message.min_p = params.min_p
    message.presence_penalty = params.presence_penalty
    message.frequency_penalty = params.frequency_penalty
    message.repetition_penalty = params.repetition_penalty
    message.include_stop_str_in_output = params.include_stop_str_in_output
    message.min_tokens = params.min_tokens
    message.ignore_eos = params.ignore_eos
    message.skip_special_tokens = params.skip_special_tokens
    message.spaces_between_special_tokens = params.spaces_between_special_tokens
    if params.seed is not None:
        message.seed = params.seed & _MASK64
    if params.max_tokens is not None:
        message.max_tokens = params.max_tokens
    if params.logprobs is not None:
        message.logprobs = params.logprobs
    if params.logit_bias is not None:
        message.logit_bias.SetInParent()
        for token, bias in params.bias_items:
            message.logit_bias.tokens.append(token)
            message.logit_bias.biases.append(bias)
    if params.stop is not None:
        message.stop.SetInParent()
        message.stop.values.extend(params.stop_strings)
    _fill_ids(message.stop_token_ids, params.stop_token_ids)
    _fill_ids(message.allowed_token_ids, params.allowed_token_ids)


def _fill_ids(message: pb.IdList, ids: Sequence[int] | None) -> None:
    if ids is not None:
        message.SetInParent()
        message.values.extend(ids)


def read_params(message: pb.SamplingParams) -> SamplingParams:
    """Raises RemoteProtocolError for values that no router would have let through."""
    if not 1 <= message.n <= MAX_CHOICES:
        raise RemoteProtocolError(f"{message.n} choices; 1 to {MAX_CHOICES} are possible")
    bias = message.logit_bias
    if len(bias.tokens) != len(bias.biases):
        raise RemoteProtocolError("LogitBias's tokens and biases differ in length")
    params = SamplingParams(
        n=message.n,
        temperature=message.temperature,
        top_p=message.top_p,
        top_k=message.top_k,
        min_p=message.min_p,
        presence_penalty=message.presence_penalty,
        frequency_penalty=message.frequency_penalty,
        repetition_penalty=message.repetition_penalty,
        logit_bias=tuple(zip(bias.tokens, bias.biases, strict=True)) if message.HasField("logit_bias") else None,
        seed=message.seed if message.HasField("seed") else None,
        stop=tuple(message.stop.values) if message.HasField("stop") else None,
        stop_token_ids=tuple(message.stop_token_ids.values) if message.HasField("stop_token_ids") else None,
        include_stop_str_in_output=message.include_stop_str_in_output,
        min_tokens=message.min_tokens,
        max_tokens=message.max_tokens if message.HasField("max_tokens") else None,
        ignore_eos=message.ignore_eos,
        logprobs=message.logprobs if message.HasField("logprobs") else None,
        allowed_token_ids=tuple(message.allowed_token_ids.values) if message.HasField("allowed_token_ids") else None,
        skip_special_tokens=message.skip_special_tokens,
        spaces_between_special_tokens=message.spaces_between_special_tokens,
    )
    try:
        params.checked(max_logprobs=_ANY_LOGPROBS)
    except InvalidRequest as error:
        raise RemoteProtocolError(f"sampling parameters that were never checked: {error.message}") from error
    return params
