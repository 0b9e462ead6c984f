"""W3C trace context: which trace a request belongs to, and our span in it.

A trace that the caller began is kept; else one begins here. Source: W3C Trace Context, level 2.
"""

import re
import secrets
from dataclasses import dataclass

_TRACEPARENT = re.compile(rb"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?\Z")
_NOTHING = b"0"
_NO_VERSION = b"ff"
_SAMPLED, _RANDOM = 1, 2  # the flags that we know: all of version 00


@dataclass(frozen=True, slots=True)
class TraceContext:
    trace_id: str  # 32 hex digits
    parent_id: str  # 16, the caller's span
    span_id: str  # ours
    flags: str

    @property
    def sampled(self) -> bool:
        """Whether the caller records this trace: else it wants no spans of it."""
        return bool(int(self.flags, 16) & _SAMPLED)

    @property
    def traceparent(self) -> bytes:
        return f"00-{self.trace_id}-{self.span_id}-{self.flags}".encode()


def trace_of(headers: dict[bytes, bytes]) -> TraceContext | None:
    """The caller's trace with a span of ours; None where the caller traces nothing.

    Of a later version what version 00 has too is read, as the specification asks.
    """
    given = _TRACEPARENT.match(headers.get(b"traceparent", b""))
    if given is None:
        return None
    version, trace_id, parent_id, flags, more = given.groups()
    wrong_version = version == _NO_VERSION or (more and not version.strip(_NOTHING))
    if wrong_version or not trace_id.strip(_NOTHING) or not parent_id.strip(_NOTHING):
        return None
    known = int(flags, 16) & (_SAMPLED | _RANDOM)
    return TraceContext(trace_id.decode(), parent_id.decode(), secrets.token_hex(8), f"{known:02x}")
