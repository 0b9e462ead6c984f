"""What a streamed answer said, and when: read after the bytes were timestamped.

Nearly all events of a stream carry content and nothing else, so those are not parsed: an event that
is the same as a parsed one but for its text says no more than that one did, and where the rest
varies, the bytes ``"content":"`` are searched for, which cannot occur inside a JSON string, where
quotes are escaped. Every other event is parsed. The invariant: which events carry content, and when
each was complete, is the same as if all of them had been parsed. It does not know what a token is.
"""

from collections.abc import Mapping
from typing import Any

import orjson

from capacity.load.records import Failure

Json = Mapping[str, Any]

_CONTENT_KEYS = {"chat": "content", "completions": "text", "responses": "delta"}
_DONE = b"[DONE]"
_NEVER = b"\n"  # no event begins so: it is what events are split by
_LIMIT_MESSAGE = 300
_SIGNS_OF_MORE = (b'"usage":{', b'_reason":"', b'"usage": {', b'_reason": "')


class AnswerReader:
    """Fed with pieces of a body in order; ``endpoint`` is chat, completions or responses.

    ``arrivals`` has one time for each event with content. ``text`` is kept only when asked for,
    which makes every event be parsed.
    """

    def __init__(self, endpoint: str, *, keep_text: bool = False) -> None:
        self.arrivals: list[int] = []
        self.usage: Json = {}
        self.finish_reason = ""
        self.failure: Failure | None = None
        self.message = ""
        self.ended = False  # by [DONE], or by the last event of the responses endpoint
        self.has_content = False
        self._responses = endpoint == "responses"
        self._key = _CONTENT_KEYS[endpoint]
        self._keep_text = keep_text
        self._text: list[str] = []
        self._rest = b""
        self._content = b""  # the bytes that begin content in this stream, learnt from its events
        self._no_content = b""
        self._before, self._after = _NEVER, b""  # an event around its text

    @property
    def text(self) -> str:
        return "".join(self._text)

    def read_events(self, pieces: list[bytes], times: list[int]) -> None:
        """Server-sent events; ``times[i]`` is when ``pieces[i]`` came."""
        body = b"".join(pieces)
        if b"\r" in body:  # never inside JSON
            pieces = [piece.replace(b"\r", b"") for piece in pieces]
            body = b"".join(pieces)
        events = (self._rest + body).split(b"\n\n")
        end = -len(self._rest)  # of an event, counted in this body
        self._rest = events.pop()
        content, no_content = self._content, self._no_content
        before, after = self._before, self._after
        begin, beyond = len(before), len(after)
        arrived = self.arrivals.append
        piece = 0
        piece_end = len(pieces[0]) if pieces else 0
        for event in events:
            end += len(event) + 2
            while piece_end < end:
                piece += 1
                piece_end += len(pieces[piece])
            if (
                event.startswith(before)
                and event.endswith(after)
                and begin < event.find(b'"', begin) == len(event) - beyond
            ) or (
                content and content in event and no_content not in event and not _says_more(event)
            ):
                arrived(times[piece])
            elif self._parse(event):
                arrived(times[piece])
                if not self._keep_text:
                    content, no_content = self._learn(event)
                    before, after = self._before, self._after
                    begin, beyond = len(before), len(after)

    def read_whole(self, body: bytes) -> None:
        """The body of an answer that was not streamed, or of an error."""
        try:
            parsed = orjson.loads(body)
        except orjson.JSONDecodeError:
            text = body[:_LIMIT_MESSAGE].decode(errors="replace").strip()
            self._fail(Failure.MALFORMED, text or "no JSON")
            return
        if not isinstance(parsed, dict):
            self._fail(Failure.MALFORMED, "no JSON object")
            return
        self._take(parsed)
        self.ended = True

    def end_of_stream(self) -> None:
        """Judge a stream that has ended: a clean close is no proof that it was complete."""
        if self._rest.strip() and self._parse(self._rest):
            self.failure = self.failure or Failure.UNFINISHED
        if self.failure is None and not (self.ended or self.finish_reason):
            self._fail(Failure.UNFINISHED, "the stream ended without finish_reason and [DONE]")

    def _learn(self, event: bytes) -> tuple[bytes, bytes]:
        for form in (b'"%b":"', b'"%b": "'):
            content = form % self._key.encode()
            if content in event and not (self._responses and b"output_text" not in event):
                self._content, self._no_content = content, content + b'"'
                begin = event.index(content) + len(content)
                end = event.find(b'"', begin)
                if event.count(content) == 1 and end > begin and not _says_more(event):
                    self._before, self._after = event[:begin], event[end:]
        return self._content, self._no_content

    def _parse(self, event: bytes) -> bool:
        """Whether the event carries content."""
        data = b"\n".join(
            line[5:].strip() for line in event.split(b"\n") if line.startswith(b"data:")
        )
        if not data:
            return False  # a comment, which keeps a connection alive
        if data == _DONE:
            self.ended = True
            return False
        try:
            parsed = orjson.loads(data)
        except orjson.JSONDecodeError:
            self._fail(Failure.MALFORMED, f"not JSON: {data[:100].decode(errors='replace')}")
            return False
        return self._take(parsed) if isinstance(parsed, dict) else False

    def _take(self, parsed: dict[str, Any]) -> bool:
        if parsed.get("error"):
            self._take_error(parsed["error"])
            return False
        if self._responses:
            return self._take_response(parsed)
        self.usage = parsed.get("usage") or self.usage
        found = False
        for choice in parsed.get("choices") or ():
            self.finish_reason = choice.get("finish_reason") or self.finish_reason
            part = choice.get("delta") or choice.get("message") or choice
            text = part.get(self._key)
            if text or _other_content(part):
                found = True
                if isinstance(text, str):
                    self._text.append(text)
        self.has_content |= found
        return found

    def _take_response(self, parsed: dict[str, Any]) -> bool:
        """One event of the responses endpoint, or its whole object."""
        kind = str(parsed.get("type", ""))
        whole = parsed.get("response") if kind else parsed
        if isinstance(whole, dict):
            self.usage = whole.get("usage") or self.usage
            if whole.get("error"):
                self._take_error(whole["error"])
            if whole.get("status") in ("completed", "incomplete"):
                self.finish_reason = str(whole["status"])
                self.ended = True
        if not kind:
            for item in parsed.get("output") or ():
                for part in item.get("content") or ():
                    self._text.append(str(part.get("text", "")))
            self.has_content |= bool(self.text)
            return self.has_content
        delta = parsed.get("delta") if kind.endswith(".delta") else None
        if isinstance(delta, str) and delta:
            self.has_content = True
            if "reasoning" not in kind:
                self._text.append(delta)
            return True
        return False

    def _take_error(self, error: object) -> None:
        message = error.get("message") if isinstance(error, dict) else error
        self._fail(Failure.ERROR_EVENT, str(message)[:_LIMIT_MESSAGE])

    def _fail(self, failure: Failure, message: str) -> None:
        if self.failure is None:
            self.failure, self.message = failure, message


def _says_more(event: bytes) -> bool:
    """Whether an event may carry more than content. Such are always parsed."""
    return any(sign in event for sign in _SIGNS_OF_MORE)


def _other_content(part: Mapping[str, Any]) -> bool:
    """Reasoning and tool arguments are output too."""
    return bool(
        part.get("reasoning_content")
        or part.get("reasoning")
        or part.get("refusal")
        or part.get("tool_calls")
    )
