"""What is asked: sessions of turns, each with a prompt and an output length.

A request without a conversation is a session of one turn. Session n is a pure function of the seed
and n, so any worker can make any of them and a run can be repeated. This module does not know when
anything is sent.
"""

from pathlib import Path
from random import Random

import msgspec

from capacity.load.errors import WrongOption
from capacity.load.lengths import LengthPairs, Lengths
from capacity.load.text import Calibration, Text
from capacity.load.traces import MOONCAKE_BLOCK_TOKENS, TraceRow, read_trace


class PrefixPool(msgspec.Struct, frozen=True, kw_only=True):
    """Every prompt begins with one of ``count`` shared texts of ``tokens`` tokens."""

    count: int
    tokens: int


class WorkloadSpec(msgspec.Struct, frozen=True, kw_only=True):
    """``nonce`` is put first in every prompt, so that earlier runs' caches do not serve this one;
    ``nonce_per_request`` keeps requests of this run apart too.
    """

    input: Lengths
    output: Lengths
    pairs: LengthPairs | None = None
    prefix: PrefixPool | None = None
    turns: Lengths | None = None
    think_s: float = 0.0
    trace: str | None = None
    seed: int = 0
    nonce: str = ""
    nonce_per_request: bool = False


class Turn(msgspec.Struct, frozen=True, kw_only=True):
    """``input_tokens`` is 0 where it is not known beforehand. ``continues``: the messages of the
    session so far come first. ``delay_s`` is the pause after the answer before it.
    """

    prompt: str | tuple[int, ...]
    input_tokens: int
    output_tokens: int
    continues: bool = False
    at_s: float | None = None
    delay_s: float = 0.0


class Workload:
    """``count`` is the number of sessions, None without end; ``starts_s`` are their times, where a
    trace gives them, and ``rows`` what it says.
    """

    def __init__(self, spec: WorkloadSpec, calibration: Calibration) -> None:
        self._spec = spec
        self._calibration = calibration
        self._text = Text()
        self.rows: list[list[TraceRow]] = []
        self.count: int | None = None
        if spec.trace is not None:
            self.rows = _by_session(read_trace(Path(spec.trace)))
            self.count = len(self.rows)
        self.starts_s = [rows[0].at_s for rows in self.rows]

    def session(self, number: int) -> list[Turn]:
        if self.rows:
            rows = self.rows[number]
            return [self._trace_turn(row, number, turn) for turn, row in enumerate(rows)]
        source = Random(f"{self._spec.seed}/{number}")
        turns = self._spec.turns.draw(source) if self._spec.turns is not None else 1
        return [self._drawn_turn(source, number, turn) for turn in range(turns)]

    def _drawn_turn(self, source: Random, number: int, turn: int) -> Turn:
        spec = self._spec
        if spec.pairs is not None:
            given, made = source.choice(spec.pairs.pairs)
        else:
            given, made = spec.input.draw(source), spec.output.draw(source)
        parts = []
        total = given
        if spec.prefix is not None and turn == 0:
            which = source.randrange(spec.prefix.count)
            parts.append(self._fresh(spec.prefix.tokens, "prefix", spec.seed, which))
            total += spec.prefix.tokens
        words = self._calibration.words(given)
        parts.append(self._text.words(words, "request", spec.seed, number, turn))
        return Turn(
            prompt=self._prompt(parts, number, turn),
            input_tokens=total if turn == 0 else 0,
            output_tokens=made,
            continues=turn > 0,
            delay_s=spec.think_s if turn else 0.0,
        )

    def _trace_turn(self, row: TraceRow, number: int, turn: int) -> Turn:
        delay_s = row.delay_s if row.delay_s is not None else self._spec.think_s
        prompt: str | tuple[int, ...]
        if row.token_ids is not None:
            prompt, tokens = row.token_ids, len(row.token_ids)
        elif row.text is not None:
            prompt, tokens = self._prompt([row.text], number, turn), 0
        else:
            tokens = row.input_tokens or 1
            prompt = self._prompt(self._parts_of(row, tokens, number, turn), number, turn)
        continues = turn > 0 and not row.block_hashes
        return Turn(
            prompt=prompt,
            input_tokens=0 if continues else tokens,
            output_tokens=row.output_tokens,
            continues=continues,
            at_s=row.at_s,
            delay_s=delay_s if turn else 0.0,
        )

    def _parts_of(self, row: TraceRow, tokens: int, number: int, turn: int) -> list[str]:
        """Equal hashes give equal text at equal places, so shared prefixes are shared here too."""
        parts = []
        shared = 0
        whole_blocks = min(len(row.block_hashes), tokens // MOONCAKE_BLOCK_TOKENS)
        for block in row.block_hashes[:whole_blocks]:
            parts.append(self._fresh(MOONCAKE_BLOCK_TOKENS, "block", block))
            shared += MOONCAKE_BLOCK_TOKENS
        if row.prefix_group is not None and row.prefix_tokens:
            shared = min(row.prefix_tokens, tokens - 1)
            parts.append(self._fresh(shared, "group", row.prefix_group))
        left = round((tokens - shared - self._calibration.overhead) / self._calibration.per_word)
        if left > 0 or not parts:
            last = row.block_hashes[whole_blocks:]  # of a block that the prompt fills in part
            key = ("block", *last) if last else ("row", number, turn)
            parts.append(self._text.words(max(1, left), *key))
        return parts

    def _fresh(self, tokens: int, *key: object) -> str:
        words = self._calibration.words(tokens, without_overhead=True)
        return self._text.words(words, *key)

    def _prompt(self, parts: list[str], number: int, turn: int) -> str:
        spec = self._spec
        if turn == 0 and spec.nonce:
            each = (number,) if spec.nonce_per_request else ()
            return " ".join([nonce_words(self._text, spec.nonce, *each), *parts])
        return " ".join(parts)


def nonce_words(text: Text, nonce: str, *each: object) -> str:
    """The nonce as words, so that it costs the same tokens in every prompt."""
    return text.words(4, "nonce", nonce, *each)


def parse_prefix(written: str) -> PrefixPool:
    """``4x512``: four shared prefixes of 512 tokens; ``512`` is one.

    Raises:
        WrongOption: it is neither.
    """
    count, cross, tokens = written.rpartition("x")
    if not tokens.isdigit() or (cross and not count.isdigit()):
        raise WrongOption(f"--prefix {written!r}: write COUNTxTOKENS, such as 4x512")
    pool = PrefixPool(count=int(count or 1), tokens=int(tokens))
    if pool.count < 1 or pool.tokens < 1:
        raise WrongOption(f"--prefix {written!r}: both numbers must be at least 1")
    return pool


def _by_session(rows: list[TraceRow]) -> list[list[TraceRow]]:
    sessions: dict[object, list[TraceRow]] = {}
    for number, row in enumerate(rows):
        sessions.setdefault(number if row.session is None else row.session, []).append(row)
    return list(sessions.values())
