"""Responses that were answered lately, for those who ask for them again or continue them.

Bounded in number, size and age; what is too old is gone. Only its own tenant sees a response.
"""

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

import anyio
import orjson

from protocol.errors import InvalidRequest
from runtime.clock import Clock, MonotonicClock
from server.responses.conversation import Message

MAX_RESPONSES = 2048
MAX_BYTES = 64 << 20
MAX_AGE_S = 3600.0


@dataclass(slots=True, kw_only=True)
class StoredResponse:
    """``shown`` is the object as clients see it; ``messages`` the conversation up to its end.
    ``running`` is what cancelling stops, while it is being generated.
    """

    tenant: str
    shown: dict[str, Any]
    messages: list[Message]
    running: anyio.CancelScope | None = None
    stored_at: float = 0.0
    num_bytes: int = field(default=0)


class ResponseStore:
    def __init__(self, clock: Clock | None = None) -> None:
        self._clock = clock or MonotonicClock()
        self._by_id: OrderedDict[str, StoredResponse] = OrderedDict()
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._by_id)

    def put(self, response: StoredResponse) -> None:
        """Keep it, in place of what had its id."""
        response_id = response.shown["id"]
        self._drop(response_id)
        response.stored_at = self._clock.now()
        response.num_bytes = len(orjson.dumps([response.shown, response.messages]))
        self._by_id[response_id] = response
        self._bytes += response.num_bytes
        while self._by_id and self._is_too_much():
            self._drop(next(iter(self._by_id)))

    def get(self, response_id: str, tenant: str, *, param: str | None = None) -> StoredResponse:
        """
        Raises:
            ResponseNotFound: it was never stored, is somebody else's, or is gone.
        """
        while self._by_id and self._is_too_much():
            self._drop(next(iter(self._by_id)))
        found = self._by_id.get(response_id)
        if found is None or found.tenant != tenant:
            raise ResponseNotFound("there is no such response, or none any more", param=param)
        return found

    def delete(self, response_id: str, tenant: str) -> None:
        self.get(response_id, tenant)
        self._drop(response_id)

    def _is_too_much(self) -> bool:
        oldest = next(iter(self._by_id.values()))
        return (
            len(self._by_id) > MAX_RESPONSES
            or self._bytes > MAX_BYTES
            or self._clock.now() - oldest.stored_at > MAX_AGE_S
        )

    def _drop(self, response_id: str) -> None:
        dropped = self._by_id.pop(response_id, None)
        if dropped is not None:
            self._bytes -= dropped.num_bytes


class ResponseNotFound(InvalidRequest):
    code = "response_not_found"
