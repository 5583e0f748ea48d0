from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Role(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ROLE_UNSPECIFIED: _ClassVar[Role]
    ROLE_PREFILL: _ClassVar[Role]
    ROLE_DECODE: _ClassVar[Role]

class Stage(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    STAGE_UNSPECIFIED: _ClassVar[Stage]
    STAGE_RECEIVED: _ClassVar[Stage]
    STAGE_ROUTED: _ClassVar[Stage]
    STAGE_QUEUED: _ClassVar[Stage]
    STAGE_PREFILLING: _ClassVar[Stage]
    STAGE_STREAMING: _ClassVar[Stage]
    STAGE_SEALED: _ClassVar[Stage]
    STAGE_ADOPTED: _ClassVar[Stage]
    STAGE_DECODING: _ClassVar[Stage]
    STAGE_FINISHED: _ClassVar[Stage]
    STAGE_ABORTED: _ClassVar[Stage]
    STAGE_FAILED: _ClassVar[Stage]

class FinishReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FINISH_REASON_UNSPECIFIED: _ClassVar[FinishReason]
    FINISH_REASON_STOP: _ClassVar[FinishReason]
    FINISH_REASON_LENGTH: _ClassVar[FinishReason]
    FINISH_REASON_ABORT: _ClassVar[FinishReason]
    FINISH_REASON_ERROR: _ClassVar[FinishReason]

class RejectReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    REJECT_REASON_UNSPECIFIED: _ClassVar[RejectReason]
    REJECT_REASON_FULL: _ClassVar[RejectReason]
    REJECT_REASON_DRAINING: _ClassVar[RejectReason]
    REJECT_REASON_REFUSED: _ClassVar[RejectReason]
    REJECT_REASON_PEER_LOST: _ClassVar[RejectReason]
    REJECT_REASON_STALE: _ClassVar[RejectReason]
    REJECT_REASON_UNKNOWN: _ClassVar[RejectReason]
    REJECT_REASON_MISMATCH: _ClassVar[RejectReason]

class Phase(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PHASE_UNSPECIFIED: _ClassVar[Phase]
    PHASE_STARTING: _ClassVar[Phase]
    PHASE_LOADING: _ClassVar[Phase]
    PHASE_WARMING: _ClassVar[Phase]
    PHASE_READY: _ClassVar[Phase]
    PHASE_DRAINING: _ClassVar[Phase]
    PHASE_FAILED: _ClassVar[Phase]

class RefuseReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    REFUSE_REASON_UNSPECIFIED: _ClassVar[RefuseReason]
    REFUSE_REASON_FULL: _ClassVar[RefuseReason]
    REFUSE_REASON_DRAINING: _ClassVar[RefuseReason]
    REFUSE_REASON_MISMATCH: _ClassVar[RefuseReason]
    REFUSE_REASON_STALE: _ClassVar[RefuseReason]
ROLE_UNSPECIFIED: Role
ROLE_PREFILL: Role
ROLE_DECODE: Role
STAGE_UNSPECIFIED: Stage
STAGE_RECEIVED: Stage
STAGE_ROUTED: Stage
STAGE_QUEUED: Stage
STAGE_PREFILLING: Stage
STAGE_STREAMING: Stage
STAGE_SEALED: Stage
STAGE_ADOPTED: Stage
STAGE_DECODING: Stage
STAGE_FINISHED: Stage
STAGE_ABORTED: Stage
STAGE_FAILED: Stage
FINISH_REASON_UNSPECIFIED: FinishReason
FINISH_REASON_STOP: FinishReason
FINISH_REASON_LENGTH: FinishReason
FINISH_REASON_ABORT: FinishReason
FINISH_REASON_ERROR: FinishReason
REJECT_REASON_UNSPECIFIED: RejectReason
REJECT_REASON_FULL: RejectReason
REJECT_REASON_DRAINING: RejectReason
REJECT_REASON_REFUSED: RejectReason
REJECT_REASON_PEER_LOST: RejectReason
REJECT_REASON_STALE: RejectReason
REJECT_REASON_UNKNOWN: RejectReason
REJECT_REASON_MISMATCH: RejectReason
PHASE_UNSPECIFIED: Phase
PHASE_STARTING: Phase
PHASE_LOADING: Phase
PHASE_WARMING: Phase
PHASE_READY: Phase
PHASE_DRAINING: Phase
PHASE_FAILED: Phase
REFUSE_REASON_UNSPECIFIED: RefuseReason
REFUSE_REASON_FULL: RefuseReason
REFUSE_REASON_DRAINING: RefuseReason
REFUSE_REASON_MISMATCH: RefuseReason
REFUSE_REASON_STALE: RefuseReason

class Empty(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class TokenList(_message.Message):
    __slots__ = ("tokens",)
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    tokens: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, tokens: _Optional[_Iterable[int]] = ...) -> None: ...

class StringList(_message.Message):
    __slots__ = ("values",)
    VALUES_FIELD_NUMBER: _ClassVar[int]
    values: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, values: _Optional[_Iterable[str]] = ...) -> None: ...

class LogitBias(_message.Message):
    __slots__ = ("tokens", "biases")
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    BIASES_FIELD_NUMBER: _ClassVar[int]
    tokens: _containers.RepeatedScalarFieldContainer[int]
    biases: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, tokens: _Optional[_Iterable[int]] = ..., biases: _Optional[_Iterable[float]] = ...) -> None: ...

class IdList(_message.Message):
    __slots__ = ("values",)
    VALUES_FIELD_NUMBER: _ClassVar[int]
    values: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, values: _Optional[_Iterable[int]] = ...) -> None: ...

