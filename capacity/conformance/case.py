"""One thing that clients rely on, and how a server is asked whether it holds."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import httpx

from capacity.conformance.server import Server

Outcome = Literal["holds", "fails", "not offered"]


class Fails(Exception):
    """The server answered, and not as clients need it; the text says what was found."""


class NotOffered(Exception):
    """The server has no such endpoint or feature, which is no fault of its other ones."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """``reason`` says what goes wrong without it, ``breaks`` for which clients."""

    name: str
    reason: str
    breaks: str
    check: Callable[[Server], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    case: Case
    outcome: Outcome
    detail: str = ""


def expect(condition: object, otherwise: str) -> None:
    """
    Raises:
        Fails: unless ``condition`` is true.
    """
    if not condition:
        raise Fails(otherwise)


def offered(answer: httpx.Response) -> dict[str, Any]:
    """The JSON of a success.

    Raises:
        NotOffered: there is no such path.
        Fails: it is another failure.
    """
    if answer.status_code == httpx.codes.NOT_FOUND:
        raise NotOffered("there is no such endpoint")
    expect(answer.status_code == httpx.codes.OK, f"HTTP {answer.status_code}: {answer.text[:200]}")
    whole: dict[str, Any] = answer.json()
    return whole
