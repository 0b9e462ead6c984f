"""Token ids to text, one token at a time, never half a character.

Invariant: the pieces that ``push`` and ``finish`` return, joined, are what the tokenizer's own
``decode`` gives for all the ids at once, wherever the sequence was cut.
"""

import codecs
from typing import Protocol

from server.text.tokenizer import TextTokenizer

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_new_utf8_decoder = codecs.getincrementaldecoder("utf-8")


class Detokenizer(Protocol):
    @property
    def between_characters(self) -> bool:
        """Nothing is held: the next token's text, if it has one by itself, is what it adds."""
        ...

    def push(self, token_id: int) -> str:
        """The characters that are complete now; empty while one is still being spelt."""
        ...

    def finish(self) -> str:
        """What is left; bytes that never became a character are replacement characters."""
        ...


def detokenizer(
    tokenizer: TextTokenizer,
    *,
    skip_special_tokens: bool = True,
    shown_ids: frozenset[int] = frozenset(),
) -> Detokenizer:
    """A fresh one for one choice of one request; ``shown_ids`` are never skipped."""
    skipped: frozenset[int] = frozenset()
    if skip_special_tokens:
        special = tokenizer.special_ids  # one set for all requests, as long as they show none
        skipped = special - shown_ids if shown_ids else special
    if tokenizer.piece_style == "byte_level":
        return _ByteLevel(tokenizer, skipped)
    return _ByteFallback(tokenizer, skipped)


class _ByteLevel:
    """Every token is bytes; the text is their concatenation read as UTF-8."""

    __slots__ = ("_decoder", "_open", "_skipped", "_tokenizer")

    def __init__(self, tokenizer: TextTokenizer, skipped: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._skipped = skipped
        self._decoder = _new_utf8_decoder(errors="replace")
        self._open = False  # a character has begun and is not complete

    @property
    def between_characters(self) -> bool:
        return not self._open

    def push(self, token_id: int) -> str:
        if token_id in self._skipped:
            return ""
        if not self._open:
            text = self._tokenizer.whole_text(token_id)
            if text is not None:
                return text
        text = self._decoder.decode(self._tokenizer.piece(token_id))
        self._open = bool(self._decoder.getstate()[0])
        return text

    def finish(self) -> str:
        return self._decoder.decode(b"", True)


class _ByteFallback:
    """Tokens are text; characters outside the vocabulary are spelt as a run of byte tokens.

    A run is text only when all of it is UTF-8, so it is held until it has ended.
    """

    __slots__ = ("_at_start", "_run", "_skipped", "_strips", "_tokenizer")

    def __init__(self, tokenizer: TextTokenizer, skipped: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._skipped = skipped
        self._run = b""
        self._strips = tokenizer.strips_leading_space
        self._at_start = True

    @property
    def between_characters(self) -> bool:
        return not (self._run or self._at_start)

    def push(self, token_id: int) -> str:
        if token_id in self._skipped:
            return ""
        if self._tokenizer.is_byte_piece(token_id):
            self._run += self._tokenizer.piece(token_id)
            return ""
        return self._without_leading_space(
            self._end_run() + self._tokenizer.piece(token_id).decode()
        )

    def finish(self) -> str:
        return self._without_leading_space(self._end_run())

    def _end_run(self) -> str:
        run, self._run = self._run, b""
        try:
            return run.decode()
        except UnicodeDecodeError:
            return _REPLACEMENT * len(run)

    def _without_leading_space(self, text: str) -> str:
        if self._at_start and text:
            self._at_start = False
            if self._strips:
                return text.removeprefix(" ")
        return text