class SamplingParams(_message.Message):
    __slots__ = ("n", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias", "seed", "stop", "stop_token_ids", "include_stop_str_in_output", "min_tokens", "max_tokens", "ignore_eos", "logprobs", "allowed_token_ids", "skip_special_tokens", "spaces_between_special_tokens")
    N_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    PRESENCE_PENALTY_FIELD_NUMBER: _ClassVar[int]
    FREQUENCY_PENALTY_FIELD_NUMBER: _ClassVar[int]
    REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    LOGIT_BIAS_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    INCLUDE_STOP_STR_IN_OUTPUT_FIELD_NUMBER: _ClassVar[int]
    MIN_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    IGNORE_EOS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    ALLOWED_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SKIP_SPECIAL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SPACES_BETWEEN_SPECIAL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    n: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    logit_bias: LogitBias
    seed: int
    stop: StringList
    stop_token_ids: IdList
    include_stop_str_in_output: bool
    min_tokens: int
    max_tokens: int
    ignore_eos: bool
    logprobs: int
    allowed_token_ids: IdList
    skip_special_tokens: bool
    spaces_between_special_tokens: bool
    def __init__(self, n: _Optional[int] = ..., temperature: _Optional[float] = ..., top_p: _Optional[float] = ..., top_k: _Optional[int] = ..., min_p: _Optional[float] = ..., presence_penalty: _Optional[float] = ..., frequency_penalty: _Optional[float] = ..., repetition_penalty: _Optional[float] = ..., logit_bias: _Optional[_Union[LogitBias, _Mapping]] = ..., seed: _Optional[int] = ..., stop: _Optional[_Union[StringList, _Mapping]] = ..., stop_token_ids: _Optional[_Union[IdList, _Mapping]] = ..., include_stop_str_in_output: bool = ..., min_tokens: _Optional[int] = ..., max_tokens: _Optional[int] = ..., ignore_eos: bool = ..., logprobs: _Optional[int] = ..., allowed_token_ids: _Optional[_Union[IdList, _Mapping]] = ..., skip_special_tokens: bool = ..., spaces_between_special_tokens: bool = ...) -> None: ...

class Request(_message.Message):
    __slots__ = ("id", "prompt", "params", "cache_salt", "priority", "forced")
    ID_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    PARAMS_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    FORCED_FIELD_NUMBER: _ClassVar[int]
    id: str
    prompt: _containers.RepeatedScalarFieldContainer[int]
    params: SamplingParams
    cache_salt: str
    priority: int
    forced: _containers.RepeatedCompositeFieldContainer[TokenList]
    def __init__(self, id: _Optional[str] = ..., prompt: _Optional[_Iterable[int]] = ..., params: _Optional[_Union[SamplingParams, _Mapping]] = ..., cache_salt: _Optional[str] = ..., priority: _Optional[int] = ..., forced: _Optional[_Iterable[_Union[TokenList, _Mapping]]] = ...) -> None: ...

class Peer(_message.Message):
    __slots__ = ("worker", "epoch", "address")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    worker: str
    epoch: str
    address: str
    def __init__(self, worker: _Optional[str] = ..., epoch: _Optional[str] = ..., address: _Optional[str] = ...) -> None: ...

class FromRouter(_message.Message):
    __slots__ = ("wire_version", "hello", "prefill", "redirect", "attach", "abort", "renew")
    WIRE_VERSION_FIELD_NUMBER: _ClassVar[int]
    HELLO_FIELD_NUMBER: _ClassVar[int]
    PREFILL_FIELD_NUMBER: _ClassVar[int]
    REDIRECT_FIELD_NUMBER: _ClassVar[int]
    ATTACH_FIELD_NUMBER: _ClassVar[int]
    ABORT_FIELD_NUMBER: _ClassVar[int]
    RENEW_FIELD_NUMBER: _ClassVar[int]
    wire_version: int
    hello: Hello
    prefill: Prefill
    redirect: Redirect
    attach: Attach
    abort: Abort
    renew: Renew
    def __init__(self, wire_version: _Optional[int] = ..., hello: _Optional[_Union[Hello, _Mapping]] = ..., prefill: _Optional[_Union[Prefill, _Mapping]] = ..., redirect: _Optional[_Union[Redirect, _Mapping]] = ..., attach: _Optional[_Union[Attach, _Mapping]] = ..., abort: _Optional[_Union[Abort, _Mapping]] = ..., renew: _Optional[_Union[Renew, _Mapping]] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("router_epoch", "worker_epoch", "wire_version")
    ROUTER_EPOCH_FIELD_NUMBER: _ClassVar[int]
    WORKER_EPOCH_FIELD_NUMBER: _ClassVar[int]
    WIRE_VERSION_FIELD_NUMBER: _ClassVar[int]
    router_epoch: str
    worker_epoch: str
    wire_version: int
    def __init__(self, router_epoch: _Optional[str] = ..., worker_epoch: _Optional[str] = ..., wire_version: _Optional[int] = ...) -> None: ...

class Prefill(_message.Message):
    __slots__ = ("request", "generation", "decode", "lease_s")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    DECODE_FIELD_NUMBER: _ClassVar[int]
    LEASE_S_FIELD_NUMBER: _ClassVar[int]
    request: Request
    generation: int
    decode: Peer
    lease_s: float
    def __init__(self, request: _Optional[_Union[Request, _Mapping]] = ..., generation: _Optional[int] = ..., decode: _Optional[_Union[Peer, _Mapping]] = ..., lease_s: _Optional[float] = ...) -> None: ...

class Redirect(_message.Message):
    __slots__ = ("request", "generation", "decode")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    DECODE_FIELD_NUMBER: _ClassVar[int]
    request: str
    generation: int
    decode: Peer
    def __init__(self, request: _Optional[str] = ..., generation: _Optional[int] = ..., decode: _Optional[_Union[Peer, _Mapping]] = ...) -> None: ...

class Attach(_message.Message):
    __slots__ = ("request", "generation", "local", "lease_s", "positions")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    LOCAL_FIELD_NUMBER: _ClassVar[int]
    LEASE_S_FIELD_NUMBER: _ClassVar[int]
    POSITIONS_FIELD_NUMBER: _ClassVar[int]
    request: Request
    generation: int
    local: bool
    lease_s: float
    positions: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, request: _Optional[_Union[Request, _Mapping]] = ..., generation: _Optional[int] = ..., local: bool = ..., lease_s: _Optional[float] = ..., positions: _Optional[_Iterable[int]] = ...) -> None: ...

class Abort(_message.Message):
    __slots__ = ("request", "generation", "choices")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    CHOICES_FIELD_NUMBER: _ClassVar[int]
    request: str
    generation: int
    choices: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, request: _Optional[str] = ..., generation: _Optional[int] = ..., choices: _Optional[_Iterable[int]] = ...) -> None: ...

