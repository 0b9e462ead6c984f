"""Text that comes in pieces and has markers in it. Never lets part of a marker through."""

from collections.abc import Callable, Sequence

from server.text.families.parts import Part


class MarkedText:
    __slots__ = ("_held",)

    def __init__(self) -> None:
        self._held = ""

    def push(self, text: str) -> None:
        self._held += text

    def take_until(self, markers: Sequence[str]) -> tuple[str, str | None]:
        """The text before the first of ``markers`` and that marker, both taken; or the text that
        cannot belong to a marker, and None.
        """
        held = self._held
        found = [(at, -len(marker), marker) for marker in markers if (at := held.find(marker)) >= 0]
        if found:
            at, _, marker = min(found)
            self._held = held[at + len(marker) :]
            return held[:at], marker
        safe = len(held) - max(_open_beginning(marker, held) for marker in markers)
        self._held = held[safe:]
        return held[:safe], None

    def take_all(self) -> str:
        held, self._held = self._held, ""
        return held

    def read(self, advance: Callable[[list[Part]], bool]) -> list[Part]:
        """Parts of what is held: ``advance`` takes up to the next marker and adds to them, and is
        False when there is none yet.
        """
        parts: list[Part] = []
        while self._held and advance(parts):
            pass
        return parts

    def __bool__(self) -> bool:
        return bool(self._held)


def _open_beginning(marker: str, text: str) -> int:
    """How many characters at the end of ``text`` begin ``marker``."""
    for length in range(min(len(marker) - 1, len(text)), 0, -1):
        if text.endswith(marker[:length]):
            return length
    return 0
