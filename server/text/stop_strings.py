"""Stop strings over a stream of text that may be cut anywhere, also inside a stop string.

Invariant: what has been released never contains a stop string, nor any beginning of one that the
text to come could still complete.
"""

from collections.abc import Sequence


class StopStrings:
    """Watches one choice's text. The stop string that is complete first wins; of several that end
    at the same character, the longest.
    """

    __slots__ = ("_held", "_include", "_stops", "matched")

    def __init__(self, stops: Sequence[str], *, include_in_output: bool) -> None:
        self._stops = tuple(sorted(stops, key=len, reverse=True))
        self._include = include_in_output
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """The text that is safe to show now. After a match there is nothing more to push."""
        assert self.matched is None
        text = self._held + text
        self._held = ""
        first_end = len(text) + 1
        for stop in self._stops:
            start = text.find(stop)
            if start >= 0 and start + len(stop) < first_end:
                first_end, self.matched = start + len(stop), stop
        if self.matched is not None:
            return text[: first_end if self._include else first_end - len(self.matched)]
        safe = len(text) - max(map(_open_beginning, self._stops, [text] * len(self._stops)))
        self._held = text[safe:]
        return text[:safe]

    def finish(self) -> str:
        """The held text, when nothing can complete a stop string any more."""
        held, self._held = self._held, ""
        return held


def _open_beginning(stop: str, text: str) -> int:
    """How many characters at the end of ``text`` begin ``stop`` without completing it."""
    first = stop[0]
    start = text.find(first, max(0, len(text) - len(stop) + 1))
    while start >= 0:
        if stop.startswith(text[start:]):
            return len(text) - start
        start = text.find(first, start + 1)
    return 0
