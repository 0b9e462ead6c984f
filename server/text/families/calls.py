"""Bookkeeping that readers of calls share: dense numbers, ids, and one call at a time."""

from server.text.families.family import NewCallId
from server.text.families.json_call import JsonCall
from server.text.families.parts import CallArguments, CallBegun, Content, Part


class Calls:
    """The calls of one text so far."""

    __slots__ = ("_new_call_id", "count")

    def __init__(self, new_call_id: NewCallId) -> None:
        self._new_call_id = new_call_id
        self.count = 0

    def begin(self, name: str, call_id: str | None = None) -> CallBegun:
        begun = CallBegun(self.count, call_id or self._new_call_id(), name)
        self.count += 1
        return begun

    def arguments(self, text: str) -> list[Part]:
        """More arguments of the call that has begun last."""
        return [CallArguments(self.count - 1, text)] if text else []


class JsonCallReader:
    """Parts of one ``JsonCall``. Ends as content if it turns out to be no call."""

    __slots__ = ("_begun", "_call", "_calls")

    def __init__(self, calls: Calls) -> None:
        self._calls = calls
        self._call = JsonCall()
        self._begun = False

    @property
    def open(self) -> bool:
        return self._call.open

    @property
    def in_string(self) -> bool:
        return self._call.in_string

    @property
    def raw(self) -> str:
        return self._call.raw

    @property
    def name(self) -> str | None:
        return self._call.name

    def push(self, text: str) -> tuple[list[Part], str]:
        """Parts, and what of ``text`` comes after the object."""
        rest = self._call.push(text)
        return self._parts(), rest

    def finish(self, *, otherwise: str = "") -> list[Part]:
        """The end of the call; ``otherwise`` precedes its text where it was none after all."""
        if self._call.name is None:
            return [Content(otherwise + self._call.raw)] if otherwise + self._call.raw else []
        self._call.complete()
        return self._parts()

    def _parts(self) -> list[Part]:
        name = self._call.name
        if name is None:
            return []
        parts: list[Part] = []
        if not self._begun:
            self._begun = True
            parts.append(self._calls.begin(name))
        return parts + self._calls.arguments(self._call.take())
