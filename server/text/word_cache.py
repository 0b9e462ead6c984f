"""A tokenizer's answers, word by word, for tokenizers whose words do not see their neighbours.

Byte-level BPE cuts a text into words before it merges anything, and the patterns known here start
a new word at a space that follows something else. So a text is tokenised by its words, most of
which have been seen before, and the tokenizer is only asked for the others.

Invariant: ``encode`` gives what the tokenizer alone would give, whatever was encoded before.
"""

import json
import re
from bisect import bisect_left
from collections.abc import Sequence
from itertools import chain, islice, pairwise
from typing import Any

from tokenizers import Tokenizer

MAX_WORDS = 50_000  # about 10 MB; a text of new words empties the cache and does nothing worse
MAX_WORD_CHARS = 24
MAX_NEW_WORDS = 256  # that a text may teach; one with more goes to the tokenizer as a whole
MAX_ASKED = 32  # times for a text, once between two added tokens: likewise
MAX_TEXT_CHARS = 65_536  # a longer one would keep other threads waiting for as long as it takes

# Each covers every text, starts a match at any space after a non-space, and looks behind nothing.
_WHOLE_TEXT_PATTERNS = frozenset(
    {
        # Llama 3 (https://huggingface.co/meta-llama/Meta-Llama-3-8B, tokenizer.json)
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        # Qwen 2 and 3
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        # DeepSeek-V3, after the numbers and the Chinese and Japanese letters
        r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"
        r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+",
        # gpt-oss, as OpenAI's o200k
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    }
)
# These match no space, so whatever they leave of a text is cut at its spaces all the same.
_SPACELESS_PATTERNS = frozenset({r"\p{N}{1,3}", "[一-龥\u3040-ゟ゠-ヿ]+"})


def word_cache(tokenizer: Tokenizer) -> "WordCache | None":
    """None where a word's tokens may depend on what stands around it, as far as we can tell."""
    stages = json.loads(tokenizer.to_str())
    added = tokenizer.get_added_tokens_decoder().values()
    if (
        _merges_alone(stages["model"])
        and _composes_no_space(stages["normalizer"])
        and _cuts_at_spaces(stages["pre_tokenizer"])
        and not any(t.lstrip or t.rstrip or t.single_word for t in added)
        and (stages["normalizer"] is None or not any(t.normalized for t in added))
    ):
        return WordCache(tokenizer)
    return None