class Renew(_message.Message):
    __slots__ = ("requests", "lease_s")
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    LEASE_S_FIELD_NUMBER: _ClassVar[int]
    requests: _containers.RepeatedScalarFieldContainer[str]
    lease_s: float
    def __init__(self, requests: _Optional[_Iterable[str]] = ..., lease_s: _Optional[float] = ...) -> None: ...

class FromWorker(_message.Message):
    __slots__ = ("wire_version", "welcome", "tokens", "progress", "rejected", "failed", "load_report")
    WIRE_VERSION_FIELD_NUMBER: _ClassVar[int]
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    REJECTED_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    LOAD_REPORT_FIELD_NUMBER: _ClassVar[int]
    wire_version: int
    welcome: Welcome
    tokens: Tokens
    progress: Progress
    rejected: Rejected
    failed: Failed
    load_report: Load
    def __init__(self, wire_version: _Optional[int] = ..., welcome: _Optional[_Union[Welcome, _Mapping]] = ..., tokens: _Optional[_Union[Tokens, _Mapping]] = ..., progress: _Optional[_Union[Progress, _Mapping]] = ..., rejected: _Optional[_Union[Rejected, _Mapping]] = ..., failed: _Optional[_Union[Failed, _Mapping]] = ..., load_report: _Optional[_Union[Load, _Mapping]] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("worker", "epoch", "role", "wire_version")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    WIRE_VERSION_FIELD_NUMBER: _ClassVar[int]
    worker: str
    epoch: str
    role: Role
    wire_version: int
    def __init__(self, worker: _Optional[str] = ..., epoch: _Optional[str] = ..., role: _Optional[_Union[Role, str]] = ..., wire_version: _Optional[int] = ...) -> None: ...

class Tokens(_message.Message):
    __slots__ = ("requests", "generation", "request_at", "choice", "position", "token", "finish_at", "finish", "stop_at", "stop_token", "logprobs_at", "logprobs")
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    REQUEST_AT_FIELD_NUMBER: _ClassVar[int]
    CHOICE_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    FINISH_AT_FIELD_NUMBER: _ClassVar[int]
    FINISH_FIELD_NUMBER: _ClassVar[int]
    STOP_AT_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_AT_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    requests: _containers.RepeatedScalarFieldContainer[str]
    generation: _containers.RepeatedScalarFieldContainer[int]
    request_at: _containers.RepeatedScalarFieldContainer[int]
    choice: _containers.RepeatedScalarFieldContainer[int]
    position: _containers.RepeatedScalarFieldContainer[int]
    token: _containers.RepeatedScalarFieldContainer[int]
    finish_at: _containers.RepeatedScalarFieldContainer[int]
    finish: _containers.RepeatedScalarFieldContainer[FinishReason]
    stop_at: _containers.RepeatedScalarFieldContainer[int]
    stop_token: _containers.RepeatedScalarFieldContainer[int]
    logprobs_at: _containers.RepeatedScalarFieldContainer[int]
    logprobs: _containers.RepeatedCompositeFieldContainer[TokenLogprobs]
    def __init__(self, requests: _Optional[_Iterable[str]] = ..., generation: _Optional[_Iterable[int]] = ..., request_at: _Optional[_Iterable[int]] = ..., choice: _Optional[_Iterable[int]] = ..., position: _Optional[_Iterable[int]] = ..., token: _Optional[_Iterable[int]] = ..., finish_at: _Optional[_Iterable[int]] = ..., finish: _Optional[_Iterable[_Union[FinishReason, str]]] = ..., stop_at: _Optional[_Iterable[int]] = ..., stop_token: _Optional[_Iterable[int]] = ..., logprobs_at: _Optional[_Iterable[int]] = ..., logprobs: _Optional[_Iterable[_Union[TokenLogprobs, _Mapping]]] = ...) -> None: ...

class TokenLogprobs(_message.Message):
    __slots__ = ("logprob", "rank", "top_token", "top_logprob")
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    TOP_TOKEN_FIELD_NUMBER: _ClassVar[int]
    TOP_LOGPROB_FIELD_NUMBER: _ClassVar[int]
    logprob: float
    rank: int
    top_token: _containers.RepeatedScalarFieldContainer[int]
    top_logprob: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, logprob: _Optional[float] = ..., rank: _Optional[int] = ..., top_token: _Optional[_Iterable[int]] = ..., top_logprob: _Optional[_Iterable[float]] = ...) -> None: ...

