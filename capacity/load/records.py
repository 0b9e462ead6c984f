"""One attempted request as the client saw it; what ``requests.jsonl`` holds, one a line.

Times are nanoseconds since the start of the run, read from the monotonic clock before anything is
parsed; 0 in a time other than ``intended_ns`` means that it never came. A request that failed has a
record like any other: nothing is dropped.
"""

import enum

import msgspec


class Failure(enum.StrEnum):
    """Classes of errors. An HTTP status has its own: ``http 503``."""

    REFUSED = "connection refused"
    UNREACHABLE = "cannot connect"
    CLOSED = "connection closed"
    TIMEOUT = "timeout"
    ERROR_EVENT = "error event"
    UNFINISHED = "stream without an end"
    MALFORMED = "malformed answer"
    EMPTY = "answer without content"
    EXHAUSTED = "client out of ports or files"  # not the server's doing
    ABANDONED = "no end within the grace time"
    INTERRUPTED = "interrupted"  # the test was stopped; says nothing about the server


class Record(msgspec.Struct, kw_only=True, omit_defaults=True):
    """``intended_ns`` is when the load's schedule wanted the request sent, ``started_ns`` when the
    client began to, ``sent_ns`` when its bytes were handed to the socket: between the latter two
    lies the time to connect. ``done_ns`` of a failed request is when the failure was noticed.
    ``chunks_ns`` are the arrivals of events with content; an event is no token. Token counts are
    the server's usage, None where it gave none.
    """

    index: int
    stage: int
    intended_ns: int
    session: int = 0
    turn: int = 0
    worker: int = 0
    started_ns: int = 0
    sent_ns: int = 0
    first_byte_ns: int = 0
    first_token_ns: int = 0
    last_token_ns: int = 0
    done_ns: int = 0
    chunks_ns: list[int] = []
    wanted_input: int = 0
    wanted_output: int = 0
    input_tokens: int | None = None
    output_tokens: int | None = None
    cached_tokens: int | None = None
    status: int = 0
    error: str = ""
    message: str = ""
    finish_reason: str = ""
    new_connection: bool = False
    server_ms: dict[str, float] = {}  # stages that the server told in `server-timing`

    @property
    def succeeded(self) -> bool:
        return not self.error

    @property
    def ttft_ns(self) -> int | None:
        """From intended to the first token."""
        return self.first_token_ns - self.intended_ns if self.first_token_ns else None

    @property
    def tpot_ns(self) -> float | None:
        """Mean time per output token after the first; None below two tokens or without usage."""
        if not self.first_token_ns or self.output_tokens is None or self.output_tokens < 2:  # noqa: PLR2004
            return None
        return (self.last_token_ns - self.first_token_ns) / (self.output_tokens - 1)

    @property
    def end_to_end_ns(self) -> int | None:
        """From intended to the last token, or to the end of an answer that was not streamed."""
        end = self.last_token_ns or self.done_ns
        return end - self.intended_ns if end else None
