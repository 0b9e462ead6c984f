"""W3C trace context: which trace a request belongs to, and our span in it.

A trace that the caller began is kept; else one begins here. Source: W3C Trace Context, level 2.
"""

import re
import secrets
from dataclasses import dataclass

_TRACEPARENT = re.compile(rb"00-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})\Z")
_NOTHING = b"0"


@dataclass(frozen=True, slots=True)
class TraceContext:
    trace_id: str  # 32 hex digits
    parent_id: str  # 16, the caller's span
    span_id: str  # ours
    flags: str

    @property
    def traceparent(self) -> bytes:
        return f"00-{self.trace_id}-{self.span_id}-{self.flags}".encode()


def trace_of(headers: dict[bytes, bytes]) -> TraceContext | None:
    """The caller's trace with a span of ours; None where the caller traces nothing."""
    given = _TRACEPARENT.match(headers.get(b"traceparent", b""))
    if given is None or not given[1].strip(_NOTHING) or not given[2].strip(_NOTHING):
        return None
    trace_id, parent_id, flags = (part.decode() for part in given.groups())
    return TraceContext(trace_id, parent_id, secrets.token_hex(8), flags)
