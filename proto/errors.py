"""One tree of errors, and what each means for who may try again.

TandemError
├── SetupError                 the deployment is wrong; fix it and start again
│   ├── SettingsError          an unknown or contradictory setting
│   ├── CheckpointError        a model folder that cannot be loaded
│   │   └── UnsupportedModel   an architecture this engine does not know
│   └── DoesNotFit             weights, context or KV cache exceed the memory
├── UserError                  the client's request is wrong; the same request will fail again
│   ├── InvalidRequest         400
│   ├── NotAuthorized          401
│   ├── ModelNotFound          404
│   └── NotSupported           501
├── Unavailable                nothing is wrong with the request; a later try may succeed
│   ├── Overloaded             429, with Retry-After
│   ├── NoWorker               503
│   ├── WorkerLost             503, every attempt was used up
│   └── DeadlineExceeded       504
├── RemoteFault                a peer broke the contract; it is refused and counted, never applied
│   ├── RemoteProtocolError    a message out of order, malformed, or too large
│   ├── StaleMessage           an old generation or a foreign epoch
│   ├── LayoutMismatch         the peer's KV blocks cannot be ours
│   └── CorruptBlock           bytes that do not match their checksum
├── NotFinite                  500, the model and the request do not go together
└── LocalFault                 our own bug: 500
    ├── LocalProtocolError     we asked a state machine for an illegal move
    └── DeviceLost             this process can use its GPU no more, and must end

Knows HTTP status codes so that a router can answer with any of them; knows nothing about HTTP otherwise.
"""

from __future__ import annotations

from typing import ClassVar


class TandemError(Exception):
    """Base of the tree. ``status`` is the HTTP status and ``kind`` the ``type`` of OpenAI's error object."""

    status: ClassVar[int] = 500
    kind: ClassVar[str] = "InternalServerError"

    def __init__(self, message: str, *, param: str | None = None, stage: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.stage = stage


class SetupError(TandemError):
    """The deployment is wrong. The message says what to change."""


class SettingsError(SetupError):
    """A flag, environment variable or YAML key that is unknown, malformed or contradictory."""


class CheckpointError(SetupError):
    """A model folder that is missing files or holds malformed ones."""


class UnsupportedModel(CheckpointError):
    """An architecture the engine does not know. The message names those it does."""


class DoesNotFit(SetupError):
    """Weights, context or KV cache exceed the memory. The message shows the arithmetic."""


class UserError(TandemError):
    status = 400
    kind = "BadRequestError"


class InvalidRequest(UserError):
    """The request is malformed or out of range."""


class NotAuthorized(UserError):
    status = 401
    kind = "AuthenticationError"


class ModelNotFound(UserError):
    status = 404
    kind = "NotFoundError"


class NotSupported(UserError):
    """Understood, but not offered by this deployment."""

    status = 501
    kind = "NotImplementedError"


class Unavailable(TandemError):
    status = 503
    kind = "ServiceUnavailableError"

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        stage: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message, param=param, stage=stage)
        self.retry_after_s = retry_after_s


class Overloaded(Unavailable):
    status = 429
    kind = "RateLimitError"


class NoWorker(Unavailable):
    """No live worker can take this request."""


class WorkerLost(Unavailable):
    """The request's workers died as often as it may be tried."""


class DeadlineExceeded(Unavailable):
    status = 504
    kind = "TimeoutError"


class RemoteFault(TandemError):
    status = 502
    kind = "BadGatewayError"


class RemoteProtocolError(RemoteFault):
    """The peer sent what the contract does not allow at this point."""


class StaleMessage(RemoteFault):
    """A message from an old generation or a foreign epoch. ``highest`` is the newest generation seen."""

    def __init__(self, message: str, *, highest: int = 0) -> None:
        super().__init__(message)
        self.highest = highest


class LayoutMismatch(RemoteFault):
    """The peer's blocks have another shape, dtype, model or wire version."""


class CorruptBlock(RemoteFault):
    """A block's bytes do not match its checksum."""


class NotFinite(TandemError):
    """The model gave logits that are not finite, and any token would be a lie.

    Values too large for its type, or a worker whose weights or memory are damaged: which of them, another worker tells.
    """

    kind = "NotFiniteError"


class LocalFault(TandemError):
    """Our own bug."""


class LocalProtocolError(LocalFault):
    """Our side asked a state machine for a move its table does not list."""


class DeviceLost(LocalFault):
    """The GPU answers this process no more. Nothing but a new process helps; its requests go on elsewhere."""
