"""The process that tries grammars out before any worker sees them. Its owner may kill it.

Standard input has the vocabulary, then one ``Trial`` after another; standard output answers each
with a ``Verdict``. It ends when its input ends.
"""

import resource
import sys

import msgspec

from protocol.errors import InvalidRequest
from runtime.grammars import Grammars, Kind, grammar_of
from runtime.vocabulary import Vocabulary
from server.child_frames import read_frame, write_frame

MAX_MEMORY_BYTES = 4 << 30


class Trial(msgspec.Struct, frozen=True, kw_only=True):
    kind: Kind
    source: str
    lenient: bool


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """``grammar`` is what workers get; None where ``reason`` says why there is none."""

    grammar: str | None
    reason: str = ""


def main() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    source, answers = sys.stdin.buffer, sys.stdout.buffer
    vocabulary = read_frame(source)
    if vocabulary is None:
        return
    grammars = Grammars(msgspec.msgpack.decode(vocabulary, type=Vocabulary))
    write_frame(answers, Verdict(grammar=None, reason="ready"))
    while (frame := read_frame(source)) is not None:
        write_frame(answers, judge(msgspec.msgpack.decode(frame, type=Trial), grammars))


def judge(trial: Trial, grammars: Grammars) -> Verdict:
    """Does what a worker will do: compile, and work out the first mask."""
    try:
        grammar = grammar_of(trial.kind, trial.source, lenient=trial.lenient)
        grammars.matcher(grammar).allowed()
    except InvalidRequest as error:
        return Verdict(grammar=None, reason=str(error))
    return Verdict(grammar=grammar)


if __name__ == "__main__":
    main()
