"""Names for things that cross process boundaries.

An id is opaque to everyone but its maker. ``NewType`` costs nothing at run time and lets the
type checker refuse a ``WorkerId`` where a ``RequestId`` belongs.
"""

import secrets
from typing import NewType

import msgspec

RequestId = NewType(
    "RequestId", str
)  # made by the gateway, one per generated choice; never the client's
GatewayId = NewType("GatewayId", str)  # one per gateway process
WorkerId = NewType(
    "WorkerId", str
)  # "prefill-0", "decode-0/3": stable across restarts of the process
BlockId = NewType("BlockId", int)  # index into one rank's block pool; means nothing elsewhere
Incarnation = NewType("Incarnation", int)  # 63 random bits, new at every process start
Generation = NewType("Generation", int)  # counts the grants of one decode incarnation


class WorkerRef(msgspec.Struct, frozen=True, array_like=True):
    """One life of one worker process: a restarted worker is a different ``WorkerRef``."""

    worker_id: WorkerId
    incarnation: Incarnation


class AttemptRef(msgspec.Struct, frozen=True, array_like=True):
    """One try at one request. A retry is a new attempt, and old attempts' messages are stale."""

    request_id: RequestId
    attempt: int


def new_request_id() -> RequestId:
    return RequestId(secrets.token_hex(12))


def new_incarnation() -> Incarnation:
    return Incarnation(secrets.randbits(63))
