"""Text to token ids, and each token id to its bytes.

Invariant: a control token comes out of ``encode_rendered`` only where the chat template wrote its
literal; the same literal in a caller's text stays text. Loading is ``server.text.loading``'s
business, joining bytes into characters is ``server.text.detokenizer``'s.
"""

import json
import re
from collections.abc import Iterable, Iterator

from tokenizers import Tokenizer

from protocol.errors import InvalidRequest
from runtime.vocabulary import (
    PieceStyle,
    Vocabulary,
    decoder_stages,
    is_byte_piece,
    piece_style,
    token_bytes,
)
from server.text.word_cache import encode_whole, word_cache


class TextTokenizer:
    """One model's tokenizer. Nothing changes after construction, so threads may share it.

    ``control_tokens`` are the literals that callers must not be able to write: special tokens, and
    whatever else the chat template uses to mark turns.

    Raises:
        ConfigError: the tokenizer turns pieces into text in a way that cannot be streamed.
    """

    def __init__(self, tokenizer: Tokenizer, *, control_tokens: Iterable[str]) -> None:
        self._tokenizer = tokenizer
        self.vocab_size: int = tokenizer.get_vocab_size(with_added_tokens=True)
        stages = json.loads(tokenizer.to_str())
        decoder = stages["decoder"]
        self.piece_style: PieceStyle = piece_style(decoder)
        self.strips_leading_space = _strips_leading_space(decoder)
        self._words = word_cache(tokenizer)
        around = stages["post_processor"]
        self._adds_nothing = around is None or around["type"] == "ByteLevel"
        self._pieces: dict[int, bytes] = {}
        self._whole_texts: dict[int, str | None] = {}
        added = tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        ids = {text: tokenizer.token_to_id(text) for text in control_tokens}
        self._control_ids: dict[str, int] = {t: i for t, i in ids.items() if i is not None}
        self._all_control_ids = frozenset(self._control_ids.values())
        longest_first = sorted(self._control_ids, key=len, reverse=True)
        literals = "|".join(map(re.escape, longest_first)) or r"(?!)"
        self._literal = re.compile(literals)
        self._every_literal = re.compile(f"(?=(?:{literals}))")

    def token_id(self, literal: str) -> int | None:
        found: int | None = self._tokenizer.token_to_id(literal)
        return found

    def token(self, token_id: int) -> str:
        """The vocabulary's own spelling of a token; empty where the vocabulary has a hole."""
        spelling: str | None = self._tokenizer.id_to_token(token_id)
        return spelling or ""

    def piece(self, token_id: int) -> bytes:
        """The bytes that a token stands for; possibly not UTF-8 by themselves."""
        piece = self._pieces.get(token_id)
        if piece is None:
            piece = self._pieces[token_id] = token_bytes(self.token(token_id), self.piece_style)
        return piece

    def whole_text(self, token_id: int) -> str | None:
        """The characters that a token stands for; None if its bytes are not UTF-8 by themselves."""
        if token_id not in self._whole_texts:
            try:
                self._whole_texts[token_id] = self.piece(token_id).decode()
            except UnicodeDecodeError:
                self._whole_texts[token_id] = None
        return self._whole_texts[token_id]

    def vocabulary(self) -> Vocabulary:
        tokens = tuple(map(self.piece, range(self.vocab_size)))
        return Vocabulary(tokens=tokens, special_ids=tuple(sorted(self.special_ids)))

    def is_byte_piece(self, token_id: int) -> bool:
        return self.piece_style == "byte_fallback" and is_byte_piece(self.token(token_id))

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Ids of text whose literals are all the caller's to write, such as a raw prompt."""
        if self._words is not None and (self._adds_nothing or not add_special_tokens):
            return self._words.encode(text)
        return encode_whole(self._tokenizer, text, add_special_tokens=add_special_tokens)

    def has_control_literal(self, text: str) -> bool:
        return self._literal.search(text) is not None

    def pieces_of(self, text: str) -> Iterator[tuple[str, int | None]]:
        """``text`` cut at its control tokens: these with their ids, the rest with None."""
        start = 0
        for found in self._literal.finditer(text):
            if start < found.start():
                yield text[start : found.start()], None
            yield found.group(), self._control_ids[found.group()]
            start = found.end()
        if start < len(text):
            yield text[start:], None

    def mark_control_literals(self, text: str, mark: str) -> str:
        """``text`` with ``mark`` before every place where a control token could be read."""
        return self._every_literal.sub(lambda _: mark, text)

    def encode_rendered(self, text: str, *, mark: str | None) -> list[int]:
        """Ids of a rendered template, without what the tokenizer would add around it.

        ``mark`` is the character that ``mark_control_literals`` put into the callers' texts, or
        None when none of them has a control literal. Marks do not reach the ids.
        """
        if mark is None:
            ids = self.encode(text, add_special_tokens=False)
            written = [self._control_ids[found] for found in self._literal.findall(text)]
            if list(filter(self._all_control_ids.__contains__, ids)) == written:
                return ids
            # A normaliser has made a control literal out of something else (full-width forms).
        return self._encode_piecewise(text, mark)

    def _encode_piecewise(self, text: str, mark: str | None) -> list[int]:
        ids: list[int] = []
        start = 0
        for found in self._literal.finditer(text):
            if mark is not None and text[max(found.start() - 1, 0) : found.start()] == mark:
                continue  # a caller wrote it
            ids += self._encode_plain(text[start : found.start()], mark)
            ids.append(self._control_ids[found.group()])
            start = found.end()
        return ids + self._encode_plain(text[start:], mark)

    def _encode_plain(self, text: str, mark: str | None) -> list[int]:
        """Ids by the model's merges alone, for which added tokens do not exist."""
        if mark is not None:
            text = text.replace(mark, "")
        if not text:
            return []
        tokenizer = self._tokenizer
        if tokenizer.normalizer is not None:
            text = tokenizer.normalizer.normalize_str(text)
        words = [text]
        if tokenizer.pre_tokenizer is not None:
            words = [word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)]
        ids = [token.id for word in words for token in tokenizer.model.tokenize(word)]
        if not self.special_ids.isdisjoint(ids):
            raise InvalidRequest("messages: the text spells one of the model's control tokens")
        return ids


def _strips_leading_space(decoder: dict[str, object] | None) -> bool:
    return any(stage["type"] == "Strip" and stage.get("start") for stage in decoder_stages(decoder))
