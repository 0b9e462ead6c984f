"""What a chat model's text is made of, once its markers have been read: the alphabet of readers."""

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Content:
    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    text: str


@dataclass(frozen=True, slots=True)
class CallBegun:
    """``index`` counts the calls of one text from 0, without gaps."""

    index: int
    call_id: str
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """More of the JSON text of a call that has begun."""

    index: int
    text: str


Part = Content | Reasoning | CallBegun | CallArguments


class PartReader(Protocol):
    """Reads one text, cut anywhere. Invariant: the parts do not depend on where it is cut, save
    that longer pieces of text give fewer and longer parts.
    """

    def push(self, text: str) -> list[Part]:
        """What is certain now; empty while a marker or a name is incomplete."""
        ...

    def finish(self) -> list[Part]:
        """What was held back, when no more text can come."""
        ...
