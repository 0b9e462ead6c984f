"""What differs between families of chat models: how they write calls of tools.

A family reads what a model wrote, and writes the grammar of what it may write when a call is
forced. Which family a model is of follows from its chat template.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from server.text.families.parts import PartReader

NewCallId = Callable[[], str]
# A marker as an item of a Lark grammar: its token where it is one that text cannot spell.
Spell = Callable[[str], str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tool:
    """``parameters`` is a JSON schema; ``definition`` is what the caller sent, for the template."""

    name: str
    parameters: dict[str, Any]
    definition: dict[str, Any]


class Family(Protocol):
    """``signs``: all of these in a chat template tell that it is of this family. ``markers`` are
    the control tokens that the reader must see. ``arguments_as_text``: its templates want the
    arguments of earlier calls as JSON text, not as objects. ``reads_every_text``: also texts
    without tools have its markers.
    """

    @property
    def name(self) -> str: ...
    @property
    def signs(self) -> tuple[str, ...]: ...
    @property
    def markers(self) -> tuple[str, ...]: ...
    @property
    def arguments_as_text(self) -> bool: ...
    @property
    def reads_every_text(self) -> bool: ...

    def reader(self, new_call_id: NewCallId, tools: Sequence[Tool]) -> PartReader:
        """For one text; ``tools`` may be none."""
        ...

    def grammar(self, tools: Sequence[Tool], *, parallel: bool, spell: Spell) -> str:
        """Lark rules, the first of them ``calls``: one call of ``tools``, or several."""
        ...