class WordCache:
    """Threads may share it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        # Added tokens are taken out of a text first, the longest of those that begin at a place.
        added = tokenizer.get_added_tokens_decoder()
        self._added_ids = {token.content: token_id for token_id, token in added.items()}
        longest_first = sorted(self._added_ids, key=len, reverse=True)
        self._added = re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")
        self._words: dict[str, tuple[int, ...]] = {}  # after a space, and ending in none
        self._openings: dict[str, tuple[int, ...]] = {}  # the first word after an added token

    def encode(self, text: str) -> list[int]:
        """What ``tokenizer.encode`` gives for ``text`` without special tokens around it."""
        if len(text) > MAX_TEXT_CHARS:
            return encode_whole(self._tokenizer, text, add_special_tokens=False)
        first, *rest = self._added.split(text)
        ids: list[int] = []
        asked = num_new = 0
        for literal, plain in zip([None, *rest[::2]], [first, *rest[1::2]], strict=True):
            if literal is not None:
                ids.append(self._added_ids[literal])
            if not plain:
                continue
            words = plain.split(" ")
            found = self._find(words)
            missing = found.count(None)
            if missing:
                asked, num_new = asked + 1, num_new + missing
                if asked > MAX_ASKED or num_new > MAX_NEW_WORDS:
                    self._learn_some(words, found)
                    return encode_whole(self._tokenizer, text, add_special_tokens=False)
                self._ask(words, found)
            ids += chain.from_iterable(filter(None, found))
        return ids

    def _find(self, words: list[str]) -> list[Sequence[int] | None]:
        """The ids of the words of a text with no added token in it; None where not known."""
        found: list[Sequence[int] | None] = [*map(self._words.get, words)]
        found[0] = None
        if len(words) == 1 or _stands_alone(words[0]):
            found[0] = self._openings.get(words[0])
        elif not words[0]:
            found[0] = ()
        return found

    def _learn_some(self, words: list[str], found: Sequence[Sequence[int] | None]) -> None:
        pairs = zip(words[1:], found[1:], strict=True)
        unknown = islice((word for word, ids in pairs if ids is None), 4 * MAX_NEW_WORDS)
        able = (word for word in unknown if len(word) < MAX_WORD_CHARS and _stands_alone(word))
        if new := [*islice(dict.fromkeys(able), MAX_NEW_WORDS)]:
            self._ask(["", *new], [(), *[None] * len(new)])

    def _ask(self, words: list[str], found: list[Sequence[int] | None]) -> None:
        """Fill what is None in ``found``. Words that do not stand alone, because another space or
        the end of a line is between them, have their ids at the first of them.
        """
        pieces: list[str] = []
        places: list[int] = []  # of each piece, among the words
        place, count = 0, len(words)
        while place < count:
            if found[place] is not None:
                place += 1
                continue
            first = place
            place += 1
            while place < count and not _stands_alone(words[place - 1]):
                found[place] = ()
                place += 1
            piece = " ".join(words[first:place])
            pieces.append(" " + piece if first else piece)
            places.append(first)
        # One text of them all has the same words: it is cut where this one is cut.
        encoding = self._tokenizer.encode("".join(pieces), add_special_tokens=False)
        ids: list[int] = encoding.ids
        starts = [start for start, _ in encoding.offsets]
        ends, end = [0], 0
        for piece in pieces[:-1]:
            end += len(piece)
            ends.append(bisect_left(starts, end, lo=ends[-1]))
        ends.append(len(ids))
        for piece, place, (low, high) in zip(pieces, places, pairwise(ends), strict=True):
            found[place] = ids[low:high]
            if len(piece) <= MAX_WORD_CHARS:
                self._learn(piece, tuple(ids[low:high]), opening=not place)

    def _learn(self, piece: str, ids: tuple[int, ...], *, opening: bool) -> None:
        """An opening that ends in a space is a whole text: else it would go on to the next word."""
        word = piece if opening else piece[1:]
        if " " in word or not (opening or _stands_alone(word)):
            return
        known = self._openings if opening else self._words
        if len(known) >= MAX_WORDS:
            known.clear()
        known[word] = ids


def encode_whole(tokenizer: Tokenizer, text: str, *, add_special_tokens: bool) -> list[int]:
    """Ids by the tokenizer alone."""
    # The batch form is the one that does not compute offsets, which is a third of the time.
    (encoding,) = tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)
    ids: list[int] = encoding.ids
    return ids


def _stands_alone(word: str) -> bool:
    """Whether what follows it, which is a space, begins a word."""
    return bool(word) and not word[-1].isspace()


def _merges_alone(model: dict[str, Any]) -> bool:
    return model["type"] == "BPE" and not model["dropout"] and not model["fuse_unk"]


def _composes_no_space(normalizer: dict[str, Any] | None) -> bool:
    if normalizer is None or normalizer["type"] == "NFC":
        return True
    return normalizer["type"] == "Sequence" and all(
        map(_composes_no_space, normalizer["normalizers"])
    )


def _cuts_at_spaces(pre_tokenizer: dict[str, Any] | None) -> bool:
    if pre_tokenizer is None:
        return False
    sequence = pre_tokenizer["type"] == "Sequence"
    stages = pre_tokenizer["pretokenizers"] if sequence else [pre_tokenizer]
    cuts = False
    for stage in stages:
        match stage:
            case {"type": "Digits"}:
                pass
            case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": bool(own_pattern)}:
                cuts = cuts or own_pattern
            case {
                "type": "Split",
                "behavior": "Isolated",
                "invert": False,
                "pattern": {"Regex": str(pattern)},
            }:
                spelled = pattern.replace("\r", r"\r").replace("\n", r"\n")
                if spelled in _WHOLE_TEXT_PATTERNS:
                    cuts = True
                elif spelled not in _SPACELESS_PATTERNS:
                    return False
            case _:
                return False
    return cuts