class Progress(_message.Message):
    __slots__ = ("request", "generation", "stage", "num_cached", "num_bytes", "duration_s")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    STAGE_FIELD_NUMBER: _ClassVar[int]
    NUM_CACHED_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    DURATION_S_FIELD_NUMBER: _ClassVar[int]
    request: str
    generation: int
    stage: Stage
    num_cached: int
    num_bytes: int
    duration_s: float
    def __init__(self, request: _Optional[str] = ..., generation: _Optional[int] = ..., stage: _Optional[_Union[Stage, str]] = ..., num_cached: _Optional[int] = ..., num_bytes: _Optional[int] = ..., duration_s: _Optional[float] = ...) -> None: ...

class Rejected(_message.Message):
    __slots__ = ("request", "generation", "reason", "message", "retry_after_s", "held")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_S_FIELD_NUMBER: _ClassVar[int]
    HELD_FIELD_NUMBER: _ClassVar[int]
    request: str
    generation: int
    reason: RejectReason
    message: str
    retry_after_s: float
    held: bool
    def __init__(self, request: _Optional[str] = ..., generation: _Optional[int] = ..., reason: _Optional[_Union[RejectReason, str]] = ..., message: _Optional[str] = ..., retry_after_s: _Optional[float] = ..., held: bool = ...) -> None: ...

