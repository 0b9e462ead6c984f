"""From the text of an answer's choices to events on a stream: the hot path of streaming.

``deliver`` runs once for each choice and engine step, called by the reader of the step's frame; in
the steady state it is three joined byte strings and one write.

Invariant: the events of a choice say all of its text once and in order, however fast the client
reads. For a client that does not keep up, text gathers here and becomes one larger event.
"""

from server.openai.answer import Answer, Events
from server.openai.choice import Choice
from server.openai.events import AnswerEvents
from server.openai.sse import EventStream


class AnswerStream:
    def __init__(self, answer: Answer, stream: EventStream) -> None:
        form = answer.form
        self._events: Events = AnswerEvents(answer) if form is None else form.events(answer)
        self._stream = stream
        self._include_usage = answer.asked.include_usage
        self._unopened = {choice.index for choice in answer.choices}
        self._unfinished = len(answer.choices)
        self._gathered: dict[Choice, str] = {}

    def deliver(self, choice: Choice, text: str) -> None:
        """Write what there is to say now; ``choice.finish_reason`` makes it the choice's end."""
        if not self._stream.keeps_up:
            self._gathered[choice] = self._gathered.get(choice, "") + text
            self._stream.gather(self._take_gathered)
            return
        if text and choice.finish_reason is None and choice.index not in self._unopened:
            if events := self._events.text(choice, text):
                self._stream.write(events)
            return
        events = self._render(choice, text)
        if not self._unfinished:
            self._stream.write_last(events)
        elif events:
            self._stream.write(events)

    def _take_gathered(self) -> bytes:
        gathered, self._gathered = self._gathered, {}
        return b"".join(self._render(choice, text) for choice, text in gathered.items())

    def _render(self, choice: Choice, text: str) -> bytes:
        events = self._events
        finished = choice.finish_reason is not None
        parts: list[bytes] = []
        if choice.index in self._unopened:
            self._unopened.discard(choice.index)
            parts.append(events.opening(choice))
        if text or (finished and (choice.tokens or choice.token_ids)):
            parts.append(events.text(choice, text))
        if finished:
            parts.append(events.finish(choice))
            self._unfinished -= 1
            if self._include_usage and not self._unfinished:
                parts.append(events.usage())
        return b"".join(parts)
