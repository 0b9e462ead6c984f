"""From the tokens of an answer's choices to events on a stream: the hot path of streaming.

``deliver`` runs once for each choice and engine step, called by the reader of the step's frame.
With many streams none of a stream's own objects is in the CPU's cache when its turn comes, so the
time goes by how many of them a token touches: in the steady state a ``ChoiceStream`` does it all.

Invariant: the events of a choice say all of its text once and in order, however fast the client
reads. For a client that does not keep up, text gathers here and becomes one larger event.
"""

from collections.abc import Callable
from time import monotonic

import orjson

from server.generation import SteadyText, TokenChunk
from server.metrics import Latencies
from server.openai.answer import Answer, Events
from server.openai.choice import Choice
from server.openai.events import AnswerEvents
from server.openai.sse import EventStream

_NOT_STEADY = (b"", b"")


class ChoiceStream:
    """One choice on its way to the client; ``deliver`` takes its tokens. In the steady state it is
    a ``SteadyText``.
    """

    __slots__ = ("_alone", "_choice", "_exchange", "_gaps", "_observe", "_others", "around")

    def __init__(
        self,
        choice: Choice,
        others: "AnswerStream",
        *,
        gaps: Latencies,
        observe: Callable[[Choice], None],
    ) -> None:
        """``observe`` is told of tokens before they are written, but not of those in the steady
        state: the times between these go to ``gaps``.
        """
        self._choice = choice
        self._others = others
        self._exchange = others.stream.exchange
        self._gaps = gaps
        self._observe = observe
        self._alone = others.has_one_choice
        self.around: tuple[bytes, bytes] = _NOT_STEADY

    def deliver(self, chunk: TokenChunk) -> bool | SteadyText:
        choice = self._choice
        text = choice.accept(chunk)
        exchange = self._exchange
        around = self.around
        if around is _NOT_STEADY or choice.finish_reason is not None or not exchange.clear:
            return self._deliver_any(text)
        now = monotonic()
        self._gaps.observe(now - choice.delivered_at)
        choice.delivered_at = now
        if text:
            exchange.write(b"".join((around[0], orjson.dumps(text), around[1])))
        return self if self._alone and choice.only_spells else True

    @property
    def delivered_at(self) -> float:
        return self._choice.delivered_at

    def lend(self, recall: Callable[[], None]) -> int | None:
        return self._exchange.lend(recall)

    def give_back(self, tokens: int, at: float, unsent: bytes) -> None:
        self._choice.completion_tokens += tokens
        self._choice.delivered_at = at
        self._exchange.end_loan(unsent, wrote=tokens > 0)

    def _deliver_any(self, text: str) -> bool:
        choice, others = self._choice, self._others
        self._observe(choice)
        others.deliver(choice, text)
        if choice.finish_reason is not None:
            return False
        around = others.events.around_text(choice) if others.has_opened(choice) else None
        if around is not None:
            self.around = around
        return True


class AnswerStream:
    """The events of all choices of an answer, in the order in which they are ready."""

    def __init__(self, answer: Answer, stream: EventStream) -> None:
        form = answer.form
        self.events: Events = AnswerEvents(answer) if form is None else form.events(answer)
        self.stream = stream
        self._include_usage = answer.asked.include_usage
        self._unopened = {choice.index for choice in answer.choices}
        self._unfinished = len(answer.choices)
        self._gathered: dict[Choice, str] = {}

    @property
    def has_one_choice(self) -> bool:
        return len(self._unopened) == 1  # of an answer that has not begun

    def has_opened(self, choice: Choice) -> bool:
        """Something of it has been written."""
        return choice.index not in self._unopened

    def deliver(self, choice: Choice, text: str) -> None:
        """Write what there is to say now; ``choice.finish_reason`` makes it the choice's end."""
        if not self.stream.keeps_up:
            self._gathered[choice] = self._gathered.get(choice, "") + text
            self.stream.gather(self._take_gathered)
            return
        events = self._render(choice, text)
        if not self._unfinished:
            self.stream.write_last(events)
        elif events:
            self.stream.write(events)

    def _take_gathered(self) -> bytes:
        gathered, self._gathered = self._gathered, {}
        return b"".join(self._render(choice, text) for choice, text in gathered.items())

    def _render(self, choice: Choice, text: str) -> bytes:
        events = self.events
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