class Failed(_message.Message):
    __slots__ = ("request", "generation", "status", "kind", "message", "param")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    PARAM_FIELD_NUMBER: _ClassVar[int]
    request: str
    generation: int
    status: int
    kind: str
    message: str
    param: str
    def __init__(self, request: _Optional[str] = ..., generation: _Optional[int] = ..., status: _Optional[int] = ..., kind: _Optional[str] = ..., message: _Optional[str] = ..., param: _Optional[str] = ...) -> None: ...

class Load(_message.Message):
    __slots__ = ("num_running", "num_waiting", "num_waiting_tokens", "num_free_blocks", "num_blocks", "tokens_per_s", "num_soon_free_blocks")
    NUM_RUNNING_FIELD_NUMBER: _ClassVar[int]
    NUM_WAITING_FIELD_NUMBER: _ClassVar[int]
    NUM_WAITING_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_FREE_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_PER_S_FIELD_NUMBER: _ClassVar[int]
    NUM_SOON_FREE_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    num_running: int
    num_waiting: int
    num_waiting_tokens: int
    num_free_blocks: int
    num_blocks: int
    tokens_per_s: float
    num_soon_free_blocks: int
    def __init__(self, num_running: _Optional[int] = ..., num_waiting: _Optional[int] = ..., num_waiting_tokens: _Optional[int] = ..., num_free_blocks: _Optional[int] = ..., num_blocks: _Optional[int] = ..., tokens_per_s: _Optional[float] = ..., num_soon_free_blocks: _Optional[int] = ...) -> None: ...

