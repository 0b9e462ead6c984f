"""Prompts of a wanted number of tokens for a model whose tokenizer is not known.

Prompts are common English words, nearly all of which are one token in every byte-pair vocabulary.
How many tokens a server counts for n words is a straight line, ``overhead + per_word * n``, and two
small requests before the test find it (``Calibration``). What was asked for and what the server
counted are both reported, so an error here is seen.

Texts are slices of one long random text: cheap at any length, equal for equal keys, different in
their first words for different keys. That is all a prefix cache can see.
"""

from hashlib import blake2b
from importlib.resources import files
from random import Random

import msgspec

WORDS = tuple(files("capacity.load").joinpath("words.txt").read_text().split())
_CORPUS_WORDS = 1 << 16
_CORPUS_SEED = 0x48_52


class Calibration(msgspec.Struct, frozen=True, kw_only=True):
    """A prompt of n words has ``overhead + per_word * n`` tokens on this server."""

    overhead: float = 0.0
    per_word: float = 1.0

    def words(self, tokens: int, *, without_overhead: bool = False) -> int:
        given = tokens if without_overhead else tokens - self.overhead
        return max(1, round(given / self.per_word))


class Text:
    """Random text by key. Two keys of equal content give the same words."""

    def __init__(self) -> None:
        source = Random(_CORPUS_SEED)
        words = source.choices(WORDS, k=_CORPUS_WORDS)
        self._text = " ".join(words) + " "
        self._starts = self._offsets(words)

    @staticmethod
    def _offsets(words: list[str]) -> list[int]:
        starts, position = [], 0
        for word in words:
            starts.append(position)
            position += len(word) + 1
        return [*starts, position]

    def words(self, count: int, *key: object) -> str:
        """``count`` words; the first of them are the key's digest, so keys differ early."""
        number = int.from_bytes(blake2b(repr(key).encode(), digest_size=8).digest())
        first = []
        for _ in range(min(count, 4)):
            number, index = divmod(number, len(WORDS))
            first.append(WORDS[index])
        return " ".join(first) + self._slice(number % _CORPUS_WORDS, count - len(first))

    def _slice(self, start: int, count: int) -> str:
        """``count`` words from ``start``, each with a space before it, round and round."""
        parts = []
        while count > 0:
            end = min(start + count, _CORPUS_WORDS)
            parts.append(self._text[self._starts[start] : self._starts[end]])
            count -= end - start
            start = 0
        text = "".join(parts)
        return f" {text[:-1]}" if text else ""
