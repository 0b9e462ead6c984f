"""Reasoning between two markers, apart from the answer that follows it."""

from dataclasses import dataclass

from server.text.families.marked_text import MarkedText
from server.text.families.parts import Content, Part, PartReader, Reasoning


@dataclass(frozen=True, slots=True)
class ReasoningMarks:
    open: str
    close: str


KNOWN = (ReasoningMarks("<think>", "</think>"), ReasoningMarks("◁think▷", "◁/think▷"))


def reasoning_marks(template: str | None) -> ReasoningMarks | None:
    """The markers of a model that reasons first, as its chat template shows it."""
    return next((m for m in KNOWN if template and m.open in template and m.close in template), None)


class ReasoningReader:
    """``inner`` reads what comes after the reasoning, and all of a text that has none.

    ``begun``: the prompt has opened the reasoning already.
    """

    def __init__(self, marks: ReasoningMarks, inner: PartReader, *, begun: bool) -> None:
        self._marks = marks
        self._inner = inner
        self._text = MarkedText()
        self._inside = begun
        self._over = False
        self._blank = True  # since the last marker

    def push(self, text: str) -> list[Part]:
        if self._over:
            return self._inner.push(text)
        self._text.push(text)
        parts: list[Part] = []
        while self._text and not self._over and self._advance(parts):
            pass
        return parts

    def finish(self) -> list[Part]:
        rest = self._text.take_all()
        parts: list[Part] = []
        if rest and self._inside:
            parts += self._reasoning(rest)
        elif rest:
            parts += self._inner.push(rest)
        return parts + self._inner.finish()

    def _advance(self, parts: list[Part]) -> bool:
        if self._inside:
            before, marker = self._text.take_until((self._marks.close,))
            parts += self._reasoning(before)
            if marker is not None:
                self._inside, self._over = False, True
                rest = self._text.take_all()
                self._inner = _WithoutLeadingSpace(self._inner)
                parts += self._inner.push(rest)
            return marker is not None
        beginning = self._text.take_all()
        begun = beginning.lstrip()
        if begun.startswith(self._marks.open):
            self._text.push(begun.removeprefix(self._marks.open))
            self._inside = True
            return True
        if self._marks.open.startswith(begun):
            self._text.push(beginning)  # it may still become the marker
            return False
        self._over = True  # the answer has begun: what follows is no reasoning
        parts += self._inner.push(beginning)
        return False

    def _reasoning(self, text: str) -> list[Part]:
        if self._blank:
            text = text.lstrip("\n")
            self._blank = not text
        return [Reasoning(text)] if text else []


class _WithoutLeadingSpace:
    """Models put empty lines between their reasoning and their answer."""

    def __init__(self, inner: PartReader) -> None:
        self._inner = inner
        self._blank = True

    def push(self, text: str) -> list[Part]:
        if self._blank:
            text = text.lstrip("\n")
            self._blank = not text
        return self._inner.push(text) if text else []

    def finish(self) -> list[Part]:
        return self._inner.finish()


class PlainReader:
    """All text is content: for models without tools or reasoning of their own."""

    def push(self, text: str) -> list[Part]:
        return [Content(text)] if text else []

    def finish(self) -> list[Part]:
        return []