class ModelCard(_message.Message):
    __slots__ = ("wire_version", "model", "served_names", "digest", "max_model_len", "vocab_size", "eos_token_ids", "block_size", "layout", "hash_namespace", "files")
    class FilesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: bytes
        def __init__(self, key: _Optional[str] = ..., value: _Optional[bytes] = ...) -> None: ...
    WIRE_VERSION_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    SERVED_NAMES_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    MAX_MODEL_LEN_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    EOS_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    HASH_NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    FILES_FIELD_NUMBER: _ClassVar[int]
    wire_version: int
    model: str
    served_names: _containers.RepeatedScalarFieldContainer[str]
    digest: str
    max_model_len: int
    vocab_size: int
    eos_token_ids: _containers.RepeatedScalarFieldContainer[int]
    block_size: int
    layout: str
    hash_namespace: str
    files: _containers.ScalarMap[str, bytes]
    def __init__(self, wire_version: _Optional[int] = ..., model: _Optional[str] = ..., served_names: _Optional[_Iterable[str]] = ..., digest: _Optional[str] = ..., max_model_len: _Optional[int] = ..., vocab_size: _Optional[int] = ..., eos_token_ids: _Optional[_Iterable[int]] = ..., block_size: _Optional[int] = ..., layout: _Optional[str] = ..., hash_namespace: _Optional[str] = ..., files: _Optional[_Mapping[str, bytes]] = ...) -> None: ...

class HealthReport(_message.Message):
    __slots__ = ("wire_version", "phase", "is_ready", "detail", "progress", "last_step_age_s", "is_working")
    WIRE_VERSION_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    IS_READY_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    LAST_STEP_AGE_S_FIELD_NUMBER: _ClassVar[int]
    IS_WORKING_FIELD_NUMBER: _ClassVar[int]
    wire_version: int
    phase: Phase
    is_ready: bool
    detail: str
    progress: float
    last_step_age_s: float
    is_working: bool
    def __init__(self, wire_version: _Optional[int] = ..., phase: _Optional[_Union[Phase, str]] = ..., is_ready: bool = ..., detail: _Optional[str] = ..., progress: _Optional[float] = ..., last_step_age_s: _Optional[float] = ..., is_working: bool = ...) -> None: ...

class Fence(_message.Message):
    __slots__ = ("request", "generation", "prefill_epoch", "decode_epoch")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    PREFILL_EPOCH_FIELD_NUMBER: _ClassVar[int]
    DECODE_EPOCH_FIELD_NUMBER: _ClassVar[int]
    request: str
    generation: int
    prefill_epoch: str
    decode_epoch: str
    def __init__(self, request: _Optional[str] = ..., generation: _Optional[int] = ..., prefill_epoch: _Optional[str] = ..., decode_epoch: _Optional[str] = ...) -> None: ...

class HandoffEnvelope(_message.Message):
    __slots__ = ("wire_version", "fence", "offer", "grant", "refuse", "ack", "nack", "seal", "withdraw", "adopted", "stale")
    WIRE_VERSION_FIELD_NUMBER: _ClassVar[int]
    FENCE_FIELD_NUMBER: _ClassVar[int]
    OFFER_FIELD_NUMBER: _ClassVar[int]
    GRANT_FIELD_NUMBER: _ClassVar[int]
    REFUSE_FIELD_NUMBER: _ClassVar[int]
    ACK_FIELD_NUMBER: _ClassVar[int]
    NACK_FIELD_NUMBER: _ClassVar[int]
    SEAL_FIELD_NUMBER: _ClassVar[int]
    WITHDRAW_FIELD_NUMBER: _ClassVar[int]
    ADOPTED_FIELD_NUMBER: _ClassVar[int]
    STALE_FIELD_NUMBER: _ClassVar[int]
    wire_version: int
    fence: Fence
    offer: Offer
    grant: Grant
    refuse: Refuse
    ack: Ack
    nack: Nack
    seal: Seal
    withdraw: Withdraw
    adopted: Adopted
    stale: Stale
    def __init__(self, wire_version: _Optional[int] = ..., fence: _Optional[_Union[Fence, _Mapping]] = ..., offer: _Optional[_Union[Offer, _Mapping]] = ..., grant: _Optional[_Union[Grant, _Mapping]] = ..., refuse: _Optional[_Union[Refuse, _Mapping]] = ..., ack: _Optional[_Union[Ack, _Mapping]] = ..., nack: _Optional[_Union[Nack, _Mapping]] = ..., seal: _Optional[_Union[Seal, _Mapping]] = ..., withdraw: _Optional[_Union[Withdraw, _Mapping]] = ..., adopted: _Optional[_Union[Adopted, _Mapping]] = ..., stale: _Optional[_Union[Stale, _Mapping]] = ...) -> None: ...

