"""Every error this system raises on purpose.

    ServingError
    ├── RequestError            the caller must change the request; never retried
    │   ├── InvalidRequest          one field is wrong; ``param`` names it
    │   ├── ContextLengthExceeded
    │   └── ModelNotFound
    ├── CapacityError           nothing is wrong; try later or elsewhere
    │   ├── Overloaded              a bounded queue or pool is full
    │   ├── RateLimited             the caller's own share is used up
    │   ├── NoWorkerAvailable
    │   └── Draining                the worker takes no new work
    ├── TransferError           a KV transfer did not complete; the pair may be at fault
    │   ├── TransferAborted         one end gave it up on purpose, as where a client hangs up
    │   ├── TransferTimeout
    │   ├── TransferCorrupt         bytes arrived that do not match their checksum
    │   └── LayoutMismatch          a deployment fault: retrying cannot help
    ├── WorkerLost              a worker stopped answering while it held the request
    ├── DeadlineExceeded        the request's own time ran out; ``stage`` says where
    ├── Cancelled               the client or the gateway withdrew the request
    ├── ConfigError             the operator must change a setting, a file or a port
    ├── ProtocolError           a peer sent what it must not; its message was dropped
    └── EngineError             computing failed for this request; the worker goes on

An error says what happened (``code``, message, ``details``) and whether another attempt could
succeed (``retryable``). It does not know about HTTP: ``server.openai.errors`` holds that table.
Bugs are not here; they stay ``AssertionError`` and friends and end as a plain 500.
"""

from typing import ClassVar


class ServingError(Exception):
    """Base of every expected failure. ``details`` are JSON-safe and go to the log, not the user."""

    code: ClassVar[str] = "internal_error"
    retryable: ClassVar[bool] = False

    def __init__(
        self,
        message: str,
        *,
        stage: str = "",
        retry_after_s: float | None = None,
        **details: str | float | None,
    ) -> None:
        super().__init__(message)
        self.stage = stage
        self.retry_after_s = retry_after_s
        self.details = details


class RequestError(ServingError):
    code = "invalid_request"


class InvalidRequest(RequestError):
    """``param`` is the path of the field in the request body, such as ``messages[0].role``."""

    code = "invalid_value"

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


def invalid_field(param: str, problem: str) -> InvalidRequest:
    """The error of the field at ``param``, which its message begins with."""
    return InvalidRequest(f"{param}: {problem}", param=param)


class ContextLengthExceeded(RequestError):
    code = "context_length_exceeded"


class ModelNotFound(RequestError):
    code = "model_not_found"


class CapacityError(ServingError):
    code = "capacity"
    retryable = True


class Overloaded(CapacityError):
    code = "overloaded"


class RateLimited(CapacityError):
    code = "rate_limit_exceeded"


class NoWorkerAvailable(CapacityError):
    code = "no_worker_available"


class Draining(CapacityError):
    code = "draining"


class TransferError(ServingError):
    code = "kv_transfer_failed"
    retryable = True


class TransferAborted(TransferError):
    code = "kv_transfer_aborted"


class TransferTimeout(TransferError):
    code = "kv_transfer_timeout"


class TransferCorrupt(TransferError):
    code = "kv_transfer_corrupt"


class LayoutMismatch(TransferError):
    code = "kv_layout_mismatch"
    retryable = False


class WorkerLost(ServingError):
    code = "worker_lost"
    retryable = True


class DeadlineExceeded(ServingError):
    code = "deadline_exceeded"


class Cancelled(ServingError):
    code = "cancelled"


class ConfigError(ServingError):
    code = "config_error"


class ProtocolError(ServingError):
    code = "protocol_error"


class EngineError(ServingError):
    code = "engine_error"
    retryable = True


def _leaves(cls: type[ServingError]) -> list[type[ServingError]]:
    return [cls, *(leaf for child in cls.__subclasses__() for leaf in _leaves(child))]


BY_CODE: dict[str, type[ServingError]] = {cls.code: cls for cls in _leaves(ServingError)}
