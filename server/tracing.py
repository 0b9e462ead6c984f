"""W3C trace context: which trace a request belongs to, and our span in it.

A trace that the caller began is kept; else one begins here. What tracing systems on the way wrote
about it, the trace state, is kept as it came, or not at all. Source: W3C Trace Context, level 2.
"""

import re
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

_TRACEPARENT = re.compile(rb"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?\Z")
_NOTHING = b"0"
_NO_VERSION = b"ff"
_SAMPLED, _RANDOM = 1, 2  # the flags that we know: all of version 00
_STATE_MEMBER = re.compile(  # a value has neither comma nor equals sign, and no space at its end
    rb"([a-z0-9][a-z0-9_\-*/@]{0,255})=[ -+\--<>-~]{0,255}[!-+\--<>-~]\Z"
)
MAX_STATE_MEMBERS = 32
MAX_STATE_BYTES = 512  # what the specification asks everybody to pass on


@dataclass(frozen=True, slots=True)
class TraceContext:
    trace_id: str  # 32 hex digits
    parent_id: str  # 16, the caller's span
    span_id: str  # ours
    flags: str
    state: str = ""  # the caller's ``tracestate``

    @property
    def sampled(self) -> bool:
        """Whether the caller records this trace: else it wants no spans of it."""
        return bool(int(self.flags, 16) & _SAMPLED)

    @property
    def traceparent(self) -> bytes:
        return f"00-{self.trace_id}-{self.span_id}-{self.flags}".encode()


def trace_of(
    headers: Mapping[bytes, bytes], lines: Iterable[tuple[bytes, bytes]] = ()
) -> TraceContext | None:
    """The caller's trace with a span of ours; None where the caller traces nothing.

    Of a later version what version 00 has too is read, as the specification asks. ``lines`` are the
    same headers as they came: a trace state may be in several.
    """
    given = _TRACEPARENT.match(headers.get(b"traceparent", b""))
    if given is None:
        return None
    version, trace_id, parent_id, flags, more = given.groups()
    wrong_version = version == _NO_VERSION or (more and not version.strip(_NOTHING))
    if wrong_version or not trace_id.strip(_NOTHING) or not parent_id.strip(_NOTHING):
        return None
    known = int(flags, 16) & (_SAMPLED | _RANDOM)
    return TraceContext(
        trace_id.decode(),
        parent_id.decode(),
        secrets.token_hex(8),
        f"{known:02x}",
        _state_of(lines) if b"tracestate" in headers else "",
    )


def _state_of(lines: Iterable[tuple[bytes, bytes]]) -> str:
    """Empty where any of it is malformed or it is too long: half of it would be another state."""
    given = b",".join(value for name, value in lines if name == b"tracestate")
    members = [stripped for part in given.split(b",") if (stripped := part.strip(b" \t"))]
    state = b",".join(members)
    if len(members) > MAX_STATE_MEMBERS or len(state) > MAX_STATE_BYTES:
        return ""
    matches = [found for member in members if (found := _STATE_MEMBER.match(member))]
    keys = {found.group(1) for found in matches}
    return state.decode() if len(keys) == len(members) else ""