class TransportOffer(_message.Message):
    __slots__ = ("name", "detail")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    name: str
    detail: bytes
    def __init__(self, name: _Optional[str] = ..., detail: _Optional[bytes] = ...) -> None: ...

class Offer(_message.Message):
    __slots__ = ("layout", "layout_text", "numerics", "num_tokens", "num_choices", "hashes", "transports", "lease_s")
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_TEXT_FIELD_NUMBER: _ClassVar[int]
    NUMERICS_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_CHOICES_FIELD_NUMBER: _ClassVar[int]
    HASHES_FIELD_NUMBER: _ClassVar[int]
    TRANSPORTS_FIELD_NUMBER: _ClassVar[int]
    LEASE_S_FIELD_NUMBER: _ClassVar[int]
    layout: str
    layout_text: str
    numerics: str
    num_tokens: int
    num_choices: int
    hashes: bytes
    transports: _containers.RepeatedCompositeFieldContainer[TransportOffer]
    lease_s: float
    def __init__(self, layout: _Optional[str] = ..., layout_text: _Optional[str] = ..., numerics: _Optional[str] = ..., num_tokens: _Optional[int] = ..., num_choices: _Optional[int] = ..., hashes: _Optional[bytes] = ..., transports: _Optional[_Iterable[_Union[TransportOffer, _Mapping]]] = ..., lease_s: _Optional[float] = ...) -> None: ...

class Grant(_message.Message):
    __slots__ = ("num_present", "transport")
    NUM_PRESENT_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    num_present: int
    transport: str
    def __init__(self, num_present: _Optional[int] = ..., transport: _Optional[str] = ...) -> None: ...

class Refuse(_message.Message):
    __slots__ = ("reason", "message", "retry_after_s")
    REASON_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_S_FIELD_NUMBER: _ClassVar[int]
    reason: RefuseReason
    message: str
    retry_after_s: float
    def __init__(self, reason: _Optional[_Union[RefuseReason, str]] = ..., message: _Optional[str] = ..., retry_after_s: _Optional[float] = ...) -> None: ...

class Ack(_message.Message):
    __slots__ = ("upto",)
    UPTO_FIELD_NUMBER: _ClassVar[int]
    upto: int
    def __init__(self, upto: _Optional[int] = ...) -> None: ...

class Nack(_message.Message):
    __slots__ = ("index",)
    INDEX_FIELD_NUMBER: _ClassVar[int]
    index: int
    def __init__(self, index: _Optional[int] = ...) -> None: ...

class SealedChoice(_message.Message):
    __slots__ = ("first_token", "state")
    FIRST_TOKEN_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    first_token: int
    state: bytes
    def __init__(self, first_token: _Optional[int] = ..., state: _Optional[bytes] = ...) -> None: ...

class Seal(_message.Message):
    __slots__ = ("num_blocks", "num_tokens_last", "choices")
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_LAST_FIELD_NUMBER: _ClassVar[int]
    CHOICES_FIELD_NUMBER: _ClassVar[int]
    num_blocks: int
    num_tokens_last: int
    choices: _containers.RepeatedCompositeFieldContainer[SealedChoice]
    def __init__(self, num_blocks: _Optional[int] = ..., num_tokens_last: _Optional[int] = ..., choices: _Optional[_Iterable[_Union[SealedChoice, _Mapping]]] = ...) -> None: ...

class Withdraw(_message.Message):
    __slots__ = ("reason",)
    REASON_FIELD_NUMBER: _ClassVar[int]
    reason: str
    def __init__(self, reason: _Optional[str] = ...) -> None: ...

class Adopted(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Stale(_message.Message):
    __slots__ = ("highest",)
    HIGHEST_FIELD_NUMBER: _ClassVar[int]
    highest: int
    def __init__(self, highest: _Optional[int] = ...) -> None: ...
